//! Which instructions may be used: asked of the processor once, at run time.
//!
//! Every kernel is written once, over sixteen lanes of f32 (`src/lanes.rs`), and compiled for each [`Path`].
//! Public functions ask for the path of the calling thread at their edge and hand it down, so that
//! a whole call runs on one path. Results of two paths differ by rounding; results of one path are
//! the same to the bit on every run and for any number of threads.

use std::cell::Cell;
use std::sync::OnceLock;

use crate::lanes::Op;
use crate::lanes::{Lanes, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::lanes::{avx2::Avx2, avx512::Avx512};

/// A set of instructions that all kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// 512-bit vectors and products of bf16 pairs (`vdpbf16ps`).
    Avx512Bf16,
    /// 512-bit vectors; bf16 products are computed by widening to f32.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// Plain Rust, for every processor.
    Portable,
}

impl Path {
    /// All paths, the fastest first.
    pub const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// Whether this processor can run the path.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            };
            match self {
                Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                Self::Avx512 => avx512(),
                Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                Self::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

/// The path that kernels called from this thread will take: the fastest there is, unless
/// [`with_path`] says otherwise.
pub fn detect() -> Path {
    Isa::current().0
}

/// Whether products of bf16 are faster here than those of f32.
///
/// They are twice as fast on processors of AMD with `vdpbf16ps`. Those of Intel that have it take it at a
/// quarter of the rate of f32 multiply-adds (measured on an Emerald Rapids: 94 GFLOP/s a core against 195), since
/// their bf16 is meant to run on tiles (AMX), which are not used here. Without the instruction bf16 is widened.
pub fn bf16_is_faster() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static FOUND: OnceLock<bool> = OnceLock::new();
        *FOUND.get_or_init(|| Path::Avx512Bf16.is_available() && !made_by(b"GenuineIntel"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether the processor gives this name of its maker.
#[cfg(target_arch = "x86_64")]
fn made_by(name: &[u8; 12]) -> bool {
    let found = std::arch::x86_64::__cpuid(0);
    let words = [found.ebx, found.edx, found.ecx].map(u32::to_le_bytes);
    words.as_flattened() == name
}

thread_local! {
    static FORCED: Cell<Option<Path>> = const { Cell::new(None) };
}

/// Runs `body` with every kernel it calls from this thread forced onto `path`; for tests.
///
/// A [`PackedBlock`](crate::PackedBlock) or [`PackedMatrix`](crate::PackedMatrix) keeps the path under which it was
/// made.
///
/// # Panics
///
/// If this processor does not support the path.
pub fn with_path<R>(path: Path, body: impl FnOnce() -> R) -> R {
    assert!(path.is_available(), "this processor cannot run the path {path:?}");
    struct Restore(Option<Path>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(path)));
    body()
}

/// A path that this processor has been seen to support: the field is private and every way to make
/// one checks, which is what the `unsafe` below rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Path);

impl Isa {
    /// The path of the calling thread.
    pub(crate) fn current() -> Self {
        static FASTEST: OnceLock<Path> = OnceLock::new();
        let fastest = || {
            let found = Path::ALL.into_iter().find(|path| path.is_available());
            found.unwrap_or(Path::Portable)
        };
        Self(FORCED.get().unwrap_or_else(|| *FASTEST.get_or_init(fastest)))
    }

    /// Its name.
    pub(crate) fn path(self) -> Path {
        self.0
    }

    /// Runs a kernel with this path's instructions.
    pub(crate) fn run<O: Op>(self, op: O) -> O::Output {
        match self.0 {
            // SAFETY: an `Isa` of this path exists only where the features were detected.
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => unsafe { Avx512::<true>::assume() }.call(op),
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => unsafe { Avx512::<false>::assume() }.call(op),
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => unsafe { Avx2::assume() }.call(op),
            _ => Portable.call(op),
        }
    }
}
