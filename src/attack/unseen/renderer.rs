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
    /// Side of the kernel.
    pub size: usize,
    /// Its values, `[size, size]`, as the cross-correlation takes them.
    pub values: Vec<f32>,
}

impl Stamp {
    /// Calls `visit` with the index in the plane and the kernel's value for each pixel that a point reaches.
    #[inline]
    pub(super) fn visit(
        &self,
        extent: Extent,
        [row, column]: [usize; 2],
        mut visit: impl FnMut(usize, f32),
    ) {
        let half = self.size / 2;
        // The output at `row + half - k` reads the point with the kernel's row k.
        let reach = |at: usize, end: usize| {
            (at + half + 1).saturating_sub(end)..(at + half + 1).min(self.size)
        };
        for k in reach(row, extent.height) {
            let first = (row + half - k) * extent.width;
            let kernel = &self.values[k * self.size..][..self.size];
            for j in reach(column, extent.width) {
                visit(first + column + half - j, kernel[j]);
            }
        }
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
        let stamp = Stamp {
            size: 3,
            values: (0..9).map(|value| value as f32).collect(),
        };
        for point in [[0, 0], [1, 3], [3, 4]] {
            let mut plane = vec![0.0; extent.pixels()];
            stamp.visit(extent, point, |index, value| plane[index] += value);
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
