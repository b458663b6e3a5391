//! Describes differences between class lists, for messages.
//!
//! Labels are matched to classes in [`crate::data::classes`].

use std::collections::HashMap;

/// Maximum number of names listed in a message; the rest are counted.
const SHOWN: usize = 5;

/// Describes how two lists of class names differ; `None` if they are equal.
///
/// Each list comes with a label for the message, such as `the test images`.
pub(crate) fn difference(
    (one, of_one): (&str, &[String]),
    (other, of_other): (&str, &[String]),
) -> Option<String> {
    if of_one == of_other {
        return None;
    }
    let only = |who: &str, own: &[String], others: &[String]| {
        let others: HashMap<&str, usize> = numbered(others);
        let mut names = own.iter().filter(|name| !others.contains_key(&name[..]));
        let first: Vec<_> = names
            .by_ref()
            .take(SHOWN)
            .map(|name| format!("`{name}`"))
            .collect();
        let more = match names.count() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!first.is_empty()).then(|| format!("only in {who}: {}{more}", first.join(", ")))
    };
    let parts = [only(one, of_one, of_other), only(other, of_other, of_one)];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    Some(match parts.is_empty() {
        true => "the same names in a different order".to_owned(),
        false => parts.join("; "),
    })
}

fn numbered(names: &[String]) -> HashMap<&str, usize> {
    names
        .iter()
        .enumerate()
        .map(|(at, name)| (&name[..], at))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_difference_lists_the_first_names_and_counts_the_rest() {
        let many: Vec<String> = (0..9).map(|number| number.to_string()).collect();
        let text = difference(("these", &many), ("those", &names("0 x"))).unwrap();
        assert_eq!(
            text,
            "only in these: `1`, `2`, `3`, `4`, `5` and 3 more; only in those: `x`"
        );
        let text = difference(("these", &names("a b")), ("those", &names("b a")));
        assert_eq!(text.unwrap(), "the same names in a different order");
    }
}
