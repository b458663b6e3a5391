//! The arithmetic of JPEG decoding after the entropy decoder: inverse transform, upsampling, colors.
//!
//! Integers throughout, so that every path gives the same bits, which are those of libjpeg-turbo's defaults. The
//! loops are plain; compiled for each path, they become vectors. Files, Huffman codes and which blocks are
//! wanted are the caller's.
//!
//! Source: ITU T.81, A.3.3; libjpeg-turbo's `jidctint.c`, `jdsample.c` and `jdcolor.c` for the rounding.

use std::num::Wrapping;

use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};

/// Coefficients of one block of 8 x 8 samples, line by line (not in zigzag order).
pub type Block = [i16; 64];

/// Dequantizes and transforms a row of blocks to samples.
///
/// Shapes: `samples` `[8, stride]`; block `i` fills columns `8 * i` to `8 * i + 7`; its last line may end with
/// the last block. `table` is in the order of the blocks.
/// Units: samples are bytes; the level shift of 128 is added.
///
/// # Panics
///
/// If `samples` has no room for the blocks.
pub fn inverse_transform(blocks: &[Block], table: &[u16; 64], samples: &mut [u8], stride: usize) {
    let width = blocks.len() * 8;
    let room = width <= stride && samples.len() >= 7 * stride + width;
    assert!(room, "{} samples in lines of {stride} for {} blocks", samples.len(), blocks.len());
    Isa::current().run(InverseTransform { blocks, table, samples, stride });
}

/// Like [`inverse_transform`], with `side` samples on a side of each block instead of 8: each is the mean of a square
/// of the samples at full size, up to rounding.
///
/// Shapes: `samples` `[side, stride]`; block `i` fills columns `side * i` to `side * i + side - 1`.
/// Source: libjpeg-turbo's `jidctred.c`, to the bit.
///
/// # Panics
///
/// If `samples` has no room for the blocks, or `side` is not 1, 2, 4 or 8.
pub fn reduced_inverse_transform(side: usize, blocks: &[Block], table: &[u16; 64], samples: &mut [u8], stride: usize) {
    if side == 8 {
        return inverse_transform(blocks, table, samples, stride);
    }
    assert!([1, 2, 4].contains(&side), "{side} samples on a side of a block");
    let width = blocks.len() * side;
    let room = width <= stride && samples.len() >= (side - 1) * stride + width;
    assert!(room, "{} samples in lines of {stride} for {} blocks", samples.len(), blocks.len());
    Isa::current().run(ReducedTransform { side, blocks, table, samples, stride });
}

/// Twice as many samples along a line, each a quarter of the way to its neighbor: 3/4 of the nearer, 1/4 of the other.
///
/// Shapes: `line` `[n + 2]`, the samples with a neighbor on each side; `wide` `[2 n]`.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn upsample_across(line: &[u8], wide: &mut [u8]) {
    check_wide(line.len(), wide.len());
    Isa::current().run(Across { line, wide });
}

/// Like [`upsample_across`] in both directions: `near` is the line that holds the samples, `far` the one above or
/// below.
///
/// Shapes: `near`, `far` `[n + 2]`, `wide` `[2 n]`.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn upsample_both(near: &[u8], far: &[u8], wide: &mut [u8]) {
    assert!(near.len() == far.len(), "lines of {} and {} samples", near.len(), far.len());
    check_wide(near.len(), wide.len());
    Isa::current().run(Both { near, far, wide });
}

/// One line a quarter of the way from `near` to `far`.
///
/// `above`: `far` is the upper line, so halves round down; otherwise up.
///
/// # Panics
///
/// If the lengths differ.
pub fn upsample_down(near: &[u8], far: &[u8], above: bool, line: &mut [u8]) {
    let found = (near.len(), far.len());
    assert!(found == (line.len(), line.len()), "lines of {found:?} samples for one of {}", line.len());
    Isa::current().run(Down { near, far, bias: if above { 1 } else { 2 }, line });
}

/// Luminance and two color differences to red, green and blue.
///
/// Shapes: `luma`, `blue`, `red` `[n]`; `pixels` `[n, 3]`.
/// Source: JFIF 1.02, with the 16 binary places of `jdcolor.c`.
///
/// # Panics
///
/// If the lengths do not fit.
pub fn ycc_to_rgb(luma: &[u8], blue: &[u8], red: &[u8], pixels: &mut [u8]) {
    let found = (blue.len(), red.len(), pixels.len());
    let fits = found == (luma.len(), luma.len(), 3 * luma.len());
    assert!(fits, "lines of {found:?} values for {} of luminance", luma.len());
    Isa::current().run(YccToRgb { luma, blue, red, pixels });
}

fn check_wide(line: usize, wide: usize) {
    assert!(line >= 3 && wide == 2 * (line - 2), "{wide} samples from a line of {line}");
}

struct InverseTransform<'a> {
    blocks: &'a [Block],
    table: &'a [u16; 64],
    samples: &'a mut [u8],
    stride: usize,
}

/// Blocks that are transformed together: 2 x 2 blocks fill sixteen vectors of sixteen lanes.
const TOGETHER: usize = 4;

impl Op for InverseTransform<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { blocks, table, samples, stride } = self;
        let (mut waiting, mut count) = ([0; TOGETHER], 0);
        for (place, block) in blocks.iter().enumerate() {
            let (first, others) = block.split_at(8);
            let varies = first[1..].iter().chain(others).fold(0, |found, value| found | value);
            if varies == 0 {
                let level = flat(block[0], table[0]);
                for line in 0..8 {
                    samples[line * stride + 8 * place..][..8].fill(level);
                }
                continue;
            }
            waiting[count] = place;
            count += 1;
            if count == TOGETHER {
                transform(s, blocks, table, &waiting, samples, stride);
                count = 0;
            }
        }
        if count > 0 {
            transform(s, blocks, table, &waiting[..count], samples, stride);
        }
    }
}

/// The one level of a block that has only a mean; what the two passes come to then.
#[inline(always)]
fn flat(mean: i16, step: u16) -> u8 {
    let level = Wrapping(i32::from(mean)) * Wrapping(i32::from(step));
    (((level << PASS_BITS) + Wrapping(16 + (128 << 5))) >> 5).0.clamp(0, 255) as u8
}

/// Transforms up to four blocks, at the places given, into their columns of `samples`.
#[inline(always)]
fn transform<S: Lanes>(s: S, blocks: &[Block], table: &[u16; 64], places: &[usize], samples: &mut [u8], stride: usize) {
    let mut values = [[0_u32; LANES]; LANES];
    for (slot, place) in places.iter().enumerate() {
        let (block, left) = (&blocks[*place], slot % 2 * 8);
        for line in 0..8 {
            let to = &mut values[slot / 2 * 8 + line];
            for column in 0..8 {
                let (value, step) = (block[line * 8 + column], table[line * 8 + column]);
                to[left + column] = (i32::from(value) * i32::from(step)) as u32;
            }
        }
    }
    both_halves::<{ SCALE_BITS - PASS_BITS }, 0>(&mut values);
    transpose(s, &mut values);
    both_halves::<{ SCALE_BITS + PASS_BITS + 3 }, 128>(&mut values);
    transpose(s, &mut values);
    // Stored by an instruction of the path's: of a loop the compiler makes shifts of single bytes.
    let mut bytes = [[0; LANES]; LANES];
    for (bytes, values) in bytes.iter_mut().zip(&values) {
        s.store_bytes(bytes, s.load_cells(values));
    }
    for (slot, place) in places.iter().enumerate() {
        for line in 0..8 {
            let from = &bytes[slot / 2 * 8 + line][slot % 2 * 8..][..8];
            samples[line * stride + 8 * place..][..8].copy_from_slice(from);
        }
    }
}

#[inline(always)]
fn transpose<S: Lanes>(s: S, values: &mut [[u32; LANES]; LANES]) {
    // No closures: they would not be compiled with the path's instructions.
    let mut rows = [s.splat_cell(0); LANES];
    for (row, from) in rows.iter_mut().zip(&*values) {
        *row = s.load_cells(from);
    }
    s.transpose(&mut rows);
    for (row, to) in rows.iter().zip(values) {
        s.store_cells(to, *row);
    }
}

/// Binary places of the constants.
const SCALE_BITS: usize = 13;
/// Binary places that are kept between the passes.
const PASS_BITS: usize = 2;

/// The one-dimensional transform down the upper eight rows, and down the lower eight.
#[inline(always)]
fn both_halves<const SHIFT: usize, const LEVEL: i32>(values: &mut [[u32; LANES]; LANES]) {
    let (upper, lower) = values.split_at_mut(8);
    for half in [upper, lower] {
        let Some(half) = half.first_chunk_mut::<8>() else { return };
        // Over lanes: these become vectors.
        #[allow(clippy::needless_range_loop)]
        for lane in 0..LANES {
            let mut column = [Wrapping(0); 8];
            for row in 0..8 {
                column[row] = Wrapping(half[row][lane] as i32);
            }
            let column = line_of_eight::<SHIFT, LEVEL>(column);
            for row in 0..8 {
                half[row][lane] = column[row].0 as u32;
            }
        }
    }
}

/// The inverse cosine transform of eight values, rounded by `SHIFT` bits; times the square root of 8,
/// plus `LEVEL`.
///
/// Source: Loeffler, Ligtenberg and Moschytz 1989, figure 8 backwards, with constants of 13 binary places.
#[inline(always)]
fn line_of_eight<const SHIFT: usize, const LEVEL: i32>(x: [Wrapping<i32>; 8]) -> [Wrapping<i32>; 8] {
    let k = Wrapping::<i32>;

    // Even: the sum and difference of 0 and 4, and 2 and 6 turned by 3/8 of a right angle.
    let turned = (x[2] + x[6]) * k(4433); // 0.541196100
    let (low, high) = (turned + x[2] * k(6270), turned - x[6] * k(15137)); // 0.765366865, 1.847759065
    let (sum, difference) = ((x[0] + x[4]) << SCALE_BITS, (x[0] - x[4]) << SCALE_BITS);
    let even = [sum + low, difference + high, difference - high, sum - low];

    // Odd: 7, 5, 3 and 1 in two rotations that share their products.
    let shared = (x[7] + x[3] + x[5] + x[1]) * k(9633); // 1.175875602
    let outer = (x[7] + x[1]) * k(-7373); // 0.899976223
    let inner = (x[5] + x[3]) * k(-20995); // 2.562915447
    let first = (x[7] + x[3]) * k(-16069) + shared; // 1.961570560
    let second = (x[5] + x[1]) * k(-3196) + shared; // 0.390180644
    let odd = [
        x[1] * k(12299) + outer + second, // 1.501321110
        x[3] * k(25172) + inner + first,  // 3.072711026
        x[5] * k(16819) + inner + second, // 2.053119869
        x[7] * k(2446) + outer + first,   // 0.298631336
    ];

    let half = k((LEVEL << SHIFT) + (1 << (SHIFT - 1)));
    let mut result = [half; 8];
    for i in 0..4 {
        result[i] = (half + even[i] + odd[i]) >> SHIFT;
        result[7 - i] = (half + even[i] - odd[i]) >> SHIFT;
    }
    result
}

struct ReducedTransform<'a> {
    side: usize,
    blocks: &'a [Block],
    table: &'a [u16; 64],
    samples: &'a mut [u8],
    stride: usize,
}

impl Op for ReducedTransform<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { side, blocks, table, samples, stride } = self;
        for (place, block) in blocks.iter().enumerate() {
            let samples = &mut samples[side * place..];
            match side {
                4 => reduced::<4, 1>(line_of_four, block, table, samples, stride),
                2 => reduced::<2, 2>(line_of_two, block, table, samples, stride),
                _ => samples[0] = flat_mean(block[0], table[0]),
            }
        }
    }
}

/// The mean of a block.
#[inline(always)]
fn flat_mean(mean: i16, step: u16) -> u8 {
    let level = Wrapping(i32::from(mean)) * Wrapping(i32::from(step)) + Wrapping(4);
    ((level >> 3).0 + 128).clamp(0, 255) as u8
}

/// Transforms one block: columns, then lines, each to `SIDE` values that are `2 ^ HALVINGS` neighbors' mean.
#[inline(always)]
fn reduced<const SIDE: usize, const HALVINGS: usize>(
    line: fn([Wrapping<i32>; 8]) -> [Wrapping<i32>; SIDE],
    block: &Block,
    table: &[u16; 64],
    samples: &mut [u8],
    stride: usize,
) {
    // Lines of the result, before the second pass.
    let mut lines = [[Wrapping(0); 8]; SIDE];
    let round = |value: Wrapping<i32>, shift: usize| (value + Wrapping(1 << (shift - 1))) >> shift;
    for column in 0..8 {
        let mut x = [Wrapping(0); 8];
        for (row, x) in x.iter_mut().enumerate() {
            let at = row * 8 + column;
            *x = Wrapping(i32::from(block[at])) * Wrapping(i32::from(table[at]));
        }
        for (row, value) in lines.iter_mut().zip(line(x)) {
            row[column] = round(value, SCALE_BITS - PASS_BITS + HALVINGS);
        }
    }
    for (y, x) in lines.into_iter().enumerate() {
        for (sample, value) in samples[y * stride..].iter_mut().zip(line(x)) {
            let value = round(value, SCALE_BITS + PASS_BITS + 3 + HALVINGS);
            *sample = (value.0 + 128).clamp(0, 255) as u8;
        }
    }
}

/// The means of pairs of what [`line_of_eight`] gives, not rounded; times two.
#[inline(always)]
fn line_of_four(x: [Wrapping<i32>; 8]) -> [Wrapping<i32>; 4] {
    let k = Wrapping::<i32>;
    let turned = x[2] * k(15137) - x[6] * k(6270); // 1.847759065, 0.765366865
    let mean = x[0] << (SCALE_BITS + 1);
    // 0.211164243, 1.451774981, 2.172734803, 1.061594337
    let inner = x[5] * k(11893) - x[7] * k(1730) - x[3] * k(17799) + x[1] * k(8697);
    // 0.509795579, 0.601344887, 0.899976223, 2.562915447
    let outer = x[3] * k(7373) - x[7] * k(4176) - x[5] * k(4926) + x[1] * k(20995);
    let (sides, middle) = (mean + turned, mean - turned);
    [sides + outer, middle + inner, middle - inner, sides - outer]
}

/// The means of fours of what [`line_of_eight`] gives, not rounded; times four.
#[inline(always)]
fn line_of_two(x: [Wrapping<i32>; 8]) -> [Wrapping<i32>; 2] {
    let k = Wrapping::<i32>;
    let mean = x[0] << (SCALE_BITS + 2);
    // 0.720959822, 0.850430095, 1.272758580, 3.624509785
    let half = x[5] * k(6967) - x[7] * k(5906) - x[3] * k(10426) + x[1] * k(29692);
    [mean + half, mean - half]
}

struct Across<'a> {
    line: &'a [u8],
    wide: &'a mut [u8],
}

impl Op for Across<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { line, wide } = self;
        let n = wide.len() / 2;
        let (left, middle, right) = (&line[..n], &line[1..][..n], &line[2..][..n]);
        let (pairs, _) = wide.as_chunks_mut::<2>();
        for (((pair, left), middle), right) in pairs.iter_mut().zip(left).zip(middle).zip(right) {
            let near = 3 * u16::from(*middle);
            pair[0] = ((near + u16::from(*left) + 1) >> 2) as u8;
            pair[1] = ((near + u16::from(*right) + 2) >> 2) as u8;
        }
    }
}

struct Both<'a> {
    near: &'a [u8],
    far: &'a [u8],
    wide: &'a mut [u8],
}

impl Op for Both<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { near, far, wide } = self;
        let n = wide.len() / 2;
        let (pairs, _) = wide.as_chunks_mut::<2>();
        let from = |i: usize| near[i..][..n].iter().zip(&far[i..][..n]);
        let sum = |(near, far): (&u8, &u8)| 3 * u16::from(*near) + u16::from(*far);
        for (((pair, left), middle), right) in pairs.iter_mut().zip(from(0)).zip(from(1)).zip(from(2)) {
            let middle = 3 * sum(middle);
            pair[0] = ((middle + sum(left) + 8) >> 4) as u8;
            pair[1] = ((middle + sum(right) + 7) >> 4) as u8;
        }
    }
}

struct Down<'a> {
    near: &'a [u8],
    far: &'a [u8],
    bias: u16,
    line: &'a mut [u8],
}

impl Op for Down<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        for ((value, near), far) in self.line.iter_mut().zip(self.near).zip(self.far) {
            *value = ((3 * u16::from(*near) + u16::from(*far) + self.bias) >> 2) as u8;
        }
    }
}

struct YccToRgb<'a> {
    luma: &'a [u8],
    blue: &'a [u8],
    red: &'a [u8],
    pixels: &'a mut [u8],
}

/// Pixels that are converted together.
const PIXELS: usize = 32;

impl Op for YccToRgb<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { luma, blue, red, pixels } = self;
        let (lumas, last_luma) = luma.as_chunks::<PIXELS>();
        let (blues, last_blue) = blue.as_chunks::<PIXELS>();
        let (reds, last_red) = red.as_chunks::<PIXELS>();
        let (whole, last) = pixels.split_at_mut(lumas.len() * PIXELS * 3);
        let (whole, _) = whole.as_chunks_mut::<{ PIXELS * 3 }>();
        for (((luma, blue), red), pixels) in lumas.iter().zip(blues).zip(reds).zip(whole) {
            convert(luma, blue, red, pixels);
        }
        if !last.is_empty() {
            let padded = |part: &[u8]| {
                let mut padded = [0; PIXELS];
                padded[..part.len()].copy_from_slice(part);
                padded
            };
            let mut result = [0; PIXELS * 3];
            convert(&padded(last_luma), &padded(last_blue), &padded(last_red), &mut result);
            last.copy_from_slice(&result[..last.len()]);
        }
    }
}

#[inline(always)]
fn convert(luma: &[u8; PIXELS], blue: &[u8; PIXELS], red: &[u8; PIXELS], pixels: &mut [u8; PIXELS * 3]) {
    const HALF: i32 = 1 << 15;
    let mut planes = [[0_u8; PIXELS]; 3];
    for i in 0..PIXELS {
        let (y, cb, cr) = (i32::from(luma[i]), i32::from(blue[i]) - 128, i32::from(red[i]) - 128);
        let byte = |difference: i32| (y + (difference >> 16)).clamp(0, 255) as u8;
        planes[0][i] = byte(91_881 * cr + HALF); // 1.402
        planes[1][i] = byte(HALF - 22_554 * cb - 46_802 * cr); // 0.34414, 0.71414
        planes[2][i] = byte(116_130 * cb + HALF); // 1.772
    }
    for i in 0..PIXELS {
        pixels[3 * i] = planes[0][i];
        pixels[3 * i + 1] = planes[1][i];
        pixels[3 * i + 2] = planes[2][i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::{Path, with_path};

    fn available() -> impl Iterator<Item = Path> {
        Path::ALL.into_iter().filter(|path| path.is_available())
    }

    /// Bytes that look random and are the same on every run.
    fn noise(count: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            (state >> 16) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    /// Nine blocks: some flat, some with large values.
    fn blocks() -> Vec<Block> {
        let noise = noise(9 * 64);
        let block = |number: usize| {
            let values = &noise[number * 64..][..64];
            let scale = [0, 1, 2, 3][number % 4];
            std::array::from_fn(|i| {
                if i == 0 { 7 * i16::from(values[0]) - 800 } else { scale * (i16::from(values[i]) - 128) }
            })
        };
        (0..9).map(block).collect()
    }

    /// The definition, T.81 A.3.3; rounding apart.
    #[test]
    fn the_inverse_transform_is_within_one_of_its_definition() {
        let blocks = blocks();
        let table = std::array::from_fn(|i| 1 + (i as u16) / 16);
        let mut samples = vec![0; 8 * 72];
        inverse_transform(&blocks, &table, &mut samples, 72);
        let scale = |frequency: usize| if frequency == 0 { 0.5_f64.sqrt() } else { 1.0 };
        let wave = |place: usize, frequency: usize| {
            ((2 * place + 1) as f64 * frequency as f64 * std::f64::consts::PI / 16.0).cos()
        };
        for (number, block) in blocks.iter().enumerate() {
            for (y, x) in (0..64).map(|i| (i / 8, i % 8)) {
                let terms = (0..64).map(|i| {
                    let (v, u) = (i / 8, i % 8);
                    let value = f64::from(block[i]) * f64::from(table[i]);
                    scale(u) * scale(v) * value * wave(x, u) * wave(y, v) / 4.0
                });
                let exact = (terms.sum::<f64>() + 128.0).clamp(0.0, 255.0);
                let found = f64::from(samples[y * 72 + number * 8 + x]);
                assert!((found - exact).abs() <= 1.0, "block {number} at {x}, {y}: {found}, exactly {exact}");
            }
        }
    }

    #[test]
    fn every_path_gives_the_same_bits() {
        let blocks = blocks();
        let table = std::array::from_fn(|i| 3 + i as u16);
        let (a, b, c) = (noise(101), noise(202)[101..].to_vec(), noise(303)[202..].to_vec());
        let all = |path| {
            with_path(path, || {
                let mut samples = vec![0; 7 * 80 + 72];
                inverse_transform(&blocks, &table, &mut samples, 80);
                let mut wide = [vec![0; 198], vec![0; 198]];
                upsample_across(&a, &mut wide[0]);
                upsample_both(&a, &b, &mut wide[1]);
                let mut lines = [vec![0; 101], vec![0; 101]];
                upsample_down(&a, &b, true, &mut lines[0]);
                upsample_down(&a, &b, false, &mut lines[1]);
                let mut pixels = vec![0; 303];
                ycc_to_rgb(&a, &b, &c, &mut pixels);
                (samples, wide, lines, pixels)
            })
        };
        let portable = all(Path::Portable);
        for path in available() {
            assert!(all(path) == portable, "{path:?}");
        }
    }

    /// Each sample is the mean of a square of the exact ones; rounding apart.
    #[test]
    fn a_reduced_transform_gives_means_of_squares_on_every_path() {
        // Small enough that no sample is clamped, after which means would differ.
        let blocks: Vec<Block> = blocks().into_iter().map(|block| block.map(|value| value / 16)).collect();
        let table = [1; 64];
        let mut whole = vec![0; 8 * 72];
        inverse_transform(&blocks, &table, &mut whole, 72);
        for side in [4, 2, 1] {
            let width = 9 * side;
            let all = |path| {
                with_path(path, || {
                    let mut samples = vec![0; side * width];
                    reduced_inverse_transform(side, &blocks, &table, &mut samples, width);
                    samples
                })
            };
            let found = all(Path::Portable);
            let square = 8 / side;
            for (place, sample) in found.iter().enumerate() {
                let (top, left) = (place / width * square, place % width * square);
                let lines = whole.chunks_exact(72).skip(top).take(square);
                let sum: u32 = lines.flat_map(|line| &line[left..][..square]).map(|value| u32::from(*value)).sum();
                let mean = f64::from(sum) / (square * square) as f64;
                assert!((mean - f64::from(*sample)).abs() <= 1.0, "1/{square} at {left}, {top}: {sample}, not {mean}");
            }
            for path in available() {
                assert!(all(path) == found, "{path:?}");
            }
        }
    }

    #[test]
    fn values_beyond_any_picture_do_not_panic() {
        let blocks = [[i16::MIN; 64], [i16::MAX; 64]];
        for path in available() {
            with_path(path, || inverse_transform(&blocks, &[u16::MAX; 64], &mut [0; 128], 16));
            for side in [4, 2, 1] {
                with_path(path, || reduced_inverse_transform(side, &blocks, &[u16::MAX; 64], &mut [0; 128], 16));
            }
        }
    }

    #[test]
    fn a_quarter_of_the_way_is_rounded_as_libjpeg_does() {
        let mut wide = [0; 4];
        upsample_across(&[0, 10, 20, 20], &mut wide);
        assert_eq!(wide, [7, 13, 17, 20]);
        upsample_both(&[8; 4], &[12; 4], &mut wide);
        assert_eq!(wide, [9; 4]);
        let mut line = [0; 2];
        upsample_down(&[10, 10], &[12, 13], true, &mut line);
        assert_eq!(line, [10, 11]);
        upsample_down(&[10, 10], &[12, 13], false, &mut line);
        assert_eq!(line, [11, 11]);
    }

    #[test]
    fn grey_keeps_its_level_and_primary_colors_are_found() {
        let mut pixels = [0; 9];
        ycc_to_rgb(&[77, 76, 150], &[128, 85, 44], &[128, 255, 21], &mut pixels);
        assert_eq!(pixels, [77, 77, 77, 254, 0, 0, 0, 255, 1]);
    }
}
