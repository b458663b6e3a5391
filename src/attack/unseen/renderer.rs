//! A corruption of one image as a differentiable function of its parameters.

use crate::rng::Rng;

/// Height and width of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Extent {
    /// Returns the number of pixels of one channel.
    pub fn pixels(self) -> usize {
        self.height * self.width
    }
}

/// A corruption with everything random about it fixed: what is left is a function from an image and parameters to an image.
///
/// Shapes: images and slopes `[3, height, width]`, parameters `[count]`, all row-major.
/// Units: pixels in [0, 1]; parameters in the corruption's own unit.
pub trait Renderer: Send + Sync {
    /// Returns the number of parameters.
    fn count(&self) -> usize;

    /// Draws the parameters that the attack starts from. They may leave the parameter set, to which the attack projects.
    fn start(&self, epsilon: f64, rng: &mut Rng) -> Vec<f32>;

    /// Draws what the corruption draws again before every rendering; most draw nothing.
    fn redraw(&mut self, _rng: &mut Rng) {}

    /// Returns the corrupted image before its pixels are clipped to [0, 1].
    fn paint(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32>;

    /// Returns the derivative of `<slopes, paint(clean, parameters)>` with respect to the parameters.
    fn pull_paint(&self, clean: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32>;

    /// Returns the corrupted image.
    fn render(&self, clean: &[f32], parameters: &[f32]) -> Vec<f32> {
        let mut image = self.paint(clean, parameters);
        let pixels = image.iter_mut();
        pixels.for_each(|pixel| *pixel = pixel.clamp(0.0, 1.0));
        image
    }

    /// Returns the derivative of `<slopes, render(clean, parameters)>` with respect to the parameters.
    ///
    /// A pixel that is clipped has derivative zero; one on the limit of [0, 1] is not clipped, as in PyTorch.
    fn pull(&self, clean: &[f32], parameters: &[f32], slopes: &[f32]) -> Vec<f32> {
        let painted = self.paint(clean, parameters);
        let open = painted.iter().zip(slopes).map(|(pixel, slope)| {
            let is_open = (0.0..=1.0).contains(pixel);
            if is_open { *slope } else { 0.0 }
        });
        self.pull_paint(clean, parameters, &open.collect::<Vec<f32>>())
    }
}

/// A square kernel of odd size that is stamped onto an image around given points.
///
/// Sparse points make this cheaper than the convolution that it equals: the cross-correlation, with zeros outside, of a
/// plane that is zero everywhere else.
#[derive(Clone, Debug, PartialEq)]
pub struct Stamp {
    size: usize,
    /// The kernel turned by half a turn, which is what a single point leaves.
    turned: Vec<f32>,
}

impl Stamp {
    /// Creates a stamp from the kernel that the cross-correlation takes, `[size, size]`.
    pub fn new(size: usize, mut values: Vec<f32>) -> Self {
        values.reverse();
        Self {
            size,
            turned: values,
        }
    }

    /// Returns the kernel.
    pub fn values(&self) -> Vec<f32> {
        self.turned.iter().rev().copied().collect()
    }

    /// Calls `visit` with each row that a point leaves inside the plane: the first index, and the values.
    fn rows(
        &self,
        extent: Extent,
        [row, column]: [usize; 2],
        mut visit: impl FnMut(usize, &[f32]),
    ) {
        let half = self.size / 2;
        let inside =
            |at: usize, end: usize| half.saturating_sub(at)..self.size.min(end + half - at);
        let columns = inside(column, extent.width);
        for k in inside(row, extent.height) {
            let first = (row + k - half) * extent.width + column + columns.start - half;
            visit(first, &self.turned[k * self.size..][columns.clone()]);
        }
    }

    /// Adds the kernel, times `weight`, to a plane around a point.
    pub fn add(&self, plane: &mut [f32], extent: Extent, point: [usize; 2], weight: f32) {
        self.rows(extent, point, |first, values| {
            let pixels = plane[first..].iter_mut().zip(values);
            pixels.for_each(|(pixel, value)| *pixel += weight * value);
        });
    }

    /// Returns the derivative of `<slopes, plane>` with respect to the weight of [`Self::add`].
    pub fn pull(&self, slopes: &[f32], extent: Extent, point: [usize; 2]) -> f32 {
        // Eight sums, which the compiler keeps in one register.
        let mut sums = [0.0; 8];
        self.rows(extent, point, |first, values| {
            let slopes = &slopes[first..][..values.len()];
            for (slopes, values) in slopes.chunks(8).zip(values.chunks(8)) {
                let terms = slopes.iter().zip(values);
                for (sum, (slope, value)) in sums.iter_mut().zip(terms) {
                    *sum += slope * value;
                }
            }
        });
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_the_cross_correlation_with_a_single_point() {
        let extent = Extent {
            height: 4,
            width: 5,
        };
        let stamp = Stamp::new(3, (0..9).map(|value| value as f32).collect());
        for point in [[0, 0], [1, 3], [3, 4]] {
            let mut plane = vec![0.0; extent.pixels()];
            stamp.add(&mut plane, extent, point, 1.0);
            let slopes: Vec<f32> = (0..20).map(|slope| slope as f32).collect();
            let right: f32 = plane.iter().zip(&slopes).map(|(a, b)| a * b).sum();
            assert_eq!(stamp.pull(&slopes, extent, point), right);
            for y in 0..4i32 {
                for x in 0..5i32 {
                    // out[y, x] = sum over k, j of in[y + k - 1, x + j - 1] * kernel[k, j].
                    let (k, j) = (point[0] as i32 - y + 1, point[1] as i32 - x + 1);
                    let is_reached = (0..3).contains(&k) && (0..3).contains(&j);
                    let right = if is_reached { (3 * k + j) as f32 } else { 0.0 };
                    assert_eq!(plane[(5 * y + x) as usize], right, "{point:?} {y} {x}");
                }
            }
        }
    }
}
