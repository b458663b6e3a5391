//! The step of FAB on the software GPU against the sorted search of the CPU.

#![allow(missing_docs)]

mod support;

use advxl_cuda::{Norm, Values, fab::fab_step};
use support::{few, host, in_any_order, numbers, pixels};

/// The smallest move onto a hyperplane within [0, 1], as the CPU finds it.
fn project(norm: Norm, point: &[f32], normal: &[f32], excess: f64) -> Vec<f32> {
    let sign = if excess >= 0.0 { 1.0 } else { -1.0 };
    let need = excess.abs();
    let room = |index: usize| {
        let down = sign * f64::from(normal[index]) > 0.0;
        let pixel = f64::from(point[index]);
        if down { pixel } else { 1.0 - pixel }
    };
    let slope = |index: usize| f64::from(normal[index].abs());
    let moves = |slope: f64| slope > 1e-8;
    let pixels = 0..point.len();
    let sizes: Vec<f64> = match norm {
        Norm::Linf => {
            let most = reach(pixels.clone().map(|i| (room(i), slope(i))), need);
            pixels.map(|i| room(i).min(most)).collect()
        }
        Norm::L2 => {
            let parts = pixels.clone().filter(|i| moves(slope(*i)));
            let factor = reach(parts.map(|i| (room(i) / slope(i), slope(i) * slope(i))), need);
            pixels.map(|i| room(i).min(factor * slope(i))).collect()
        }
        Norm::L1 => {
            let mut order: Vec<usize> = pixels.clone().filter(|i| moves(slope(*i))).collect();
            order.sort_unstable_by(|a, b| slope(*b).total_cmp(&slope(*a)).then(a.cmp(b)));
            let mut sizes = vec![0.0; point.len()];
            let mut need = need;
            for index in order {
                sizes[index] = room(index).min(need / slope(index));
                need -= sizes[index] * slope(index);
                if need <= 0.0 {
                    break;
                }
            }
            sizes
        }
    };
    let signed = sizes.iter().zip(normal).map(|(size, normal)| match *normal {
        0.0 => 0.0,
        normal => (-sign * f64::from(normal.signum()) * size) as f32,
    });
    signed.collect()
}

fn reach(parts: impl Iterator<Item = (f64, f64)>, need: f64) -> f64 {
    let mut parts: Vec<(f64, f64)> = parts.filter(|(_, slope)| *slope > 0.0).collect();
    parts.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let mut slope: f64 = parts.iter().map(|(_, slope)| slope).sum();
    let (mut sum, mut at) = (0.0, 0.0);
    for (place, of_part) in parts {
        let next = sum + slope * (place - at);
        if next >= need {
            return at + (need - sum) / slope;
        }
        (sum, at) = (next, place);
        slope -= of_part;
    }
    f64::INFINITY
}

/// The CPU's step of one image.
fn approach(norm: Norm, at: &[f32], clean: &[f32], normal: &[f32], difference: f64) -> Vec<f32> {
    let terms = clean.iter().zip(at).zip(normal);
    let of_clean =
        difference + terms.map(|((clean, at), n)| (f64::from(*clean) - f64::from(*at)) * f64::from(*n)).sum::<f64>();
    let from_at = project(norm, at, normal, difference);
    let from_clean = project(norm, clean, normal, of_clean);
    let length = |change: &[f32]| {
        let sizes = change.iter().map(|d| f64::from(*d).abs());
        let length = match norm {
            Norm::Linf => sizes.fold(0.0, f64::max),
            Norm::L2 => sizes.map(|size| size * size).sum::<f64>().sqrt(),
            Norm::L1 => sizes.sum(),
        };
        length.max(1e-8)
    };
    let (near, far) = (length(&from_at), length(&from_clean));
    let pull = (near / (near + far)).min(0.1);
    let changes = from_at.iter().zip(&from_clean);
    let step = |((at, clean), (d1, d2)): ((&f32, &f32), (&f32, &f32))| {
        let by_at = f64::from(*at) + 1.05 * f64::from(*d1);
        let by_clean = f64::from(*clean) + 1.05 * f64::from(*d2);
        (by_at * (1.0 - pull) + by_clean * pull).clamp(0.0, 1.0) as f32
    };
    at.iter().zip(clean).zip(changes).map(step).collect()
}

/// Images, clean images and normals, one after another, with a difference each.
#[derive(Default)]
struct Cases {
    at: Vec<f32>,
    clean: Vec<f32>,
    normal: Vec<f32>,
    differences: Vec<f64>,
}

impl Cases {
    fn add(&mut self, at: &[f32], clean: &[f32], normal: &[f32], difference: f64) {
        self.at.extend(at);
        self.clean.extend(clean);
        self.normal.extend(normal);
        self.differences.push(difference);
    }

    #[track_caller]
    fn check(&self) {
        let len = self.at.len() / self.differences.len();
        for norm in [Norm::Linf, Norm::L2, Norm::L1] {
            let found = in_any_order(|gpu| {
                let [mut at, clean, normal] = [&self.at, &self.clean, &self.normal].map(|v| Values::send(gpu, v));
                let before = at.clone();
                fab_step(norm, &mut at, &clean, &normal, &self.differences);
                assert_eq!(host(&before), self.at);
                host(&at)
            });
            for (image, difference) in self.differences.iter().enumerate() {
                let of = |values: &[f32]| values[image * len..][..len].to_vec();
                let right = approach(norm, &of(&self.at), &of(&self.clean), &of(&self.normal), *difference);
                for (pixel, (found, right)) in of(&found).iter().zip(&right).enumerate() {
                    // Two units in the last place of a pixel.
                    assert!(
                        (found - right).abs() <= 1.2e-7,
                        "{norm:?} image {image} pixel {pixel} of {len}: {found} {right}, difference {difference}"
                    );
                }
            }
        }
    }
}

/// As much as a move within [0, 1] can take off.
fn most(point: &[f32], normal: &[f32], sign: f64) -> f64 {
    let room = |p: f32, n: f32| if sign * f64::from(n) > 0.0 { f64::from(p) } else { 1.0 - f64::from(p) };
    point.iter().zip(normal).map(|(p, n)| room(*p, *n) * f64::from(n.abs())).sum()
}

#[test]
fn steps_are_the_cpus_for_any_need() {
    for &len in few(&[1000, 1, 2, 7, 48, 147], 2) {
        let mut cases = Cases::default();
        for (seed, share) in [0.0, 1e-6, 0.01, 0.2, 0.5, 0.9, 0.999, 1.5].into_iter().enumerate() {
            let seed = seed as u64 * 10;
            for sign in [1.0, -1.0] {
                let (at, clean) = (pixels(len, seed + 1), pixels(len, seed + 2));
                let normal = numbers(len, seed + 3, 0.5);
                cases.add(&at, &clean, &normal, sign * share * most(&at, &normal, sign));
            }
        }
        cases.check();
    }
}

#[test]
fn equal_slopes_are_taken_in_order() {
    let mut cases = Cases::default();
    for len in [600] {
        for (seed, steps) in [(1, 1.0), (2, 2.0), (3, 5.0)] {
            let (at, clean) = (pixels(len, seed), pixels(len, seed + 7));
            let normal: Vec<f32> = numbers(len, seed + 3, 0.5).iter().map(|v| (v * steps).round() / steps).collect();
            for share in [0.05, 0.3, 0.7] {
                cases.add(&at, &clean, &normal, share * most(&at, &normal, 1.0));
            }
        }
        // All slopes equal, some pixels without room, equal pixels.
        let at: Vec<f32> = (0..len).map(|i| [0.0, 1.0, 0.5, 0.25][i % 4]).collect();
        cases.add(&at, &at, &vec![0.5; len], 20.0);
        cases.add(&at, &at, &vec![-0.5; len], 20.0);
        cases.add(&at, &at, &vec![-0.5; len], -20.25);
        // The need of exactly the first pixels.
        cases.add(&at, &at, &vec![1.0; len], 1.75);
    }
    cases.check();
}

#[test]
fn flat_and_steep_normals_do_what_they_do_on_the_cpu() {
    let mut cases = Cases::default();
    let len = 40;
    let (at, clean) = (pixels(len, 1), pixels(len, 2));
    let slopes = numbers(len, 3, 0.5);
    let scaled = |factor: f32| slopes.iter().map(|v| v * factor).collect::<Vec<_>>();
    for &difference in few(&[0.5, 0.0, -0.5, 1e-30, 1e30], 1) {
        // No slope at all; some; slopes too small to divide by; as large as can be.
        cases.add(&at, &clean, &vec![0.0; len], difference);
        let some: Vec<f32> = slopes.iter().enumerate().map(|(i, v)| if i % 3 == 0 { *v } else { 0.0 }).collect();
        cases.add(&at, &clean, &some, difference);
        cases.add(&at, &clean, &scaled(1e-9), difference);
        cases.add(&at, &clean, &scaled(1e-40), difference);
        let mixed: Vec<f32> = slopes.iter().enumerate().map(|(i, v)| v * 10f32.powi(-(i as i32) / 4)).collect();
        cases.add(&at, &clean, &mixed, difference);
        cases.add(&at, &clean, &scaled(1e30), difference);
        cases.add(&at, &clean, &vec![f32::MAX; len], difference);
        // On the edge of the range.
        let edge: Vec<f32> = (0..len).map(|i| (i % 2) as f32).collect();
        cases.add(&edge, &edge, &slopes, difference);
        cases.add(&edge, &at, &slopes, difference);
    }
    cases.check();
}

/// Slopes over thirty powers of ten, where the search takes the most steps.
#[test]
fn slopes_of_every_size_are_handled() {
    let len = 700;
    let mut cases = Cases::default();
    let normal: Vec<f32> = (0..len).map(|i| 10f32.powf(15.0 - i as f32 * 22.0 / 700.0)).collect();
    let at = pixels(len, 5);
    for &power in few(&[4, -8, -4, 0, 8, 12, 14, 16], 2) {
        cases.add(&at, &at, &normal, 10f64.powi(power));
    }
    cases.check();
}
