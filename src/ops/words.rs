//! The words for arithmetic and activations.

use advxl_kernels::Gelu;

use crate::settings::words;

words! {
    /// Arithmetic of the matrix products. Sums are f32, and so is everything but products: weights, norms, softmax, losses.
    pub enum Precision {
        /// All products in f32.
        F32 = "f32",
        /// Operands rounded to TF32 (10 bits of fraction) on NVIDIA GPUs; f32 elsewhere.
        Tf32 = "tf32",
        /// Operands rounded to bf16 where the device is faster with them; f32 elsewhere.
        Bf16 = "bf16",
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
    "erf" => Self::Erf, "Exact, as in timm.";
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
