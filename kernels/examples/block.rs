//! GFLOP/s of whole blocks: `cargo run --release -p advxl-kernels --example block [repetitions]`.
//!
//! Useful work only: `2 (12 n w^2 + 2 n^2 w)` per sample for each of forward, gradient of the input
//! and gradients of the weights. The best of the repetitions counts.

use std::time::Instant;

use advxl_kernels::{
    BlockGradients, BlockShape, BlockWeights, Gelu, PackedBlock, Precision, block_backward,
    block_forward,
};

fn main() {
    let repetitions = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(20);
    println!(
        "path {:?}, {} threads",
        advxl_kernels::detect(),
        std::thread::available_parallelism().map_or(0, |n| n.get())
    );
    println!(
        "{:>24} {:>5} {:>9} {:>9} {:>9} {:>9} {:>8}",
        "shape", "", "forward", "f + input", "all", "pack ms", "saved MB"
    );
    for (width, tokens, batch) in [
        (192, 17, 128),
        (192, 65, 128),
        (384, 50, 32),
        (768, 50, 8),
        (384, 197, 8),
    ] {
        let shape = BlockShape {
            batch,
            tokens,
            width,
            heads: width / 64,
            hidden: 4 * width,
        };
        for precision in [Precision::F32, Precision::Bf16] {
            measure(shape, precision, repetitions);
        }
    }
}

fn measure(shape: BlockShape, precision: Precision, repetitions: usize) {
    let BlockShape { width, hidden, .. } = shape;
    let mut seed = 1_u64;
    let mut random = |len: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
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
    let weights = BlockWeights {
        norm1_weight: &parts[0],
        norm1_bias: &parts[1],
        qkv_weight: &parts[2],
        qkv_bias: &parts[3],
        proj_weight: &parts[4],
        proj_bias: &parts[5],
        norm2_weight: &parts[6],
        norm2_bias: &parts[7],
        fc1_weight: &parts[8],
        fc1_bias: &parts[9],
        fc2_weight: &parts[10],
        fc2_bias: &parts[11],
    };
    let x = random(shape.elements(), 1.0);
    let dy = random(shape.elements(), 1.0);
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let mut gradients = BlockGradients::zeros(width, hidden);

    let pack = best(repetitions, || {
        drop(PackedBlock::new(shape.heads, &weights, precision))
    });
    let packed = PackedBlock::new(shape.heads, &weights, precision);
    let mut bytes = 0;
    let forward = best(repetitions, || {
        block_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, false);
    });
    let mut both = |gradients: Option<&mut BlockGradients>| {
        let saved = block_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, &mut y, true);
        let saved = saved.expect("saved");
        bytes = saved.bytes();
        block_backward(&packed, &saved, &dy, &mut dx, gradients);
    };
    let input = best(repetitions, || both(None));
    let all = best(repetitions, || both(Some(&mut gradients)));
    let rate = |passes: f64, seconds: f64| passes * shape.flops() / seconds / 1e9;
    println!(
        "{:>24} {:>5} {:>9.0} {:>9.0} {:>9.0} {:>9.2} {:>8.1}",
        format!("{width} wide, {} x {}", shape.batch, shape.tokens),
        if precision == Precision::F32 {
            "f32"
        } else {
            "bf16"
        },
        rate(1.0, forward),
        rate(2.0, input),
        rate(3.0, all),
        pack * 1e3,
        bytes as f64 / 1e6,
    );
}

/// Seconds of the fastest run.
fn best(repetitions: usize, mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repetitions + 2 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
