//! The reference page: one Markdown table for each settings table.

use super::describe::{Description, Key, Kind};

/// Returns the page: an introduction, which contains the title, and one section per table.
pub fn page(root: &'static Description, introduction: &str) -> String {
    let mut sections = vec![introduction.trim_end().to_owned(), section("", "", root)];
    for entry in root.entries() {
        for (variant, table) in entry.key.kind.tables_inside() {
            sections.push(section(&entry.path, variant, table));
        }
    }
    sections.join("\n\n") + "\n"
}

fn section(path: &str, variant: &str, table: &'static Description) -> String {
    let title = match (path, variant) {
        ("", _) => "Top level".to_owned(),
        (path, "") => format!("`{path}`"),
        (path, variant) => format!("`{path}`, {variant}"),
    };
    let anchor = match (path, variant) {
        ("", _) => "top".to_owned(),
        (path, "") => path.to_owned(),
        (path, variant) => format!("{path}.{}", variant.replace(' ', "-")),
    };
    let rows: Vec<String> = table.written().map(|key| row(path, key)).collect();
    format!(
        "<a id=\"{anchor}\"></a>\n\n## {title}\n\n{}\n\n| key | value | default | meaning |\n|---|---|---|---|\n{}",
        table.about.trim(),
        rows.join("\n")
    )
}

fn row(path: &str, key: &'static Key) -> String {
    let inner = match path {
        "" => key.name.to_owned(),
        path => format!("{path}.{}", key.name),
    };
    let value = match &key.kind.tables_inside()[..] {
        [] => key.value(),
        [("", _)] => format!("[{}](#{inner})", key.value()),
        variants => {
            let link = |(variant, _): &(&str, _)| {
                format!("[{variant}](#{inner}.{})", variant.replace(' ', "-"))
            };
            variants.iter().map(link).collect::<Vec<_>>().join(" or ")
        }
    };
    let absence = match &key.absence()[..] {
        text @ ("required" | "optional") => text.to_owned(),
        text if key.fallback.is_empty() => format!("`{text}`"),
        text => text.to_owned(),
    };
    let example = match key.example {
        "" => String::new(),
        example => format!(" Example: `{example}`"),
    };
    let words = match key.kind {
        Kind::Words(words) => words,
        _ => &[],
    };
    let words = words.iter().filter(|(_, meaning)| !meaning.is_empty());
    let words = words.map(|(word, meaning)| format!("<br>`{word}`: {}", meaning.trim()));
    let meaning = key.meaning.trim();
    let cells = [
        &format!("`{}`", key.name),
        &value,
        &absence,
        &format!("{meaning}{example}{}", words.collect::<String>()),
    ];
    let cells = cells.map(|cell| cell.replace('|', "\\|"));
    format!("| {} |", cells.join(" | "))
}
