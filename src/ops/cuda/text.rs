//! Text towers and the contrastive loss: embeddings of tokens, projections, similarities.

use advxl_cuda::{ContrastiveSaved, EmbedSaved, Gpu, Kind, Transposed, UnitSaved, Values, matmul};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::rows::scaled;
use super::values::{primitive, sent, tensor, values};
use crate::ops::node::{Differentiable, parent, parents, record};

/// See [`crate::ops::embed`].
pub(crate) fn embed(
    gpu: &Gpu,
    ids: &[u32],
    table: Tensor<1>,
    places: &Tensor<1>,
    [count, length, width]: [usize; 3],
) -> Tensor<3> {
    let parents = match table.is_autodiff() || places.is_autodiff() {
        true => vec![parent::<Flex, 1>(&table), parent::<Flex, 1>(places)],
        false => Vec::new(),
    };
    let (table, all) = (values(gpu, &table), values(gpu, places));
    record(parents, |_| {
        let places = all.slice(0..length * width);
        let (x, saved) = advxl_cuda::embed(ids, &table, &places, width, Kind::F32);
        let gpu = gpu.clone();
        let saved = EmbedGradient {
            gpu,
            saved,
            places: all.len(),
        };
        (primitive(x, &[count, length, width]), saved)
    })
}

#[derive(Clone, Debug)]
struct EmbedGradient {
    gpu: Gpu,
    saved: EmbedSaved,
    /// Numbers in the table of places, whose first were used.
    places: usize,
}

impl Differentiable for EmbedGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = sent(&self.gpu, &dy);
        let (table, used) = advxl_cuda::embed_gradient(&self.saved, &dy);
        let places = match self.places - used.len() {
            0 => used,
            rest => Values::joined(&[&used, &Values::zeros(&self.gpu, rest, Kind::F32)]),
        };
        let flat = |values: Values| {
            let length = values.len();
            Some(primitive(values, &[length]))
        };
        vec![flat(table), flat(places)]
    }
}

/// See [`crate::ops::take`].
pub(crate) fn take(gpu: &Gpu, x: Tensor<3>, which: &[usize]) -> Tensor<3> {
    let [count, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, []);
    let x = values(gpu, &x);
    record(parents, |_| {
        let taken = advxl_cuda::take_rows(&x, tokens, width, which);
        let saved = TakeGradient {
            gpu: gpu.clone(),
            which: which.to_vec(),
            tokens,
            width,
        };
        (primitive(taken, &[count, 1, width]), saved)
    })
}

#[derive(Clone, Debug)]
struct TakeGradient {
    gpu: Gpu,
    which: Vec<usize>,
    tokens: usize,
    width: usize,
}

impl Differentiable for TakeGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self {
            gpu,
            which,
            tokens,
            width,
        } = self;
        let dx = advxl_cuda::take_rows_gradient(&sent(&gpu, &dy), tokens, width, &which);
        vec![Some(primitive(dx, &[which.len(), tokens, width]))]
    }
}

/// See [`crate::ops::project`].
pub(crate) fn project(gpu: &Gpu, x: Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    let [rows, inputs] = x.dims();
    let outputs = weight.dims()[0] / inputs;
    let parents = match weight.is_autodiff() {
        true => vec![parent::<Flex, 2>(&x), parent::<Flex, 1>(weight)],
        false => parents::<Flex, 2>(&x, []),
    };
    let (x, weight) = (values(gpu, &x), values(gpu, weight));
    record(parents, |_| {
        let y = matmul(&x, &weight, Transposed::Neither, [rows, inputs, outputs]);
        let sizes = [rows, inputs, outputs];
        (
            primitive(y, &[rows, outputs]),
            ProjectGradient { x, weight, sizes },
        )
    })
}

#[derive(Clone, Debug)]
struct ProjectGradient {
    x: Values,
    weight: Values,
    sizes: [usize; 3],
}

impl Differentiable for ProjectGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self {
            x,
            weight,
            sizes: [rows, inputs, outputs],
        } = self;
        let dy = sent(x.gpu(), &dy);
        let dx = matmul(&dy, &weight, Transposed::Second, [rows, outputs, inputs]);
        let mut found = vec![Some(primitive(dx, &[rows, inputs]))];
        if wanted.len() > 1 {
            let of_weight = matmul(&x, &dy, Transposed::First, [inputs, rows, outputs]);
            found.push(Some(primitive(of_weight, &[inputs * outputs])));
        }
        found
    }
}

/// See [`crate::ops::unit_length`].
pub(crate) fn unit_length(gpu: &Gpu, x: Tensor<2>) -> Tensor<2> {
    let shape = x.dims();
    let parents = parents::<Flex, 2>(&x, []);
    let x = values(gpu, &x);
    record(parents, |_| {
        let (y, saved) = advxl_cuda::unit_length(&x, shape[1]);
        let gpu = gpu.clone();
        (primitive(y, &shape), UnitGradient { gpu, saved, shape })
    })
}

#[derive(Clone, Debug)]
struct UnitGradient {
    gpu: Gpu,
    saved: UnitSaved,
    shape: [usize; 2],
}

impl Differentiable for UnitGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dx = advxl_cuda::unit_length_gradient(&self.saved, &sent(&self.gpu, &dy));
        vec![Some(primitive(dx, &self.shape))]
    }
}

/// See [`crate::ops::scaled_similarities`].
pub(crate) fn scaled_similarities(
    gpu: &Gpu,
    rows: Tensor<2>,
    texts: &Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let [count, width] = texts.dims();
    // [count, width] -> [width, count]
    let columns = advxl_cuda::swap_axes(&values(gpu, texts), [count, width]);
    let columns = scaled(&columns, scale as f32);
    project(
        gpu,
        unit_length(gpu, rows),
        &tensor(columns, [width * count]),
    )
}

/// See [`crate::ops::contrastive`].
pub(crate) fn contrastive(
    gpu: &Gpu,
    images: Tensor<2>,
    texts: &Tensor<2>,
    log_scale: &Tensor<1>,
) -> Tensor<1> {
    let [batch, width] = images.dims();
    let parents = match texts.is_autodiff() || log_scale.is_autodiff() {
        true => vec![
            parent::<Flex, 2>(&images),
            parent::<Flex, 2>(texts),
            parent::<Flex, 1>(log_scale),
        ],
        false => parents::<Flex, 2>(&images, []),
    };
    let [images, texts] = [&images, texts].map(|rows| values(gpu, rows));
    let log_scale = values(gpu, log_scale);
    record(parents, |_| {
        let (losses, saved) = advxl_cuda::contrastive(&images, &texts, &log_scale, width);
        let (gpu, shape) = (gpu.clone(), [batch, width]);
        (
            primitive(losses, &[batch]),
            ContrastiveGradient { gpu, saved, shape },
        )
    })
}

#[derive(Clone, Debug)]
struct ContrastiveGradient {
    gpu: Gpu,
    saved: ContrastiveSaved,
    shape: [usize; 2],
}

impl Differentiable for ContrastiveGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { gpu, saved, shape } = self;
        let dy = sent(&gpu, &dy);
        let (images, others) = advxl_cuda::contrastive_gradient(saved, &dy, wanted.len() > 1);
        let mut found = vec![Some(primitive(images, &shape))];
        if let Some((texts, log_scale)) = others {
            found.push(Some(primitive(texts, &shape)));
            found.push(Some(primitive(log_scale, &[1])));
        }
        found
    }
}

/// See [`crate::ops::similarities`].
pub(crate) fn similarities(gpu: &Gpu, a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    let ([rows, width], [columns, _]) = (a.dims(), b.dims());
    let sizes = [rows, width, columns];
    let product = matmul(&values(gpu, a), &values(gpu, b), Transposed::Second, sizes);
    tensor(product, [rows, columns])
}

/// See [`crate::ops::clamp`].
pub(crate) fn clamp(gpu: &Gpu, x: &Tensor<1>, low: f64, high: f64) -> Tensor<1> {
    let clamped = advxl_cuda::evaluation::clamp(&values(gpu, x), low as f32, high as f32);
    tensor(clamped, x.dims())
}
