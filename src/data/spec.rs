//! Data set names on the command line and in recipes.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serializer;

use crate::error::{Error, Result};
use crate::files;
use crate::settings::{Invalid, Kind, Setting, Value, words};

words! {
    /// A split of a data set.
    pub enum Split {
        /// Images to train on.
        Train = "train",
        /// Images to evaluate on.
        Test = "test",
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A data set as named on the command line and in recipes.
///
/// `FOLDER` (class folders or CIFAR binaries, distinguished by their contents), `folder:FOLDER` (every subfolder is a
/// class), `tensors:FILE.safetensors`, `npz:FILE.npz`, `npy:FILE.npy`, `parquet:PATTERN`, `shards:PATTERN`,
/// `wds:FOLDER`, `synthetic:N` or `synthetic:N@SIZE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A folder of class folders, with or without split folders, or of CIFAR binaries.
    Folder(PathBuf),
    /// A folder of class folders of any name: `train` is a class like any other.
    ClassFolders(PathBuf),
    /// A safetensors file of images and labels.
    Tensors(PathBuf),
    /// A NumPy archive of images and labels.
    Npz(PathBuf),
    /// A NumPy array of images with `labels.npy` in the same folder, such as a corruption of CIFAR-10-C.
    Npy {
        /// The file of images.
        path: PathBuf,
        /// The severity, from 1 to 5, of an array with five; None for all images.
        severity: Option<usize>,
    },
    /// A folder of numbered tar files per split with `nshards.txt`, as CLIP Benchmark publishes data sets.
    Wds(PathBuf),
    /// Parquet files of encoded images and labels, given by a file, a folder, or a pattern such as
    /// `data/train-*.parquet`.
    Parquet(String),
    /// Tar files of images and captions, given by a pattern such as `data/{00000..00099}.tar` or, in an object store,
    /// `s3://bucket/*.tar`.
    Shards(String),
    /// Images drawn in code.
    Synthetic {
        /// Number of images in each split.
        count: usize,
        /// Side in pixels.
        image_size: usize,
    },
}

pub(crate) const SPEC_HINT: &str = "use the path of a folder of class folders or CIFAR binaries, `folder:PATH`, \
                         `tensors:FILE.safetensors`, `npz:FILE.npz`, `npy:FILE.npy`, `parquet:FOLDER`, \
                         `shards:data/{00000..00099}.tar`, `wds:FOLDER`, or `synthetic:N` such as `synthetic:10000`";

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        match text.split_once(':') {
            _ if text.is_empty() => Err(Error::input("the data set name is empty").hint(SPEC_HINT)),
            Some(("tensors", "")) => {
                Err(Error::input("`tensors:` must be followed by a file").hint(SPEC_HINT))
            }
            Some(("tensors", path)) => Ok(Spec::Tensors(files::expanded(path))),
            Some(("npz", "")) => {
                Err(Error::input("`npz:` must be followed by a file").hint(SPEC_HINT))
            }
            Some(("npz", path)) => Ok(Spec::Npz(files::expanded(path))),
            Some(("npy", "")) => {
                Err(Error::input("`npy:` must be followed by a file").hint(SPEC_HINT))
            }
            Some(("npy", rest)) => npy_spec(text, rest),
            Some(("wds", "")) => {
                Err(Error::input("`wds:` must be followed by a folder").hint(SPEC_HINT))
            }
            Some(("wds", path)) => Ok(Spec::Wds(files::expanded(path))),
            Some(("parquet", "")) => {
                Err(Error::input("`parquet:` must be followed by a pattern").hint(SPEC_HINT))
            }
            Some(("parquet", pattern)) => Ok(Spec::Parquet(pattern.into())),
            Some(("folder", "")) => {
                Err(Error::input("`folder:` must be followed by a path").hint(SPEC_HINT))
            }
            Some(("folder", path)) => Ok(Spec::ClassFolders(files::expanded(path))),
            Some(("synthetic", rest)) => synthetic_spec(text, rest),
            Some(("shards", "")) => {
                Err(Error::input("`shards:` must be followed by a pattern").hint(SPEC_HINT))
            }
            Some(("shards", pattern)) => Ok(Spec::Shards(pattern.into())),
            Some((kind, rest))
                if (is_scheme(kind) || rest.starts_with("//")) && !Path::new(text).exists() =>
            {
                let message = format!("`{text}`: unknown kind of data set `{kind}`");
                let hint = match nearest_scheme(kind) {
                    _ if rest.starts_with("//") => format!("did you mean `shards:{text}`?"),
                    Some(known) => format!("did you mean `{known}:{rest}`?"),
                    None => SPEC_HINT.into(),
                };
                Err(Error::input(message).hint(hint))
            }
            _ => Ok(Spec::Folder(files::expanded(text))),
        }
    }
}

/// Returns whether the text before a colon names a kind of data set. `C:\images` and `./a:b` are paths.
pub(crate) fn is_scheme(kind: &str) -> bool {
    kind.len() > 1
        && kind
            .chars()
            .all(|letter| letter.is_ascii_lowercase() || letter == '-')
}

pub(crate) fn nearest_scheme(kind: &str) -> Option<&'static str> {
    [
        "tensors",
        "synthetic",
        "shards",
        "folder",
        "parquet",
        "npz",
        "npy",
        "wds",
    ]
    .into_iter()
    .find(|known| strsim::damerau_levenshtein(kind, known) <= 2)
}

/// Reads `FILE.npy` or `FILE.npy@SEVERITY`.
fn npy_spec(text: &str, rest: &str) -> Result<Spec> {
    let (path, severity) = match rest.rsplit_once('@') {
        Some((path, severity)) if !severity.contains(['/', '.']) => (path, Some(severity)),
        _ => (rest, None),
    };
    let number = |text: &str| {
        let number = text.parse().ok();
        number
            .filter(|number| (1..=5).contains(number))
            .ok_or_else(|| {
                let message = format!("`{text}`: the severity must be a whole number from 1 to 5");
                Error::input(message).hint("write it like `npy:CIFAR-10-C/fog.npy@3`")
            })
    };
    let severity = severity.map(number).transpose().map_err(|error| {
        let (message, hint) = error.into_parts();
        let error = Error::input(format!("`{text}`: {message}"));
        error.hint(hint.unwrap_or_default())
    })?;
    Ok(Spec::Npy {
        path: files::expanded(path),
        severity,
    })
}

pub(crate) fn synthetic_spec(text: &str, rest: &str) -> Result<Spec> {
    let (count, image_size) = rest.split_once('@').unwrap_or((rest, "32"));
    let whole = |part: &str| part.replace('_', "").parse::<usize>().ok();
    let wrong = |what: &str| Error::input(format!("`{text}`: {what}")).hint(SPEC_HINT);
    let count = whole(count)
        .filter(|count| (1..=u32::MAX as usize).contains(count))
        .ok_or_else(|| wrong("the number of images must be a whole number, 1 or more"))?;
    let image_size = whole(image_size)
        .filter(|size| (16..=1024).contains(size))
        .ok_or_else(|| wrong("the size must be a whole number of pixels from 16 to 1024"))?;
    Ok(Spec::Synthetic { count, image_size })
}

impl Spec {
    /// Returns the path of the folder or file; none for patterns, shards and synthetic images.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Spec::Folder(path)
            | Spec::ClassFolders(path)
            | Spec::Tensors(path)
            | Spec::Npz(path)
            | Spec::Npy { path, .. }
            | Spec::Wds(path) => Some(path),
            // A pattern without globs is a path.
            Spec::Parquet(pattern) if Path::new(pattern).exists() => Some(Path::new(pattern)),
            Spec::Parquet(_) | Spec::Shards(_) | Spec::Synthetic { .. } => None,
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Folder(path) => write!(f, "{}", path.display()),
            Spec::ClassFolders(path) => write!(f, "folder:{}", path.display()),
            Spec::Tensors(path) => write!(f, "tensors:{}", path.display()),
            Spec::Npz(path) => write!(f, "npz:{}", path.display()),
            Spec::Npy { path, severity } => {
                write!(f, "npy:{}", path.display())?;
                severity.map_or(Ok(()), |severity| write!(f, "@{severity}"))
            }
            Spec::Wds(path) => write!(f, "wds:{}", path.display()),
            Spec::Parquet(pattern) => write!(f, "parquet:{pattern}"),
            Spec::Shards(pattern) => write!(f, "shards:{pattern}"),
            Spec::Synthetic {
                count,
                image_size: 32,
            } => write!(f, "synthetic:{count}"),
            Spec::Synthetic { count, image_size } => write!(f, "synthetic:{count}@{image_size}"),
        }
    }
}

impl Setting for Spec {
    const KIND: Kind = Kind::Text {
        expected: "a data set",
        pattern: "",
    };

    fn from_value(value: &Value) -> Option<std::result::Result<Self, Invalid>> {
        match value {
            Value::Text(text) => Some(text.parse().map_err(Invalid::from)),
            _ => None,
        }
    }

    fn print<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_spec_is_read_back() {
        for text in [
            "data/images",
            "folder:data/train",
            "tensors:a/b.safetensors",
            "npz:a/b.npz",
            "npy:a/b.npy",
            "npy:a@2/b.npy@3",
            "wds:a/b",
            "parquet:a/train-*.parquet",
            "shards:a/{00..07}.tar,b/*.tar",
            "synthetic:100",
            "synthetic:7@64",
        ] {
            assert_eq!(text.parse::<Spec>().unwrap().to_string(), text);
        }
        assert_eq!(
            "synthetic:1_000@32".parse::<Spec>().unwrap().to_string(),
            "synthetic:1000"
        );
    }

    #[test]
    fn an_invalid_spec_is_refused_with_a_valid_one() {
        let message = |text: &str| {
            let error = text.parse::<Spec>().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert!(message("synthetic:many").contains("must be a whole number, 1 or more"));
        assert!(message("synthetic:10@8").contains("from 16 to 1024"));
        assert!(message("shards:").contains("must be followed by a pattern"));
        assert!(message("shard:{0..1}.tar").contains("did you mean `shards:{0..1}.tar`?"));
        assert!(message("npz:").contains("must be followed by a file"));
        assert!(message("npy:").contains("must be followed by a file"));
        assert!(message("npy:a.npy@6").contains("a whole number from 1 to 5"));
        assert!(message("wds:").contains("must be followed by a folder"));
        assert!(message("parquet:").contains("must be followed by a pattern"));
        assert!(message("parquets:x").contains("did you mean `parquet:x`?"));
        assert!(message("tensor:x").contains("did you mean `tensors:x`?"));
        assert!(message("").contains("synthetic:10000"));
    }
}
