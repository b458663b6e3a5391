//! What a device can do, measured: the rate of its matrix products.

use std::time::Instant;

use burn::tensor::{DType, Tensor};

use super::device::Device;
use super::words::Precision;

/// Floating point operations a second: of the processor's multiply-add instructions on registers, of a GPU's products of
/// large square matrices.
///
/// # Panics
/// When a product on a GPU through Burn fails.
pub fn peak_flops(precision: Precision, device: &Device) -> f64 {
    const SIDE: usize = 4096;
    const PRODUCTS: usize = 10;
    let burn = match device {
        Device::Cuda(gpu) => {
            let rate = gpu.product_rate(precision.on_cuda());
            return rate.unwrap_or_else(|error| advxl_cuda::fail(error));
        }
        Device::Burn(_) if device.is_cpu() => return advxl_kernels::peak_flops(precision.on_cpu()),
        Device::Burn(burn) => burn,
    };
    let matrix = || {
        let ones = Tensor::<2>::ones([SIDE, SIDE], burn);
        match precision {
            Precision::F32 | Precision::Tf32 => ones,
            Precision::Bf16 => ones.cast(DType::BF16),
        }
    };
    let (a, b) = (matrix(), matrix());
    let products = || {
        let begun = Instant::now();
        for _ in 0..PRODUCTS {
            std::hint::black_box(a.clone().matmul(b.clone()));
        }
        device.wait();
        begun.elapsed().as_secs_f64()
    };
    products();
    2.0 * (SIDE.pow(3) * PRODUCTS) as f64 / products()
}
