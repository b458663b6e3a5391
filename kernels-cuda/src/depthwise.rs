//! Depthwise convolution of channels-last images: one square kernel a channel, stride 1, zeros around the image, output
//! of the same size.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program;
use crate::rows::{check_eights, same_gpu, sum_of_parts};
use crate::values::Values;

/// Sizes of a depthwise convolution and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthwiseShape {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel, a multiple of 8.
    pub channels: usize,
    /// Pixels on a side of the kernel: odd, at most 11. Half of it, rounded down, is the padding.
    pub kernel: usize,
}

/// The largest kernel whose sums stay in registers.
const LARGEST: usize = 11;

/// Lines of a tile, as in the source.
const LINES: usize = 2;

/// The most channels that a block takes, as in the source.
const CHANNELS: usize = 64;

/// Threads of a block.
const THREADS: usize = 256;

impl DepthwiseShape {
    /// Elements of the input, `[batch, height, width, channels]`.
    pub fn elements(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Compiles, or loads from the cache, the kernels that this shape needs.
    ///
    /// # Errors
    ///
    /// If the compiler is missing or fails.
    pub fn prepare(&self, gpu: &Gpu) -> crate::Result<()> {
        gpu.prepare(&self.programs())
    }

    pub(crate) fn programs(&self) -> [Program; 3] {
        [Program::Conv, self.program(), Program::Rows]
    }

    fn program(&self) -> Program {
        Program::Depthwise { kernel: self.kernel, columns: self.columns() }
    }

    /// Columns of a tile: the line divided evenly into tiles of at most eight, and a few numbers only, so that images
    /// of several sizes share a program.
    fn columns(&self) -> usize {
        match self.width.div_ceil(self.width.div_ceil(8).max(1)) {
            ..=4 => 4,
            5 | 6 => 6,
            more => more,
        }
    }

    /// Pairs of channels that a block takes: a power of two.
    fn pairs(&self) -> usize {
        1 << (self.channels / 2).trailing_zeros().min((CHANNELS / 2).trailing_zeros())
    }

    /// Blocks along the channels.
    fn chunks(&self) -> usize {
        self.channels / (2 * self.pairs())
    }

    /// Tiles of `lines` lines in all images.
    fn tiles(&self, lines: usize) -> usize {
        let tiles = self.batch * self.height.div_ceil(lines) * self.width.div_ceil(self.columns());
        assert!(tiles < 1 << 30 && self.width * self.channels < 1 << 30, "{self:?} is too large for one launch");
        tiles
    }

    /// Where the kernels find images, channels and pairs.
    fn sizes(&self) -> [i32; 5] {
        [self.batch, self.height, self.width, self.channels, self.pairs()].map(|size| size as i32)
    }

    fn check(&self, tensors: &[(&str, &Values)]) {
        check_eights("a pixel", self.channels);
        check_kernel(self.kernel);
        for (name, values) in tensors {
            let right = self.elements();
            assert!(values.len() == right, "`{name}` has {} elements, {self:?} needs {right}", values.len());
        }
    }
}

fn check_kernel(kernel: usize) {
    assert!(kernel % 2 == 1, "kernel = {kernel} must be odd");
    assert!(kernel <= LARGEST, "kernel = {kernel}; the GPU's depthwise kernels take up to {LARGEST}");
}

/// The weights of a depthwise convolution, as the kernels of both directions read them. Make it once per update.
#[derive(Clone, Debug)]
pub struct Depthwise {
    channels: usize,
    kernel: usize,
    /// `[kernel * kernel, channels]`.
    forward: Values,
    /// The same of the kernels turned around.
    backward: Values,
    bias: Values,
}

impl Depthwise {
    /// Prepares kernels as torch keeps them, `[channels, 1, kernel, kernel]`, and a bias `[channels]`, both f32.
    ///
    /// # Panics
    ///
    /// If the kernel's size is even or above 11, the channels are not a multiple of 8, or the weight has not the length
    /// that bias and kernel say.
    pub fn new(weight: &Values, bias: &Values, kernel: usize) -> Self {
        let (gpu, channels, taps) = (weight.gpu(), bias.len(), kernel * kernel);
        check_kernel(kernel);
        check_eights("a pixel", channels);
        same_gpu(gpu, &[bias]);
        assert!((weight.kind(), bias.kind()) == (Kind::F32, Kind::F32), "`weight` is {weight:?}, `bias` {bias:?}");
        let right = channels * taps;
        assert!(weight.len() == right, "`weight` has {} elements, {channels} channels need {right}", weight.len());
        let [forward, backward] = [(); 2].map(|()| Values::new(gpu, right, Kind::F32));
        let grid = [right.div_ceil(256), 1, 1];
        let (name, c, t) = ("depthwise_weights", channels as i32, taps as i32);
        // SAFETY: all have `channels * taps` numbers.
        unsafe { launch!(gpu, Program::Conv, name, grid, 256, 0, &forward, &backward, weight, c, t) };
        Self { channels, kernel, forward, backward, bias: bias.clone() }
    }

    fn check(&self, shape: &DepthwiseShape) {
        let (found, prepared) = ((shape.channels, shape.kernel), (self.channels, self.kernel));
        assert!(found == prepared, "shape has (channels, kernel) = {found:?}, the weights {prepared:?}");
    }
}

/// `y = convolution(x) + bias`, in `kind`. Sums are f32.
///
/// Shapes: `x` and `y` `[batch, height, width, channels]`.
///
/// # Panics
///
/// If `x` has a length that does not match `shape`, or `weights` are of another shape.
pub fn depthwise(shape: DepthwiseShape, weights: &Depthwise, x: &Values, kind: Kind) -> Values {
    weights.check(&shape);
    shape.check(&[("x", x)]);
    convolve(shape, &weights.forward, Some(&weights.bias), x, None, kind)
}

/// The gradient of the input from that of the output, in `kind`; added to `residual`, which is in `kind` too, where
/// there is one.
///
/// # Panics
///
/// If a tensor has a length that does not match `shape`, or `weights` are of another shape.
pub fn depthwise_input_gradient(
    shape: DepthwiseShape,
    weights: &Depthwise,
    dy: &Values,
    residual: Option<&Values>,
    kind: Kind,
) -> Values {
    weights.check(&shape);
    shape.check(&[("dy", dy), ("residual", residual.unwrap_or(dy))]);
    assert!(residual.is_none_or(|residual| residual.kind() == kind), "`residual` is {residual:?}, wanted is {kind:?}");
    convolve(shape, &weights.backward, None, dy, residual, kind)
}

fn convolve(
    shape: DepthwiseShape,
    weights: &Values,
    bias: Option<&Values>,
    x: &Values,
    residual: Option<&Values>,
    kind: Kind,
) -> Values {
    let gpu = x.gpu();
    same_gpu(gpu, &[weights, residual.unwrap_or(x)]);
    let y = Values::new(gpu, x.len(), kind);
    let DepthwiseShape { kernel, .. } = shape;
    let name = format!("depthwise_{kernel}_{}_{}_{}", shape.columns(), x.kind().suffix(), kind.suffix());
    // Several blocks for every place on the GPU, and tiles enough in each that its weights are loaded for many.
    let most = (16 * gpu.facts().multiprocessors / shape.chunks().max(1)).max(1);
    let grid = [shape.tiles(LINES).div_ceil(THREADS / shape.pairs()).min(most), shape.chunks(), 1];
    let shared = CHANNELS * kernel * kernel * 4;
    let [batch, height, width, channels, pairs] = shape.sizes();
    // SAFETY: the lengths were checked by the callers, the weights are `[kernel * kernel, channels]`.
    unsafe {
        launch!(
            gpu,
            shape.program(),
            &name,
            grid,
            THREADS,
            shared,
            &y,
            x,
            weights,
            bias,
            residual,
            batch,
            height,
            width,
            channels,
            pairs
        );
    }
    y
}

/// The gradients of weight, `[channels, 1, kernel, kernel]`, and bias, in f32.
///
/// # Panics
///
/// If a tensor has a length that does not match `shape`, or `x` is in bf16 and `dy` is not.
pub fn depthwise_weight_gradient(shape: DepthwiseShape, x: &Values, dy: &Values) -> (Values, Values) {
    shape.check(&[("x", x), ("dy", dy)]);
    let gpu = x.gpu();
    same_gpu(gpu, &[dy]);
    assert!((x.kind(), dy.kind()) != (Kind::Bf16, Kind::F32), "`x` is {x:?}, `dy` {dy:?}");
    let DepthwiseShape { channels, kernel, .. } = shape;
    let (weights, row) = (channels * kernel * kernel, channels * (kernel * kernel + 1));
    // Four blocks for every multiprocessor of an H100, on every GPU: the number of partial sums decides how they round.
    // Each with a few tiles for every thread at least.
    let tiles = shape.tiles(1);
    let count = (528 / shape.chunks().max(1)).clamp(1, tiles.div_ceil(4 * THREADS / shape.pairs()).max(1));
    let parts = Values::new(gpu, count * row, Kind::F32);
    let name = format!("depthwise_weight_{kernel}_{}_{}_{}", shape.columns(), x.kind().suffix(), dy.kind().suffix());
    let shared = 2 * shape.pairs() * (kernel * kernel + 1) * 4;
    let [batch, height, width, _, pairs] = shape.sizes();
    // SAFETY: the lengths were checked above; every block leaves its part.
    unsafe {
        launch!(
            gpu,
            shape.program(),
            &name,
            [count, shape.chunks(), 1],
            THREADS,
            shared,
            &parts,
            x,
            dy,
            batch,
            height,
            width,
            channels as i32,
            pairs
        );
    }
    let sums = sum_of_parts(&parts, count, row);
    (sums.part(0..weights), sums.part(weights..row))
}
