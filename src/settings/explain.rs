//! Explanations of keys for the terminal.

use super::describe::{Description, Entry, Key, Kind};
use super::problem::nearest;
use crate::error::{Error, Result};

/// Lists all keys, one per line, each with a short meaning.
pub fn outline(root: &'static Description) -> String {
    let mut seen = Vec::new();
    let mut lines = Vec::new();
    for entry in root.entries() {
        // A key shared by several variants of a table is listed once.
        if seen.contains(&entry.path) {
            continue;
        }
        let indent = "  ".repeat(entry.path.matches('.').count());
        let name = format!("{indent}{}", entry.key.name);
        lines.push(format!("{name:<30}{}", short(entry.key)));
        seen.push(entry.path);
    }
    lines.join("\n")
}

/// Describes a key or a table, given its full path.
///
/// Errors: an unknown key.
pub fn explain(root: &'static Description, path: &str) -> Result<String> {
    let entries = root.entries();
    let found: Vec<&Entry> = entries.iter().filter(|entry| entry.path == path).collect();
    if found.is_empty() {
        let known: Vec<&str> = entries.iter().map(|entry| &entry.path[..]).collect();
        let hint = match nearest(path, &known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "list all keys with `advxl recipe explain`".to_owned(),
        };
        return Err(Error::input(format!("unknown key `{path}`")).hint(hint));
    }
    let texts: Vec<String> = found.into_iter().map(of_entry).collect();
    Ok(texts.join("\n\n"))
}

fn of_entry(entry: &Entry) -> String {
    let title = match entry.variant {
        "" => entry.path.clone(),
        variant => format!("{} ({variant})", entry.path),
    };
    let mut lines = vec![title, format!("  {}", meaning(entry.key))];
    let tables = entry.key.kind.tables_inside();
    match tables.is_empty() {
        true => lines.extend(of_value(entry.key)),
        false => {
            if !entry.key.is_required() {
                lines.push(format!("  {:<9} {}", "default", default(entry.key)));
            }
            for (variant, table) in tables {
                lines.push(String::new());
                lines.extend(of_table(variant, table));
            }
        }
    }
    lines.join("\n")
}

fn of_value(key: &Key) -> Vec<String> {
    let mut rows = Vec::new();
    match key.kind {
        Kind::Words(words) => {
            let width = words.iter().map(|(word, _)| word.len()).max().unwrap_or(0);
            for (place, (word, meaning)) in words.iter().enumerate() {
                let label = if place == 0 { "values" } else { "" };
                let text = format!("{word:<width$}  {}", meaning.trim());
                rows.push((label, text.trim_end().to_owned()));
            }
        }
        kind => rows.push(("type", kind.expected())),
    }
    if key.limits.are_set() {
        rows.push(("range", key.limits.to_string()));
    }
    if !key.unit.is_empty() {
        rows.push(("unit", key.unit.to_owned()));
    }
    rows.push(("default", default(key)));
    if !key.example.is_empty() {
        rows.push(("example", format!("{} = {}", key.name, key.example)));
    }
    let row = |(label, text)| format!("  {label:<9} {text}");
    rows.into_iter().map(row).collect()
}

fn default(key: &Key) -> String {
    match &key.absence()[..] {
        "required" => "none; the key is required".to_owned(),
        "optional" => "none; the key is optional".to_owned(),
        default => default.to_owned(),
    }
}

fn of_table(variant: &str, table: &'static Description) -> Vec<String> {
    let rows: Vec<[String; 3]> = table
        .written()
        .map(|key| [key.name.to_owned(), key.absence(), meaning(key)])
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (names, absences) = (width(0), width(1).min(24));
    let about = table.about.split_whitespace().collect::<Vec<_>>().join(" ");
    let title = (!variant.is_empty()).then(|| format!("  {variant}: {about}"));
    let rows = rows.iter().map(|[name, absence, meaning]| {
        format!("    {name:<names$}  {absence:<absences$}  {meaning}")
    });
    title.into_iter().chain(rows).collect()
}

fn meaning(key: &Key) -> String {
    key.meaning.trim().to_owned()
}

/// Returns the meaning up to its first full stop, semicolon or colon.
fn short(key: &Key) -> &str {
    let text = key.meaning.trim();
    let pauses = [". ", "; ", ": "]
        .into_iter()
        .filter_map(|pause| text.find(pause));
    let end = pauses.min().unwrap_or(text.len());
    text[..end].trim_end_matches('.')
}
