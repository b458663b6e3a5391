//! Every single kernel, on every path this processor has, against plain f64 references.

use advxl_kernels::*;
use proptest::prelude::*;

mod reference;
use reference::{Rng, wide, worst};

/// Rounding of bf16: half a unit of 8 significant bits, so 2^-9 of the next power of two and at most
/// 2^-8 of the value itself.
const BF16: f64 = 1.0 / 256.0;

fn available() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.is_available())
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|c| values.iter().skip(c).step_by(columns).copied()).collect()
}

/// `A B` in f64, and the sum of the magnitudes of its terms, which bounds the rounding.
fn product([m, k, n]: [usize; 3], a: &[f32], b: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (mut c, mut size) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                let term = f64::from(a[i * k + l]) * f64::from(b[l * n + j]);
                c[i * n + j] += term;
                size[i * n + j] += term.abs();
            }
        }
    }
    (c, size)
}

/// Two operands are rounded by 2^-8 each, so each term by 2^-7 and a bit; f32 sums add at most
/// `k` times 2^-24 of the terms' magnitudes.
fn bound(precision: Precision, k: usize) -> f64 {
    let operands = if precision == Precision::Bf16 { 2.05 * BF16 } else { 0.0 };
    operands + (k as f64 + 4.0) * f64::from(f32::EPSILON)
}

fn check_gemm(sizes: [usize; 3]) {
    let [m, k, n] = sizes;
    let mut rng = Rng::new((m * 10_000 + k * 100 + n) as u64);
    let (a, b, bias) = (rng.vec(m * k, 1.0), rng.vec(k * n, 1.0), rng.vec(n, 1.0));
    let (residual, scale) = (rng.vec(m * n, 1.0), rng.vec(m, 1.0));
    let (right, size) = product(sizes, &a, &b);
    let (at, bt) = (transposed(&a, k.max(1)), transposed(&b, n.max(1)));
    for path in available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let bound = bound(precision, k);
            let close = |found: &[f32], right: &dyn Fn(usize) -> f64, steepness: f64, what: &str| {
                for (i, &found) in found.iter().enumerate() {
                    let off = (f64::from(found) - right(i)).abs();
                    let allowed = steepness * bound * size[i] + 1e-6;
                    assert!(off <= allowed, "{what} {path:?} {precision:?} {sizes:?} element {i}: off by {off}");
                }
            };
            let mut first: Option<Vec<f32>> = None;
            for (a, layout_a) in [(&a, Layout::Plain), (&at, Layout::Transposed)] {
                for (b, layout_b) in [(&b, Layout::Plain), (&bt, Layout::Transposed)] {
                    let mut c = vec![f32::NAN; m * n];
                    with_path(path, || gemm(sizes, (a, layout_a), (b, layout_b), precision, Finish::Store, &mut c));
                    close(&c, &|i| right[i], 1.0, "store");
                    assert_eq!(*first.get_or_insert(c.clone()), c, "the layout does not change a bit");
                }
            }
            let packed = with_path(path, || PackedMatrix::new(&b, Layout::Plain, k, n, precision));
            let mut c = vec![f32::NAN; m * n];
            gemm_packed(m, (&a, Layout::Plain), &packed, Finish::Bias(&bias), &mut c);
            let biased = |i: usize| right[i] + f64::from(bias[i % n]);
            close(&c, &biased, 1.0, "bias");
            for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
                let mut before = vec![f32::NAN; m * n];
                let finish = Finish::BiasGelu { bias: &bias, gelu: kind, before: Some(&mut before) };
                gemm_packed(m, (&a, Layout::Plain), &packed, finish, &mut c);
                close(&before, &biased, 1.0, "before gelu");
                // GELU is nowhere steeper than 1.13.
                close(&c, &|i| reference::gelu(biased(i), kind).0, 1.13, "gelu");
            }
            let finish = Finish::Residual { bias: &bias, residual: &residual, row_scale: Some(&scale) };
            gemm_packed(m, (&a, Layout::Plain), &packed, finish, &mut c);
            close(&c, &|i| f64::from(residual[i]) + f64::from(scale[i / n]) * biased(i), 1.0, "residual");
        }
    }
}

#[test]
fn products_of_chosen_shapes_agree_with_f64() {
    for sizes in [
        [0, 3, 4],
        [3, 0, 4],
        [3, 4, 0],
        [1, 1, 1],
        [12, 16, 32],
        [13, 17, 33],
        [24, 2, 64],
        [100, 31, 47],
        [49, 65, 129],
        [1, 300, 1],
    ] {
        check_gemm(sizes);
    }
}

#[test]
fn products_of_more_rows_than_one_task_agree_with_f64() {
    check_gemm([1000, 20, 40]);
}

/// Sums longer than a piece (224 steps of one f32 or two bf16), and than a group of pieces (256 KiB of A).
#[test]
fn products_with_long_sums_agree_with_f64() {
    for sizes in [[13, 225, 33], [5, 449, 70], [48, 1500, 40], [30, 4000, 65]] {
        check_gemm(sizes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_of_any_shape_agree_with_f64(m in 0_usize..80, k in 0_usize..80, n in 0_usize..80) {
        check_gemm([m, k, n]);
    }

    #[test]
    fn norms_of_any_shape_agree_with_f64(rows in 0_usize..150, width in 1_usize..70) {
        check_norm(rows, width);
    }

    #[test]
    fn attention_of_any_shape_agrees_with_f64(
        batch in 0_usize..3, tokens in 1_usize..40, heads in 1_usize..4, head_dim in 1_usize..40,
    ) {
        check_attention(AttentionShape { batch, tokens, heads, head_dim });
    }

    #[test]
    fn sums_of_any_length_agree_with_f64(len in 0_usize..40_000) {
        let values = Rng::new(len as u64).vec(len, 1.0);
        let sum_right: f64 = values.iter().map(|&v| f64::from(v)).sum();
        let squares_right: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        // 40,000 roundings, by 2^-53 each, of sums below 14,000: the reference's own, mostly.
        prop_assert!((sum(&values) - sum_right).abs() < 1e-7, "sum {}", sum(&values) - sum_right);
        prop_assert!((sum_of_squares(&values) - squares_right).abs() < 1e-7, "squares {}", sum_of_squares(&values) - squares_right);
    }
}

fn check_norm(rows: usize, width: usize) {
    let mut rng = Rng::new((rows * 100 + width) as u64);
    // Far from zero: a one-pass variance would lose its digits here.
    let x: Vec<f32> = rng.vec(rows * width, 1.0).iter().map(|v| v + 30.0).collect();
    let (weight, bias, dy) = (rng.vec(width, 1.0), rng.vec(width, 1.0), rng.vec(rows * width, 1.0));
    let (hat, _) = reference::normalize(&wide(&x), width);
    let right: Vec<f64> =
        (hat.iter().enumerate()).map(|(i, v)| v * f64::from(weight[i % width]) + f64::from(bias[i % width])).collect();
    let (dx, dw, db) = reference::norm_gradients(&wide(&x), &wide(&weight), &wide(&dy));
    for path in available() {
        let what = format!("{path:?} {rows} x {width}");
        let (mut y, mut found) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let (mut found_dw, mut found_db) = (vec![7.0; width], vec![7.0; width]);
        with_path(path, || {
            layer_norm(&x, &weight, &bias, 1e-6, &mut y);
            layer_norm_gradient(&x, &weight, 1e-6, &dy, &mut found, Some((&mut found_dw, &mut found_db)));
        });
        // The mean of numbers near 31 is off by a few 2^-24 * 31, and a row of two close numbers has
        // a deviation of perhaps 1e-2, which the normalized value divides by: so relative 1e-3 there,
        // and 1e-4 for rows of ordinary spread. `eps` bounds the rest.
        let allowed = if width < 8 { 2e-2 } else { 2e-4 };
        assert!(worst(&y, &right) < allowed, "{what}: y {}", worst(&y, &right));
        assert!(worst(&found, &dx) < allowed, "{what}: dx {}", worst(&found, &dx));
        assert!(worst(&found_dw, &dw) < allowed, "{what}: dw {}", worst(&found_dw, &dw));
        assert!(worst(&found_db, &db) < 1e-5, "{what}: db {}", worst(&found_db, &db));
    }
}

fn check_attention(shape: AttentionShape) {
    let AttentionShape { batch, tokens, heads, head_dim } = shape;
    let sample = tokens * heads * head_dim;
    let mut rng = Rng::new((sample + batch) as u64);
    let (qkv, d_out) = (rng.vec(3 * batch * sample, 1.5), rng.vec(batch * sample, 1.0));
    let (mut right, mut d_right) = (Vec::new(), Vec::new());
    for (qkv, d_out) in wide(&qkv).chunks_exact(3 * sample).zip(wide(&d_out).chunks_exact(sample)) {
        right.extend(reference::attention(qkv, tokens, heads, head_dim).1);
        d_right.extend(reference::attention_gradient(qkv, d_out, tokens, heads, head_dim));
    }
    for path in available() {
        // bf16: q, k, v, the probabilities and the gradients are each rounded once, scores reach 14 and
        // are off by a few 2^-8 of an exponent.
        for (precision, allowed) in [(Precision::F32, 2e-5), (Precision::Bf16, 10.0 * BF16)] {
            let (mut out, mut d_qkv) = (vec![0.0; right.len()], vec![0.0; d_right.len()]);
            with_path(path, || {
                let saved = attention(shape, precision, &qkv, &mut out);
                attention_gradient(&saved, &d_out, &mut d_qkv);
            });
            let off = worst(&out, &right);
            assert!(off < allowed, "{path:?} {precision:?} {shape:?}: out off by {off}");
            let off = worst(&d_qkv, &d_right);
            assert!(off < allowed, "{path:?} {precision:?} {shape:?}: d_qkv off by {off}");
        }
    }
}

#[test]
fn attention_of_vit_shapes_agrees_with_f64() {
    for (tokens, heads, head_dim) in [(1, 1, 1), (65, 3, 64), (50, 2, 5), (197, 1, 64), (17, 2, 80)] {
        check_attention(AttentionShape { batch: 2, tokens, heads, head_dim });
    }
}

/// The bounds stated in `gelu.rs`, over a grid that holds the signs, the tails and the joints.
#[test]
fn gelu_keeps_its_stated_accuracy() {
    let x: Vec<f32> = (-120_000..=120_000).map(|i| i as f32 * 1e-4).collect();
    let ones = vec![1.0; x.len()];
    for path in available() {
        for kind in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let (mut y, mut slope) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            with_path(path, || {
                gelu(kind, &x, &mut y);
                gelu_gradient(kind, &x, &ones, &mut slope);
            });
            for i in 0..x.len() {
                let (value, derivative) = reference::gelu(f64::from(x[i]), kind);
                let allowed = 3e-7 * (1.0 + f64::from(x[i].abs()));
                assert!(
                    (f64::from(y[i]) - value).abs() < allowed,
                    "{path:?} {kind:?} value at {}: {} {value}",
                    x[i],
                    y[i]
                );
                assert!(
                    (f64::from(slope[i]) - derivative).abs() < allowed,
                    "{path:?} {kind:?} slope at {}: {} {derivative}",
                    x[i],
                    slope[i]
                );
            }
        }
    }
}

#[test]
fn softmax_rows_sum_to_one_and_agree_with_f64() {
    for path in available() {
        for width in [1, 2, 15, 16, 17, 64, 1000] {
            let x: Vec<f32> = Rng::new(width as u64).vec(3 * width, 30.0);
            let mut y = vec![0.0; x.len()];
            with_path(path, || softmax(&x, width, &mut y));
            for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
                let largest = x.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let powers: Vec<f64> = x.iter().map(|&v| f64::from(v - largest).exp()).collect();
                let right: Vec<f64> = powers.iter().map(|p| p / powers.iter().sum::<f64>()).collect();
                assert!(worst(y, &right) < 1e-6, "{path:?} width {width}: off by {}", worst(y, &right));
            }
        }
    }
}

#[test]
fn a_value_that_is_not_a_number_is_not_hidden() {
    for path in available() {
        with_path(path, || {
            let mut y = [0.0; 3];
            gelu(Gelu::Erf, &[1.0, f32::NAN, 2.0], &mut y);
            assert!(y[1].is_nan() && !y[0].is_nan(), "{path:?} gelu erf {y:?}");
            gelu(Gelu::Tanh, &[1.0, f32::NAN, 2.0], &mut y);
            assert!(y[1].is_nan(), "{path:?} gelu tanh {y:?}");
            gelu(Gelu::Quick, &[1.0, f32::NAN, 2.0], &mut y);
            assert!(y[1].is_nan(), "{path:?} gelu quick {y:?}");
            softmax(&[1.0, f32::NAN, 2.0], 3, &mut y);
            assert!(y.iter().all(|v| v.is_nan()), "{path:?} softmax {y:?}");
            for precision in [Precision::F32, Precision::Bf16] {
                let mut c = [0.0; 1];
                let a = [1.0, f32::NAN];
                gemm([1, 2, 1], (&a, Layout::Plain), (&[1.0, 1.0], Layout::Plain), precision, Finish::Store, &mut c);
                assert!(c[0].is_nan(), "{path:?} gemm {c:?}");
            }
        });
    }
}

/// Two updates by hand in f64, as torch.optim.AdamW's documentation writes them.
#[test]
fn adamw_agrees_with_the_formula_for_every_length() {
    for path in available() {
        for len in [0, 1, 15, 16, 33, 20_000] {
            let mut rng = Rng::new(len as u64);
            let (mut p, mut average) = (rng.vec(len, 1.0), rng.vec(len, 1.0));
            let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
            let (mut p64, mut average64) = (wide(&p), wide(&average));
            let (mut m64, mut v64) = (vec![0.0; len], vec![0.0; len]);
            for step in 1..=2 {
                let g = rng.vec(len, 1.0);
                let settings = AdamW {
                    learning_rate: 1e-2,
                    betas: (0.9, 0.95),
                    eps: 1e-8,
                    weight_decay: 0.1,
                    step,
                    gradient_scale: 0.5,
                    average_decay: 0.99,
                };
                with_path(path, || settings.update(&mut p, &g, &mut m, &mut v, Some(&mut average)));
                for i in 0..len {
                    let g = f64::from(g[i]) * 0.5;
                    p64[i] *= 1.0 - 1e-2 * 0.1;
                    m64[i] = 0.9 * m64[i] + 0.1 * g;
                    v64[i] = 0.95 * v64[i] + 0.05 * g * g;
                    let (m, v) =
                        (m64[i] / (1.0 - 0.9_f64.powi(step as i32)), v64[i] / (1.0 - 0.95_f64.powi(step as i32)));
                    p64[i] -= 1e-2 * m / (v.sqrt() + 1e-8);
                    average64[i] = 0.99 * average64[i] + 0.01 * p64[i];
                }
            }
            for (found, right) in [(&p, &p64), (&m, &m64), (&v, &v64), (&average, &average64)] {
                assert!(worst(found, right) < 1e-6, "{path:?} {len}: off by {}", worst(found, right));
            }
        }
    }
}

#[test]
fn a_linf_step_stays_in_the_ball_and_in_the_pixel_range() {
    for path in available() {
        with_path(path, || {
            let origin = [0.5, 0.5, 0.01, 0.99, 0.5, 0.5];
            let mut x = [0.5, 0.55, 0.0, 1.0, 0.5, 0.5];
            let gradient = [2.0, 1e-30, -1.0, 3.0, 0.0, f32::NAN];
            pgd::linf_step(&mut x, &gradient, &origin, &[0.05], 0.08);
            let right = [0.55, 0.58, 0.0, 1.0, 0.5, 0.5];
            for (x, right) in x.iter().zip(right) {
                assert!((x - right).abs() < 1e-6, "{path:?} {x} {right}");
            }
        });
    }
}

#[test]
fn an_l2_step_has_its_length_and_stays_in_the_ball() {
    for path in available() {
        with_path(path, || {
            let origin = vec![0.5; 40];
            let mut x = origin.clone();
            let mut gradient = Rng::new(3).vec(40, 1.0);
            gradient[20..].fill(0.0);
            pgd::l2_step(&mut x, &gradient, &origin, &[0.1; 2], 0.15);
            let moved: Vec<f32> = x.iter().zip(&origin).map(|(x, o)| x - o).collect();
            let norms = pgd::l2_norms(&moved, 20);
            assert!((norms[0] - 0.1).abs() < 1e-6 && norms[1] == 0.0, "{path:?} {norms:?}");
            pgd::l2_step(&mut x, &gradient, &origin, &[0.1; 2], 0.15);
            let moved: Vec<f32> = x.iter().zip(&origin).map(|(x, o)| x - o).collect();
            assert!((pgd::l2_norms(&moved, 20)[0] - 0.15).abs() < 1e-6, "{path:?}");
        });
    }
}

#[test]
fn an_l2_step_along_any_gradient_leads_to_an_image() {
    for path in available() {
        with_path(path, || {
            // So small that the quotient of step and length overflows; so large that only f64 holds its square; none at all.
            for (slope, moves) in [(1e-43, true), (3e38, true), (0.0, false), (f32::INFINITY, false), (f32::NAN, false)]
            {
                let origin = vec![0.5; 20];
                let mut x = origin.clone();
                let mut gradient = vec![0.0; 20];
                gradient[3] = slope;
                pgd::l2_step(&mut x, &gradient, &origin, &[0.1], 0.15);
                assert!(x.iter().all(|x| (0.5..=0.6 + 1e-6).contains(x)), "{path:?} {slope}: {x:?}");
                assert_eq!(x[3] > 0.5, moves, "{path:?} {slope}");
            }
        });
    }
}

#[test]
fn sums_have_the_same_bits_for_any_number_of_threads() {
    let values = Rng::new(1).vec(100_001, 1.0);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        pool.install(|| (sum(&values).to_bits(), sum_of_squares(&values).to_bits()))
    };
    assert_eq!(run(1), run(2));
    assert_eq!(run(1), run(5));
}

#[test]
fn norm_gradients_have_the_same_bits_for_any_number_of_threads() {
    let mut rng = Rng::new(2);
    let (x, dy, weight) = (rng.vec(500 * 24, 1.0), rng.vec(500 * 24, 1.0), rng.vec(24, 1.0));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; 24], vec![0.0; 24]);
        pool.install(|| layer_norm_gradient(&x, &weight, 1e-6, &dy, &mut dx, Some((&mut dw, &mut db))));
        (dx, dw, db)
    };
    assert_eq!(run(1), run(3));
}
