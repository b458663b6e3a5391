//! Identifies, by its first bytes, what a file contains instead of an image or a tar.
//!
//! Examples are web pages saved by a failed download, Git LFS pointers, and archives that must be unpacked first.

/// The content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// A noun phrase that follows "this is".
    pub what: &'static str,
    /// How to fix it. `FILE` is a placeholder for the file's name.
    pub hint: &'static str,
}

/// Identifies a file that is neither an image nor a tar, if its content is recognized.
pub fn of(bytes: &[u8]) -> Option<Content> {
    let content = |what, hint| Some(Content { what, hint });
    match bytes {
        [] => content("an empty file", "copy or download it again"),
        _ if begins_with(bytes, "<!doctype html") || begins_with(bytes, "<html") => content(
            "an HTML page",
            "the server returned a web page instead; download the file again",
        ),
        _ if begins_with(bytes, "<?xml") && contains(bytes, "<error>") => content(
            "an object store's error message",
            "the download was refused; check the URL and your permissions, then download the file again",
        ),
        _ if bytes.starts_with(b"version https://git-lfs") => content(
            "a Git LFS pointer",
            "run `git lfs pull` in its folder to fetch the actual file",
        ),
        [0x1f, 0x8b, ..] => content("a gzip archive", "unpack it: `gunzip FILE`"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => content("a Zstandard archive", "unpack it: `zstd -d FILE`"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            content("an xz archive", "unpack it: `xz -d FILE`")
        }
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => {
            content("a bzip2 archive", "unpack it: `bzip2 -d FILE`")
        }
        [0x04, 0x22, 0x4d, 0x18, ..] => content("an LZ4 archive", "unpack it: `lz4 -d FILE`"),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => content(
            "a zip archive",
            "unpack it and repack the files as a tar: `unzip FILE -d NEW && tar cf NEW.tar --sort=name -C NEW .`",
        ),
        [b'7', b'z', 0xbc, 0xaf, ..] => content(
            "a 7z archive",
            "unpack it and repack the files as a tar: `7z x FILE -oNEW && tar cf NEW.tar --sort=name -C NEW .`",
        ),
        [b'R', b'a', b'r', b'!', ..] => {
            content("a RAR archive", "unpack it and repack the files as a tar")
        }
        [b'P', b'A', b'R', b'1', ..] => content(
            "a Parquet file",
            "Parquet is not supported; export its images as files or as WebDataset shards",
        ),
        [0x89, b'H', b'D', b'F', ..] => content(
            "an HDF5 file",
            "HDF5 is not supported; export its images as files or as `tensors:`",
        ),
        _ if bytes.iter().all(|byte| *byte == 0) => content(
            "a file that contains only zeros",
            "the copy is incomplete; copy it again",
        ),
        _ => None,
    }
}

/// Returns whether `bytes` begin with `start`, ignoring case, a byte order mark and leading white space.
pub fn begins_with(bytes: &[u8], start: &str) -> bool {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = bytes.trim_ascii_start().get(..start.len());
    text.is_some_and(|text| text.eq_ignore_ascii_case(start.as_bytes()))
}

fn contains(bytes: &[u8], part: &str) -> bool {
    let mut windows = bytes[..bytes.len().min(512)].windows(part.len());
    windows.any(|window| window.eq_ignore_ascii_case(part.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistaken_downloads_are_recognized_by_their_first_bytes() {
        let what = |bytes: &[u8]| of(bytes).map(|content| content.what);
        assert_eq!(what(b""), Some("an empty file"));
        assert_eq!(what(b"\xef\xbb\xbf\n<!DocType HTML>"), Some("an HTML page"));
        let refusal = b"<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code>";
        assert_eq!(what(refusal), Some("an object store's error message"));
        assert_eq!(what(b"\x1f\x8b\x08"), Some("a gzip archive"));
        assert_eq!(what(b"PK\x03\x04"), Some("a zip archive"));
        assert_eq!(what(&[0; 600]), Some("a file that contains only zeros"));
        assert_eq!(what(b"hello"), None);
        assert_eq!(what(b"<"), None);
    }
}
