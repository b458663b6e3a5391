//! GFLOP/s of whole blocks: `cargo run --release -p advxl-kernels --example block [repetitions [only]]`.
//!
//! Useful work only: `2 (12 n w^2 + 2 n^2 w)` per sample for each of forward, gradient of the input
//! and gradients of the weights. Of the repetitions: the fastest, and the median share of the peak that
//! the processor reaches in registers right before and after each.

use std::time::Instant;

use advxl_kernels::{
    BlockGradients, BlockShape, BlockWeights, Gelu, PackedBlock, Precision, Wanted, block_backward, block_forward,
    peak_flops,
};

fn main() {
    let repetitions = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(20);
    let only = std::env::args().nth(2);
    println!(
        "path {:?}, {} threads",
        advxl_kernels::detect(),
        std::thread::available_parallelism().map_or(0, |n| n.get())
    );
    println!("GFLOP/s, share of the peak");
    println!(
        "{:>20} {:>5} {:>12} {:>12} {:>12} {:>8} {:>8}",
        "width: batch x n", "", "forward", "f + input", "all", "pack ms", "saved MB"
    );
    for (width, tokens, batch) in [(192, 17, 128), (192, 65, 128), (384, 50, 32), (768, 50, 8), (384, 197, 8)] {
        let shape = BlockShape { batch, tokens, width, heads: width / 64, hidden: 4 * width };
        for precision in [Precision::F32, Precision::Bf16] {
            let name = format!("{width}: {batch} x {tokens} {precision:?}");
            if only.as_ref().is_none_or(|only| name.contains(only)) {
                report(shape, precision, repetitions);
            }
        }
    }
}

fn report(shape: BlockShape, precision: Precision, repetitions: usize) {
    let BlockShape { width, hidden, .. } = shape;
    let mut seed = 1_u64;
    let mut random = |len: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
        };
        (0..len).map(|_| next()).collect()
    };
    let small = 1.0 / (width as f32).sqrt();
    let parts = [
        vec![1.0; width],
        random(width, 0.1),
        random(3 * width * width, small),
        random(3 * width, 0.1),
        random(width * width, small),
        random(width, 0.1),
        vec![1.0; width],
        random(width, 0.1),
        random(hidden * width, small),
        random(hidden, 0.1),
        random(width * hidden, small),
        random(width, 0.1),
    ];
    let weights = BlockWeights::from_array(parts.each_ref().map(|part| &part[..]));
    let x = random(shape.elements(), 1.0);
    let dy = random(shape.elements(), 1.0);
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let mut gradients = BlockGradients::new(width, hidden);

    let packed = PackedBlock::new(shape.heads, &weights, precision);
    let (mut bytes, flops) = (0, shape.flops());
    let pack = measure(repetitions, precision, 0.0, || drop(PackedBlock::new(shape.heads, &weights, precision)));
    let forward = measure(repetitions, precision, flops, || {
        block_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, Wanted::Nothing);
    });
    let mut both = |gradients: Option<&mut BlockGradients>| {
        let wanted = if gradients.is_some() { Wanted::Weights } else { Wanted::Input };
        let saved = block_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, wanted);
        let saved = saved.expect("saved");
        bytes = saved.bytes();
        block_backward(&packed, &saved, &dy, &mut dx, gradients);
    };
    let input = measure(repetitions, precision, 2.0 * flops, || both(None));
    let all = measure(repetitions, precision, 3.0 * flops, || both(Some(&mut gradients)));
    println!(
        "{:>20} {:>5} {:>12} {:>12} {:>12} {:>8.2} {:>8.1}",
        format!("{width}: {} x {}", shape.batch, shape.tokens),
        format!("{precision:?}"),
        forward.to_string(),
        input.to_string(),
        all.to_string(),
        pack.seconds * 1e3,
        bytes as f64 / 1e6,
    );
}

/// The fastest run, and the median share of the processor's peak.
struct Rate {
    seconds: f64,
    flops: f64,
    share: f64,
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:.0} {:>3.0} %", self.flops / self.seconds / 1e9, 100.0 * self.share)
    }
}

fn measure(repetitions: usize, precision: Precision, flops: f64, mut run: impl FnMut()) -> Rate {
    run();
    let mut before = peak_flops(precision);
    let (mut seconds, mut shares) = (f64::INFINITY, Vec::new());
    for _ in 0..repetitions {
        let start = Instant::now();
        run();
        let took = start.elapsed().as_secs_f64();
        let after = peak_flops(precision);
        shares.push(flops / took / (0.5 * (before + after)));
        before = after;
        seconds = seconds.min(took);
    }
    shares.sort_by(f64::total_cmp);
    Rate { seconds, flops, share: shares[shares.len() / 2] }
}
