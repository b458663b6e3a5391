//! Steps and starts of attacks in the l1 ball, and starts on surfaces, on the software GPU against the program's
//! definitions (`src/attack/l1.rs` and `threat.rs`), written out once more below.

mod support;

use advxl_cuda::{Gpu, Values, pgd};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use support::{assert_near, few, host, in_any_order, numbers, pixels, soft};

/// The projection in place, by sorting the breaks of the falling sum.
fn project(image: &mut [f32], clean: &[f32], epsilon: f64) {
    let change = |x: f32, c: f32| f64::from(x) - f64::from(c);
    let cap = |change: f64, c: f32| if change > 0.0 { 1.0 - f64::from(c) } else { f64::from(c) };
    let pairs: Vec<(f64, f64)> =
        image.iter().zip(clean).map(|(x, c)| (change(*x, *c), cap(change(*x, *c), *c))).collect();
    let capped: f64 = pairs.iter().map(|(change, cap)| change.abs().min(*cap)).sum();
    let mut threshold = 0.0;
    if capped > epsilon {
        let mut breaks = Vec::new();
        for (change, cap) in pairs.iter().filter(|(change, _)| *change != 0.0) {
            breaks.push(((change.abs() - cap).max(0.0), 1.0));
            breaks.push((change.abs(), -1.0));
        }
        breaks.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (mut sum, mut slope, mut at) = (capped, 0.0, 0.0);
        for (place, turn) in breaks {
            let next = sum - slope * (place - at);
            if next <= epsilon && slope > 0.0 {
                threshold = at + (sum - epsilon) / slope;
                break;
            }
            (sum, at, slope) = (next, place, slope + turn);
            threshold = at;
        }
    }
    for ((x, c), (change, cap)) in image.iter_mut().zip(clean).zip(pairs) {
        let size = (change.abs() - threshold).max(0.0).min(cap);
        if size != change.abs() {
            *x = towards(*c, size.copysign(change));
        }
    }
}

fn towards(clean: f32, change: f64) -> f32 {
    let rounded = (f64::from(clean) + change) as f32;
    match ((f64::from(rounded) - f64::from(clean)).abs() > change.abs(), change > 0.0) {
        (false, _) => rounded,
        (true, true) => rounded.next_down(),
        (true, false) => rounded.next_up(),
    }
}

fn steepest(gradient: &mut [f32], at: &[f32]) {
    let free = |slope: f32, pixel: f32| (slope > 0.0 && pixel < 1.0) || (slope < 0.0 && pixel > 0.0);
    let mut order: Vec<usize> = (0..gradient.len()).filter(|&i| free(gradient[i], at[i])).collect();
    let count = (gradient.len() / 100).max(1).min(order.len());
    order.sort_by(|&a, &b| gradient[b].abs().total_cmp(&gradient[a].abs()));
    let steps: Vec<_> = order[..count].iter().map(|&i| (i, gradient[i].signum() / count as f32)).collect();
    gradient.fill(0.0);
    steps.into_iter().for_each(|(index, step)| gradient[index] = step);
}

fn steepest_share(gradient: &mut [f32], share: f64) {
    let pixels = gradient.len();
    let rank = (((1.0 - share) * pixels as f64).max(0.0) as usize).min(pixels - 1);
    let mut sizes: Vec<f32> = gradient.iter().map(|slope| slope.abs()).collect();
    let least = *sizes.select_nth_unstable_by(rank, f32::total_cmp).1;
    let taken = |slope: f32| slope.abs() >= least && slope != 0.0;
    let count = gradient.iter().filter(|slope| taken(**slope)).count();
    gradient.iter_mut().for_each(|s| *s = if taken(*s) { s.signum() / count as f32 } else { 0.0 });
}

/// The step of the definition, by a direction.
fn step(
    x: &[f32],
    gradient: &[f32],
    origin: &[f32],
    steps: &[f32],
    epsilon: f64,
    direction: impl Fn(usize, &mut [f32], &[f32]),
) -> Vec<f32> {
    let len = x.len() / steps.len();
    let (mut x, mut moves) = (x.to_vec(), gradient.to_vec());
    for (index, (x, moves)) in x.chunks_mut(len).zip(moves.chunks_mut(len)).enumerate() {
        direction(index, moves, x);
        x.iter_mut().zip(moves).for_each(|(x, change)| *x += *change * steps[index]);
        project(x, &origin[index * len..][..len], epsilon);
    }
    x
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum()
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Hundredth,
    Share(f64),
}

fn on_gpu(kind: Kind, x: &[f32], gradient: &[f32], origin: &[f32], steps: &[f32], epsilon: f64) -> Vec<f32> {
    in_any_order(|gpu| {
        let mut moved = Values::send(gpu, x);
        let kept = moved.clone();
        let [g, o, s] = [gradient, origin, steps].map(|values| Values::send(gpu, values));
        match kind {
            Kind::Hundredth => pgd::l1_step(&mut moved, &g, &o, &s, epsilon),
            Kind::Share(share) => {
                let shares: Vec<f64> = (0..steps.len()).map(|i| share / (i + 1) as f64).collect();
                pgd::l1_sparse_step(&mut moved, &g, &o, &s, &shares, epsilon);
            }
        }
        assert_eq!(host(&kept), x, "shared values stay as they are");
        host(&moved)
    })
}

fn on_cpu(kind: Kind, x: &[f32], gradient: &[f32], origin: &[f32], steps: &[f32], epsilon: f64) -> Vec<f32> {
    step(x, gradient, origin, steps, epsilon, |index, slopes, at| match kind {
        Kind::Hundredth => steepest(slopes, at),
        Kind::Share(share) => steepest_share(slopes, share / (index + 1) as f64),
    })
}

#[test]
fn a_step_in_the_l1_ball_moves_the_pixels_of_the_definition() {
    for &(samples, len) in few(&[(2, 1200), (1, 50), (1, 1)], 1) {
        let origin = pixels(samples * len, 1);
        let mut x: Vec<f32> =
            origin.iter().zip(numbers(samples * len, 3, 0.01)).map(|(o, n)| (o + n).clamp(0.0, 1.0)).collect();
        // Pixels at the ends of the range, slopes of zero, equal slopes in plenty, what is not a number.
        x.iter_mut().step_by(7).for_each(|v| *v = v.round());
        let smooth = numbers(samples * len, 2, 1.0);
        let rough: Vec<f32> = smooth.iter().map(|v| (v * 2.0).round()).collect();
        let mut broken = smooth.clone();
        broken.iter_mut().step_by(5).for_each(|v| *v = f32::NAN);
        broken.iter_mut().skip(1).step_by(50).for_each(|v| *v = f32::INFINITY);
        let tiny: Vec<f32> = rough.iter().map(|v| v * f32::from_bits(1)).collect();
        let flat = vec![0.0; samples * len];
        let steps: Vec<f32> = (0..samples).map(|i| 0.7 + i as f32).collect();
        let (hundredth, share) = (Kind::Hundredth, Kind::Share(0.2));
        let cases = [&smooth, &rough, &broken, &tiny, &flat]
            .into_iter()
            .flat_map(|gradient| [(hundredth, gradient), (share, gradient)])
            .chain([1.0, 0.001, 0.0].map(|share| (Kind::Share(share), &rough)))
            .collect::<Vec<_>>();
        for &(kind, gradient) in few(&cases, 6) {
            let what = format!("{kind:?} {samples} samples of {len}, slopes {:?}..", &gradient[..len.min(3)]);
            // Nothing is projected but to [0, 1]: the same bits.
            let found = on_gpu(kind, &x, gradient, &origin, &steps, 1e9);
            assert!(found == on_cpu(kind, &x, gradient, &origin, &steps, 1e9), "{what}");
        }
        // Some are.
        for kind in [hundredth, share] {
            let epsilon = 0.005 * len as f64;
            let found = on_gpu(kind, &x, &smooth, &origin, &steps, epsilon);
            assert_near(&format!("{kind:?}"), &found, &on_cpu(kind, &x, &smooth, &origin, &steps, epsilon), 1.2e-7);
        }
    }
}

#[test]
fn the_projection_is_that_of_the_definition_and_within_epsilon() {
    let gpu = soft();
    for (round, len) in few(&[3000, 1, 2, 20, 300], 2).iter().copied().enumerate() {
        let seed = 10 * round as u64;
        let mut origin = pixels(2 * len, seed);
        // Pixels at the ends have no room on one side.
        origin.iter_mut().step_by(3).for_each(|v| *v = v.round());
        for &(deviation, sparse) in few(&[(1.0, 1), (0.01, 1), (5.0, 1), (1.0, 17), (0.0, 1)], 2) {
            let noise = numbers(2 * len, seed + 1, deviation);
            let point: Vec<f32> = (origin.iter().zip(noise).enumerate())
                .map(|(i, (o, n))| if i % sparse == 0 { o + n } else { *o })
                .collect();
            for &epsilon in few(&[12.0, 0.0, 1e-3, 0.5, 0.3 * len as f64], 2) {
                let found = in_any_order(|gpu| {
                    let mut x = Values::send(gpu, &point);
                    pgd::l1_project(&mut x, &Values::send(gpu, &origin), 2, epsilon);
                    host(&x)
                });
                let mut right = point.clone();
                for (right, origin) in right.chunks_mut(len).zip(origin.chunks(len)) {
                    project(right, origin, epsilon);
                }
                let what = format!("{len} pixels, deviation {deviation}, every {sparse}, epsilon {epsilon}");
                assert_near(&what, &found, &right, 1.2e-7);
                assert!(found.iter().all(|v| (0.0..=1.0).contains(v)), "{what}");
                for (found, origin) in found.chunks(len).zip(origin.chunks(len)) {
                    let far = distance(found, origin);
                    assert!(far <= epsilon + 1e-12, "{what}: {far}");
                }
                // A bit of room, since the sum of the right one may be rounded.
                let mut again = Values::send(&gpu, &found);
                pgd::l1_project(&mut again, &Values::send(&gpu, &origin), 2, epsilon + 1e-9);
                assert!(host(&again) == found, "{what}: projecting twice changes nothing");
            }
        }
    }
}

/// The program's stream of an image.
struct Rng(ChaCha8Rng);

impl Rng {
    fn new(draws: &pgd::Draws, key: u64) -> Self {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&draws.seed.to_le_bytes());
        seed[8..12].copy_from_slice(&draws.purpose.to_le_bytes());
        seed[16..24].copy_from_slice(&key.to_le_bytes());
        seed[24..].copy_from_slice(&draws.sub_key.to_le_bytes());
        Self(ChaCha8Rng::from_seed(seed))
    }

    fn uniform(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(self.uniform())).cos()) as f32
    }
}

fn scale(values: &mut [f32], factor: f64) {
    values.iter_mut().for_each(|value| *value *= factor as f32);
}

/// A start on the GPU against one on the CPU, image by image.
fn compare(what: &str, gpu: impl Fn(&Values, &pgd::Draws) -> Values, cpu: impl Fn(&mut Rng, &[f32]) -> Vec<f32>) {
    let keys = [4, u64::MAX - 9];
    for &len in few(&[9001, 1, 8, 301, 4096], 2) {
        let origin = pixels(2 * len, 1);
        let draws = pgd::Draws { seed: 0x0123_4567_89ab_cdef, purpose: 10, keys: &keys, sub_key: 3 << 32 };
        let found = in_any_order(|device: &Gpu| host(&gpu(&Values::send(device, &origin), &draws)));
        let images = keys.iter().zip(origin.chunks(len));
        let right: Vec<f32> = images.flat_map(|(key, origin)| cpu(&mut Rng::new(&draws, *key), origin)).collect();
        assert_near(&format!("{what}, {len} pixels"), &found, &right, 2e-7);
    }
}

#[test]
fn random_starts_in_the_l1_ball_are_those_of_the_programs_streams() {
    let epsilon = 12.0;
    compare(
        "l1",
        |origin, draws| pgd::l1_start(origin, draws, epsilon),
        |rng, origin| {
            let laplace = |_| {
                let size = -(1.0 - rng.uniform()).ln();
                if rng.uniform() < 0.5 { size } else { -size }
            };
            let mut noise: Vec<f32> = (0..origin.len()).map(laplace).collect();
            let length: f64 = noise.iter().map(|v| f64::from(v.abs())).sum();
            let wanted = epsilon * f64::from(rng.uniform());
            scale(&mut noise, wanted / length.max(f64::MIN_POSITIVE));
            origin.iter().zip(noise).map(|(o, n)| (o + n).clamp(0.0, 1.0)).collect()
        },
    );
}

#[test]
fn starts_on_the_surfaces_are_those_of_the_programs_streams() {
    let epsilon = 8.0f32 / 255.0;
    compare(
        "linf",
        |origin, draws| pgd::linf_surface(origin, draws, epsilon),
        |rng, origin| {
            let mut noise: Vec<f32> = origin.iter().map(|_| -1.0 + 2.0 * rng.uniform()).collect();
            let length = noise.iter().fold(0.0, |most: f64, v| most.max(f64::from(v.abs())));
            scale(&mut noise, 1.0 / length.max(f64::MIN_POSITIVE));
            scale(&mut noise, epsilon.into());
            let clip = |(o, n): (&f32, f32)| (o + n).max((o - epsilon).max(0.0)).min((o + epsilon).min(1.0));
            origin.iter().zip(noise).map(clip).collect()
        },
    );
    let epsilon = 0.5f32;
    compare(
        "l2",
        |origin, draws| pgd::l2_surface(origin, draws, epsilon),
        |rng, origin| {
            let mut noise: Vec<f32> = origin.iter().map(|_| rng.normal()).collect();
            let length = noise.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            scale(&mut noise, 1.0 / length.max(f64::MIN_POSITIVE));
            scale(&mut noise, epsilon.into());
            let moved: Vec<f32> = origin.iter().zip(&noise).map(|(o, n)| o + n).collect();
            let away = moved.iter().zip(origin).map(|(x, o)| f64::from(x - o).powi(2)).sum::<f64>().sqrt();
            let shrink = if away > f64::from(epsilon) { (f64::from(epsilon) / away) as f32 } else { 1.0 };
            moved.iter().zip(origin).map(|(x, o)| (x - o).mul_add(shrink, *o).clamp(0.0, 1.0)).collect()
        },
    );
    let epsilon = 12.0;
    compare(
        "l1",
        |origin, draws| pgd::l1_surface(origin, draws, epsilon),
        |rng, origin| {
            let mut start: Vec<f32> = origin.iter().map(|o| o + rng.normal()).collect();
            project(&mut start, origin, epsilon);
            start
        },
    );
}

#[test]
fn an_attack_in_the_l1_ball_reaches_its_surface() {
    let (len, epsilon) = (3 * 16 * 16, 5.0);
    let origin = pixels(len, 7);
    let gpu = soft();
    let clean = Values::send(&gpu, &origin);
    let (gradient, steps) = (Values::send(&gpu, &numbers(len, 8, 1.0)), Values::send(&gpu, &[2.0]));
    let mut x = clean.clone();
    for _ in 0..4 {
        pgd::l1_step(&mut x, &gradient, &clean, &steps, epsilon);
        let far = distance(&host(&x), &origin);
        assert!(far <= epsilon + 1e-12, "{far}");
    }
    let far = distance(&host(&x), &origin);
    assert!(far > 0.999 * epsilon, "{far}");
}
