//! Every operation on the software GPU against `advxl-kernels`.

mod support;

use advxl_cuda::{self as cuda, Gpu, Kind, Precision, Values, Wanted, pgd};
use advxl_kernels as cpu;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use support::{assert_near, host, in_any_order, numbers, pixels, rounded, soft};

/// Half of bf16's last place.
const BF16: f32 = 1.0 / 256.0;

fn send(gpu: &Gpu, values: &[f32], kind: Kind) -> Values {
    Values::send(gpu, values).cast(kind)
}

#[test]
fn the_self_test_passes() {
    soft().self_test().unwrap();
}

#[test]
fn layer_norm_and_its_gradients_are_the_cpus() {
    for (rows, width, kind, tolerance) in
        [(5, 8, Kind::F32, 2e-6), (9, 264, Kind::F32, 2e-6), (7, 40, Kind::Bf16, BF16)]
    {
        let (x, dy) = (numbers(rows * width, 1, 2.0), numbers(rows * width, 2, 1.0));
        let (x, dy) = if kind == Kind::Bf16 { (rounded(&x), rounded(&dy)) } else { (x, dy) };
        let (weight, bias) = (numbers(width, 3, 1.0), numbers(width, 4, 1.0));
        let found = in_any_order(|gpu| {
            let [w, b] = [&weight, &bias].map(|v| Values::send(gpu, v));
            let (y, saved) = cuda::layer_norm(&send(gpu, &x, kind), &w, &b, 1e-6, kind);
            let (dx, sums) = cuda::layer_norm_gradient(&saved, &w, &send(gpu, &dy, kind), None, true);
            let (to_weight, to_bias) = sums.unwrap();
            [y, dx, to_weight, to_bias].iter().flat_map(host).collect()
        });
        let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; rows * width]);
        let [mut to_weight, mut to_bias] = [(); 2].map(|()| vec![0.0; width]);
        cpu::layer_norm(&x, &weight, &bias, 1e-6, &mut y);
        cpu::layer_norm_gradient(&x, &weight, 1e-6, &dy, &mut dx, Some((&mut to_weight, &mut to_bias)));
        let (found_y, rest) = found.split_at(rows * width);
        let (found_dx, rest) = rest.split_at(rows * width);
        assert_near("y", found_y, &y, tolerance);
        assert_near("dx", found_dx, &dx, tolerance);
        assert_near("weight", &rest[..width], &to_weight, 2e-6);
        assert_near("bias", &rest[width..], &to_bias, 2e-6);
    }
}

#[test]
fn a_norm_far_from_zero_keeps_its_digits() {
    let gpu = soft();
    let x: Vec<f32> = numbers(4 * 64, 1, 1.0).iter().map(|v| v + 1000.0).collect();
    let (one, zero) = (Values::send(&gpu, &[1.0; 64]), Values::send(&gpu, &[0.0; 64]));
    let (y, _) = cuda::layer_norm(&Values::send(&gpu, &x), &one, &zero, 1e-6, Kind::F32);
    let mut right = vec![0.0; x.len()];
    cpu::layer_norm(&x, &[1.0; 64], &[0.0; 64], 1e-6, &mut right);
    assert_near("y", &host(&y), &right, 1e-4);
}

#[test]
fn every_gelu_and_its_gradient_are_the_cpus() {
    let (rows, width) = (21, 264);
    let x: Vec<f32> = numbers(rows * width, 1, 4.0);
    let dy = numbers(rows * width, 2, 1.0);
    for (kind, right) in
        [(cuda::Gelu::Erf, cpu::Gelu::Erf), (cuda::Gelu::Tanh, cpu::Gelu::Tanh), (cuda::Gelu::Quick, cpu::Gelu::Quick)]
    {
        let found = in_any_order(|gpu| {
            let (x, dy) = (Values::send(gpu, &x), Values::send(gpu, &dy));
            let (dx, sums) = cuda::gelu_gradient(kind, &x, &dy, width, true);
            [cuda::gelu(kind, &x), dx, sums.unwrap()].iter().flat_map(host).collect()
        });
        let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; rows * width]);
        let mut sums = vec![0.0; width];
        cpu::gelu(right, &x, &mut y);
        cpu::gelu_gradient(right, &x, &dy, &mut dx);
        cpu::sum_of_rows(&dx, &mut sums);
        let right: Vec<f32> = [y, dx, sums].concat();
        assert_near(&format!("{kind:?}"), &found, &right, 1e-6);
    }
    let gpu = soft();
    let extreme = Values::send(&gpu, &[-1e30, 1e30, -100.0, 100.0, 0.0, -0.0, f32::NAN, f32::INFINITY]);
    for kind in [cuda::Gelu::Erf, cuda::Gelu::Quick, cuda::Gelu::Tanh] {
        let y = host(&cuda::gelu(kind, &extreme));
        assert!(y[2].abs() < 1e-30 && y[3] == 100.0 && y[4] == 0.0, "{kind:?}: {y:?}");
        assert!(y[6].is_nan(), "{kind:?}: what is NaN stays NaN");
    }
}

#[test]
fn sums_over_rows_casts_and_sums_of_tensors_are_exact_where_they_can_be() {
    let (rows, width) = (1030, 16);
    let x: Vec<f32> = (0..rows * width).map(|i| (i % 7) as f32).collect();
    let mut right = vec![0.0; width];
    cpu::sum_of_rows(&x, &mut right);
    assert_eq!(in_any_order(|gpu| host(&cuda::sum_of_rows(&Values::send(gpu, &x), width))), right);
    // Ten classes: no multiple of eight.
    let mut right = vec![0.0; 10];
    cpu::sum_of_rows(&x[..1030 * 10], &mut right);
    assert_eq!(in_any_order(|gpu| host(&cuda::sum_of_rows(&Values::send(gpu, &x[..1030 * 10]), 10))), right);
    let gpu = soft();
    let noise = numbers(64, 3, 1.0);
    let values = Values::send(&gpu, &noise);
    assert_eq!(host(&values.cast(Kind::Bf16)), rounded(&noise));
    assert_eq!(host(&values.cast(Kind::Bf16).cast(Kind::F32)), rounded(&noise));
    assert_eq!(host(&cuda::add(&values, &values)), noise.iter().map(|v| v + v).collect::<Vec<_>>());
    assert_eq!(host(&values.part(8..24)), noise[8..24]);
    assert_eq!(host(&Values::zeros(&gpu, 9, Kind::Bf16)), [0.0; 9]);
}

/// On the CPU: the result and the gradient.
fn cpu_attention(shape: cuda::AttentionShape, qkv: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let cuda::AttentionShape { batch, tokens, heads, head_dim, .. } = shape;
    let shape = cpu::AttentionShape { batch, tokens, heads, head_dim };
    let (mut y, mut dqkv) = (vec![0.0; dy.len()], vec![0.0; qkv.len()]);
    let saved = cpu::attention(shape, cpu::Precision::F32, qkv, &mut y);
    cpu::attention_gradient(&saved, dy, &mut dqkv);
    (y, dqkv)
}

#[test]
fn attention_and_its_gradient_are_the_cpus_for_every_kernel() {
    let shape = |batch, tokens, heads, head_dim| cuda::AttentionShape { batch, tokens, heads, head_dim, causal: false };
    for (shape, kind, tolerance) in [
        // All scores in registers: the recipes' shapes, odd heads, one token, whole tiles.
        (shape(2, 50, 2, 64), Kind::Bf16, 0.01),
        (shape(1, 37, 2, 80), Kind::Bf16, 0.01),
        (shape(1, 65, 1, 64), Kind::Bf16, 0.01),
        (shape(1, 64, 1, 64), Kind::Bf16, 0.01),
        (shape(3, 17, 3, 24), Kind::Bf16, 0.01),
        (shape(1, 20, 2, 16), Kind::Bf16, 0.01),
        (shape(2, 1, 2, 8), Kind::Bf16, 0.01),
        // Tiles of 64: f32, and bf16 with heads too long for the others.
        (shape(2, 50, 2, 64), Kind::F32, 3e-6),
        (shape(1, 130, 2, 16), Kind::F32, 3e-6),
        (shape(2, 64, 1, 24), Kind::F32, 3e-6),
        (shape(2, 5, 3, 8), Kind::F32, 3e-6),
        (shape(1, 90, 1, 104), Kind::Bf16, 0.01),
        // Two tensors of a head in shared memory: a last tile of one row, more tiles than warps, whole tiles.
        (shape(1, 81, 2, 16), Kind::Bf16, 0.01),
        (shape(1, 197, 1, 64), Kind::Bf16, 0.01),
        (shape(2, 96, 1, 24), Kind::Bf16, 0.01),
        (shape(1, 265, 1, 8), Kind::Bf16, 0.01),
        // More heads than blocks: the gradient's kernel takes the next one. A tile a warp, two, and one that all share.
        (shape(3, 97, 2, 16), Kind::Bf16, 0.01),
        (shape(1, 128, 1, 64), Kind::Bf16, 0.01),
        (shape(1, 144, 1, 72), Kind::Bf16, 0.01),
        (shape(1, 163, 5, 24), Kind::Bf16, 0.01),
        (shape(1, 197, 1, 80), Kind::Bf16, 0.01),
        (shape(3, 257, 1, 8), Kind::Bf16, 0.01),
        (shape(1, 257, 1, 80), Kind::Bf16, 0.01),
        (shape(1, 272, 1, 64), Kind::Bf16, 0.01),
        // Heads and samples that the gradient takes two kernels for.
        (shape(1, 120, 1, 88), Kind::Bf16, 0.01),
        (shape(1, 280, 1, 8), Kind::Bf16, 0.01),
    ] {
        let inner = shape.heads * shape.head_dim;
        let elements = shape.batch * shape.tokens * inner;
        let (qkv, dy) = (rounded(&numbers(3 * elements, 1, 1.0)), rounded(&numbers(elements, 2, 1.0)));
        let (y, dqkv) = cpu_attention(shape, &qkv, &dy);
        let found = in_any_order(|gpu| {
            let (found, saved) = cuda::attention(shape, &send(gpu, &qkv, kind));
            let gradient = cuda::attention_gradient(&saved, &send(gpu, &dy, kind));
            [host(&found), host(&gradient)].concat()
        });
        assert_near(&format!("{shape:?} {kind:?}"), &found[..elements], &y, tolerance);
        assert_near(&format!("gradient of {shape:?} {kind:?}"), &found[elements..], &dqkv, tolerance);
    }
}

#[test]
fn patches_hold_their_pixels_and_the_gradient_finds_them_again() {
    for (size, patch) in [(8, 4), (28, 14)] {
        let (mean, factor) = ([0.1, 0.2, 0.3], [1.5, 2.0, 2.5]);
        let right = cpu::Patches { batch: 2, size, patch, mean, factor };
        let images = pixels(2 * 3 * size * size, 1);
        let mut cut = vec![0.0; images.len()];
        right.cut(&images, &mut cut);
        let (length, grid) = (3 * patch * patch, size / patch);
        let gpu = soft();
        let [mean, factor] = [mean, factor].map(|values| Values::send(&gpu, &values));
        let patches = cuda::Patches { batch: 2, size, patch, mean, factor };
        let found = patches.cut(&Values::send(&gpu, &images), Kind::F32);
        let stride = patches.stride();
        let rows: Vec<f32> = host(&found).chunks(stride).flat_map(|row| row[..length].to_vec()).collect();
        assert_eq!(rows, cut);
        assert!(host(&found).chunks(stride).all(|row| row[length..].iter().all(|v| *v == 0.0)));
        assert_eq!(found.len(), 2 * grid * grid * stride);
        let mut gradient = vec![0.0; images.len()];
        right.gradient(&cut, &mut gradient);
        assert_eq!(host(&patches.gradient(&found)), gradient);
    }
}

#[test]
fn tokens_and_pools_move_values_where_they_belong() {
    let (batch, tokens, width) = (3, 5, 16);
    let gpu = soft();
    for class_token in [false, true] {
        let prefix = usize::from(class_token);
        let layout = cuda::Tokens { tokens, width, class_token };
        let patches = numbers(batch * (tokens - prefix) * width, 1, 1.0);
        let (places, class) = (numbers(tokens * width, 2, 1.0), numbers(width, 3, 1.0));
        let sent = Values::send(&gpu, &class);
        let found = layout.assemble(
            &Values::send(&gpu, &patches),
            &Values::send(&gpu, &places),
            class_token.then_some(&sent),
            None,
            Kind::F32,
        );
        let value = |sample: usize, token: usize, i: usize| match token < prefix {
            true => class[i],
            false => patches[(sample * (tokens - prefix) + token - prefix) * width + i],
        };
        let all = |of: &dyn Fn(usize, usize, usize) -> f32| -> Vec<f32> {
            let places = (0..batch).flat_map(|s| (0..tokens).flat_map(move |t| (0..width).map(move |i| (s, t, i))));
            places.map(|(s, t, i)| of(s, t, i)).collect()
        };
        assert_eq!(host(&found), all(&|s, t, i| value(s, t, i) + places[t * width + i]));

        let d = numbers(batch * tokens * width, 4, 1.0);
        let sent = Values::send(&gpu, &d);
        let cut: Vec<f32> = d.chunks(tokens * width).flat_map(|sample| sample[prefix * width..].to_vec()).collect();
        assert_eq!(host(&layout.patches_gradient(&sent, Kind::F32)), cut);
        let mut sums = vec![0.0; tokens * width];
        cpu::sum_of_rows(&d, &mut sums);
        assert_near("places", &host(&layout.places_gradient(&sent, None)), &sums, 1e-6);

        let pool = cuda::Pool { tokens, width, first: prefix, end: tokens };
        let count = (tokens - prefix) as f32;
        let mean = |s: usize, i: usize| (prefix..tokens).map(|t| d[(s * tokens + t) * width + i]).sum::<f32>() / count;
        let means: Vec<f32> = (0..batch).flat_map(|s| (0..width).map(move |i| mean(s, i))).collect();
        let pooled = pool.forward(&sent);
        assert_near("pool", &host(&pooled), &means, 1e-6);
        let back = host(&pool.gradient(&pooled, Kind::F32));
        let right = all(&|s, t, i| if t < prefix { 0.0 } else { means[s * width + i] / count });
        assert_near("gradient of the pool", &back, &right, 1e-6);
    }
}

#[test]
fn what_moves_values_or_sums_them_in_f32_rounds_once_in_bf16() {
    let (batch, tokens, width) = (3, 5, 16);
    let gpu = soft();
    let both = |values: &[f32]| [Kind::Bf16, Kind::F32].map(|kind| send(&gpu, &rounded(values), kind));

    let [mean, factor] = [[0.1, 0.2, 0.3], [1.5, 2.0, 2.5]].map(|values| Values::send(&gpu, &values));
    let patches = cuda::Patches { batch: 2, size: 8, patch: 4, mean, factor };
    let images = Values::send(&gpu, &pixels(2 * 3 * 8 * 8, 1));
    let [narrow, wide] = [Kind::Bf16, Kind::F32].map(|kind| host(&patches.cut(&images, kind)));
    assert_eq!(narrow, rounded(&wide));
    let [narrow, wide] = both(&wide).map(|d| host(&patches.gradient(&d)));
    assert_eq!(narrow, wide);

    let layout = cuda::Tokens { tokens, width, class_token: false };
    let x = numbers(batch * tokens * width, 2, 1.0);
    let places = Values::send(&gpu, &numbers(tokens * width, 3, 1.0));
    let [narrow, wide] = both(&x).map(|x| host(&layout.assemble(&x, &places, None, None, Kind::F32)));
    assert_eq!(narrow, wide);
    let d = Values::send(&gpu, &x);
    assert_eq!(host(&layout.patches_gradient(&d, Kind::Bf16)), rounded(&x));

    let pool = cuda::Pool { tokens, width, first: 1, end: tokens };
    let [narrow, wide] = both(&x).map(|x| host(&pool.forward(&x)));
    assert_eq!(narrow, wide);
    let d = Values::send(&gpu, &narrow);
    assert_eq!(host(&pool.gradient(&d, Kind::Bf16)), rounded(&host(&pool.gradient(&d, Kind::F32))));

    // A width that is not a multiple of eight.
    let [x, dy] = [both(&x), both(&numbers(x.len(), 4, 1.0))];
    let slopes = |at: usize| host(&cuda::gelu_gradient(cuda::Gelu::Erf, &x[at], &dy[at], 5, false).0);
    assert_eq!(slopes(0), rounded(&slopes(1)));
}

#[test]
fn masked_patches_leave_and_their_places_get_no_gradient() {
    let (batch, patches, width) = (3, 6, 16);
    let which = [4, 0, 5, 2, 1, 3];
    let count = 2;
    for prefix in [0, 1] {
        let (x, places) = (numbers(batch * patches * width, 1, 1.0), numbers((patches + prefix) * width, 2, 1.0));
        let (class, d) = (numbers(width, 3, 1.0), numbers(batch * (count + prefix) * width, 4, 1.0));
        let layout = cuda::Tokens { tokens: count + prefix, width, class_token: prefix == 1 };
        for kind in [Kind::F32, Kind::Bf16] {
            let found = in_any_order(|gpu| {
                let kept = cuda::Kept::new(gpu, batch, patches, &which);
                let rows = kept.rows(&send(gpu, &x, kind), width);
                let class = Values::send(gpu, &class);
                let class = (prefix == 1).then_some(&class);
                let tokens = layout.assemble(&rows, &Values::send(gpu, &places), class, Some(&kept), kind);
                let back = kept.rows_gradient(&layout.patches_gradient(&send(gpu, &d, kind), kind), width);
                let of_places = layout.places_gradient(&send(gpu, &d, kind), Some(&kept));
                [tokens, back, of_places].iter().flat_map(host).collect()
            });
            let rounded = |values: &[f32]| if kind == Kind::Bf16 { rounded(values) } else { values.to_vec() };
            let (x, d) = (rounded(&x), rounded(&d));
            let mut tokens = Vec::new();
            let mut back = vec![0.0; batch * patches * width];
            let mut of_places = vec![0.0; (patches + prefix) * width];
            for sample in 0..batch {
                for token in 0..count + prefix {
                    let slope = &d[(sample * (count + prefix) + token) * width..][..width];
                    let patch = token.checked_sub(prefix).map(|token| which[sample * count + token]);
                    let from = patch.map_or(&class[..], |patch| &x[(sample * patches + patch) * width..][..width]);
                    let place = patch.map_or(0, |patch| patch + prefix) * width;
                    tokens.extend(from.iter().zip(&places[place..]).map(|(a, b)| a + b));
                    of_places[place..][..width].iter_mut().zip(slope).for_each(|(sum, v)| *sum += v);
                    if let Some(patch) = patch {
                        back[(sample * patches + patch) * width..][..width].copy_from_slice(slope);
                    }
                }
            }
            assert_near("masked", &found, &[rounded(&tokens), back, of_places].concat(), 1e-6);
        }
    }
}

#[test]
fn cross_entropy_and_its_slope_are_those_of_the_softmax_in_f64() {
    for classes in [2, 10, 1000] {
        let rows = 3;
        let logits = numbers(rows * classes, 1, 3.0);
        // Two classes mixed, with smoothing.
        let mut targets = vec![0.1 / classes as f32; rows * classes];
        for row in 0..rows {
            targets[row * classes + row % classes] += 0.6;
            targets[row * classes + classes - 1] += 0.3;
        }
        let found = in_any_order(|gpu| {
            let [l, t] = [&logits, &targets].map(|values| Values::send(gpu, values));
            let (losses, slopes) = cuda::cross_entropy(&l, &t, classes, 0.5);
            [host(&losses), host(&slopes), host(&cuda::total(&losses))].concat()
        });
        let (mut losses, mut slopes) = (Vec::new(), Vec::new());
        for (logits, targets) in logits.chunks(classes).zip(targets.chunks(classes)) {
            let sum: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
            let terms = logits.iter().zip(targets).map(|(l, t)| f64::from(*t) * (sum.ln() - f64::from(*l)));
            losses.push(terms.sum::<f64>() as f32);
            let slope = |l: &f32, t: &f32| (0.5 * (f64::from(*l).exp() / sum - f64::from(*t))) as f32;
            slopes.extend(logits.iter().zip(targets).map(|(l, t)| slope(l, t)));
        }
        let total = losses.iter().sum();
        assert_near("losses", &found[..rows], &losses, 1e-6);
        assert_near("slopes", &found[rows..rows + rows * classes], &slopes, 1e-6);
        assert_near("total", &found[rows + rows * classes..], &[total], 1e-6);
    }
}

#[test]
fn the_first_of_equal_logits_wins_and_what_is_not_a_number_is_wrong() {
    let classes = 300;
    let mut logits = numbers(5 * classes, 1, 1.0);
    logits[257] = 50.0; // row 0: clear
    logits[classes + 7] = 50.0; // row 1: twice, label the first
    logits[classes + 290] = 50.0;
    logits[2 * classes + 7] = 50.0; // row 2: twice, label the second
    logits[2 * classes + 8] = 50.0;
    logits[3 * classes + 9] = 50.0; // row 3: not a number elsewhere
    logits[3 * classes + 299] = f32::NAN;
    logits[4 * classes..].fill(f32::NEG_INFINITY); // row 4: all equal
    let labels = [257.0, 7.0, 8.0, 9.0, 0.0];
    let found =
        in_any_order(|gpu| host(&cuda::right(&Values::send(gpu, &logits), &Values::send(gpu, &labels), classes)));
    assert_eq!(found[..4], [1.0, 1.0, 0.0, 0.0]);
}

#[test]
fn attack_steps_have_the_cpus_bits() {
    let (samples, len) = (3, 300);
    let origin = pixels(samples * len, 1);
    let mut gradient = numbers(samples * len, 2, 1.0);
    gradient[5] = 0.0;
    gradient[6] = f32::NAN;
    let x: Vec<f32> =
        origin.iter().zip(numbers(samples * len, 3, 0.02)).map(|(o, n)| (o + n).clamp(0.0, 1.0)).collect();
    let steps = [0.01, 0.0, 0.5];
    let on_gpu = |step: &dyn Fn(&mut Values, &Values, &Values, &Values), gradient: &[f32]| {
        in_any_order(|gpu| {
            let mut moved = Values::send(gpu, &x);
            let kept = moved.clone();
            let [g, o] = [gradient, &origin].map(|values| Values::send(gpu, values));
            step(&mut moved, &g, &o, &Values::send(gpu, &steps));
            assert_eq!(host(&kept), x, "shared values stay as they are");
            host(&moved)
        })
    };
    let mut right = x.clone();
    cpu::pgd::linf_step(&mut right, &gradient, &origin, &steps, 0.03);
    assert_eq!(on_gpu(&|x, g, o, s| pgd::linf_step(x, g, o, s, 0.03), &gradient), right);
    gradient[6] = 1.0;
    gradient[len..2 * len].fill(0.0);
    let mut right = x.clone();
    cpu::pgd::l2_step(&mut right, &gradient, &origin, &steps, 0.4);
    // Sums of squares in another order: the last place may differ.
    assert_near("l2", &on_gpu(&|x, g, o, s| pgd::l2_step(x, g, o, s, 0.4), &gradient), &right, 2e-7);
}

#[test]
fn a_pixel_that_is_not_a_number_stays_so() {
    let gpu = soft();
    let broken = Values::send(&gpu, &[f32::NAN; 8]);
    let (zero, steps) = (Values::zeros(&gpu, 8, Kind::F32), Values::send(&gpu, &[0.1]));
    let draws = pgd::Draws { seed: 1, purpose: 5, keys: &[1], sub_key: 0 };
    let (mut linf, mut l2) = (broken.clone(), broken.clone());
    pgd::linf_step(&mut linf, &zero, &zero, &steps, 0.1);
    pgd::l2_step(&mut l2, &zero, &zero, &steps, 0.1);
    for values in [linf, l2, pgd::linf_start(&broken, &draws, 0.1)] {
        assert!(host(&values).iter().all(|v| v.is_nan()));
    }
}

#[test]
fn random_starts_have_the_bits_of_the_programs_streams() {
    for len in [4100, 4104] {
        starts_have_the_right_bits(len);
    }
}

/// The program's stream of an image.
fn stream(draws: &pgd::Draws, key: u64) -> ChaCha8Rng {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&draws.seed.to_le_bytes());
    seed[8..12].copy_from_slice(&draws.purpose.to_le_bytes());
    seed[16..24].copy_from_slice(&key.to_le_bytes());
    seed[24..].copy_from_slice(&draws.sub_key.to_le_bytes());
    ChaCha8Rng::from_seed(seed)
}

fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

fn starts_have_the_right_bits(len: usize) {
    let epsilon = 8.0f32 / 255.0;
    let keys = [3, u64::MAX - 5];
    let origin = pixels(2 * len, 1);
    let gpu = soft();
    let draws = pgd::Draws { seed: 0x0123_4567_89ab_cdef, purpose: 5, keys: &keys, sub_key: 77 };
    let found = host(&pgd::linf_start(&Values::send(&gpu, &origin), &draws, epsilon));
    let mut right = Vec::new();
    for (key, origin) in keys.iter().zip(origin.chunks(len)) {
        let mut rng = stream(&draws, *key);
        for pixel in origin {
            right.push((pixel + (-epsilon + (epsilon - -epsilon) * uniform(&mut rng))).clamp(0.0, 1.0));
        }
    }
    assert_eq!(found, right);
}

#[test]
fn random_starts_in_the_l2_ball_are_those_of_the_programs_streams() {
    let (keys, epsilon) = ([4, 9], 0.5);
    for len in [301, 4096] {
        let origin = pixels(2 * len, 1);
        let draws = pgd::Draws { seed: 5, purpose: 5, keys: &keys, sub_key: 1 };
        let found = in_any_order(|gpu| host(&pgd::l2_start(&Values::send(gpu, &origin), &draws, epsilon)));
        let mut right = Vec::new();
        for (key, origin) in keys.iter().zip(origin.chunks(len)) {
            let mut rng = stream(&draws, *key);
            let mut normal = || {
                let radius = (-2.0 * (1.0 - f64::from(uniform(&mut rng))).ln()).sqrt();
                (radius * (std::f64::consts::TAU * f64::from(uniform(&mut rng))).cos()) as f32
            };
            let noise: Vec<f32> = (0..len).map(|_| normal()).collect();
            let length = noise.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let factor = (f64::from(epsilon) * f64::from(uniform(&mut rng)) / length) as f32;
            right.extend(origin.iter().zip(noise).map(|(o, n)| (o + n * factor).clamp(0.0, 1.0)));
        }
        assert_near("start", &found, &right, 2e-7);
    }
}

#[test]
fn adamw_over_a_list_of_tensors_has_the_cpus_bits() {
    let lens = [5, 4096, 1, 9001];
    let update = cuda::AdamW {
        learning_rate: 1e-3,
        betas: (0.9, 0.95),
        eps: 1e-8,
        step: 3,
        gradient_scale: 0.7,
        average_decay: 0.99,
    };
    let decays = [0.1, 0.0, 0.05, 0.1];
    // Powers of two, so that the product with the learning rate is exact.
    let rates = [1.0, 0.5, 2.0, 0.25];
    let tensors = |index: usize| {
        let [w, g, m, a] = [1, 2, 3, 5].map(|seed| numbers(lens[index], 10 * index as u64 + seed, 1.0));
        let v: Vec<f32> = numbers(lens[index], 4, 1.0).iter().map(|v| v * v).collect();
        [w, g, m, v, a]
    };
    let found = in_any_order(|gpu| {
        let mut all: Vec<_> = (0..4).map(|index| tensors(index).map(|values| Values::send(gpu, &values))).collect();
        let mut parameters = Vec::new();
        for (index, [weights, gradient, first, second, average]) in all.iter_mut().enumerate() {
            let average = (index != 1).then_some(average);
            let (weight_decay, rounded) = (decays[index], index % 2 == 1);
            parameters.push(cuda::Parameter {
                weights,
                gradient,
                first,
                second,
                average,
                weight_decay,
                rate: rates[index],
                rounded,
            });
        }
        update.update(gpu, &mut parameters);
        for [weights, ..] in &all {
            // Written with the update or now.
            assert_eq!(host(&weights.cast(Kind::Bf16)), rounded(&host(weights)));
        }
        all.iter().flatten().flat_map(host).collect()
    });
    let mut right = Vec::new();
    for (index, weight_decay) in decays.into_iter().enumerate() {
        let [mut w, g, mut m, mut v, mut a] = tensors(index);
        let cuda::AdamW { learning_rate, betas, eps, step, gradient_scale, average_decay } = update;
        let learning_rate = learning_rate * rates[index];
        let same = cpu::AdamW { learning_rate, betas, eps, weight_decay, step, gradient_scale, average_decay };
        same.update(&mut w, &g, &mut m, &mut v, (index != 1).then_some(&mut a));
        right.extend([w, g, m, v, a].concat());
    }
    assert_eq!(found, right);
}

#[test]
fn the_gradients_norm_is_summed_in_f64() {
    let tensors = [numbers(5000, 1, 1.0), numbers(3, 2, 1e-3), numbers(4096, 3, 100.0)];
    let right: f64 = tensors.iter().map(|values| cpu::sum_of_squares(values)).sum();
    let gpu = soft();
    let sent = tensors.each_ref().map(|values| Values::send(&gpu, values));
    let found = cuda::sum_of_squares(&gpu, &sent.each_ref()).unwrap();
    assert!((found / right - 1.0).abs() < 1e-13, "{found} and {right}");
    assert_eq!(cuda::sum_of_squares(&gpu, &[]).unwrap(), 0.0);
}

#[test]
fn a_layer_and_its_gradients_are_products_of_matrices() {
    // Patches of 14 pixels have rows that are not a multiple of eight.
    for inputs in [16, 20] {
        layer_is_a_product(5, inputs, 24);
    }
}

fn layer_is_a_product(rows: usize, inputs: usize, outputs: usize) {
    let (x, dy) = (rounded(&numbers(rows * inputs, 1, 1.0)), rounded(&numbers(rows * outputs, 2, 1.0)));
    let (weight, bias) = (rounded(&numbers(outputs * inputs, 3, 1.0)), rounded(&numbers(outputs, 4, 1.0)));
    let sum = |count: usize, of: &dyn Fn(usize) -> f32| (0..count).map(|k| f64::from(of(k))).sum::<f64>() as f32;
    let grid = |rows: usize, columns: usize, of: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).map(|(r, c)| of(r, c)).collect()
    };
    let y = grid(rows, outputs, &|r, o| bias[o] + sum(inputs, &|k| x[r * inputs + k] * weight[o * inputs + k]));
    let dx = grid(rows, inputs, &|r, i| sum(outputs, &|k| dy[r * outputs + k] * weight[k * inputs + i]));
    let dw = grid(outputs, inputs, &|o, i| sum(rows, &|k| dy[k * outputs + o] * x[k * inputs + i]));
    let mut db = vec![0.0; outputs];
    cpu::sum_of_rows(&dy, &mut db);
    let gpu = soft();
    for (precision, tolerance) in [(Precision::F32, 1e-6), (Precision::Tf32, 1e-6), (Precision::Bf16, BF16)] {
        let kind = precision.kind();
        let layer = cuda::Linear::new(&Values::send(&gpu, &weight), &Values::send(&gpu, &bias), precision);
        let filled: Vec<f32> =
            x.chunks(inputs).flat_map(|row| [row, &vec![0.0; layer.inputs() - inputs]].concat()).collect();
        let (x, dy) = (send(&gpu, &filled, kind), send(&gpu, &dy, kind));
        assert_near("y", &host(&layer.forward(&x, kind)), &y, tolerance);
        assert_near("y in f32", &host(&layer.forward(&x, Kind::F32)), &y, 1e-6);
        let found = host(&layer.input_gradient(&dy));
        let found: Vec<f32> = found.chunks(layer.inputs()).flat_map(|row| row[..inputs].to_vec()).collect();
        assert_near("dx", &found, &dx, tolerance);
        assert_near("dw", &host(&layer.weight_gradient(&x, &dy)), &dw, 1e-6);
        assert_near("db", &host(&layer.bias_gradient(&dy)), &db, 1e-6);
    }
}

/// A block's weights as the CPU's slices name them.
fn block_weights(width: usize, hidden: usize) -> [Vec<f32>; 12] {
    let scale = 1.0 / (width as f32).sqrt();
    let ones = |seed| numbers(width, seed, 0.2).iter().map(|v| v + 1.0).collect();
    [
        ones(1),
        numbers(width, 2, 0.2),
        numbers(3 * width * width, 3, 1.5 * scale),
        numbers(3 * width, 4, 0.2),
        numbers(width * width, 5, scale),
        numbers(width, 6, 0.2),
        ones(7),
        numbers(width, 8, 0.2),
        numbers(hidden * width, 9, scale),
        numbers(hidden, 10, 0.2),
        numbers(width * hidden, 11, scale),
        numbers(width, 12, 0.2),
    ]
}

/// y, dx and the twelve gradients on the CPU, in f32.
fn cpu_block(
    shape: cuda::BlockShape,
    weights: &[Vec<f32>; 12],
    gelu: cpu::Gelu,
    path: Option<&[Vec<f32>; 2]>,
    x: &[f32],
    dy: &[f32],
) -> [Vec<f32>; 14] {
    let cuda::BlockShape { batch, tokens, width, heads, hidden, .. } = shape;
    let shape = cpu::BlockShape { batch, tokens, width, heads, hidden };
    let slices = cpu::BlockWeights::from_array(weights.each_ref().map(|values| &values[..]));
    let packed = cpu::PackedBlock::new(heads, &slices, cpu::Precision::F32);
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let path = path.map(|[first, second]| (&first[..], &second[..]));
    let saved = cpu::block_forward(shape, &packed, gelu, 1e-6, path, x, &mut y, cpu::Wanted::Weights).unwrap();
    let mut all = cpu::BlockGradients::new(width, hidden);
    cpu::block_backward(&packed, &saved, dy, &mut dx, Some(&mut all));
    let mut results = vec![y, dx];
    results.extend(all.iter().map(|values| values.to_vec()));
    results.try_into().unwrap()
}

#[test]
fn a_block_and_all_its_gradients_are_the_cpus() {
    let shape = cuda::BlockShape { batch: 3, tokens: 17, width: 48, heads: 2, hidden: 96, causal: false };
    let weights = block_weights(48, 96);
    let (x, dy) = (numbers(shape.elements(), 20, 1.0), numbers(shape.elements(), 21, 1.0));
    let dropped = [vec![1.25, 0.0, 1.25], vec![0.0, 1.25, 1.25]];
    for (precision, stream, gelu, path, tolerance) in [
        (Precision::F32, Kind::F32, (cuda::Gelu::Erf, cpu::Gelu::Erf), None, 4e-6),
        (Precision::F32, Kind::F32, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), Some(&dropped), 4e-6),
        (Precision::Bf16, Kind::F32, (cuda::Gelu::Erf, cpu::Gelu::Erf), Some(&dropped), 0.02),
        (Precision::Bf16, Kind::F32, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), None, 0.02),
        (Precision::Bf16, Kind::Bf16, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), None, 0.02),
        (Precision::Bf16, Kind::Bf16, (cuda::Gelu::Quick, cpu::Gelu::Quick), Some(&dropped), 0.02),
    ] {
        let right = cpu_block(shape, &weights, gelu.1, path, &x, &dy);
        let what = format!("{precision:?} {stream:?} {:?} dropped {}", gelu.0, path.is_some());
        let run = |gpu: &Gpu, wanted| {
            let list = cuda::BlockWeights::of(weights.each_ref().map(|values| Values::send(gpu, values)));
            let block = cuda::Block::new(shape.heads, &list, precision);
            let path = path.map(|factors| factors.each_ref().map(|values| Values::send(gpu, values)));
            let path = path.as_ref().map(|[first, second]| (first, second));
            let x = send(gpu, &x, stream);
            let (y, saved) = cuda::block_forward(shape, &block, gelu.0, 1e-6, path, &x, wanted);
            let Some(saved) = saved else { return vec![host(&y)] };
            let (dx, gradients) = cuda::block_backward(&block, &saved, &send(gpu, &dy, stream), wanted);
            let mut all = vec![host(&y), host(&dx)];
            all.extend(gradients.into_iter().flat_map(|gradients| gradients.in_order()).map(|values| host(&values)));
            all
        };
        let gpu = soft();
        let found = run(&gpu, Wanted::Weights);
        assert_eq!(found.len(), 14);
        for (index, (found, right)) in found.iter().zip(&right).enumerate() {
            assert_near(&format!("{what}, result {index}"), found, right, tolerance);
        }
        // An attack's passes give the same bits, and saved values come back for the next pass.
        assert_eq!(run(&gpu, Wanted::Input), found[..2], "{what}");
        assert_eq!(run(&gpu, Wanted::Nothing), found[..1], "{what}");
        gpu.shuffle_threads(99);
        assert_eq!(run(&gpu, Wanted::Weights), found, "{what}, other order");
    }
}

#[test]
fn running_out_of_memory_is_an_error_that_says_what_to_do() {
    let gpu = soft();
    let kept = Values::zeros(&gpu, 1 << 20, Kind::F32);
    let large = Values::zeros(&gpu, 300 << 20, Kind::F32);
    let nothing = cuda::gelu(cuda::Gelu::Erf, &large);
    for error in [nothing.to_vec().unwrap_err(), kept.to_vec().unwrap_err(), gpu.check().unwrap_err()] {
        assert_eq!(error.kind(), cuda::ErrorKind::Memory);
        for part in ["1200 MiB", "in use", "hint: ", "smaller batch"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
    drop((large, nothing));
    assert!(gpu.forget_memory_error().is_some());
    assert_eq!(host(&kept), vec![0.0; 1 << 20], "what was there before is whole");
    assert_eq!(host(&cuda::gelu(cuda::Gelu::Erf, &kept)), vec![0.0; 1 << 20]);
}

#[test]
fn memory_is_used_again_and_copies_are_counted() {
    let gpu = soft();
    let before = gpu.usage().0;
    let x = Values::send(&gpu, &numbers(4096, 1, 1.0));
    for _ in 0..20 {
        cuda::gelu(cuda::Gelu::Erf, &x);
    }
    let (used, most) = gpu.usage();
    assert_eq!(used - before, 16 << 10);
    assert_eq!(most - before, 32 << 10);
    assert_eq!(gpu.traffic(), cuda::Traffic { sent: (1, 16 << 10), fetched: (0, 0), unplanned: (0, 0) });
    host(&x);
    assert_eq!(gpu.traffic().fetched, (1, 16 << 10));
}
