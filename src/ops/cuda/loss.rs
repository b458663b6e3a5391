//! Losses, their sums, and correct answers: what crosses to the host is a number.

use advxl_cuda::{Gpu, RowDistance, Values};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{fetched, primitive, sent, values};
use crate::ops::node::{Differentiable, parent, parents, record};

/// See [`crate::ops::cross_entropy`].
pub(crate) fn cross_entropy(gpu: &Gpu, logits: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    let [rows, classes] = logits.dims();
    let parents = parents::<Flex, 2>(&logits, []);
    let (logits, targets) = (values(gpu, &logits), values(gpu, &targets));
    record(parents, |_| {
        let (losses, slopes) = advxl_cuda::cross_entropy(&logits, &targets, classes, 1.0);
        let saved = Slopes {
            slopes,
            width: classes,
        };
        (primitive(losses, &[rows]), saved)
    })
}

/// See [`crate::ops::row_dots`].
pub(crate) fn row_dots(gpu: &Gpu, x: Tensor<2>, weights: &Tensor<2>) -> Tensor<1> {
    let [rows, width] = x.dims();
    let parents = parents::<Flex, 2>(&x, []);
    let (x, slopes) = (values(gpu, &x), values(gpu, weights));
    record(parents, |_| {
        let dots = advxl_cuda::row_dots(&x, &slopes, width);
        (primitive(dots, &[rows]), Slopes { slopes, width })
    })
}

/// The gradient of each row's value for the row.
#[derive(Clone, Debug)]
struct Slopes {
    /// `[rows, width]`
    slopes: Values,
    width: usize,
}

impl Differentiable for Slopes {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { slopes, width } = self;
        let dx = advxl_cuda::times_rows(&slopes, &sent(slopes.gpu(), &dy));
        let rows = dx.len() / width.max(1);
        vec![Some(primitive(dx, &[rows, width]))]
    }
}

/// See [`crate::ops::row_distances`].
pub(crate) fn row_distances(gpu: &Gpu, kind: RowDistance, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    let [rows, width] = x.dims();
    let parents = match y.is_autodiff() {
        true => vec![parent::<Flex, 2>(&x), parent::<Flex, 2>(&y)],
        false => parents::<Flex, 2>(&x, []),
    };
    let (x, y) = (values(gpu, &x), values(gpu, &y));
    record(parents, |_| {
        let distances = advxl_cuda::row_distances(kind, &x, &y, width);
        (
            primitive(distances, &[rows]),
            DistanceGradient { kind, x, y, width },
        )
    })
}

#[derive(Clone, Debug)]
struct DistanceGradient {
    kind: RowDistance,
    x: Values,
    y: Values,
    width: usize,
}

impl Differentiable for DistanceGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let Self { kind, x, y, width } = self;
        let d = sent(x.gpu(), &dy);
        let wanted_y = wanted.len() > 1;
        let (of_x, of_y) = advxl_cuda::row_distances_gradient(kind, &x, &y, width, &d, wanted_y);
        let rows = d.len();
        let of_y = of_y.map(|of_y| Some(primitive(of_y, &[rows, width])));
        std::iter::once(Some(primitive(of_x, &[rows, width])))
            .chain(of_y)
            .collect()
    }
}

/// See [`crate::ops::mean`].
pub(crate) fn mean(gpu: &Gpu, x: Tensor<1>) -> Tensor<1> {
    let count = x.dims()[0];
    scaled_sum(gpu, x, 1.0 / count.max(1) as f32)
}

/// See [`crate::ops::scaled_sum`].
pub(crate) fn scaled_sum(gpu: &Gpu, x: Tensor<1>, factor: f32) -> Tensor<1> {
    let parents = parents::<Flex, 1>(&x, []);
    let x = values(gpu, &x);
    record(parents, |_| {
        let total = advxl_cuda::total(&x);
        let total = match factor {
            1.0 => total,
            factor => advxl_cuda::times_rows(&total, &Values::filled(gpu, 1, factor)),
        };
        let saved = Spread {
            gpu: gpu.clone(),
            count: x.len(),
            factor,
        };
        (primitive(total, &[1]), saved)
    })
}

/// The gradient of a scaled sum: the same for every element.
#[derive(Clone, Debug)]
struct Spread {
    gpu: Gpu,
    count: usize,
    factor: f32,
}

impl Differentiable for Spread {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        // A backward pass begins with a one that is on the host.
        let dy = dy.to_contiguous();
        let dy = dy.as_slice::<f32>().expect("a number")[0];
        let dx = Values::filled(&self.gpu, self.count, dy * self.factor);
        vec![Some(primitive(dx, &[self.count]))]
    }
}

/// See [`crate::ops::count_correct`].
pub(crate) fn correct(gpu: &Gpu, logits: &Tensor<2>, labels: &[u32]) -> u64 {
    let classes = logits.dims()[1];
    let labels: Vec<f32> = labels.iter().map(|label| *label as f32).collect();
    let labels = Values::send(gpu, &labels);
    let right = advxl_cuda::right(&values(gpu, logits), &labels, classes);
    fetched(&advxl_cuda::total(&right))[0] as u64
}
