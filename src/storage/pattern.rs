//! Patterns that name many files: `{00000..41407}`, `{train,val}`, `*`, `?`, `[0-9]`, joined by commas or WebDataset's `::`.
//!
//! Files of ranges must all be there; globs take what they find. A folder stands for the shards in it, `~` for the user's
//! own. What begins as `s3://` is an address, whose globs
//! the store answers; whether the objects of ranges are there is seen when they are opened ([`crate::storage::store`]).

use std::path::{Path, PathBuf};

use super::glob::fits;
use super::store;
use super::store::Location;
use crate::error::{Error, Result};
use crate::files;

/// No data set has so many shards; a longer range is a slip of the keys.
const MOST_FILES: usize = 1_000_000;

const HINT: &str =
    "write patterns such as `data/{00000..00099}.tar`, `data/*.tar`, or several joined by commas";

/// How names of shards end.
const ENDINGS: [&str; 3] = [".tar", ".tar.gz", ".tgz"];

/// The files of a pattern, in the order in which it names them.
///
/// Errors: a broken pattern; files that are missing; nothing found; one file twice.
pub fn expand(pattern: &str) -> Result<Vec<Location>> {
    let mut paths = Vec::new();
    let joined = pattern.replace("::", ",");
    for part in split_outside_braces(&joined) {
        let part = part.trim();
        if part.starts_with("pipe:") {
            let message = format!("`{part}`: commands are not run");
            return Err(Error::input(message)
                .hint("name the shards themselves: paths, `s3://`, `gs://`, `https://`"));
        }
        if part.is_empty() {
            let message = format!("`{pattern}` has an empty part between its commas");
            return Err(Error::input(message).hint(HINT));
        }
        for name in braces(part, pattern)? {
            let found = match Location::of(&name)? {
                Location::Url(url) if url.ends_with('/') => store::list(&format!("{url}*.tar"))?,
                Location::Url(url) if is_glob(&url) => store::list(&url)?,
                Location::File(path) if path.is_dir() => in_folder(&path)?,
                // A file whose name holds such a letter is meant as it is.
                Location::File(path) if is_glob(&name) && !path.exists() => {
                    glob(&path)?.into_iter().map(Location::File).collect()
                }
                one => vec![one],
            };
            if found.is_empty() {
                let message = format!("no file fits `{name}`");
                return Err(Error::input(message).hint("check the folder and the pattern"));
            }
            paths.extend(found);
            if paths.len() > MOST_FILES {
                let message = format!("`{pattern}` names more than {MOST_FILES} files");
                return Err(Error::input(message).hint(HINT));
            }
        }
    }
    check(&paths)?;
    Ok(paths)
}

/// The shards in a folder, sorted.
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
        (true, 0) => Err(
            Error::input(format!("the folder `{shown}` holds no `.tar` files"))
                .hint("for a folder of class folders leave `shards:` out"),
        ),
        (true, _) => Err(Error::input(format!(
            "`{shown}` holds no `.tar` files itself, but its folders do"
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
            "{} of {} shards are missing or no files: {}{more}",
            missing.len(),
            paths.len(),
            missing[..missing.len().min(3)].join(", ")
        ))
        .hint("shards are tar files; narrow the range, or use `*` to take what is there"));
    }
    match store::twice(paths) {
        None => Ok(()),
        Some(twice) => Err(Error::input(format!("`{twice}` is named twice"))
            .hint("its samples would count double; let the patterns not overlap")),
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

/// All texts that a part with braces stands for; the last braces change fastest.
pub(crate) fn braces(part: &str, pattern: &str) -> Result<Vec<String>> {
    let wrong = |what: String| Err(Error::input(format!("`{pattern}`: {what}")).hint(HINT));
    let mut names = vec![String::new()];
    let mut rest = part;
    while let Some((before, after)) = rest.split_once('{') {
        let Some((inside, behind)) = after.split_once('}') else {
            return wrong("a `{` is not closed".into());
        };
        if inside.contains('{') {
            return wrong("braces within braces are not expanded".into());
        }
        let choices = match inside.split_once("..") {
            Some((first, last)) => match range(first, last) {
                Some(choices) => choices,
                None => return wrong(format!("`{{{inside}}}` is no range of whole numbers")),
            },
            None if inside.contains(',') => inside.split(',').map(str::to_owned).collect(),
            None => return wrong(format!("`{{{inside}}}` is neither a range nor a list")),
        };
        if choices.len().saturating_mul(names.len()) > MOST_FILES {
            return wrong(format!("these are more than {MOST_FILES} files"));
        }
        names = names
            .iter()
            .flat_map(|name| choices.iter().map(move |c| format!("{name}{before}{c}")))
            .collect();
        rest = behind;
    }
    if rest.contains('}') {
        return wrong("a `}` is not opened".into());
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    Ok(names)
}

/// `00000` to `00012`, padded with zeros to the length of the first.
fn range(first: &str, last: &str) -> Option<Vec<String>> {
    let whole = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let (from, to) = (whole(first)?, whole(last)?);
    let most = MOST_FILES as u64;
    // One more than allowed, so that the caller sees that there are too many.
    let to = to.min(from.saturating_add(most));
    let width = first.len();
    (from <= to).then(|| (from..=to).map(|n| format!("{n:0width$}")).collect())
}

/// Files that fit a path with `*` and `?`, sorted.
fn glob(path: &Path) -> Result<Vec<PathBuf>> {
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
                // As in a shell, hidden files are not meant.
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

fn is_glob(name: &str) -> bool {
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
    fn broken_patterns_are_explained() {
        let message = |text: &str| expand(text).unwrap_err().to_string();
        assert!(message("a{0..1.tar").contains("a `{` is not closed"));
        assert!(message("a}0.tar").contains("a `}` is not opened"));
        assert!(message("{a,{b,c}}.tar").contains("braces within braces"));
        assert!(message("{b..a}.tar").contains("`{b..a}` is no range of whole numbers"));
        assert!(message("{5..1}.tar").contains("is no range"));
        assert!(message("{5}.tar").contains("neither a range nor a list"));
        assert!(message("{0..99999999999}.tar").contains("more than 1000000 files"));
        assert!(message("{0..9999}{0..9999}").contains("more than 1000000 files"));
        assert!(message("a.tar,,b.tar").contains("an empty part"));
        assert!(
            message("no/{0..5}.tar").contains("6 of 6 shards are missing or no files: `no/0.tar`")
        );
        assert!(message("no/*.tar").contains("no file fits `no/*.tar`"));
    }

    #[test]
    fn globs_take_what_is_there_in_order_and_nothing_twice() {
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
        assert!(twice.to_string().contains("is named twice"), "{twice}");
    }

    #[test]
    fn sets_of_letters_fit_one_letter() {
        assert!(fits(b"[0-9]*.tar", b"7x.tar") && !fits(b"[0-9]*.tar", b"x7.tar"));
        assert!(fits(b"[!a-c]", b"d") && !fits(b"[!a-c]", b"b") && !fits(b"[^x]", b"x"));
        assert!(fits(b"[]]", b"]") && fits(b"[a-]", b"-") && fits(b"*[xy]*[z]", b"__y__z"));
        // What is not closed is a letter.
        assert!(fits(b"[a", b"[a") && !fits(b"[a", b"a") && fits(b"[", b"["));
        assert!(!fits(&b"*[a]".repeat(100), &b"a".repeat(90)));
    }

    #[test]
    fn a_star_fits_any_letters_and_takes_no_exponential_time() {
        assert!(fits(b"a*b*c", b"aXbYbZc"));
        assert!(!fits(b"a*b", b"abc"));
        assert!(fits(b"*", b"") && !fits(b"?", b""));
        assert!(!fits(&b"*a".repeat(100), &b"a".repeat(90)));
    }
}
