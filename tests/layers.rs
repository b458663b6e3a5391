//! The order of the modules: each module of `src/lib.rs` uses only modules above it, and inside a module, files use
//! only files listed before them in [`FILES`]. So there are no import cycles, and a module can be read from its first
//! file on.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The files of each module with several files, in order. `config` is `config.rs` or `config/mod.rs`; the module's own
/// `mod.rs` comes after all of them and is not listed.
const FILES: &[(&str, &[&str])] = &[
    (
        "settings",
        &[
            "problem",
            "value",
            "compare",
            "describe",
            "setting",
            "overrides",
            "table",
            "field",
            "words",
            "declare",
            "explain",
            "page",
            "schema",
        ],
    ),
    (
        "ops",
        &[
            "words",
            "spec",
            "cuda/values",
            "device",
            "upload",
            "engine",
            "cpu/flex",
            "cuda/optimizer",
            "tensor",
            "open",
            "rate",
            "node",
            "cache",
            "gpu/padded",
            "gpu/upload",
            "gpu",
            "recompute",
            "reference",
            "plain",
            "cpu/testing",
            "cpu/adamw",
            "cpu/linear",
            "cpu/norm",
            "cpu/gelu",
            "cpu/patches",
            "cpu/unfold",
            "cpu/pgd",
            "cpu/rows",
            "cpu/fp8",
            "cpu/block",
            "cpu/convnext",
            "cpu",
            "cuda/layers",
            "cuda/loss",
            "cuda/pixels",
            "cuda/rows",
            "cuda/tokens",
            "cuda/text",
            "cuda/block",
            "cuda/convnext",
            "cuda/evaluation",
            "cuda",
            "dispatch",
            "evaluation",
        ],
    ),
    (
        "distributed",
        &[
            "config",
            "token",
            "program",
            "launch",
            "signals",
            "comm",
            "heartbeat",
            "rendezvous",
            "worker",
            "tcp",
            "mpi_beats",
            "mpi",
            "launcher",
            "init",
            "gpus",
            "zero",
        ],
    ),
    (
        "image",
        &[
            "damage",
            "picture",
            "resize",
            "operations",
            "preprocessing",
            "content",
            "exif",
            "decode/outcome",
            "decode/gif",
            "decode/pnm",
            "decode/raster",
            "decode/jpeg",
            "decode",
        ],
    ),
    (
        "storage",
        &[
            "glob",
            "cache",
            "cloud",
            "cloud_absent",
            "archive",
            "unpack",
            "store",
            "pattern",
        ],
    ),
    (
        "data",
        &[
            "spec",
            "classes",
            "sources/cifar",
            "sources/folder",
            "sources/tensors",
            "sources/npy",
            "sources/npz",
            "sources/corrupted",
            "sources/parquet/columns",
            "sources/parquet/columns_absent",
            "sources/parquet/copy",
            "sources/parquet",
            "sources/synthetic",
            "sources",
            "shards/tar",
            "shards/index",
            "shards/recent",
            "shards",
            "wds",
            "mixture",
            "dataset",
            "augment/mix",
            "batch",
            "augment/mixing",
            "augment",
            "loader/order",
            "loader",
            "loader/evaluation",
            "subset",
            "real",
            "check",
            "pack",
        ],
    ),
    (
        "model",
        &[
            "parameter",
            "init",
            "position",
            "tokens",
            "pass",
            "config/common",
            "config/vit",
            "config/convnext",
            "config",
            "conv",
            "vit",
            "convnext",
        ],
    ),
    (
        "text",
        &[
            "html",
            "mojibake",
            "clean",
            "bpe",
            "tokenizer",
            "config",
            "tower",
            "model",
            "zero_shot",
        ],
    ),
    (
        "attack",
        &[
            "draws",
            "gradient",
            "l1",
            "threat",
            "objective",
            "target_model",
            "targets",
            "attempt",
            "closest",
            "pgd",
            "hyperplane",
            "apgd",
            "batch",
            "fab",
            "square",
            "unseen/corruption",
            "unseen/renderer",
            "unseen/sample",
            "unseen/pixel",
            "unseen/elastic",
            "unseen/gabor",
            "unseen/jpeg",
            "unseen/snow",
            "unseen/kaleidoscope",
            "unseen/glitch",
            "unseen/wood",
            "unseen/preset",
            "unseen",
        ],
    ),
    (
        "eval",
        &[
            "images",
            "recheck",
            "bound",
            "accuracy",
            "checks",
            "autoattack",
            "interval",
            "calibration",
            "hub",
            "curve",
            "result",
            "classifier",
            "session",
        ],
    ),
    ("table", &["protocol", "cells", "render"]),
    (
        "weights",
        &[
            "pickle",
            "state_dict",
            "embeddings",
            "outputs",
            "preprocessing",
            "names",
            "architecture",
            "stated",
            "describe",
            "config_json",
            "open_clip_json",
            "hugging_face_json",
            "import",
            "text",
            "export/card",
            "export/board",
            "export/robustbench",
            "export/parts",
            "export/open_clip",
            "export/fold",
            "export/hugging_face",
            "export",
        ],
    ),
    (
        "recipe",
        &[
            "names",
            "data",
            "start",
            "text",
            "objective",
            "training_attack",
            "stage",
            "evaluation",
            "records",
            "checks",
            "whole",
            "reference",
        ],
    ),
    (
        "plan",
        &[
            "link",
            "memory",
            "gpu_memory",
            "gpu_time",
            "phase",
            "loading",
        ],
    ),
    (
        "objective",
        &[
            "batch_loss",
            "labels",
            "microbatch",
            "gradients",
            "contrastive",
            "weighted",
            "named",
            "parameters",
            "captions",
        ],
    ),
    (
        "train",
        &[
            "images",
            "outputs",
            "rates",
            "classes",
            "checks",
            "test_set",
            "state",
            "phase",
            "reduce",
            "checkpoint",
            "start",
            "references",
            "folder",
            "monitor",
            "run",
            "resume",
            "evaluation",
            "final_evaluation",
            "lifecycle",
        ],
    ),
    (
        "cli",
        &[
            "print",
            "screen",
            "device",
            "memory",
            "values",
            "model",
            "shared",
            "inputs",
            "preprocessing",
            "train",
            "eval",
            "table",
            "predict",
            "embed",
            "data",
            "export",
            "inspect",
            "manual",
            "plan",
            "recipe",
            "bench",
            "demo",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Returns the top-level modules in the order of `src/lib.rs`.
fn top_modules() -> Vec<String> {
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

/// Returns the module path of a file, such as `["model", "config", "vit"]`.
fn module_of(file: &Path) -> Vec<String> {
    let below = file.strip_prefix(root().join("src")).unwrap();
    let below = below.with_extension("");
    let mut module: Vec<String> = below
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// Returns the code of a file without comments and without the tests at its end, which may use anything.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the paths in some code that start with `crate` or `super`, as absolute paths with braces expanded.
fn paths(code: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            // Paths with `$crate` in a macro are used where it expands.
            let before = code[..at].chars().next_back();
            if before.is_some_and(|letter| letter.is_alphanumeric() || "_:$".contains(letter)) {
                continue;
            }
            let mut base = Vec::new();
            let mut rest = &code[at..];
            if let Some(after) = rest.strip_prefix("crate::") {
                rest = after;
            } else {
                base = module.to_vec();
                while let Some(after) = rest.strip_prefix("super::") {
                    base.pop();
                    rest = after;
                }
            }
            expand(&mut rest, &base, &mut found);
        }
    }
    found
}

/// Reads a path such as `a::{b, c::D}` and adds the paths that it names below `base`.
fn expand(rest: &mut &str, base: &[String], found: &mut Vec<Vec<String>>) {
    let mut path = base.to_vec();
    loop {
        *rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix('{') {
            *rest = after;
            while !rest.trim_start().starts_with('}') {
                expand(rest, &path, found);
                *rest = rest.trim_start();
                *rest = rest.strip_prefix(',').unwrap_or(rest);
            }
            *rest = &rest.trim_start()[1..];
            return;
        }
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let end = rest.find(|letter| !is_word(letter)).unwrap_or(rest.len());
        if end == 0 {
            *rest = rest.strip_prefix('*').unwrap_or(rest);
            break;
        }
        path.push(rest[..end].to_owned());
        *rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(after) => *rest = after,
            None => break,
        }
    }
    // A renamed import.
    if let Some(after) = rest.trim_start().strip_prefix("as ") {
        let end = after.find([',', '}', ';']).unwrap_or(after.len());
        *rest = &after[end..];
    }
    found.push(path);
}

#[test]
fn every_module_uses_only_modules_above_it() {
    let tops = top_modules();
    let place = |name: &str| tops.iter().position(|top| top == name);
    let mut wrong = Vec::new();
    for file in rust_files(&root().join("src")) {
        let module = module_of(&file);
        let Some(own) = place(&module[0]) else {
            continue;
        };
        for used in paths(&code(&file), &module) {
            let below = used
                .first()
                .filter(|name| place(name).is_some_and(|other| other > own));
            if let Some(name) = below {
                wrong.push(format!(
                    "{} uses {name}, a module below its own",
                    file.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_uses_only_earlier_files_of_its_module() {
    let mut wrong = Vec::new();
    for file in rust_files(&root().join("src")) {
        let module = module_of(&file);
        let (top, own) = (&module[0], module[1..].join("/"));
        let Some((_, order)) = FILES.iter().find(|(name, _)| name == top) else {
            continue;
        };
        let place = |name: &str| order.iter().position(|file| *file == name);
        if own.is_empty() {
            continue;
        }
        let at = file.display();
        let Some(here) = place(&own) else {
            wrong.push(format!("{at} is not listed in the order of `{top}`"));
            continue;
        };
        for used in paths(&code(&file), &module) {
            if used.first() != Some(top) || used[1..].is_empty() {
                continue;
            }
            // The longest prefix of the path that is a file.
            let files = (2..=used.len()).rev().map(|end| used[1..end].join("/"));
            let other = files.clone().find(|name| place(name).is_some());
            match other {
                None => wrong.push(format!(
                    "{at} uses `{}` through `{top}/mod.rs`: import it from the file that defines it",
                    used[1..].join("::")
                )),
                Some(other) if other != own && place(&other) > Some(here) => {
                    wrong.push(format!("{at} uses {other}, which is listed after it"));
                }
                Some(_) => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_listed_file_exists() {
    let files = rust_files(&root().join("src"));
    let modules: BTreeSet<String> = files.iter().map(|file| module_of(file).join("/")).collect();
    for (top, order) in FILES {
        for file in *order {
            assert!(modules.contains(&format!("{top}/{file}")), "{top}/{file}");
        }
    }
    // Every module with several files has an order.
    for module in modules.iter().filter_map(|module| module.split_once('/')) {
        assert!(FILES.iter().any(|(top, _)| *top == module.0), "{module:?}");
    }
}

#[test]
fn no_module_has_more_than_a_sixth_of_the_lines() {
    let lines = |file: &PathBuf| fs::read_to_string(file).unwrap().lines().count();
    let files = rust_files(&root().join("src"));
    let all: usize = files.iter().map(lines).sum();
    for top in top_modules() {
        let own = files.iter().filter(|file| module_of(file)[0] == top);
        let own: usize = own.map(lines).sum();
        assert!(100 * own < 16 * all, "{top}: {own} of {all} lines");
    }
}

#[test]
fn unsafe_code_and_printing_stay_in_their_places() {
    let mut wrong = Vec::new();
    for file in rust_files(&root().join("src")) {
        let (module, code) = (module_of(&file), code(&file));
        let mut forbid = |word: &str, but: &str| {
            if module[0] != but && code.contains(word) {
                wrong.push(format!("{} contains `{word}`", file.display()));
            }
        };
        forbid("unsafe ", "nowhere");
        // These panic if nothing can be written; `cli` has its own functions.
        forbid("println!", "nowhere");
        forbid("print!", "nowhere");
        forbid("todo!", "nowhere");
        // The only way to end a process that waits inside MPI.
        forbid("std::process::exit", "distributed");
        // The library must build without the crates of the command line.
        forbid("clap", "cli");
        forbid("indicatif", "cli");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn attacks_and_models_do_not_depend_on_each_other() {
    for (top, stranger) in [
        ("attack", "model"),
        ("model", "attack"),
        ("attack", "data"),
        ("attack", "text"),
        ("text", "data"),
    ] {
        for file in rust_files(&root().join("src").join(top)) {
            let uses = code(&file).contains(&format!("crate::{stranger}"));
            assert!(!uses, "{} uses {stranger}", file.display());
        }
    }
}
