//! Square attack: random search for a smaller margin, one square of pixels at a time, without gradients.
//!
//! It finds what gradients that were masked hide from the other attacks.
//!
//! Source: Andriushchenko et al. 2020 (arXiv:1912.00049), algorithms 1 to 3; for l1, Croce and Hein 2021
//! (arXiv:2103.01208), section 5.
//! Differs from the reference: each image has its own square and signs in a query, where the reference draws
//! one for the whole batch; an image's random numbers are its own, so the batch changes nothing.

use rayon::prelude::*;
use serde::Serialize;

use super::attempt::{Adversarials, Attempt, Batch, Mark, images_of};
use super::draws::Draws;
use super::l1;
use super::target_model::TargetModel;
use super::threat::Norm;
use crate::rng::{Purpose, Rng};
use crate::units::Fraction;

/// Square attack.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Square {
    /// The norm that bounds the perturbation.
    pub norm: Norm,
    /// Largest perturbation.
    pub epsilon: Fraction,
    /// Queries after the start.
    pub queries: u64,
}

/// The share of an image's pixels that the first squares cover.
const FIRST_SHARE: f64 = 0.8;
/// Queries after which the share is halved.
const HALVED_AFTER: [u64; 9] = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000];

impl Square {
    /// Searches until each image is fooled or the queries are used up; see [`crate::attack::Attack::go_on`].
    pub(crate) fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        let count = batch.labels.len();
        let mut found: Adversarials = vec![None; count];
        let [_, channels, height, width] = batch.images.dims();
        let shape = [channels, height, width];
        let picture = Picture {
            norm: self.norm,
            epsilon: self
                .epsilon
                .value()
                .min(self.norm.longest(channels * height * width)),
            shape,
        };
        let draws = Draws::new(batch.seed, &batch.keys, Purpose::Square);
        let ask = |search: &Search, query: u64| {
            let mut rng = draws.stream(search.place, 0, query as usize);
            match query {
                0 => picture.start(&search.clean, &mut rng),
                _ => picture.change(search, self.side(query - 1, height, width), &mut rng),
            }
        };
        let clean = images_of(batch.images.clone()).into_iter().enumerate();
        let mut searches: Vec<Search> = clean
            .map(|(place, clean)| {
                let mut search = Search::new(place, batch.labels[place] as usize, clean);
                if let Some(Some(Mark::Queries {
                    asked,
                    accepted,
                    margin,
                })) = marks.get(place)
                {
                    for query in accepted {
                        search.best = ask(&search, *query);
                    }
                    (search.asked, search.margin) = (*asked, *margin);
                    search.accepted = accepted.clone();
                }
                search
            })
            .collect();
        loop {
            searches.retain(|search| search.asked <= self.queries);
            if searches.is_empty() || classifier.is_stopped() {
                break;
            }
            let tried: Vec<Vec<f32>> = searches
                .par_iter()
                .map(|search| ask(search, search.asked))
                .collect();
            let logits = classifier.logits_of(tried.concat(), shape);
            classifier.keep_passes();
            let mut row = 0;
            let mut tried = tried.into_iter();
            searches.retain_mut(|search| {
                let image = tried.next().unwrap_or_default();
                let is_right = logits.is_right(row, search.label);
                let margin = logits.margin(row, search.label);
                row += 1;
                if !is_right {
                    found[search.place] = Some(image);
                } else {
                    search.take(image, margin);
                }
                is_right
            });
        }
        let mut marks = vec![None; count];
        let stopped = !searches.is_empty();
        for search in searches {
            let place = search.place;
            marks[place] = Some(search.mark());
        }
        Attempt {
            found,
            stopped,
            marks,
        }
    }

    /// The side of the square of a query, from 0.
    ///
    /// In l2 and l1 odd and at least 3, since the pattern within has a middle.
    fn side(&self, query: u64, height: usize, width: usize) -> usize {
        let halvings = HALVED_AFTER.iter().filter(|after| query > **after).count();
        let share = FIRST_SHARE / f64::from(1 << halvings);
        // Half to even, as Python rounds.
        let side = (share * (height * width) as f64).sqrt().round_ties_even() as usize;
        let side = match self.norm {
            Norm::Linf => side.max(1),
            Norm::L2 | Norm::L1 => side.max(3) | 1,
        };
        side.min(height).min(width)
    }
}

/// The search for one image.
struct Search {
    /// Its place in the batch.
    place: usize,
    label: usize,
    clean: Vec<f32>,
    best: Vec<f32>,
    /// Of the best.
    margin: f64,
    /// How many queries were asked, and which of them made the best image.
    asked: u64,
    accepted: Vec<u64>,
}

impl Search {
    fn new(place: usize, label: usize, clean: Vec<f32>) -> Self {
        Self {
            place,
            label,
            best: clean.clone(),
            clean,
            margin: f64::INFINITY,
            asked: 0,
            accepted: Vec::new(),
        }
    }

    /// Takes the answer to a query that did not fool the model: of equal margins the later, since a tie is the boundary.
    fn take(&mut self, image: Vec<f32>, margin: f64) {
        if margin < self.margin || margin <= 0.0 {
            (self.margin, self.best) = (margin, image);
            self.accepted.push(self.asked);
        }
        self.asked += 1;
    }

    fn mark(self) -> Mark {
        Mark::Queries {
            asked: self.asked,
            accepted: self.accepted,
            margin: self.margin,
        }
    }
}

/// A square of pixels.
#[derive(Clone, Copy)]
struct Window {
    top: usize,
    left: usize,
    side: usize,
}

/// Images of one shape, and how they may be changed.
struct Picture {
    norm: Norm,
    epsilon: f64,
    shape: [usize; 3],
}

impl Picture {
    fn sign(rng: &mut Rng) -> f32 {
        if rng.chance(0.5) { 1.0 } else { -1.0 }
    }

    /// Where the pixels of a window are in a channel, row by row.
    fn window(&self, channel: usize, window: Window) -> impl Iterator<Item = usize> {
        let [_, height, width] = self.shape;
        let Window { top, left, side } = window;
        (top..top + side).flat_map(move |row| {
            let begin = (channel * height + row) * width + left;
            begin..begin + side
        })
    }

    /// Whether a pixel, of whichever channel, lies in a window.
    fn is_in(&self, at: usize, window: Window) -> bool {
        let [_, height, width] = self.shape;
        let (row, column) = (at / width % height, at % width);
        let Window { top, left, side } = window;
        (top..top + side).contains(&row) && (left..left + side).contains(&column)
    }

    /// A random window. The last row and column are left out, as in the reference, where a larger one would fit.
    fn draw(&self, side: usize, rng: &mut Rng) -> Window {
        let [_, height, width] = self.shape;
        let mut place = |room: usize| if room == 0 { 0 } else { rng.below(room) };
        Window {
            top: place(height - side),
            left: place(width - side),
            side,
        }
    }

    /// linf: vertical stripes of +- epsilon. l2, l1: a five by five grid of patterns with random signs.
    fn start(&self, clean: &[f32], rng: &mut Rng) -> Vec<f32> {
        let [channels, height, width] = self.shape;
        let epsilon = self.epsilon as f32;
        if self.norm == Norm::Linf {
            let stripes: Vec<f32> = (0..channels * width)
                .map(|_| epsilon * Self::sign(rng))
                .collect();
            let moved = clean.iter().enumerate().map(|(index, pixel)| {
                let stripe = index / (height * width) * width + index % width;
                (pixel + stripes[stripe]).clamp(0.0, 1.0)
            });
            return moved.collect();
        }
        let mut delta = vec![0.0; clean.len()];
        let side = (height / 5).max(1);
        let margin = (height - (side * 5).min(height)) / 2;
        let fits = |from: usize, length: usize| {
            (from..length)
                .step_by(side)
                .filter(move |at| at + side <= length)
        };
        for top in fits(margin, height) {
            for left in fits(margin, width) {
                let pattern = self.pattern(side, rng);
                for channel in 0..channels {
                    let sign = Self::sign(rng);
                    let window = Window { top, left, side };
                    for (at, value) in self.window(channel, window).zip(&pattern) {
                        delta[at] += value * sign;
                    }
                }
            }
        }
        self.inside(clean, delta)
    }

    /// The best image with one square changed.
    fn change(&self, search: &Search, side: usize, rng: &mut Rng) -> Vec<f32> {
        let [channels, ..] = self.shape;
        let window = self.draw(side, rng);
        if self.norm == Norm::Linf {
            let epsilon = self.epsilon as f32;
            let mut image = search.best.clone();
            for channel in 0..channels {
                let jump = 2.0 * epsilon * Self::sign(rng);
                for at in self.window(channel, window) {
                    let clean = search.clean[at];
                    let moved = (image[at] + jump).clamp(clean - epsilon, clean + epsilon);
                    image[at] = moved.clamp(0.0, 1.0);
                }
            }
            return image;
        }
        let other = self.draw(side, rng);
        let pairs = search.best.iter().zip(&search.clean);
        let mut delta: Vec<f32> = pairs.map(|(best, clean)| best - clean).collect();
        // What is left of epsilon, evenly for the channels; l2 counts in squares.
        let size = |values: &mut dyn Iterator<Item = f32>| self.power_sum(values);
        let limit = if self.norm == Norm::L2 {
            self.epsilon * self.epsilon
        } else {
            self.epsilon
        };
        let unused = (limit - size(&mut delta.iter().copied())).max(0.0);
        let pattern = self.pattern(side, rng);
        for channel in 0..channels {
            let here: Vec<usize> = self.window(channel, window).collect();
            let there: Vec<usize> = self.window(channel, other).collect();
            let only_there = self
                .window(channel, other)
                .filter(|at| !self.is_in(*at, window));
            let sign = Self::sign(rng);
            let old = self.root(size(&mut here.iter().map(|at| delta[*at]))) + 1e-12;
            let new = here.iter().zip(&pattern);
            let new: Vec<f32> = new
                .map(|(at, value)| value * sign + (f64::from(delta[*at]) / old) as f32)
                .collect();
            let length = self.root(size(&mut new.iter().copied())) + 1e-12;
            // The budget of both windows goes to the first; they may overlap.
            let in_both = size(&mut here.iter().map(|at| delta[*at]))
                + size(&mut only_there.map(|at| delta[at]));
            let budget = match self.norm {
                Norm::L1 => unused + in_both * channels as f64,
                _ => (unused / channels as f64 + in_both).sqrt(),
            };
            there.iter().for_each(|at| delta[*at] = 0.0);
            for (at, value) in here.iter().zip(new) {
                delta[*at] = (f64::from(value) / length * budget) as f32;
            }
        }
        self.inside(&search.clean, delta)
    }

    /// Sum of squares (l2) or of sizes (l1).
    fn power_sum(&self, values: &mut dyn Iterator<Item = f32>) -> f64 {
        let of = |value: f32| f64::from(value).abs();
        match self.norm {
            Norm::L2 => values.map(|value| of(value) * of(value)).sum(),
            _ => values.map(of).sum(),
        }
    }

    fn root(&self, sum: f64) -> f64 {
        if self.norm == Norm::L2 {
            sum.sqrt()
        } else {
            sum
        }
    }

    /// The image that a perturbation leads to, brought to the radius (l2) or into the ball (l1), in [0, 1].
    fn inside(&self, clean: &[f32], delta: Vec<f32>) -> Vec<f32> {
        let mut image: Vec<f32> = clean.to_vec();
        if self.norm == Norm::L2 {
            let length = self.root(self.power_sum(&mut delta.iter().copied())) + 1e-12;
            let factor = (self.epsilon / length) as f32;
            for (pixel, change) in image.iter_mut().zip(&delta) {
                *pixel = (*pixel + change * factor).clamp(0.0, 1.0);
            }
        } else {
            image
                .iter_mut()
                .zip(&delta)
                .for_each(|(pixel, change)| *pixel += change);
            l1::project(&mut image, clean, self.epsilon);
        }
        image
    }

    /// A square pattern of length 1 in the norm: two halves of opposite sign, each falling off from its middle;
    /// lying or standing at random.
    fn pattern(&self, side: usize, rng: &mut Rng) -> Vec<f32> {
        let half = side / 2;
        let upper = self.bump(half, side);
        let lower = self.bump(side - half, side);
        let mut pattern: Vec<f64> = upper
            .into_iter()
            .chain(lower.into_iter().map(|v| -v))
            .collect();
        self.normalise(&mut pattern);
        if rng.chance(0.5) {
            let transposed = (0..side * side).map(|at| pattern[at % side * side + at / side]);
            pattern = transposed.collect();
        }
        pattern.into_iter().map(|value| value as f32).collect()
    }

    /// A bump on a rectangle: concentric squares around its middle, of falling weight.
    fn bump(&self, rows: usize, columns: usize) -> Vec<f64> {
        let mut bump = vec![0.0; rows * columns];
        let (middle_row, middle_column) = ((rows / 2) as isize, (columns / 2) as isize);
        for ring in 0..=(rows / 2).max(columns / 2) as isize {
            let weight = match self.norm {
                Norm::L2 => ((ring + 1) as f64).powi(-2),
                _ => ((ring + 1) as f64).powi(-4),
            };
            for row in 0..rows {
                for column in 0..columns {
                    let away = (row as isize - middle_row).abs();
                    let aside = (column as isize - middle_column).abs();
                    if away.max(aside) <= ring {
                        bump[row * columns + column] += weight;
                    }
                }
            }
        }
        self.normalise(&mut bump);
        bump
    }

    fn normalise(&self, values: &mut [f64]) {
        let sum = match self.norm {
            Norm::L2 => values.iter().map(|value| value * value).sum::<f64>().sqrt(),
            _ => values.iter().map(|value| value.abs()).sum(),
        };
        values
            .iter_mut()
            .for_each(|value| *value /= sum.max(f64::MIN_POSITIVE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: [usize; 3] = [3, 16, 12];

    fn picture(norm: Norm, epsilon: f64) -> Picture {
        Picture {
            norm,
            epsilon,
            shape: SHAPE,
        }
    }

    fn square(norm: Norm) -> Square {
        Square {
            norm,
            epsilon: "0.1".parse().unwrap(),
            queries: 1,
        }
    }

    #[test]
    fn every_query_is_an_image_within_epsilon() {
        let mut rng = Rng::new(4, Purpose::Bench, 0, 0);
        let clean: Vec<f32> = (0..3 * 16 * 12).map(|_| rng.uniform()).collect();
        for (norm, epsilon) in [(Norm::Linf, 0.03), (Norm::L2, 0.5), (Norm::L1, 6.0)] {
            let picture = picture(norm, epsilon);
            let mut search = Search::new(0, 0, clean.clone());
            search.best = picture.start(&clean, &mut rng);
            for query in 0..400 {
                let distance = norm.distance(&search.best, &clean);
                assert!(
                    distance <= epsilon + 1e-6,
                    "{norm:?} query {query}: {distance}"
                );
                assert!(
                    distance > 0.5 * epsilon,
                    "{norm:?} query {query}: {distance}"
                );
                assert!(search.best.iter().all(|pixel| (0.0..=1.0).contains(pixel)));
                let side = square(norm).side(query * 20, 16, 12);
                search.best = picture.change(&search, side, &mut rng);
            }
        }
    }

    #[test]
    fn squares_shrink_by_the_published_schedule() {
        let sides = |norm: Norm| {
            let square = square(norm);
            [0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 9000]
                .map(|query| square.side(query, 32, 32))
        };
        // round(sqrt(0.8 / 2^k * 1024)); for l2 and l1 made odd, at least 3.
        assert_eq!(sides(Norm::Linf), [29, 29, 20, 14, 10, 7, 5, 4, 3, 1]);
        assert_eq!(sides(Norm::L1), [29, 29, 21, 15, 11, 7, 5, 5, 3, 3]);
    }

    #[test]
    fn a_pattern_has_length_one_and_two_halves_of_opposite_sign() {
        let mut rng = Rng::new(1, Purpose::Bench, 0, 0);
        for norm in [Norm::L2, Norm::L1] {
            for side in [3, 6, 7] {
                let pattern = picture(norm, 1.0).pattern(side, &mut rng);
                let length = norm.length(pattern.iter().map(|value| f64::from(*value)));
                assert!((length - 1.0).abs() < 1e-6, "{norm:?} {side} {length}");
                let sum: f32 = pattern.iter().sum();
                let positive = pattern.iter().filter(|value| **value > 0.0).count();
                assert!(
                    positive == side * (side / 2),
                    "{norm:?} {side} {positive} {sum}"
                );
            }
        }
    }
}
