//! The encoder block of training attacks in FP8: four products forward, four for the gradient of the input.
//!
//! Operands are e4m3 with a scale for each row, on both sides; results of products, the residual stream and attention
//! are bf16, sums, norms, softmax and GELU f32 inside. Norms, GELU and its gradient write e4m3 themselves; what
//! attention and the residual stream's gradient leave in bf16 is quantized in passes of its own. There are no gradients
//! of weights: attacks want none, so no operand is ever needed transposed but the weights, once an update.
//!
//! `src/ops/cpu/fp8.rs` of the program computes the same on the CPU.

use crate::attention::{self, AttentionSaved, attention};
use crate::block::{BlockShape, BlockWeights};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::launch;
use crate::machine::{Epilogue, Form, Kind, Operands, Product};
use crate::norm::NormSaved;
use crate::programs::Program;
use crate::rows::{Gelu, add, same_gpu};
use crate::values::Values;
use crate::vectors::swap_axes;

/// The longest row that stays in registers: four groups of eight numbers for each of 512 threads.
const WIDEST: usize = 16_384;

/// What the FP8 products of a GPU can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Support {
    /// Whether they add a bias; else a pass of its own does.
    bias: bool,
}

impl Gpu {
    /// Whether its products take e4m3 operands with a scale for each row. Tried once: cuBLASLt has them from 12.9 on,
    /// for Hopper alone.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn check_fp8(&self) -> Result<()> {
        self.fp8().map(|_| ())
    }

    fn fp8(&self) -> Result<Support> {
        let facts = self.facts();
        let (major, minor) = facts.capability;
        if (major, minor) != (9, 0) {
            return Err(Error::missing(format!(
                "FP8 products with a scale for each row need compute capability 9.0 (H100, H200), and {} has {major}.{minor}",
                facts.name
            )));
        }
        self.fp8_support(|| {
            let tried = self.try_fp8(Epilogue::Bias).map(|()| Support { bias: true });
            tried.or_else(|_| self.try_fp8(Epilogue::None).map(|()| Support { bias: false }))
        })
    }

    /// A small product on the device and on the host.
    fn try_fp8(&self, epilogue: Epilogue) -> Result<()> {
        let (rows, inner, columns) = (32, 64, 48);
        // Powers of two, which any scale leaves exact.
        let a: Vec<f32> = (0..rows * inner).map(|i| [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0][i * 5 % 7]).collect();
        let b: Vec<f32> = (0..columns * inner).map(|i| [-2.0, -1.0, 0.0, 1.0, 2.0][i * 7 % 5]).collect();
        let bias: Vec<f32> = (0..columns).map(|i| i as f32 - 20.0).collect();
        let [left, right] = [&a, &b].map(|rows| quantized(&Values::send(self, rows), inner));
        let bias8 = Values::send(self, &bias).cast(Kind::Bf16);
        let y = Values::new(self, rows * columns, Kind::Bf16);
        let bias_at = if epilogue == Epilogue::Bias { bias8.at() } else { 0 };
        let (product, operands) = (product(&left, &right, epilogue), operands(&left, &right, bias_at, &y));
        self.check()?;
        // SAFETY: all are allocated for these sizes.
        unsafe { self.machine().product(&product, &operands) }?;
        let found = y.to_vec()?;
        for (index, found) in found.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let terms = (0..inner).map(|k| a[row * inner + k] * b[column * inner + k]);
            let more = if epilogue == Epilogue::Bias { bias[column] } else { 0.0 };
            let right = terms.sum::<f32>() + more;
            // Rounded to bf16, and by sums of fewer bits than f32.
            if (found - right).abs() > 0.01 * right.abs().max(16.0) {
                return Err(Error::failed(format!("self-test: an FP8 product gives {found} in place of {right}"))
                    .hint("update NVIDIA's driver and libraries"));
            }
        }
        Ok(())
    }
}

/// Rows of e4m3 numbers and the factor of each.
#[derive(Clone, Debug)]
struct Rows8 {
    numbers: Values,
    scales: Values,
    width: usize,
}

impl Rows8 {
    /// Room for as many rows as `like` has.
    fn new(like: &Values, width: usize) -> Self {
        assert!(
            width > 0 && width.is_multiple_of(16) && width <= WIDEST && like.len().is_multiple_of(width),
            "{like:?} is not whole rows of {width}, a multiple of 16 up to {WIDEST}"
        );
        let numbers = Values::new(like.gpu(), like.len(), Kind::E4m3);
        let scales = Values::new(like.gpu(), like.len() / width, Kind::F32);
        Self { numbers, scales, width }
    }

    fn rows(&self) -> usize {
        self.scales.len()
    }

    /// Blocks, threads and shared memory of the kernels that make them.
    fn launch(&self) -> ([usize; 3], usize, usize) {
        let threads = self.width.div_ceil(4 * 8).next_multiple_of(32);
        ([self.rows().min(1 << 16), 1, 1], threads, threads / 32 * 2 * 4)
    }
}

/// Rows of f32 or bf16 in FP8.
fn quantized(x: &Values, width: usize) -> Rows8 {
    if let Some([numbers, scales]) = x.quantized().filter(|[_, scales]| scales.len() * width == x.len()) {
        return Rows8 { numbers: numbers.clone(), scales: scales.clone(), width };
    }
    let y = Rows8::new(x, width);
    let (grid, threads, shared) = y.launch();
    let name = format!("quantize_{}", x.kind().suffix());
    let (rows, columns) = (y.rows() as i32, width as i32);
    // SAFETY: `y` has room for the rows of `x` and their scales.
    unsafe { launch!(x.gpu(), Program::Fp8, &name, grid, threads, shared, &y.numbers, &y.scales, x, rows, columns) };
    y
}

/// The GELU of rows of bf16.
fn gelu(kind: Gelu, x: &Values, width: usize) -> Rows8 {
    let y = Rows8::new(x, width);
    let (grid, threads, shared) = y.launch();
    let (rows, columns) = (y.rows() as i32, width as i32);
    // SAFETY: as above; `x` is bf16, as products leave it.
    unsafe {
        launch!(
            x.gpu(),
            Program::Fp8,
            "gelu_e4m3",
            grid,
            threads,
            shared,
            &y.numbers,
            &y.scales,
            x,
            rows,
            columns,
            kind.number()
        )
    };
    y
}

/// `dy * gelu'(x)` of rows of bf16.
fn gelu_gradient(kind: Gelu, x: &Values, dy: &Values, width: usize) -> Rows8 {
    assert!(x.len() == dy.len(), "`x` is {x:?}, `dy` {dy:?}");
    let dx = Rows8::new(x, width);
    let (grid, threads, shared) = dx.launch();
    let (rows, columns) = (dx.rows() as i32, width as i32);
    // SAFETY: as above.
    unsafe {
        launch!(
            x.gpu(),
            Program::Fp8,
            "gelu_gradient_e4m3",
            grid,
            threads,
            shared,
            &dx.numbers,
            &dx.scales,
            x,
            dy,
            rows,
            columns,
            kind.number()
        )
    };
    dx
}

/// The layer norm of `x + branch`, and what its gradient needs.
fn normed(x: &Values, branch: Option<&Values>, [weight, bias]: &[Values; 2], eps: f32) -> (Rows8, NormSaved) {
    let (gpu, width) = (x.gpu(), weight.len());
    assert!(x.kind() == Kind::Bf16 && branch.is_none_or(|branch| (branch.len(), branch.kind()) == (x.len(), x.kind())));
    let y = Rows8::new(x, width);
    let sum = branch.map(|_| Values::new(gpu, x.len(), Kind::Bf16));
    let [mean, inverse] = [(); 2].map(|()| Values::new(gpu, y.rows(), Kind::F32));
    let (grid, threads, shared) = y.launch();
    // SAFETY: as above; there are statistics for every row.
    unsafe {
        launch!(
            gpu,
            Program::Fp8,
            "norm_e4m3",
            grid,
            threads,
            shared,
            &y.numbers,
            &y.scales,
            &mean,
            &inverse,
            sum.as_ref(),
            x,
            branch,
            weight,
            bias,
            y.rows() as i32,
            width as i32,
            eps
        )
    };
    (y, NormSaved::new(sum.unwrap_or_else(|| x.clone()), mean, inverse))
}

/// The gradient of a norm's input plus `residual`, in bf16 and with its form in FP8.
fn normed_gradient(saved: &NormSaved, weight: &Values, dy: &Values, residual: &Values) -> Values {
    let (gpu, width, x) = (dy.gpu(), weight.len(), &saved.x);
    for values in [x, dy, residual] {
        assert!((values.len(), values.kind()) == (x.len(), Kind::Bf16), "`x` is {x:?}, others {values:?}");
    }
    let dx = Values::new(gpu, x.len(), Kind::Bf16);
    let low = Rows8::new(&dx, width);
    let [mean, inverse] = saved.statistics();
    let (grid, threads, shared) = low.launch();
    let (rows, columns) = (low.rows() as i32, width as i32);
    // SAFETY: sizes were checked above; there are statistics for every row.
    unsafe {
        launch!(
            gpu,
            Program::Fp8,
            "norm_gradient_e4m3",
            grid,
            threads,
            shared,
            &low.numbers,
            &low.scales,
            &dx,
            dy,
            x,
            mean,
            inverse,
            weight,
            residual,
            rows,
            columns
        )
    };
    dx.with_quantized(low.numbers, low.scales)
}

/// The product of rows with the rows of a weight, in bf16.
fn product(a: &Rows8, b: &Rows8, epilogue: Epilogue) -> Product {
    assert!(a.width == b.width, "rows of {} and {}", a.width, b.width);
    Product {
        form: Form::Forward,
        rows: a.rows(),
        columns: b.rows(),
        inner: a.width,
        operands: Kind::E4m3,
        out: Kind::Bf16,
        tf32: false,
        add: false,
        epilogue,
    }
}

fn operands(a: &Rows8, b: &Rows8, bias: u64, y: &Values) -> Operands {
    Operands {
        a: a.numbers.at(),
        b: b.numbers.at(),
        d: y.at(),
        bias,
        scales: [a.scales.at(), b.scales.at()],
        ..Operands::default()
    }
}

fn multiply(a: &Rows8, b: &Rows8, bias: Option<&Values>) -> Values {
    let y = Values::new(a.numbers.gpu(), a.rows() * b.rows(), Kind::Bf16);
    let epilogue = if bias.is_some() { Epilogue::Bias } else { Epilogue::None };
    let (product, operands) = (product(a, b, epilogue), operands(a, b, bias.map_or(0, Values::at), &y));
    // SAFETY: all are allocated for these sizes.
    unsafe { y.gpu().product(&product, &operands) };
    y
}

/// A linear layer for both directions.
#[derive(Clone, Debug)]
struct Linear {
    /// `[out, in]`, a scale for each output.
    forward: Rows8,
    /// `[in, out]`, a scale for each input.
    backward: Rows8,
    /// In bf16 for products that add it, else in f32.
    bias: Values,
}

impl Linear {
    fn new(weight: &Values, bias: &Values, support: Support) -> Self {
        let outputs = bias.len();
        let inputs = weight.len() / outputs.max(1);
        assert!(weight.len() == inputs * outputs, "a weight of {} numbers for {outputs} outputs", weight.len());
        let transposed = swap_axes(weight, [outputs, inputs]);
        Self {
            forward: quantized(weight, inputs),
            backward: quantized(&transposed, outputs),
            bias: if support.bias { bias.cast(Kind::Bf16) } else { bias.clone() },
        }
    }

    /// `x W^T + b` in bf16.
    fn forward(&self, x: &Rows8) -> Values {
        if self.bias.kind() == Kind::Bf16 {
            return multiply(x, &self.forward, Some(&self.bias));
        }
        let y = multiply(x, &self.forward, None);
        let (grid, count, width) = ([y.len().div_ceil(2048), 1, 1], y.len() as u64, self.bias.len() as i32);
        // SAFETY: `y` is whole rows as long as the bias.
        unsafe { launch!(y.gpu(), Program::Fp8, "add_bias_bf16", grid, 256, 0, &y, &self.bias, count, width) };
        y
    }

    /// `dy W` in bf16.
    fn input_gradient(&self, dy: &Rows8) -> Values {
        multiply(dy, &self.backward, None)
    }
}

/// A layer and its operands, to be timed.
pub(crate) struct Timed {
    layer: Linear,
    x: Rows8,
    dy: Rows8,
}

impl Timed {
    pub(crate) fn new(gpu: &Gpu, rows: usize, outputs: usize, inputs: usize) -> Result<Self> {
        let filled = |width: usize| quantized(&Values::filled(gpu, rows * width, 0.5), width);
        let weight = Values::filled(gpu, outputs * inputs, 0.01);
        let bias = Values::zeros(gpu, outputs, Kind::F32);
        Ok(Self { layer: Linear::new(&weight, &bias, gpu.fp8()?), x: filled(inputs), dy: filled(outputs) })
    }

    pub(crate) fn forward(&self) {
        self.layer.forward(&self.x);
    }

    pub(crate) fn input_gradient(&self) {
        self.layer.input_gradient(&self.dy);
    }
}

/// The weights of a block in FP8, for attacks. Make it once per update.
#[derive(Clone, Debug)]
pub struct Fp8Block {
    norm1: [Values; 2],
    qkv: Linear,
    proj: Linear,
    norm2: [Values; 2],
    fc1: Linear,
    fc2: Linear,
}

impl Fp8Block {
    /// Quantizes the weights of a block.
    ///
    /// # Errors
    ///
    /// If the GPU has no such products.
    ///
    /// # Panics
    ///
    /// If the lengths do not match, or width or hidden is not a multiple of 16.
    pub fn new(weights: &BlockWeights) -> Result<Self> {
        let w = weights;
        w.sizes();
        let support = w.norm1_weight.gpu().fp8()?;
        Ok(Self {
            norm1: [w.norm1_weight.clone(), w.norm1_bias.clone()],
            qkv: Linear::new(&w.qkv_weight, &w.qkv_bias, support),
            proj: Linear::new(&w.proj_weight, &w.proj_bias, support),
            norm2: [w.norm2_weight.clone(), w.norm2_bias.clone()],
            fc1: Linear::new(&w.fc1_weight, &w.fc1_bias, support),
            fc2: Linear::new(&w.fc2_weight, &w.fc2_bias, support),
        })
    }
}

/// What the gradient of a block's input needs.
#[derive(Clone, Debug)]
pub struct Fp8Saved {
    hidden_width: usize,
    gelu: Gelu,
    norm1: NormSaved,
    attention: AttentionSaved,
    norm2: NormSaved,
    /// Before the GELU.
    hidden: Values,
}

impl Fp8Saved {
    /// Where it is.
    pub fn gpu(&self) -> &Gpu {
        self.hidden.gpu()
    }
}

/// Applies a block in evaluation mode.
///
/// Shapes: `x` `[batch, tokens, width]`, in any format; the result the same in bf16.
///
/// # Panics
///
/// If values have not the length that `shape` says, or the weights are of another shape.
pub fn fp8_block_forward(
    shape: BlockShape,
    weights: &Fp8Block,
    gelu_kind: Gelu,
    eps: f32,
    x: &Values,
) -> (Values, Fp8Saved) {
    let Fp8Block { norm1, qkv, proj, norm2, fc1, fc2 } = weights;
    let (found, right) = ((norm1[0].len(), fc1.forward.rows()), (shape.width, shape.hidden));
    assert!(found == right, "shape has (width, hidden) = {right:?}, the weights {found:?}");
    assert!(x.len() == shape.elements(), "`x` has {} elements, {shape:?} needs {}", x.len(), shape.elements());
    same_gpu(x.gpu(), &[&norm1[0]]);
    let x = x.cast(Kind::Bf16);
    let (normed1, norm1_saved) = normed(&x, None, norm1, eps);
    let (attended, attention_saved) = attention(shape.attention(), &qkv.forward(&normed1));
    let branch = proj.forward(&quantized(&attended, shape.width));
    let (normed2, norm2_saved) = normed(&x, Some(&branch), norm2, eps);
    drop((normed1, attended, branch));
    let hidden = fc1.forward(&normed2);
    let branch = fc2.forward(&gelu(gelu_kind, &hidden, shape.hidden));
    let y = add(&norm2_saved.x, &branch);
    let saved = Fp8Saved {
        hidden_width: shape.hidden,
        gelu: gelu_kind,
        norm1: norm1_saved,
        attention: attention_saved,
        norm2: norm2_saved,
        hidden,
    };
    (y, saved)
}

/// The gradient of a block's input from that of its output, in bf16.
///
/// # Panics
///
/// If `dy` does not have the length of the forward pass.
pub fn fp8_block_input_gradient(weights: &Fp8Block, saved: &Fp8Saved, dy: &Values) -> Values {
    let Fp8Block { norm1, qkv, proj, norm2, fc1, fc2 } = weights;
    let width = norm1[0].len();
    assert!(dy.len() == saved.norm1.x.len(), "`dy` is {dy:?}, the forward pass had {:?}", saved.norm1.x);
    let dy = dy.cast(Kind::Bf16);
    let d_activated = fc2.input_gradient(&quantized(&dy, width));
    let d_hidden = gelu_gradient(saved.gelu, &saved.hidden, &d_activated, saved.hidden_width);
    drop(d_activated);
    let d_normed2 = fc1.input_gradient(&d_hidden);
    drop(d_hidden);
    let dx1 = normed_gradient(&saved.norm2, &norm2[0], &d_normed2, &dy);
    drop(d_normed2);
    let d_attended = proj.input_gradient(&quantized(&dx1, width));
    let (d_qkv, _) = attention::gradient(&saved.attention, &d_attended, false);
    let d_normed1 = qkv.input_gradient(&quantized(&d_qkv, 3 * width));
    normed_gradient(&saved.norm1, &norm1[0], &d_normed1, &dx1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use advxl_kernels::{Fp8, round_rows};

    use super::*;

    fn gpu() -> Gpu {
        Gpu::soft(Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp").as_path())
    }

    /// Numbers of very different sizes, and a row of zeros.
    fn rows(count: usize, width: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * 10f32.powi((i * 31 % 7) as i32 - 4);
        (0..count * width).map(|i| if i / width == 1 { 0.0 } else { value(i) }).collect()
    }

    fn host(rows: &Rows8) -> Vec<f32> {
        let (numbers, scales) = (rows.numbers.to_vec().unwrap(), rows.scales.to_vec().unwrap());
        let rows = numbers.chunks(rows.width).zip(scales);
        rows.flat_map(|(row, scale)| row.iter().map(move |v| v * scale)).collect()
    }

    fn right(values: &[f32], width: usize) -> Vec<f32> {
        let mut to = vec![0.0; values.len()];
        round_rows(Fp8::E4m3, values, width, &mut to);
        to
    }

    #[test]
    fn rows_are_quantized_to_the_bits_of_the_cpu() {
        let gpu = gpu();
        // One number a thread, several, and rows longer than the threads of a block.
        for width in [16, 272, 8192] {
            let values = rows(5, width);
            let sent = Values::send(&gpu, &values);
            assert!(host(&quantized(&sent, width)) == right(&values, width), "{width}");
            let sent = sent.cast(Kind::Bf16);
            assert!(host(&quantized(&sent, width)) == right(&sent.to_vec().unwrap(), width), "{width} in bf16");
        }
    }

    #[test]
    fn norm_and_gelu_write_what_their_bf16_forms_compute() {
        let (gpu, width) = (gpu(), 272);
        let bf16 = |values: &[f32]| Values::send(&gpu, values).cast(Kind::Bf16);
        // In f32, so that only the rounding to e4m3 is between them.
        let f32_of = |values: &Values| values.cast(Kind::F32);
        let (x, dy) = (bf16(&rows(5, width)), bf16(&rows(5, width)));
        let near = |what: &str, found: &Rows8, exact: &Values| {
            // A value in the middle of two numbers may go either way.
            let (found, right) = (host(found), right(&exact.to_vec().unwrap(), width));
            let differ = found.iter().zip(&right).filter(|(a, b)| (*a - *b).abs() > 1e-6 * b.abs()).count();
            assert!(differ * 200 <= right.len(), "{what}: {differ} of {}", right.len());
        };
        for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            near("gelu", &gelu(kind, &x, width), &crate::gelu(kind, &f32_of(&x)));
            let (slopes, _) = crate::gelu_gradient(kind, &f32_of(&x), &f32_of(&dy), width, false);
            near("its gradient", &gelu_gradient(kind, &x, &dy, width), &slopes);
        }
        let parameters = [1.5f32, -0.25].map(|v| Values::send(&gpu, &vec![v; width]));
        let (found, saved) = normed(&x, Some(&dy), &parameters, 1e-6);
        let sum = add(&x, &dy);
        assert_eq!(saved.x.to_vec().unwrap(), sum.to_vec().unwrap());
        let (exact, _) = crate::layer_norm(&f32_of(&sum), &parameters[0], &parameters[1], 1e-6, Kind::F32);
        near("norm", &found, &exact);
        let (found, _) = normed(&sum, None, &parameters, 1e-6);
        near("norm without a branch", &found, &exact);
        let residual = bf16(&rows(5, width).into_iter().rev().collect::<Vec<_>>());
        let dx = normed_gradient(&saved, &parameters[0], &dy, &residual);
        let (exact, _) = crate::layer_norm_gradient(&saved, &parameters[0], &dy, Some(&residual), false);
        let (one, two) = (dx.to_vec().unwrap(), exact.to_vec().unwrap());
        let differ = one.iter().zip(&two).filter(|(a, b)| (*a - *b).abs() > 0.008 * b.abs().max(1e-6)).count();
        assert!(differ * 200 <= one.len(), "gradient of a norm: {differ} of {}", one.len());
        // What is multiplied is what is added to the stream.
        assert!(host(&quantized(&dx, width)) == right(&one, width));
        assert!(dx.quantized().is_some() && dx.part(0..width).quantized().is_none());
    }

    #[test]
    fn a_layer_gives_the_same_whether_its_product_adds_the_bias_or_not() {
        let (gpu, inputs, outputs) = (gpu(), 32, 48);
        gpu.check_fp8().unwrap();
        let weight = Values::send(&gpu, &rows(outputs, inputs));
        // Numbers that bf16 holds.
        let bias = Values::send(&gpu, &(0..outputs).map(|i| i as f32 - 20.0).collect::<Vec<_>>());
        let x = quantized(&Values::send(&gpu, &rows(7, inputs)), inputs);
        let found = [true, false].map(|bias_too| {
            let layer = Linear::new(&weight, &bias, Support { bias: bias_too });
            assert_eq!(host(&layer.backward).len(), inputs * outputs);
            layer.forward(&x).to_vec().unwrap()
        });
        // The second is rounded to bf16 before the bias comes, too.
        for (one, two) in found[0].iter().zip(&found[1]) {
            assert!((one - two).abs() <= 0.01 * one.abs().max(20.0), "{one} {two}");
        }
    }
}
