//! A settings file read key by key, with every fault kept and told together.
//!
//! Each part of a recipe has its type beside the code it configures, with a `read` function that
//! asks a [`Table`] for its keys. What is missing, of the wrong kind or unknown is recorded with
//! its line and a hint, and reading goes on, so that one run of the check finds all faults.
//! This module knows no key by name.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::rc::Rc;

use toml::de::{DeTable, DeValue};

use crate::files::check_name;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq)]
enum Origin {
    /// A line of the file, from 1.
    Line(usize),
    /// A `--set` option on the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Flag(text) => write!(f, "`--set {text}`"),
        }
    }
}

/// A value of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number; wider than any setting, so that one beyond a setting's range can be named.
    Integer(i128),
    /// A number with a point or an exponent.
    Float(f64),
    /// `true` or `false`.
    Boolean(bool),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Node>),
    /// A table.
    Table(BTreeMap<String, Node>),
    /// A date, or a number beyond every range: nothing that a recipe uses.
    Other(String),
    /// Taken away on the command line: the key counts as absent, and must be a known one all the same.
    Absent,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number:?}"),
            Self::Boolean(truth) => write!(f, "{truth}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::List(items) => {
                let items: Vec<_> = items.iter().map(|item| item.value.to_string()).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Table(_) => f.write_str("{...}"),
            Self::Other(text) => f.write_str(text),
            Self::Absent => f.write_str(ABSENT),
        }
    }
}

/// The word that takes a key away with `--set KEY=none`.
const ABSENT: &str = "none";

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    value: Value,
    origin: Origin,
}

/// Something wrong with a settings file: where, what was found, and what to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Such as ``stage `finetune`, line 22``.
    pub place: String,
    /// What was found and what would be right.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n    hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// A type that one value of a settings file can be.
pub trait Setting: Sized {
    /// What would be right, for messages: "a whole number".
    const EXPECTED: &'static str;

    /// `None` when the value is of another kind; an error in words when it is of the right kind
    /// and yet cannot be used.
    fn from_value(value: &Value) -> Option<Result<Self, String>>;
}

impl Setting for u64 {
    const EXPECTED: &'static str = "a whole number, 0 or more";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        match value {
            Value::Integer(number) if *number < 0 => None,
            Value::Integer(number) => Some(u64::try_from(*number).map_err(|_| too_large(number))),
            Value::Other(text) if is_digits(text) => Some(Err(too_large(text))),
            _ => None,
        }
    }
}

impl Setting for usize {
    const EXPECTED: &'static str = u64::EXPECTED;
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        let found = u64::from_value(value)?;
        Some(found.and_then(|number| usize::try_from(number).map_err(|_| too_large(number))))
    }
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|digit| digit.is_ascii_digit())
}

fn too_large(number: impl fmt::Display) -> String {
    format!(
        "{number} is too large, the largest whole number is {}",
        u64::MAX
    )
}

impl Setting for f64 {
    const EXPECTED: &'static str = "a number";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        match value {
            Value::Integer(number) => Some(Ok(*number as f64)),
            Value::Float(number) if number.is_finite() => Some(Ok(*number)),
            Value::Float(number) => Some(Err(format!("{number} is not finite"))),
            _ => None,
        }
    }
}

impl Setting for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        match value {
            Value::Boolean(truth) => Some(Ok(*truth)),
            _ => None,
        }
    }
}

impl Setting for String {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        match value {
            Value::Text(text) => Some(Ok(text.clone())),
            _ => None,
        }
    }
}

impl Setting for Vec<String> {
    const EXPECTED: &'static str = "a list of strings";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        let Value::List(items) = value else {
            return None;
        };
        let words = items.iter().map(|item| String::from_value(&item.value));
        words.collect()
    }
}

impl<const N: usize> Setting for [f64; N] {
    const EXPECTED: &'static str = match N {
        2 => "a list of two numbers",
        3 => "a list of three numbers",
        _ => "a list of numbers",
    };
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        let Value::List(items) = value else {
            return None;
        };
        let numbers = items.iter().map(|item| f64::from_value(&item.value));
        let numbers: Result<Vec<f64>, String> = numbers.collect::<Option<_>>()?;
        match numbers {
            Ok(numbers) => numbers.try_into().ok().map(Ok),
            Err(message) => Some(Err(message)),
        }
    }
}

impl Setting for [usize; 4] {
    const EXPECTED: &'static str = "a list of four whole numbers";
    fn from_value(value: &Value) -> Option<Result<Self, String>> {
        let Value::List(items) = value else {
            return None;
        };
        let numbers = items.iter().map(|item| usize::from_value(&item.value));
        let numbers: Result<Vec<usize>, String> = numbers.collect::<Option<_>>()?;
        numbers.ok()?.try_into().ok().map(Ok)
    }
}

/// A table of the file, or one inside it, that remembers which keys were asked for.
pub struct Table {
    /// `None` for the file itself.
    name: Option<String>,
    /// Such as ``stage `finetune` ``; empty outside of stages.
    place: String,
    origin: Origin,
    entries: BTreeMap<String, Node>,
    asked: RefCell<Vec<String>>,
    faults: Rc<RefCell<Vec<Fault>>>,
    faulty: Cell<bool>,
}

/// Parses `text`, applies `overrides` (`a.b=c`) and reads it with `read`.
///
/// Errors: all faults at once, in the order of their lines.
pub fn read<T>(
    text: &str,
    overrides: &[String],
    read: impl FnOnce(&Table) -> Option<T>,
) -> Result<T, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut root = parse(text, &mut faults);
    for flag in overrides {
        if let Err((message, hint)) = apply(&mut root, flag) {
            faults.push(Fault {
                place: format!("`--set {flag}`"),
                message,
                hint,
            });
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let shared = Rc::new(RefCell::new(faults));
    let table = Table::new(
        None,
        String::new(),
        Origin::Line(1),
        root,
        Rc::clone(&shared),
    );
    let found = table.read_all(read);
    let faults = shared.take();
    match found {
        Some(found) if faults.is_empty() => Ok(found),
        _ => Err(faults),
    }
}

/// Every value of a settings file under its full key, for telling two files apart.
///
/// Tables of an array are numbered from 0: `stage.0.attack.steps`.
pub fn flatten(text: &str) -> BTreeMap<String, String> {
    fn walk(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
        let key = |name: &str| match prefix {
            "" => name.to_owned(),
            _ => format!("{prefix}.{name}"),
        };
        match value {
            Value::Table(entries) => {
                entries
                    .iter()
                    .for_each(|(name, node)| walk(&key(name), &node.value, into));
            }
            Value::List(items) if items.iter().any(|i| matches!(i.value, Value::Table(_))) => {
                for (place, node) in items.iter().enumerate() {
                    walk(&key(&place.to_string()), &node.value, into);
                }
            }
            _ => {
                into.insert(prefix.to_owned(), value.to_string());
            }
        }
    }
    let mut flat = BTreeMap::new();
    walk("", &Value::Table(parse(text, &mut Vec::new())), &mut flat);
    flat
}

impl Table {
    fn new(
        name: Option<String>,
        place: String,
        origin: Origin,
        entries: BTreeMap<String, Node>,
        faults: Rc<RefCell<Vec<Fault>>>,
    ) -> Self {
        Self {
            name,
            place,
            origin,
            entries,
            asked: RefCell::default(),
            faults,
            faulty: Cell::new(false),
        }
    }

    /// The value of a key that must be there.
    pub fn required<T: Setting>(&self, key: &str) -> Option<T> {
        if self.take(key).is_none() {
            let message = format!("`{key}` is missing{}", self.in_name());
            let hint = format!("add `{key} = ...`, {}", T::EXPECTED);
            self.fault(key, message, Some(hint));
            return None;
        }
        self.optional(key)
    }

    /// The value of a key that may be absent.
    pub fn optional<T: Setting>(&self, key: &str) -> Option<T> {
        let node = self.take(key)?;
        match T::from_value(&node.value) {
            Some(Ok(value)) => Some(value),
            Some(Err(message)) => {
                self.record(&node.origin, format!("{key}: {message}"), None);
                None
            }
            None => {
                let found = match &node.value {
                    Value::Table(_) => "a table".to_owned(),
                    value => value.to_string(),
                };
                let message = format!("{key} = {found} is not {}", T::EXPECTED);
                self.record(&node.origin, message, None);
                None
            }
        }
    }

    /// A value that must be there and satisfy `right`; `rule` says in words what would be right.
    pub fn required_where<T: Setting + fmt::Display>(
        &self,
        key: &str,
        rule: &str,
        right: impl FnOnce(&T) -> bool,
    ) -> Option<T> {
        self.where_right(key, self.required(key)?, rule, right)
    }

    /// A value that may be absent and else must satisfy `right`.
    pub fn optional_where<T: Setting + fmt::Display>(
        &self,
        key: &str,
        rule: &str,
        right: impl FnOnce(&T) -> bool,
    ) -> Option<T> {
        self.where_right(key, self.optional(key)?, rule, right)
    }

    /// A number within a range, which must be there.
    pub fn count<T>(&self, key: &str, range: RangeInclusive<T>) -> Option<T>
    where
        T: Setting + fmt::Display + PartialOrd,
    {
        self.within(key, self.required(key)?, range)
    }

    /// A number within a range, which may be absent.
    pub fn optional_count<T>(&self, key: &str, range: RangeInclusive<T>) -> Option<T>
    where
        T: Setting + fmt::Display + PartialOrd,
    {
        self.within(key, self.optional(key)?, range)
    }

    fn within<T>(&self, key: &str, value: T, range: RangeInclusive<T>) -> Option<T>
    where
        T: fmt::Display + PartialOrd,
    {
        let rule = match value < *range.start() {
            true => format!("at least {}", range.start()),
            false => format!("at most {}", range.end()),
        };
        self.where_right(key, value, &rule, |value| range.contains(value))
    }

    fn where_right<T: fmt::Display>(
        &self,
        key: &str,
        value: T,
        rule: &str,
        right: impl FnOnce(&T) -> bool,
    ) -> Option<T> {
        if right(&value) {
            return Some(value);
        }
        self.fault(key, format!("{key} = {value} must be {rule}"), None);
        None
    }

    /// One of several words, each with its meaning.
    pub fn choice<T: Clone>(&self, key: &str, choices: &[(&str, T)]) -> Option<T> {
        let found: String = self.required(key)?;
        if let Some((_, meaning)) = choices.iter().find(|(word, _)| *word == found) {
            return Some(meaning.clone());
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        let hint = nearest(&found, &words).map(|word| format!("did you mean `{word}`?"));
        let listed = words
            .iter()
            .map(|word| format!("`{word}`"))
            .collect::<Vec<_>>()
            .join(", ");
        self.fault(
            key,
            format!("{key} = `{found}` is not one of {listed}"),
            hint,
        );
        None
    }

    /// A table inside this one that may be absent, read with `read`.
    pub fn child<T>(&self, key: &str, read: impl FnOnce(&Table) -> Option<T>) -> Option<T> {
        let node = self.take(key)?;
        match node.value {
            Value::Table(entries) => self
                .inside(key, self.place.clone(), node.origin, entries)
                .read_all(read),
            other => {
                self.record(
                    &node.origin,
                    format!("{key} = {other} is not a table"),
                    None,
                );
                None
            }
        }
    }

    /// A table inside this one that must be there.
    pub fn required_child<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Table) -> Option<T>,
    ) -> Option<T> {
        if self.take(key).is_none() {
            let message = format!("the table `{key}` is missing{}", self.in_name());
            self.fault(key, message, None);
            return None;
        }
        self.child(key, read)
    }

    /// A list of tables, each read with `read`; those with a `name` are called by it in messages.
    pub fn children<T>(&self, key: &str, read: impl Fn(&Table) -> Option<T>) -> Option<Vec<T>> {
        let missing = format!("at least one `{key}` is needed{}", self.in_name());
        let Some(node) = self.take(key) else {
            self.fault(key, missing, Some(format!("add a table `[[{key}]]`")));
            return None;
        };
        let Value::List(mut items) = node.value else {
            let hint = format!("write it as `[[{key}]]` or `{key} = [{{ ... }}]`");
            self.record(
                &node.origin,
                format!("`{key}` is not a list of tables"),
                Some(hint),
            );
            return None;
        };
        items.retain(|item| item.value != Value::Absent);
        if items.is_empty() {
            self.record(&node.origin, missing, None);
            return None;
        }
        let read_item = |item: Node| match item.value {
            Value::Table(entries) => {
                // The line is enough for a name that cannot be used, and may be of any length.
                let place = match name_of(&entries) {
                    Some(name) if check_name(name).is_ok() => format!("{key} `{name}`"),
                    _ => self.place.clone(),
                };
                self.inside(key, place, item.origin, entries)
                    .read_all(&read)
            }
            other => {
                self.record(
                    &item.origin,
                    format!("{other} in `{key}` is not a table"),
                    None,
                );
                None
            }
        };
        // Every item is read, so that the faults of all are told.
        let found: Vec<_> = items.into_iter().map(read_item).collect();
        found.into_iter().collect()
    }

    /// A name that becomes that of a file or folder; see [`check_name`].
    pub fn name(&self, key: &str) -> Option<String> {
        let name: String = self.required(key)?;
        match check_name(&name) {
            Ok(()) => Some(name),
            Err((message, hint)) => {
                self.fault(key, format!("{key}: {message}"), Some(hint));
                None
            }
        }
    }

    /// Whether the key is there, without marking it as asked for unless it was taken away.
    pub fn has(&self, key: &str) -> bool {
        match self.entries.get(key) {
            Some(node) if node.value == Value::Absent => self.take(key).is_some(),
            found => found.is_some(),
        }
    }

    /// Records that the value of `key` cannot be used.
    pub fn fault(&self, key: &str, message: impl Into<String>, hint: Option<String>) {
        let origin = self
            .entries
            .get(key)
            .map_or(&self.origin, |node| &node.origin);
        self.record(origin, message.into(), hint);
    }

    /// How many faults the file has so far.
    pub fn faults(&self) -> usize {
        self.faults.borrow().len()
    }

    fn inside(
        &self,
        key: &str,
        place: String,
        origin: Origin,
        entries: BTreeMap<String, Node>,
    ) -> Table {
        Table::new(
            Some(key.to_owned()),
            place,
            origin,
            entries,
            Rc::clone(&self.faults),
        )
    }

    /// Reads the table, then reports keys that nobody asked for. Nothing is returned from a table
    /// with a fault.
    fn read_all<T>(&self, read: impl FnOnce(&Table) -> Option<T>) -> Option<T> {
        let before = self.faults.borrow().len();
        let found = read(self);
        let asked = self.asked.borrow();
        let known: Vec<&str> = asked.iter().map(String::as_str).collect();
        for (key, node) in &self.entries {
            if !known.contains(&key.as_str()) {
                let hint = match nearest(key, &known) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => format!("known keys are {}", known.join(", ")),
                };
                self.record(
                    &node.origin,
                    format!("unknown key `{key}`{}", self.in_name()),
                    Some(hint),
                );
            }
        }
        if self.faulty.get() || self.faults.borrow().len() > before {
            None
        } else {
            found
        }
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

    fn record(&self, origin: &Origin, message: String, hint: Option<String>) {
        self.faulty.set(true);
        let place = match &self.place[..] {
            "" => origin.to_string(),
            place => format!("{place}, {origin}"),
        };
        self.faults.borrow_mut().push(Fault {
            place,
            message,
            hint,
        });
    }
}

/// The nearest of several words, if one is near enough to be meant.
pub fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|word| (strsim::damerau_levenshtein(found, word), *word))
        .min()
        .filter(|(distance, word)| *distance <= word.len().max(found.len()) / 3 + 1)
        .map(|(_, word)| word)
}

fn parse(text: &str, faults: &mut Vec<Fault>) -> BTreeMap<String, Node> {
    let line_of = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let line = line_of(error.span().map_or(0, |span| span.start));
        faults.push(Fault {
            place: format!("line {line}"),
            message: format!("this is not TOML: {}", error.message()),
            hint: None,
        });
    }
    convert_table(table.get_ref(), &line_of)
}

fn convert_table(table: &DeTable<'_>, line_of: &dyn Fn(usize) -> usize) -> BTreeMap<String, Node> {
    table
        .iter()
        .map(|(key, value)| {
            // The line of the key, which is where a person looks for `key = value`.
            let origin = Origin::Line(line_of(key.span().start));
            (
                key.get_ref().to_string(),
                Node {
                    value: convert(value.get_ref(), line_of),
                    origin,
                },
            )
        })
        .collect()
}

fn convert(value: &DeValue<'_>, line_of: &dyn Fn(usize) -> usize) -> Value {
    let other = |text: &str| Value::Other(text.to_owned());
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| other(number.as_str()), Value::Integer),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_| other(number.as_str()), Value::Float),
        DeValue::Boolean(truth) => Value::Boolean(*truth),
        DeValue::Datetime(date) => other(&date.to_string()),
        DeValue::Array(items) => Value::List(
            items
                .iter()
                .map(|item| Node {
                    value: convert(item.get_ref(), line_of),
                    origin: Origin::Line(line_of(item.span().start)),
                })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, line_of)),
    }
}

/// Applies `a.b=c`. In a list of tables a part of the path is a number from 0 or a table's `name`.
fn apply(root: &mut BTreeMap<String, Node>, flag: &str) -> Result<(), (String, Option<String>)> {
    let (path, text) = flag.split_once('=').ok_or_else(|| {
        let hint = Some("write `--set stage.finetune.attack.steps=3`".to_owned());
        ("there is no `=`".to_owned(), hint)
    })?;
    let origin = Origin::Flag(flag.to_owned());
    // What is not a value of TOML is taken as a string, so that `--set data.train=./cifar` works.
    let mut faults = Vec::new();
    let parsed = parse(&format!("value = {text}"), &mut faults).remove("value");
    let mut value = match parsed {
        Some(node) if faults.is_empty() => node.value,
        _ => Value::Text(text.trim().to_owned()),
    };
    if matches!(&value, Value::Text(text) if text == ABSENT) {
        value = Value::Absent;
    }
    relabel(&mut value, &origin);
    let path: Vec<&str> = path.trim().split('.').collect();
    let mut tree = Value::Table(std::mem::take(root));
    let placed = place(&mut tree, &path, 0, Node { value, origin });
    if let Value::Table(entries) = tree {
        *root = entries;
    }
    placed.map_err(|message| (message, None))
}

/// Puts `node` where the path from its part `depth` on leads.
fn place(value: &mut Value, path: &[&str], depth: usize, node: Node) -> Result<(), String> {
    let Some(part) = path.get(depth) else {
        *value = node.value;
        return Ok(());
    };
    match value {
        Value::Table(entries) if depth + 1 == path.len() => {
            // Replaced whole, so that messages name the flag as the value's origin.
            entries.insert((*part).to_owned(), node);
            Ok(())
        }
        Value::Table(entries) => {
            let made = Node {
                value: Value::Absent,
                origin: node.origin.clone(),
            };
            let inside = entries.entry((*part).to_owned()).or_insert(made);
            if inside.value == Value::Absent {
                inside.value = Value::Table(BTreeMap::new());
            }
            place(&mut inside.value, path, depth + 1, node)
        }
        Value::List(items) => {
            let missing = || format!("there is no `{}`", path[..=depth].join("."));
            let (item, parts) = choose(items, &path[depth..]).ok_or_else(missing)?;
            place(item, path, depth + parts, node)
        }
        _ => Err(format!("`{}` is not a table", path[..depth].join("."))),
    }
}

/// The table of a list that a path names, and how many of its parts do: a name may have points.
fn choose<'a>(items: &'a mut [Node], path: &[&str]) -> Option<(&'a mut Value, usize)> {
    let named = |parts: usize| {
        let wanted = path[..parts].join(".");
        let is_it = |node: &Node| match &node.value {
            Value::Table(entries) => name_of(entries) == Some(&wanted),
            _ => false,
        };
        Some((items.iter().position(is_it)?, parts))
    };
    let by_number = || Some((path[0].parse::<usize>().ok()?, 1));
    let (place, parts) = (1..=path.len()).find_map(named).or_else(by_number)?;
    items.get_mut(place).map(|node| (&mut node.value, parts))
}

fn name_of(entries: &BTreeMap<String, Node>) -> Option<&str> {
    match entries.get("name").map(|node| &node.value) {
        Some(Value::Text(name)) => Some(name),
        _ => None,
    }
}

fn relabel(value: &mut Value, origin: &Origin) {
    let nodes: Vec<&mut Node> = match value {
        Value::List(items) => items.iter_mut().collect(),
        Value::Table(entries) => entries.values_mut().collect(),
        _ => return,
    };
    for node in nodes {
        node.origin = origin.clone();
        relabel(&mut node.value, origin);
    }
}

/// Each key of two files of settings that differs, with both values.
pub fn changes(before: &str, now: &str) -> Vec<String> {
    let (before, now) = (flatten(before), flatten(now));
    let keys: BTreeSet<_> = before.keys().chain(now.keys()).collect();
    let value = |of: &BTreeMap<String, String>, key: &String| {
        of.get(key).cloned().unwrap_or_else(|| "absent".to_owned())
    };
    let pairs = keys
        .into_iter()
        .map(|key| (key, value(&before, key), value(&now, key)));
    pairs
        .filter(|(_, before, now)| before != now)
        .map(|(key, before, now)| format!("{key}: {before} -> {now}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Stage {
        steps: u64,
        rate: f64,
    }

    fn stages(text: &str, flags: &[&str]) -> Result<Vec<Stage>, Vec<String>> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        read(text, &flags, |table| {
            table.children("stage", |stage| {
                let _: Option<String> = stage.required("name");
                let steps = stage.required_child("attack", |attack| {
                    attack.required_where("steps", "at least 1", |steps: &u64| *steps > 0)
                });
                let rate = stage.required("rate");
                Some(Stage {
                    steps: steps?,
                    rate: rate?,
                })
            })
        })
        .map_err(|faults| faults.iter().map(Fault::to_string).collect())
    }

    const GOOD: &str = "[[stage]]\nname = \"a\"\nrate = 1\nattack = { steps = 2 }\n\
                        [[stage]]\nname = \"b\"\nrate = 0.5\n[stage.attack]\nsteps = 3\n";

    #[test]
    fn a_good_file_is_read() {
        let found = stages(GOOD, &[]).unwrap();
        assert_eq!(
            found,
            [
                Stage {
                    steps: 2,
                    rate: 1.0
                },
                Stage {
                    steps: 3,
                    rate: 0.5
                }
            ]
        );
    }

    #[test]
    fn all_faults_are_told_at_once_with_line_and_hint() {
        let text = "[[stage]]\nname = \"a\"\nrate = \"fast\"\nattack = { step = 2 }\n\
                    [[stage]]\nname = \"b\"\nattack = { steps = 0 }\n";
        assert_eq!(
            stages(text, &[]).unwrap_err(),
            [
                "stage `a`, line 4: `steps` is missing in `attack`\n    \
                 hint: add `steps = ...`, a whole number, 0 or more",
                "stage `a`, line 4: unknown key `step` in `attack`\n    hint: did you mean `steps`?",
                "stage `a`, line 3: rate = \"fast\" is not a number",
                "stage `b`, line 7: steps = 0 must be at least 1",
                "stage `b`, line 5: `rate` is missing in `stage`\n    \
                 hint: add `rate = ...`, a number",
            ]
        );
    }

    #[test]
    fn overrides_reach_into_named_and_numbered_tables() {
        let found = stages(GOOD, &["stage.b.attack.steps=7", "stage.0.rate=0.25"]).unwrap();
        assert_eq!(
            found,
            [
                Stage {
                    steps: 2,
                    rate: 0.25
                },
                Stage {
                    steps: 7,
                    rate: 0.5
                }
            ]
        );
    }

    #[test]
    fn a_faulty_override_is_named_as_what_was_typed() {
        assert_eq!(
            stages(GOOD, &["stage.b.attack.stesp=7"]).unwrap_err(),
            [
                "stage `b`, `--set stage.b.attack.stesp=7`: unknown key `stesp` in `attack`\n    \
              hint: did you mean `steps`?"
            ]
        );
        assert_eq!(
            stages(GOOD, &["stage.c.rate=1"]).unwrap_err(),
            ["`--set stage.c.rate=1`: there is no `stage.c`"]
        );
    }

    #[test]
    fn a_key_is_taken_away_with_none_and_must_be_a_known_one() {
        let read_rate = |flags: &[&str]| {
            let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
            let read_table = |table: &Table| {
                let rate = table.optional::<f64>("rate");
                let more = match table.has("more") {
                    true => table.child("more", |_| Some(1)),
                    false => None,
                };
                Some((rate, table.has("rate"), more))
            };
            read("rate = 1\nmore = {}", &flags, read_table)
                .map_err(|faults| faults.iter().map(Fault::to_string).collect::<Vec<_>>())
        };
        assert_eq!(read_rate(&[]), Ok((Some(1.0), true, Some(1))));
        for none in ["none", "\"none\""] {
            let taken = [&format!("rate={none}")[..], &format!("more={none}")];
            assert_eq!(read_rate(&taken), Ok((None, false, None)));
        }
        assert_eq!(
            read_rate(&["rat=none"]),
            Err(vec![
                "`--set rat=none`: unknown key `rat`\n    hint: did you mean `rate`?".to_owned()
            ])
        );
        // A required one is missed where it was taken away, and a whole table of a list can go.
        let missed = stages(GOOD, &["stage.a.attack=none"]).unwrap_err();
        assert_eq!(
            missed,
            ["stage `a`, `--set stage.a.attack=none`: the table `attack` is missing in `stage`"]
        );
        let left = stages(GOOD, &["stage.a=none"]).unwrap();
        assert_eq!((left.len(), left[0].steps), (1, 3));
    }

    #[test]
    fn names_with_points_and_names_that_are_numbers_are_reached() {
        let text = GOOD.replace("\"a\"", "\"v1.5\"").replace("\"b\"", "\"0\"");
        let found = stages(&text, &["stage.v1.5.rate=7", "stage.0.attack.steps=9"]).unwrap();
        assert_eq!((found[0].rate, found[1].steps), (7.0, 9));
    }

    #[test]
    fn whole_numbers_are_read_up_to_their_limit_and_named_beyond_it() {
        let number = |text: &str| {
            read(&format!("n = {text}"), &[], |table| {
                table.required::<u64>("n")
            })
            .map_err(|faults| faults[0].to_string())
        };
        assert_eq!(number("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(number("0xffff_ffff_ffff_ffff"), Ok(u64::MAX));
        for text in ["18446744073709551616", &"9".repeat(60)] {
            assert_eq!(
                number(text),
                Err(format!(
                    "line 1: n: {text} is too large, the largest whole number is {}",
                    u64::MAX
                ))
            );
        }
        assert_eq!(
            number("-1"),
            Err("line 1: n = -1 is not a whole number, 0 or more".to_owned())
        );
        assert_eq!(
            number("1979-05-27"),
            Err("line 1: n = 1979-05-27 is not a whole number, 0 or more".to_owned())
        );
    }

    #[test]
    fn what_is_not_toml_is_told_with_its_line() {
        let faults = stages("[[stage]]\nname = \"a\"\nrate = = 1\n", &[]).unwrap_err();
        assert!(
            faults[0].starts_with("line 3: this is not TOML"),
            "{faults:?}"
        );
    }

    #[test]
    fn flattening_names_every_value() {
        let flat = flatten(GOOD);
        assert_eq!(flat["stage.1.attack.steps"], "3");
        assert_eq!(flat.len(), 6);
    }
}
