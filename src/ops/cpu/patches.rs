//! Images to normalized patches in one pass over memory.

use advxl_kernels::{Floats, Patches};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex::{from_floats, primitive, slice};
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::PatchSpec;

/// See [`crate::ops::patches`].
pub(crate) fn patches(images: Tensor<4>, spec: &PatchSpec) -> Tensor<3> {
    let ([batch, _, size, _], patch) = (images.dims(), spec.patch);
    let [mean, factor] = spec.affine();
    let cut = Patches {
        batch,
        size,
        patch,
        mean,
        factor,
    };
    let parents = parents::<Flex, 4>(&images, []);
    let images = primitive(images);
    record(parents, |_| {
        let mut values = Floats::new(slice(&images).len());
        cut.cut(slice(&images), &mut values);
        let grid = size / patch;
        let shape = [batch, grid * grid, 3 * patch * patch];
        (from_floats(values, &shape), cut)
    })
}

impl Differentiable for Patches {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = dy.to_contiguous();
        let mut dx = Floats::new(slice(&dy).len());
        self.gradient(slice(&dy), &mut dx);
        let shape = [self.batch, 3, self.size, self.size];
        vec![Some(from_floats(dx, &shape))]
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::device::Device;

    use super::*;
    use crate::ops::{from_vec, reference, to_vec};
    use crate::rng::{Rng, Stream};

    #[test]
    fn patches_and_their_gradient_are_those_of_the_reference_to_the_bit() {
        let spec = PatchSpec {
            patch: 4,
            mean: [0.4, 0.5, 0.6],
            std: [0.2, 0.25, 0.3],
        };
        let mut rng = Rng::new(1, Stream::Bench);
        let mut draw = |count: usize| (0..count).map(|_| rng.uniform()).collect::<Vec<_>>();
        let (pixels, weights) = (draw(2 * 3 * 144), draw(2 * 9 * 48));
        let results = |cut: fn(Tensor<4>, &PatchSpec) -> Tensor<3>| {
            let images = from_vec(pixels.clone(), [2, 3, 12, 12], &Device::cpu());
            let images = images.autodiff().require_grad();
            let weights = from_vec(weights.clone(), [2, 9, 48], &Device::cpu());
            let cut = cut(images.clone(), &spec);
            let mut gradients = (cut.clone() * weights.autodiff()).sum().backward();
            (
                to_vec(cut),
                to_vec(images.grad_remove(&mut gradients).unwrap()),
            )
        };
        assert_eq!(results(patches), results(reference::patches));
    }
}
