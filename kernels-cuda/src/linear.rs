//! Layers `x W^T + b` and their gradients, by cuBLASLt.

use crate::Precision;
use crate::machine::{Epilogue, Form, Kind, Operands, Product};
use crate::rows::{resized, same_gpu, sum_of_rows};
use crate::values::Values;

/// A layer's weight `[out, in]` and bias `[out]`, ready for products of one precision.
///
/// Products want rows of whole eights, so where `in` is not a multiple of 8 (patches of 14 pixels) the rows of weight
/// and input are filled up with zeros: [`inputs`](Self::inputs) is the length of the input's rows. [`pad`](Self::pad)
/// makes them of rows without zeros, and [`crop`](Self::crop) cuts their gradient.
#[derive(Clone, Debug)]
pub struct Linear {
    precision: Precision,
    /// Of the weight as it came.
    columns: usize,
    /// With zeros.
    inputs: usize,
    outputs: usize,
    weight: Values,
    /// In f32, and in the precision's format: a product adds the bias in the format of its result.
    bias: [Values; 2],
}

/// What is added to the output of a layer, or done with it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then<'a> {
    Store,
    /// Adds a tensor like the output.
    Add(&'a Values),
    /// Takes the tanh GELU.
    Gelu,
    /// Takes the tanh GELU and stores what it is taken of.
    GeluKeeping(&'a Values),
}

impl Linear {
    /// Copies of a weight and a bias, both f32, in the format of the precision.
    ///
    /// # Panics
    ///
    /// If the sizes do not match, or the precision is bf16 and `out` is not a multiple of 8.
    pub fn new(weight: &Values, bias: &Values, precision: Precision) -> Self {
        let outputs = bias.len();
        let columns = weight.len() / outputs.max(1);
        let inputs = columns.next_multiple_of(8);
        assert!(weight.len() == columns * outputs, "a weight of {} numbers for {outputs} outputs", weight.len());
        let kind = precision.kind();
        assert!(
            outputs.is_multiple_of(8) || kind == Kind::F32,
            "a layer of {outputs} outputs; in bf16 the GPU's layers take multiples of 8"
        );
        let weight = if columns == inputs { weight.cast(kind) } else { resized(weight, columns, inputs, kind) };
        Self { precision, columns, inputs, outputs, weight, bias: [bias.clone(), bias.cast(kind)] }
    }

    /// Length of an input row, zeros included.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Length of an input row as the weight came, without zeros.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// f32 rows of [`columns`](Self::columns) numbers as the layer takes them: zeros behind them, in the precision's
    /// format.
    ///
    /// Shapes: `x` `[rows, columns]`, the result `[rows, inputs]`.
    ///
    /// # Panics
    ///
    /// If `x` is not whole rows, or not f32.
    pub fn pad(&self, x: &Values) -> Values {
        self.resize(x, self.columns, self.inputs, self.precision.kind())
    }

    /// The gradient of [`pad`](Self::pad)'s input, in f32, from that of the layer's.
    ///
    /// Shapes: `dx` `[rows, inputs]`, the result `[rows, columns]`.
    ///
    /// # Panics
    ///
    /// If `dx` is not whole rows, or not in the precision's format.
    pub fn crop(&self, dx: &Values) -> Values {
        self.rows(dx, self.inputs);
        self.resize(&dx.cast(Kind::F32), self.inputs, self.columns, Kind::F32)
    }

    fn resize(&self, x: &Values, from: usize, to: usize, kind: Kind) -> Values {
        let whole = x.kind() == Kind::F32 && from > 0 && x.len().is_multiple_of(from);
        assert!(whole, "{x:?} is not whole rows of {from} in f32");
        if from == to { x.cast(kind) } else { resized(x, from, to, kind) }
    }

    /// Length of an output row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `x W^T + b` in `kind`, of `x` in the precision's format.
    ///
    /// Shapes: `x` `[rows, in]`, the result `[rows, out]`.
    ///
    /// # Panics
    ///
    /// If `x` is not whole rows, or in another format.
    pub fn forward(&self, x: &Values, kind: Kind) -> Values {
        self.then(x, kind, Then::Store)
    }

    pub(crate) fn then(&self, x: &Values, kind: Kind, then: Then) -> Values {
        let rows = self.rows(x, self.inputs);
        let y = Values::new(x.gpu(), rows * self.outputs, kind);
        let epilogue = match then {
            Then::Store | Then::Add(_) => Epilogue::Bias,
            Then::Gelu => Epilogue::Gelu,
            Then::GeluKeeping(_) => Epilogue::GeluAux,
        };
        let like = |other: &Values| {
            assert!((other.len(), other.kind()) == (y.len(), kind), "{other:?} does not fit the output {y:?}");
            other.at()
        };
        let (c, aux) = match then {
            Then::Add(c) => (like(c), 0),
            Then::GeluKeeping(aux) => (0, like(aux)),
            _ => (0, 0),
        };
        let product =
            Product { add: c != 0, epilogue, ..self.product(Form::Forward, rows, self.outputs, self.inputs, kind) };
        let bias = if kind == Kind::F32 { &self.bias[0] } else { &self.bias[1] };
        let operands =
            Operands { a: x.at(), b: self.weight.at(), c, d: y.at(), bias: bias.at(), aux, ..Operands::default() };
        // SAFETY: all sizes were checked above or when the layer was made.
        unsafe { x.gpu().product(&product, &operands) };
        y
    }

    /// The gradient of the input from that of the output, both in the precision's format.
    ///
    /// # Panics
    ///
    /// If `dy` is not whole rows, or in another format.
    pub fn input_gradient(&self, dy: &Values) -> Values {
        self.input_gradient_through(dy, None)
    }

    /// The same times the slope of the tanh GELU at `before`.
    pub(crate) fn input_gradient_through(&self, dy: &Values, before: Option<&Values>) -> Values {
        let rows = self.rows(dy, self.outputs);
        let kind = self.precision.kind();
        let dx = Values::new(dy.gpu(), rows * self.inputs, kind);
        let epilogue = if before.is_some() { Epilogue::GeluGradient } else { Epilogue::None };
        if let Some(before) = before {
            assert!((before.len(), before.kind()) == (dx.len(), kind), "{before:?} does not fit the input {dx:?}");
        }
        let product = Product { epilogue, ..self.product(Form::Input, rows, self.inputs, self.outputs, kind) };
        let aux = before.map_or(0, Values::at);
        let operands = Operands { a: dy.at(), b: self.weight.at(), d: dx.at(), aux, ..Operands::default() };
        // SAFETY: all sizes were checked above or when the layer was made.
        unsafe { dy.gpu().product(&product, &operands) };
        dx
    }

    /// The gradient of the weight, in f32.
    ///
    /// # Panics
    ///
    /// If the sizes do not match, or the formats are not the precision's.
    pub fn weight_gradient(&self, x: &Values, dy: &Values) -> Values {
        let rows = self.rows(dy, self.outputs);
        assert!(self.rows(x, self.inputs) == rows, "`x` is {x:?}, `dy` {dy:?}");
        let gradient = Values::new(x.gpu(), self.outputs * self.inputs, Kind::F32);
        let product = self.product(Form::Weight, self.outputs, self.inputs, rows, Kind::F32);
        let operands = Operands { a: dy.at(), b: x.at(), d: gradient.at(), ..Operands::default() };
        // SAFETY: all sizes were checked above or when the layer was made.
        unsafe { x.gpu().product(&product, &operands) };
        if self.columns == self.inputs { gradient } else { resized(&gradient, self.inputs, self.columns, Kind::F32) }
    }

    /// The gradient of the bias, in f32.
    ///
    /// # Panics
    ///
    /// If `dy` is not whole rows.
    pub fn bias_gradient(&self, dy: &Values) -> Values {
        sum_of_rows(dy, self.outputs)
    }

    fn product(&self, form: Form, rows: usize, columns: usize, inner: usize, out: Kind) -> Product {
        let (operands, tf32) = (self.precision.kind(), self.precision == Precision::Tf32);
        Product { form, rows, columns, inner, operands, out, tf32, add: false, epilogue: Epilogue::None }
    }

    fn rows(&self, x: &Values, width: usize) -> usize {
        same_gpu(x.gpu(), &[&self.weight]);
        assert!(x.kind() == self.precision.kind(), "{x:?} for products in {:?}", self.precision);
        assert!(width > 0 && x.len().is_multiple_of(width), "{x:?} is not whole rows of {width}");
        x.len() / width
    }
}
