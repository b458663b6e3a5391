//! Queries of the Square attack for batches of images. Random numbers are the host's: windows, signs and patterns come
//! in tables of a few numbers an image.

use crate::evaluation::{Norm, same};
use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Square;
use crate::values::Values;

/// Images of three channels.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Images.
    pub batch: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
}

impl Size {
    fn pixels(self) -> usize {
        3 * self.height * self.width
    }

    /// Panics unless the images are of this size and there are `each` entries of a table for every one.
    fn check(self, images: &Values, entries: usize, each: usize) {
        let right = (self.batch * self.pixels(), Kind::F32);
        assert!((images.len(), images.kind()) == right, "the images are {images:?}, {self:?}");
        assert!(i32::try_from(self.pixels()).is_ok(), "{self:?}");
        assert!(entries == self.batch * each, "{entries} entries, {each} an image, {self:?}");
    }

    fn check_window(self, window: Window) {
        let Window { top, left, side } = window;
        let fits = side > 0 && top + side <= self.height && left + side <= self.width;
        assert!(fits, "{window:?} in {self:?}");
    }

    /// Blocks of 256 threads that each take some pixels.
    fn grid(self) -> [usize; 3] {
        [self.pixels().div_ceil(4 * 256).max(1), self.batch, 1]
    }
}

/// A square of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first line.
    pub top: usize,
    /// Its first column.
    pub left: usize,
    /// Lines and columns.
    pub side: usize,
}

/// How a pattern is put into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Motif {
    /// Whether lines and columns of the pattern are exchanged.
    pub is_standing: bool,
    /// Of each channel whether the pattern is added, else subtracted.
    pub is_positive: [bool; 3],
}

impl Motif {
    fn flags(self) -> i32 {
        let bits = [self.is_standing, self.is_positive[0], self.is_positive[1], self.is_positive[2]];
        bits.into_iter().enumerate().map(|(place, bit)| i32::from(bit) << place).sum()
    }
}

/// A query in l2 or l1: what two squares have of epsilon goes to the first.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// The square that gets a new pattern.
    pub window: Window,
    /// First line and column of the other, of the same side.
    pub other: [usize; 2],
    /// How the pattern is put into the first.
    pub motif: Motif,
}

/// Square patterns by their sides, on a GPU for as long as they serve.
#[derive(Clone, Debug)]
pub struct Patterns {
    values: Values,
    /// Sides, and where their patterns start.
    places: Vec<(usize, usize)>,
}

impl Patterns {
    /// Shapes: every pattern `[side, side]` of a side of its own, lying.
    ///
    /// # Panics
    ///
    /// If a pattern is not square.
    pub fn new(gpu: &Gpu, patterns: &[Vec<f32>]) -> Self {
        let mut places = Vec::new();
        let mut all = Vec::new();
        for pattern in patterns {
            let side = pattern.len().isqrt();
            assert!(side > 0 && side * side == pattern.len(), "a pattern of {} numbers", pattern.len());
            places.push((side, all.len()));
            all.extend_from_slice(pattern);
        }
        Self { values: Values::send(gpu, &all), places }
    }

    fn place(&self, side: usize) -> usize {
        let found = self.places.iter().find(|(of, _)| *of == side);
        found.unwrap_or_else(|| panic!("no pattern of side {side} among {:?}", self.places)).1
    }
}

/// linf: the first query, vertical stripes on the clean images, to `[0, 1]`.
///
/// Shapes: `clean` and the result `[batch, 3, height, width]` in f32; `stripes` `[batch, 3, width]`, epsilon or minus epsilon.
///
/// # Panics
///
/// If the lengths do not match.
pub fn linf_start(clean: &Values, size: Size, stripes: &[f32]) -> Values {
    size.check(clean, stripes.len(), 3 * size.width);
    let to = Values::new(clean.gpu(), clean.len(), Kind::F32);
    let stripes = Values::send(clean.gpu(), stripes);
    let [height, width] = [size.height, size.width].map(|side| side as i32);
    // SAFETY: the lengths were checked above.
    unsafe { launch!(clean.gpu(), Square, "square_stripes", size.grid(), 256, 0, &to, clean, &stripes, height, width) };
    to
}

/// linf: the best images with one square each moved by a jump a channel, within epsilon of the clean images and `[0,
/// 1]`.
///
/// Shapes: `best`, `clean` and the result `[batch, 3, height, width]` in f32; `windows` `[batch]`, with the jumps of the
/// channels.
///
/// # Panics
///
/// If the lengths do not match, or a window is not within the image.
pub fn linf_change(best: &Values, clean: &Values, size: Size, windows: &[(Window, [f32; 3])], epsilon: f32) -> Values {
    same(best, &[clean]);
    size.check(clean, windows.len(), 1);
    let mut table = Vec::with_capacity(windows.len() * 24);
    for (window, jumps) in windows {
        size.check_window(*window);
        table.extend([window.top, window.left, window.side].iter().flat_map(|number| (*number as i32).to_le_bytes()));
        table.extend(jumps.iter().flat_map(|jump| jump.to_le_bytes()));
    }
    let table = Values::send_bytes(best.gpu(), &table);
    let to = Values::new(best.gpu(), best.len(), Kind::F32);
    let [height, width] = [size.height, size.width].map(|side| side as i32);
    // SAFETY: the lengths and windows were checked above.
    unsafe {
        launch!(
            best.gpu(),
            Square,
            "square_jump",
            size.grid(),
            256,
            0,
            &to,
            best,
            clean,
            &table,
            epsilon,
            height,
            width
        );
    }
    to
}

/// The grid of patterns that l2 and l1 start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Pixels on a side of a pattern.
    pub side: usize,
    /// Pixels above the first pattern and to its left.
    pub margin: usize,
    /// Patterns one below the other.
    pub rows: usize,
    /// Patterns in a row.
    pub columns: usize,
}

impl Tiles {
    /// Five by five where the image is as wide as high.
    pub fn new(size: Size) -> Self {
        let side = (size.height / 5).max(1);
        let margin = (size.height - (side * 5).min(size.height)) / 2;
        let fits = |length: usize| length.saturating_sub(margin) / side;
        Self { side, margin, rows: fits(size.height), columns: fits(size.width) }
    }
}

/// l2 and l1: the first query, a grid of patterns on the clean images.
///
/// In l2 the change is brought to length `epsilon` and the image to `[0, 1]`. In l1 neither: the projection onto the
/// ball is a step of its own.
///
/// Shapes: `clean` and the result `[batch, 3, height, width]` in f32; `motifs` `[batch, rows, columns]` of [`Tiles`].
///
/// # Panics
///
/// If the lengths do not match, no pattern has the side of the tiles, or the norm is linf.
pub fn pattern_start(
    norm: Norm,
    clean: &Values,
    size: Size,
    patterns: &Patterns,
    motifs: &[Motif],
    epsilon: f64,
) -> Values {
    let Tiles { side, margin, rows, columns } = Tiles::new(size);
    check_norm(norm);
    size.check(clean, motifs.len(), rows * columns);
    let pattern = patterns.values.at() + (patterns.place(side) * 4) as u64;
    let gpu = clean.gpu();
    let table: Vec<u8> = motifs.iter().flat_map(|motif| motif.flags().to_le_bytes()).collect();
    let table = Values::send_bytes(gpu, &table);
    let to = Values::new(gpu, clean.len(), Kind::F32);
    let [height, width, side, margin, rows, columns] =
        [size.height, size.width, side, margin, rows, columns].map(|number| number as i32);
    // SAFETY: the lengths were checked above; the pattern is one of `side`; an f64 is eight bytes as its bits are.
    unsafe {
        launch!(
            gpu,
            Square,
            "square_tiles",
            [size.batch, 1, 1],
            512,
            512 * 8,
            &to,
            clean,
            &table,
            pattern,
            epsilon.to_bits(),
            norm.number(),
            height,
            width,
            side,
            margin,
            rows,
            columns
        );
    }
    to
}

/// l2 and l1: the best images with the changes of two squares, and what is left of epsilon, put into the first of them.
///
/// In l2 the change is brought to length `epsilon` and the image to `[0, 1]`. In l1 neither: the projection onto the
/// ball is a step of its own.
///
/// Shapes: `best`, `clean` and the result `[batch, 3, height, width]` in f32; `exchanges` `[batch]`.
///
/// # Panics
///
/// If the lengths do not match, a square is not within the image or has no pattern, or the norm is linf.
pub fn pattern_change(
    norm: Norm,
    best: &Values,
    clean: &Values,
    size: Size,
    patterns: &Patterns,
    exchanges: &[Exchange],
    epsilon: f64,
) -> Values {
    check_norm(norm);
    same(best, &[clean]);
    size.check(clean, exchanges.len(), 1);
    let mut table = Vec::with_capacity(exchanges.len() * 28);
    for Exchange { window, other: [top, left], motif } in exchanges {
        size.check_window(*window);
        size.check_window(Window { top: *top, left: *left, side: window.side });
        let places = [window.top, window.left, *top, *left, window.side, patterns.place(window.side)];
        table.extend(places.iter().flat_map(|number| (*number as i32).to_le_bytes()));
        table.extend(motif.flags().to_le_bytes());
    }
    let gpu = best.gpu();
    let table = Values::send_bytes(gpu, &table);
    let to = Values::new(gpu, best.len(), Kind::F32);
    let [height, width] = [size.height, size.width].map(|side| side as i32);
    // SAFETY: the lengths and squares were checked above; an f64 is eight bytes as its bits are.
    unsafe {
        launch!(
            gpu,
            Square,
            "square_exchange",
            [size.batch, 1, 1],
            512,
            521 * 8,
            &to,
            best,
            clean,
            &table,
            &patterns.values,
            epsilon.to_bits(),
            norm.number(),
            height,
            width
        );
    }
    to
}

fn check_norm(norm: Norm) {
    assert!(norm != Norm::Linf, "patterns are for l2 and l1");
}
