//! What the processor can do: GFLOP/s of register-only `vdpbf16ps` and f32 FMA, per thread count.
fn main() {
    #[cfg(target_arch = "x86_64")]
    for threads in [1, 2] {
        for (name, bf16) in [("f32", false), ("bf16", true)] {
            let start = std::time::Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    // SAFETY: run by hand on a machine that has it.
                    scope.spawn(move || unsafe { if bf16 { spin_bf16() } else { spin_f32() } });
                }
            });
            let flops = 20_000_000.0 * 20.0 * if bf16 { 64.0 } else { 32.0 } * threads as f64;
            println!(
                "{threads} threads {name}: {:.0} GFLOP/s",
                flops / start.elapsed().as_secs_f64() / 1e9
            );
        }
    }
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn spin_bf16() {
    use std::arch::x86_64::*;
    // SAFETY: same size.
    let a: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(std::hint::black_box(0))) };
    let mut s = [_mm512_set1_ps(0.0); 20];
    for _ in 0..20_000_000 {
        for s in &mut s {
            *s = _mm512_dpbf16_ps(*s, a, a);
        }
    }
    std::hint::black_box(s);
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn spin_f32() {
    use std::arch::x86_64::*;
    let a = _mm512_set1_ps(std::hint::black_box(0.5));
    let mut s = [_mm512_set1_ps(0.0); 20];
    for _ in 0..20_000_000 {
        for s in &mut s {
            *s = _mm512_fmadd_ps(*s, a, a);
        }
    }
    std::hint::black_box(s);
}
