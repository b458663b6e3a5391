//! The CUDA sources, and the programs that are compiled of them.

/// A translation unit: one source, and for attention the instances that a shape needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Program {
    Norm,
    NormAny,
    Rows,
    Images,
    Loss,
    Contrastive,
    Distance,
    Text,
    Attack,
    L1,
    Optimizer,
    Vectors,
    Conv,
    /// Depthwise kernels of this size, tiles of as many columns.
    Depthwise {
        kernel: usize,
        columns: usize,
    },
    Evaluation,
    Fab,
    Square,
    Mixing,
    /// Rows in FP8, for GPUs that multiply them.
    Fp8,
    Messages,
    /// Up to `16 tiles` tokens in bf16.
    Attention {
        tiles: usize,
        head: usize,
    },
    /// More tokens in bf16: the forward pass.
    AttentionLong {
        head: usize,
    },
    /// Its gradient in one kernel, with `tiles` tiles of keys a warp, the third shared.
    AttentionLongGradient {
        head: usize,
        tiles: usize,
    },
    /// Its gradient in two kernels.
    AttentionLongTwice {
        head: usize,
    },
    /// Any number of tokens, in tiles of `tile`.
    AttentionAny {
        bf16: bool,
        head: usize,
        tile: usize,
    },
}

impl Program {
    /// Those of every run.
    pub(crate) const COMMON: [Self; 9] = [
        Self::Norm,
        Self::Rows,
        Self::Images,
        Self::Loss,
        Self::Attack,
        Self::Optimizer,
        Self::Vectors,
        Self::Mixing,
        Self::Evaluation,
    ];

    /// Its name in messages and file names.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Norm => "norm".into(),
            Self::NormAny => "norm_any".into(),
            Self::Rows => "rows".into(),
            Self::Images => "images".into(),
            Self::Loss => "loss".into(),
            Self::Contrastive => "contrastive".into(),
            Self::Distance => "distance".into(),
            Self::Text => "text".into(),
            Self::Attack => "attack".into(),
            Self::L1 => "l1".into(),
            Self::Optimizer => "optimizer".into(),
            Self::Vectors => "vectors".into(),
            Self::Conv => "conv".into(),
            Self::Depthwise { kernel, columns } => format!("depthwise_{kernel}_{columns}"),
            Self::Evaluation => "evaluation".into(),
            Self::Fab => "fab".into(),
            Self::Square => "square".into(),
            Self::Mixing => "mixing".into(),
            Self::Fp8 => "fp8".into(),
            Self::Messages => "messages".into(),
            Self::Attention { tiles, head } => format!("attention_{tiles}_{head}"),
            Self::AttentionLong { head } => format!("attention_long_{head}"),
            Self::AttentionLongGradient { head, tiles } => format!("attention_long_gradient_{tiles}_{head}"),
            Self::AttentionLongTwice { head } => format!("attention_long_twice_{head}"),
            Self::AttentionAny { bf16, head, tile } => {
                format!("attention_any_{}_{head}_{tile}", if bf16 { "bf16" } else { "f32" })
            }
        }
    }

    /// The whole source, as NVRTC takes it.
    pub(crate) fn source(self) -> String {
        [plain(include_str!("../cuda/device.cuh")), self.body()].concat()
    }

    /// What comes after the device's own functions.
    pub(crate) fn body(self) -> String {
        let (file, instances) = match self {
            Self::Norm => (include_str!("../cuda/norm.cuh"), String::new()),
            Self::NormAny => (include_str!("../cuda/norm_any.cuh"), String::new()),
            Self::Rows => (concat!(include_str!("../cuda/gelu.cuh"), include_str!("../cuda/rows.cuh")), String::new()),
            Self::Images => (include_str!("../cuda/images.cuh"), String::new()),
            Self::Loss => (include_str!("../cuda/loss.cuh"), String::new()),
            Self::Contrastive => (include_str!("../cuda/contrastive.cuh"), String::new()),
            Self::Distance => (include_str!("../cuda/distance.cuh"), String::new()),
            Self::Text => (include_str!("../cuda/text.cuh"), String::new()),
            Self::Attack => (include_str!("../cuda/attack.cuh"), String::new()),
            // With the streams of the other.
            Self::L1 => (concat!(include_str!("../cuda/attack.cuh"), include_str!("../cuda/l1.cuh")), String::new()),
            Self::Optimizer => (include_str!("../cuda/optimizer.cuh"), String::new()),
            Self::Vectors => (include_str!("../cuda/vectors.cuh"), String::new()),
            Self::Conv => (include_str!("../cuda/conv.cuh"), String::new()),
            Self::Depthwise { kernel, columns } => {
                (include_str!("../cuda/depthwise.cuh"), format!("DEPTHWISE({kernel}, {columns})\n"))
            }
            Self::Evaluation => (include_str!("../cuda/evaluation.cuh"), String::new()),
            Self::Fab => (include_str!("../cuda/fab.cuh"), String::new()),
            Self::Square => (include_str!("../cuda/square.cuh"), String::new()),
            Self::Mixing => (include_str!("../cuda/mixing.cuh"), String::new()),
            Self::Fp8 => (concat!(include_str!("../cuda/gelu.cuh"), include_str!("../cuda/fp8.cuh")), String::new()),
            Self::Messages => (include_str!("../cuda/messages.cuh"), String::new()),
            Self::Attention { tiles, head } => {
                (include_str!("../cuda/attention.cuh"), format!("ATTENTION({tiles}, {head})\n"))
            }
            Self::AttentionLong { head } => {
                (include_str!("../cuda/attention_long.cuh"), format!("ATTENTION_LONG({head})\n"))
            }
            Self::AttentionLongGradient { head, tiles } => (
                include_str!("../cuda/attention_long_gradient.cuh"),
                format!("ATTENTION_LONG_GRADIENT({head}, {tiles})\n"),
            ),
            Self::AttentionLongTwice { head } => {
                (include_str!("../cuda/attention_long.cuh"), format!("ATTENTION_LONG_TWICE({head})\n"))
            }
            Self::AttentionAny { bf16, head, tile } => {
                let (name, kind) = if bf16 { ("bf16", "uint16_t") } else { ("f32", "float") };
                (include_str!("../cuda/attention_any.cuh"), format!("ATTENTION_ANY({name}, {kind}, {head}, {tile})\n"))
            }
        };
        [plain(include_str!("../cuda/common.cuh")), plain(file), instances].concat()
    }

    /// NVRTC's options apart from the architecture.
    pub(crate) fn options(self) -> &'static [&'static str] {
        match self {
            // Rounded like the CPU's, which fuses products and sums only where the source says so.
            Self::Attack | Self::L1 | Self::Optimizer | Self::Evaluation | Self::Fab | Self::Square | Self::Mixing => {
                &["--std=c++17", "--fmad=false"]
            }
            _ => &["--std=c++17"],
        }
    }
}

/// A file without what makes it one: programs are one text, in the order of their includes.
fn plain(file: &str) -> String {
    let lines = file.lines().filter(|line| !line.starts_with("#include") && !line.starts_with("#pragma once"));
    lines.flat_map(|line| [line, "\n"]).collect()
}
