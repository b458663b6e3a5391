//! The operations of evaluation attacks: what each computes, and which engine runs it.
//!
//! Those that are the mathematics of one attack exist here for NVIDIA GPUs only and are `None` elsewhere: the attack
//! then computes them on the host. What crosses to the host are numbers of each image, never pixels.

use advxl_cuda::Norm;
pub use advxl_cuda::square::{Exchange, Motif, Window};
use burn::tensor::Tensor;

use super::engine::Engine;
use super::spec::Streams;
use super::{cpu, cuda, plain};

/// The images, with those of `others` in the rows that are `chosen`.
///
/// Shapes: `images` and `others` `[chosen, 3, height, width]`.
pub fn replace_rows(images: Tensor<4>, others: &Tensor<4>, chosen: &[bool]) -> Tensor<4> {
    if !chosen.contains(&true) {
        return images;
    }
    if !chosen.contains(&false) {
        return others.clone();
    }
    match Engine::of(&images) {
        Engine::Cuda(gpu) => cuda::evaluation::replace_rows(&gpu, images, others, chosen),
        Engine::Cpu => cpu::replace_rows(images, others, chosen),
        Engine::Burn => plain::replace_rows(images, others, chosen),
    }
}

/// The images, with image i of `others` in row `rows[i]`.
///
/// Shapes: `images` `[batch, 3, height, width]`; `others` `[rows, 3, height, width]`; no row twice.
pub fn put_rows(images: Tensor<4>, rows: &[usize], others: Tensor<4>) -> Tensor<4> {
    if rows.is_empty() {
        return images;
    }
    if rows.len() == images.dims()[0] && rows.is_sorted() {
        return others;
    }
    match Engine::of(&images) {
        Engine::Cuda(gpu) => cuda::evaluation::put_rows(&gpu, images, rows, &others),
        _ => plain::put_rows(images, rows, others),
    }
}

/// `x + factor * y`, clipped to [0, 1].
pub fn add_clamped(x: Tensor<4>, y: Tensor<4>, factor: f32) -> Tensor<4> {
    match Engine::of(&x) {
        Engine::Cuda(gpu) => cuda::evaluation::add_clamped(&gpu, &x, &y, factor),
        _ => (x + y * factor).clamp(0.0, 1.0),
    }
}

/// `images + (ahead - images) * share + (images - before) * (1 - share)`.
///
/// Source: Croce and Hein 2020 (arXiv:2003.01690), algorithm 1, line 7, before the projection.
pub fn momentum(images: &Tensor<4>, ahead: Tensor<4>, before: &Tensor<4>, share: f64) -> Tensor<4> {
    match Engine::of(images) {
        Engine::Cuda(gpu) => cuda::evaluation::momentum(&gpu, images, &ahead, before, share),
        Engine::Cpu => cpu::momentum(images, ahead, before, share),
        Engine::Burn => plain::momentum(images, ahead, before, share),
    }
}

/// A gradient without numbers that no step can be made with: 0 for NaN, the largest number for what is
/// infinite.
pub fn finite(gradient: Tensor<4>) -> Tensor<4> {
    match Engine::of(&gradient) {
        Engine::Cuda(gpu) => cuda::evaluation::finite(&gpu, gradient),
        _ => plain::finite(gradient),
    }
}

/// How many values of each image differ from those of the other.
///
/// Shapes: the result `[batch]`.
pub fn changed_pixels(images: &Tensor<4>, others: &Tensor<4>) -> Vec<usize> {
    match Engine::of(images) {
        Engine::Cuda(gpu) => cuda::evaluation::changed_pixels(&gpu, images, others),
        _ => plain::changed_pixels(images, others),
    }
}

/// `clean + (images - clean) * share` for the images that are `chosen`.
///
/// Shapes: `images` and `clean` `[chosen, 3, height, width]`.
pub fn pull_back(images: Tensor<4>, clean: &Tensor<4>, chosen: &[bool], share: f32) -> Tensor<4> {
    if !chosen.contains(&true) {
        return images;
    }
    match Engine::of(&images) {
        Engine::Cuda(gpu) => cuda::evaluation::pull_back(&gpu, images, clean, chosen, share),
        _ => plain::pull_back(images, clean, chosen, share),
    }
}

/// How far each image is from the other in a norm, measured on the device.
///
/// `None` where the host does it. Shapes: the result `[batch]`.
pub fn distances(norm: Norm, images: &Tensor<4>, others: &Tensor<4>) -> Option<Vec<f64>> {
    let gpu = Engine::of(images).gpu()?;
    Some(cuda::evaluation::distances(&gpu, norm, images, others))
}

/// The length of each gradient in the dual norm, measured on the device.
///
/// `None` where the host does it. Shapes: the result `[batch]`.
pub fn dual_lengths(norm: Norm, gradients: &Tensor<4>) -> Option<Vec<f64>> {
    let gpu = Engine::of(gradients).gpu()?;
    Some(cuda::evaluation::dual_lengths(&gpu, norm, gradients))
}

/// A step of the fast adaptive boundary attack on the device: each image to the boundary of the linear decision at
/// `at`, a little from `clean`.
///
/// `None` where the host computes it. Shapes: `differences` `[batch]`.
pub fn fab_step(
    norm: Norm,
    at: &Tensor<4>,
    clean: &Tensor<4>,
    normal: &Tensor<4>,
    differences: &[f64],
) -> Option<Tensor<4>> {
    let gpu = Engine::of(at).gpu()?;
    Some(cuda::evaluation::fab_step(
        &gpu,
        norm,
        [at, clean, normal],
        differences,
    ))
}

/// A step in the l1 ball on the device: equal moves on the steepest hundredth of the pixels that still can move, then
/// the projection.
///
/// `None` where the host computes it. Shapes: `steps` `[batch]`.
pub fn l1_step(
    images: &Tensor<4>,
    gradient: &Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Option<Tensor<4>> {
    let gpu = small(images)?;
    Some(cuda::evaluation::l1_step(
        &gpu,
        [images, gradient, center],
        steps,
        epsilon,
    ))
}

/// The same on the steepest share of the pixels, a share of its own for each image.
///
/// `None` where the host computes it. Shapes: `steps` and `shares` `[batch]`.
pub fn l1_sparse_step(
    images: &Tensor<4>,
    gradient: &Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    shares: &[f64],
    epsilon: f64,
) -> Option<Tensor<4>> {
    let gpu = small(images)?;
    Some(cuda::evaluation::l1_sparse_step(
        &gpu,
        [images, gradient, center],
        steps,
        shares,
        epsilon,
    ))
}

/// The nearest images in the l1 balls around others, found on the device.
///
/// `None` where the host finds them.
pub fn l1_project(images: &Tensor<4>, center: &Tensor<4>, epsilon: f64) -> Option<Tensor<4>> {
    let gpu = Engine::of(images).gpu()?;
    Some(cuda::evaluation::l1_project(&gpu, images, center, epsilon))
}

/// The GPU that steps in the l1 ball on images of this size: its kernels count pixels in f32.
fn small(images: &Tensor<4>) -> Option<advxl_cuda::Gpu> {
    let pixels: usize = images.dims()[1..].iter().product();
    Engine::of(images).gpu().filter(|_| pixels < 1 << 24)
}

/// Points of the l1 balls around images along Laplace noise, at lengths uniform in `[0, epsilon]`, clipped to [0, 1],
/// drawn on the device.
///
/// `None` where the host draws them. The numbers are those of the host's streams up to the last places.
pub fn l1_start(center: &Tensor<4>, streams: &Streams, epsilon: f64) -> Option<Tensor<4>> {
    let gpu = Engine::of(center).gpu()?;
    let kernel = advxl_cuda::pgd::l1_start;
    Some(cuda::evaluation::start(
        kernel, &gpu, center, streams, epsilon,
    ))
}

/// Points on the surfaces of the balls around images, projected to them and to [0, 1], drawn on the device.
///
/// `None` where the host draws them. The numbers are those of the host's streams up to the last places.
pub fn surface_start(
    norm: Norm,
    center: &Tensor<4>,
    streams: &Streams,
    epsilon: f64,
) -> Option<Tensor<4>> {
    use advxl_cuda::pgd::{l1_surface, l2_surface, linf_surface};
    let gpu = Engine::of(center).gpu()?;
    Some(match norm {
        Norm::Linf => cuda::start(linf_surface, &gpu, center, streams, epsilon),
        Norm::L2 => cuda::start(l2_surface, &gpu, center, streams, epsilon),
        Norm::L1 => cuda::evaluation::start(l1_surface, &gpu, center, streams, epsilon),
    })
}

/// The Square attack's queries on an NVIDIA GPU. Random numbers are the host's.
#[derive(Clone, Debug)]
pub struct Squares(cuda::evaluation::Squares);

impl Squares {
    /// For images of three channels on an NVIDIA GPU; `None` where the host makes the queries.
    ///
    /// `patterns` are square and lying, one of each side that queries have; none are needed for linf.
    pub fn on_device(
        images: &Tensor<4>,
        norm: Norm,
        epsilon: f64,
        patterns: impl FnOnce() -> Vec<Vec<f32>>,
    ) -> Option<Self> {
        let gpu = Engine::of(images).gpu()?;
        let [_, channels, height, width] = images.dims();
        (channels == 3).then(|| {
            let patterns = match norm {
                Norm::Linf => Vec::new(),
                Norm::L2 | Norm::L1 => patterns(),
            };
            let size = [height, width];
            Self(cuda::evaluation::Squares::new(
                gpu, norm, epsilon, size, &patterns,
            ))
        })
    }

    /// linf: the first query, vertical stripes.
    ///
    /// Shapes: `stripes` `[batch, 3, width]`.
    pub fn stripes(&self, clean: &Tensor<4>, stripes: &[f32]) -> Tensor<4> {
        self.0.stripes(clean, stripes)
    }

    /// linf: the best images with one square each moved by a jump a channel.
    pub fn jumps(
        &self,
        best: &Tensor<4>,
        clean: &Tensor<4>,
        windows: &[(Window, [f32; 3])],
    ) -> Tensor<4> {
        self.0.jumps(best, clean, windows)
    }

    /// l2 and l1: the first query, a grid of patterns.
    pub fn tiles(&self, clean: &Tensor<4>, motifs: &[Motif]) -> Tensor<4> {
        self.0.tiles(clean, motifs)
    }

    /// l2 and l1: the best images, with the changes of two squares put into the first of them.
    pub fn exchanges(
        &self,
        best: &Tensor<4>,
        clean: &Tensor<4>,
        exchanges: &[Exchange],
    ) -> Tensor<4> {
        self.0.exchanges(best, clean, exchanges)
    }
}

/// Similarities of embeddings, of any length, and those of classes, times a factor.
///
/// `None` where these are operations of their own. Shapes: `outputs` `[batch, width]`; `head` `[classes, width]`, rows of
/// length 1, not differentiated; the result `[batch, classes]`.
pub fn logits_by_text(outputs: &Tensor<2>, head: &Tensor<2>, factor: f64) -> Option<Tensor<2>> {
    let gpu = Engine::of_both(outputs, head).gpu()?;
    Some(cuda::evaluation::logits_by_text(
        &gpu, outputs, head, factor,
    ))
}
