//! Rules of the project that no compiler checks: licenses and versions of dependencies (deny.toml), links in Markdown.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn deny() -> toml::Table {
    let text = fs::read_to_string(root().join("deny.toml")).unwrap();
    toml::from_str(&text).unwrap()
}

fn words(value: &toml::Value, key: &str) -> BTreeSet<String> {
    let list = value.get(key).and_then(toml::Value::as_array);
    let words = list.into_iter().flatten().filter_map(|word| {
        let name = word.get("name").or(word.get("crate"));
        name.or(Some(word)).and_then(toml::Value::as_str)
    });
    words.map(str::to_owned).collect()
}

/// Whether a license expression can be met by the allowed ones: `A OR B`, `A AND B`, parentheses, and `/` for OR.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let text = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let text = text.replace(" WITH ", "+WITH+");
    let tokens: Vec<&str> = text.split_whitespace().collect();
    let (value, rest) = any_of(&tokens, allowed);
    value && rest.is_empty()
}

fn any_of<'a>(tokens: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    let (mut value, mut rest) = all_of(tokens, allowed);
    while let ["OR", more @ ..] = rest {
        let (next, left) = all_of(more, allowed);
        (value, rest) = (value | next, left);
    }
    (value, rest)
}

fn all_of<'a>(tokens: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    let (mut value, mut rest) = one(tokens, allowed);
    while let ["AND", more @ ..] = rest {
        let (next, left) = one(more, allowed);
        (value, rest) = (value & next, left);
    }
    (value, rest)
}

fn one<'a>(tokens: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    match tokens {
        ["(", inner @ ..] => match any_of(inner, allowed) {
            (value, [")", rest @ ..]) => (value, rest),
            (_, rest) => (false, rest),
        },
        [license, rest @ ..] => {
            let license = license.replace("+WITH+", " WITH ");
            (allowed.contains(&license), rest)
        }
        [] => (false, tokens),
    }
}

#[test]
fn license_expressions_are_read_as_spdx_means_them() {
    let allowed: BTreeSet<String> = ["MIT", "Apache-2.0 WITH LLVM-exception"]
        .map(str::to_owned)
        .into();
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "Apache-2.0/MIT",
        "(MIT AND MIT) OR X",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR X) AND Y", "", "MIT)"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}

/// What `cargo deny check licenses` checks, without a network; of the crates that builds here use.
#[test]
fn every_dependency_has_a_license_that_deny_toml_allows() {
    let host = Command::new("rustc").arg("-vV").output().unwrap();
    let host = String::from_utf8(host.stdout).unwrap();
    let host = host
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .unwrap()
        .to_owned();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(["--filter-platform", &host])
        .current_dir(root())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed = words(&deny()["licenses"], "allow");
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());
    let refused: Vec<String> = packages
        .iter()
        // Where the manifest names a file instead, cargo-deny reads it.
        .filter(|package| package["license"].is_string() || package["license_file"].is_null())
        .filter(|package| !is_allowed(package["license"].as_str().unwrap_or_default(), &allowed))
        .map(|package| format!("{} {}", package["name"], package["license"]))
        .collect();
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

/// What `cargo deny check bans` checks, of everything in Cargo.lock.
#[test]
fn a_crate_has_several_versions_only_where_deny_toml_says_why() {
    let lock: toml::Table =
        toml::from_str(&fs::read_to_string(root().join("Cargo.lock")).unwrap()).unwrap();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock["package"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        versions
            .entry(name)
            .or_default()
            .push(package["version"].as_str().unwrap());
    }
    let bans = &deny()["bans"];
    let (skipped, banned) = (words(bans, "skip"), words(bans, "deny"));
    let several: BTreeSet<String> = versions
        .iter()
        .filter(|(_, versions)| versions.len() > 1)
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let new: Vec<_> = several.difference(&skipped).collect();
    assert!(
        new.is_empty(),
        "several versions, not in deny.toml's skip: {new:?}"
    );
    let stale: Vec<_> = skipped.difference(&several).collect();
    assert!(
        stale.is_empty(),
        "one version only, still in deny.toml's skip: {stale:?}"
    );
    let found: Vec<_> = banned
        .iter()
        .filter(|name| versions.contains_key(name.as_str()))
        .collect();
    assert!(found.is_empty(), "banned by deny.toml: {found:?}");
}

/// A heading's anchor, as GitHub and mdBook make it.
fn anchor(heading: &str) -> String {
    let plain = match heading.split_once("](") {
        Some((before, after)) => {
            let after = after.split_once(')').map_or("", |(_, after)| after);
            format!("{}{after}", before.replacen('[', "", 1))
        }
        None => heading.to_owned(),
    };
    let kept = plain.trim().to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
    kept.collect::<String>().replace(' ', "-")
}

fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let headings = headings.map(|line| anchor(line.trim_start_matches('#')));
    let ids = text
        .split("<a id=\"")
        .skip(1)
        .filter_map(|rest| rest.split_once('"'));
    headings.chain(ids.map(|(id, _)| id.to_owned())).collect()
}

fn markdown(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir()
            && !name.starts_with('.')
            && !["target", "runs", "corpus"].contains(&&*name)
        {
            markdown(&path, found);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

#[test]
fn every_link_in_markdown_leads_to_a_file_and_a_heading() {
    let mut files = Vec::new();
    markdown(&root(), &mut files);
    assert!(files.len() > 40, "{}", files.len());
    let mut broken = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        let mut in_code = false;
        for line in text.lines() {
            in_code ^= line.trim_start().starts_with("```");
            if in_code {
                continue;
            }
            for link in line
                .split("](")
                .skip(1)
                .filter_map(|rest| rest.split_once(')'))
            {
                let (link, _) = link;
                if link.contains("://") || link.starts_with("mailto:") || link.contains(' ') {
                    continue;
                }
                let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
                let target = match path {
                    "" => file.clone(),
                    path => file.parent().unwrap().join(path),
                };
                let there = target.exists()
                    && (anchor.is_empty()
                        || target.extension().is_none_or(|extension| extension != "md")
                        || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor));
                if !there {
                    let file = file.strip_prefix(root()).unwrap().display();
                    broken.push(format!("{file}: {link}"));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
