//! `--set KEY=VALUE`: values from the command line that override those in the file.

use std::collections::BTreeMap;

use super::value::{ABSENT, Node, Origin, Value, name_of, parse};

/// Applies `a.b=c`. In a list of tables, a part of the path is an index (from 0) or a table's `name`.
pub(super) fn apply(
    root: &mut BTreeMap<String, Node>,
    flag: &str,
) -> Result<(), (String, Option<String>)> {
    let (path, text) = flag.split_once('=').ok_or_else(|| {
        let hint = Some(
            "use the form KEY=VALUE, such as `--set stage.finetune.attack.steps=3`".to_owned(),
        );
        ("missing `=`".to_owned(), hint)
    })?;
    let origin = Origin::Flag(flag.to_owned());
    // Anything that is not a TOML value is read as a string, so that `--set data.train=./cifar` works.
    let mut problems = Vec::new();
    let parsed = parse(&format!("value = {text}"), &mut problems).remove("value");
    let mut value = match parsed {
        Some(node) if problems.is_empty() => node.value,
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

/// Inserts `node` at the path, starting with its part `depth`.
fn place(value: &mut Value, path: &[&str], depth: usize, node: Node) -> Result<(), String> {
    let Some(part) = path.get(depth) else {
        *value = node.value;
        return Ok(());
    };
    match value {
        Value::Table(entries) if depth + 1 == path.len() => {
            // The whole node is replaced, so that messages name the flag as the value's origin.
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
            let missing = || format!("unknown table `{}`", path[..=depth].join("."));
            let (item, parts) = choose(items, &path[depth..]).ok_or_else(missing)?;
            place(item, path, depth + parts, node)
        }
        _ => Err(format!("`{}` is not a table", path[..depth].join("."))),
    }
}

/// Finds the table of a list that a path names. Also returns the number of parts that form the name, which may contain
/// dots.
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
