//! Maps timm's tensor names to the tensors of files written by other programs.
//!
//! Each timm name has an `Origin` in the file: a tensor, possibly transposed, several stacked tensors, or zeros.
//! Tensors are read on demand, so memory use stays at the model plus one tensor. The same table, in the other
//! direction, gives the names that [`crate::weights::export`] writes for open_clip and transformers.
//! `hugging_face_text` does the same for text towers, whose own names are open_clip's.

use std::collections::BTreeSet;

use super::state_dict::StateDict;
use crate::error::Result;
use crate::model::Pool;
use crate::storage::archive::shown;

/// Naming scheme of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// timm's own names.
    Timm,
    /// The image tower of open_clip's `VisionTransformer`, whose last norm has the same name for both poolings.
    OpenClip(Pool),
    /// An open_clip image tower that is a timm model, with its own head or followed by a projection.
    OpenClipTimm(Head),
    /// transformers' `ViTForImageClassification`.
    HuggingFaceVit,
    /// transformers' `CLIPModel` and `CLIPVisionModelWithProjection`.
    HuggingFaceClip,
}

/// Last layer of an open_clip image tower that is a timm model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// timm's head.
    Own,
    /// A projection, with or without bias.
    Projection { bias: bool },
}

/// Where the tensor of a timm name comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// An unchanged tensor.
    Same(String),
    /// A tensor stored without the leading axes of size 1 of its three axes.
    Lifted(String),
    /// A transposed matrix.
    Transposed(String),
    /// Tensors stacked along the first axis.
    Stacked([String; 3]),
    /// Zeros, as many as the size of that tensor along an axis.
    Zeros(String, usize),
}

/// open_clip's names for the parts of a block.
const OPEN_CLIP: [(&str, &str); 12] = [
    ("norm1.weight", "ln_1.weight"),
    ("norm1.bias", "ln_1.bias"),
    ("attn.qkv.weight", "attn.in_proj_weight"),
    ("attn.qkv.bias", "attn.in_proj_bias"),
    ("attn.proj.weight", "attn.out_proj.weight"),
    ("attn.proj.bias", "attn.out_proj.bias"),
    ("norm2.weight", "ln_2.weight"),
    ("norm2.bias", "ln_2.bias"),
    ("mlp.fc1.weight", "mlp.c_fc.weight"),
    ("mlp.fc1.bias", "mlp.c_fc.bias"),
    ("mlp.fc2.weight", "mlp.c_proj.weight"),
    ("mlp.fc2.bias", "mlp.c_proj.bias"),
];

/// transformers' names for the layers of a block, in ViT and in CLIP; `attn.qkv` is three of them.
const HUGGING_FACE: [(&str, &str, &str); 8] = [
    ("norm1", "layernorm_before", "layer_norm1"),
    ("attn.q", "attention.attention.query", "self_attn.q_proj"),
    ("attn.k", "attention.attention.key", "self_attn.k_proj"),
    ("attn.v", "attention.attention.value", "self_attn.v_proj"),
    ("attn.proj", "attention.output.dense", "self_attn.out_proj"),
    ("norm2", "layernorm_after", "layer_norm2"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
];

impl Scheme {
    /// Returns where the tensor of a timm name comes from; `None` if models of this program have no such tensor.
    pub(crate) fn origin(self, name: &str) -> Option<Origin> {
        let (layer, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        let same = |text: &str| Some(Origin::Same(text.to_owned()));
        let of_layer = |text: &str| Some(Origin::Same(format!("{text}.{kind}")));
        let lifted = |text: &str| Some(Origin::Lifted(text.to_owned()));
        let block = name
            .strip_prefix("blocks.")
            .and_then(|rest| rest.split_once('.'));
        match self {
            Self::Timm => same(name),
            Self::OpenClip(pool) => match (name, block) {
                (_, Some((index, part))) => {
                    let (_, theirs) = OPEN_CLIP.iter().find(|(ours, _)| *ours == part)?;
                    same(&format!("visual.transformer.resblocks.{index}.{theirs}"))
                }
                ("cls_token", _) => lifted("visual.class_embedding"),
                ("pos_embed", _) => lifted("visual.positional_embedding"),
                ("patch_embed.proj.weight", _) => same("visual.conv1.weight"),
                ("patch_embed.proj.bias", _) => {
                    Some(Origin::Zeros("visual.conv1.weight".into(), 0))
                }
                ("head.weight", _) => Some(Origin::Transposed("visual.proj".into())),
                ("head.bias", _) => Some(Origin::Zeros("visual.proj".into(), 1)),
                _ if layer == "norm_pre" => of_layer("visual.ln_pre"),
                _ if layer == pool.norm() => of_layer("visual.ln_post"),
                _ => None,
            },
            Self::OpenClipTimm(head) => match (layer, head) {
                ("head" | "head.fc", Head::Projection { bias: false }) if kind == "bias" => {
                    Some(Origin::Zeros("visual.head.proj.weight".into(), 0))
                }
                ("head" | "head.fc", Head::Projection { .. }) => of_layer("visual.head.proj"),
                _ => same(&format!("visual.trunk.{name}")),
            },
            Self::HuggingFaceVit => match (name, block) {
                (_, Some((index, part))) => {
                    hugging_face(part, |_, vit, _| format!("vit.encoder.layer.{index}.{vit}"))
                }
                ("cls_token", _) => same("vit.embeddings.cls_token"),
                ("pos_embed", _) => same("vit.embeddings.position_embeddings"),
                _ if layer == "patch_embed.proj" => {
                    of_layer("vit.embeddings.patch_embeddings.projection")
                }
                _ if layer == "norm" => of_layer("vit.layernorm"),
                _ if layer == "head" => of_layer("classifier"),
                _ => None,
            },
            Self::HuggingFaceClip => match (name, block) {
                (_, Some((index, part))) => hugging_face(part, |_, _, clip| {
                    format!("vision_model.encoder.layers.{index}.{clip}")
                }),
                ("cls_token", _) => lifted("vision_model.embeddings.class_embedding"),
                ("pos_embed", _) => lifted("vision_model.embeddings.position_embedding.weight"),
                ("patch_embed.proj.weight", _) => {
                    same("vision_model.embeddings.patch_embedding.weight")
                }
                ("head.weight", _) => same("visual_projection.weight"),
                ("head.bias", _) => Some(Origin::Zeros("visual_projection.weight".into(), 0)),
                // transformers spells it this way.
                _ if layer == "norm_pre" => of_layer("vision_model.pre_layrnorm"),
                _ if layer == "norm" => of_layer("vision_model.post_layernorm"),
                _ => None,
            },
        }
    }

    /// Returns whether a name is known to belong outside the image tower, for example to the text tower, and is ignored
    /// on purpose.
    fn leaves_out(self, name: &str) -> bool {
        // Matches parts of a block with any number.
        let in_block = |prefix: &str, is_part: &dyn Fn(&str) -> bool| {
            let rest = name.strip_prefix(prefix);
            rest.and_then(|rest| rest.split_once('.'))
                .is_some_and(|(index, part)| index.parse::<u32>().is_ok() && is_part(part))
        };
        match self {
            Self::Timm => false,
            Self::OpenClip(_) | Self::OpenClipTimm(_) => {
                let whole = [
                    "logit_scale",
                    "logit_bias",
                    "token_embedding.weight",
                    "positional_embedding",
                    "ln_final.weight",
                    "ln_final.bias",
                    "text_projection",
                    "text_projection.weight",
                    "text_projection.bias",
                    // In OpenAI's own files.
                    "input_resolution",
                    "context_length",
                    "vocab_size",
                ];
                let is_part = |part: &str| {
                    let known = OPEN_CLIP.iter().any(|(_, theirs)| *theirs == part);
                    known || ["ls_1.gamma", "ls_2.gamma"].contains(&part)
                };
                // A text tower from another library has all its names below `text`.
                whole.contains(&name)
                    || name.starts_with("text.")
                    || in_block("transformer.resblocks.", &is_part)
            }
            // Part of the model without a classifier; the classifier does not use it.
            Self::HuggingFaceVit => {
                ["vit.pooler.dense.weight", "vit.pooler.dense.bias"].contains(&name)
            }
            Self::HuggingFaceClip => {
                let whole = [
                    "logit_scale",
                    "text_projection.weight",
                    "text_model.embeddings.token_embedding.weight",
                    "text_model.embeddings.position_embedding.weight",
                    "text_model.embeddings.position_ids",
                    "text_model.final_layer_norm.weight",
                    "text_model.final_layer_norm.bias",
                    // The numbers 0, 1, 2, ... in files of older versions.
                    "vision_model.embeddings.position_ids",
                ];
                let is_part = |part: &str| {
                    let layer = part.strip_suffix(".weight").or(part.strip_suffix(".bias"));
                    HUGGING_FACE.iter().any(|(.., clip)| layer == Some(*clip))
                };
                whole.contains(&name) || in_block("text_model.encoder.layers.", &is_part)
            }
        }
    }
}

/// Returns where a part of a block comes from in transformers; `name` builds the name of a layer there.
fn hugging_face(part: &str, name: impl Fn(&str, &str, &str) -> String) -> Option<Origin> {
    let (layer, kind) = part.rsplit_once('.')?;
    let of = |layer: &str| {
        let (ours, vit, clip) = HUGGING_FACE.iter().find(|(ours, ..)| *ours == layer)?;
        Some(format!("{}.{kind}", name(ours, vit, clip)))
    };
    match layer {
        "attn.qkv" => Some(Origin::Stacked([
            of("attn.q")?,
            of("attn.k")?,
            of("attn.v")?,
        ])),
        layer => of(layer).map(Origin::Same),
    }
}

/// Returns where the tensor of an open_clip name of a text tower comes from in transformers' CLIP; `None` for other names.
pub(crate) fn hugging_face_text(name: &str) -> Option<Origin> {
    let block = name
        .strip_prefix("transformer.resblocks.")
        .and_then(|rest| rest.split_once('.'));
    let same = |text: &str| Some(Origin::Same(text.to_owned()));
    match (name, block) {
        (_, Some((index, part))) => {
            let (ours, _) = OPEN_CLIP.iter().find(|(_, theirs)| *theirs == part)?;
            hugging_face(ours, |_, _, clip| {
                format!("text_model.encoder.layers.{index}.{clip}")
            })
        }
        ("token_embedding.weight", _) => same("text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", _) => same("text_model.embeddings.position_embedding.weight"),
        ("ln_final.weight", _) => same("text_model.final_layer_norm.weight"),
        ("ln_final.bias", _) => same("text_model.final_layer_norm.bias"),
        // transformers stores the projection as a linear layer, `[out, in]`.
        ("text_projection", _) => Some(Origin::Transposed("text_projection.weight".into())),
        _ => None,
    }
}

impl Origin {
    /// Returns the names in the file; none for zeros.
    fn names(&self) -> &[String] {
        match self {
            Self::Same(name) | Self::Lifted(name) | Self::Transposed(name) => {
                std::slice::from_ref(name)
            }
            Self::Stacked(names) => names,
            Self::Zeros(..) => &[],
        }
    }
}

/// A weights file accessed by timm's names.
pub(crate) struct Names<'a> {
    file: &'a StateDict,
    scheme: Scheme,
}

impl<'a> Names<'a> {
    pub(crate) fn new(file: &'a StateDict, scheme: Scheme) -> Self {
        Self { file, scheme }
    }

    /// Returns whether anything exists under a timm name; only reading it shows whether it is complete.
    pub(crate) fn contains(&self, name: &str) -> bool {
        match self.scheme.origin(name) {
            None => false,
            Some(Origin::Zeros(other, _)) => self.file.contains(&other),
            Some(origin) => origin.names().iter().any(|name| self.file.contains(name)),
        }
    }

    /// Returns how the file names the tensor of a timm name, for messages.
    pub(crate) fn called(&self, name: &str) -> String {
        match self.scheme.origin(name) {
            Some(Origin::Same(theirs) | Origin::Lifted(theirs)) => format!("`{theirs}`"),
            Some(Origin::Transposed(theirs)) => format!("`{theirs}` transposed"),
            Some(Origin::Stacked([q, k, v])) => format!("`{q}`, `{k}`, `{v}` stacked"),
            Some(Origin::Zeros(..)) | None => format!("`{name}`"),
        }
    }

    /// Returns the shape of a tensor in timm's layout.
    ///
    /// Errors: the tensor is missing or cannot be converted to timm's layout.
    pub(crate) fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let Some(origin) = self.scheme.origin(name) else {
            return self.file.shape(name).map(<[usize]>::to_vec);
        };
        match &origin {
            Origin::Same(name) => self.file.shape(name).map(<[usize]>::to_vec),
            Origin::Lifted(name) => {
                let shape = self.file.shape(name)?;
                let ones = 3usize.saturating_sub(shape.len());
                Ok([vec![1; ones], shape.to_vec()].concat())
            }
            Origin::Transposed(name) => match self.file.shape(name)? {
                &[rows, columns] => Ok(vec![columns, rows]),
                shape => Err(unlike(name, shape, "a matrix")),
            },
            Origin::Stacked(names) => {
                let first = self.file.shape(&names[0])?;
                for name in &names[1..] {
                    let shape = self.file.shape(name)?;
                    if shape != first {
                        let right = format!("{first:?} like `{}`", names[0]);
                        return Err(unlike(name, shape, &right));
                    }
                }
                match first {
                    [] => Err(unlike(&names[0], first, "a vector or a matrix")),
                    [rows, rest @ ..] => Ok([&[rows.saturating_mul(names.len())], rest].concat()),
                }
            }
            Origin::Zeros(name, axis) => {
                let shape = self.file.shape(name)?;
                match shape.get(*axis) {
                    Some(size) => Ok(vec![*size]),
                    None => Err(unlike(name, shape, "a matrix")),
                }
            }
        }
    }

    /// Reads the values of a tensor in the order of [`Self::shape`].
    pub(crate) fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name)?;
        match self.scheme.origin(name) {
            None => self.file.floats(name),
            Some(Origin::Same(name) | Origin::Lifted(name)) => self.file.floats(&name),
            Some(Origin::Transposed(name)) => Ok(transposed(&self.file.floats(&name)?, shape[0])),
            Some(Origin::Stacked(names)) => {
                let mut values = Vec::with_capacity(shape.iter().product());
                for name in &names {
                    values.extend(self.file.floats(name)?);
                }
                Ok(values)
            }
            Some(Origin::Zeros(..)) => Ok(vec![0.0; shape[0]]),
        }
    }

    /// Returns the names of the file that no used timm name comes from, except those ignored on purpose.
    pub(crate) fn left_over(&self, used: &BTreeSet<String>) -> BTreeSet<&'a str> {
        let origins = used.iter().filter_map(|name| self.scheme.origin(name));
        let taken: BTreeSet<String> = origins.flat_map(|origin| origin.names().to_vec()).collect();
        let names = self.file.names();
        names
            .filter(|name| !taken.contains(*name) && !self.scheme.leaves_out(name))
            .collect()
    }
}

/// Transposes a flat matrix with the given number of columns.
pub(crate) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    let element = |index: usize| values[index % rows * columns + index / rows];
    (0..rows * columns).map(element).collect()
}

fn unlike(name: &str, shape: &[usize], right: &str) -> crate::error::Error {
    let message = format!("`{}` has shape {shape:?}, expected {right}", shown(name));
    crate::error::Error::input(message).hint("it is damaged, or belongs to another kind of model")
}
