//! The words for arithmetic and activations.

use advxl_kernels::Gelu;

use crate::settings::words;

words! {
    /// Precision of the matrix products. Accumulation is in f32, as is everything else: weights, norms, softmax,
    /// losses.
    pub enum Precision {
        /// All products in f32.
        F32 = "f32",
        /// Operands rounded to TF32 (10 bits of fraction) on NVIDIA GPUs; f32 elsewhere.
        Tf32 = "tf32",
        /// Operands rounded to bf16 where that is faster on the device; f32 elsewhere.
        Bf16 = "bf16",
    }
}

words! {
    /// Precision of the matrix products in a training attack's passes. Never used for updates or evaluations.
    pub enum AttackPrecision {
        /// All products in f32.
        F32 = "f32",
        /// Operands rounded to TF32 on NVIDIA GPUs; f32 elsewhere.
        Tf32 = "tf32",
        /// Operands rounded to bf16 where that is faster on the device, and on NVIDIA GPUs the activations between
        /// blocks too; f32 elsewhere.
        Bf16 = "bf16",
        /// Operands of the products in blocks rounded to FP8 (e4m3, one scale per row), everything else as with `bf16`
        /// on NVIDIA GPUs. Emulated on CPUs, where it is slower than f32. Transformers only.
        Fp8 = "fp8",
    }
}

/// Arithmetic of a forward pass and its gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Products in this precision; everything else in f32.
    Precise(Precision),
    /// For training attacks on NVIDIA GPUs: products in bf16, the residual stream in bf16 too, and for the exact GELU
    /// its tanh approximation, which cuBLASLt applies as part of a product. Elsewhere products in bf16.
    AttackBf16,
    /// The same with the operands of the blocks' products in FP8; emulated on the CPU.
    AttackFp8,
}

impl Numerics {
    /// f32 throughout.
    pub const F32: Self = Self::Precise(Precision::F32);

    /// Of a training attack on an NVIDIA GPU, if its recipe asks for `wanted` and its run for `of_run`.
    pub fn of_gpu_attack(wanted: Option<AttackPrecision>, of_run: Precision) -> Self {
        match (wanted, of_run) {
            (Some(AttackPrecision::Fp8), _) => Self::AttackFp8,
            (Some(AttackPrecision::Bf16), _) | (None, Precision::Bf16) => Self::AttackBf16,
            (Some(AttackPrecision::Tf32), _) => Self::Precise(Precision::Tf32),
            (Some(AttackPrecision::F32), _) => Self::F32,
            (None, of_run) => Self::Precise(of_run),
        }
    }

    /// The precision of products outside of blocks.
    pub fn products(self) -> Precision {
        match self {
            Self::Precise(precision) => precision,
            Self::AttackBf16 | Self::AttackFp8 => Precision::Bf16,
        }
    }

    /// The GELU that blocks compute in place of a model's: in attacks the tanh approximation of the exact one, which is
    /// off by 5e-4 at most, less than the rounding of bf16, and that cuBLASLt computes as part of a product.
    pub(crate) fn gelu(self, of_model: Gelu) -> Gelu {
        match (self, of_model) {
            (Self::AttackBf16 | Self::AttackFp8, Gelu::Erf) => Gelu::Tanh,
            (_, gelu) => gelu,
        }
    }

    /// The format of the residual stream on an NVIDIA GPU.
    pub(crate) fn stream(self) -> advxl_cuda::Kind {
        match self {
            Self::Precise(_) => advxl_cuda::Kind::F32,
            Self::AttackBf16 | Self::AttackFp8 => advxl_cuda::Kind::Bf16,
        }
    }
}

impl From<Precision> for Numerics {
    fn from(precision: Precision) -> Self {
        Self::Precise(precision)
    }
}

impl Precision {
    /// As the CPU's kernels have it.
    pub(crate) fn on_cpu(self) -> advxl_kernels::Precision {
        match self {
            Self::F32 | Self::Tf32 => advxl_kernels::Precision::F32,
            Self::Bf16 => advxl_kernels::Precision::Bf16,
        }
    }

    /// As the CUDA engine has it.
    pub(crate) fn on_cuda(self) -> advxl_cuda::Precision {
        match self {
            Self::F32 => advxl_cuda::Precision::F32,
            Self::Tf32 => advxl_cuda::Precision::Tf32,
            Self::Bf16 => advxl_cuda::Precision::Bf16,
        }
    }
}

words!(for Gelu:
    "erf" => Self::Erf, "Exact GELU, as in timm.";
    "tanh" => Self::Tanh, "Tanh approximation, as in CLIPA.";
    "quick" => Self::Quick, "Sigmoid approximation, as in OpenAI's CLIP.";
);

/// A GELU as the CUDA engine has it.
pub(crate) fn gelu_on_cuda(gelu: Gelu) -> advxl_cuda::Gelu {
    match gelu {
        Gelu::Erf => advxl_cuda::Gelu::Erf,
        Gelu::Tanh => advxl_cuda::Gelu::Tanh,
        Gelu::Quick => advxl_cuda::Gelu::Quick,
    }
}
