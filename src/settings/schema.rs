//! A JSON schema (draft 2020-12) with which editors complete and check settings files.

use serde_json::{Map, Value, json};

use super::describe::{Description, Key, Kind};

/// Returns the schema of a whole file.
pub fn schema(root: &'static Description, title: &str) -> Value {
    let mut schema = Map::new();
    schema.insert(
        "$schema".to_owned(),
        json!("https://json-schema.org/draft/2020-12/schema"),
    );
    schema.insert("title".to_owned(), json!(title));
    schema.extend(of_table(root));
    Value::Object(schema)
}

fn of_table(table: &'static Description) -> Map<String, Value> {
    let properties: Map<String, Value> = table
        .written()
        .map(|key| (key.name.to_owned(), of_key(key)))
        .collect();
    let is_required = |key: &&Key| key.is_required() && !matches!(key.kind, Kind::OneOf(_));
    let required: Vec<&str> = table
        .keys
        .iter()
        .filter(is_required)
        .map(|key| key.name)
        .collect();
    let mut schema = Map::new();
    schema.insert("type".to_owned(), json!("object"));
    schema.insert("description".to_owned(), json!(table.about.trim()));
    schema.insert("properties".to_owned(), Value::Object(properties));
    schema.insert("required".to_owned(), json!(required));
    schema.insert("additionalProperties".to_owned(), json!(false));
    for key in table.keys {
        if let Kind::OneOf(keys) = key.kind {
            let one = |key: &Key| json!({ "required": [key.name] });
            let choices: Vec<Value> = keys.iter().map(one).collect();
            schema.insert("oneOf".to_owned(), json!(choices));
        }
    }
    schema
}

fn of_key(key: &Key) -> Value {
    let mut schema = of_kind(&key.kind, key);
    schema.insert("description".to_owned(), json!(description(key)));
    if let Some(default) = key.default
        && let Some(default) = from_toml(&default())
    {
        schema.insert("default".to_owned(), default);
    }
    if let Some(example) = from_toml(key.example) {
        schema.insert("examples".to_owned(), json!([example]));
    }
    Value::Object(schema)
}

/// Returns the meaning, plus what JSON schema has no keyword for: the unit and the meanings of words.
fn description(key: &Key) -> String {
    let mut text = key.meaning.trim().to_owned();
    if !key.unit.is_empty() {
        text.push_str(&format!(" Unit: {}.", key.unit));
    }
    if let Kind::Words(words) = key.kind {
        for (word, meaning) in words.iter().filter(|(_, meaning)| !meaning.is_empty()) {
            text.push_str(&format!("\n- `{word}`: {}", meaning.trim()));
        }
    }
    text
}

fn of_kind(kind: &Kind, key: &Key) -> Map<String, Value> {
    let number = |name: &str| {
        let mut schema = Map::new();
        schema.insert("type".to_owned(), json!(name));
        for (keyword, bound) in key.limits.keywords() {
            schema.insert(keyword.to_owned(), bounded(bound));
        }
        schema
    };
    let object = |value: Value| match value {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    match kind {
        Kind::Whole => {
            let mut schema = number("integer");
            schema.entry("minimum").or_insert(json!(0));
            schema
        }
        Kind::Number => number("number"),
        Kind::Fraction => object(json!({
            "anyOf": [
                number("number"),
                { "type": "string", "pattern": r"^\s*[-+]?[0-9.eE+-]+\s*(/\s*[0-9.eE+-]+\s*)?$" },
            ],
        })),
        Kind::Boolean => object(json!({ "type": "boolean" })),
        Kind::Text { pattern: "", .. } => object(json!({ "type": "string" })),
        Kind::Text { pattern, .. } => object(json!({ "type": "string", "pattern": pattern })),
        Kind::Words(words) => {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            object(json!({ "type": "string", "enum": words }))
        }
        Kind::List(item, length) => {
            let mut schema = object(json!({ "type": "array", "items": of_kind(item, key) }));
            if let Some(length) = length {
                schema.insert("minItems".to_owned(), json!(length));
                schema.insert("maxItems".to_owned(), json!(length));
            }
            schema
        }
        Kind::Table(table) => of_table(table),
        Kind::Tables(table) => {
            object(json!({ "type": "array", "minItems": 1, "items": of_table(table) }))
        }
        Kind::Variants(variants) => {
            let variants: Vec<_> = variants.iter().map(|(_, table)| of_table(table)).collect();
            object(json!({ "oneOf": variants }))
        }
        // Its keys belong to the enclosing table.
        Kind::OneOf(_) => Map::new(),
    }
}

/// Converts a bound to JSON, as an integer if it is whole.
fn bounded(bound: f64) -> Value {
    match bound.fract() == 0.0 && bound.abs() < 1e15 + 1.0 {
        true => json!(bound as i64),
        false => json!(bound),
    }
}

/// Converts a TOML value to JSON.
fn from_toml(text: &str) -> Option<Value> {
    let table: toml::Table = toml::from_str(&format!("value = {text}")).ok()?;
    serde_json::to_value(table.get("value")?).ok()
}
