//! The reader of settings files, which collects all problems of a file.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::describe::{Key, Kind};
use super::overrides::apply;
use super::problem::{Problem, nearest};
use super::setting::Setting;
use super::value::{Node, Origin, Value, name_of, parse};
use crate::files::check_name;

/// The top level or a nested table of a settings file. It records which keys were requested.
pub struct Table {
    /// `None` for the top level.
    name: Option<String>,
    /// Location, such as ``stage `finetune` ``; empty outside of stages.
    place: String,
    origin: Origin,
    entries: BTreeMap<String, Node>,
    asked: RefCell<Vec<String>>,
    problems: Rc<RefCell<Vec<Problem>>>,
    /// Keys with invalid values.
    invalid: RefCell<BTreeSet<String>>,
}

/// Parses `text`, applies `overrides` (`a.b=c`) and reads it with `read`.
///
/// Errors: all problems of the file at once.
pub fn read<T>(
    text: &str,
    overrides: &[String],
    read: impl FnOnce(&Table) -> Option<T>,
) -> Result<T, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut root = parse(text, &mut problems);
    for flag in overrides {
        if let Err((message, hint)) = apply(&mut root, flag) {
            problems.push(Problem {
                place: format!("`--set {flag}`"),
                message,
                hint,
            });
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let shared = Rc::new(RefCell::new(problems));
    let table = Table {
        name: None,
        place: String::new(),
        origin: Origin::Line(1),
        entries: root,
        asked: RefCell::default(),
        problems: Rc::clone(&shared),
        invalid: RefCell::default(),
    };
    let found = table.read_all(read);
    let problems = shared.take();
    match found {
        Some(found) if problems.is_empty() => Ok(found),
        _ => Err(problems),
    }
}

impl Table {
    /// Reads the value of a key and checks its limits.
    pub fn value<T: Setting>(&self, key: &Key) -> Option<T> {
        let Some(node) = self.take(key.name) else {
            self.missing(key);
            return None;
        };
        let value = match T::from_value(&node.value) {
            Some(Ok(value)) => value,
            Some(Err(invalid)) => {
                let message = format!("{}: {}", key.name, invalid.message);
                self.record(key.name, &node.origin, message, invalid.hint);
                return None;
            }
            None => {
                let words = match key.kind {
                    Kind::Words(words) => words,
                    _ => &[],
                };
                self.mismatch(key.name, &node, &T::KIND.expected(), words);
                return None;
            }
        };
        let wrong = value
            .numbers()
            .into_iter()
            .find(|number| !key.limits.contain(*number));
        let Some(number) = wrong else {
            return Some(value);
        };
        let place = match key.kind {
            Kind::List(..) => " in each entry",
            _ => "",
        };
        let rule = key.limits.rule_for(number, key.unit);
        let message = format!(
            "{} = {} must be {rule}{place}",
            key.name,
            plain(&node.value)
        );
        self.record(key.name, &node.origin, message, None);
        None
    }

    /// Reads a required key whose value is one of several words.
    pub fn word<'a>(&self, key: &str, words: &[(&'a str, &'a str)]) -> Option<&'a str> {
        let names: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
        let expected = format!("one of {}", names.join(", "));
        let Some(node) = self.take(key) else {
            let message = format!("`{key}` is missing{}", self.in_name());
            self.problem_with_hint(key, message, format!("add `{key} = ...`, {expected}"));
            return None;
        };
        let is_it = |word: &str| matches!(&node.value, Value::Text(text) if text == word);
        let found = words.iter().find(|(word, _)| is_it(word));
        if found.is_none() {
            self.mismatch(key, &node, &expected, words);
        }
        found.map(|(word, _)| *word)
    }

    /// Reports a missing key.
    pub fn missing(&self, key: &Key) {
        if let Kind::Table(_) | Kind::Variants(_) = key.kind {
            let message = format!("the table `{}` is missing{}", key.name, self.in_name());
            return self.problem(key.name, message);
        }
        let message = format!("`{}` is missing{}", key.name, self.in_name());
        let example = match key.example {
            "" => String::new(),
            example => format!(", such as {example}"),
        };
        let hint = format!("add `{} = ...`, {}{example}", key.name, key.kind.expected());
        self.problem_with_hint(key.name, message, hint);
    }

    /// Reports a value of the wrong type, or one that is not among the key's words.
    fn mismatch(&self, key: &str, node: &Node, expected: &str, words: &[(&str, &str)]) {
        let found = match &node.value {
            Value::Table(_) => "a table".to_owned(),
            Value::Text(text) if !words.is_empty() => format!("`{text}`"),
            value => value.to_string(),
        };
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let near = match &node.value {
            Value::Text(text) => nearest(text, &words),
            _ => None,
        };
        let hint = near.map(|word| format!("did you mean `{word}`?"));
        let message = format!("{key} = {found}: expected {expected}");
        self.record(key, &node.origin, message, hint);
    }

    /// Reads a nested table with `read`. Returns `None` if it has a problem.
    pub fn child<T>(&self, key: &Key, read: impl FnOnce(&Table) -> Option<T>) -> Option<T> {
        self.inside(key)?.read_all(read)
    }

    /// Like [`Self::child`], but returns a table with problems too if `read` can, so that settings that depend on it
    /// are checked.
    pub fn draft<T>(&self, key: &Key, read: impl FnOnce(&Table) -> Option<T>) -> Option<T> {
        let mut draft = None;
        self.inside(key)?.read_all(|table| {
            draft = read(table);
            Some(())
        });
        draft
    }

    fn inside(&self, key: &Key) -> Option<Table> {
        let Some(node) = self.take(key.name) else {
            self.missing(key);
            return None;
        };
        let Value::Table(entries) = node.value else {
            let message = format!("{} = {}: expected a table", key.name, node.value);
            self.record(key.name, &node.origin, message, None);
            return None;
        };
        Some(self.below(key.name, self.place.clone(), node.origin, entries))
    }

    /// Reads a list of at least one table, each with `read`. Messages refer to a table by its `name` if it has one.
    pub fn children<T>(&self, key: &Key, read: impl Fn(&Table) -> Option<T>) -> Option<Vec<T>> {
        let key = key.name;
        let missing = format!("at least one `{key}` is required{}", self.in_name());
        let Some(node) = self.take(key) else {
            self.problem_with_hint(key, missing, format!("add a table `[[{key}]]`"));
            return None;
        };
        let Value::List(mut items) = node.value else {
            let message = format!("`{key}`: expected a list of tables");
            let hint = format!("write it as `[[{key}]]` or `{key} = [{{ ... }}]`");
            self.record(key, &node.origin, message, Some(hint));
            return None;
        };
        items.retain(|item| item.value != Value::Absent);
        if items.is_empty() {
            self.record(key, &node.origin, missing, None);
            return None;
        }
        let read_item = |item: Node| match item.value {
            Value::Table(entries) => {
                // An invalid name, which may have any length, is not shown; the line is enough.
                let place = match name_of(&entries) {
                    Some(name) if check_name(name).is_ok() => format!("{key} `{name}`"),
                    _ => self.place.clone(),
                };
                self.below(key, place, item.origin, entries).read_all(&read)
            }
            other => {
                let message = format!("{other} in `{key}`: expected a table");
                self.record(key, &item.origin, message, None);
                None
            }
        };
        // Read every item before collecting, so that the problems of all are reported.
        let found: Vec<_> = items.into_iter().map(read_item).collect();
        found.into_iter().collect()
    }

    /// Reads a name that is also used as a file or folder name; see [`check_name`].
    pub fn name(&self, key: &Key) -> Option<String> {
        let name: String = self.value(key)?;
        match check_name(&name) {
            Ok(()) => Some(name),
            Err((message, hint)) => {
                self.problem_with_hint(key.name, format!("{}: {message}", key.name), hint);
                None
            }
        }
    }

    /// Returns whether the key is present, and marks it as known.
    pub fn has(&self, key: &str) -> bool {
        self.take(key).is_some()
    }

    /// Returns whether none of these keys has a recorded problem.
    pub fn are_valid(&self, keys: &[&str]) -> bool {
        let invalid = self.invalid.borrow();
        !keys.iter().any(|key| invalid.contains(*key))
    }

    /// Records a problem with `key`.
    pub fn problem(&self, key: &str, message: impl Into<String>) {
        self.record(key, self.origin_of(key), message.into(), None);
    }

    /// Records a problem with `key`, with a hint.
    pub fn problem_with_hint(
        &self,
        key: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.record(key, self.origin_of(key), message.into(), Some(hint.into()));
    }

    fn origin_of(&self, key: &str) -> &Origin {
        let node = self.entries.get(key);
        node.map_or(&self.origin, |node| &node.origin)
    }

    fn below(
        &self,
        key: &str,
        place: String,
        origin: Origin,
        entries: BTreeMap<String, Node>,
    ) -> Table {
        Table {
            name: Some(key.to_owned()),
            place,
            origin,
            entries,
            asked: RefCell::default(),
            problems: Rc::clone(&self.problems),
            invalid: RefCell::default(),
        }
    }

    /// Reads the table, then reports keys that were never requested. Returns `None` if the table has a problem.
    fn read_all<T>(&self, read: impl FnOnce(&Table) -> Option<T>) -> Option<T> {
        let before = self.problems.borrow().len();
        let found = read(self);
        let asked = self.asked.borrow();
        let known: Vec<&str> = asked.iter().map(String::as_str).collect();
        for (key, node) in &self.entries {
            if !known.contains(&key.as_str()) {
                let hint = match nearest(key, &known) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => format!("known keys are {}", known.join(", ")),
                };
                let message = format!("unknown key `{key}`{}", self.in_name());
                self.record(key, &node.origin, message, Some(hint));
            }
        }
        found.filter(|_| self.problems.borrow().len() == before)
    }

    fn take(&self, key: &str) -> Option<Node> {
        let mut asked = self.asked.borrow_mut();
        if !asked.iter().any(|known| known == key) {
            asked.push(key.to_owned());
        }
        let found = self.entries.get(key).cloned();
        found.filter(|node| node.value != Value::Absent)
    }

    fn in_name(&self) -> String {
        self.name
            .as_ref()
            .map(|name| format!(" in `{name}`"))
            .unwrap_or_default()
    }

    fn record(&self, key: &str, origin: &Origin, message: String, hint: Option<String>) {
        self.invalid.borrow_mut().insert(key.to_owned());
        let place = match &self.place[..] {
            "" => origin.to_string(),
            place => format!("{place}, {origin}"),
        };
        self.problems.borrow_mut().push(Problem {
            place,
            message,
            hint,
        });
    }
}

/// Formats a value without the quotes of a string and the decimal point of a whole number.
fn plain(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        Value::Float(number) => number.to_string(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::settings::settings;

    settings! {
        /// Stages.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Recipe(table) {
            /// Stages in order.
            pub stage: Vec<Stage> {},
        }
    }

    settings! {
        /// A stage.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Stage(table) {
            /// Name.
            pub name: String {},
            /// Attack.
            pub attack: Attack {},
            /// Rate.
            pub rate: f64 {},
        }
    }

    settings! {
        /// An attack.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Attack(table) {
            /// Number of steps.
            pub steps: u64 { limits: at_least(1.0), unit: "steps" },
        }
    }

    fn owned(flags: &[&str]) -> Vec<String> {
        flags.iter().map(|flag| (*flag).to_owned()).collect()
    }

    /// Steps and rate of each stage.
    fn stages(text: &str, flags: &[&str]) -> Result<Vec<(u64, f64)>, Vec<String>> {
        let recipe = read(text, &owned(flags), Recipe::read);
        let pairs = |recipe: Recipe| {
            let stages = recipe.stage.into_iter();
            stages
                .map(|stage| (stage.attack.steps, stage.rate))
                .collect()
        };
        recipe
            .map(pairs)
            .map_err(|problems| problems.iter().map(Problem::to_string).collect())
    }

    const GOOD: &str = "[[stage]]\nname = \"a\"\nrate = 1\nattack = { steps = 2 }\n\
                        [[stage]]\nname = \"b\"\nrate = 0.5\n[stage.attack]\nsteps = 3\n";

    #[test]
    fn a_valid_file_is_read() {
        let found = stages(GOOD, &[]).unwrap();
        assert_eq!(found, [(2, 1.0), (3, 0.5)]);
    }

    #[test]
    fn all_problems_are_reported_at_once_with_line_and_hint() {
        let text = "[[stage]]\nname = \"a\"\nrate = \"fast\"\nattack = { step = 2 }\n\
                    [[stage]]\nname = \"b\"\nattack = { steps = 0 }\n";
        assert_eq!(
            stages(text, &[]).unwrap_err(),
            [
                "stage `a`, line 4: `steps` is missing in `attack`\n    \
                 hint: add `steps = ...`, a whole number, 0 or more",
                "stage `a`, line 4: unknown key `step` in `attack`\n    hint: did you mean `steps`?",
                "stage `a`, line 3: rate = \"fast\": expected a number",
                "stage `b`, line 7: steps = 0 must be at least 1 step",
                "stage `b`, line 5: `rate` is missing in `stage`\n    \
                 hint: add `rate = ...`, a number",
            ]
        );
    }

    #[test]
    fn overrides_reach_into_named_and_numbered_tables() {
        let found = stages(GOOD, &["stage.b.attack.steps=7", "stage.0.rate=0.25"]).unwrap();
        assert_eq!(found, [(2, 0.25), (7, 0.5)]);
    }

    #[test]
    fn an_invalid_override_is_reported_as_it_was_typed() {
        assert_eq!(
            stages(GOOD, &["stage.b.attack.stesp=7"]).unwrap_err(),
            [
                "stage `b`, `--set stage.b.attack.stesp=7`: unknown key `stesp` in `attack`\n    \
              hint: did you mean `steps`?"
            ]
        );
        assert_eq!(
            stages(GOOD, &["stage.c.rate=1"]).unwrap_err(),
            ["`--set stage.c.rate=1`: unknown table `stage.c`"]
        );
    }

    #[test]
    fn none_removes_a_key_which_must_be_known() {
        settings! {
            /// Optional keys.
            #[derive(Clone, Debug, PartialEq)]
            pub struct Rate(table) {
                /// A number.
                pub rate: Option<f64> {},
                /// A table.
                pub more: Option<Attack> {},
            }
        }
        let read_rate = |flags: &[&str]| {
            read("rate = 1\nmore = { steps = 2 }", &owned(flags), Rate::read)
                .map(|read| (read.rate, read.more.map(|more| more.steps)))
                .map_err(|problems| problems.iter().map(Problem::to_string).collect::<Vec<_>>())
        };
        assert_eq!(read_rate(&[]), Ok((Some(1.0), Some(2))));
        for none in ["none", "\"none\""] {
            let taken = [&format!("rate={none}")[..], &format!("more={none}")];
            assert_eq!(read_rate(&taken), Ok((None, None)));
        }
        assert_eq!(
            read_rate(&["rat=none"]),
            Err(vec![
                "`--set rat=none`: unknown key `rat`\n    hint: did you mean `rate`?".to_owned()
            ])
        );
        // A removed required key is reported at its `--set`; a whole table of a list can be removed.
        let missed = stages(GOOD, &["stage.a.attack=none"]).unwrap_err();
        assert_eq!(
            missed,
            ["stage `a`, `--set stage.a.attack=none`: the table `attack` is missing in `stage`"]
        );
        let left = stages(GOOD, &["stage.a=none"]).unwrap();
        assert_eq!((left.len(), left[0].0), (1, 3));
    }

    #[test]
    fn overrides_reach_names_with_dots_and_names_that_are_numbers() {
        let text = GOOD.replace("\"a\"", "\"v1.5\"").replace("\"b\"", "\"0\"");
        let found = stages(&text, &["stage.v1.5.rate=7", "stage.0.attack.steps=9"]).unwrap();
        assert_eq!((found[0].1, found[1].0), (7.0, 9));
    }

    #[test]
    fn whole_numbers_beyond_their_limit_are_reported() {
        const NUMBER: Key = Key::of::<u64>("n", "a number");
        let number = |text: &str| {
            read(&format!("n = {text}"), &[], |table| {
                table.value::<u64>(&NUMBER)
            })
            .map_err(|faults| faults[0].to_string())
        };
        assert_eq!(number("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(number("0xffff_ffff_ffff_ffff"), Ok(u64::MAX));
        for text in ["18446744073709551616", &"9".repeat(60)] {
            assert_eq!(
                number(text),
                Err(format!(
                    "line 1: n: {text} is too large; the maximum is {}",
                    u64::MAX
                ))
            );
        }
        assert_eq!(
            number("-1"),
            Err("line 1: n = -1: expected a whole number, 0 or more".to_owned())
        );
        assert_eq!(
            number("1979-05-27"),
            Err("line 1: n = 1979-05-27: expected a whole number, 0 or more".to_owned())
        );
    }

    #[test]
    fn invalid_toml_is_reported_with_its_line() {
        let faults = stages("[[stage]]\nname = \"a\"\nrate = = 1\n", &[]).unwrap_err();
        assert!(faults[0].starts_with("line 3: invalid TOML"), "{faults:?}");
    }
}
