//! What is made of the declarations: explanations of keys, the reference page and the JSON schema.

use serde_json::Value;

use super::whole::Recipe;
use crate::error::Result;
use crate::settings;
use crate::settings::Section;

/// The head of the reference page.
const INTRODUCTION: &str = "\
# Recipe reference

<!-- Generated: renew with `advxl recipe docs > docs/reference/recipe.md`. -->

All keys of a recipe, one section per table. `advxl recipe explain KEY` prints the same in the terminal, and
`recipe.schema.json` is a JSON schema for editors: with Even Better TOML or taplo, begin a recipe with
`#:schema PATH/TO/docs/reference/recipe.schema.json`. The [guide](../guides/recipes.md) explains how the parts work together.";

/// All keys, one a line.
pub fn outline() -> String {
    settings::outline(Recipe::DESCRIPTION)
}

/// A key or a table by its full path, such as `stage.attack.epsilon`.
///
/// Errors: an unknown key.
pub fn explain(path: &str) -> Result<String> {
    settings::explain(Recipe::DESCRIPTION, path)
}

/// The reference page in Markdown.
pub fn page() -> String {
    settings::page(Recipe::DESCRIPTION, INTRODUCTION)
}

/// The JSON schema.
pub fn schema() -> Value {
    settings::schema(Recipe::DESCRIPTION, "advxl recipe")
}

/// The JSON schema as a file.
pub fn schema_text() -> String {
    format!("{:#}\n", schema())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::files;

    #[test]
    fn the_reference_page_is_the_one_of_the_declarations() {
        let found = include_str!("../../docs/reference/recipe.md");
        let renew = "advxl recipe docs > docs/reference/recipe.md";
        assert!(
            found == page(),
            "docs/reference/recipe.md is stale: run `{renew}`"
        );
    }

    #[test]
    fn the_json_schema_is_the_one_of_the_declarations() {
        let found = include_str!("../../docs/reference/recipe.schema.json");
        let renew = "advxl recipe schema > docs/reference/recipe.schema.json";
        assert!(
            found == schema_text(),
            "docs/reference/recipe.schema.json is stale: run `{renew}`"
        );
    }

    #[test]
    fn every_key_of_every_recipe_is_described() {
        let entries = Recipe::DESCRIPTION.entries();
        let known: BTreeSet<&str> = entries.iter().map(|entry| &entry.path[..]).collect();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        for path in files::list(&folder).unwrap() {
            for key in settings::flatten(&files::read_text(&path).unwrap()).into_keys() {
                let named = key.split('.').filter(|part| part.parse::<u64>().is_err());
                let key = named.collect::<Vec<_>>().join(".");
                assert!(known.contains(&key[..]), "{}: {key}", path.display());
            }
        }
    }

    #[test]
    fn every_key_is_explained_with_range_unit_and_example() {
        let text = explain("stage.phases.image_size").unwrap();
        for part in [
            "Side of the square images",
            "range     1 to 4096",
            "unit      pixels",
            "none; the key is required",
            "image_size = 224",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        for entry in Recipe::DESCRIPTION.entries() {
            assert!(!entry.key.meaning.is_empty(), "{}", entry.path);
            assert!(explain(&entry.path).is_ok(), "{}", entry.path);
        }
        let error = explain("stage.attack.epslion").unwrap_err().to_string();
        assert!(
            error.contains("did you mean `stage.attack.epsilon`?"),
            "{error}"
        );
    }

    #[test]
    fn examples_of_keys_are_toml() {
        for entry in Recipe::DESCRIPTION.entries() {
            if !entry.key.example.is_empty() {
                let line = format!("value = {}", entry.key.example);
                let read = toml::from_str::<toml::Table>(&line);
                assert!(read.is_ok(), "{}: {line}", entry.path);
            }
        }
    }
}
