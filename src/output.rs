//! Checks of output paths before a command starts: an output never replaces an input or a file of another kind, and its
//! path must be writable.
//!
//! The writing itself is in [`crate::files`].

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;

/// The inputs of a command: paths, each with the flag or key that names it.
#[derive(Clone, Debug, Default)]
pub struct Inputs(Vec<Input>);

#[derive(Clone, Debug)]
struct Input {
    name: String,
    path: PathBuf,
    /// Whether every folder in it counts as a class of images.
    is_data: bool,
}

/// The content of an output file. An existing file is only replaced by one of the same kind.
#[derive(Clone, Copy, Debug)]
pub enum Content {
    /// Safetensors with a tensor of this name.
    Tensors(&'static str),
    /// One JSON object per line, with this key.
    Lines(&'static str),
    /// One JSON object with this key.
    Json(&'static str),
}

impl Inputs {
    /// Adds a file or folder. It may be missing: reading it reports that.
    pub fn add(&mut self, name: impl Into<String>, path: impl Into<PathBuf>) {
        self.push(name, path, false);
    }

    /// Adds images: a file, or a folder that must not get other folders.
    pub fn add_data(&mut self, name: impl Into<String>, path: impl Into<PathBuf>) {
        self.push(name, path, true);
    }

    fn push(&mut self, name: impl Into<String>, path: impl Into<PathBuf>, is_data: bool) {
        self.0.push(Input {
            name: name.into(),
            path: path.into(),
            is_data,
        });
    }

    /// Returns an error unless this command can write the file `path`, given with `flag`.
    ///
    /// Errors: it is an input, even under another name, or a file in an input folder; it exists with other content; it
    /// cannot be written.
    pub fn check_file(&self, flag: &str, path: &Path, content: Content) -> Result<()> {
        // An earlier output of the same kind may be in an input folder, such as the model's, but is not an input.
        let is_earlier = path.is_file() && content.is_in(path);
        let is_input =
            |input: &&Input| is_same(&input.path, path) || (!is_earlier && input.holds(path));
        if let Some(input) = self.0.iter().find(is_input) {
            return Err(input.refuse(flag, path));
        }
        if !is_earlier && path.is_file() && files::size(path) > 0 {
            let (path, kind) = (path.display(), content.describe());
            let message = format!("{flag} `{path}` already exists and is not {kind}");
            return Err(Error::input(message)
                .hint("choose a new file name, or remove this file: only an output of the same kind is replaced"));
        }
        files::try_writing(path).map_err(|error| error.context(flag))
    }

    /// Returns an error if `path`, in the folder given with `flag`, is an input.
    pub fn check_same(&self, flag: &str, path: &Path) -> Result<()> {
        match self.0.iter().find(|input| is_same(&input.path, path)) {
            Some(input) => Err(input.refuse(flag, path)),
            None => Ok(()),
        }
    }

    /// Returns an error if the folder `path`, given with `flag`, is an input or would be inside a folder of images.
    pub fn check_folder(&self, flag: &str, path: &Path) -> Result<()> {
        let refused = |input: &&Input| {
            is_same(&input.path, path) || (input.is_data && is_inside(path, &input.path))
        };
        match self.0.iter().find(refused) {
            Some(input) => Err(input.refuse(flag, path)),
            None => Ok(()),
        }
    }
}

impl Input {
    /// Returns whether it is a folder that contains the file `path`, or that file.
    fn holds(&self, path: &Path) -> bool {
        if !path.is_file() {
            return false;
        }
        // A model folder of links, such as in Hugging Face's cache, contains files stored elsewhere.
        let entries = files::list(&self.path).unwrap_or_default();
        is_inside(path, &self.path) || entries.iter().any(|entry| is_same(entry, path))
    }

    fn refuse(&self, flag: &str, path: &Path) -> Error {
        let Self {
            name, path: own, ..
        } = self;
        let relation = match is_same(own, path) {
            true => format!("is read by this command ({name})"),
            false => format!(
                "is inside `{}`, which is read by this command ({name})",
                own.display()
            ),
        };
        Error::input(format!("{flag} `{}` {relation}", path.display())).hint(format!(
            "choose another path for {flag}: an output never replaces an input"
        ))
    }
}

impl Content {
    fn describe(self) -> String {
        match self {
            Self::Tensors(name) => format!("a safetensors file with `{name}`"),
            Self::Lines(key) => format!("a file of JSON lines with `{key}`"),
            Self::Json(key) => format!("a JSON file with `{key}`"),
        }
    }

    /// Returns whether a file has this content.
    fn is_in(self, path: &Path) -> bool {
        let (found, key) = match self {
            Self::Lines(key) => (first_line(path), key),
            Self::Json(key) => (files::read(path).ok(), key),
            Self::Tensors(key) => (tensors_header(path), key),
        };
        let found = found.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        found.is_some_and(|found| found.get(key).is_some())
    }
}

fn first_line(path: &Path) -> Option<Vec<u8>> {
    let line = files::Lines::open(path).ok()?.next()?;
    line.ok().map(String::into_bytes)
}

/// Returns the JSON header of a safetensors file, or None for other files.
fn tensors_header(path: &Path) -> Option<Vec<u8>> {
    let file = files::Source::open(path).ok()?;
    let length = file.bytes(0, 8).ok()??;
    file.bytes(8, u64::from_le_bytes(length.try_into().ok()?))
        .ok()?
}

/// Returns whether two paths are the same file or folder, also through symbolic or hard links.
pub fn is_same(one: &Path, other: &Path) -> bool {
    resolved(one) == resolved(other) || identity(one).is_some_and(|of| identity(other) == Some(of))
}

/// Returns whether a path is inside a folder, or is that folder.
pub fn is_inside(path: &Path, folder: &Path) -> bool {
    let path = resolved(path);
    path.ancestors().any(|ancestor| is_same(ancestor, folder))
}

#[cfg(unix)]
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> Option<PathBuf> {
    fs::canonicalize(path).ok()
}

/// Resolves links, `.` and `..` of a path, which need not exist.
fn resolved(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut real = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => _ = real.pop(),
            part => real.push(part),
        }
        // Resolve part by part, since `..` after a link is the parent of the link's target.
        real = fs::canonicalize(&real).unwrap_or(real);
    }
    real
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn refusal(result: Result<()>) -> String {
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn an_input_is_recognized_under_every_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["x", "y"] {
            files::write(&at(name), b"").unwrap();
        }
        files::make_folder(&at("in")).unwrap();
        symlink(at("x"), at("link")).unwrap();
        symlink(folder.path(), at("in/up")).unwrap();
        fs::hard_link(at("x"), at("hard")).unwrap();
        let mut inputs = Inputs::default();
        inputs.add_data("--data", at("x"));
        for name in ["x", "in/../x", "./x", "link", "hard", "in/up/x"] {
            let text = refusal(inputs.check_file("--out", &at(name), Content::Lines("sample")));
            assert!(text.contains("is read by this command (--data)"), "{text}");
        }
        for name in ["y", "new", "in/new"] {
            inputs
                .check_file("--out", &at(name), Content::Lines("sample"))
                .unwrap();
        }
    }

    #[test]
    fn outputs_replace_no_file_of_an_input_folder_and_add_no_folder_to_images() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["model", "data", "blobs"] {
            files::make_folder(&at(name)).unwrap();
        }
        for name in ["model/config.json", "blobs/1", "data/list"] {
            files::write(&at(name), b"").unwrap();
        }
        symlink(at("blobs/1"), at("model/model.safetensors")).unwrap();
        let mut inputs = Inputs::default();
        inputs.add("MODEL", at("model"));
        inputs.add_data("--data", at("data"));
        for name in [
            "model/config.json",
            "model/model.safetensors",
            "blobs/1",
            "data/list",
        ] {
            let text = refusal(inputs.check_file("--out", &at(name), Content::Tensors("logits")));
            assert!(text.contains("read by this command"), "{text}");
        }
        inputs
            .check_file("--out", &at("model/logits"), Content::Tensors("logits"))
            .unwrap();
        // An earlier result in that folder is not an input.
        let logits =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]);
        let logits = safetensors::serialize([("logits", logits.unwrap())], None).unwrap();
        files::write(&at("model/logits"), &logits).unwrap();
        inputs
            .check_file("--out", &at("model/logits"), Content::Tensors("logits"))
            .unwrap();
        for name in ["model", "data", "data/run", "data/new/run"] {
            refusal(inputs.check_folder("--out", &at(name)));
        }
        inputs.check_folder("--out", &at("model/export")).unwrap();
    }

    #[test]
    fn a_file_of_another_kind_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let check = |content| Inputs::default().check_file("--out", &path, content);
        let logits =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]);
        let logits = safetensors::serialize([("logits", logits.unwrap())], None).unwrap();
        for (bytes, tensors, lines) in [
            (&b""[..], true, true),
            (&logits, true, false),
            (b"{\"sample\": 1}\n", false, true),
            (b"years of work", false, false),
            (&[0xff; 20], false, false),
        ] {
            files::write(&path, bytes).unwrap();
            assert_eq!(
                check(Content::Tensors("logits")).is_ok(),
                tensors,
                "{bytes:?}"
            );
            assert_eq!(check(Content::Lines("sample")).is_ok(), lines, "{bytes:?}");
        }
        files::write(&path, &logits).unwrap();
        let text = refusal(check(Content::Tensors("images")));
        assert!(
            text.contains("already exists and is not a safetensors file with `images`"),
            "{text}"
        );
    }
}
