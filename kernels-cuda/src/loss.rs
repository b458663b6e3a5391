//! Cross entropy with its gradient, correct answers, and sums that stay on the device.

use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Loss;
use crate::values::Values;

/// The cross entropy of every row, and its gradient times `factor`.
///
/// Shapes: `logits` and `targets` `[rows, classes]` in f32, the losses `[rows]`, the gradient `[rows, classes]`.
///
/// # Panics
///
/// If the lengths do not match.
pub fn cross_entropy(logits: &Values, targets: &Values, classes: usize, factor: f32) -> (Values, Values) {
    let (rows, gpu) = (rows(logits, classes), logits.gpu());
    let [losses, slopes] = [rows, logits.len()].map(|len| Values::new(gpu, len, Kind::F32));
    run(logits, targets, classes, [Some(&losses), Some(&slopes)], None, factor);
    (losses, slopes)
}

/// The cross entropy of every row, without its gradient.
///
/// Shapes: `logits` and `targets` `[rows, classes]` in f32, the losses `[rows]`.
///
/// # Panics
///
/// If the lengths do not match.
pub fn cross_entropy_losses(logits: &Values, targets: &Values, classes: usize) -> Values {
    let losses = Values::new(logits.gpu(), rows(logits, classes), Kind::F32);
    run(logits, targets, classes, [Some(&losses), None], None, 1.0);
    losses
}

/// The gradient of the logits from that of every row's cross entropy.
///
/// Shapes: `logits`, `targets` and the result `[rows, classes]`, `d_losses` `[rows]`, all in f32.
///
/// # Panics
///
/// If the lengths do not match.
pub fn cross_entropy_gradient(logits: &Values, targets: &Values, classes: usize, d_losses: &Values) -> Values {
    let rows = rows(logits, classes);
    assert!((d_losses.len(), d_losses.kind()) == (rows, Kind::F32), "`d_losses` is {d_losses:?}, rows {rows}");
    let slopes = Values::new(logits.gpu(), logits.len(), Kind::F32);
    run(logits, targets, classes, [None, Some(&slopes)], Some(d_losses), 1.0);
    slopes
}

fn run(
    logits: &Values,
    targets: &Values,
    classes: usize,
    [losses, slopes]: [Option<&Values>; 2],
    upstream: Option<&Values>,
    factor: f32,
) {
    let (gpu, rows) = (logits.gpu(), rows(logits, classes));
    assert!(
        (targets.len(), targets.kind()) == (logits.len(), Kind::F32),
        "`targets` is {targets:?}, `logits` {logits:?}"
    );
    // SAFETY: the lengths were checked above and by the caller.
    unsafe {
        let scratch = 16 * 4;
        launch!(
            gpu,
            Loss,
            "cross_entropy",
            [rows, 1, 1],
            256,
            scratch,
            losses,
            slopes,
            logits,
            targets,
            upstream,
            classes as i32,
            factor
        );
    }
}

/// 1 for every row whose largest logit, the first of equals, is that of its label, else 0. A row with a logit that is
/// not a number is never right.
///
/// Shapes: `logits` `[rows, classes]`; `labels` and the result `[rows]`, all in f32.
///
/// # Panics
///
/// If the lengths do not match.
pub fn right(logits: &Values, labels: &Values, classes: usize) -> Values {
    let rows = rows(logits, classes);
    assert!((labels.len(), labels.kind()) == (rows, Kind::F32), "`labels` is {labels:?}, rows {rows}");
    let found = Values::new(logits.gpu(), rows, Kind::F32);
    // SAFETY: the lengths were checked above.
    unsafe { launch!(logits.gpu(), Loss, "right", [rows, 1, 1], 256, 512 * 4, &found, logits, labels, classes as i32) };
    found
}

/// The sum of all values, summed in f64 in a fixed order, as one f32.
///
/// # Panics
///
/// If the values are not f32.
pub fn total(values: &Values) -> Values {
    assert!(values.kind() == Kind::F32, "the total of {values:?}");
    let sum = Values::new(values.gpu(), 1, Kind::F32);
    // SAFETY: the kernel reads as many floats.
    unsafe { launch!(values.gpu(), Loss, "total", [1, 1, 1], 1024, 1024 * 8, &sum, values, values.len() as u64) };
    sum
}

fn rows(logits: &Values, classes: usize) -> usize {
    let whole = classes > 0 && logits.len().is_multiple_of(classes) && logits.kind() == Kind::F32;
    assert!(whole, "`logits` is {logits:?}, classes {classes}");
    logits.len() / classes
}
