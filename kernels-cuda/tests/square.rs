//! Queries of the Square attack on the software GPU against the loops of the CPU.

#![allow(missing_docs)]

mod support;

use advxl_cuda::square::{
    Exchange, Motif, Patterns, Size, Tiles, Window, linf_change, linf_start, pattern_change, pattern_start,
};
use advxl_cuda::{Norm, Values};
use support::{few, host, in_any_order, pixels};

/// Random numbers for tables.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    fn motif(&mut self) -> Motif {
        Motif { is_standing: self.flip(), is_positive: [self.flip(), self.flip(), self.flip()] }
    }

    fn window(&mut self, size: Size, side: usize) -> Window {
        let mut place = |room: usize| self.below(room + 1);
        Window { top: place(size.height - side), left: place(size.width - side), side }
    }
}

const SIZES: [Size; 5] = [
    Size { batch: 3, height: 16, width: 12 },
    Size { batch: 2, height: 11, width: 17 },
    Size { batch: 1, height: 1, width: 1 },
    Size { batch: 2, height: 4, width: 3 },
    Size { batch: 1, height: 32, width: 32 },
];

fn len(size: Size) -> usize {
    3 * size.height * size.width
}

fn sign(positive: bool) -> f32 {
    if positive { 1.0 } else { -1.0 }
}

/// Where the pixels of a window are in a channel, row by row.
fn places(size: Size, channel: usize, window: Window) -> Vec<usize> {
    let rows = window.top..window.top + window.side;
    let row = |row: usize| {
        let begin = (channel * size.height + row) * size.width + window.left;
        begin..begin + window.side
    };
    rows.flat_map(row).collect()
}

/// Any numbers do for a pattern; these have halves of opposite sign.
fn pattern(side: usize) -> Vec<f32> {
    let value = |at: usize| (1.0 + (at * 7 % 5) as f32) / (side * side) as f32;
    (0..side * side).map(|at| if at / side < side / 2 { value(at) } else { -value(at) }).collect()
}

fn laid(side: usize, motif: Motif) -> Vec<f32> {
    let lying = pattern(side);
    match motif.is_standing {
        true => (0..side * side).map(|at| lying[at % side * side + at / side]).collect(),
        false => lying,
    }
}

/// Norms in the CPU's terms.
struct Picture {
    norm: Norm,
    epsilon: f64,
}

impl Picture {
    fn power_sum(&self, values: impl Iterator<Item = f32>) -> f64 {
        let of = |value: f32| f64::from(value).abs();
        match self.norm {
            Norm::L2 => values.map(|value| of(value) * of(value)).sum(),
            _ => values.map(of).sum(),
        }
    }

    fn root(&self, sum: f64) -> f64 {
        if self.norm == Norm::L2 { sum.sqrt() } else { sum }
    }

    /// For l1 before the projection.
    fn inside(&self, clean: &[f32], delta: &[f32]) -> Vec<f32> {
        let factor = (self.epsilon / (self.root(self.power_sum(delta.iter().copied())) + 1e-12)) as f32;
        let pairs = clean.iter().zip(delta);
        match self.norm {
            Norm::L2 => pairs.map(|(pixel, change)| (pixel + change * factor).clamp(0.0, 1.0)).collect(),
            _ => pairs.map(|(pixel, change)| pixel + change).collect(),
        }
    }

    fn start(&self, clean: &[f32], size: Size, motifs: &[Motif]) -> Vec<f32> {
        let mut delta = vec![0.0; clean.len()];
        let side = (size.height / 5).max(1);
        let margin = (size.height - (side * 5).min(size.height)) / 2;
        let fits =
            |length: usize| (margin..length).step_by(side).filter(move |at| at + side <= length).collect::<Vec<_>>();
        let mut motifs = motifs.iter();
        for top in fits(size.height) {
            for left in fits(size.width) {
                let motif = motifs.next().expect("one a tile");
                let pattern = laid(side, *motif);
                for channel in 0..3 {
                    let sign = sign(motif.is_positive[channel]);
                    for (at, value) in places(size, channel, Window { top, left, side }).into_iter().zip(&pattern) {
                        delta[at] += value * sign;
                    }
                }
            }
        }
        assert!(motifs.next().is_none());
        self.inside(clean, &delta)
    }

    fn change(&self, best: &[f32], clean: &[f32], size: Size, exchange: &Exchange) -> Vec<f32> {
        let Exchange { window, other: [top, left], motif } = *exchange;
        let other = Window { top, left, ..window };
        let mut delta: Vec<f32> = best.iter().zip(clean).map(|(best, clean)| best - clean).collect();
        let limit = if self.norm == Norm::L2 { self.epsilon * self.epsilon } else { self.epsilon };
        let unused = (limit - self.power_sum(delta.iter().copied())).max(0.0);
        let pattern = laid(window.side, motif);
        for channel in 0..3 {
            let (here, there) = (places(size, channel, window), places(size, channel, other));
            let only_there = there.iter().filter(|at| !here.contains(at));
            let sign = sign(motif.is_positive[channel]);
            let old = self.root(self.power_sum(here.iter().map(|at| delta[*at]))) + 1e-12;
            let new = here.iter().zip(&pattern);
            let new: Vec<f32> = new.map(|(at, value)| value * sign + (f64::from(delta[*at]) / old) as f32).collect();
            let length = self.root(self.power_sum(new.iter().copied())) + 1e-12;
            let in_both =
                self.power_sum(here.iter().map(|at| delta[*at])) + self.power_sum(only_there.map(|at| delta[*at]));
            let budget = match self.norm {
                Norm::L1 => unused + in_both * 3.0,
                _ => (unused / 3.0 + in_both).sqrt(),
            };
            there.iter().for_each(|at| delta[*at] = 0.0);
            for (at, value) in here.iter().zip(new) {
                delta[*at] = (f64::from(value) / length * budget) as f32;
            }
        }
        self.inside(clean, &delta)
    }
}

#[track_caller]
fn assert_pixels(what: &str, found: &[f32], right: &[f32]) {
    assert_eq!(found.len(), right.len());
    for (at, (found, right)) in found.iter().zip(right).enumerate() {
        let allowed = 2.4e-7 * right.abs().max(0.5);
        assert!((found - right).abs() <= allowed, "{what} at {at}: {found} {right}");
    }
}

#[test]
fn stripes_and_squares_of_linf_are_the_cpus_to_the_bit() {
    for size in SIZES {
        let mut rng = Rng(7);
        for epsilon in [4.0f32 / 255.0, 0.3, 2.0] {
            let clean = pixels(size.batch * len(size), 1);
            let stripes: Vec<f32> = (0..size.batch * 3 * size.width).map(|_| epsilon * sign(rng.flip())).collect();
            let found = in_any_order(|gpu| host(&linf_start(&Values::send(gpu, &clean), size, &stripes)));
            let mut right = clean.clone();
            for (image, right) in right.chunks_mut(len(size)).enumerate() {
                for (at, pixel) in right.iter_mut().enumerate() {
                    let stripe = at / (size.height * size.width) * size.width + at % size.width;
                    *pixel = (*pixel + stripes[image * 3 * size.width + stripe]).clamp(0.0, 1.0);
                }
            }
            assert_eq!(found, right);
            let mut best = right;
            for side in 1..=size.height.min(size.width).min(5) {
                let windows: Vec<(Window, [f32; 3])> = (0..size.batch)
                    .map(|_| (rng.window(size, side), [(); 3].map(|()| 2.0 * epsilon * sign(rng.flip()))))
                    .collect();
                let found = in_any_order(|gpu| {
                    let [best, clean] = [&best, &clean].map(|v| Values::send(gpu, v));
                    host(&linf_change(&best, &clean, size, &windows, epsilon))
                });
                for (image, (window, jumps)) in windows.iter().enumerate() {
                    for (channel, jump) in jumps.iter().enumerate() {
                        for at in places(size, channel, *window) {
                            let at = image * len(size) + at;
                            let moved = (best[at] + jump).clamp(clean[at] - epsilon, clean[at] + epsilon);
                            best[at] = moved.clamp(0.0, 1.0);
                        }
                    }
                }
                assert_eq!(found, best);
            }
        }
    }
}

#[test]
fn patterns_start_and_change_as_on_the_cpu() {
    for size in SIZES {
        let tiles = Tiles::new(size);
        let sides: Vec<usize> = (1..=size.height.min(size.width)).filter(|side| [1, 3, 5, 9].contains(side)).collect();
        let mut all = sides.clone();
        all.push(tiles.side);
        all.sort_unstable();
        all.dedup();
        let patterns: Vec<Vec<f32>> = all.iter().map(|side| pattern(*side)).collect();
        for &(norm, epsilon) in
            few(&[(Norm::L2, 0.5), (Norm::L1, 6.0), (Norm::L2, 1e-3), (Norm::L2, 1e3), (Norm::L1, 0.01)], 2)
        {
            let picture = Picture { norm, epsilon };
            let mut rng = Rng(11);
            let clean = pixels(size.batch * len(size), 1);
            let each = tiles.rows * tiles.columns;
            let motifs: Vec<Motif> = (0..size.batch * each).map(|_| rng.motif()).collect();
            let found = in_any_order(|gpu| {
                let patterns = Patterns::new(gpu, &patterns);
                host(&pattern_start(norm, &Values::send(gpu, &clean), size, &patterns, &motifs, epsilon))
            });
            let images = clean.chunks(len(size)).zip(motifs.chunks(each.max(1)));
            let mut best: Vec<f32> = images.flat_map(|(clean, motifs)| picture.start(clean, size, motifs)).collect();
            assert_pixels(&format!("start {norm:?} {epsilon} {size:?}"), &found, &best);
            for &round in few(&[0, 1, 2, 3, 4, 5], 4) {
                // Sides differ among the images where there are several.
                let exchange = |image: usize| {
                    let side = sides[(image + round) % sides.len()];
                    let window = rng.window(size, side);
                    let other = rng.window(size, side);
                    // The same square twice, in one round.
                    let other = if round == 3 { [window.top, window.left] } else { [other.top, other.left] };
                    Exchange { window, other, motif: rng.motif() }
                };
                let exchanges: Vec<Exchange> = (0..size.batch).map(exchange).collect();
                let found = in_any_order(|gpu| {
                    let patterns = Patterns::new(gpu, &patterns);
                    let [best, clean] = [&best, &clean].map(|v| Values::send(gpu, v));
                    host(&pattern_change(norm, &best, &clean, size, &patterns, &exchanges, epsilon))
                });
                let images = best.chunks(len(size)).zip(clean.chunks(len(size))).zip(&exchanges);
                let right: Vec<f32> =
                    images.flat_map(|((best, clean), exchange)| picture.change(best, clean, size, exchange)).collect();
                assert_pixels(&format!("change {round} {norm:?} {epsilon} {size:?}"), &found, &right);
                best = right;
                if norm == Norm::L1 {
                    // In place of the projection.
                    best.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
                }
            }
            // From the clean image itself nothing is left to move but epsilon.
            let exchanges: Vec<Exchange> = (0..size.batch)
                .map(|_| Exchange { window: rng.window(size, sides[0]), other: [0, 0], motif: rng.motif() })
                .collect();
            let found = in_any_order(|gpu| {
                let patterns = Patterns::new(gpu, &patterns);
                let clean = Values::send(gpu, &clean);
                host(&pattern_change(norm, &clean, &clean, size, &patterns, &exchanges, epsilon))
            });
            let right: Vec<f32> = clean
                .chunks(len(size))
                .zip(&exchanges)
                .flat_map(|(clean, exchange)| picture.change(clean, clean, size, exchange))
                .collect();
            assert_pixels(&format!("first change {norm:?} {epsilon} {size:?}"), &found, &right);
        }
    }
}

#[test]
fn squares_beyond_the_image_are_refused() {
    let gpu = support::soft();
    let size = Size { batch: 1, height: 4, width: 6 };
    let x = Values::zeros(&gpu, len(size), advxl_cuda::Kind::F32);
    let patterns = Patterns::new(&gpu, &[pattern(1), pattern(3)]);
    let motif = Motif { is_standing: false, is_positive: [true; 3] };
    let refused = |work: &dyn Fn()| {
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
    };
    let window = |top, left, side| Window { top, left, side };
    refused(&|| drop(linf_change(&x, &x, size, &[(window(2, 0, 3), [0.1; 3])], 0.1)));
    refused(&|| drop(linf_change(&x, &x, size, &[], 0.1)));
    refused(&|| drop(linf_start(&x, size, &[0.1; 17])));
    let change = |window, other| {
        let exchange = Exchange { window, other, motif };
        drop(pattern_change(Norm::L2, &x, &x, size, &patterns, &[exchange], 0.5));
    };
    refused(&|| change(window(0, 0, 3), [2, 0]));
    refused(&|| change(window(0, 0, 2), [0, 0])); // No pattern of that side.
    refused(&|| drop(pattern_start(Norm::Linf, &x, size, &patterns, &[motif; 24], 0.5)));
    change(window(1, 3, 3), [0, 0]);
    gpu.check().unwrap();
}
