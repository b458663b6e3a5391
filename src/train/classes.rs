//! Classes by name: those of test images beside those of training, and those of a run beside those that it began with.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// Names that a message lists before it counts the others.
const SHOWN: usize = 5;

/// How two lists of class names differ, in words; `None` where they are equal.
///
/// Each list comes with what it is of, such as `the test images`.
pub(super) fn difference(
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
        true => "the same names in another order".to_owned(),
        false => parts.join("; "),
    })
}

/// For each class of the test images its number among the training classes; `None` where they are the same in the same
/// order. Test images may lack classes.
///
/// Errors: classes that no training image has.
pub(super) fn matched(train: &[String], test: &[String]) -> Result<Option<Vec<u32>>> {
    let Some(difference) = difference(("the train images", train), ("the test images", test))
    else {
        return Ok(None);
    };
    let numbers = numbered(train);
    let labels = test
        .iter()
        .map(|name| numbers.get(&name[..]).map(|at| *at as u32));
    match labels.collect::<Option<Vec<u32>>>() {
        Some(labels) => Ok(Some(labels)),
        None => {
            let message =
                format!("train and test images do not have the same classes: {difference}");
            Err(Error::input(message).hint(
                "test classes are matched to training classes by name: rename the class folders, or give the test \
                 images of the classes that are trained",
            ))
        }
    }
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
    fn test_classes_are_found_by_name_whatever_their_order_and_number() {
        let found = |train, test| matched(&names(train), &names(test));
        assert_eq!(found("a b c", "a b c").unwrap(), None);
        assert_eq!(found("a b c", "c a").unwrap(), Some(vec![2, 0]));
        assert_eq!(found("b a", "a b").unwrap(), Some(vec![1, 0]));
        let error = found("a b c", "A b C").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains(
                "do not have the same classes: only in the train images: `a`, `c`; only in the test images: `A`, `C`"
            ),
            "{error}"
        );
    }

    #[test]
    fn a_difference_names_a_few_and_counts_the_others() {
        let many: Vec<String> = (0..9).map(|number| number.to_string()).collect();
        let told = difference(("these", &many), ("those", &names("0 x"))).unwrap();
        assert_eq!(
            told,
            "only in these: `1`, `2`, `3`, `4`, `5` and 3 more; only in those: `x`"
        );
        let told = difference(("these", &names("a b")), ("those", &names("b a")));
        assert_eq!(told.unwrap(), "the same names in another order");
    }
}
