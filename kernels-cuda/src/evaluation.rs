//! Pieces of evaluation attacks on batches of images: choosing and replacing images, APGD's momentum, distances, and
//! what logits decide. Decisions about each image are the host's: vectors of one entry an image go up, numbers come
//! down.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Evaluation;
use crate::rows::{blocks_for, same_gpu};
use crate::values::Values;

/// A norm of perturbations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Norm {
    /// The largest change.
    Linf,
    /// The Euclidean length.
    L2,
    /// The sum of the absolute changes.
    L1,
}

impl Norm {
    /// The norm that measures gradients where this one measures perturbations.
    pub fn dual(self) -> Self {
        match self {
            Self::Linf => Self::L1,
            Self::L2 => Self::L2,
            Self::L1 => Self::Linf,
        }
    }

    /// As the kernels have it.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Linf => 0,
            Self::L2 => 1,
            Self::L1 => 2,
        }
    }
}

/// The rows of `x` that `rows` names, in that order; a row may be named more than once.
///
/// Shapes: `x` `[.., row_len]` in f32, the result `[rows, row_len]`.
///
/// # Panics
///
/// If `x` is not whole rows, or a row is not there.
pub fn select_rows(x: &Values, row_len: usize, rows: &[usize]) -> Values {
    let count = whole_rows(x, row_len);
    if rows.len() == count && rows.iter().enumerate().all(|(at, row)| at == *row) {
        return x.clone();
    }
    let from = table(x.gpu(), count, rows);
    let to = Values::new(x.gpu(), rows.len() * row_len, Kind::F32);
    copy_rows(&to, x, [None, Some(&from)], rows.len(), row_len);
    to
}

/// Replaces the rows of `x` that are chosen by those of `others`.
///
/// Shapes: `x` and `others` `[chosen, ..]` in f32.
///
/// # Panics
///
/// If the lengths do not match.
pub fn replace_rows(x: &mut Values, others: &Values, chosen: &[bool]) {
    same(x, &[others]);
    let row_len = row_len(x, chosen.len());
    if !chosen.contains(&true) {
        return;
    }
    if !chosen.contains(&false) {
        *x = others.clone();
        return;
    }
    let rows: Vec<usize> = (0..chosen.len()).filter(|row| chosen[*row]).collect();
    let which = table(x.gpu(), chosen.len(), &rows);
    copy_rows(x.own(), others, [Some(&which); 2], rows.len(), row_len);
}

/// Writes row i of `others` to row `rows[i]` of `x`.
///
/// Shapes: `x` `[.., row_len]`, `others` `[rows, row_len]`, both in f32.
///
/// # Panics
///
/// If the lengths do not match, or a row is not there or named twice.
pub fn put_rows(x: &mut Values, row_len: usize, rows: &[usize], others: &Values) {
    let count = whole_rows(x, row_len);
    same_gpu(x.gpu(), &[others]);
    let right = (rows.len() * row_len, Kind::F32);
    assert!((others.len(), others.kind()) == right, "`others` is {others:?}, {} rows of {row_len}", rows.len());
    let mut is_named = vec![false; count];
    for row in rows {
        assert!(*row < count && !is_named[*row], "row {row} of {count}, which may be named once");
        is_named[*row] = true;
    }
    if rows.is_empty() {
        return;
    }
    let to = table(x.gpu(), count, rows);
    copy_rows(x.own(), others, [Some(&to), None], rows.len(), row_len);
}

/// Where in `to` rows go, and which of `from` they are; without a table in order.
fn copy_rows(to: &Values, from: &Values, [to_rows, from_rows]: [Option<&Values>; 2], rows: usize, row_len: usize) {
    let grid = [row_len.div_ceil(8 * 256).clamp(1, 256), rows.min(1 << 15), 1];
    // SAFETY: the callers' tables name rows that are there, of `row_len` numbers; `to` is nobody else's.
    unsafe {
        launch!(
            to.gpu(),
            Evaluation,
            "copy_rows",
            grid,
            256,
            0,
            to,
            from,
            to_rows,
            from_rows,
            rows as i32,
            row_len as u64
        );
    }
}

/// One list after another.
///
/// # Panics
///
/// If there are no parts, or they differ in format or are on several GPUs.
pub fn join(parts: &[&Values]) -> Values {
    let [first, rest @ ..] = parts else { panic!("no parts to join") };
    if rest.is_empty() {
        return (*first).clone();
    }
    same_gpu(first.gpu(), rest);
    let all = Values::new(first.gpu(), parts.iter().map(|part| part.len()).sum(), first.kind());
    let mut done = 0;
    for part in parts {
        assert!(part.kind() == first.kind(), "{part:?} after {first:?}");
        // SAFETY: `all` is new and has room for the parts one after another.
        unsafe { all.gpu().copy(part.at(), all.at() + done, part.bytes()) };
        done += part.bytes() as u64;
    }
    all
}

/// `x` to `[low, high]`. What is NaN stays NaN.
///
/// # Panics
///
/// If `x` is not f32.
pub fn clamp(x: &Values, low: f32, high: f32) -> Values {
    sum(x, None, 0.0, low, high)
}

/// `x + factor * y`, then to `[low, high]` where there is a range.
///
/// # Panics
///
/// If they differ in length or are not f32.
pub fn scaled_sum(x: &Values, y: &Values, factor: f32, range: Option<(f32, f32)>) -> Values {
    let (low, high) = range.unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    sum(x, Some(y), factor, low, high)
}

fn sum(x: &Values, y: Option<&Values>, factor: f32, low: f32, high: f32) -> Values {
    same(x, y.as_slice());
    let to = Values::new(x.gpu(), x.len(), Kind::F32);
    let grid = blocks_for(x.len());
    // SAFETY: all have as many floats.
    unsafe { launch!(x.gpu(), Evaluation, "scaled_sum", grid, 256, 0, &to, x, y, x.len() as u64, factor, low, high) };
    to
}

/// APGD's step with momentum: `images + (ahead - images) * share + (images - before) * (1 - share)`, before it is
/// projected.
///
/// # Panics
///
/// If they differ in length or are not f32.
pub fn momentum(images: &Values, ahead: &Values, before: &Values, share: f64) -> Values {
    same(images, &[ahead, before]);
    let to = Values::new(images.gpu(), images.len(), Kind::F32);
    let (grid, count) = (blocks_for(images.len()), images.len() as u64);
    let (share, rest) = (share as f32, (1.0 - share) as f32);
    // SAFETY: all have as many floats.
    unsafe {
        launch!(images.gpu(), Evaluation, "momentum", grid, 256, 0, &to, images, ahead, before, count, share, rest)
    };
    to
}

/// Sets what is not a number to 0 and what is infinite to the largest number of its sign.
///
/// # Panics
///
/// If the values are not f32.
pub fn finite(x: &mut Values) {
    same(x, &[]);
    let x = x.own();
    // SAFETY: the kernel changes as many floats; they are nobody else's.
    unsafe { launch!(x.gpu(), Evaluation, "finite_values", blocks_for(x.len()), 256, 0, x, x.len() as u64) };
}

/// `at = clean + (at - clean) * share` for the images that are chosen: FAB's way back from beyond the boundary.
///
/// Shapes: `at` and `clean` `[chosen, ..]` in f32.
///
/// # Panics
///
/// If the lengths do not match.
pub fn pull_back(at: &mut Values, clean: &Values, chosen: &[bool], share: f32) {
    same(at, &[clean]);
    let pixels = row_len(at, chosen.len());
    let rows: Vec<usize> = (0..chosen.len()).filter(|row| chosen[*row]).collect();
    if rows.is_empty() {
        return;
    }
    let which = table(at.gpu(), chosen.len(), &rows);
    let at = at.own();
    let grid = [pixels.div_ceil(256).clamp(1, 64), rows.len().min(1 << 15), 1];
    let (rows, pixels) = (rows.len() as i32, pixels as i32);
    // SAFETY: the table names images that are there; `at` is nobody else's.
    unsafe { launch!(at.gpu(), Evaluation, "pull_back", grid, 256, 0, at, clean, &which, rows, share, pixels) };
}

/// How many values of each image differ from those of the other.
///
/// Shapes: `x` and `other` `[images, ..]` in f32.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If the lengths do not match.
pub fn changed_pixels(x: &Values, other: &Values, images: usize) -> Result<Vec<u32>> {
    same(x, &[other]);
    let pixels = row_len(x, images) as i32;
    let counts = Values::new(x.gpu(), images, Kind::F32); // Numbers of four bytes.
    let grid = [images, 1, 1];
    // SAFETY: the lengths were checked above; there is a number an image.
    unsafe { launch!(x.gpu(), Evaluation, "changed_pixels", grid, 512, 512 * 8, &counts, x, other, pixels) };
    Ok(counts.to_bytes()?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
}

/// How far each image is from the other, summed in f64 in a fixed order.
///
/// Shapes: `x` and `other` `[images, ..]` in f32.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If the lengths do not match.
pub fn distances(x: &Values, other: &Values, images: usize, norm: Norm) -> Result<Vec<f64>> {
    lengths(x, Some(other), images, norm)
}

/// The length of each gradient in the dual norm: how much a move of length 1 in the norm changes the value.
///
/// Shapes: `gradients` `[images, ..]` in f32.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If the gradients are not whole images in f32.
pub fn dual_lengths(gradients: &Values, images: usize, norm: Norm) -> Result<Vec<f64>> {
    lengths(gradients, None, images, norm.dual())
}

fn lengths(x: &Values, other: Option<&Values>, images: usize, norm: Norm) -> Result<Vec<f64>> {
    same(x, other.as_slice());
    let pixels = row_len(x, images) as i32;
    let found = Values::new(x.gpu(), 2 * images, Kind::F32); // Two words a double.
    let grid = [images, 1, 1];
    // SAFETY: the lengths were checked above; there is a double an image.
    unsafe { launch!(x.gpu(), Evaluation, "lengths", grid, 512, 512 * 8, &found, x, other, norm.number(), pixels) };
    Ok(found.to_bytes()?.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
}

/// What a classifier says about an image, given its label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Whether all logits are finite and the largest, the first of equals, is the label's.
    pub is_right: bool,
    /// The label's logit less the largest of the others: minus infinity where a logit is not finite or the label is
    /// none of the classes, infinity for a single class.
    pub margin: f64,
}

/// The class of each row's largest logit, the first of equals; of a row with logits that are not numbers the first of
/// these.
///
/// Shapes: `logits` `[rows, classes]` in f32.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If `logits` are not whole rows in f32.
pub fn predictions(logits: &Values, classes: usize) -> Result<Vec<u32>> {
    let rows = whole_rows(logits, classes);
    Ok(decisions(logits, None, rows, classes)?.into_iter().map(|[class, ..]| class).collect())
}

/// Of each row whether its label is right, and by what margin.
///
/// Shapes: `logits` `[labels, classes]` in f32.
///
/// # Errors
///
/// The first failure since the GPU was opened.
///
/// # Panics
///
/// If the lengths do not match.
pub fn verdicts(logits: &Values, labels: &[u32], classes: usize) -> Result<Vec<Verdict>> {
    let rows = whole_rows(logits, classes);
    assert!(rows == labels.len(), "`logits` has {rows} rows, `labels` {}", labels.len());
    let bytes: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
    let sent = Values::send_bytes(logits.gpu(), &bytes);
    let verdict = |([class, finite, own, rival], label): ([u32; 4], &u32)| {
        let answers = finite == 1 && (*label as usize) < classes;
        let [own, rival] = [own, rival].map(|bits| f64::from(f32::from_bits(bits)));
        Verdict { is_right: answers && class == *label, margin: if answers { own - rival } else { f64::NEG_INFINITY } }
    };
    Ok(decisions(logits, Some(&sent), rows, classes)?.into_iter().zip(labels).map(verdict).collect())
}

/// Class of the largest logit, whether all are finite, and the bits of the label's logit and of the largest other.
fn decisions(logits: &Values, labels: Option<&Values>, rows: usize, classes: usize) -> Result<Vec<[u32; 4]>> {
    let found = Values::new(logits.gpu(), 4 * rows, Kind::F32);
    let grid = [rows, 1, 1];
    // SAFETY: there are `rows` rows of `classes` floats, a label for each where there are labels, and four words for
    // each.
    unsafe {
        launch!(logits.gpu(), Evaluation, "decisions", grid, 256, 1024 * 4, &found, logits, labels, classes as i32)
    };
    let words: Vec<u32> = found.to_bytes()?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    Ok(words.as_chunks().0.to_vec())
}

/// The rows of a list as a table for kernels.
fn table(gpu: &Gpu, count: usize, rows: &[usize]) -> Values {
    for row in rows {
        assert!(*row < count, "row {row} of {count}");
    }
    let bytes: Vec<u8> = rows.iter().flat_map(|row| (*row as i32).to_le_bytes()).collect();
    Values::send_bytes(gpu, &bytes)
}

/// Panics unless all are f32 of one length on one GPU.
pub(crate) fn same(x: &Values, others: &[&Values]) {
    assert!(x.kind() == Kind::F32, "{x:?} is not f32");
    same_gpu(x.gpu(), others);
    for other in others {
        assert!((other.len(), other.kind()) == (x.len(), Kind::F32), "{other:?} with {x:?}");
    }
}

fn whole_rows(x: &Values, row_len: usize) -> usize {
    let whole = row_len > 0 && x.len().is_multiple_of(row_len) && x.kind() == Kind::F32;
    assert!(whole, "{x:?} is not whole rows of {row_len} in f32");
    x.len() / row_len
}

/// The length of a row where there are `rows`.
pub(crate) fn row_len(x: &Values, rows: usize) -> usize {
    let len = x.len() / rows.max(1);
    assert!(len * rows == x.len() && x.kind() == Kind::F32, "{x:?} is not {rows} whole rows in f32");
    assert!(i32::try_from(len).is_ok(), "a row of {len} numbers");
    len
}
