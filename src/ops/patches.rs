//! Images to normalised patches in one pass over memory.

use advxl_kernels::{Floats, Patches};
use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::tensor::Tensor;

use super::{node, on_kernels, primitive, recorded, reference as plain, register, reusable, slice};

/// How images become patches.
#[derive(Clone, Copy, Debug)]
pub struct PatchSpec {
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Taken off each channel.
    pub mean: [f64; 3],
    /// Then divides it.
    pub std: [f64; 3],
}

impl PatchSpec {
    /// The channels' means and the factors `1 / std`.
    pub(crate) fn affine(&self) -> [[f32; 3]; 2] {
        [
            self.mean.map(|mean| mean as f32),
            self.std.map(|std| (1.0 / std) as f32),
        ]
    }
}

/// Normalises the channels and cuts the images into patches.
///
/// Shapes: `images` `[batch, 3, grid * patch, grid * patch]`; the result
/// `[batch, grid * grid, 3 * patch * patch]`, in timm's order of pixels.
pub fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    if !on_kernels(&images) {
        return plain::patches(images, spec);
    }
    let [batch, _, size, _] = images.dims();
    let [mean, factor] = spec.affine();
    let cut = Patches {
        batch,
        size,
        patch: spec.patch,
        mean,
        factor,
    };
    let node = images.is_autodiff().then(|| node(&images));
    let images = primitive(images);
    let mut values = Floats::new(slice(&images).len());
    cut.cut(slice(&images), &mut values);
    let grid = size / spec.patch;
    let values = reusable(values, &[batch, grid * grid, 3 * spec.patch * spec.patch]);
    match node {
        None => Tensor::from_primitive::<Flex>(values),
        Some(node) => recorded(PatchesBackward, [node], |_| (values, Some(cut))),
    }
}

#[derive(Debug)]
struct PatchesBackward;

impl Backward<Flex, 1> for PatchesBackward {
    type State = Patches;

    fn backward(self, ops: Ops<Patches, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Patches { batch, size, .. } = ops.state;
        let [parent] = ops.parents.map(|parent| parent.map(|parent| parent.id));
        let from = grads.consume::<Flex>(&ops.node).to_contiguous();
        let mut to = Floats::new(slice(&from).len());
        ops.state.gradient(slice(&from), &mut to);
        register(grads, parent, to, &[batch, 3, size, size]);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::{from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    #[test]
    fn patches_and_their_gradient_are_those_of_the_plain_composition_to_the_bit() {
        let spec = PatchSpec {
            patch: 4,
            mean: [0.4, 0.5, 0.6],
            std: [0.2, 0.25, 0.3],
        };
        let mut rng = Rng::new(1, Purpose::Bench, 0, 0);
        let mut draw = |count: usize| (0..count).map(|_| rng.uniform()).collect::<Vec<_>>();
        let (pixels, weights) = (draw(2 * 3 * 144), draw(2 * 9 * 48));
        let results = |cut: fn(Tensor<4>, &PatchSpec) -> Tensor<3>| {
            let images = from_vec(pixels.clone(), [2, 3, 12, 12], &Device::flex());
            let images = images.autodiff().require_grad();
            let weights = from_vec(weights.clone(), [2, 9, 48], &Device::flex());
            let cut = cut(images.clone(), &spec);
            let mut gradients = (cut.clone() * weights.autodiff()).sum().backward();
            (
                to_vec(cut),
                to_vec(images.grad_remove(&mut gradients).unwrap()),
            )
        };
        assert_eq!(results(patches), results(plain::patches));
    }
}
