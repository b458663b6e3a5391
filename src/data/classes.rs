//! Matching the labels of a data set with the classes of a model.
//!
//! A data set and a model both number their classes from 0, each in its own order, and a data set may have only some of
//! the model's classes (ImageNet-A and -R have 200 of 1,000). If both have class names, classes are matched by name; if
//! one side only has numbers, by number. An ambiguous match is refused, since a wrong match gives an accuracy that
//! looks like any other.

use crate::error::{Error, Result};
use crate::units::grouped;

/// What is known about the classes of a model.
#[derive(Clone, Copy, Debug)]
pub struct ModelClasses<'a> {
    /// Number of logits.
    pub count: usize,
    /// Class names in the order of the logits; empty if unknown.
    pub names: &'a [String],
    /// Source of the names, for messages: `the model`, or a file.
    pub owner: &'a str,
    /// Hint for classes that cannot be matched.
    pub advice: &'a str,
}

/// A mapping from the labels of a data set to the classes of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassMap {
    /// The model's class for each label; none if they are the same.
    table: Option<Vec<u32>>,
    /// How the classes were matched, in words.
    pub rule: &'static str,
    /// What the user should know about the match.
    pub notice: Option<String>,
}

impl ClassMap {
    fn same(rule: &'static str) -> Self {
        Self {
            table: None,
            rule,
            notice: None,
        }
    }

    fn noticed(self, notice: String) -> Self {
        Self {
            notice: Some(notice),
            ..self
        }
    }

    /// Returns the label for each class of the model that has one. `labels` is the number of classes of the data.
    pub fn labels(&self, labels: usize) -> std::collections::HashMap<usize, u32> {
        let labels = 0..labels as u32;
        labels
            .map(|label| (self.class_of(label) as usize, label))
            .collect()
    }

    /// Returns the data set's names of the classes of the model, if each class has one; else none.
    pub fn names(&self, data: &[String]) -> Vec<String> {
        let mut names = vec![None; data.len()];
        for (label, name) in data.iter().enumerate() {
            match names.get_mut(self.class_of(label as u32) as usize) {
                Some(place) => *place = Some(name.clone()),
                None => return Vec::new(),
            }
        }
        let all: Option<Vec<String>> = names.into_iter().collect();
        all.unwrap_or_default()
    }

    /// Returns the map for a model whose logits are restricted to the classes of the data, and these classes in their
    /// order. `labels` is the number of classes of the data.
    pub fn restricted(&self, labels: usize) -> (Self, Vec<usize>) {
        let classes: Vec<u32> = (0..labels as u32)
            .map(|label| self.class_of(label))
            .collect();
        let kept: std::collections::BTreeSet<u32> = classes.iter().copied().collect();
        let kept: Vec<u32> = kept.into_iter().collect();
        let place = |class: &u32| kept.binary_search(class).expect("one of them") as u32;
        let map = Self {
            table: Some(classes.iter().map(place).collect()),
            rule: self.rule,
            notice: None,
        };
        (map, kept.into_iter().map(|class| class as usize).collect())
    }

    /// Returns the model's class for a label.
    pub fn class_of(&self, label: u32) -> u32 {
        match &self.table {
            Some(table) => table[label as usize],
            None => label,
        }
    }

    /// Returns the model's class for each label, if they differ.
    pub fn table(&self) -> Option<&[u32]> {
        self.table.as_deref()
    }
}

/// Matches the classes of a data set with those of a model.
///
/// Errors: a class that the model does not have or that is ambiguous; more classes than the model has; named classes
/// that are fewer than those of a model without names, unless they are ImageNet-1K's ids.
pub fn match_classes(model: ModelClasses, data: &[String], spec: &str) -> Result<ClassMap> {
    let (named, data_named) = (!is_numbered(model.names), !is_numbered(data));
    if !data_named && data.len() > model.count {
        return Err(too_many(model, data, spec));
    }
    if !data_named {
        let map = ClassMap::same("by number");
        return Ok(match named && model.names.len() == model.count {
            false => map,
            true => map.noticed(format!(
                "the classes of `{spec}` have no names; they are matched by number, class 0 with `{}` of {}",
                model.names[0], model.owner
            )),
        });
    }
    if named {
        return by_name(model, data, spec);
    }
    if model.count == IMAGENET_CLASSES && data.iter().all(|name| is_wnid(name)) {
        let names = imagenet()
            .map(|(wnid, _)| wnid.to_owned())
            .collect::<Vec<_>>();
        let model = ModelClasses {
            names: &names,
            owner: "ImageNet-1K",
            ..model
        };
        let map = by_name(model, data, spec)?;
        let notice = "the model has no names for its 1,000 classes; they are assumed to be ImageNet-1K's in the usual \
                      order";
        return Ok(map.noticed(notice.to_owned()));
    }
    if data.len() > model.count {
        return Err(too_many(model, data, spec));
    }
    if data.len() < model.count {
        return Err(Error::input(format!(
            "`{spec}` has {} named classes and the model has {} without names, so they cannot be matched",
            grouped(data.len() as u64),
            grouped(model.count as u64)
        ))
        .hint(model.advice));
    }
    Ok(ClassMap::same("by order").noticed(format!(
        "the model has no class names; the classes are matched in order, starting with `{}` of `{spec}` as class 0",
        data[0]
    )))
}

/// Matches the classes of a data set with class names written for a text model, such as `tench` or `a big fish` for
/// `n01440764`.
///
/// If there are as many names as classes and none of them are equal, they are matched in order.
///
/// Errors: those of [`match_classes`] in all other cases.
pub fn match_prompts(
    prompts: &[String],
    owner: &str,
    data: &[String],
    spec: &str,
) -> Result<ClassMap> {
    let is_foreign = !is_numbered(data) && !data.iter().any(|name| prompts.contains(name));
    if is_foreign && data.len() == prompts.len() && in_imagenets_words(prompts, data).is_none() {
        return Ok(ClassMap::same("by order").noticed(format!(
            "no name in {owner} matches a class of `{spec}`; they are matched in order, `{}` with `{}` and so on",
            prompts[0], data[0]
        )));
    }
    let outputs = ModelClasses {
        count: prompts.len(),
        names: prompts,
        owner,
        advice: CLASSES_HINT,
    };
    match_classes(outputs, data, spec)
}

/// Number of missing classes that a message lists.
const SHOWN: usize = 3;

/// Hint for training, whose classes are folders.
pub const FOLDERS_HINT: &str = "rename the class folders, or use images of the same classes";

/// Hint for commands that have the flag `--classes`.
pub const CLASSES_HINT: &str = "use --classes FILE to list the model's classes by their names in the data set, one per \
                                line, in the model's order";

fn too_many(model: ModelClasses, data: &[String], spec: &str) -> Error {
    Error::input(format!(
        "`{spec}` has {} classes, but {} has {}",
        grouped(data.len() as u64),
        model.owner,
        grouped(model.count as u64)
    ))
    .hint("use a data set with the classes that the model was trained on")
}

fn by_name(model: ModelClasses, data: &[String], spec: &str) -> Result<ClassMap> {
    if model.names == data {
        return Ok(ClassMap::same("by name"));
    }
    let exact = table(model.names, data);
    let (names, found) = match (&exact, in_imagenets_words(model.names, data)) {
        // ImageNet's other vocabulary is only used if the names themselves do not match.
        (Err(_), Some(names)) => (names.clone(), table(&names, data)),
        _ => (model.names.to_vec(), exact),
    };
    let table = found.map_err(|unmatched| unmatched.error(model, &names, data, spec))?;
    let map = ClassMap {
        rule: "by name",
        notice: None,
        table: Some(table),
    };
    let count = |names: &[String]| grouped(names.len() as u64);
    Ok(match data.len() == model.count {
        true => map.noticed(format!(
            "the classes of `{spec}` are not in the order of those of {}; they are matched by name",
            model.owner
        )),
        false => map.noticed(format!(
            "`{spec}` has {} of the {} classes of {}, matched by name; predictions range over all {}",
            count(data),
            grouped(model.count as u64),
            model.owner,
            grouped(model.count as u64),
        )),
    })
}

/// A class of the data set that matches no class of the model, or several.
enum Unmatched {
    Missing(usize),
    Twice(usize),
}

impl Unmatched {
    fn error(self, model: ModelClasses, names: &[String], data: &[String], spec: &str) -> Error {
        let (owner, count) = (model.owner, grouped(model.count as u64));
        match self {
            Self::Twice(label) => Error::input(format!(
                "`{spec}`: several of the {count} classes of {owner} are named `{}`",
                data[label]
            ))
            .hint(model.advice),
            Self::Missing(label) => {
                let missing = data.iter().filter(|name| !names.contains(name)).count();
                let name = &data[label];
                let message = match missing {
                    1 => format!(
                        "`{spec}`: class `{name}` is not among the {count} classes of {owner}"
                    ),
                    _ => {
                        let shown = data.iter().filter(|name| !names.contains(name));
                        let shown: Vec<_> =
                            shown.take(SHOWN).map(|name| format!("`{name}`")).collect();
                        format!(
                            "`{spec}`: {} of its {} classes are not among the {count} classes of {owner}, such as {}",
                            grouped(missing as u64),
                            grouped(data.len() as u64),
                            shown.join(", ")
                        )
                    }
                };
                let advice = model.advice;
                let hint = match nearest(name, names) {
                    Some(near) => format!("did you mean `{near}`? {advice}"),
                    None => format!("the classes of {owner} start with `{}`; {advice}", names[0]),
                };
                Error::input(message).hint(hint)
            }
        }
    }
}

/// Returns for each name of the data set its index among the names of the model.
fn table(model: &[String], data: &[String]) -> std::result::Result<Vec<u32>, Unmatched> {
    let mut places = std::collections::HashMap::new();
    for (place, name) in model.iter().enumerate() {
        places
            .entry(name)
            .or_insert_with(Vec::new)
            .push(place as u32);
    }
    let place = |(label, name)| match places.get(name).map(Vec::as_slice) {
        None => Err(Unmatched::Missing(label)),
        Some([place]) => Ok(*place),
        Some(_) => Err(Unmatched::Twice(label)),
    };
    data.iter().enumerate().map(place).collect()
}

/// Returns a name that differs from this one in case or at most two edits, or that starts with this one and a comma.
fn nearest<'a>(name: &str, names: &'a [String]) -> Option<&'a String> {
    let lower = name.to_lowercase();
    let begins = |known: &&String| known.to_lowercase().starts_with(&format!("{lower},"));
    names.iter().find(begins).or_else(|| {
        let distance = |known: &String| strsim::damerau_levenshtein(&lower, &known.to_lowercase());
        let near = names
            .iter()
            .map(|known| (distance(known), known))
            .min_by_key(|(distance, _)| *distance);
        near.filter(|(distance, _)| *distance <= 2.min(name.len() / 2))
            .map(|(_, known)| known)
    })
}

/// Returns whether names are only the class numbers, with or without `LABEL_`, as in data sets and models without
/// names.
fn is_numbered(names: &[String]) -> bool {
    let is_number = |(place, name): (usize, &String)| {
        let digits = name.strip_prefix("LABEL_").unwrap_or(name);
        digits == place.to_string()
    };
    names.iter().enumerate().all(is_number)
}

/// Returns whether classes are numbered rather than named, as in shards.
pub(crate) fn are_numbers(names: &[String]) -> bool {
    let mut names = names.iter().enumerate();
    names.all(|(number, name)| *name == number.to_string())
}

const IMAGENET_CLASSES: usize = 1000;

/// Returns ImageNet-1K's classes in order, as WordNet id and words. Source: timm's `imagenet_synsets.txt`.
fn imagenet() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = include_str!("imagenet.txt").lines();
    lines.map(|line| line.split_once('\t').unwrap_or((line, "")))
}

/// Returns whether a name is a WordNet id such as `n01440764`, the names of ImageNet's folders.
pub fn is_wnid(name: &str) -> bool {
    let digits = name.strip_prefix('n').unwrap_or("");
    digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns the class names of an ImageNet-1K model in the vocabulary of the data set: ids if the data set has ids, else
/// words. None for other models.
fn in_imagenets_words(model: &[String], data: &[String]) -> Option<Vec<String>> {
    if model.len() != IMAGENET_CLASSES {
        return None;
    }
    let first = |words: &str| words.split(',').next().unwrap_or("").trim().to_lowercase();
    let is = |(name, (wnid, words)): (&String, (&str, &str))| {
        name == wnid || first(name) == first(words)
    };
    let same = model
        .iter()
        .zip(imagenet())
        .filter(|pair| is(*pair))
        .count();
    // Published lists differ in the words for many classes but never in their order. Any other list of 1,000 classes
    // would agree in a few positions only.
    if same < IMAGENET_CLASSES / 2 {
        return None;
    }
    let of_data: fn((&'static str, &'static str)) -> String =
        match data.iter().all(|name| is_wnid(name)) {
            true => |(wnid, _)| wnid.to_owned(),
            false => |(_, words)| words.to_owned(),
        };
    Some(imagenet().map(of_data).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn matched(model: &[&str], count: usize, data: &[&str]) -> Result<ClassMap> {
        let model = names(model);
        let outputs = ModelClasses {
            count,
            names: &model,
            owner: "the model",
            advice: CLASSES_HINT,
        };
        match_classes(outputs, &names(data), "images")
    }

    fn message(model: &[&str], count: usize, data: &[&str]) -> String {
        let error = matched(model, count, data).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn a_subset_of_the_classes_and_another_order_are_matched_by_name() {
        let abc = ["a", "b", "c"];
        assert_eq!(matched(&abc, 3, &abc).unwrap(), ClassMap::same("by name"));
        let part = matched(&abc, 3, &["b", "c"]).unwrap();
        assert_eq!(part.table(), Some(&[1, 2][..]));
        assert!(
            part.notice
                .unwrap()
                .contains("`images` has 2 of the 3 classes of the model, matched by name")
        );
        let other = matched(&abc, 3, &["c", "a", "b"]).unwrap();
        assert_eq!(
            (0..3)
                .map(|label| other.class_of(label))
                .collect::<Vec<_>>(),
            [2, 0, 1]
        );
        assert!(
            other
                .notice
                .unwrap()
                .contains("are not in the order of those of the model")
        );
    }

    #[test]
    fn classes_that_the_model_does_not_have_are_refused_with_a_similar_one() {
        let text = message(
            &["ostrich, Struthio camelus", "tench"],
            2,
            &["ostrich", "tench"],
        );
        assert!(
            text.contains("class `ostrich` is not among the 2 classes of the model"),
            "{text}"
        );
        assert!(
            text.contains("did you mean `ostrich, Struthio camelus`?"),
            "{text}"
        );
        let text = message(&["a", "b", "c"], 3, &["A", "B", "C"]);
        assert!(
            text.contains(
                "3 of its 3 classes are not among the 3 classes of the model, such as `A`"
            ),
            "{text}"
        );
        assert!(text.contains("--classes FILE"), "{text}");
        assert!(message(&["a", "b", "c"], 3, &["a", "b", "d"]).contains("class `d` is not among"));
        assert!(
            message(&["a", "b", "c"], 3, &["a", "b", "c", "d"]).contains("class `d` is not among")
        );
        assert!(
            message(&["crane", "crane", "b"], 3, &["crane"]).contains("several of the 3 classes")
        );
    }

    #[test]
    fn classes_are_matched_by_number_if_one_side_has_no_names() {
        assert_eq!(
            matched(&[], 3, &["0", "1"]).unwrap(),
            ClassMap::same("by number")
        );
        assert_eq!(
            matched(&["0", "1", "2"], 3, &["0", "1"]).unwrap().rule,
            "by number"
        );
        let map = matched(&["a", "b", "c"], 3, &["0", "1"]).unwrap();
        assert!(
            map.notice
                .unwrap()
                .contains("matched by number, class 0 with `a`")
        );
        let map = matched(&["LABEL_0", "LABEL_1"], 2, &["cat", "dog"]).unwrap();
        assert_eq!((map.rule, map.table()), ("by order", None));
        assert!(
            message(&[], 3, &["cat", "dog"])
                .contains("2 named classes and the model has 3 without names")
        );
        assert!(message(&[], 3, &["3", "7"]).contains("without names, so they cannot be matched"));
        assert!(
            message(&[], 3, &["0", "1", "2", "3"]).contains("has 4 classes, but the model has 3")
        );
    }

    #[test]
    fn imagenet_folders_match_models_with_ids_with_words_and_without_names() {
        let ids: Vec<&str> = imagenet().map(|(wnid, _)| wnid).collect();
        let words: Vec<&str> = imagenet().map(|(_, words)| words).collect();
        assert_eq!(
            (ids.len(), ids[0], ids[999]),
            (1000, "n01440764", "n15075141")
        );
        let part: Vec<&str> = (0..200).map(|place| ids[5 * place + 3]).collect();
        for model in [&ids[..], &words[..], &[]] {
            let map = matched(model, 1000, &part).unwrap();
            let classes: Vec<u32> = (0..200).map(|label| map.class_of(label)).collect();
            assert_eq!(
                classes,
                (0..200).map(|place| 5 * place + 3).collect::<Vec<u32>>()
            );
            assert!(map.notice.is_some());
        }
        // Two classes of ImageNet are named `crane`; their ids differ.
        let map = matched(&words, 1000, &["n02012849", "n03126707"]).unwrap();
        assert_eq!(map.table(), Some(&[134, 517][..]));
        let map = matched(&ids, 1000, &["tench, Tinca tinca"]).unwrap();
        assert_eq!(map.class_of(0), 0);
        let text = message(&[], 1000, &["n01440764", "n00004475"]);
        assert!(
            text.contains("class `n00004475` is not among the 1,000 classes of ImageNet-1K"),
            "{text}"
        );
    }
}
