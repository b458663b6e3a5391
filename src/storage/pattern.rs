//! Patterns for many files: `{00000..41407}`, `{train,val}`, `*`, `?`, `[0-9]`, joined by commas or WebDataset's `::`.
//!
//! All files of a range must exist; a glob matches the files it finds. A folder means the shards in it, and `~` the
//! home folder. Names that begin with a scheme such as `s3://` are URLs. Their globs are resolved by listing the store,
//! and the objects of their ranges are checked when they are opened ([`crate::storage::store`]).

use std::path::{Path, PathBuf};

use super::glob::fits;
use super::store;
use super::store::Location;
use crate::error::{Error, Result};
use crate::files;

/// No data set has this many shards; a longer range is a typo.
const MOST_FILES: usize = 1_000_000;

const HINT: &str =
    "write patterns such as `data/{00000..00099}.tar`, `data/*.tar`, or several joined by commas";

/// File extensions of shards.
const ENDINGS: [&str; 3] = [".tar", ".tar.gz", ".tgz"];

/// Expands a pattern to its files, in the order of the pattern.
///
/// Errors: an invalid pattern, missing files, no match, or a file listed twice.
pub fn expand(pattern: &str) -> Result<Vec<Location>> {
    let mut paths = Vec::new();
    let joined = pattern.replace("::", ",");
    for part in split_outside_braces(&joined) {
        let part = part.trim();
        if part.starts_with("pipe:") {
            let message = format!("`{part}`: `pipe:` commands are not supported");
            return Err(Error::input(message)
                .hint("list the shards themselves: paths, `s3://`, `gs://` or `https://`"));
        }
        if part.is_empty() {
            let message = format!("`{pattern}`: empty part between commas");
            return Err(Error::input(message).hint(HINT));
        }
        for name in braces(part, pattern)? {
            let found = match Location::of(&name)? {
                Location::Url(url) if url.ends_with('/') => store::list(&format!("{url}*.tar"))?,
                Location::Url(url) if is_glob(&url) => store::list(&url)?,
                Location::File(path) if path.is_dir() => in_folder(&path)?,
                // An existing file whose name contains a glob character is taken literally.
                Location::File(path) if is_glob(&name) && !path.exists() => {
                    glob(&path)?.into_iter().map(Location::File).collect()
                }
                one => vec![one],
            };
            if found.is_empty() {
                let message = format!("no file matches `{name}`");
                return Err(Error::input(message).hint("check the folder and the pattern"));
            }
            paths.extend(found);
            if paths.len() > MOST_FILES {
                let message = format!("`{pattern}` expands to more than {MOST_FILES} files");
                return Err(Error::input(message).hint(HINT));
            }
        }
    }
    check(&paths)?;
    Ok(paths)
}

/// Returns the shards in a folder, sorted.
fn in_folder(folder: &Path) -> Result<Vec<Location>> {
    let is_shard = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with('.') && ENDINGS.iter().any(|ending| name.ends_with(ending))
    };
    let mut paths = files::list(folder)?;
    let deeper = paths.iter().filter(|path| path.is_dir());
    let deeper = deeper.filter_map(|path| files::list(path).ok()).flatten();
    let deeper = deeper.filter(|path| is_shard(path)).count();
    paths.retain(|path| is_shard(path) && path.is_file());
    let shown = folder.display();
    match (paths.is_empty(), deeper) {
        (false, _) => Ok(paths.into_iter().map(Location::File).collect()),
        (true, 0) => Err(Error::input(format!("no `.tar` files in folder `{shown}`"))
            .hint("for a folder of class folders, omit `shards:`")),
        (true, _) => Err(Error::input(format!(
            "no `.tar` files directly in folder `{shown}`, only in its subfolders"
        ))
        .hint(format!("did you mean `shards:{shown}/*/*.tar`?"))),
    }
}

fn check(paths: &[Location]) -> Result<()> {
    let missing: Vec<String> = paths
        .iter()
        .filter(|location| matches!(location, Location::File(path) if !path.is_file()))
        .map(|path| format!("`{path}`"))
        .collect();
    if !missing.is_empty() {
        let more = if missing.len() > 3 { ", ..." } else { "" };
        return Err(Error::input(format!(
            "{} of {} shards are missing or not files: {}{more}",
            missing.len(),
            paths.len(),
            missing[..missing.len().min(3)].join(", ")
        ))
        .hint("shards are tar files; narrow the range, or use `*` to match only existing files"));
    }
    match store::twice(paths) {
        None => Ok(()),
        Some(twice) => Err(Error::input(format!("`{twice}` is listed twice"))
            .hint("its samples would count twice; make sure that the patterns do not overlap")),
    }
}

pub(crate) fn split_outside_braces(pattern: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    pattern
        .split(|letter: char| {
            depth += i32::from(letter == '{') - i32::from(letter == '}');
            letter == ',' && depth <= 0
        })
        .collect()
}

/// Expands the braces of one part of a pattern. The last braces vary fastest.
pub(crate) fn braces(part: &str, pattern: &str) -> Result<Vec<String>> {
    let wrong = |what: String| Err(Error::input(format!("`{pattern}`: {what}")).hint(HINT));
    let mut names = vec![String::new()];
    let mut rest = part;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((inside, behind)) = after.split_once('}') else {
            return wrong("unclosed `{`".into());
        };
        if inside.contains('{') {
            return wrong("nested braces are not supported".into());
        }
        let choices = match inside.split_once("..") {
            Some((first, last)) => match range(first, last) {
                Some(choices) => choices,
                None => return wrong(format!("`{{{inside}}}` is not a range of integers")),
            },
            None if inside.contains(',') => inside.split(',').map(str::to_owned).collect(),
            None => return wrong(format!("`{{{inside}}}` is neither a range nor a list")),
        };
        if choices.len().saturating_mul(names.len()) > MOST_FILES {
            return wrong(format!("expands to more than {MOST_FILES} files"));
        }
        names = names
            .iter()
            .flat_map(|name| choices.iter().map(move |c| format!("{name}{before}{c}")))
            .collect();
        rest = behind;
    }
    if rest.contains('}') {
        return wrong("unmatched `}`".into());
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    Ok(names)
}

/// Returns `00000` to `00012`, padded with zeros to the width of the first.
fn range(first: &str, last: &str) -> Option<Vec<String>> {
    let whole = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let (from, to) = (whole(first)?, whole(last)?);
    let most = MOST_FILES as u64;
    // One more than allowed, so that the caller can detect that there are too many.
    let to = to.min(from.saturating_add(most));
    let width = first.len();
    (from <= to).then(|| (from..=to).map(|n| format!("{n:0width$}")).collect())
}

/// Returns the files that match a path with globs, sorted.
pub(crate) fn glob(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![PathBuf::new()];
    for part in path.components() {
        let part = part.as_os_str().to_string_lossy();
        let mut next = Vec::new();
        for folder in &found {
            if !is_glob(&part) {
                next.push(folder.join(&*part));
                continue;
            }
            let listed = match folder.as_os_str().is_empty() {
                true => Path::new("."),
                false => folder,
            };
            if !listed.is_dir() {
                continue;
            }
            for entry in files::list(listed)? {
                let name = entry.file_name().unwrap_or_default().to_string_lossy();
                // As in a shell, hidden files do not match.
                if !name.starts_with('.') && fits(part.as_bytes(), name.as_bytes()) {
                    next.push(folder.join(&*name));
                }
            }
        }
        found = next;
    }
    found.retain(|path| path.is_file());
    Ok(found)
}

pub(crate) fn is_glob(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(part: &str) -> Vec<String> {
        braces(part, part).unwrap()
    }

    #[test]
    fn ranges_keep_their_zeros_and_lists_multiply() {
        assert_eq!(names("a/{008..011}.tar").len(), 4);
        assert_eq!(names("{8..10}"), ["8", "9", "10"]);
        assert_eq!(
            names("{x,y}/{00..01}.tar"),
            ["x/00.tar", "x/01.tar", "y/00.tar", "y/01.tar"]
        );
        assert_eq!(split_outside_braces("a,{b,c}d,e"), ["a", "{b,c}d", "e"]);
    }

    #[test]
    fn invalid_patterns_are_explained() {
        let message = |text: &str| expand(text).unwrap_err().to_string();
        assert!(message("a{0..1.tar").contains("unclosed `{`"));
        assert!(message("a}0.tar").contains("unmatched `}`"));
        assert!(message("{a,{b,c}}.tar").contains("nested braces are not supported"));
        assert!(message("{b..a}.tar").contains("`{b..a}` is not a range of integers"));
        assert!(message("{5..1}.tar").contains("`{5..1}` is not a range"));
        assert!(message("{5}.tar").contains("neither a range nor a list"));
        assert!(message("{0..99999999999}.tar").contains("more than 1000000 files"));
        assert!(message("{0..9999}{0..9999}").contains("more than 1000000 files"));
        assert!(message("a.tar,,b.tar").contains("empty part between commas"));
        assert!(
            message("no/{0..5}.tar").contains("6 of 6 shards are missing or not files: `no/0.tar`")
        );
        assert!(message("no/*.tar").contains("no file matches `no/*.tar`"));
    }

    #[test]
    fn globs_match_existing_files_in_order_and_overlaps_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.tar", "a.tar", "ab.tar", "c.txt", ".h.tar"] {
            crate::files::write(&folder.path().join(name), b"").unwrap();
        }
        let root = folder.path().display();
        let found = |text: &str| -> Vec<String> {
            let paths = expand(text).unwrap().into_iter();
            paths
                .map(|path| path.to_string().rsplit('/').next().unwrap().to_owned())
                .collect()
        };
        assert_eq!(
            found(&format!("{root}/*.tar")),
            ["a.tar", "ab.tar", "b.tar"]
        );
        assert_eq!(found(&format!("{root}/?.tar")), ["a.tar", "b.tar"]);
        let twice = expand(&format!("{root}/a.tar,{root}/?.tar")).unwrap_err();
        assert!(twice.to_string().contains("is listed twice"), "{twice}");
    }

    #[test]
    fn a_set_matches_one_letter() {
        assert!(fits(b"[0-9]*.tar", b"7x.tar") && !fits(b"[0-9]*.tar", b"x7.tar"));
        assert!(fits(b"[!a-c]", b"d") && !fits(b"[!a-c]", b"b") && !fits(b"[^x]", b"x"));
        assert!(fits(b"[]]", b"]") && fits(b"[a-]", b"-") && fits(b"*[xy]*[z]", b"__y__z"));
        // An unclosed `[` is a literal.
        assert!(fits(b"[a", b"[a") && !fits(b"[a", b"a") && fits(b"[", b"["));
        assert!(!fits(&b"*[a]".repeat(100), &b"a".repeat(90)));
    }

    #[test]
    fn a_star_matches_any_letters_without_exponential_time() {
        assert!(fits(b"a*b*c", b"aXbYbZc"));
        assert!(!fits(b"a*b", b"abc"));
        assert!(fits(b"*", b"") && !fits(b"?", b""));
        assert!(!fits(&b"*a".repeat(100), &b"a".repeat(90)));
    }
}
