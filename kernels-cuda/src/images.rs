//! Images to patches and tokens, tokens to one vector an image, and the gradients' way back.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Images;
use crate::rows::{blocks_for, check_eights, sum_of_parts, sum_of_rows};
use crate::values::Values;

/// Square images of three channels, and the patches they are cut into.
#[derive(Clone, Debug)]
pub struct Patches {
    /// Images.
    pub batch: usize,
    /// Pixels on a side of an image; a multiple of `patch`.
    pub size: usize,
    /// Pixels on a side of a patch.
    pub patch: usize,
    /// Taken off each channel, `[3]`.
    pub mean: Values,
    /// Then multiplies it, `[3]`.
    pub factor: Values,
}

impl Patches {
    /// Length of a patch's row: `3 patch^2`, filled up with zeros to a multiple of 8, as products want it.
    pub fn stride(&self) -> usize {
        (3 * self.patch * self.patch).next_multiple_of(8)
    }

    fn rows(&self) -> usize {
        assert!(self.patch > 0 && self.size.is_multiple_of(self.patch), "{self:?} are not whole patches");
        self.batch * (self.size / self.patch).pow(2)
    }

    fn pixels(&self) -> usize {
        self.batch * 3 * self.size * self.size
    }

    /// `(images - mean) * factor`, cut up, in `kind`.
    ///
    /// Shapes: `images` `[batch, 3, size, size]` in f32; the result `[batch, (size / patch)^2, stride]`, of which the first
    /// `3 patch^2` columns are channels, lines and columns of the patch, the rest zero.
    ///
    /// # Panics
    ///
    /// If `images` have not the length that the sizes say.
    pub fn cut(&self, images: &Values, kind: Kind) -> Values {
        let count = self.rows() * self.stride();
        assert!((images.len(), images.kind()) == (self.pixels(), Kind::F32), "`images` is {images:?}, {self:?}");
        let patches = Values::new(images.gpu(), count, kind);
        let name = format!("patches_{}", kind.suffix());
        let (size, patch, stride) = (self.size as i32, self.patch as i32, self.stride() as i32);
        // SAFETY: `images` and `patches` have as many numbers as the sizes say.
        unsafe {
            launch!(
                images.gpu(),
                Images,
                &name,
                blocks_for(count),
                256,
                0,
                &patches,
                images,
                &self.mean,
                &self.factor,
                count as u64,
                size,
                patch,
                stride
            );
        }
        patches
    }

    /// The gradient of the images from that of the patches.
    ///
    /// # Panics
    ///
    /// If `patches` have not the length that the sizes say.
    pub fn gradient(&self, patches: &Values) -> Values {
        let right = self.rows() * self.stride();
        assert!(patches.len() == right, "`patches` is {patches:?}, {self:?} needs {right}");
        let images = Values::new(patches.gpu(), self.pixels(), Kind::F32);
        let name = format!("patches_gradient_{}", patches.kind().suffix());
        let (size, patch, stride) = (self.size as i32, self.patch as i32, self.stride() as i32);
        // SAFETY: as above.
        unsafe {
            launch!(
                patches.gpu(),
                Images,
                &name,
                [images.len().div_ceil(1024), 1, 1],
                256,
                0,
                &images,
                patches,
                &self.factor,
                images.len() as u64,
                size,
                patch,
                stride
            );
        }
        images
    }
}

/// The patches that stay in each image of a batch, where the others are masked out.
#[derive(Clone, Debug)]
pub struct Kept {
    batch: usize,
    patches: usize,
    count: usize,
    /// The patch that each token is, `[batch, count]`, and the token that each patch became or -1, `[batch, patches]`.
    which: Values,
    whence: Values,
}

impl Kept {
    /// Of `patches` in each of `batch` images those of `which`, `[batch, count]`, none twice in an image.
    ///
    /// # Panics
    ///
    /// If `which` is not whole images, or names a patch twice or a patch that does not exist.
    pub fn new(gpu: &Gpu, batch: usize, patches: usize, which: &[usize]) -> Self {
        let count = which.len() / batch.max(1);
        assert!(count > 0 && count * batch == which.len(), "{} kept patches of {batch} images", which.len());
        let mut whence = vec![-1; batch * patches];
        for (image, kept) in which.chunks(count).enumerate() {
            for (token, patch) in kept.iter().enumerate() {
                assert!(*patch < patches, "patch {patch} of {patches}");
                let place = &mut whence[image * patches + patch];
                assert!(*place < 0, "patch {patch} is kept twice in image {image}");
                *place = token as i32;
            }
        }
        let send = |numbers: &mut dyn Iterator<Item = i32>| {
            Values::send_bytes(gpu, &numbers.flat_map(i32::to_le_bytes).collect::<Vec<_>>())
        };
        let which = send(&mut which.iter().map(|patch| *patch as i32));
        Self { batch, patches, count, which, whence: send(&mut whence.into_iter()) }
    }

    /// Patches that stay in an image.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The rows that stay.
    ///
    /// Shapes: `x` `[batch, patches, width]`, the result `[batch, count, width]`.
    ///
    /// # Panics
    ///
    /// If `x` has another length, or the width is not a multiple of 8.
    pub fn rows(&self, x: &Values, width: usize) -> Values {
        self.gather(x, &self.which, [self.patches, self.count], width)
    }

    /// The gradient of all rows from that of those that stay: zero for the others.
    ///
    /// # Panics
    ///
    /// If `dy` is not `[batch, count, width]`, or the width is not a multiple of 8.
    pub fn rows_gradient(&self, dy: &Values, width: usize) -> Values {
        self.gather(dy, &self.whence, [self.count, self.patches], width)
    }

    fn gather(&self, x: &Values, which: &Values, [from, to]: [usize; 2], width: usize) -> Values {
        check_eights("a row", width);
        let right = self.batch * from * width;
        assert!(x.len() == right, "{x:?}, {} images of {from} rows of {width} need {right}", self.batch);
        let count = self.batch * to * width;
        let y = Values::new(x.gpu(), count, x.kind());
        let name = format!("gather_{}", x.kind().suffix());
        let [rows, from_rows, w] = [to, from, width].map(|size| size as i32);
        // SAFETY: the lengths were checked above; the table has a row of `x` or -1 for every row of `y`.
        unsafe {
            launch!(x.gpu(), Images, &name, blocks_for(count), 256, 0, &y, x, which, count as u64, rows, from_rows, w)
        };
        y
    }
}

/// Patches with their places, after the class token where there is one.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Tokens of a sample, class token included.
    pub tokens: usize,
    /// Length of a token.
    pub width: usize,
    /// Whether there is a class token.
    pub class_token: bool,
}

impl Tokens {
    fn prefix(&self) -> usize {
        usize::from(self.class_token)
    }

    /// Rows of the table of places.
    fn places(&self, kept: Option<&Kept>, batch: usize) -> usize {
        let Some(kept) = kept else { return self.tokens };
        assert!(
            (kept.batch, kept.count + self.prefix()) == (batch, self.tokens),
            "{kept:?} of {batch} images of {self:?}"
        );
        kept.patches + self.prefix()
    }

    /// Tokens in `kind`.
    ///
    /// Shapes: `patches` `[batch, tokens - 1, width]`, or `[batch, tokens, width]` without a class token; `places`
    /// `[tokens, width]` and `class` `[width]` in f32. Where `kept` names the patches that stayed, `places` has a row for
    /// every patch there was.
    ///
    /// # Panics
    ///
    /// If the lengths do not match.
    pub fn assemble(
        &self,
        patches: &Values,
        places: &Values,
        class: Option<&Values>,
        kept: Option<&Kept>,
        kind: Kind,
    ) -> Values {
        let Self { tokens, width, .. } = *self;
        let row = (tokens - self.prefix()) * width;
        check_eights("a token", width);
        assert!(row > 0 && patches.len().is_multiple_of(row), "`patches` is {patches:?}, {self:?}");
        let right = (self.places(kept, patches.len() / row) * width, Kind::F32);
        assert!((places.len(), places.kind()) == right, "`places` is {places:?}, {self:?}");
        assert!(class.map_or(0, Values::len) == self.prefix() * width, "the class token is {class:?}, {self:?}");
        let count = patches.len() / row * tokens * width;
        let to = Values::new(patches.gpu(), count, kind);
        let name = format!("tokens_{}_{}", kind.suffix(), patches.kind().suffix());
        let (n, w, prefix) = (tokens as i32, width as i32, self.prefix() as i32);
        // SAFETY: the lengths were checked above.
        unsafe {
            launch!(
                patches.gpu(),
                Images,
                &name,
                blocks_for(count),
                256,
                0,
                &to,
                patches,
                places,
                class,
                kept.map(|kept| &kept.which),
                count as u64,
                n,
                w,
                prefix
            );
        }
        to
    }

    /// The gradient of the patches, in `kind`.
    ///
    /// # Panics
    ///
    /// If `d_tokens` is not whole samples.
    pub fn patches_gradient(&self, d_tokens: &Values, kind: Kind) -> Values {
        let Self { tokens, width, .. } = *self;
        assert!(d_tokens.len().is_multiple_of(tokens * width), "`d_tokens` is {d_tokens:?}, {self:?}");
        let count = d_tokens.len() / tokens * (tokens - self.prefix());
        let to = Values::new(d_tokens.gpu(), count, kind);
        let name = format!("tokens_gradient_{}_{}", d_tokens.kind().suffix(), kind.suffix());
        let (n, w, prefix) = (tokens as i32, width as i32, self.prefix() as i32);
        // SAFETY: the lengths were checked above.
        unsafe {
            launch!(to.gpu(), Images, &name, blocks_for(count), 256, 0, &to, d_tokens, count as u64, n, w, prefix)
        };
        to
    }

    /// The gradient of the places, like the table; its first row is that of the class token too.
    ///
    /// # Panics
    ///
    /// If `d_tokens` is not whole samples, or of other samples than `kept`.
    pub fn places_gradient(&self, d_tokens: &Values, kept: Option<&Kept>) -> Values {
        let Self { tokens, width, .. } = *self;
        let Some(kept) = kept else { return sum_of_rows(d_tokens, tokens * width) };
        check_eights("a token", width);
        assert!(d_tokens.len().is_multiple_of(tokens * width), "`d_tokens` is {d_tokens:?}, {self:?}");
        let batch = d_tokens.len() / (tokens * width);
        let places = self.places(Some(kept), batch);
        let (count, parts) = (places * width, batch.clamp(1, 32));
        let sums = Values::new(d_tokens.gpu(), parts * count, Kind::F32);
        let name = format!("places_parts_{}", d_tokens.kind().suffix());
        let [b, p, n, w, prefix] = [batch, places, tokens, width, self.prefix()].map(|size| size as i32);
        let grid = [count.div_ceil(2048), parts, 1];
        // SAFETY: the lengths were checked above; every part is written whole.
        unsafe {
            launch!(
                sums.gpu(),
                Images,
                &name,
                grid,
                256,
                0,
                &sums,
                d_tokens,
                &kept.whence,
                count as u64,
                b,
                p,
                n,
                w,
                prefix
            );
        }
        sum_of_parts(&sums, parts, count)
    }
}

/// Which tokens of a sample are averaged to one vector.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Tokens of a sample.
    pub tokens: usize,
    /// Length of a token.
    pub width: usize,
    /// The first token that counts.
    pub first: usize,
    /// The one after the last.
    pub end: usize,
}

impl Pool {
    fn batch(&self, len: usize, row: usize) -> usize {
        check_eights("a token", self.width);
        assert!(self.first < self.end && self.end <= self.tokens, "{self:?} averages no tokens");
        assert!(len.is_multiple_of(row), "{len} numbers are not whole samples of {self:?}");
        len / row
    }

    /// The means, `[batch, width]` in f32.
    ///
    /// # Panics
    ///
    /// If `x` is not whole samples.
    pub fn forward(&self, x: &Values) -> Values {
        let count = self.batch(x.len(), self.tokens * self.width) * self.width;
        let y = Values::new(x.gpu(), count, Kind::F32);
        let name = format!("pool_{}", x.kind().suffix());
        let [n, w, first, end] = [self.tokens, self.width, self.first, self.end].map(|size| size as i32);
        // SAFETY: the lengths were checked above; the grid is not cut.
        unsafe {
            launch!(
                x.gpu(),
                Images,
                &name,
                [count.div_ceil(2048), 1, 1],
                256,
                0,
                &y,
                x,
                count as u64,
                n,
                w,
                first,
                end
            );
        }
        y
    }

    /// The gradient of the tokens, in `kind`.
    ///
    /// # Panics
    ///
    /// If `dy` is not whole rows in f32.
    pub fn gradient(&self, dy: &Values, kind: Kind) -> Values {
        assert!(dy.kind() == Kind::F32, "`dy` is {dy:?}");
        let count = self.batch(dy.len(), self.width) * self.tokens * self.width;
        let dx = Values::new(dy.gpu(), count, kind);
        let name = format!("pool_gradient_{}", kind.suffix());
        let [n, w, first, end] = [self.tokens, self.width, self.first, self.end].map(|size| size as i32);
        // SAFETY: the lengths were checked above.
        unsafe { launch!(dy.gpu(), Images, &name, blocks_for(count), 256, 0, &dx, dy, count as u64, n, w, first, end) };
        dx
    }
}
