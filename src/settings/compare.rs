//! Comparison of two settings files.

use std::collections::{BTreeMap, BTreeSet};

use super::value::{Value, parse};

/// Returns every key that differs between two settings files, with both values.
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

/// Flattens a settings file to a map from full key to value, for comparisons.
///
/// Tables in an array are numbered from 0: `stage.0.attack.steps`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flatten_returns_every_value_under_its_full_key() {
        let text = "[[stage]]\nname = \"a\"\nrate = 1\nattack = { steps = 2 }\n\
                    [[stage]]\nname = \"b\"\nrate = 0.5\n[stage.attack]\nsteps = 3\n";
        let flat = flatten(text);
        assert_eq!(flat["stage.1.attack.steps"], "3");
        assert_eq!(flat.len(), 6);
    }
}
