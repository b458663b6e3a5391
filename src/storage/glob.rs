//! Shell globs: `*`, `?`, `[0-9]`.

/// Returns whether a name matches a pattern of `*`, `?`, and sets such as `[0-9a]` or `[!x]`.
///
/// Backtracks to the last `*` only, so it never takes exponential time.
pub fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern[p..].first() {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some(_) if let Some(length) = fits_one(&pattern[p..], name[n]) => {
                p += length;
                n += 1;
                continue;
            }
            _ => {}
        }
        match &mut star {
            Some((place, taken)) => {
                *taken += 1;
                (p, n) = (*place + 1, *taken);
            }
            None => return false,
        }
    }
    pattern[p..].iter().all(|letter| *letter == b'*')
}

/// Returns the length of the first item of a pattern, if `letter` matches it.
pub(crate) fn fits_one(pattern: &[u8], letter: u8) -> Option<usize> {
    let set = pattern.strip_prefix(b"[").and_then(|inside| {
        let not = matches!(inside.first(), Some(b'!' | b'^'));
        let start = usize::from(not);
        // A `]` right at the start of a set is a member of it.
        let end = inside
            .iter()
            .skip(start + 1)
            .position(|byte| *byte == b']')?
            + start
            + 1;
        Some((not, &inside[start..end], end + 2))
    });
    match set {
        Some((not, letters, length)) => (in_set(letters, letter) != not).then_some(length),
        None => (matches!(pattern, [b'?', ..]) || pattern[0] == letter).then_some(1),
    }
}

/// Returns whether a letter is in a set, or in one of its ranges such as `a-z`.
pub(crate) fn in_set(mut letters: &[u8], letter: u8) -> bool {
    while let Some(first) = letters.first() {
        let (range, rest) = match letters {
            [first, b'-', last, rest @ ..] => (*first..=*last, rest),
            _ => (*first..=*first, &letters[1..]),
        };
        if range.contains(&letter) {
            return true;
        }
        letters = rest;
    }
    false
}
