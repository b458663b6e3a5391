//! Square attack: random search that minimizes the margin, one square of pixels at a time, without gradients.
//!
//! It finds adversarial examples that masked gradients hide from the other attacks.
//!
//! Source: Andriushchenko et al. 2020 (arXiv:1912.00049), algorithms 1 to 3; for l1, Croce and Hein 2021
//! (arXiv:2103.01208), section 5.
//! Differs from the reference: each image has its own square and signs in a query, where the reference draws one for
//! the whole batch. Random numbers are keyed by image, so results do not depend on the batch.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::attempt::{Adversarials, Attempt, Batch, Mark, images_of};
use super::closest::confirm;
use super::draws::Draws;
use super::gradient::select;
use super::l1;
use super::target_model::{Logits, TargetModel};
use super::threat::Norm;
use crate::ops::{
    self, Device, Exchange, Squares, Window, from_vec, put_rows, replace_rows, to_vec,
};
use crate::rng::{AttackKind, Rng};
use crate::units::Fraction;

/// Square attack.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Square {
    /// The norm that bounds the perturbation.
    pub norm: Norm,
    /// Largest perturbation.
    pub epsilon: Fraction,
    /// Number of queries after the first one.
    pub queries: u64,
}

/// Share of an image's pixels that the first squares cover.
const FIRST_SHARE: f64 = 0.8;
/// Numbers of queries after which the share is halved.
const HALVED_AFTER: [u64; 9] = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000];

impl Square {
    /// Searches until every image is fooled or its queries are used up; see [`crate::attack::Attack::go_on`].
    pub(crate) fn go_on(
        &self,
        classifier: &TargetModel,
        batch: &Batch,
        marks: &[Option<Mark>],
    ) -> Attempt {
        let count = batch.labels.len();
        let mut found: Adversarials = vec![None; count];
        let queries = Queries::new(self, batch);
        let labels = batch.labels.iter().enumerate();
        let mut searches = Searches {
            each: labels
                .map(|(place, label)| Search::new(place, *label as usize))
                .collect(),
            best: batch.images.clone(),
            clean: batch.images.clone(),
        };
        searches.replay(&queries, marks);
        loop {
            searches.finish(classifier, self.queries, &mut found);
            if searches.each.is_empty() || classifier.is_stopped() {
                break;
            }
            let rows: Vec<usize> = (0..searches.each.len()).collect();
            let asked: Vec<u64> = searches.each.iter().map(|search| search.asked).collect();
            let tried = searches.ask(&queries, &rows, &asked);
            let label = |row: usize| searches.each[row].label;
            let logits = classifier.search_logits(tried.clone());
            let logits = classifier.confirmed(&tried, logits, label);
            classifier.keep_passes();
            searches.take(&tried, &logits, &mut found);
        }
        let mut marks = vec![None; count];
        let stopped = !searches.each.is_empty();
        for search in searches.each {
            let place = search.place;
            marks[place] = Some(search.mark());
        }
        Attempt {
            parameters: vec![None; found.len()],
            found,
            stopped,
            marks,
        }
    }

    /// Returns the side of the square for a query, counted from 0.
    ///
    /// In l2 and l1 it is odd and at least 3, since the pattern needs a center.
    fn side(&self, query: u64, height: usize, width: usize) -> usize {
        let halvings = HALVED_AFTER.iter().filter(|after| query > **after).count();
        let share = FIRST_SHARE / f64::from(1 << halvings);
        // Rounds half to even, like Python.
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
    /// Index in the batch.
    place: usize,
    label: usize,
    /// Margin of the best image.
    margin: f64,
    /// Number of queries made, and those that improved the best image.
    asked: u64,
    accepted: Vec<u64>,
    is_fooled: bool,
}

impl Search {
    fn new(place: usize, label: usize) -> Self {
        Self {
            place,
            label,
            margin: f64::INFINITY,
            asked: 0,
            accepted: Vec::new(),
            is_fooled: false,
        }
    }

    /// Records the margin of a query that did not fool the model, and returns whether it becomes the best image. A
    /// margin of 0 or below is always accepted, since a tie is on the decision boundary.
    fn take(&mut self, margin: f64) -> bool {
        let is_better = margin < self.margin || margin <= 0.0;
        if is_better {
            self.margin = margin;
            self.accepted.push(self.asked);
        }
        self.asked += 1;
        is_better
    }

    fn mark(self) -> Mark {
        Mark::Queries {
            asked: self.asked,
            accepted: self.accepted,
            margin: self.margin,
        }
    }
}

/// A batch of searches; row i of each tensor belongs to search i.
struct Searches {
    each: Vec<Search>,
    clean: Tensor<4>,
    best: Tensor<4>,
}

impl Searches {
    /// Resumes from the marks of a stopped attempt by replaying the accepted queries.
    fn replay(&mut self, queries: &Queries, marks: &[Option<Mark>]) {
        for search in &mut self.each {
            if let Some(Some(Mark::Queries {
                asked,
                accepted,
                margin,
            })) = marks.get(search.place)
            {
                (search.asked, search.margin) = (*asked, *margin);
                search.accepted = accepted.clone();
            }
        }
        for number in 0.. {
            let query = |row: &usize| self.each[*row].accepted.get(number).copied();
            let rows = (0..self.each.len()).filter(|row| query(row).is_some());
            let rows: Vec<usize> = rows.collect();
            if rows.is_empty() {
                break;
            }
            let accepted: Vec<u64> = rows.iter().filter_map(query).collect();
            let made = self.ask(queries, &rows, &accepted);
            self.best = put_rows(self.best.clone(), &rows, made);
        }
    }

    /// Builds the image of a query for each of some searches. The first query is a starting point, later ones modify
    /// the best image.
    fn ask(&self, queries: &Queries, rows: &[usize], asked: &[u64]) -> Tensor<4> {
        let [best, clean] = [&self.best, &self.clean].map(|images| select(images.clone(), rows));
        let query = |(row, query): (&usize, &u64)| queries.draw(self.each[*row].place, *query);
        let drawn: Vec<Query> = rows.iter().zip(asked).map(query).collect();
        queries.images(best, clean, &drawn)
    }

    /// Records the logits of the queries and removes the images that fooled the model.
    fn take(&mut self, tried: &Tensor<4>, logits: &Logits, found: &mut Adversarials) {
        let (mut fooled, mut better) = (Vec::new(), Vec::new());
        for (row, search) in self.each.iter_mut().enumerate() {
            search.is_fooled = !logits.is_right(row, search.label);
            match search.is_fooled {
                true => fooled.push(row),
                false => {
                    let margin = logits.margin(row, search.label);
                    if search.take(margin) {
                        better.push(row);
                    }
                }
            }
        }
        if !fooled.is_empty() {
            let images = images_of(select(tried.clone(), &fooled));
            for (row, image) in fooled.iter().zip(images) {
                found[self.each[*row].place] = Some(image);
            }
        }
        let better: Vec<bool> = (0..self.each.len())
            .map(|row| better.binary_search(&row).is_ok())
            .collect();
        self.best = replace_rows(self.best.clone(), tried, &better);
        self.keep(|search| !search.is_fooled);
    }

    /// Ends the searches without queries left. With an approximate search, their best images are first evaluated by the
    /// network itself.
    fn finish(&mut self, classifier: &TargetModel, queries: u64, found: &mut Adversarials) {
        let is_done = |search: &Search| search.asked > queries;
        let done: Vec<usize> = (0..self.each.len())
            .filter(|row| is_done(&self.each[*row]))
            .collect();
        if classifier.is_approximate() && !done.is_empty() {
            let each = done.iter().map(|row| &self.each[*row]);
            let each = each.map(|search| (search.place, search.label));
            confirm(classifier, &select(self.best.clone(), &done), each, found);
        }
        self.keep(|search| !is_done(search));
    }

    /// Keeps the searches that satisfy a predicate.
    fn keep(&mut self, which: impl Fn(&Search) -> bool) {
        let rows = 0..self.each.len();
        let kept: Vec<usize> = rows.filter(|row| which(&self.each[*row])).collect();
        if kept.len() == self.each.len() {
            return;
        }
        self.each.retain(which);
        for tensor in [&mut self.clean, &mut self.best] {
            *tensor = select(tensor.clone(), &kept);
        }
    }
}

/// Draws and builds the queries of a batch.
struct Queries<'a> {
    square: &'a Square,
    picture: Picture,
    draws: Draws<'a>,
    /// Builds queries on the GPU, if the images are there.
    on_device: Option<Squares>,
}

impl<'a> Queries<'a> {
    fn new(square: &'a Square, batch: &'a Batch) -> Self {
        let [_, channels, height, width] = batch.images.dims();
        let longest = square.norm.longest(channels * height * width);
        let mut picture = Picture {
            norm: square.norm,
            epsilon: square.epsilon.value().min(longest),
            shape: [channels, height, width],
            patterns: BTreeMap::new(),
        };
        let mut sides: Vec<usize> = std::iter::once(0)
            .chain(HALVED_AFTER.map(|after| after + 1))
            .take_while(|query| *query < square.queries.max(1))
            .map(|query| square.side(query, height, width))
            .chain([picture.tile()])
            .collect();
        sides.sort_unstable();
        sides.dedup();
        if square.norm != Norm::Linf {
            picture.prepare(&sides);
        }
        let patterns = || {
            let of_side = |side| picture.pattern(side, false).to_vec();
            sides.iter().copied().map(of_side).collect()
        };
        let norm = square.norm.on_device();
        Self {
            on_device: Squares::on_device(&batch.images, norm, picture.epsilon, patterns),
            square,
            draws: Draws::new(batch.seed, &batch.keys, AttackKind::Square),
            picture,
        }
    }

    /// Draws a query for one image of the batch.
    fn draw(&self, place: usize, query: u64) -> Query {
        let mut rng = self.draws.stream(place, 0, query as usize);
        let [_, height, width] = self.picture.shape;
        match query {
            0 => self.picture.draw_start(&mut rng),
            _ => {
                let side = self.square.side(query - 1, height, width);
                self.picture.draw_change(side, &mut rng)
            }
        }
    }

    /// Builds the images of queries.
    ///
    /// Shapes: `best` and `clean` `[queries, 3, height, width]`.
    fn images(&self, best: Tensor<4>, clean: Tensor<4>, queries: &[Query]) -> Tensor<4> {
        let Some(device) = &self.on_device else {
            let (shape, device) = (clean.dims(), Device::of(&clean));
            let pixels: usize = shape[1..].iter().product();
            let [best, clean] = [best, clean].map(to_vec);
            let images: Vec<Vec<f32>> = best
                .par_chunks_exact(pixels)
                .zip(clean.par_chunks_exact(pixels))
                .zip(queries)
                .map(|((best, clean), query)| self.picture.image(best, clean, query))
                .collect();
            return from_vec(images.concat(), shape, &device);
        };
        let is_start = |row: &usize| queries[*row].is_start();
        let (starts, changes): (Vec<usize>, Vec<usize>) = (0..queries.len()).partition(is_start);
        let of = |images: &Tensor<4>, rows: &[usize]| select(images.clone(), rows);
        let mut made = best.clone();
        if !starts.is_empty() {
            let queries = starts.iter().map(|row| &queries[*row]);
            let images = self.started(device, &of(&clean, &starts), queries);
            made = put_rows(made, &starts, images);
        }
        if !changes.is_empty() {
            let queries = changes.iter().map(|row| &queries[*row]);
            let [best, clean] = [&best, &clean].map(|images| of(images, &changes));
            let images = self.changed(device, &best, &clean, queries);
            made = put_rows(made, &changes, images);
        }
        made
    }

    /// Builds first queries on a GPU.
    fn started<'q>(
        &self,
        device: &Squares,
        clean: &Tensor<4>,
        queries: impl Iterator<Item = &'q Query>,
    ) -> Tensor<4> {
        let (mut stripes, mut motifs) = (Vec::new(), Vec::new());
        for query in queries {
            match query {
                Query::Stripes(of_image) => stripes.extend(of_image),
                Query::Tiles(of_image) => motifs.extend(of_image.iter().map(Motif::on_device)),
                Query::Jump { .. } | Query::Exchange { .. } => unreachable!("these are changes"),
            }
        }
        match self.picture.norm {
            Norm::Linf => device.stripes(clean, &stripes),
            Norm::L2 | Norm::L1 => device.tiles(clean, &motifs),
        }
    }

    /// Builds later queries on a GPU.
    fn changed<'q>(
        &self,
        device: &Squares,
        best: &Tensor<4>,
        clean: &Tensor<4>,
        queries: impl Iterator<Item = &'q Query>,
    ) -> Tensor<4> {
        let (mut jumped, mut exchanges) = (Vec::new(), Vec::new());
        for query in queries {
            match query {
                Query::Jump { window, jumps } => {
                    jumped.push((*window, [0, 1, 2].map(|channel| jumps[channel])));
                }
                Query::Exchange {
                    window,
                    other,
                    motif,
                } => exchanges.push(Exchange {
                    window: *window,
                    other: [other.top, other.left],
                    motif: motif.on_device(),
                }),
                Query::Stripes(_) | Query::Tiles(_) => unreachable!("these are starts"),
            }
        }
        match self.picture.norm {
            Norm::Linf => device.jumps(best, clean, &jumped),
            Norm::L2 | Norm::L1 => device.exchanges(best, clean, &exchanges),
        }
    }
}

/// The random choices of a query.
enum Query {
    /// First query in linf: a change for each column of each channel.
    Stripes(Vec<f32>),
    /// First query in l2 and l1: patterns from the top left, row by row.
    Tiles(Vec<Motif>),
    /// Later query in linf: a square and its change in each channel.
    Jump { window: Window, jumps: Vec<f32> },
    /// Later query in l2 and l1: a square that receives a new pattern, and one whose perturbation is reset.
    Exchange {
        window: Window,
        other: Window,
        motif: Motif,
    },
}

impl Query {
    fn is_start(&self) -> bool {
        matches!(self, Self::Stripes(_) | Self::Tiles(_))
    }
}

/// Orientation and signs of a pattern.
struct Motif {
    /// Whether the pattern is vertical.
    is_standing: bool,
    /// Sign in each channel.
    signs: Vec<f32>,
}

impl Motif {
    /// Converts to the GPU representation, for three channels.
    fn on_device(&self) -> ops::Motif {
        ops::Motif {
            is_standing: self.is_standing,
            is_positive: [0, 1, 2].map(|channel| self.signs[channel] > 0.0),
        }
    }
}

/// The shape of the images and their threat model.
struct Picture {
    norm: Norm,
    epsilon: f64,
    shape: [usize; 3],
    /// l2 and l1: horizontal and vertical pattern for each side length.
    patterns: BTreeMap<usize, [Vec<f32>; 2]>,
}

impl Picture {
    fn sign(rng: &mut Rng) -> f32 {
        if rng.chance(0.5) { 1.0 } else { -1.0 }
    }

    /// Returns the indices of a window's pixels in a channel, row by row.
    fn window(&self, channel: usize, window: Window) -> impl Iterator<Item = usize> {
        let [_, height, width] = self.shape;
        let Window { top, left, side } = window;
        (top..top + side).flat_map(move |row| {
            let begin = (channel * height + row) * width + left;
            begin..begin + side
        })
    }

    /// Returns whether a pixel of any channel is in a window.
    fn is_in(&self, at: usize, window: Window) -> bool {
        let [_, height, width] = self.shape;
        let (row, column) = (at / width % height, at % width);
        let Window { top, left, side } = window;
        (top..top + side).contains(&row) && (left..left + side).contains(&column)
    }

    /// Draws a random window. As in the reference, the last possible position is excluded unless it is the only one.
    fn draw(&self, side: usize, rng: &mut Rng) -> Window {
        let [_, height, width] = self.shape;
        let mut place = |room: usize| if room == 0 { 0 } else { rng.below(room) };
        Window {
            top: place(height - side),
            left: place(width - side),
            side,
        }
    }

    /// Returns the side of the initial patterns in l2 and l1: a fifth of the height.
    fn tile(&self) -> usize {
        (self.shape[1] / 5).max(1)
    }

    /// Returns the windows of these patterns: a five by five grid if the image is square.
    fn tiles(&self) -> impl Iterator<Item = Window> {
        let ([_, height, width], side) = (self.shape, self.tile());
        let margin = (height - (side * 5).min(height)) / 2;
        let fits = move |length: usize| {
            (margin..length)
                .step_by(side)
                .filter(move |at| at + side <= length)
        };
        fits(height).flat_map(move |top| fits(width).map(move |left| Window { top, left, side }))
    }

    fn draw_motif(&self, rng: &mut Rng) -> Motif {
        Motif {
            is_standing: rng.chance(0.5),
            signs: (0..self.shape[0]).map(|_| Self::sign(rng)).collect(),
        }
    }

    /// Draws a first query. linf: vertical stripes of +- epsilon. l2, l1: a grid of patterns with random signs.
    fn draw_start(&self, rng: &mut Rng) -> Query {
        let ([channels, _, width], epsilon) = (self.shape, self.epsilon as f32);
        match self.norm {
            Norm::Linf => {
                let stripe = |_| epsilon * Self::sign(rng);
                Query::Stripes((0..channels * width).map(stripe).collect())
            }
            Norm::L2 | Norm::L1 => {
                Query::Tiles(self.tiles().map(|_| self.draw_motif(rng)).collect())
            }
        }
    }

    /// Draws a change of one square. In l2 and l1, another square gives up its perturbation.
    fn draw_change(&self, side: usize, rng: &mut Rng) -> Query {
        let window = self.draw(side, rng);
        if self.norm == Norm::Linf {
            let epsilon = self.epsilon as f32;
            let jump = |_| 2.0 * epsilon * Self::sign(rng);
            let jumps = (0..self.shape[0]).map(jump).collect();
            return Query::Jump { window, jumps };
        }
        Query::Exchange {
            window,
            other: self.draw(side, rng),
            motif: self.draw_motif(rng),
        }
    }

    /// Builds the image of a query.
    fn image(&self, best: &[f32], clean: &[f32], query: &Query) -> Vec<f32> {
        match query {
            Query::Stripes(stripes) => self.stripes(clean, stripes),
            Query::Tiles(motifs) => self.tiled(clean, motifs),
            Query::Jump { window, jumps } => self.jump(best, clean, *window, jumps),
            Query::Exchange {
                window,
                other,
                motif,
            } => self.exchange(best, clean, [*window, *other], motif),
        }
    }

    fn stripes(&self, clean: &[f32], stripes: &[f32]) -> Vec<f32> {
        let [_, height, width] = self.shape;
        let moved = clean.iter().enumerate().map(|(index, pixel)| {
            let stripe = index / (height * width) * width + index % width;
            (pixel + stripes[stripe]).clamp(0.0, 1.0)
        });
        moved.collect()
    }

    fn tiled(&self, clean: &[f32], motifs: &[Motif]) -> Vec<f32> {
        let mut delta = vec![0.0; clean.len()];
        let patterns = [false, true].map(|is_standing| self.pattern(self.tile(), is_standing));
        for (window, motif) in self.tiles().zip(motifs) {
            let pattern = patterns[usize::from(motif.is_standing)];
            for (channel, sign) in motif.signs.iter().enumerate() {
                for (at, value) in self.window(channel, window).zip(pattern) {
                    delta[at] += value * sign;
                }
            }
        }
        self.inside(clean, delta)
    }

    fn jump(&self, best: &[f32], clean: &[f32], window: Window, jumps: &[f32]) -> Vec<f32> {
        let epsilon = self.epsilon as f32;
        let mut image = best.to_vec();
        for (channel, jump) in jumps.iter().enumerate() {
            for at in self.window(channel, window) {
                let clean = clean[at];
                let moved = (image[at] + jump).clamp(clean - epsilon, clean + epsilon);
                image[at] = moved.clamp(0.0, 1.0);
            }
        }
        image
    }

    fn exchange(
        &self,
        best: &[f32],
        clean: &[f32],
        [window, other]: [Window; 2],
        motif: &Motif,
    ) -> Vec<f32> {
        let channels = motif.signs.len();
        let pairs = best.iter().zip(clean);
        let mut delta: Vec<f32> = pairs.map(|(best, clean)| best - clean).collect();
        // The unused part of epsilon, to be split over the channels; in squares for l2.
        let limit = if self.norm == Norm::L2 {
            self.epsilon * self.epsilon
        } else {
            self.epsilon
        };
        let unused = (limit - self.power_sum(delta.iter().copied())).max(0.0);
        let pattern = self.pattern(window.side, motif.is_standing);
        for (channel, sign) in motif.signs.iter().enumerate() {
            let here: Vec<usize> = self.window(channel, window).collect();
            let there: Vec<usize> = self.window(channel, other).collect();
            let only_there = self
                .window(channel, other)
                .filter(|at| !self.is_in(*at, window));
            let old = self.root(self.power_sum(here.iter().map(|at| delta[*at]))) + 1e-12;
            let new = here.iter().zip(pattern);
            let new: Vec<f32> = new
                .map(|(at, value)| value * sign + (f64::from(delta[*at]) / old) as f32)
                .collect();
            let length = self.root(self.power_sum(new.iter().copied())) + 1e-12;
            // The first window receives the budget of both; they may overlap.
            let in_both = self.power_sum(here.iter().map(|at| delta[*at]))
                + self.power_sum(only_there.map(|at| delta[at]));
            let budget = match self.norm {
                Norm::L1 => unused + in_both * channels as f64,
                _ => (unused / channels as f64 + in_both).sqrt(),
            };
            there.iter().for_each(|at| delta[*at] = 0.0);
            for (at, value) in here.iter().zip(new) {
                delta[*at] = (f64::from(value) / length * budget) as f32;
            }
        }
        self.inside(clean, delta)
    }

    /// Sums the squares (l2) or absolute values (l1).
    fn power_sum(&self, values: impl Iterator<Item = f32>) -> f64 {
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

    /// Applies a perturbation scaled to the radius (l2) or projected into the ball (l1), within [0, 1].
    fn inside(&self, clean: &[f32], delta: Vec<f32>) -> Vec<f32> {
        let mut image: Vec<f32> = clean.to_vec();
        if self.norm == Norm::L2 {
            let length = self.root(self.power_sum(delta.iter().copied())) + 1e-12;
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

    /// Computes the patterns for the given side lengths, which all queries share.
    fn prepare(&mut self, sides: &[usize]) {
        let made = sides
            .iter()
            .map(|side| (*side, [false, true].map(|is| self.make_pattern(*side, is))));
        self.patterns = made.collect();
    }

    /// Returns the horizontal or vertical pattern of a prepared side length.
    fn pattern(&self, side: usize, is_standing: bool) -> &[f32] {
        &self.patterns[&side][usize::from(is_standing)]
    }

    /// Computes a horizontal or vertical square pattern of length 1 in the norm: two halves of opposite sign, each
    /// decreasing from its center.
    fn make_pattern(&self, side: usize, is_standing: bool) -> Vec<f32> {
        let half = side / 2;
        let upper = self.bump(half, side);
        let lower = self.bump(side - half, side);
        let mut pattern: Vec<f64> = upper
            .into_iter()
            .chain(lower.into_iter().map(|v| -v))
            .collect();
        self.normalize(&mut pattern);
        if is_standing {
            let transposed = (0..side * side).map(|at| pattern[at % side * side + at / side]);
            pattern = transposed.collect();
        }
        pattern.into_iter().map(|value| value as f32).collect()
    }

    /// Returns a bump on a rectangle: concentric squares around its center, with decreasing weight.
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
        self.normalize(&mut bump);
        bump
    }

    fn normalize(&self, values: &mut [f64]) {
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
    use crate::rng::Stream;

    const SHAPE: [usize; 3] = [3, 16, 12];

    fn picture(norm: Norm, epsilon: f64) -> Picture {
        let mut picture = Picture {
            norm,
            epsilon,
            shape: SHAPE,
            patterns: BTreeMap::new(),
        };
        picture.prepare(&Vec::from_iter(1..=12));
        picture
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
        let mut rng = Rng::new(4, Stream::Bench);
        let clean: Vec<f32> = (0..3 * 16 * 12).map(|_| rng.uniform()).collect();
        for (norm, epsilon) in [(Norm::Linf, 0.03), (Norm::L2, 0.5), (Norm::L1, 6.0)] {
            let picture = picture(norm, epsilon);
            let mut best = picture.image(&clean, &clean, &picture.draw_start(&mut rng));
            for query in 0..400 {
                let distance = norm.distance(&best, &clean);
                assert!(
                    distance <= epsilon + 1e-6,
                    "{norm:?} query {query}: {distance}"
                );
                assert!(
                    distance > 0.5 * epsilon,
                    "{norm:?} query {query}: {distance}"
                );
                assert!(best.iter().all(|pixel| (0.0..=1.0).contains(pixel)));
                let side = square(norm).side(query * 20, 16, 12);
                best = picture.image(&best, &clean, &picture.draw_change(side, &mut rng));
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
        // round(sqrt(0.8 / 2^k * 1024)); for l2 and l1 odd and at least 3.
        assert_eq!(sides(Norm::Linf), [29, 29, 20, 14, 10, 7, 5, 4, 3, 1]);
        assert_eq!(sides(Norm::L1), [29, 29, 21, 15, 11, 7, 5, 5, 3, 3]);
    }

    #[test]
    fn a_pattern_has_length_one_and_two_halves_of_opposite_sign() {
        let mut rng = Rng::new(1, Stream::Bench);
        for norm in [Norm::L2, Norm::L1] {
            for side in [3, 6, 7] {
                let picture = picture(norm, 1.0);
                let pattern = picture.pattern(side, rng.chance(0.5));
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
