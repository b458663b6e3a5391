//! Causal attention on the software GPU against a reference in f64: every kernel, forward and backward.

mod support;

use std::path::Path;

use advxl_cuda::{self as cuda, AttentionShape, Gpu, Kind, Precision, Values, Wanted};
use support::{assert_near, few, host, in_any_order, numbers, rounded, soft};

const KIB: usize = 1 << 10;

fn shape(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, tokens, heads, head_dim, causal: true }
}

fn send(gpu: &Gpu, values: &[f32], kind: Kind) -> Values {
    Values::send(gpu, values).cast(kind)
}

/// A GPU whose blocks have less shared memory than an H100's.
fn smaller(shared_memory: usize) -> Gpu {
    Gpu::soft_with(Path::new(env!("CARGO_TARGET_TMPDIR")), shared_memory)
}

/// The result and the gradient of `qkv`, in f64.
fn reference(shape: AttentionShape, qkv: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let AttentionShape { batch, tokens, heads, head_dim, causal } = shape;
    let width = heads * head_dim;
    let (mut y, mut dqkv) = (vec![0.0; batch * tokens * width], vec![0.0; 3 * batch * tokens * width]);
    let scale = 1.0 / (head_dim as f64).sqrt();
    for sample in 0..batch {
        for head in 0..heads {
            let at = |token: usize, part: usize| ((sample * tokens + token) * 3 + part) * width + head * head_dim;
            let row = |token: usize, part: usize| qkv[at(token, part)..][..head_dim].iter().map(|v| f64::from(*v));
            let dot = |a: &mut dyn Iterator<Item = f64>, b: &mut dyn Iterator<Item = f64>| -> f64 {
                a.zip(b).map(|(a, b)| a * b).sum()
            };
            for query in 0..tokens {
                let seen = if causal { query + 1 } else { tokens };
                let out = (sample * tokens + query) * width + head * head_dim;
                let scores: Vec<f64> = (0..seen).map(|key| scale * dot(&mut row(query, 0), &mut row(key, 1))).collect();
                let most = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
                let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|score| (score - most).exp() / sum).collect();
                let slope = || dy[out..][..head_dim].iter().map(|v| f64::from(*v));
                let d: Vec<f64> = (0..seen).map(|key| dot(&mut slope(), &mut row(key, 2))).collect();
                let middle = dot(&mut p.iter().copied(), &mut d.iter().copied());
                for key in 0..seen {
                    let of_score = p[key] * (d[key] - middle) * scale;
                    for i in 0..head_dim {
                        y[out + i] += p[key] * f64::from(qkv[at(key, 2) + i]);
                        dqkv[at(query, 0) + i] += of_score * f64::from(qkv[at(key, 1) + i]);
                        dqkv[at(key, 1) + i] += of_score * f64::from(qkv[at(query, 0) + i]);
                        dqkv[at(key, 2) + i] += p[key] * f64::from(dy[out + i]);
                    }
                }
            }
        }
    }
    let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
    (narrow(y), narrow(dqkv))
}

fn both(gpu: &Gpu, shape: AttentionShape, kind: Kind, qkv: &[f32], dy: &[f32]) -> Vec<f32> {
    let (y, saved) = cuda::attention(shape, &send(gpu, qkv, kind));
    let gradient = cuda::attention_gradient(&saved, &send(gpu, dy, kind));
    [host(&y), host(&gradient)].concat()
}

fn input(shape: AttentionShape) -> (Vec<f32>, Vec<f32>) {
    let elements = shape.batch * shape.tokens * shape.heads * shape.head_dim;
    (rounded(&numbers(3 * elements, 1, 1.0)), rounded(&numbers(elements, 2, 1.0)))
}

fn compare(shape: AttentionShape, kind: Kind, run: impl Fn(&[f32], &[f32]) -> Vec<f32>) {
    let (qkv, dy) = input(shape);
    let (y, dqkv) = reference(shape, &qkv, &dy);
    let found = run(&qkv, &dy);
    let tolerance = if kind == Kind::F32 { 3e-6 } else { 0.01 };
    assert_near(&format!("{shape:?} {kind:?}"), &found[..y.len()], &y, tolerance);
    assert_near(&format!("gradient of {shape:?} {kind:?}"), &found[y.len()..], &dqkv, tolerance);
}

#[test]
fn causal_attention_and_its_gradient_are_those_of_the_definition_for_every_kernel() {
    for (shape, kind) in [
        // All scores in registers: a text tower, whole tiles, one token.
        (shape(1, 77, 2, 64), Kind::Bf16),
        (shape(2, 16, 2, 16), Kind::Bf16),
        (shape(2, 17, 3, 24), Kind::Bf16),
        (shape(1, 50, 1, 64), Kind::Bf16),
        (shape(1, 37, 1, 80), Kind::Bf16),
        (shape(2, 1, 2, 8), Kind::Bf16),
        // Two tensors of a head in shared memory: more tiles than warps, long heads.
        (shape(1, 81, 2, 16), Kind::Bf16),
        (shape(2, 96, 1, 24), Kind::Bf16),
        (shape(1, 197, 1, 64), Kind::Bf16),
        (shape(1, 265, 1, 8), Kind::Bf16),
        (shape(1, 90, 1, 104), Kind::Bf16),
        (shape(5, 100, 1, 16), Kind::Bf16),
        (shape(1, 161, 1, 72), Kind::Bf16),
        (shape(1, 256, 3, 8), Kind::Bf16),
        (shape(1, 257, 3, 8), Kind::Bf16),
        (shape(1, 280, 1, 8), Kind::Bf16),
        // Tiles of 64.
        (shape(2, 77, 1, 64), Kind::F32),
        (shape(2, 16, 1, 16), Kind::F32),
        (shape(1, 130, 2, 24), Kind::F32),
        (shape(2, 1, 3, 8), Kind::F32),
    ] {
        compare(shape, kind, |qkv, dy| in_any_order(|gpu| both(gpu, shape, kind, qkv, dy)));
    }
}

#[test]
fn gpus_with_less_shared_memory_get_the_same_attention() {
    for causal in [true, false] {
        for (shape, kind, shared_memory) in [
            // Tiles of 32 rows, and bf16 without matrix instructions in tiles of 64.
            (shape(1, 77, 1, 104), Kind::F32, 99 * KIB),
            (shape(1, 200, 1, 16), Kind::Bf16, 20 * KIB),
            (shape(1, 257, 1, 104), Kind::Bf16, 125 * KIB),
        ] {
            let shape = AttentionShape { causal, ..shape };
            compare(shape, kind, |qkv, dy| {
                let gpu = smaller(shared_memory);
                let found = both(&gpu, shape, kind, qkv, dy);
                gpu.shuffle_threads(7);
                assert!(both(&gpu, shape, kind, qkv, dy) == found, "the order of threads changes {shape:?} {kind:?}");
                found
            });
        }
    }
}

#[test]
fn a_token_does_not_see_those_after_it() {
    for (shape, kind) in
        [(shape(1, 77, 1, 64), Kind::Bf16), (shape(1, 130, 1, 24), Kind::Bf16), (shape(1, 130, 1, 24), Kind::F32)]
    {
        let gpu = soft();
        let width = shape.heads * shape.head_dim;
        let (qkv, dy) = input(shape);
        let (y, gradient) = {
            let all = both(&gpu, shape, kind, &qkv, &dy);
            (all[..dy.len()].to_vec(), all[dy.len()..].to_vec())
        };
        for &first in few(&[40, 1, 16, 64, shape.tokens - 1], 1) {
            // Other tokens from `first` on, and no gradient of theirs.
            let (mut changed, mut cut) = (qkv.clone(), dy.clone());
            changed[3 * first * width..].iter_mut().for_each(|v| *v = 3.0 - *v);
            cut[first * width..].fill(0.0);
            let found = both(&gpu, shape, kind, &changed, &cut);
            assert_eq!(found[..first * width], y[..first * width], "{shape:?} {kind:?}, token {first}");
            assert_ne!(found[first * width..][..width], y[first * width..][..width]);
            let of_later = &found[dy.len() + 3 * first * width..];
            assert!(of_later.iter().all(|v| *v == 0.0), "{shape:?} {kind:?}: gradients reach tokens after {first}");
        }
        // The last query's gradient does not depend on others, nor the last key's.
        let last = 3 * (shape.tokens - 1) * width;
        let mut cut = dy.clone();
        cut[..(shape.tokens - 1) * width].fill(0.0);
        let found = both(&gpu, shape, kind, &qkv, &cut);
        assert_eq!(found[dy.len() + last..], gradient[last..], "{shape:?} {kind:?}");
    }
}

/// A block of operations of its own, with the gradient of its input.
fn composed(gpu: &Gpu, heads: usize, tokens: usize, weights: &[Values; 12], x: &Values, dy: &Values) -> Vec<f32> {
    let [n1, b1, wq, bq, wp, bp, n2, b2, w1, c1, w2, c2] = weights;
    let width = n1.len();
    let layer = |weight, bias| cuda::Linear::new(weight, bias, Precision::F32);
    let (qkv, proj, fc1, fc2) = (layer(wq, bq), layer(wp, bp), layer(w1, c1), layer(w2, c2));
    let shape =
        AttentionShape { batch: x.len() / tokens / width, tokens, heads, head_dim: width / heads, causal: true };
    let (normed1, saved1) = cuda::layer_norm(x, n1, b1, 1e-5, Kind::F32);
    let (attended, saved) = cuda::attention(shape, &qkv.forward(&normed1, Kind::F32));
    let x1 = cuda::add(x, &proj.forward(&attended, Kind::F32));
    let (normed2, saved2) = cuda::layer_norm(&x1, n2, b2, 1e-5, Kind::F32);
    let hidden = fc1.forward(&normed2, Kind::F32);
    let y = cuda::add(&x1, &fc2.forward(&cuda::gelu(cuda::Gelu::Quick, &hidden), Kind::F32));
    let (d_hidden, _) = cuda::gelu_gradient(cuda::Gelu::Quick, &hidden, &fc2.input_gradient(dy), fc1.outputs(), false);
    let (dx1, _) = cuda::layer_norm_gradient(&saved2, n2, &fc1.input_gradient(&d_hidden), Some(dy), false);
    let d_qkv = cuda::attention_gradient(&saved, &proj.input_gradient(&dx1));
    let (dx, _) = cuda::layer_norm_gradient(&saved1, n1, &qkv.input_gradient(&d_qkv), Some(&dx1), false);
    assert!(gpu.is(y.gpu()));
    [host(&y), host(&dx)].concat()
}

#[test]
fn a_causal_block_is_its_operations_and_keeps_the_order_of_tokens() {
    let (batch, tokens, width, heads, hidden) = (2, 16, 32, 2, 64);
    let shape = cuda::BlockShape { batch, tokens, width, heads, hidden, causal: true };
    let lens = [
        width,
        width,
        3 * width * width,
        3 * width,
        width * width,
        width,
        width,
        width,
        hidden * width,
        hidden,
        width * hidden,
        width,
    ];
    let list = |gpu: &Gpu| {
        let mut index = 0;
        lens.map(|len| {
            index += 1;
            Values::send(gpu, &numbers(len, index, 0.3))
        })
    };
    let (x, dy) = (numbers(shape.elements(), 20, 1.0), numbers(shape.elements(), 21, 1.0));
    let run = |gpu: &Gpu, precision: Precision, x: &[f32]| {
        let block = cuda::Block::new(heads, &cuda::BlockWeights::of(list(gpu)), precision);
        let (x, dy) = (Values::send(gpu, x), Values::send(gpu, &dy));
        let (y, saved) = cuda::block_forward(shape, &block, cuda::Gelu::Quick, 1e-5, None, &x, Wanted::Input);
        let (dx, _) = cuda::block_backward(&block, &saved.unwrap(), &dy, Wanted::Input);
        [host(&y), host(&dx)].concat()
    };
    let right =
        in_any_order(|gpu| composed(gpu, heads, tokens, &list(gpu), &Values::send(gpu, &x), &Values::send(gpu, &dy)));
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
        let found = in_any_order(|gpu| run(gpu, precision, &x));
        assert_near(&format!("{precision:?}"), &found, &right, tolerance);
        let mut changed = x.clone();
        changed[9 * width..tokens * width].iter_mut().for_each(|v| *v += 1.0);
        let other = run(&soft(), precision, &changed);
        assert_eq!(other[..9 * width], found[..9 * width], "{precision:?}");
        assert_ne!(other[9 * width..10 * width], found[9 * width..10 * width], "{precision:?}");
    }
}
