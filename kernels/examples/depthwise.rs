//! GFLOP/s of depthwise convolutions: `cargo run --release -p advxl-kernels --example depthwise [repetitions [path]]`.
//!
//! Useful work: `2 k^2` for every element of the output, and as much for each of the gradients; the zeros around
//! the image count as work. Fastest of the repetitions, and its share of the peak measured right before.

use std::time::Instant;

use advxl_kernels::{
    DepthwiseShape, PackedDepthwise, Path, Precision, depthwise, depthwise_input_gradient, depthwise_weight_gradient,
    peak_flops, with_path,
};

fn main() {
    let repetitions = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let name = std::env::args().nth(2);
    let named = |path: &Path| name.as_ref().is_some_and(|name| *name == format!("{path:?}"));
    let path = Path::ALL.into_iter().find(named).unwrap_or_else(advxl_kernels::detect);
    with_path(path, || report(repetitions));
}

fn report(repetitions: usize) {
    println!("path {:?}, {} threads; GFLOP/s, share of the peak", advxl_kernels::detect(), rayon_threads());
    println!("{:>20} {:>12} {:>12} {:>12}", "channels: n x size", "forward", "input", "weights");
    for (channels, size) in [(96, 56), (192, 28), (384, 14), (768, 7), (40, 56), (80, 28), (320, 7), (96, 8)] {
        let shape = DepthwiseShape { batch: 8, height: size, width: size, channels, kernel: 7 };
        let values = |len: usize| (0..len).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect::<Vec<_>>();
        let (weight, bias) = (values(49 * channels), values(channels));
        let (x, mut y) = (values(shape.elements()), values(shape.elements()));
        let (mut dw, mut db) = (values(49 * channels), values(channels));
        let packed = PackedDepthwise::new(&weight, &bias, 7);
        let forward = measure(repetitions, shape, || depthwise(shape, &packed, &x, &mut y));
        let input = measure(repetitions, shape, || depthwise_input_gradient(shape, &packed, &x, None, &mut y));
        let dy = values(shape.elements());
        let weights = measure(repetitions, shape, || depthwise_weight_gradient(shape, &x, &dy, &mut dw, &mut db));
        println!("{:>20} {forward:>12} {input:>12} {weights:>12}", format!("{channels}: 8 x {size}"));
    }
}

fn rayon_threads() -> usize {
    std::thread::available_parallelism().map_or(0, |n| n.get())
}

fn measure(repetitions: usize, shape: DepthwiseShape, mut run: impl FnMut()) -> String {
    run();
    let peak = peak_flops(Precision::F32);
    let fastest = (0..repetitions).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    let rate = shape.flops() / fastest.fold(f64::INFINITY, f64::min);
    format!("{:.0} {:>3.0} %", rate / 1e9, 100.0 * rate / peak)
}
