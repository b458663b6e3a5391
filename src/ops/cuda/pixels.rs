//! Images: patches, the steps of attacks, random starts.

use advxl_cuda::{Gpu, Kind, Patches, Values, mixing, pgd, resize_rows};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{primitive, sent, tensor, values};
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::{PatchSpec, Streams};

/// See [`crate::ops::patches`].
pub(crate) fn patches(gpu: &Gpu, images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    let ([batch, _, size, _], patch) = (images.dims(), spec.patch);
    let [mean, factor] = spec.affine().map(|values| Values::send(gpu, &values));
    let cut = Patches {
        batch,
        size,
        patch,
        mean,
        factor,
    };
    let parents = parents::<Flex, 4>(&images, []);
    let images = values(gpu, &images);
    record(parents, |_| {
        let row = 3 * patch * patch;
        let rows = resize_rows(&cut.cut(&images, Kind::F32), cut.stride(), row);
        let grid = size / patch;
        (primitive(rows, &[batch, grid * grid, row]), cut)
    })
}

impl Differentiable for Patches {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = sent(self.mean.gpu(), &dy);
        let dy = resize_rows(&dy, 3 * self.patch * self.patch, self.stride());
        let shape = [self.batch, 3, self.size, self.size];
        vec![Some(primitive(self.gradient(&dy), &shape))]
    }
}

/// See [`crate::ops::linf_step`].
pub(crate) fn linf_step(
    gpu: &Gpu,
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    step(
        pgd::linf_step,
        gpu,
        images,
        gradient,
        center,
        steps,
        epsilon,
    )
}

/// See [`crate::ops::l2_step`].
pub(crate) fn l2_step(
    gpu: &Gpu,
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    step(pgd::l2_step, gpu, images, gradient, center, steps, epsilon)
}

/// A step of the engine on images, gradient, center and step sizes.
type Step = fn(&mut Values, &Values, &Values, &Values, f32);

fn step(
    kernel: Step,
    gpu: &Gpu,
    images: Tensor<4>,
    gradient: Tensor<4>,
    center: &Tensor<4>,
    steps: &[f32],
    epsilon: f64,
) -> Tensor<4> {
    let (dims, gradient, center) = (images.dims(), values(gpu, &gradient), values(gpu, center));
    let mut moved = values(gpu, &images);
    // The tensor holds on to the values, which could then not be changed in place.
    drop(images);
    let steps = Values::send(gpu, steps);
    kernel(&mut moved, &gradient, &center, &steps, epsilon as f32);
    tensor(moved, dims)
}

/// See [`crate::ops::linf_start`] and [`crate::ops::l2_start`].
pub(crate) fn start(
    kernel: fn(&Values, &pgd::Draws, f32) -> Values,
    gpu: &Gpu,
    center: &Tensor<4>,
    streams: &Streams,
    epsilon: f64,
) -> Tensor<4> {
    let draws = draws(streams);
    let dims = center.dims();
    tensor(kernel(&values(gpu, center), &draws, epsilon as f32), dims)
}

/// Streams as the engine has them.
pub(super) fn draws<'a>(streams: &Streams<'a>) -> pgd::Draws<'a> {
    pgd::Draws {
        seed: streams.seed,
        purpose: streams.purpose,
        keys: streams.keys,
        sub_key: streams.sub_key,
    }
}

/// See [`crate::ops::from_bytes`].
pub(crate) fn from_bytes<const D: usize>(gpu: &Gpu, bytes: &[u8], shape: [usize; D]) -> Tensor<D> {
    tensor(mixing::images_of_bytes(gpu, bytes), shape)
}

/// The distributions of [`crate::loss::Targets`], to the bit, of what is less to send.
pub(crate) fn targets(
    gpu: &Gpu,
    pairs: [&[u32]; 2],
    share: &[f32],
    classes: usize,
    rest: f32,
    hot: f32,
) -> Tensor<2> {
    let values = mixing::targets(gpu, pairs, share, classes, rest, hot);
    tensor(values, [share.len(), classes])
}

/// See [`crate::ops::mix_rows`].
pub(crate) fn mix_rows(gpu: &Gpu, images: Tensor<4>, mixes: &[mixing::Mix]) -> Tensor<4> {
    let dims = images.dims();
    tensor(mixing::mix(&values(gpu, &images), dims[2], mixes), dims)
}
