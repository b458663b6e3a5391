//! The MLP of a block with the norm before it, `y + s * fc2(gelu(fc1(norm(x))))`, on the rows of one chunk.

use crate::attention::{ToCells, ToF32};
use crate::buffer::{Buffer, as_f32, as_f32_mut};
use crate::cells::{Element, padded};
use crate::factors::{Factors, NormSums, column_sums, factors};
use crate::gelu::{Gelu, value_and_slope};
use crate::gemm::{Epilogue, Left, product};
use crate::lanes::{LANES, Lanes, chunk};
use crate::linear::{Linear, Norm};
use crate::norm;

/// Which gradients will be asked for after a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: nothing is saved.
    Nothing,
    /// That of the input alone, as attacks do: only what it needs is saved.
    Input,
    /// Those of the input and of the weights.
    Weights,
}

/// The packed weights.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) norm: Norm,
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
}

/// What the backward pass needs, as rows of cells.
#[derive(Debug)]
pub(crate) struct MlpSaved {
    normalized: Buffer,
    inverse_deviation: Vec<f32>,
    /// The hidden layer before its GELU for the gradients of the weights, the GELU's slope there for that of
    /// the input alone.
    hidden: Buffer,
}

impl MlpSaved {
    /// For `rows` rows, with `width` and `hidden` padded.
    pub(crate) fn new<P: Element>(rows: usize, width: usize, hidden: usize) -> Self {
        Self {
            normalized: Buffer::new(rows * P::cells(width)),
            inverse_deviation: vec![0.0; rows],
            hidden: Buffer::new(rows * P::cells(hidden)),
        }
    }

    /// Normalizes the MLP's input, rows of this width.
    #[inline(always)]
    pub(crate) fn normalize<S: Lanes, P: Element>(&mut self, s: S, x: &[f32], width: usize, eps: f32) {
        norm::normalize::<S, P>(s, x, width, eps, &mut self.normalized, &mut self.inverse_deviation);
    }

    /// Memory held, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.normalized.len() + self.inverse_deviation.len() + self.hidden.len())
    }
}

/// What the rows contribute to the gradients of the weights.
pub(crate) struct MlpGradients {
    pub(crate) norm: NormSums,
    pub(crate) fc1: Factors,
    pub(crate) fc2: Factors,
}

impl MlpGradients {
    /// For `rows` rows, with `width` and `hidden` padded.
    pub(crate) fn new<P: Element>(rows: usize, width: usize, hidden: usize) -> Self {
        Self {
            norm: NormSums::new(width),
            fc1: Factors::new::<P>(rows, hidden, width),
            fc2: Factors::new::<P>(rows, width, hidden),
        }
    }
}

impl Mlp {
    /// Adds the branch, times a factor for each row, to `y`. What was normalized before is the input.
    #[inline(always)]
    pub(crate) fn forward<S: Lanes, P: Element>(
        &self,
        s: S,
        gelu: Gelu,
        scale: Option<&[f32]>,
        saved: &mut MlpSaved,
        y: &mut [f32],
        wanted: Wanted,
    ) {
        let (width, hidden) = (self.fc1.columns.padded(), self.fc1.rows.padded());
        let rows = saved.inverse_deviation.len();
        let mut after = Buffer::new(saved.hidden.len());
        let mut to = BiasGelu::<P> {
            bias: &self.fc1.bias,
            gelu,
            wanted,
            saved: &mut saved.hidden,
            after: ToCells::new(&mut after, P::cells(hidden)),
        };
        product::<S, P>(s, left::<P>(&saved.normalized, width, rows), self.fc1.forward::<P>(), &mut to);
        let mut to = AddToRows { to: y, width: self.fc1.columns.len(), bias: &self.fc2.bias, scale };
        product::<S, P>(s, left::<P>(&after, hidden, rows), self.fc2.forward::<P>(), &mut to);
    }

    /// Adds the gradient of the norm's input to `dx`, from that of the branch; `d_norm` is scratch memory, a padded row
    /// of f32 for each row. `gelu` says which the hidden layer goes into, if it was saved as it was before.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // It has that many inputs.
    pub(crate) fn backward<S: Lanes, P: Element>(
        &self,
        s: S,
        gelu: Option<Gelu>,
        saved: &MlpSaved,
        d_branch: &[u32],
        d_norm: &mut [u32],
        dx: &mut [f32],
        gradients: Option<&mut MlpGradients>,
    ) {
        let (width, hidden) = (self.fc1.columns.padded(), self.fc1.rows.padded());
        let rows = saved.inverse_deviation.len();
        let mut d_hidden = Buffer::new(rows * P::cells(hidden));
        let mut after = Buffer::new(if gradients.is_some() { saved.hidden.len() } else { 0 });
        let mut to = ThroughGelu::<P> {
            saved: &saved.hidden,
            gelu,
            after: gradients.is_some().then_some(&mut after[..]),
            to: ToCells::new(&mut d_hidden, P::cells(hidden)),
        };
        product::<S, P>(s, left::<P>(d_branch, width, rows), self.fc2.backward::<P>(), &mut to);
        let mut to = ToF32 { to: as_f32_mut(d_norm), stride: width };
        product::<S, P>(s, left::<P>(&d_hidden, hidden, rows), self.fc1.backward::<P>(), &mut to);
        if let Some(gradients) = gradients {
            factors::<S, P>(s, rows, (d_branch, width), (&after, hidden), &mut gradients.fc2);
            factors::<S, P>(s, rows, (&d_hidden, hidden), (&saved.normalized, width), &mut gradients.fc1);
            column_sums::<S, P>(s, as_f32(d_norm), &saved.normalized, width, &mut gradients.norm);
        }
        for (row, dx) in dx.chunks_exact_mut(self.fc1.columns.len()).enumerate() {
            let d_norm = &as_f32(d_norm)[row * width..][..width];
            let normalized = &saved.normalized[row * P::cells(width)..];
            norm::add_gradient::<S, P>(s, d_norm, normalized, saved.inverse_deviation[row], &self.norm.weight, dx);
        }
    }
}

/// Rows of cells as the first operand.
#[inline(always)]
fn left<P: Element>(cells: &[u32], elements: usize, rows: usize) -> Left<'_> {
    Left { cells, row_stride: P::cells(elements), step_stride: 1, rows }
}

/// `scale * gradient` as rows of cells, zero in the padding.
#[inline(always)]
pub(crate) fn branch_gradient<S: Lanes, P: Element>(
    s: S,
    gradient: &[f32],
    width: usize,
    scale: Option<&[f32]>,
    to: &mut [u32],
) {
    let stride = P::cells(padded(width));
    for (row, (from, to)) in gradient.chunks_exact(width).zip(to.chunks_exact_mut(stride)).enumerate() {
        let factor = s.splat(scale.map_or(1.0, |scale| scale[row]));
        for (i, part) in from.chunks(LANES).enumerate() {
            P::store(s, to, P::cells(i * LANES), s.mul(s.load_part(part), factor));
        }
    }
}

/// `gelu(sums + bias)` as cells, and what the backward pass needs of it.
struct BiasGelu<'a, P> {
    bias: &'a [f32],
    gelu: Gelu,
    wanted: Wanted,
    saved: &'a mut [u32],
    after: ToCells<'a, P>,
}

impl<S: Lanes, P: Element> Epilogue<S> for BiasGelu<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let before = s.add(sums, s.load(chunk(self.bias, column)));
        let (value, slope) = value_and_slope(s, self.gelu, before);
        let at = row * self.after.stride + P::cells(column);
        match self.wanted {
            Wanted::Nothing => {}
            Wanted::Input => P::store(s, self.saved, at, slope),
            Wanted::Weights => P::store(s, self.saved, at, before),
        }
        self.after.put(s, row, column, value);
    }
}

/// Adds `scale * (sums + bias)` to rows of f32 without padding.
pub(crate) struct AddToRows<'a> {
    pub(crate) to: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) bias: &'a [f32],
    pub(crate) scale: Option<&'a [f32]>,
}

impl<S: Lanes> Epilogue<S> for AddToRows<'_> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let mut sums = s.add(sums, s.load(chunk(self.bias, column)));
        if let Some(scale) = self.scale {
            sums = s.mul(sums, s.splat(scale[row]));
        }
        let to = &mut self.to[row * self.width..][..self.width][column..];
        let sums = s.add(s.load_part(to), sums);
        s.store_part(to, sums);
    }
}

/// `sums * gelu'(before)` as cells.
struct ThroughGelu<'a, P> {
    saved: &'a [u32],
    /// If what was saved went into a GELU, which; else it is the slope.
    gelu: Option<Gelu>,
    /// Receives the GELU's values, the input of the layer after it.
    after: Option<&'a mut [u32]>,
    to: ToCells<'a, P>,
}

impl<S: Lanes, P: Element> Epilogue<S> for ThroughGelu<'_, P> {
    #[inline(always)]
    fn put(&mut self, s: S, row: usize, column: usize, sums: S::V) {
        let at = row * self.to.stride + P::cells(column);
        let mut slope = P::load(s, self.saved, at);
        if let Some(gelu) = self.gelu {
            let value;
            (value, slope) = value_and_slope(s, gelu, slope);
            if let Some(after) = &mut self.after {
                P::store(s, after, at, value);
            }
        }
        self.to.put(s, row, column, s.mul(sums, slope));
    }
}
