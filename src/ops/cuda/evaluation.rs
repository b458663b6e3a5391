//! Pieces of evaluation attacks on images that stay on the GPU.

use advxl_cuda::evaluation as kernels;
use advxl_cuda::square::{self, Exchange, Motif, Patterns, Size, Window};
use advxl_cuda::{
    Gpu, Norm, Result, Transposed, UnitSaved, Values, fab, fail, matmul, pgd, times_rows,
    unit_length, unit_length_gradient,
};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{primitive, sent, tensor, values};
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::Streams;

/// Changes a copy of the images' values, in place if they are not shared.
fn changed(gpu: &Gpu, images: Tensor<4>, change: impl FnOnce(&mut Values)) -> Tensor<4> {
    let (shape, mut changed) = (images.dims(), values(gpu, &images));
    // The tensor holds on to the values, which could then not be changed in place.
    drop(images);
    change(&mut changed);
    tensor(changed, shape)
}

/// Numbers from the GPU; a failure ends the work (see [`advxl_cuda::fail`]).
fn read<T>(numbers: Result<T>) -> T {
    numbers.unwrap_or_else(|error| fail(error))
}

/// See [`crate::ops::replace_rows`].
pub(crate) fn replace_rows(
    gpu: &Gpu,
    images: Tensor<4>,
    others: &Tensor<4>,
    chosen: &[bool],
) -> Tensor<4> {
    let others = values(gpu, others);
    changed(gpu, images, |images| {
        kernels::replace_rows(images, &others, chosen);
    })
}

/// See [`crate::ops::put_rows`].
pub(crate) fn put_rows(
    gpu: &Gpu,
    images: Tensor<4>,
    rows: &[usize],
    others: &Tensor<4>,
) -> Tensor<4> {
    let (pixels, others) = (pixels(&images), values(gpu, others));
    changed(gpu, images, |images| {
        kernels::put_rows(images, pixels, rows, &others);
    })
}

fn pixels(images: &Tensor<4>) -> usize {
    images.dims()[1..].iter().product()
}

/// See [`crate::ops::add_clamped`].
pub(crate) fn add_clamped(gpu: &Gpu, x: &Tensor<4>, y: &Tensor<4>, factor: f32) -> Tensor<4> {
    let range = Some((0.0, 1.0));
    let sum = kernels::scaled_sum(&values(gpu, x), &values(gpu, y), factor, range);
    tensor(sum, x.dims())
}

/// See [`crate::ops::momentum`].
pub(crate) fn momentum(
    gpu: &Gpu,
    images: &Tensor<4>,
    ahead: &Tensor<4>,
    before: &Tensor<4>,
    share: f64,
) -> Tensor<4> {
    let [at, ahead, before] = [images, ahead, before].map(|images| values(gpu, images));
    tensor(
        kernels::momentum(&at, &ahead, &before, share),
        images.dims(),
    )
}

/// See [`crate::ops::finite`].
pub(crate) fn finite(gpu: &Gpu, gradient: Tensor<4>) -> Tensor<4> {
    changed(gpu, gradient, kernels::finite)
}

/// See [`crate::ops::changed_pixels`].
pub(crate) fn changed_pixels(gpu: &Gpu, images: &Tensor<4>, others: &Tensor<4>) -> Vec<usize> {
    let (x, others) = (values(gpu, images), values(gpu, others));
    let counts = read(kernels::changed_pixels(&x, &others, images.dims()[0]));
    counts.into_iter().map(|count| count as usize).collect()
}

/// See [`crate::ops::pull_back`].
pub(crate) fn pull_back(
    gpu: &Gpu,
    images: Tensor<4>,
    clean: &Tensor<4>,
    chosen: &[bool],
    share: f32,
) -> Tensor<4> {
    let clean = values(gpu, clean);
    changed(gpu, images, |images| {
        kernels::pull_back(images, &clean, chosen, share);
    })
}

/// See [`crate::ops::distances`].
pub(crate) fn distances(gpu: &Gpu, norm: Norm, images: &Tensor<4>, others: &Tensor<4>) -> Vec<f64> {
    let (x, others) = (values(gpu, images), values(gpu, others));
    read(kernels::distances(&x, &others, images.dims()[0], norm))
}

/// See [`crate::ops::dual_lengths`].
pub(crate) fn dual_lengths(gpu: &Gpu, norm: Norm, gradients: &Tensor<4>) -> Vec<f64> {
    let count = gradients.dims()[0];
    read(kernels::dual_lengths(&values(gpu, gradients), count, norm))
}

/// See [`crate::ops::predictions`].
pub(crate) fn predictions(gpu: &Gpu, logits: &Tensor<2>) -> Vec<u32> {
    let classes = logits.dims()[1];
    read(kernels::predictions(&values(gpu, logits), classes))
}

/// See [`crate::ops::fab_step`].
pub(crate) fn fab_step(
    gpu: &Gpu,
    norm: Norm,
    [at, clean, normal]: [&Tensor<4>; 3],
    differences: &[f64],
) -> Tensor<4> {
    let [clean, normal] = [clean, normal].map(|images| values(gpu, images));
    changed(gpu, at.clone(), |at| {
        fab::fab_step(norm, at, &clean, &normal, differences);
    })
}

/// See [`crate::ops::l1_step`].
pub(crate) fn l1_step(
    gpu: &Gpu,
    [images, gradient, center]: [&Tensor<4>; 3],
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let [gradient, center] = [gradient, center].map(|images| values(gpu, images));
    let steps = Values::send(gpu, steps);
    changed(gpu, images.clone(), |images| {
        pgd::l1_step(images, &gradient, &center, &steps, epsilon);
    })
}

/// See [`crate::ops::l1_sparse_step`].
pub(crate) fn l1_sparse_step(
    gpu: &Gpu,
    [images, gradient, center]: [&Tensor<4>; 3],
    steps: &[f32],
    shares: &[f64],
    epsilon: f64,
) -> Tensor<4> {
    let [gradient, center] = [gradient, center].map(|images| values(gpu, images));
    let steps = Values::send(gpu, steps);
    changed(gpu, images.clone(), |images| {
        pgd::l1_sparse_step(images, &gradient, &center, &steps, shares, epsilon);
    })
}

/// See [`crate::ops::l1_project`].
pub(crate) fn l1_project(
    gpu: &Gpu,
    images: &Tensor<4>,
    center: &Tensor<4>,
    epsilon: f64,
) -> Tensor<4> {
    let (count, center) = (images.dims()[0], values(gpu, center));
    changed(gpu, images.clone(), |images| {
        pgd::l1_project(images, &center, count, epsilon);
    })
}

/// See [`crate::ops::l1_start`] and [`crate::ops::surface_start`].
pub(crate) fn start(
    kernel: fn(&Values, &pgd::Draws, f64) -> Values,
    gpu: &Gpu,
    center: &Tensor<4>,
    streams: &Streams,
    epsilon: f64,
) -> Tensor<4> {
    let draws = super::pixels::draws(streams);
    tensor(kernel(&values(gpu, center), &draws, epsilon), center.dims())
}

/// See [`crate::ops::Squares`].
#[derive(Clone, Debug)]
pub(crate) struct Squares {
    gpu: Gpu,
    norm: Norm,
    epsilon: f64,
    /// Height and width.
    size: [usize; 2],
    patterns: Patterns,
}

impl Squares {
    pub(crate) fn new(
        gpu: Gpu,
        norm: Norm,
        epsilon: f64,
        size: [usize; 2],
        patterns: &[Vec<f32>],
    ) -> Self {
        let patterns = Patterns::new(&gpu, patterns);
        Self {
            gpu,
            norm,
            epsilon,
            size,
            patterns,
        }
    }

    fn size(&self, images: &Tensor<4>) -> Size {
        let [height, width] = self.size;
        Size {
            batch: images.dims()[0],
            height,
            width,
        }
    }

    pub(crate) fn stripes(&self, clean: &Tensor<4>, stripes: &[f32]) -> Tensor<4> {
        let images = values(&self.gpu, clean);
        let to = square::linf_start(&images, self.size(clean), stripes);
        tensor(to, clean.dims())
    }

    pub(crate) fn jumps(
        &self,
        best: &Tensor<4>,
        clean: &Tensor<4>,
        windows: &[(Window, [f32; 3])],
    ) -> Tensor<4> {
        let (size, shape) = (self.size(clean), clean.dims());
        let [best, clean] = [best, clean].map(|images| values(&self.gpu, images));
        let to = square::linf_change(&best, &clean, size, windows, self.epsilon as f32);
        tensor(to, shape)
    }

    pub(crate) fn tiles(&self, clean: &Tensor<4>, motifs: &[Motif]) -> Tensor<4> {
        let (size, images) = (self.size(clean), values(&self.gpu, clean));
        let (norm, patterns, epsilon) = (self.norm, &self.patterns, self.epsilon);
        let mut to = square::pattern_start(norm, &images, size, patterns, motifs, epsilon);
        self.project(&mut to, &images, size);
        tensor(to, clean.dims())
    }

    pub(crate) fn exchanges(
        &self,
        best: &Tensor<4>,
        clean: &Tensor<4>,
        exchanges: &[Exchange],
    ) -> Tensor<4> {
        let (size, shape) = (self.size(clean), clean.dims());
        let [best, clean] = [best, clean].map(|images| values(&self.gpu, images));
        let (norm, patterns, epsilon) = (self.norm, &self.patterns, self.epsilon);
        let mut to =
            square::pattern_change(norm, &best, &clean, size, patterns, exchanges, epsilon);
        self.project(&mut to, &clean, size);
        tensor(to, shape)
    }

    /// Into the l1 ball, which the kernels of patterns leave to a step of its own.
    fn project(&self, images: &mut Values, clean: &Values, size: Size) {
        if self.norm == Norm::L1 {
            pgd::l1_project(images, clean, size.batch, self.epsilon);
        }
    }
}

/// Numbers above this have squares that overflow in a sum of as many as embeddings have dimensions.
const LARGEST_SQUARED: f64 = 1e16;

/// See [`crate::ops::logits_by_text`].
pub(crate) fn logits_by_text(
    gpu: &Gpu,
    outputs: &Tensor<2>,
    head: &Tensor<2>,
    factor: f64,
) -> Tensor<2> {
    let ([rows, width], [classes, _]) = (outputs.dims(), head.dims());
    let parents = parents::<Flex, 2>(outputs, []);
    let (x, head) = (values(gpu, outputs), values(gpu, head));
    record(parents, |_| {
        // The dual norm of l1 is the largest.
        let largest = read(kernels::dual_lengths(&x, rows, Norm::L1));
        let large = |largest: &f64| *largest > LARGEST_SQUARED;
        let shrink = largest.iter().any(large).then(|| {
            let factor = |largest: &f64| if large(largest) { 1.0 / largest } else { 1.0 };
            let factors: Vec<f32> = largest.iter().map(|l| factor(l) as f32).collect();
            Values::send(gpu, &factors)
        });
        let x = match &shrink {
            Some(factors) => times_rows(&x, factors),
            None => x,
        };
        let (units, saved) = unit_length(&x, width);
        let similar = matmul(&units, &head, Transposed::Second, [rows, width, classes]);
        let scale = Values::filled(gpu, rows, factor as f32);
        let logits = primitive(times_rows(&similar, &scale), &[rows, classes]);
        let saved = TextGradient {
            head,
            scale,
            saved,
            shrink,
            sizes: [rows, classes, width],
        };
        (logits, saved)
    })
}

#[derive(Clone, Debug)]
struct TextGradient {
    head: Values,
    /// The factor of the similarities, once a row.
    scale: Values,
    saved: UnitSaved,
    /// What rows were multiplied with whose squares would overflow.
    shrink: Option<Values>,
    /// Rows, classes and width.
    sizes: [usize; 3],
}

impl Differentiable for TextGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let [rows, classes, width] = self.sizes;
        let dy = times_rows(&sent(self.head.gpu(), &dy), &self.scale);
        let sizes = [rows, classes, width];
        let d_units = matmul(&dy, &self.head, Transposed::Neither, sizes);
        let dx = unit_length_gradient(&self.saved, &d_units);
        let dx = match &self.shrink {
            Some(factors) => times_rows(&dx, factors),
            None => dx,
        };
        vec![Some(primitive(dx, &[rows, width]))]
    }
}
