//! The words for arithmetic and activations, whose enums belong to the kernels.

use advxl_kernels::{Gelu, Precision};

use crate::settings::words;

words!(for Precision:
    "f32" => Self::F32, "All products in f32.";
    "bf16" => Self::Bf16, "Matrix products of bf16 operands, summed in f32, where the device is faster with them; f32 elsewhere.";
);

words!(for Gelu:
    "erf" => Self::Erf, "Exact, as in timm.";
    "tanh" => Self::Tanh, "Tanh approximation, as in CLIPA.";
    "quick" => Self::Quick, "Sigmoid approximation, as in OpenAI's CLIP.";
);
