//! Channels-last images to rows of what a kernel sees, so that a dense convolution is a product; and the gradient's way
//! back.

use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Conv;
use crate::values::Values;

/// Images, and the kernel whose view of them is written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfold {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel; multiples of 8 are faster.
    pub channels: usize,
    /// Pixels on a side of the kernel.
    pub kernel: usize,
    /// Pixels from one place of the kernel to the next.
    pub stride: usize,
    /// Zeros on each side of the image.
    pub padding: usize,
}

impl Unfold {
    /// Places of the kernel down and along the image, as PyTorch counts them: `(size + 2 padding - kernel) / stride +
    /// 1`, none if the kernel is larger than the padded image.
    pub fn output(&self) -> [usize; 2] {
        let places = |size: usize| match (size + 2 * self.padding).checked_sub(self.kernel) {
            Some(room) => room / self.stride + 1,
            None => 0,
        };
        [places(self.height), places(self.width)]
    }

    /// Elements of a row: what one place of the kernel sees.
    pub fn row(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }

    /// A row for every place of the kernel: its lines, their pixels, their channels.
    ///
    /// Shapes: `x` `[batch, height, width, channels]`, the result `[batch, places, kernel * kernel * channels]`, places
    /// line by line; both f32. With a weight `[out, kernel, kernel, channels]` the convolution is `rows W^T`.
    ///
    /// # Panics
    ///
    /// If `x` has a length that does not match the sizes or is not f32, or kernel or stride are 0.
    pub fn unfold(&self, x: &Values) -> Values {
        let [image, rows] = self.lens();
        self.run("unfold", ("x", x, image), rows)
    }

    /// The gradient of the images from that of the rows: of every element the sum over all places that saw it.
    ///
    /// # Panics
    ///
    /// If `rows` have not the length that the sizes say or are not f32, or kernel or stride are 0.
    pub fn gradient(&self, rows: &Values) -> Values {
        let [image, len] = self.lens();
        self.run("unfold_gradient", ("rows", rows, len), image)
    }

    /// Elements of the images and of the rows.
    fn lens(&self) -> [usize; 2] {
        assert!(self.kernel > 0 && self.stride > 0, "{self:?} has no kernel or no stride");
        let [down, along] = self.output();
        [self.batch * self.height * self.width * self.channels, self.batch * down * along * self.row()]
    }

    fn run(&self, name: &str, (what, from, right): (&str, &Values, usize), len: usize) -> Values {
        assert!((from.len(), from.kind()) == (right, Kind::F32), "`{what}` is {from:?}, {self:?} needs {right} in f32");
        let (name, each) = match self.channels.is_multiple_of(8) {
            true => (format!("{name}_eights"), 8),
            false => (format!("{name}_ones"), 1),
        };
        let to = Values::new(from.gpu(), len, Kind::F32);
        let count = len / each;
        assert!(count < 1 << 31, "{self:?} is too large for one launch");
        let grid = [count.div_ceil(256).min(1 << 16), 1, 1];
        let [down, along] = self.output();
        let Self { height, width, channels, kernel, stride, padding, .. } = *self;
        let sizes = [height, width, channels, kernel, stride, padding, down, along];
        let [h, w, c, k, s, p, d, a] = sizes.map(|size| size as i32);
        // SAFETY: images and rows have as many numbers as the sizes say.
        unsafe { launch!(to.gpu(), Conv, &name, grid, 256, 0, &to, from, count as u64, h, w, c, k, s, p, d, a) };
        to
    }
}
