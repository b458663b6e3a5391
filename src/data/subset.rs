//! Choosing the images of a data set for an evaluation.
//!
//! These are all images, a sample of a given size, or the images of a list. The first N images would not be a fair
//! sample, since data sets are sorted by class. A sample is stratified by class and is the same for every model,
//! machine and batch size; a smaller sample is part of a larger one.
//! Not for the order of training, which is in [`crate::data::loader::order`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::classes::ClassMap;
use super::dataset::Dataset;
use super::sources::folder::first_few;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::rng::{Rng, Stream};
use crate::units::grouped;

/// The images that a user requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// Every image.
    #[default]
    All,
    /// A stratified sample of a given size, or all images if there are not more.
    Sample(usize),
    /// The images listed in a file, one per line.
    Listed(PathBuf),
}

/// The images of an evaluation, by their index in the data set.
#[derive(Clone, Debug)]
pub struct Subset {
    places: Vec<usize>,
    /// Number of images in the data set.
    of: usize,
    rule: Rule,
    /// Maps labels to the model's classes, if set.
    map: Option<ClassMap>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    All,
    Sample,
    Listed,
}

/// The record of a subset in a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubsetRecord {
    /// `all`, `stratified sample` or `listed`.
    pub rule: &'static str,
    /// Number of images in the data set.
    pub of: usize,
    /// Hash of the images' indices and of the mapping to the model's classes.
    pub hash: String,
    /// How classes were matched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<&'static str>,
    /// Ids of the images, in the order of the result; absent for the whole data set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<String>>,
}

impl Subset {
    /// Returns the whole data set.
    pub fn all(dataset: &Dataset) -> Self {
        Self {
            places: (0..dataset.len()).collect(),
            of: dataset.len(),
            rule: Rule::All,
            map: None,
        }
    }

    /// Chooses images.
    ///
    /// Errors: a sample of 0 images; a list that is empty, names an image twice, or names an image that does not exist.
    pub fn choose(dataset: &Dataset, selection: &Selection) -> Result<Self> {
        let (places, rule) = match selection {
            Selection::All => return Ok(Self::all(dataset)),
            Selection::Sample(0) => {
                return Err(Error::input(
                    "cannot take a sample of 0 images: at least 1 is needed",
                ));
            }
            Selection::Sample(size) if *size >= dataset.len() => return Ok(Self::all(dataset)),
            Selection::Sample(size) => (sample(dataset, *size), Rule::Sample),
            Selection::Listed(path) => (
                listed(dataset, path).context(|| format!("`{}`", path.display()))?,
                Rule::Listed,
            ),
        };
        Ok(Self {
            places,
            of: dataset.len(),
            rule,
            map: None,
        })
    }

    /// Returns the same images with labels mapped to the classes of a model.
    pub fn mapped(self, map: ClassMap) -> Self {
        Self {
            map: Some(map),
            ..self
        }
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Returns whether there are no images. [`Self::choose`] refuses an empty selection.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Leaves out some images, given by their index in the data set.
    pub fn without(mut self, is_left_out: impl Fn(usize) -> bool) -> Self {
        self.places.retain(|place| !is_left_out(*place));
        self
    }

    /// Returns the indices of the images in the data set, sorted.
    pub fn places(&self) -> &[usize] {
        &self.places
    }

    /// Returns the index of an image in the data set, which identifies it in every subset.
    pub fn place(&self, index: usize) -> usize {
        self.places[index]
    }

    /// Returns the class of an image in the model's numbering, if a map is set, else its label.
    ///
    /// Errors: an image without a label.
    pub fn label(&self, dataset: &Dataset, index: usize) -> Result<u32> {
        let label = dataset.label(self.places[index])?;
        Ok(self.map.as_ref().map_or(label, |map| map.class_of(label)))
    }

    /// Describes the subset, for example as `500 of 10,000 images, a stratified sample`.
    pub fn describe(&self) -> String {
        let (count, of) = (grouped(self.len() as u64), grouped(self.of as u64));
        match self.rule {
            Rule::All => format!("all {of} images"),
            Rule::Sample => format!("{count} of {of} images, a stratified sample"),
            Rule::Listed => format!("{count} of {of} images, as listed"),
        }
    }

    /// Returns the record of the subset for a result.
    ///
    /// Errors: a shard's index that can no longer be read.
    pub fn record(&self, dataset: &Dataset) -> Result<SubsetRecord> {
        let mut hasher = blake3::Hasher::new();
        for place in &self.places {
            hasher.update(&(*place as u64).to_le_bytes());
        }
        let table = self.map.as_ref().and_then(ClassMap::table);
        hasher.update(bytemuck::cast_slice(table.unwrap_or_default()));
        let ids = match self.rule {
            Rule::All => None,
            Rule::Sample | Rule::Listed => {
                let ids = self.places.iter().map(|place| dataset.id_of(*place));
                Some(ids.collect::<Result<Vec<_>>>()?)
            }
        };
        Ok(SubsetRecord {
            rule: match self.rule {
                Rule::All => "all",
                Rule::Sample => "stratified sample",
                Rule::Listed => "listed",
            },
            of: self.of,
            hash: hasher.finalize().to_hex().to_string(),
            classes: self.map.as_ref().map(|map| map.rule),
            ids,
        })
    }
}

/// Returns a sample stratified by class, sorted by index.
///
/// The images of a class are put in random order, and the r-th of n gets the rank `(r + u) / n` with one random `u` per
/// class. The images with the lowest ranks over all classes are taken. So class counts are proportional to within one
/// image, and the probability that a rare class is drawn follows its share. Images without labels are one class.
fn sample(dataset: &Dataset, size: usize) -> Vec<usize> {
    let mut classes: HashMap<u32, Vec<usize>> = HashMap::new();
    for place in 0..dataset.len() {
        // A sample whose label cannot be read is reported as broken when it is read.
        let label = match dataset.classes() {
            [] => 0,
            _ => dataset.label(place).unwrap_or(u32::MAX),
        };
        classes.entry(label).or_default().push(place);
    }
    // A fixed seed: the choice of images depends on neither the model's seed nor the attacks'.
    let random = |stream| Rng::new(0, stream).bits();
    let mut ranked: Vec<(f64, u32, usize)> = Vec::with_capacity(dataset.len());
    for (label, mut places) in classes {
        places.sort_by_cached_key(|place| {
            (
                random(Stream::SubsetImage {
                    image: *place as u64,
                }),
                *place,
            )
        });
        let shift = random(Stream::SubsetClass {
            class: u64::from(label),
        }) as f64
            / 2.0_f64.powi(64);
        let count = places.len() as f64;
        let ranks = places.into_iter().enumerate();
        ranked.extend(ranks.map(|(rank, place)| ((rank as f64 + shift) / count, label, place)));
    }
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut places: Vec<usize> = ranked
        .into_iter()
        .take(size)
        .map(|(.., place)| place)
        .collect();
    places.sort_unstable();
    places
}

/// Returns the indices of listed images, sorted. A line is an image's id, a path that ends with the id, or the last
/// components of the id.
fn listed(dataset: &Dataset, path: &Path) -> Result<Vec<usize>> {
    let text = files::read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim().trim_start_matches("./"))
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    if lines.is_empty() {
        return Err(Error::input("the list contains no images").hint(LIST_HINT));
    }
    let ids: Vec<String> = (0..dataset.len())
        .map(|place| dataset.id_of(place))
        .collect::<Result<_>>()?;
    let mut whole: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut ends: HashMap<&str, Vec<usize>> = HashMap::new();
    for (place, id) in ids.iter().enumerate() {
        whole.entry(id).or_default().push(place);
        ends.entry(last_part(id)).or_default().push(place);
    }
    let (mut places, mut missing) = (Vec::with_capacity(lines.len()), Vec::new());
    for line in lines {
        // First as written, then without the folders above the class, then by the file name alone.
        let found = whole.get(line).cloned().unwrap_or_else(|| {
            let same_file = ends.get(last_part(line)).map_or(&[][..], Vec::as_slice);
            let fits = |place: &&usize| {
                ends_with_path(line, &ids[**place]) || ends_with_path(&ids[**place], line)
            };
            same_file.iter().filter(fits).copied().collect()
        });
        match found[..] {
            [place] => places.push(place),
            [] => missing.push(format!("`{line}`")),
            [one, two, ..] => {
                let (one, two) = (&ids[one], &ids[two]);
                return Err(Error::input(format!(
                    "`{line}` is ambiguous: it matches `{one}` and `{two}`"
                ))
                .hint(LIST_HINT));
            }
        }
    }
    if !missing.is_empty() {
        return Err(Error::input(format!(
            "{} listed images are not in the data set: {}",
            grouped(missing.len() as u64),
            first_few(&missing)
        ))
        .hint(format!(
            "image names in this data set look like `{}`",
            ids[0]
        )));
    }
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(places),
        Some(pair) => Err(Error::input(format!("`{}` is listed twice", ids[pair[0]]))),
    }
}

const LIST_HINT: &str = "list one image per line: its path in a folder, such as \
                         `n01440764/ILSVRC2012_val_00000293.JPEG`, its key in shards, or its number (from 0) elsewhere";

fn last_part(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Returns whether a path ends with another path, comparing whole components.
fn ends_with_path(path: &str, end: &str) -> bool {
    path.strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::spec::{Spec, Split};

    /// Makes class folders with the given numbers of images. The images are never read.
    fn folder(counts: &[usize]) -> (tempfile::TempDir, Dataset) {
        let root = tempfile::tempdir().unwrap();
        for (class, count) in counts.iter().enumerate() {
            let folder = root.path().join(format!("class{class}"));
            files::make_folder(&folder).unwrap();
            for image in 0..*count {
                files::write(&folder.join(format!("{image}.jpg")), b"").unwrap();
            }
        }
        let dataset = Dataset::open(&Spec::Folder(root.path().into()), Split::Test, 0).unwrap();
        (root, dataset)
    }

    fn of_classes(dataset: &Dataset, size: usize, classes: usize) -> Vec<usize> {
        let subset = Subset::choose(dataset, &Selection::Sample(size)).unwrap();
        assert_eq!(subset.len(), size);
        let mut counts = vec![0; classes];
        (0..size).for_each(|index| counts[subset.label(dataset, index).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn a_sample_has_every_class_in_proportion() {
        let (_root, dataset) = folder(&[40, 40, 40, 40, 40]);
        assert_eq!(of_classes(&dataset, 40, 5), [8; 5]);
        assert_eq!(of_classes(&dataset, 200, 5), [40; 5]);
        let seven = of_classes(&dataset, 7, 5);
        assert!(
            seven.iter().all(|count| [1, 2].contains(count)),
            "{seven:?}"
        );
        let (_root, dataset) = folder(&[60, 30, 10]);
        assert_eq!(of_classes(&dataset, 10, 3), [6, 3, 1]);
        for size in 1..100 {
            let counts = of_classes(&dataset, size, 3);
            for (count, share) in counts.iter().zip([0.6, 0.3, 0.1]) {
                assert!(
                    (*count as f64 - share * size as f64).abs() < 2.0,
                    "{size}: {counts:?}"
                );
            }
        }
    }

    #[test]
    fn a_smaller_sample_is_part_of_a_larger_one_and_not_a_prefix() {
        let (_root, dataset) = folder(&[30, 30]);
        let places = |size| {
            Subset::choose(&dataset, &Selection::Sample(size))
                .unwrap()
                .places
        };
        let (few, many) = (places(10), places(25));
        assert!(few.iter().all(|place| many.contains(place)));
        assert_ne!(few, (0..10).collect::<Vec<_>>());
        assert_eq!(places(60), (0..60).collect::<Vec<_>>());
        assert_eq!(places(1000).len(), 60);
        assert!(Subset::choose(&dataset, &Selection::Sample(0)).is_err());
        // Recorded so that a change of the rule is detected: published numbers depend on it.
        assert_eq!(few, RECORDED);
    }

    const RECORDED: [usize; 10] = [0, 6, 12, 24, 27, 31, 34, 40, 46, 55];

    #[test]
    fn a_list_names_images_by_path_file_or_number() {
        let (root, dataset) = folder(&[3, 3]);
        let file = root.path().join("ids.txt");
        let choose = |text: &str| {
            files::write(&file, text.as_bytes()).unwrap();
            Subset::choose(&dataset, &Selection::Listed(file.clone()))
        };
        let listed = choose("# chosen\r\nclass1/2.jpg\r\n\r\n./val/class0/1.jpg\r\n").unwrap();
        assert_eq!(listed.places, [1, 5]);
        let record = listed.record(&dataset).unwrap();
        assert_eq!(record.ids.unwrap(), ["class0/1.jpg", "class1/2.jpg"]);
        assert_eq!((record.rule, record.of), ("listed", 6));
        let message = |text: &str| choose(text).unwrap_err().to_string();
        assert!(
            message("class0/9.jpg\nx")
                .contains("2 listed images are not in the data set: `class0/9.jpg`, `x`")
        );
        assert!(message("1.jpg").contains("`1.jpg` is ambiguous: it matches `class0/1.jpg` and"));
        assert!(message("class0/1.jpg\nclass0/1.jpg").contains("is listed twice"));
        assert!(message("\n# none\n").contains("the list contains no images"));
        let synthetic = Spec::Synthetic {
            count: 9,
            image_size: 32,
        };
        let synthetic = Dataset::open(&synthetic, Split::Test, 0).unwrap();
        files::write(&file, b"7\n3\n").unwrap();
        let listed = Subset::choose(&synthetic, &Selection::Listed(file)).unwrap();
        assert_eq!(listed.places, [3, 7]);
    }

    #[test]
    fn the_record_depends_on_the_images_and_on_the_classes() {
        let (_root, dataset) = folder(&[20, 20]);
        let hash = |subset: &Subset| subset.record(&dataset).unwrap().hash;
        let ten = Subset::choose(&dataset, &Selection::Sample(10)).unwrap();
        let twelve = Subset::choose(&dataset, &Selection::Sample(12)).unwrap();
        assert_ne!(hash(&ten), hash(&twelve));
        let names = ["class1", "class0"].map(str::to_owned);
        let outputs = crate::data::classes::ModelClasses {
            count: 2,
            names: &names,
            owner: "the model",
            advice: crate::data::classes::CLASSES_HINT,
        };
        let map =
            crate::data::classes::match_classes(outputs, dataset.classes(), "images").unwrap();
        let mapped = ten.clone().mapped(map);
        assert_ne!(hash(&ten), hash(&mapped));
        assert_eq!(mapped.label(&dataset, 0).unwrap(), 1);
    }
}
