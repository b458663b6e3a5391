//! GFLOP/s of whole ConvNeXt blocks: `cargo run --release -p advxl-kernels --example convnext [repetitions [only]]`.
//!
//! Useful work only: `2 (49 c + 2 c hidden)` for each pixel for each of forward, gradient of the input and gradients of
//! the weights. The fastest of the repetitions, and its share of the peak measured right before.

use std::time::Instant;

use advxl_kernels::{
    ConvNextGradients, ConvNextShape, ConvNextWeights, Gelu, PackedConvNext, Precision, Wanted, convnext_backward,
    convnext_forward, peak_flops,
};

fn main() {
    let repetitions = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let only = std::env::args().nth(2);
    println!("path {:?}; GFLOP/s, share of the peak", advxl_kernels::detect());
    println!(
        "{:>20} {:>5} {:>12} {:>12} {:>12} {:>8} {:>8}",
        "channels: n x size", "", "forward", "f + input", "all", "pack ms", "saved MB"
    );
    for (channels, size) in [(96, 56), (192, 28), (384, 14), (768, 7), (40, 56), (80, 28)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let shape =
                ConvNextShape { batch: 8, height: size, width: size, channels, hidden: 4 * channels, kernel: 7 };
            let name = format!("{channels}: 8 x {size} {precision:?}");
            if only.as_ref().is_none_or(|only| name.contains(only)) {
                report(shape, precision, repetitions);
            }
        }
    }
}

fn report(shape: ConvNextShape, precision: Precision, repetitions: usize) {
    let ConvNextShape { channels, hidden, .. } = shape;
    let mut seed = 1_u64;
    let mut random = |len: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
        };
        (0..len).map(|_| next()).collect()
    };
    let small = 1.0 / (channels as f32).sqrt();
    let weights: ConvNextWeights<&[f32]> = ConvNextWeights {
        gamma: &vec![0.5; channels],
        conv_dw_weight: &random(49 * channels, 0.2),
        conv_dw_bias: &random(channels, 0.1),
        norm_weight: &vec![1.0; channels],
        norm_bias: &random(channels, 0.1),
        fc1_weight: &random(hidden * channels, small),
        fc1_bias: &random(hidden, 0.1),
        fc2_weight: &random(channels * hidden, small),
        fc2_bias: &random(channels, 0.1),
    };
    let (x, dy) = (random(shape.elements(), 1.0), random(shape.elements(), 1.0));
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let mut gradients = ConvNextGradients::new(channels, hidden, 7);
    let packed = PackedConvNext::new(7, &weights, precision);
    let (mut bytes, flops) = (0, shape.flops());
    let pack = fastest(repetitions, || drop(PackedConvNext::new(7, &weights, precision)));
    let forward = rate(repetitions, precision, flops, || {
        convnext_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, Wanted::Nothing);
    });
    let input = rate(repetitions, precision, 2.0 * flops, || {
        let saved = convnext_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, Wanted::Input);
        convnext_backward(&packed, &saved.expect("saved"), &dy, &mut dx, None);
    });
    let all = rate(repetitions, precision, 3.0 * flops, || {
        let saved = convnext_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, Wanted::Weights);
        let saved = saved.expect("saved");
        bytes = saved.bytes();
        convnext_backward(&packed, &saved, &dy, &mut dx, Some((&x, &mut gradients)));
    });
    println!(
        "{:>20} {:>5} {forward:>12} {input:>12} {all:>12} {:>8.2} {:>8.1}",
        format!("{channels}: {} x {}", shape.batch, shape.width),
        format!("{precision:?}"),
        pack * 1e3,
        bytes as f64 / 1e6,
    );
}

fn fastest(repetitions: usize, mut run: impl FnMut()) -> f64 {
    run();
    let times = (0..repetitions).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

fn rate(repetitions: usize, precision: Precision, flops: f64, run: impl FnMut()) -> String {
    let peak = peak_flops(precision);
    let rate = flops / fastest(repetitions, run);
    format!("{:.0} {:>3.0} %", rate / 1e9, 100.0 * rate / peak)
}
