//! A folder of class folders: `ROOT/class/*.jpg` or `ROOT/{train,val}/class/*.jpg`.
//!
//! The classes are the sorted names of the class folders; pictures may lie in folders within them.
//! With `ROOT/train` the test pictures are in `ROOT/val` or `ROOT/test`; without it both splits are
//! all pictures of `ROOT`.
//! Names decide what is taken for a picture here; [`super::decode`] then looks at the bytes.

use std::path::{Path, PathBuf};

use super::Split;
use super::decode::Format;
use crate::error::{Error, Result};
use crate::files;

/// Pictures of class folders.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    classes: Vec<String>,
    /// Path from the root, and label.
    pictures: Vec<(PathBuf, u32)>,
    ignored: usize,
}

const LAYOUT_HINT: &str = "put the images of each class into a folder of its own, \
                           such as `ROOT/train/cat/1.jpg` and `ROOT/val/cat/2.jpg`";

impl Folder {
    /// Lists the pictures of a split; reads none of them.
    ///
    /// Errors: no class folders, only one, or empty ones; test classes that were not trained.
    pub fn open(root: &Path, split: Split) -> Result<Self> {
        let train = root.join("train");
        let (folder, classes) = if train.is_dir() {
            let folder = match split {
                Split::Train => train.clone(),
                Split::Test => test_folder(root)?,
            };
            (folder, class_folders(&train)?)
        } else {
            (root.to_path_buf(), class_folders(root)?)
        };
        let mut pictures = Self {
            root: folder.clone(),
            classes: classes.clone(),
            pictures: Vec::new(),
            ignored: 0,
        };
        let mut empty = Vec::new();
        for name in class_folders(&folder)? {
            let Ok(label) = classes.binary_search(&name) else {
                return Err(Error::input(format!(
                    "`{}` is a class that `{}` does not have",
                    folder.join(&name).display(),
                    train.display()
                ))
                .hint("both need the same class folders"));
            };
            let before = pictures.pictures.len();
            pictures.add(&folder.join(&name), label as u32)?;
            if pictures.pictures.len() == before {
                empty.push(format!("`{name}`"));
            }
        }
        if !empty.is_empty() {
            let folder = folder.display();
            return Err(Error::input(format!(
                "{} of the class folders of `{folder}` hold no images: {}",
                empty.len(),
                first_few(&empty)
            ))
            .hint(
                "images are files that end in .jpg, .jpeg, .png or .webp; remove empty folders",
            ));
        }
        Ok(pictures)
    }

    fn add(&mut self, folder: &Path, label: u32) -> Result<()> {
        for path in files::list(folder)? {
            if is_hidden(&path) {
                self.ignored += 1;
            } else if path.is_dir() {
                self.add(&path, label)?;
            } else if is_picture(&path) {
                let relative = path.strip_prefix(&self.root).unwrap_or(&path);
                self.pictures.push((relative.to_path_buf(), label));
            } else {
                self.ignored += 1;
            }
        }
        Ok(())
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Whether there are no pictures, which `open` refuses.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Names of the classes, by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Files left out because their names are not those of pictures.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    /// The class of a picture.
    pub fn label(&self, index: usize) -> u32 {
        self.pictures[index].1
    }

    /// The bytes of a picture's file.
    pub fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        files::read(&self.path(index))
    }

    /// What the name says the picture is.
    pub fn format(&self, index: usize) -> Option<Format> {
        let end = self.pictures[index].0.extension()?;
        Format::of_extension(&end.to_string_lossy().to_ascii_lowercase())
    }

    /// The path of a picture.
    pub fn name_of(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    /// The path within the data set, the same wherever the data set lies.
    pub fn relative_name(&self, index: usize) -> String {
        self.pictures[index].0.display().to_string()
    }

    fn path(&self, index: usize) -> PathBuf {
        self.root.join(&self.pictures[index].0)
    }
}

fn test_folder(root: &Path) -> Result<PathBuf> {
    ["val", "test"]
        .iter()
        .map(|name| root.join(name))
        .find(|folder| folder.is_dir())
        .ok_or_else(|| {
            Error::input(format!(
                "`{}` has a folder `train`, but neither `val` nor `test`",
                root.display()
            ))
            .hint(LAYOUT_HINT)
        })
}

/// Sorted names of the folders in `folder`, at least two.
fn class_folders(folder: &Path) -> Result<Vec<String>> {
    let entries = files::list(folder)?;
    let names: Vec<String> = entries
        .iter()
        .filter(|path| path.is_dir() && !is_hidden(path))
        .map(|path| class_name(path))
        .collect::<Result<_>>()?;
    let loose = entries.iter().filter(|path| is_picture(path)).count();
    let folder = folder.display();
    match names.as_slice() {
        [] if loose > 0 => Err(Error::input(format!(
            "`{folder}` has {loose} images but no class folders, so their labels are not known"
        ))
        .hint(LAYOUT_HINT)),
        [] => Err(
            Error::input(format!("`{folder}` has no class folders and no images"))
                .hint(LAYOUT_HINT),
        ),
        [only] => Err(Error::input(format!(
            "`{folder}` has one class folder only, `{only}`; a classifier needs two or more"
        ))
        .hint(LAYOUT_HINT)),
        _ => Ok(names),
    }
}

/// The name of a class folder; what is not UTF-8 is no name that other programs and files could agree on.
fn class_name(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_str();
    name.map(str::to_owned).ok_or_else(|| {
        let message = format!(
            "the name of the class folder `{}` is not UTF-8",
            path.display()
        );
        Error::input(message).hint("rename the folder")
    })
}

fn is_hidden(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with('.')
}

fn is_picture(path: &Path) -> bool {
    let end = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    ["jpg", "jpeg", "png", "webp"].contains(&end.as_str())
}

fn first_few(names: &[String]) -> String {
    let shown = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=5 => shown,
        more => format!("{shown} and {} more", more - 5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, name: &str) {
        let path = root.join(name);
        files::make_folder(path.parent().unwrap()).unwrap();
        files::write(&path, b"no image").unwrap();
    }

    fn message(root: &Path, split: Split) -> String {
        let error = Folder::open(root, split).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn classes_are_sorted_and_files_may_lie_deeper() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for name in [
            "dog/1.jpg",
            "cat/a/2.PNG",
            "cat/3.webp",
            "cat/notes.txt",
            "cat/.hidden.jpg",
        ] {
            put(root, name);
        }
        let folder = Folder::open(root, Split::Test).unwrap();
        assert_eq!(folder.classes(), ["cat", "dog"]);
        let names: Vec<String> = (0..3).map(|index| folder.relative_name(index)).collect();
        assert_eq!(names, ["cat/3.webp", "cat/a/2.PNG", "dog/1.jpg"]);
        assert_eq!(
            (0..3).map(|index| folder.label(index)).collect::<Vec<_>>(),
            [0, 0, 1]
        );
        assert_eq!(folder.ignored(), 2);
        assert!(folder.bytes(2).is_ok());
    }

    #[test]
    fn test_pictures_have_the_labels_of_the_training_classes() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for name in [
            "train/a/1.jpg",
            "train/b/1.jpg",
            "train/c/1.jpg",
            "val/b/1.jpg",
            "val/c/1.jpg",
        ] {
            put(root, name);
        }
        let folder = Folder::open(root, Split::Test).unwrap();
        assert_eq!(folder.classes().len(), 3);
        assert_eq!(
            (0..2).map(|index| folder.label(index)).collect::<Vec<_>>(),
            [1, 2]
        );
        put(root, "val/z/1.jpg");
        assert!(message(root, Split::Test).contains("is a class that"));
    }

    #[test]
    fn layouts_that_cannot_be_used_are_explained() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(message(&root.join("nothing"), Split::Train).contains("no such file"));
        assert!(message(root, Split::Train).contains("no class folders and no images"));
        put(root, "1.jpg");
        assert!(message(root, Split::Train).contains("1 images but no class folders"));
        put(root, "cat/1.jpg");
        assert!(message(root, Split::Train).contains("one class folder only, `cat`"));
        put(root, "dog/read.me");
        assert!(message(root, Split::Train).contains("hold no images: `dog`"));
    }

    #[cfg(unix)]
    #[test]
    fn a_class_folder_whose_name_is_not_utf_8_is_explained() {
        use std::os::unix::ffi::OsStrExt;
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "a/1.jpg");
        let odd = root.path().join(std::ffi::OsStr::from_bytes(b"b\xff"));
        files::make_folder(&odd).unwrap();
        files::write(&odd.join("1.jpg"), b"no image").unwrap();
        let text = message(root.path(), Split::Train);
        assert!(
            text.contains("is not UTF-8\n  hint: rename the folder"),
            "{text}"
        );
    }

    #[test]
    fn a_missing_test_split_is_told() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "train/a/1.jpg");
        put(root.path(), "train/b/1.jpg");
        assert!(message(root.path(), Split::Test).contains("neither `val` nor `test`"));
        assert_eq!(Folder::open(root.path(), Split::Train).unwrap().len(), 2);
    }
}
