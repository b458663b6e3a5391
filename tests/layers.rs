//! The order of the modules: each uses only those that stand above it in `src/lib.rs`.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The modules in the order of `src/lib.rs`.
fn modules() -> Vec<String> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod "));
    names
        .map(|name| name.trim_end_matches(';').to_owned())
        .collect()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The first part of a path below `src`: the module a file belongs to.
fn module_of(file: &Path) -> String {
    let below = file.strip_prefix(root().join("src")).unwrap();
    below
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

/// Code without comments and without the tests at the end of a file, which may use anything.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn every_module_uses_only_those_above_it() {
    let modules = modules();
    let place = |name: &str| modules.iter().position(|module| module == name);
    let mut wrong = Vec::new();
    for file in rust_files(&root().join("src")) {
        let module = module_of(&file);
        let Some(own) = place(&module) else { continue };
        for used in code(&file).split("crate::").skip(1) {
            let name: String = used
                .chars()
                .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
                .collect();
            if place(&name).is_some_and(|other| other > own) {
                wrong.push(format!(
                    "{} uses {name}, which stands below {module}",
                    file.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_and_printing_stay_in_their_places() {
    let mut wrong = Vec::new();
    for file in rust_files(&root().join("src")) {
        let (module, code) = (module_of(&file), code(&file));
        let mut forbid = |word: &str, but: &str| {
            if module != but && code.contains(word) {
                wrong.push(format!("{} contains `{word}`", file.display()));
            }
        };
        forbid("unsafe ", "nowhere");
        // They panic where nothing can be written; `cli` has lines of its own.
        forbid("println!", "nowhere");
        forbid("print!", "nowhere");
        forbid("todo!", "nowhere");
        // A process that waits within MPI can end no other way.
        forbid("std::process::exit", "distributed");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn attacks_know_no_model_and_models_no_attack() {
    for (module, stranger) in [
        ("attack", "model"),
        ("model", "attack"),
        ("attack", "data"),
        ("attack", "text"),
        ("text", "data"),
    ] {
        for file in rust_files(&root().join("src").join(module)) {
            let uses = code(&file).contains(&format!("crate::{stranger}"));
            assert!(!uses, "{} uses {stranger}", file.display());
        }
    }
}
