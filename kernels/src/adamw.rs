//! AdamW with a weight average, in one pass over the memory.

use rayon::prelude::*;

use crate::detect::Isa;
use crate::lanes::{LANES, Lanes, Op};

/// Settings of one update.
///
/// Source: Loshchilov and Hutter 2019, as `torch.optim.AdamW` computes it: the decay is decoupled
/// and multiplied by the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first and second moment.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of this update, from 1.
    pub step: u64,
    /// Factor of the gradient: the clipping's.
    pub gradient_scale: f32,
    /// Decay of the weight average; without effect where there is none.
    pub average_decay: f32,
}

/// Elements of a task: a few pages of each of the five arrays.
const CHUNK: usize = 16 * 1024;

impl AdamW {
    /// Updates parameters, both moments and, if there is one, the average of the parameters.
    ///
    /// # Panics
    ///
    /// If the slices differ in length, or `step` is 0.
    pub fn update(
        &self,
        parameters: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        average: Option<&mut [f32]>,
    ) {
        let len = parameters.len();
        let found = [gradient.len(), first.len(), second.len(), average.as_ref().map_or(len, |a| a.len())];
        assert!(found == [len; 4], "gradient, moments and average have {found:?} elements, the parameters {len}");
        assert!(self.step > 0, "updates are counted from 1");
        let isa = Isa::current();
        let averages: Vec<_> = match average {
            Some(average) => average.chunks_mut(CHUNK).map(Some).collect(),
            None => (0..len.div_ceil(CHUNK)).map(|_| None).collect(),
        };
        (parameters.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)))
            .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
            .zip(averages)
            .for_each(|(((p, g), (m, v)), average)| isa.run(Update { settings: *self, p, g, m, v, average }));
    }
}

struct Update<'a> {
    settings: AdamW,
    p: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    average: Option<&'a mut [f32]>,
}

impl Op for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self { settings, p, g, m, v, mut average } = self;
        let AdamW { learning_rate, betas: (beta1, beta2), eps, weight_decay, step, gradient_scale, .. } = settings;
        // The corrections in f64: 1 - 0.999^step loses half its digits in f32.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        let step_size = s.splat((f64::from(learning_rate) / correction(beta1)) as f32);
        let root = s.splat((1.0 / correction(beta2).sqrt()) as f32);
        let keep = s.splat((1.0 - f64::from(learning_rate) * f64::from(weight_decay)) as f32);
        let rest = |beta: f32| s.splat((1.0 - f64::from(beta)) as f32);
        let (rest1, rest2, rest_average) = (rest(beta1), rest(beta2), rest(settings.average_decay));
        let (beta1, beta2, eps) = (s.splat(beta1), s.splat(beta2), s.splat(eps));
        let (decay, scale) = (s.splat(settings.average_decay), s.splat(gradient_scale));
        for start in (0..p.len()).step_by(LANES) {
            let end = (start + LANES).min(p.len());
            let gradient = s.mul(s.load_part(&g[start..end]), scale);
            let moment = s.fma(s.load_part(&m[start..end]), beta1, s.mul(gradient, rest1));
            s.store_part(&mut m[start..end], moment);
            let squares = s.mul(s.mul(gradient, gradient), rest2);
            let squares = s.fma(s.load_part(&v[start..end]), beta2, squares);
            s.store_part(&mut v[start..end], squares);
            let below = s.fma(s.sqrt(squares), root, eps);
            let new = s.mul(s.load_part(&p[start..end]), keep);
            let new = s.sub(new, s.div(s.mul(moment, step_size), below));
            s.store_part(&mut p[start..end], new);
            if let Some(average) = &mut average {
                let old = s.load_part(&average[start..end]);
                s.store_part(&mut average[start..end], s.fma(old, decay, s.mul(new, rest_average)));
            }
        }
    }
}
