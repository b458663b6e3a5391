//! CLIP's contrastive loss of images and texts, and rows of length 1.

use crate::launch;
use crate::loss::total;
use crate::machine::{Epilogue, Form, Kind, Operands, Product};
use crate::programs::Program::Contrastive;
use crate::rows::{resized, same_gpu};
use crate::values::Values;

/// What [`unit_length_gradient`] needs of [`unit_length`].
#[derive(Clone, Debug)]
pub struct UnitSaved {
    width: usize,
    /// The result, and the lengths before.
    y: Values,
    lengths: Values,
}

/// Rows divided by their lengths, or by 1e-12 where they are shorter, as `torch.nn.functional.normalize`.
///
/// Shapes: `x` and the result `[rows, width]` in f32, of any width.
///
/// # Panics
///
/// If `x` is not whole rows, or not f32.
pub fn unit_length(x: &Values, width: usize) -> (Values, UnitSaved) {
    let rows = rows("x", x, width);
    let [y, lengths] = [x.len(), rows].map(|len| Values::new(x.gpu(), len, Kind::F32));
    let grid = [rows.div_ceil(8), 1, 1];
    // SAFETY: the lengths were checked above; there is a length a row.
    unsafe { launch!(x.gpu(), Contrastive, "unit_length", grid, 256, 0, &y, &lengths, x, rows as i32, width as i32) };
    (y.clone(), UnitSaved { width, y, lengths })
}

/// The gradient of [`unit_length`]'s input from that of its result.
///
/// # Panics
///
/// If `dy` has not the length or format of the forward pass.
pub fn unit_length_gradient(saved: &UnitSaved, dy: &Values) -> Values {
    assert!((dy.len(), dy.kind()) == (saved.y.len(), Kind::F32), "`dy` is {dy:?}, the result was {:?}", saved.y);
    of_longer_rows(saved, dy, saved.width)
}

/// The same for `dy` with rows of `stride` numbers; only the first of them count.
fn of_longer_rows(saved: &UnitSaved, dy: &Values, stride: usize) -> Values {
    let UnitSaved { width, y, lengths } = saved;
    let dx = Values::new(y.gpu(), y.len(), Kind::F32);
    let (rows, columns, stride) = (lengths.len(), *width as i32, stride as i32);
    let grid = [rows.div_ceil(8), 1, 1];
    let name = "unit_length_gradient";
    // SAFETY: the caller checked that `dy` has as many rows of `stride`.
    unsafe {
        launch!(y.gpu(), Contrastive, name, grid, 256, 0, &dx, dy, y, lengths, rows as i32, columns, stride);
    }
    dx
}

/// What [`contrastive_gradient`] needs of [`contrastive`]: among others the similarities of all images and texts, batch
/// squared floats, 4 GiB for a batch of 32,768.
#[derive(Clone, Debug)]
pub struct ContrastiveSaved {
    batch: usize,
    width: usize,
    images: UnitSaved,
    /// Rows of images, of length 1, and of texts, filled up to whole eights.
    units: Values,
    texts: Values,
    log_scale: Values,
    /// Before the scale.
    similar: Values,
    /// The logarithms of the sums of powers, over rows and over columns.
    log_sums: [Values; 2],
}

/// The symmetric contrastive loss of every image: half the cross entropy of finding its text among all texts, half that
/// of finding it among all images by its text. Similarities are multiplied by the exponential of `log_scale`.
///
/// Products are f32 (no TF32). Memory: one matrix of batch squared floats, which the gradient uses again.
///
/// Shapes: `images` `[batch, width]`, of any length; `texts` the same, of length 1; `log_scale` `[1]`; the losses `[batch]`;
/// all in f32, and of any width.
///
/// # Panics
///
/// If the lengths do not match.
pub fn contrastive(images: &Values, texts: &Values, log_scale: &Values, width: usize) -> (Values, ContrastiveSaved) {
    let batch = rows("images", images, width);
    assert!((texts.len(), texts.kind()) == (images.len(), Kind::F32), "`texts` is {texts:?}, `images` {images:?}");
    assert!((log_scale.len(), log_scale.kind()) == (1, Kind::F32), "`log_scale` is {log_scale:?}, not one number");
    let gpu = images.gpu();
    same_gpu(gpu, &[texts, log_scale]);
    let (units, images) = unit_length(images, width);
    let whole = width.next_multiple_of(8);
    let filled = |x: &Values| if whole == width { x.clone() } else { resized(x, width, whole, Kind::F32) };
    let (units, texts) = (filled(&units), filled(texts));
    let similar = Values::new(gpu, batch * batch, Kind::F32);
    let operands = Operands { a: units.at(), b: texts.at(), d: similar.at(), ..Operands::default() };
    // SAFETY: both have `batch` rows of `whole` floats.
    unsafe { gpu.product(&product(Form::Forward, batch, batch, whole), &operands) };

    // Blocks of 32 columns, and parts of them to fill a GPU: by the sizes alone, as the order of the sums.
    let across = batch.div_ceil(32).max(1);
    let count = (4224 / across).clamp(1, 64).min(batch.div_ceil(8)).max(1);
    let parts = Values::new(gpu, count * 2 * batch, Kind::F32);
    let [losses, of_rows, of_columns] = [(); 3].map(|()| Values::new(gpu, batch, Kind::F32));
    let n = batch as i32;
    // SAFETY: the lengths were checked above; every block leaves its part.
    unsafe {
        launch!(gpu, Contrastive, "contrastive_rows", [batch, 1, 1], 256, 8 * 4, &of_rows, &similar, log_scale, n);
        let grid = [across, count, 1];
        launch!(gpu, Contrastive, "contrastive_columns", grid, 256, 512 * 4, &parts, &similar, log_scale, n);
        launch!(
            gpu,
            Contrastive,
            "contrastive_losses",
            [batch.div_ceil(256), 1, 1],
            256,
            0,
            &losses,
            &of_columns,
            &parts,
            &of_rows,
            &similar,
            log_scale,
            n,
            count as i32
        );
    }
    let (log_scale, log_sums) = (log_scale.clone(), [of_rows, of_columns]);
    (losses, ContrastiveSaved { batch, width, images, units, texts, log_scale, similar, log_sums })
}

/// The gradients of [`contrastive`]'s images and, where they are wanted, of its texts and of `log_scale`, from that of
/// the losses. What was saved is used up: a clone of it costs a copy of the similarities.
///
/// Shapes: `d_losses` `[batch]` in f32; the results as the inputs.
///
/// # Panics
///
/// If `d_losses` has not a number an image.
pub fn contrastive_gradient(
    saved: ContrastiveSaved,
    d_losses: &Values,
    wanted_texts: bool,
) -> (Values, Option<(Values, Values)>) {
    let ContrastiveSaved { batch, width, images, units, texts, log_scale, mut similar, log_sums } = saved;
    assert!((d_losses.len(), d_losses.kind()) == (batch, Kind::F32), "`d_losses` is {d_losses:?}, images {batch}");
    let gpu = texts.gpu();
    same_gpu(gpu, &[d_losses]);
    let [of_rows, of_columns] = &log_sums;
    let parts = wanted_texts.then(|| Values::new(gpu, batch, Kind::F32));
    let slopes = similar.own();
    // SAFETY: the lengths were checked above and in the forward pass; the similarities are nobody else's.
    unsafe {
        launch!(
            gpu,
            Contrastive,
            "contrastive_gradient",
            [batch, 1, 1],
            256,
            8 * 4,
            slopes,
            parts.as_ref(),
            d_losses,
            of_rows,
            of_columns,
            &log_scale,
            batch as i32
        );
    }
    let whole = width.next_multiple_of(8);
    let times = |form: Form, rows: &Values| {
        let d = Values::new(gpu, rows.len(), Kind::F32);
        let operands = Operands { a: slopes.at(), b: rows.at(), d: d.at(), ..Operands::default() };
        // SAFETY: the slopes are `[batch, batch]`, the rows `[batch, whole]`.
        unsafe { gpu.product(&product(form, batch, whole, batch), &operands) };
        d
    };
    let d_images = of_longer_rows(&images, &times(Form::Input, &texts), whole);
    let others = parts.map(|parts| {
        let d_texts = times(Form::Weight, &units);
        let d_texts = if whole == width { d_texts } else { resized(&d_texts, whole, width, Kind::F32) };
        (d_texts, total(&parts))
    });
    (d_images, others)
}

fn product(form: Form, rows: usize, columns: usize, inner: usize) -> Product {
    let (operands, out) = (Kind::F32, Kind::F32);
    Product { form, rows, columns, inner, operands, out, tf32: false, add: false, epilogue: Epilogue::None }
}

fn rows(name: &str, x: &Values, width: usize) -> usize {
    let whole = x.kind() == Kind::F32 && width > 0 && x.len().is_multiple_of(width);
    assert!(whole, "`{name}` is {x:?}, not whole rows of {width} in f32");
    x.len() / width
}
