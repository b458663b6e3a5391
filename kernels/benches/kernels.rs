//! Every kernel alone: `cargo bench -p advxl-kernels`. Whole blocks: `cargo run --release --example block`.
//!
//! Criterion's `elem/s` are floating-point operations for products and attention (so `Gelem/s` are
//! GFLOP/s), its `B/s` the bytes read and written for everything else.

use std::hint::black_box;

use advxl_kernels::*;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};

/// Numbers between -1 and 1 without a pattern that a branch predictor could learn.
fn values(len: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(20).measurement_time(std::time::Duration::from_secs(1));
    group.warm_up_time(std::time::Duration::from_millis(300));
    group
}

/// `[rows, summed, columns]` of ViT products: fc1 and fc2 at three widths, and a patch embedding.
const PRODUCTS: [[usize; 3]; 7] = [
    [8320, 192, 768],
    [8320, 768, 192],
    [1600, 384, 1536],
    [1600, 1536, 384],
    [400, 768, 3072],
    [400, 3072, 768],
    [8192, 48, 192],
];

fn products(criterion: &mut Criterion) {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut group = group(criterion, &format!("gemm_{precision:?}"));
        for sizes in PRODUCTS {
            let [m, k, n] = sizes;
            let (a, b, mut c) = (values(m * k), values(k * n), vec![0.0; m * n]);
            let packed = PackedMatrix::new(&b, Layout::Transposed, k, n, precision);
            group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
            group.bench_function(format!("{m}x{k}x{n}"), |bencher| {
                bencher.iter(|| gemm_packed(m, (&a, Layout::Plain), &packed, Finish::Store, black_box(&mut c)));
            });
        }
    }
}

fn attentions(criterion: &mut Criterion) {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut group = group(criterion, &format!("attention_{precision:?}"));
        for (batch, tokens, heads) in [(128, 65, 3), (32, 50, 6), (8, 197, 6)] {
            let shape = AttentionShape { batch, tokens, heads, head_dim: 64 };
            let size = batch * tokens * heads * 64;
            let (qkv, d_out) = (values(3 * size), values(size));
            let (mut out, mut d_qkv) = (vec![0.0; size], vec![0.0; 3 * size]);
            let flops = (4 * size * tokens) as u64;
            group.throughput(Throughput::Elements(flops));
            group.bench_function(format!("forward/{batch}x{tokens}"), |bencher| {
                bencher.iter(|| attention(shape, precision, &qkv, black_box(&mut out)));
            });
            let saved = attention(shape, precision, &qkv, &mut out);
            group.throughput(Throughput::Elements(2 * flops));
            group.bench_function(format!("backward/{batch}x{tokens}"), |bencher| {
                bencher.iter(|| attention_gradient(&saved, &d_out, black_box(&mut d_qkv)));
            });
        }
    }
}

/// Whole encoder blocks at the sizes of the training steps that are compared with PyTorch.
fn blocks(criterion: &mut Criterion) {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut group = group(criterion, &format!("block_{precision:?}"));
        for (width, tokens, batch) in [(192, 65, 64), (384, 50, 32), (768, 50, 8), (384, 197, 8)] {
            let shape = BlockShape { batch, tokens, width, heads: width / 64, hidden: 4 * width };
            let (ones, zeros) = (vec![1.0; width], vec![0.0; 4 * width]);
            let small = |len| values(len).into_iter().map(|v| v * 0.05).collect::<Vec<_>>();
            let [qkv, proj, fc1, fc2] = [3, 1, 4, 4].map(|parts| small(parts * width * width));
            let weights: BlockWeights<&[f32]> = BlockWeights {
                norm1_weight: &ones,
                norm1_bias: &zeros[..width],
                qkv_weight: &qkv,
                qkv_bias: &zeros[..3 * width],
                proj_weight: &proj,
                proj_bias: &zeros[..width],
                norm2_weight: &ones,
                norm2_bias: &zeros[..width],
                fc1_weight: &fc1,
                fc1_bias: &zeros,
                fc2_weight: &fc2,
                fc2_bias: &zeros[..width],
            };
            let packed = PackedBlock::new(shape.heads, &weights, precision);
            let (x, dy) = (values(shape.elements()), values(shape.elements()));
            let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            let mut gradients = BlockGradients::new(width, shape.hidden);
            let forward = |y: &mut [f32], wanted| block_forward(shape, &packed, Gelu::Erf, 1e-6, None, &x, y, wanted);
            let passes = |count: usize| Throughput::Elements(count as u64 * shape.flops() as u64);
            let name = |what: &str| format!("{what}/{width}:{batch}x{tokens}");
            group.throughput(passes(1));
            group.bench_function(name("forward"), |b| b.iter(|| forward(&mut y, Wanted::Nothing)));
            let saved = forward(&mut y, Wanted::Input).expect("saved");
            group.bench_function(name("input_gradient"), |b| {
                b.iter(|| block_backward(&packed, &saved, &dy, black_box(&mut dx), None));
            });
            let saved = forward(&mut y, Wanted::Weights).expect("saved");
            group.throughput(passes(2));
            group.bench_function(name("all_gradients"), |b| {
                b.iter(|| block_backward(&packed, &saved, &dy, black_box(&mut dx), Some(&mut gradients)));
            });
            group.throughput(Throughput::Bytes(4 * 12 * (width * width) as u64));
            group.bench_function(name("pack"), |b| b.iter(|| PackedBlock::new(shape.heads, &weights, precision)));
        }
    }
}

/// Everything that is bound by memory: four million elements, more than the caches of most machines.
fn passes(criterion: &mut Criterion) {
    const LEN: usize = 1 << 22;
    const WIDTH: usize = 512;
    let (x, g, mut y) = (values(LEN), values(LEN), vec![0.0; LEN]);
    let (mut p, mut m, mut v, mut average) = (values(LEN), values(LEN), vec![0.5; LEN], values(LEN));
    let (weight, bias) = (values(WIDTH), values(WIDTH));
    let mut group = group(criterion, "pass");
    let bytes = |arrays: usize| Throughput::Bytes((4 * LEN * arrays) as u64);
    for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
        group.throughput(bytes(2));
        group.bench_function(format!("gelu_{kind:?}"), |b| b.iter(|| gelu(kind, &x, black_box(&mut y))));
        group.throughput(bytes(3));
        let name = format!("gelu_gradient_{kind:?}");
        group.bench_function(name, |b| b.iter(|| gelu_gradient(kind, &x, &g, black_box(&mut y))));
    }
    group.throughput(bytes(2));
    group.bench_function("layer_norm", |b| b.iter(|| layer_norm(&x, &weight, &bias, 1e-6, black_box(&mut y))));
    group.bench_function("softmax", |b| b.iter(|| softmax(&x, WIDTH, black_box(&mut y))));
    group.throughput(bytes(3));
    group.bench_function("layer_norm_gradient", |b| {
        b.iter(|| layer_norm_gradient(&x, &weight, 1e-6, &g, black_box(&mut y), None));
    });
    group.throughput(bytes(1));
    group.bench_function("sum_of_squares", |b| b.iter(|| sum_of_squares(black_box(&x))));
    group.throughput(bytes(4));
    let steps = vec![0.01; x.len() / 4096];
    group.bench_function("linf_step", |b| b.iter(|| pgd::linf_step(black_box(&mut y), &g, &x, &steps, 0.03)));
    let patches = Patches { batch: 64, size: 128, patch: 16, mean: [0.5; 3], factor: [4.0; 3] };
    let pixels = 64 * 3 * 128 * 128;
    group.throughput(Throughput::Bytes(8 * pixels as u64));
    group.bench_function("patches", |b| b.iter(|| patches.cut(&x[..pixels], black_box(&mut y[..pixels]))));
    group.throughput(bytes(4));
    group.bench_function("l2_step", |b| b.iter(|| pgd::l2_step(black_box(&mut y), &g, &x, &steps, 0.5)));
    let settings = AdamW {
        learning_rate: 1e-3,
        betas: (0.9, 0.95),
        eps: 1e-8,
        weight_decay: 0.1,
        step: 10,
        gradient_scale: 1.0,
        average_decay: 0.999,
    };
    group.throughput(bytes(7));
    group.bench_function("adamw", |b| b.iter(|| settings.update(black_box(&mut p), &g, &mut m, &mut v, None)));
    group.throughput(bytes(9));
    group.bench_function("adamw_with_average", |b| {
        b.iter(|| settings.update(black_box(&mut p), &g, &mut m, &mut v, Some(&mut average)));
    });
}

criterion_group!(benches, products, attentions, blocks, passes);
criterion_main!(benches);
