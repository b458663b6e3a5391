//! Images of bytes sent as they are, and MixUp and CutMix on the device.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Mixing;
use crate::values::Values;

/// Images of bytes as numbers in `[0, 1]`: `f32::from(byte) / 255.0` to the bit. They cross the bus as bytes.
pub fn images_of_bytes(gpu: &Gpu, bytes: &[u8]) -> Values {
    let sent = Values::send_bytes(gpu, bytes);
    // SAFETY: as many were just sent.
    unsafe { images_at(gpu, sent.at(), bytes.len()) }
}

/// The same of bytes that are on the GPU.
///
/// # Safety
///
/// There are as many bytes, aligned to 16.
pub(crate) unsafe fn images_at(gpu: &Gpu, bytes: u64, len: usize) -> Values {
    let to = Values::new(gpu, len, Kind::F32);
    let grid = [len.div_ceil(16 * 256).min(1 << 16), 1, 1];
    // SAFETY: there are as many bytes, by the caller's promise, and floats.
    unsafe { launch!(gpu, Mixing, "bytes_to_pixels", grid, 256, 0, &to, bytes, len as u64) };
    to
}

/// What the logits of mixed images should give: `rest` for every class, and `hot` times its share more for each of the
/// two classes of an image, which may be one.
///
/// Shapes: `first`, `second` and `share`, that of the first, `[images]`; the result `[images, classes]`.
///
/// # Panics
///
/// If the lengths differ, or a class is not below `classes`.
pub fn targets(gpu: &Gpu, [first, second]: [&[u32]; 2], share: &[f32], classes: usize, rest: f32, hot: f32) -> Values {
    assert!(first.len() == share.len() && second.len() == share.len(), "{} shares", share.len());
    let known = |class: &u32| usize::try_from(*class).is_ok_and(|class| class < classes);
    assert!(first.iter().chain(second).all(known), "a class is not below {classes}");
    let numbers = |classes: &[u32]| classes.iter().flat_map(|class| class.to_le_bytes()).collect::<Vec<_>>();
    let [first, second] = [first, second].map(|classes| Values::send_bytes(gpu, &numbers(classes)));
    let share = Values::send(gpu, share);
    let to = Values::new(gpu, share.len() * classes, Kind::F32);
    let grid = [to.len().div_ceil(1024).min(1 << 16), 1, 1];
    let (count, columns) = (to.len() as u64, classes as i32);
    // SAFETY: there is a class of each kind and a share for every row.
    unsafe {
        launch!(gpu, Mixing, "target_rows", grid, 256, 0, &to, &first, &second, &share, count, columns, rest, hot)
    };
    to
}

/// How an image is mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mix {
    /// Not at all.
    Alone,
    /// MixUp: `share` of the image and the rest of another of the batch.
    Blend {
        /// The other image.
        with: usize,
        /// Of this image.
        share: f32,
    },
    /// CutMix: a rectangle of another image of the batch.
    Cut {
        /// The other image.
        with: usize,
        /// The first column.
        left: usize,
        /// The column after the last.
        right: usize,
        /// The first line.
        top: usize,
        /// The line after the last.
        bottom: usize,
    },
}

/// Mixes every image of a batch with another, as it was before. An image that meets itself stays as it is.
///
/// Shapes: `images` and the result `[mixes, 3, size, size]` in f32.
///
/// # Panics
///
/// If the lengths do not match, or an image or rectangle is not there.
pub fn mix(images: &Values, size: usize, mixes: &[Mix]) -> Values {
    let right = (mixes.len() * 3 * size * size, Kind::F32);
    assert!((images.len(), images.kind()) == right, "the images are {images:?}, {} mixes of side {size}", mixes.len());
    assert!(i32::try_from(3 * size * size).is_ok(), "images of side {size}");
    let mut table = Vec::with_capacity(mixes.len() * 24);
    for (image, mix) in mixes.iter().enumerate() {
        let (with, [left, right, top, bottom], share) = match *mix {
            Mix::Alone => (image, [0; 4], 1.0),
            Mix::Blend { with, share } => (with, [0, size, 0, size], share),
            Mix::Cut { with, left, right, top, bottom } => (with, [left, right, top, bottom], 0.0),
        };
        assert!(with < mixes.len(), "image {image} is mixed with {with} of {}", mixes.len());
        let fits = left <= right && right <= size && top <= bottom && bottom <= size;
        assert!(fits, "{mix:?} of images of side {size}");
        let edges = if with == image { [0; 4] } else { [left, right, top, bottom] };
        table.extend((with as i32).to_le_bytes());
        table.extend(edges.iter().flat_map(|edge| (*edge as i32).to_le_bytes()));
        table.extend(share.to_le_bytes());
    }
    let gpu = images.gpu();
    let table = Values::send_bytes(gpu, &table);
    let to = Values::new(gpu, images.len(), Kind::F32);
    let grid = [(3 * size * size).div_ceil(4 * 256).max(1), mixes.len(), 1];
    // SAFETY: the lengths, images and rectangles were checked above.
    unsafe { launch!(gpu, Mixing, "mix_images", grid, 256, 0, &to, images, &table, size as i32) };
    to
}
