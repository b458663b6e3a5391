//! The software GPU, and numbers to try it with.

#![allow(dead_code, missing_docs)] // Each test uses some of it.

use std::path::Path;

use advxl_cuda::{Gpu, Values};

/// A software GPU.
pub fn soft() -> Gpu {
    Gpu::soft(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// Whether a sanitizer watches the kernels, which is slow.
fn is_watched() -> bool {
    std::env::var_os("ADVXL_SOFT_FLAGS").is_some()
}

/// All cases, or under a sanitizer the first `count`; these have to launch every kernel that the others do.
pub fn few<T>(cases: &[T], count: usize) -> &[T] {
    if is_watched() { &cases[..count] } else { cases }
}

/// The result of `work` with threads in ascending order; in random orders it has to give the same bits.
pub fn in_any_order(work: impl Fn(&Gpu) -> Vec<f32>) -> Vec<f32> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let gpu = soft();
    let right = work(&gpu);
    if is_watched() {
        return right; // Once is enough.
    }
    gpu.shuffle_threads(0x9e37_79b9);
    assert!(bits(&work(&gpu)) == bits(&right), "the order of threads changes the result");
    right
}

/// Numbers around 0 with about the deviation asked for; other seeds give others.
pub fn numbers(len: usize, seed: u64, deviation: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    // Four uniform numbers: variance 1 / 3.
    (0..len).map(|_| ((0..4).map(|_| uniform()).sum::<f32>() - 2.0) * 1.732 * deviation).collect()
}

/// Numbers in [0, 1).
pub fn pixels(len: usize, seed: u64) -> Vec<f32> {
    numbers(len, seed, 0.3).into_iter().map(|v| (v + 0.5).clamp(0.0, 0.999)).collect()
}

pub fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| f32::from_bits((v.to_bits() + 0x7fff + ((v.to_bits() >> 16) & 1)) & 0xffff_0000)).collect()
}

/// The largest difference, as a part of the largest right value.
pub fn difference(found: &[f32], right: &[f32]) -> f32 {
    assert_eq!(found.len(), right.len());
    let largest = right.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
    let off = found.iter().zip(right).map(|(a, b)| (a - b).abs());
    off.fold(0.0, |most: f32, off| if off.is_nan() { f32::INFINITY } else { most.max(off) }) / largest
}

#[track_caller]
pub fn assert_near(what: &str, found: &[f32], right: &[f32], tolerance: f32) {
    let off = difference(found, right);
    assert!(off <= tolerance, "{what}: off by {off:e} of the largest, allowed {tolerance:e}");
}

pub fn host(values: &Values) -> Vec<f32> {
    values.to_vec().unwrap_or_else(|error| panic!("{error}"))
}
