//! What the tests of the kernels share.

use crate::ops::device::Device;
use burn::tensor::Tensor;

use crate::ops::tensor::from_vec;
use crate::rng::{Rng, Stream};

/// A tensor of normal numbers.
pub(super) fn draw<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
    let mut rng = Rng::new(seed, Stream::Bench);
    let values = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    from_vec(values, shape, &Device::cpu())
}

/// Asserts that sums of at most 21 numbers near 1 agree up to their order.
pub(super) fn assert_close(found: &[f32], right: &[f32]) {
    assert_eq!(found.len(), right.len());
    for (found, right) in found.iter().zip(right) {
        assert!((found - right).abs() < 1e-5, "{found} {right}");
    }
}
