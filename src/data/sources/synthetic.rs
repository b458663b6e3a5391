//! Captioned images drawn in code, which the demo and the tests train on without a download.
//!
//! There are twelve classes of shapes and patterns. Each is drawn in two distinguishable colors, at a random position
//! and size, slightly rotated, on a background that is plain, shaded, striped or speckled.
//! The colors of figure and background come from one distribution that is the same for all classes, so the mean color
//! says nothing about the class: a network has to recognize the shape. Figure and background differ by far more than an
//! attack of 8/255 can change.
//! Not a benchmark: accuracies on these images say nothing about photographs.
//!
//! Every image is a function of (seed, split, index); the classes alternate.

use std::sync::OnceLock;

use crate::data::spec::Split;
use crate::error::Result;
use crate::image::Picture;
use crate::rng::{Rng, Stream};

/// The classes, by label.
const CLASSES: [&str; 12] = [
    "disc",
    "ring",
    "square",
    "triangle",
    "cross",
    "star",
    "crescent",
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checkerboard",
    "dots",
];

type Color = [f32; 3];

const PALETTE: [(&str, Color); 12] = [
    ("black", [0.08, 0.08, 0.10]),
    ("white", [0.92, 0.92, 0.90]),
    ("grey", [0.50, 0.50, 0.50]),
    ("red", [0.85, 0.15, 0.15]),
    ("orange", [0.95, 0.55, 0.10]),
    ("yellow", [0.92, 0.88, 0.20]),
    ("green", [0.15, 0.60, 0.20]),
    ("cyan", [0.20, 0.80, 0.85]),
    ("blue", [0.15, 0.25, 0.85]),
    ("purple", [0.50, 0.15, 0.60]),
    ("pink", [0.95, 0.60, 0.75]),
    ("brown", [0.42, 0.26, 0.12]),
];

/// Smallest difference between figure and background: in brightness, and summed over the channels.
const LEAST_BRIGHTNESS_DIFFERENCE: f32 = 0.25;
const LEAST_COLOR_DIFFERENCE: f32 = 1.0;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Background {
    Plain,
    Shaded,
    Striped,
    Speckled,
}

/// Drawn images are kept if all of them fit into this many bytes.
const KEPT_BYTES: usize = 512 << 20;

/// Sample points of the figure per pixel and axis.
const SUPERSAMPLES: usize = 3;

/// A split of the synthetic images.
#[derive(Debug)]
pub struct Synthetic {
    seed: u64,
    split: Split,
    image_size: usize,
    classes: Vec<String>,
    len: usize,
    /// One entry per image, or empty if the images would need too much memory.
    drawn: Vec<OnceLock<Box<[u8]>>>,
}

/// Everything in an image except its noise. Lengths are fractions of the side of the image.
struct Scene {
    label: usize,
    figure: (&'static str, Color),
    ground: (&'static str, Color),
    background: Background,
    /// Direction and strength of the shading and the stripes of the background.
    slope: [f32; 2],
    center: [f32; 2],
    radius: f32,
    angle: f32,
}

impl Synthetic {
    /// Makes a split of `len` images of `image_size` x `image_size` pixels.
    pub fn new(seed: u64, split: Split, len: usize, image_size: usize) -> Self {
        let kept = match len.saturating_mul(image_size * image_size * 3) {
            0..=KEPT_BYTES => len,
            _ => 0,
        };
        Self {
            seed,
            split,
            image_size,
            classes: CLASSES.iter().map(|name| (*name).into()).collect(),
            len,
            drawn: std::iter::repeat_with(OnceLock::new).take(kept).collect(),
        }
    }

    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the side of the images in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Returns the class names by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the label of an image.
    pub fn label(&self, index: usize) -> u32 {
        (index % CLASSES.len()) as u32
    }

    /// Returns the name of an image, for messages.
    pub fn name_of(&self, index: usize) -> String {
        format!("synthetic {} picture {index}", self.split)
    }

    /// Returns what distinguishes these images from those of another seed, split or size.
    pub fn identity(&self) -> String {
        format!("{} {} {}", self.seed, self.split, self.image_size)
    }

    /// Returns the caption of an image, such as `a small red disc on a striped blue background`.
    pub fn caption(&self, index: usize) -> String {
        let scene = self.scene(index).0;
        let size = match scene.radius {
            radius if radius < 0.355 => "small ",
            radius if radius < 0.405 => "",
            _ => "large ",
        };
        let background = match scene.background {
            Background::Plain => "plain",
            Background::Shaded => "shaded",
            Background::Striped => "striped",
            Background::Speckled => "speckled",
        };
        let (figure, ground) = (scene.figure.0, scene.ground.0);
        let class = CLASSES[scene.label];
        let words = format!("{size}{figure} {class}");
        let article = match words.starts_with(['a', 'e', 'i', 'o', 'u']) {
            _ if class.ends_with("stripes") || class == "dots" => "",
            true => "an ",
            false => "a ",
        };
        format!("{article}{words} on a {background} {ground} background")
    }

    /// Returns an image, which is drawn unless an earlier call did and it was kept.
    pub fn picture(&self, index: usize) -> Result<Picture> {
        let bytes = match self.drawn.get(index) {
            Some(place) => place
                .get_or_init(|| self.draw(index).into_boxed_slice())
                .to_vec(),
            None => self.draw(index),
        };
        Picture::bytes(self.image_size, self.image_size, bytes)
    }

    fn scene(&self, index: usize) -> (Scene, Rng) {
        let split = match self.split {
            Split::Train => 0,
            Split::Test => 1,
        };
        let mut rng = Rng::new(
            self.seed,
            Stream::Synthetic {
                split,
                image: index as u64,
            },
        );
        let (figure, ground) = colors(&mut rng);
        let background = match rng.below(4) {
            0 => Background::Plain,
            1 => Background::Shaded,
            2 => Background::Striped,
            _ => Background::Speckled,
        };
        let direction = rng.between(0.0, std::f32::consts::TAU);
        let strength = rng.between(0.06, 0.12);
        let radius = rng.between(0.31, 0.45);
        // A tenth of the radius may be outside the image.
        let room = 0.5 - 0.9 * radius;
        let center = [rng.between(-room, room), rng.between(-room, room)];
        let label = self.label(index) as usize;
        let scene = Scene {
            label,
            figure,
            ground,
            background,
            slope: [direction.cos() * strength, direction.sin() * strength],
            center: [0.5 + center[0], 0.5 + center[1]],
            radius,
            angle: rng.between(-MOST_TURNED, MOST_TURNED),
        };
        (scene, rng)
    }

    fn draw(&self, index: usize) -> Vec<u8> {
        let (scene, mut rng) = self.scene(index);
        let side = self.image_size as f32;
        let noise = match scene.background {
            Background::Speckled => 0.08,
            _ => 0.03,
        };
        let mut bytes = Vec::with_capacity(self.image_size * self.image_size * 3);
        for y in 0..self.image_size {
            for x in 0..self.image_size {
                let covered = scene.coverage(x, y, side);
                let ground = scene.shade((x as f32 + 0.5) / side, (y as f32 + 0.5) / side);
                let grain = noise * (rng.uniform() - 0.5) * 2.0;
                for channel in 0..3 {
                    let below = scene.ground.1[channel] + ground;
                    let mixed = below + covered * (scene.figure.1[channel] - below);
                    // Speckles only apply to the background, fine grain to the whole image.
                    let grain = grain * (1.0 - covered) + 0.03 * (rng.uniform() - 0.5);
                    bytes.push(((mixed + grain) * 255.0).round() as u8);
                }
            }
        }
        bytes
    }
}

/// 20 degrees, so that horizontal stripes remain horizontal stripes.
const MOST_TURNED: f32 = 0.35;

/// Draws two distinguishable colors with their names. Each is equally likely to be the figure.
fn colors(rng: &mut Rng) -> ((&'static str, Color), (&'static str, Color)) {
    loop {
        let mut draw = || {
            let (name, mean) = PALETTE[rng.below(PALETTE.len())];
            (name, mean.map(|value| value + rng.between(-0.07, 0.07)))
        };
        let (figure, ground) = (draw(), draw());
        let brightness = |color: Color| 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2];
        let difference: f32 = (0..3).map(|c| (figure.1[c] - ground.1[c]).abs()).sum();
        if (brightness(figure.1) - brightness(ground.1)).abs() >= LEAST_BRIGHTNESS_DIFFERENCE
            && difference >= LEAST_COLOR_DIFFERENCE
        {
            return (figure, ground);
        }
    }
}

impl Scene {
    /// Returns the share of a pixel that the figure covers.
    fn coverage(&self, x: usize, y: usize, side: f32) -> f32 {
        let (sin, cos) = self.angle.sin_cos();
        let mut inside = 0;
        for sub in 0..SUPERSAMPLES * SUPERSAMPLES {
            let at = |place: usize, sub: usize| {
                (place as f32 + (sub as f32 + 0.5) / SUPERSAMPLES as f32) / side
            };
            let u = (at(x, sub % SUPERSAMPLES) - self.center[0]) / self.radius;
            let v = (at(y, sub / SUPERSAMPLES) - self.center[1]) / self.radius;
            inside += usize::from(is_inside(self.label, u * cos + v * sin, v * cos - u * sin));
        }
        inside as f32 / (SUPERSAMPLES * SUPERSAMPLES) as f32
    }

    /// Returns the brightness that the background's texture adds at a point.
    fn shade(&self, x: f32, y: f32) -> f32 {
        let along = self.slope[0] * (x - 0.5) + self.slope[1] * (y - 0.5);
        match self.background {
            Background::Plain | Background::Speckled => 0.0,
            Background::Shaded => 3.0 * along,
            Background::Striped => {
                let strength = self.slope[0].hypot(self.slope[1]);
                0.7 * strength * (along / strength * 28.0).sin()
            }
        }
    }
}

/// Returns whether a point belongs to the figure, which approximately fills the unit circle; `v` points down.
fn is_inside(label: usize, u: f32, v: f32) -> bool {
    let distance = u.hypot(v);
    let (across, down) = (u.abs(), v.abs());
    let in_patch = across < 1.0 && down < 1.0;
    // Two and a half bars per patch.
    let bar = |place: f32| (place * 1.25 + 0.25).rem_euclid(1.0) < 0.5;
    match CLASSES[label] {
        "disc" => distance < 0.95,
        "ring" => (0.5..1.0).contains(&distance),
        "square" => across < 0.85 && down < 0.85,
        "triangle" => v < 0.6 && across * 1.732 - v < 1.1,
        "cross" => across.min(down) < 0.3 && across.max(down) < 1.0,
        "star" => is_in_star(u, v),
        "crescent" => distance < 1.0 && (u - 0.6).hypot(v) > 0.8,
        "horizontal stripes" => in_patch && bar(v),
        "vertical stripes" => in_patch && bar(u),
        "diagonal stripes" => in_patch && bar((u + v) * 0.8),
        "checkerboard" => in_patch && ((u * 2.0).floor() + (v * 2.0).floor()).rem_euclid(2.0) < 1.0,
        _ => {
            let cell = |place: f32| ((place + 1.0) * 1.5).rem_euclid(1.0) - 0.5;
            in_patch && cell(u).hypot(cell(v)) < 0.34
        }
    }
}

/// Returns whether a point is in a five-pointed star with one point up.
fn is_in_star(u: f32, v: f32) -> bool {
    const TIP: f32 = 1.2;
    const NOTCH: f32 = 0.42;
    let fifth = std::f32::consts::TAU / 5.0;
    let angle = u.atan2(-v).rem_euclid(fifth);
    let angle = angle.min(fifth - angle);
    let distance = u.hypot(v);
    let (x, y) = (distance * angle.cos(), distance * angle.sin());
    // Left of the line from the tip (TIP, 0) to the notch.
    let half = fifth / 2.0;
    let notch = [NOTCH * half.cos(), NOTCH * half.sin()];
    (notch[0] - TIP) * y - notch[1] * (x - TIP) > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(len: usize) -> Synthetic {
        Synthetic::new(0, Split::Train, len, 32)
    }

    #[test]
    fn pictures_are_a_function_of_seed_split_and_index() {
        let base = train(40).picture(17).unwrap();
        // Neither the number of images nor the order of the calls matters.
        let other = train(20);
        other.picture(3).unwrap();
        assert_eq!(base, other.picture(17).unwrap());
        assert_ne!(base, train(40).picture(29).unwrap());
        let test = Synthetic::new(0, Split::Test, 40, 32);
        assert_ne!(base, test.picture(17).unwrap());
        let seed = Synthetic::new(1, Split::Train, 40, 32);
        assert_ne!(base, seed.picture(17).unwrap());
    }

    #[test]
    fn captions_name_class_and_background() {
        let pictures = train(24);
        for index in 0..24 {
            let caption = pictures.caption(index);
            assert!(caption.contains(CLASSES[index % 12]), "{caption}");
            assert!(caption.ends_with("background"), "{caption}");
            assert_eq!(pictures.label(index) as usize, index % 12);
        }
    }

    /// A classifier of mean colors performs at chance, 1 in 12 (standard error of 1200 images: 0.008).
    #[test]
    fn the_mean_color_does_not_reveal_the_class() {
        let mean_color = |pictures: &Synthetic, index| {
            let bytes = pictures.picture(index).unwrap().to_bytes();
            let mut sum = [0.0_f64; 3];
            for pixel in bytes.chunks_exact(3) {
                (0..3).for_each(|c| sum[c] += f64::from(pixel[c]));
            }
            sum
        };
        let pictures = train(6000);
        let mut class_means = [[0.0; 3]; 12];
        for index in 0..6000 {
            let color = mean_color(&pictures, index);
            (0..3).for_each(|c| class_means[index % 12][c] += color[c] / 500.0);
        }
        let held_out = Synthetic::new(0, Split::Test, 1200, 32);
        let right = (0..1200).filter(|index| {
            let color = mean_color(&held_out, *index);
            let distance =
                |mean: &[f64; 3]| -> f64 { (0..3).map(|c| (mean[c] - color[c]).powi(2)).sum() };
            let nearest = (0..12)
                .min_by(|a, b| distance(&class_means[*a]).total_cmp(&distance(&class_means[*b])));
            nearest == Some(index % 12)
        });
        let accuracy = right.count() as f64 / 1200.0;
        assert!(accuracy < 0.12, "{accuracy}");
    }

    #[test]
    fn figure_and_background_differ_by_more_than_an_attack_can_change() {
        let pictures = train(600);
        for index in 0..600 {
            let scene = pictures.scene(index).0;
            let moved = 2.0 * 8.0 / 255.0;
            let difference = (0..3)
                .map(|c| (scene.figure.1[c] - scene.ground.1[c]).abs())
                .fold(0.0, f32::max);
            assert!(difference > 4.0 * moved, "picture {index}: {difference}");
        }
    }

    #[test]
    fn every_figure_covers_20_to_80_percent_of_its_patch() {
        for (label, class) in CLASSES.iter().enumerate() {
            let steps = 100;
            let inside = (0..steps * steps)
                .filter(|i| {
                    let at = |i: usize| (i as f32 + 0.5) / steps as f32 * 2.0 - 1.0;
                    is_inside(label, at(i % steps), at(i / steps))
                })
                .count();
            let share = inside as f32 / (steps * steps) as f32;
            assert!((0.2..0.8).contains(&share), "{class}: {share}");
        }
    }
}
