//! What the processor can do at best: products in registers that touch no memory.
//!
//! The rate that kernels reach is stated as a share of this, measured in the same run: on shared
//! machines the clock, and even the number of cores behind two threads, change from minute to minute.

use std::time::Instant;

use rayon::prelude::*;

use crate::Precision;
use crate::cells::{Element, ElementOp, With};
use crate::detect::Isa;
use crate::lanes::{LANES, Lanes};

/// Sums in flight: more than the latency of a product times the products per cycle.
const SUMS: usize = 24;
const STEPS: usize = 500_000;
const ROUNDS: usize = 5;

/// Floating-point operations per second that all threads of rayon's pool reach together, for
/// products of this precision on the path of the calling thread. Takes some tens of milliseconds: the best of
/// several rounds counts, since threads that sleep take their time to wake up.
pub fn peak_flops(precision: Precision) -> f64 {
    let isa = Isa::current();
    let threads = rayon::current_num_threads();
    // A multiplication and an addition for every element of a cell.
    let work = (threads * STEPS * SUMS * LANES * 2 * precision.per_cell()) as f64;
    let round = |_| {
        let start = Instant::now();
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| isa.run(With(precision, Spin)));
        work / start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(round).fold(0.0, f64::max)
}

struct Spin;

impl ElementOp for Spin {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) {
        let cells = s.splat_cell(std::hint::black_box(0x3c00_3c00));
        let mut sums = [s.splat(0.0); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = P::dot(s, *sum, cells, cells);
            }
        }
        let mut total = sums[0];
        for &sum in &sums[1..] {
            total = s.add(total, sum);
        }
        std::hint::black_box(s.sum(total));
    }
}
