//! A folder of class folders: `ROOT/class/*.jpg` or `ROOT/{train,val}/class/*.jpg`.
//!
//! The classes are the sorted names of the class folders, numbers in the order of numbers; pictures may lie in
//! folders within them. `Layout` decides which folder holds a split. Names decide what is taken for a picture
//! here; [`crate::image::decode`] then looks at the bytes.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::data::spec::Split;
use crate::error::{Error, Result};
use crate::files;
use crate::image::decode::outcome::Format;

/// Pictures of class folders.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// The folder's name for the split, where the data set has folders for splits.
    split: Option<String>,
    classes: Vec<String>,
    /// Path from the root, and label.
    pictures: Vec<(PathBuf, u32)>,
    ignored: Ignored,
}

/// What was left out of a data set, by kind: `.txt` for a file's extension, or a reason in words.
pub type Ignored = BTreeMap<String, usize>;

const LAYOUT_HINT: &str = "put the images of each class into a folder of its own, \
                           such as `ROOT/train/cat/1.jpg` and `ROOT/val/cat/2.jpg`";

/// Names of folders for splits, in any case.
const TRAIN_NAMES: [&str; 2] = ["train", "training"];
/// The preferred ones first: ImageNet's labeled test images are in `val`.
const TEST_NAMES: [[&str; 3]; 2] = [["val", "valid", "validation"], ["test", "testing", "eval"]];

/// Folders that file managers and archivers leave behind.
const JUNK: [&str; 4] = ["__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN"];

impl Folder {
    /// Lists the pictures of a split without reading them. With `splits` off every folder is a class,
    /// whatever its name.
    ///
    /// Errors: no class folders, or empty ones; a single class to train on; test classes that were not trained;
    /// a layout that can be read in two ways.
    pub fn open(root: &Path, split: Split, splits: bool) -> Result<Self> {
        let layout = Layout::find(root, split, splits)?;
        let classes = match &layout.classes {
            Some(train) => class_folders(train)?,
            None => class_folders(&layout.folder)?,
        };
        if let ([only], Split::Train) = (&classes[..], split) {
            return Err(Error::input(format!(
                "`{}` has one class folder only, `{only}`; a classifier needs two or more",
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
                    "`{}` is a class that `{trained}` does not have",
                    folder.join(&name).display(),
                ))
                .hint("every class of the test images needs a folder of training images of the same name"));
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
            "{count} of the class folders of `{folder}` hold no images: {}",
            first_few(&empty)
        ))
        .hint(format!(
            "images are files that end in {}; remove empty folders",
            Format::extensions().join(", ")
        )))
    }

    /// Adds the pictures of a folder and of those in it. `visited` maps each folder, links resolved, to its class:
    /// a link may lead back to where it is, or to another class.
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
                    .entry("links to folders that were read already".into())
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

    /// The folder that holds the class folders.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The name of the split's folder; none where the data set has no folders for splits.
    pub fn split(&self) -> Option<&str> {
        self.split.as_deref()
    }

    /// Files left out, by kind.
    pub fn ignored(&self) -> &Ignored {
        &self.ignored
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

/// Where the class folders of a split are.
struct Layout {
    folder: PathBuf,
    /// The name of the split's folder, where there are folders for splits.
    split: Option<String>,
    /// The folder whose class folders name the classes, where it is not `folder`.
    classes: Option<PathBuf>,
    ignored: Ignored,
}

impl Layout {
    /// Tells folders for splits from classes that happen to be called `train` or `test`: a split holds class
    /// folders, a class holds pictures.
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
                "`{}` can be read in two ways: `{one}` is a split, or a class like `{other}`",
                root.display()
            ))
            .hint(format!(
                "`folder:{0}` takes every folder as a class; `{0}/{one}` names the split itself",
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

    /// Whether a folder holds folders, and no pictures of its own.
    fn is_split(folder: &Path) -> Result<bool> {
        let entries = files::list(folder)?;
        let holds = |is: fn(&Path) -> bool| entries.iter().any(|path| is(path));
        Ok(holds(|path| path.is_dir() && !is_junk(path)) && !holds(is_picture))
    }

    /// The one folder for a split, if there is one; an error if there are several.
    fn only(root: &Path, names: Vec<String>) -> Result<Option<String>> {
        match &names[..] {
            [] => Ok(None),
            [name] => Ok(Some(name.clone())),
            [one, two, ..] => Err(Error::input(format!(
                "`{}` has both `{one}` and `{two}` for the same split",
                root.display()
            ))
            .hint(format!(
                "name the one to use: `{}`",
                root.join(one).display()
            ))),
        }
    }

    fn missing(root: &Path, split: Split, other: Option<&String>, candidates: &[&String]) -> Error {
        let root = root.display();
        let wanted = match split {
            Split::Train => "no `train`",
            Split::Test => "neither `val` nor `test`",
        };
        match other {
            Some(other) => Error::input(format!("`{root}` has a folder `{other}`, but {wanted}"))
                .hint(format!(
                    "name the folder with the images: `{root}/{other}` to use these"
                )),
            None => Error::input(format!(
                "`{root}/{}` has no class folders, so the labels of its images are unknown",
                candidates[0]
            ))
            .hint(format!(
                "{LAYOUT_HINT}; `folder:{root}` takes every folder as a class"
            )),
        }
    }
}

/// Sorted names of the class folders in `folder`, at least one: as numbers if all are numbers, else as text.
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

/// Sorted names of the folders in a folder.
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

/// Hidden files and folders, and those that file managers leave behind.
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

/// The first few of a list of names, and how many more there are.
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
        let folder = Folder::open(root, Split::Test, true).unwrap();
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
        assert_eq!(
            Folder::open(root.path(), Split::Train, true).unwrap().len(),
            2
        );
    }

    /// The folder that holds a split, and the names of its classes.
    fn opened(root: &Path, split: Split) -> (Option<String>, Vec<String>, usize) {
        let folder = Folder::open(root, split, true).unwrap();
        (folder.split.clone(), folder.classes.clone(), folder.len())
    }

    #[test]
    fn folders_for_splits_are_known_by_any_usual_name() {
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
            // One of three classes is enough to measure with, and keeps its label.
            let (split, of_test, count) = opened(root.path(), Split::Test);
            assert_eq!((split.as_deref(), count), (Some(test), 1));
            assert_eq!(classes, of_test);
        }
    }

    #[test]
    fn a_split_alone_is_used_for_what_it_is() {
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
    fn a_class_may_be_called_train() {
        let root = tempfile::tempdir().unwrap();
        for name in ["train/1.jpg", "car/1.jpg", "bus/1.jpg"] {
            put(root.path(), name);
        }
        let (split, classes, count) = opened(root.path(), Split::Train);
        assert_eq!((split, count), (None, 3));
        assert_eq!(classes, ["bus", "car", "train"]);
        // Within a split as well.
        let root = tempfile::tempdir().unwrap();
        for name in ["train/train/1.jpg", "train/car/1.jpg", "val/train/1.jpg"] {
            put(root.path(), name);
        }
        assert_eq!(opened(root.path(), Split::Test).1, ["car", "train"]);
        // Folders within classes make it look like a split: the user has to say.
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "train/far/1.jpg");
        put(root.path(), "car/1.jpg");
        let text = message(root.path(), Split::Train);
        assert!(
            text.contains("can be read in two ways: `train` is a split, or a class like `car`"),
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
    fn unlabeled_splits_are_no_classes() {
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
    fn classes_called_by_numbers_are_in_the_order_of_the_numbers() {
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
