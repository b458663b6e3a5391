//! A folder of class folders: `ROOT/class/*.jpg` or `ROOT/{train,val}/class/*.jpg`.
//!
//! The classes are the sorted names of the class folders; if all names are numbers, they are sorted numerically. Images
//! may be in subfolders of a class. `Layout` decides which folder is a split. Here the file name decides what counts as
//! an image; [`crate::image::decode`] then detects the format from the bytes.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::data::spec::Split;
use crate::error::{Error, Result};
use crate::files;
use crate::image::decode::outcome::Format;

/// The images of class folders.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Name of the split's folder, if the data set has split folders.
    split: Option<String>,
    classes: Vec<String>,
    /// Path relative to the root, and label.
    pictures: Vec<(PathBuf, u32)>,
    ignored: Ignored,
}

/// The number of ignored files by kind: the extension such as `.txt`, or a reason in words.
pub type Ignored = BTreeMap<String, usize>;

const LAYOUT_HINT: &str = "put the images of each class into a separate folder, \
                           such as `ROOT/train/cat/1.jpg` and `ROOT/val/cat/2.jpg`";

/// Names of split folders, matched without regard to case.
pub(crate) const TRAIN_NAMES: [&str; 2] = ["train", "training"];
/// In order of preference: ImageNet's labeled test images are in `val`.
pub(crate) const TEST_NAMES: [[&str; 3]; 2] =
    [["val", "valid", "validation"], ["test", "testing", "eval"]];

/// Folders created by operating systems, file managers and archivers.
const JUNK: [&str; 4] = ["__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN"];

impl Folder {
    /// Lists the images of a split without reading them. If `splits` is false, every folder is a class, regardless of
    /// its name.
    ///
    /// Errors: missing or empty class folders; only one class to train on; test classes without training images; an
    /// ambiguous layout.
    pub fn open(root: &Path, split: Split, splits: bool) -> Result<Self> {
        let layout = Layout::find(root, split, splits)?;
        let classes = match &layout.classes {
            Some(train) => class_folders(train)?,
            None => class_folders(&layout.folder)?,
        };
        if let ([only], Split::Train) = (&classes[..], split) {
            return Err(Error::input(format!(
                "`{}` has only one class folder, `{only}`; a classifier needs at least two",
                layout.folder.display()
            ))
            .hint(LAYOUT_HINT));
        }
        let mut pictures = Self {
            root: layout.folder.clone(),
            split: layout.split,
            classes,
            pictures: Vec::new(),
            ignored: layout.ignored,
        };
        pictures.list_classes(layout.classes.as_deref())?;
        Ok(pictures)
    }

    fn list_classes(&mut self, train: Option<&Path>) -> Result<()> {
        let folder = self.root.clone();
        let labels: HashMap<String, u32> = self.classes.iter().cloned().zip(0..).collect();
        let mut visited = HashMap::new();
        let mut empty = Vec::new();
        for name in class_folders(&folder)? {
            let Some(label) = labels.get(&name) else {
                let trained = train.unwrap_or(&folder).display();
                return Err(Error::input(format!(
                    "`{}` is not one of the classes in `{trained}`",
                    folder.join(&name).display(),
                ))
                .hint("every class of the test images needs a training folder of the same name"));
            };
            let before = self.pictures.len();
            self.add(&folder.join(&name), *label, &mut visited)?;
            if self.pictures.len() == before {
                empty.push(format!("`{name}`"));
            }
        }
        for path in files::list(&folder)? {
            if !path.is_dir() {
                self.ignore(&path);
            }
        }
        if empty.is_empty() {
            return Ok(());
        }
        let (count, folder) = (empty.len(), folder.display());
        Err(Error::input(format!(
            "{count} of the class folders in `{folder}` contain no images: {}",
            first_few(&empty)
        ))
        .hint(format!(
            "image files end in {}; remove empty folders",
            Format::extensions().join(", ")
        )))
    }

    /// Adds the images of a folder and its subfolders. `visited` maps each folder, with links resolved, to its class: a
    /// link may point back to a parent folder, or to another class.
    fn add(
        &mut self,
        folder: &Path,
        label: u32,
        visited: &mut HashMap<PathBuf, u32>,
    ) -> Result<()> {
        let place = files::canonical(folder)?;
        match visited.insert(place, label) {
            None => {}
            Some(before) if before == label => {
                *self
                    .ignored
                    .entry("links to folders already read".into())
                    .or_default() += 1;
                return Ok(());
            }
            Some(before) => {
                let (one, two) = (
                    &self.classes[before as usize],
                    &self.classes[label as usize],
                );
                return Err(Error::input(format!(
                    "`{}` belongs to two classes, `{one}` and `{two}`, through a link",
                    folder.display()
                ))
                .hint("remove the link, or point --data at a folder without it"));
            }
        }
        for path in files::list(folder)? {
            if path.is_dir() {
                if is_junk(&path) {
                    self.ignore(&path);
                } else {
                    self.add(&path, label, visited)?;
                }
            } else if is_picture(&path) {
                let relative = path.strip_prefix(&self.root).unwrap_or(&path);
                self.pictures.push((relative.to_path_buf(), label));
            } else {
                self.ignore(&path);
            }
        }
        Ok(())
    }

    fn ignore(&mut self, path: &Path) {
        let kind = match path.extension() {
            _ if path.is_dir() => "folders of file managers".to_owned(),
            _ if is_junk(path) => "hidden".to_owned(),
            _ if is_picture(path) => "images outside class folders".to_owned(),
            Some(extension) => format!(".{}", extension.to_string_lossy().to_lowercase()),
            None => "no extension".to_owned(),
        };
        *self.ignored.entry(kind).or_default() += 1;
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Returns whether there are no images. [`Self::open`] refuses such data.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Returns the class names by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the folder that contains the class folders.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the name of the split's folder; none if the data set has no split folders.
    pub fn split(&self) -> Option<&str> {
        self.split.as_deref()
    }

    /// Returns the number of ignored files by kind.
    pub fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    /// Returns the label of an image.
    pub fn label(&self, index: usize) -> u32 {
        self.pictures[index].1
    }

    /// Reads the bytes of an image file.
    pub fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        files::read(&self.path(index))
    }

    /// Returns the format that the file name suggests.
    pub fn format(&self, index: usize) -> Option<Format> {
        let end = self.pictures[index].0.extension()?;
        Format::of_extension(&end.to_string_lossy().to_ascii_lowercase())
    }

    /// Returns the path of an image, for messages.
    pub fn name_of(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    /// Returns the path of an image within the data set, which does not depend on where the data set is stored.
    pub fn relative_name(&self, index: usize) -> String {
        self.pictures[index].0.display().to_string()
    }

    fn path(&self, index: usize) -> PathBuf {
        self.root.join(&self.pictures[index].0)
    }
}

/// Location of the class folders of a split.
struct Layout {
    folder: PathBuf,
    /// Name of the split's folder, if there are split folders.
    split: Option<String>,
    /// Folder whose class folders define the classes, if it is not `folder`.
    classes: Option<PathBuf>,
    ignored: Ignored,
}

impl Layout {
    /// Distinguishes split folders from classes named `train` or `test`: a split contains class folders, a class
    /// contains images.
    fn find(root: &Path, split: Split, splits: bool) -> Result<Self> {
        let plain = || Self {
            folder: root.to_path_buf(),
            split: None,
            classes: None,
            ignored: Ignored::new(),
        };
        let folders = folders_of(root)?;
        let named = |names: &[&str]| -> Vec<String> {
            let is_named = |name: &&String| names.contains(&name.to_lowercase().as_str());
            folders.iter().filter(is_named).cloned().collect()
        };
        let trains = named(&TRAIN_NAMES);
        let tests = TEST_NAMES.map(|names| named(&names));
        let candidates: Vec<&String> = trains.iter().chain(tests.iter().flatten()).collect();
        if !splits || candidates.is_empty() {
            return Ok(plain());
        }
        let mut holds_classes = Vec::new();
        for name in &candidates {
            if Self::is_split(&root.join(name))? {
                holds_classes.push((*name).clone());
            }
        }
        let others: Vec<&String> = folders
            .iter()
            .filter(|name| !candidates.contains(name))
            .collect();
        if holds_classes.is_empty() && !others.is_empty() {
            return Ok(plain());
        }
        let kept = |names: &[String]| -> Vec<String> {
            names
                .iter()
                .filter(|name| holds_classes.contains(name))
                .cloned()
                .collect()
        };
        let train = Self::only(root, kept(&trains))?;
        let tests = tests
            .iter()
            .map(|names| Self::only(root, kept(names)))
            .collect::<Result<Vec<_>>>()?;
        let test = tests.into_iter().flatten().next();
        if !others.is_empty() && (train.is_none() || test.is_none()) {
            let (one, other) = (&holds_classes[0], others[0]);
            return Err(Error::input(format!(
                "`{}` is ambiguous: `{one}` may be a split, or a class like `{other}`",
                root.display()
            ))
            .hint(format!(
                "use `folder:{0}` to make every folder a class, or `{0}/{one}` to use that split",
                root.display()
            )));
        }
        let folder = match split {
            Split::Train => train.as_ref(),
            Split::Test => test.as_ref(),
        };
        let Some(name) = folder else {
            return Err(Self::missing(
                root,
                split,
                train.as_ref().or(test.as_ref()),
                &candidates,
            ));
        };
        let mut ignored = Ignored::new();
        if !others.is_empty() {
            ignored.insert("other folders".to_owned(), others.len());
        }
        let classes = train.as_ref().filter(|train| *train != name);
        Ok(Self {
            folder: root.join(name),
            split: Some(name.clone()),
            classes: classes.map(|train| root.join(train)),
            ignored,
        })
    }

    /// Returns whether a folder contains folders and no images directly.
    fn is_split(folder: &Path) -> Result<bool> {
        let entries = files::list(folder)?;
        let holds = |is: fn(&Path) -> bool| entries.iter().any(|path| is(path));
        Ok(holds(|path| path.is_dir() && !is_junk(path)) && !holds(is_picture))
    }

    /// Returns the folder of a split, if there is one; several are an error.
    fn only(root: &Path, names: Vec<String>) -> Result<Option<String>> {
        match &names[..] {
            [] => Ok(None),
            [name] => Ok(Some(name.clone())),
            [one, two, ..] => Err(Error::input(format!(
                "`{}` has both `{one}` and `{two}` for the same split",
                root.display()
            ))
            .hint(format!(
                "specify the one to use: `{}`",
                root.join(one).display()
            ))),
        }
    }

    fn missing(root: &Path, split: Split, other: Option<&String>, candidates: &[&String]) -> Error {
        let root = root.display();
        let missing = match split {
            Split::Train => "no `train`",
            Split::Test => "neither `val` nor `test`",
        };
        match other {
            Some(other) => Error::input(format!("`{root}` has a folder `{other}`, but {missing}"))
                .hint(format!(
                    "specify the folder that contains the images, such as `{root}/{other}`"
                )),
            None => Error::input(format!(
                "`{root}/{}` has no class folders, so the labels of its images are unknown",
                candidates[0]
            ))
            .hint(format!(
                "{LAYOUT_HINT}; or use `folder:{root}` to make every folder a class"
            )),
        }
    }
}

/// Returns the sorted names of the class folders in `folder`, at least one. They are sorted numerically if all are
/// numbers, else as text.
fn class_folders(folder: &Path) -> Result<Vec<String>> {
    let mut names = folders_of(folder)?;
    let numbers: Option<Vec<u64>> = names.iter().map(|name| name.parse().ok()).collect();
    if numbers.is_some() {
        names.sort_by_key(|name| name.parse::<u64>().ok());
    }
    if !names.is_empty() {
        return Ok(names);
    }
    let loose = files::list(folder)?
        .iter()
        .filter(|path| is_picture(path))
        .count();
    let folder = folder.display();
    let message = match loose {
        0 => format!("`{folder}` has no class folders and no images"),
        _ => format!(
            "`{folder}` has {loose} images but no class folders, so their labels are unknown"
        ),
    };
    Err(Error::input(message).hint(LAYOUT_HINT))
}

/// Returns the sorted names of the subfolders of a folder.
fn folders_of(folder: &Path) -> Result<Vec<String>> {
    let entries = files::list(folder)?;
    let folders = entries
        .iter()
        .filter(|path| path.is_dir() && !is_junk(path));
    let name = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.map(str::to_owned).ok_or_else(|| {
            Error::input(format!(
                "the name of the class folder `{}` is not UTF-8",
                path.display()
            ))
            .hint("rename the folder")
        })
    };
    folders.map(name).collect()
}

/// Returns whether a path is hidden or was created by a file manager.
fn is_junk(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') || JUNK.contains(&name.as_ref())
}

fn is_picture(path: &Path) -> bool {
    let end = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    Format::of_extension(&end).is_some() && !is_junk(path)
}

/// Joins the first five of a list of names and adds how many more there are.
pub(crate) fn first_few(names: &[String]) -> String {
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
        let error = Folder::open(root, split, true).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn classes_are_sorted_and_images_may_be_in_subfolders() {
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
        let folder = Folder::open(root, Split::Test, true).unwrap();
        assert_eq!(folder.classes(), ["cat", "dog"]);
        let names: Vec<String> = (0..3).map(|index| folder.relative_name(index)).collect();
        assert_eq!(names, ["cat/3.webp", "cat/a/2.PNG", "dog/1.jpg"]);
        assert_eq!(
            (0..3).map(|index| folder.label(index)).collect::<Vec<_>>(),
            [0, 0, 1]
        );
        let ignored: Vec<_> = folder.ignored().iter().collect();
        assert_eq!(
            ignored,
            [(&".txt".to_owned(), &1), (&"hidden".to_owned(), &1)]
        );
        assert!(folder.bytes(2).is_ok());
    }

    #[test]
    fn test_images_have_the_labels_of_the_training_classes() {
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
        let folder = Folder::open(root, Split::Test, true).unwrap();
        assert_eq!(folder.classes().len(), 3);
        assert_eq!(
            (0..2).map(|index| folder.label(index)).collect::<Vec<_>>(),
            [1, 2]
        );
        put(root, "val/z/1.jpg");
        assert!(message(root, Split::Test).contains("is not one of the classes in"));
    }

    #[test]
    fn unusable_layouts_are_refused_with_a_reason() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert!(message(&root.join("nothing"), Split::Train).contains("no such file"));
        assert!(message(root, Split::Train).contains("no class folders and no images"));
        put(root, "1.jpg");
        assert!(message(root, Split::Train).contains("1 images but no class folders"));
        put(root, "cat/1.jpg");
        assert!(message(root, Split::Train).contains("has only one class folder, `cat`"));
        put(root, "dog/read.me");
        assert!(message(root, Split::Train).contains("contain no images: `dog`"));
    }

    #[cfg(unix)]
    #[test]
    fn a_class_folder_whose_name_is_not_utf_8_is_refused() {
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
    fn a_missing_test_split_is_refused() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "train/a/1.jpg");
        put(root.path(), "train/b/1.jpg");
        assert!(message(root.path(), Split::Test).contains("neither `val` nor `test`"));
        assert_eq!(
            Folder::open(root.path(), Split::Train, true).unwrap().len(),
            2
        );
    }

    /// Returns the folder of a split, the names of its classes, and the number of images.
    fn opened(root: &Path, split: Split) -> (Option<String>, Vec<String>, usize) {
        let folder = Folder::open(root, split, true).unwrap();
        (folder.split.clone(), folder.classes.clone(), folder.len())
    }

    #[test]
    fn split_folders_are_recognized_by_any_common_name() {
        for (train, test) in [
            ("Train", "Val"),
            ("training", "validation"),
            ("train", "valid"),
            ("TRAIN", "TEST"),
            ("Training", "Testing"),
        ] {
            let root = tempfile::tempdir().unwrap();
            for name in ["a/1.jpg", "b/1.jpg", "c/1.jpg"] {
                put(root.path(), &format!("{train}/{name}"));
            }
            put(root.path(), &format!("{test}/b/2.jpg"));
            put(root.path(), "readme.txt");
            let (split, classes, count) = opened(root.path(), Split::Train);
            assert_eq!((split.as_deref(), count), (Some(train), 3));
            // The test split may have one of three classes, which keeps its label.
            let (split, of_test, count) = opened(root.path(), Split::Test);
            assert_eq!((split.as_deref(), count), (Some(test), 1));
            assert_eq!(classes, of_test);
        }
    }

    #[test]
    fn a_test_split_alone_is_not_used_for_training() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "val/a/1.jpg");
        put(root.path(), "val/b/1.jpg");
        put(root.path(), "test/a/1.jpg");
        let (split, classes, _) = opened(root.path(), Split::Test);
        assert_eq!((split.as_deref(), classes.len()), (Some("val"), 2));
        let text = message(root.path(), Split::Train);
        assert!(
            text.contains("has a folder `val`, but no `train`"),
            "{text}"
        );
        put(root.path(), "validation/a/1.jpg");
        assert!(message(root.path(), Split::Test).contains("both `val` and `validation`"));
    }

    #[test]
    fn a_class_may_be_named_train() {
        let root = tempfile::tempdir().unwrap();
        for name in ["train/1.jpg", "car/1.jpg", "bus/1.jpg"] {
            put(root.path(), name);
        }
        let (split, classes, count) = opened(root.path(), Split::Train);
        assert_eq!((split, count), (None, 3));
        assert_eq!(classes, ["bus", "car", "train"]);
        // Also within a split.
        let root = tempfile::tempdir().unwrap();
        for name in ["train/train/1.jpg", "train/car/1.jpg", "val/train/1.jpg"] {
            put(root.path(), name);
        }
        assert_eq!(opened(root.path(), Split::Test).1, ["car", "train"]);
        // A class with subfolders looks like a split, so the user has to decide.
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "train/far/1.jpg");
        put(root.path(), "car/1.jpg");
        let text = message(root.path(), Split::Train);
        assert!(
            text.contains("is ambiguous: `train` may be a split, or a class like `car`"),
            "{text}"
        );
        assert!(text.contains("`folder:"), "{text}");
        let folder = Folder::open(root.path(), Split::Train, false).unwrap();
        assert_eq!(
            (folder.classes(), folder.len()),
            (&["car".to_owned(), "train".to_owned()][..], 2)
        );
    }

    #[test]
    fn unlabeled_splits_are_not_classes() {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "train/1.jpg");
        put(root.path(), "test/1.jpg");
        let text = message(root.path(), Split::Train);
        assert!(
            text.contains("train` has no class folders, so the labels of its images are unknown"),
            "{text}"
        );
    }

    #[test]
    fn classes_named_by_numbers_are_sorted_numerically() {
        let root = tempfile::tempdir().unwrap();
        (0..12).for_each(|class| put(root.path(), &format!("{class}/1.jpg")));
        let (_, classes, _) = opened(root.path(), Split::Test);
        let numbers: Vec<String> = (0..12).map(|class| class.to_string()).collect();
        assert_eq!(classes, numbers);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_once() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "a/1.jpg");
        put(root.path(), "b/1.jpg");
        symlink(".", root.path().join("a/self")).unwrap();
        symlink(".", root.path().join("a/again")).unwrap();
        let folder = Folder::open(root.path(), Split::Train, true).unwrap();
        assert_eq!(folder.len(), 2);
        assert_eq!(folder.ignored().values().sum::<usize>(), 2);
        symlink("../b", root.path().join("a/other")).unwrap();
        assert!(message(root.path(), Split::Train).contains("belongs to two classes, `a` and `b`"));
    }
}
