//! Atomic writing and reading of files, with errors that name the path.
//!
//! The only module that accesses the file system for results, checkpoints and models.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::View;
use serde_json::json;

use crate::error::{Error, Result};

/// Converts an I/O error into an [`Error`] with the path, what was being done, and a hint.
pub fn explain(doing: &str, path: &Path, error: &io::Error) -> Error {
    let message = format!("cannot {doing} `{}`: {}", path.display(), plain(error));
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::failed(message)
            .hint("free some space and run the same command again; files saved earlier are intact"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::input(message).hint("choose a writable folder, or change the permissions")
        }
        io::ErrorKind::NotFound => Error::input(message).hint("check the path"),
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::AlreadyExists => Error::input(message),
        _ => Error::failed(message),
    }
}

/// Returns the text of the error without Rust's `(os error 28)`, and in lower case.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => "unknown error".into(),
    }
}

/// Expands `~` to the user's home folder as a shell does, unless a file of that name exists.
pub fn expanded(name: &str) -> PathBuf {
    let below = match name.strip_prefix('~') {
        Some("") => Some(""),
        Some(below) => below.strip_prefix('/'),
        None => None,
    };
    let home = below.and_then(|below| Some(std::env::home_dir()?.join(below)));
    let path = PathBuf::from(name);
    home.filter(|_| !path.exists()).unwrap_or(path)
}

/// Reads the bytes of a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| explain("read", path, &error))
}

/// Byte order mark that Windows programs write before a text.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Reads the text of a file, without its byte order mark.
pub fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read(path)?).map_err(|error| {
        Error::input(format!("`{}` is not UTF-8 text: {error}", path.display()))
    })?;
    match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(text) => Ok(text.to_owned()),
        None => Ok(text),
    }
}

/// Guards the position of files that several threads share. Process-wide.
#[cfg(not(unix))]
static READING: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// A file with random access, which need not fit into memory.
#[derive(Debug)]
pub struct Source {
    file: fs::File,
    path: PathBuf,
    length: u64,
}

impl Source {
    /// Opens a file for reading.
    pub fn open(path: &Path) -> Result<Self> {
        let explained = |error| explain("read", path, &error);
        let file = fs::File::open(path).map_err(explained)?;
        let found = file.metadata().map_err(explained)?;
        if !found.is_file() {
            let message = format!("cannot read `{}`: it is not a file", path.display());
            return Err(Error::input(message));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            length: found.len(),
        })
    }

    /// Returns the length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Fills a buffer with the bytes from offset `at`. Threads may read concurrently.
    pub fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        // Seeking moves the position that all readers of the file share.
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, at);
        #[cfg(not(unix))]
        let read = {
            let _alone = READING.lock();
            let mut file = &self.file;
            file.seek(SeekFrom::Start(at))
                .and_then(|_| file.read_exact(bytes))
        };
        read.map_err(|error| explain("read", &self.path, &error))
    }

    /// Reads `count` bytes from offset `at`. Returns `None` if the file ends earlier, so that a wrong length in a
    /// damaged file is never allocated.
    pub fn bytes(&self, at: u64, count: u64) -> Result<Option<Vec<u8>>> {
        if at.checked_add(count).is_none_or(|end| end > self.length) {
            return Ok(None);
        }
        let mut bytes = vec![0; count as usize];
        self.fill(at, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Returns the BLAKE3 hash of the whole file.
    pub fn hash(&self) -> Result<String> {
        let mut file = &self.file;
        let mut hasher = blake3::Hasher::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| hasher.update_reader(file))
            .map_err(|error| explain("read", &self.path, &error))?;
        Ok(hasher.finalize().to_string())
    }
}

/// Lists the entries of a folder, sorted by name, so that results do not depend on the file system's order.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let explained = |error| explain("list", folder, &error);
    let entries = fs::read_dir(folder).map_err(explained)?;
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(explained)?;
    paths.sort();
    Ok(paths)
}

/// Returns the path with all links resolved.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|error| explain("find", path, &error))
}

/// Maximum length of a user-given name for a file or folder.
const LONGEST_NAME: usize = 64;

/// Checks a name for a file or folder. A valid name cannot lead out of its folder.
///
/// Applies to all names in recipes and arguments: stages, final evaluations, exported models.
///
/// Errors: a message and a hint.
pub fn check_name(name: &str) -> std::result::Result<(), (String, String)> {
    let plain = |letter: u8| letter.is_ascii_alphanumeric() || b"._-".contains(&letter);
    let right = (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with(['.', '-']);
    if right {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    let more = if shown.len() < name.len() { "..." } else { "" };
    let message = format!("invalid file name `{}{more}`", shown.escape_debug());
    let hint = format!(
        "use 1 to {LONGEST_NAME} letters from A to Z, digits, `.`, `_` and `-`, not starting with `.` or `-`"
    );
    Err((message, hint))
}

/// Creates a folder and its parents.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| explain("create the folder", path, &error))
}

/// Writes a file atomically: under a temporary name, flushed to disk, then renamed.
///
/// Readers never see an incomplete file, even after a crash or on a full disk. An older file of that name stays until
/// the new one is complete.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |temporary| fs::write(temporary, bytes))
}

/// Writes a safetensors file atomically, one tensor after another, so that views which produce their bytes on demand
/// are never in memory all at once.
///
/// The crate's own functions keep everything in memory, or write a temporary file that only its owner may read.
pub fn write_tensors<V: View>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, V)>,
    metadata: &HashMap<String, String>,
) -> Result<()> {
    let tensors: BTreeMap<String, V> = tensors.into_iter().collect();
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0;
    for (name, view) in &tensors {
        let begin = end;
        end += view.data_len();
        let (dtype, shape) = (view.dtype(), view.shape());
        header.insert(
            name.clone(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }),
        );
    }
    let mut header = serde_json::Value::Object(header).to_string();
    // Tensors start at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(
        ' ',
        header.len().next_multiple_of(8) - header.len(),
    ));
    write_atomically(path, |temporary| {
        let mut file = io::BufWriter::new(fs::File::create(temporary)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for view in tensors.values() {
            file.write_all(&view.data())?;
        }
        file.flush()
    })
}

/// Writes a file atomically, part by part as they are produced.
///
/// Errors: the first error of a part or of writing.
pub fn write_parts(path: &Path, parts: impl IntoIterator<Item = Result<Vec<u8>>>) -> Result<()> {
    let mut failed = None;
    let written = write_atomically(path, |temporary| {
        let mut file = io::BufWriter::new(fs::File::create(temporary)?);
        for part in parts {
            match part {
                Ok(bytes) => file.write_all(&bytes)?,
                Err(error) => {
                    failed = Some(error);
                    return Err(io::Error::other("cannot produce a part"));
                }
            }
        }
        file.flush()
    });
    failed.map_or(written, Err)
}

/// Returns an error if the path is a folder, a device or a pipe, which a file must not replace.
fn check_replaceable(path: &Path) -> io::Result<()> {
    let why = match fs::metadata(path) {
        Ok(found) if found.is_dir() => "it is a folder",
        Ok(found) if !found.is_file() => "it is not a regular file",
        _ => return Ok(()),
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// Returns an error if a file cannot be written. Call it before the work that produces the content.
pub fn try_writing(path: &Path) -> Result<()> {
    Draft::create(path).map(drop)
}

fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    check_replaceable(path).map_err(|error| explain("write", path, &error))?;
    let temporary = temporary_path(path);
    let written = write(&temporary).and_then(|()| {
        fs::File::open(&temporary)?.sync_all()?;
        settle(&temporary, path)
    });
    written.map_err(|error| {
        // Best effort: the write has already failed, and a leftover temporary file is ignored.
        let _ = fs::remove_file(&temporary);
        explain("write", path, &error)
    })
}

/// A file written with random access, under a temporary name until it is finished.
///
/// Dropping it before that removes the temporary file.
#[derive(Debug)]
pub struct Draft {
    file: Option<fs::File>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Draft {
    /// Creates the temporary file.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = temporary_path(path);
        let file = check_replaceable(path).and_then(|()| fs::File::create(&temporary));
        let file = file.map_err(|error| explain("write", path, &error))?;
        Ok(Self {
            file: Some(file),
            temporary,
            path: path.to_owned(),
        })
    }

    /// Writes bytes at offset `at`.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        file.seek(SeekFrom::Start(at))
            .and_then(|_| file.write_all(bytes))
            .map_err(|error| explain("write", &self.path, &error))
    }

    /// Finishes the file under another name in the same folder, for names that depend on the content.
    pub fn finish_as(mut self, path: &Path) -> Result<()> {
        self.path = path.to_owned();
        self.finish()
    }

    /// Flushes the file and renames it into place.
    pub fn finish(mut self) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let placed = file
            .sync_all()
            .and_then(|()| settle(&self.temporary, &self.path));
        placed.map_err(|error| {
            let _ = fs::remove_file(&self.temporary);
            explain("write", &self.path, &error)
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Best effort: the error that stopped the writing is reported elsewhere.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Maximum length of a line in bytes. Captions are shorter, and a longer line means that the file is not text.
const LONGEST_LINE: u64 = 1 << 20;

/// Iterator over the lines of a text file, without line feeds.
pub struct Lines {
    reader: io::BufReader<fs::File>,
    path: PathBuf,
    number: u64,
}

impl Lines {
    /// Opens a text file.
    ///
    /// Errors: a missing file, or a special file such as a pipe, which cannot be read twice.
    pub fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        Ok(Self {
            reader: io::BufReader::with_capacity(1 << 16, source.file),
            path: source.path,
            number: 0,
        })
    }
}

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(LONGEST_LINE + 1);
        match limited.read_until(b'\n', &mut line) {
            Err(error) => return Some(Err(explain("read", &self.path, &error))),
            Ok(0) => return None,
            Ok(_) => self.number += 1,
        }
        let wrong = |what: String| {
            let message = format!("`{}`, line {}: {what}", self.path.display(), self.number);
            Some(Err(Error::input(message)))
        };
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if line.len() as u64 > LONGEST_LINE {
            return wrong(format!("longer than {LONGEST_LINE} bytes"));
        }
        match String::from_utf8(line) {
            Ok(line) if self.number == 1 => {
                let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line);
                Some(Ok(line.to_owned()))
            }
            Ok(line) => Some(Ok(line)),
            Err(error) => wrong(format!("not UTF-8 text: {error}")),
        }
    }
}

/// Renames a complete file or folder into place and flushes the rename to disk.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    settle(from, to).map_err(|error| explain("rename a file to", to, &error))
}

/// Appends text to a file, such as a log.
pub fn append(path: &Path, text: &str) -> Result<()> {
    append_bytes(path, text.as_bytes())
}

/// Appends bytes to a file.
pub fn append_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|error| explain("write", path, &error))
}

/// Returns the length of a file in bytes, or 0 if it does not exist.
pub fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

/// Returns the length of a file and its modification time in nanoseconds since 1970, to detect a changed file.
///
/// Errors: the path does not exist or is not a file.
pub fn stamp(path: &Path) -> Result<(u64, u64)> {
    let found = fs::metadata(path).map_err(|error| explain("read", path, &error))?;
    if !found.is_file() {
        let message = format!("cannot read `{}`: it is not a file", path.display());
        return Err(Error::input(message));
    }
    let changed = found.modified().ok();
    let since = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    Ok((
        found.len(),
        since.map_or(0, |since| since.as_nanos() as u64),
    ))
}

/// Truncates a file to `size` bytes, if it exists.
pub fn truncate(path: &Path, size: u64) -> Result<()> {
    if !path.is_file() {
        return Ok(());
    }
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(size))
        .map_err(|error| explain("write", path, &error))
}

/// Creates or truncates a file and locks it until the handle is dropped. Returns `None` if another process holds the
/// lock.
pub fn lock(path: &Path) -> Result<Option<fs::File>> {
    locked(fs::OpenOptions::new().create(true).truncate(true), path)
}

/// Same as [`lock`] for a file that keeps its content.
pub fn lock_kept(path: &Path) -> Result<Option<fs::File>> {
    locked(fs::OpenOptions::new().create(true).truncate(false), path)
}

fn locked(options: &mut fs::OpenOptions, path: &Path) -> Result<Option<fs::File>> {
    let file = options
        .write(true)
        .open(path)
        .map_err(|error| explain("write", path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(explain("lock", path, &error)),
    }
}

/// Waits until no other process locks a file, then locks it until the handle is dropped.
pub fn wait_for_lock(path: &Path) -> Result<fs::File> {
    let file = fs::File::create(path).map_err(|error| explain("write", path, &error))?;
    file.lock().map_err(|error| explain("lock", path, &error))?;
    Ok(file)
}

/// Removes the files in one of advxl's folders whose names start with `prefix`.
pub fn remove_beginning(folder: &Path, prefix: &str) -> Result<()> {
    let begins = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix)
    };
    let paths = list(folder)?;
    let mut found = paths.iter().filter(|path| begins(path));
    found.try_for_each(|path| remove_file(path))
}

/// Removes one of advxl's files, such as an old checkpoint.
pub fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|error| explain("remove", path, &error))
}

/// Removes one of advxl's folders with its contents.
pub fn remove_folder(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).map_err(|error| explain("remove", path, &error))
}

/// Removes temporary files that killed processes left in a folder, for files whose names start with `prefix`.
///
/// Only for folders and names to which no other process can be writing.
pub fn remove_leftovers(folder: &Path, prefix: &str) -> Result<()> {
    let left_over = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let process = name
            .strip_suffix(".tmp")
            .and_then(|name| name.rsplit_once('.'));
        let numbered = process.is_some_and(|(_, number)| number.parse::<u32>().is_ok());
        numbered && name.starts_with(prefix) && path.is_file()
    };
    let mut paths = match folder.as_os_str().is_empty() {
        true => list(Path::new("."))?,
        false => list(folder)?,
    };
    paths.retain(|path| left_over(path));
    paths.iter().try_for_each(|path| remove_file(path))
}

/// Returns the temporary name of a file, in the same folder and with the process id.
fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

/// Renames and flushes the rename to disk.
fn settle(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_folder_of(to)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => fs::File::open(folder)?.sync_all(),
        _ => fs::File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(list(folder.path()).unwrap(), [path]);
    }

    #[test]
    fn a_draft_appears_when_it_is_finished_and_leaves_nothing_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        let mut draft = Draft::create(&path).unwrap();
        draft.write(2, b"cd").unwrap();
        drop(draft);
        assert_eq!(list(folder.path()).unwrap().len(), 0);
        let mut draft = Draft::create(&path).unwrap();
        draft.write(2, b"cd").unwrap();
        draft.write(0, b"ab").unwrap();
        assert!(!path.exists());
        draft.finish().unwrap();
        assert_eq!(read(&path).unwrap(), b"abcd");
        assert_eq!(list(folder.path()).unwrap(), [path]);
    }

    #[test]
    fn lines_are_read_one_by_one_and_an_invalid_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write(&path, b"one\n\ntwo\r\nthree").unwrap();
        let lines: Result<Vec<String>> = Lines::open(&path).unwrap().collect();
        assert_eq!(lines.unwrap(), ["one", "", "two\r", "three"]);
        write(&path, b"\xef\xbb\xbfone\n\xef\xbb\xbf").unwrap();
        let lines: Result<Vec<String>> = Lines::open(&path).unwrap().collect();
        assert_eq!(lines.unwrap(), ["one", "\u{feff}"]);
        assert_eq!(read_text(&path).unwrap(), "one\n\u{feff}");
        write(&path, b"one\n\xff\n").unwrap();
        let error = Lines::open(&path).unwrap().nth(1).unwrap().unwrap_err();
        assert!(error.to_string().contains("line 2: not UTF-8"), "{error}");
        write(&path, &vec![b'a'; (1 << 20) + 1]).unwrap();
        let error = Lines::open(&path).unwrap().next().unwrap().unwrap_err();
        assert!(error.to_string().contains("line 1: longer than"), "{error}");
    }

    #[test]
    fn only_leftovers_of_killed_processes_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let names = [
            "a.bin",
            "a.bin.12.tmp",
            "a.bin.x.tmp",
            "b.bin.12.tmp",
            "a.tmp",
        ];
        for name in names {
            write(&folder.path().join(name), b"").unwrap();
        }
        remove_leftovers(folder.path(), "a.bin").unwrap();
        let left = list(folder.path()).unwrap();
        let right = ["a.bin", "a.bin.x.tmp", "a.tmp", "b.bin.12.tmp"];
        assert_eq!(left, right.map(|name| folder.path().join(name)));
    }

    #[test]
    fn names_that_lead_out_of_their_folder_or_are_hidden_are_rejected() {
        for right in ["a", "0", "v1.5", "autoattack-l2", "A_b", &"x".repeat(64)] {
            assert_eq!(check_name(right), Ok(()), "{right}");
        }
        let long = "x".repeat(65);
        for wrong in [
            "", ".", "..", ".a", "-a", "a/b", "/a", "../a", "a\\b", "a b", "\u{e9}", "a\0", "a\n",
            &long,
        ] {
            let (message, hint) = check_name(wrong).unwrap_err();
            assert!(message.len() < 100 && !message.contains('\n'), "{message}");
            assert!(hint.contains("1 to 64 letters"), "{hint}");
        }
    }

    #[test]
    fn a_file_does_not_replace_a_folder_or_a_device() {
        let folder = tempfile::tempdir().unwrap();
        for (path, why) in [
            (folder.path(), "it is a folder"),
            (Path::new("/dev/null"), "it is not a regular file"),
        ] {
            for error in [
                write(path, b"x").unwrap_err(),
                Draft::create(path).unwrap_err(),
                try_writing(path).unwrap_err(),
            ] {
                assert_eq!(error.exit_code(), 2);
                assert!(error.to_string().contains(why), "{error}");
            }
        }
        assert!(try_writing(&folder.path().join("no/folder/a")).is_err());
        try_writing(&folder.path().join("a")).unwrap();
        assert_eq!(list(folder.path()).unwrap().len(), 0);
    }

    #[test]
    fn a_full_disk_is_reported_with_a_hint() {
        // /dev/full fails every write with ENOSPC, as a full disk does.
        let error = append(Path::new("/dev/full"), "line\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("cannot write `/dev/full`: no space left on device"),
            "{error}"
        );
        assert!(error.contains("hint: free some space"), "{error}");
    }

    #[test]
    fn a_missing_file_is_an_input_error() {
        let error = read(Path::new("no/such/file")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error
                .to_string()
                .contains("cannot read `no/such/file`: no such file"),
            "{error}"
        );
    }
}
