//! Rows of pixels that evaluation attacks move around, and APGD's momentum, each in one pass over memory.

use advxl_kernels::Floats;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::flex::{from_floats, primitive, slice};

/// Values below which another thread takes longer to wake than the work.
const ALONE: usize = 1 << 18;

/// See [`crate::ops::select`].
pub(crate) fn select<const D: usize>(x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let mut shape = x.dims();
    let width: usize = shape[1..].iter().product();
    let x = primitive(x);
    let values = slice(&x);
    let mut selected = Floats::new(rows.len() * width);
    for_rows(&mut selected, width, |row, out| {
        out.copy_from_slice(&values[rows[row] * width..][..width]);
    });
    shape[0] = rows.len();
    Tensor::from_primitive::<Flex>(from_floats(selected, &shape))
}

/// See [`crate::ops::replace_rows`].
pub(crate) fn replace_rows(images: Tensor<4>, others: &Tensor<4>, chosen: &[bool]) -> Tensor<4> {
    let width: usize = images.dims()[1..].iter().product();
    let others = primitive(others.clone());
    let others = slice(&others);
    let mut images: FlexTensor = primitive(images);
    for_rows(images.storage_mut(), width, |row, image| {
        if chosen[row] {
            image.copy_from_slice(&others[row * width..][..width]);
        }
    });
    Tensor::from_primitive::<Flex>(images)
}

/// See [`crate::ops::momentum`].
pub(crate) fn momentum(
    images: &Tensor<4>,
    ahead: Tensor<4>,
    before: &Tensor<4>,
    share: f64,
) -> Tensor<4> {
    let width: usize = images.dims()[1..].iter().product();
    let [images, before] = [images, before].map(|tensor| primitive(tensor.clone()));
    let (images, before) = (slice(&images), slice(&before));
    let (new, last) = (share as f32, (1.0 - share) as f32);
    let mut ahead: FlexTensor = primitive(ahead);
    for_rows(ahead.storage_mut(), width, |row, ahead| {
        let of_row = row * width..(row + 1) * width;
        let pairs = images[of_row.clone()].iter().zip(&before[of_row]);
        for (ahead, (image, before)) in ahead.iter_mut().zip(pairs) {
            *ahead = image + (*ahead - image) * new + (image - before) * last;
        }
    });
    Tensor::from_primitive::<Flex>(ahead)
}

/// Works on each row, in parallel where that is faster.
fn for_rows(values: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    match values.len() < ALONE {
        true => values
            .chunks_exact_mut(width)
            .enumerate()
            .for_each(|(row, values)| work(row, values)),
        false => values
            .par_chunks_exact_mut(width)
            .enumerate()
            .for_each(|(row, values)| work(row, values)),
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::device::Device;
    use crate::ops::plain;
    use crate::ops::tensor::{from_vec, to_vec};
    use crate::rng::{Rng, Stream};

    use super::*;

    #[test]
    fn rows_and_momentum_are_those_of_the_definitions_to_the_bit() {
        let mut rng = Rng::new(3, Stream::Bench);
        // Small ones, and ones that several threads share.
        for (count, side) in [(5, 4), (6, 128)] {
            let mut images = || {
                let values = (0..count * 3 * side * side)
                    .map(|_| rng.uniform())
                    .collect();
                from_vec::<4>(values, [count, 3, side, side], &Device::cpu())
            };
            let [a, b, c] = [images(), images(), images()];
            let rows = [3, 0, 3, 4];
            assert_eq!(
                to_vec(select(a.clone(), &rows)),
                to_vec(plain::select(a.clone(), &rows))
            );
            let chosen: Vec<bool> = (0..count).map(|row| row % 2 == 0).collect();
            assert_eq!(
                to_vec(replace_rows(a.clone(), &b, &chosen)),
                to_vec(plain::replace_rows(a.clone(), &b, &chosen))
            );
            assert_eq!(
                to_vec(momentum(&a, b.clone(), &c, 0.75)),
                to_vec(plain::momentum(&a, b.clone(), &c, 0.75))
            );
        }
    }
}
