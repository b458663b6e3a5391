//! Model settings stated by the files next to the weights.

use super::architecture::{
    CLIP_EPS, NamedArchitecture, OPEN_CLIP, OPEN_CLIP_PREFIX, TIMM, known, open_clip,
};
use super::names::Scheme;
use super::outputs::Outputs;
use super::preprocessing::PreprocessingFields;
use crate::error::{Error, Result};
use crate::model::config::common::{CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD};
use crate::model::{NORM_EPS, Pool, Position};
use crate::ops::Gelu;

/// Keys of a program's configuration for classes, width, depth, heads and pooling.
#[derive(Clone, Copy)]
pub(crate) struct ConfigKeys {
    pub(crate) classes: &'static str,
    pub(crate) width: &'static str,
    pub(crate) depth: &'static str,
    pub(crate) heads: &'static str,
    pub(crate) pool: &'static str,
}

/// Model settings that the tensors do not determine.
pub(crate) struct StatedModel {
    /// The file that states them.
    pub(crate) source: &'static str,
    /// Its keys, for messages.
    pub(crate) words: ConfigKeys,
    /// timm's or our name of the architecture.
    pub(crate) architecture: String,
    /// Whether only the name is known.
    pub(crate) by_name_alone: bool,
    /// Our name of the size; if empty, the shapes determine it.
    pub(crate) size: String,
    pub(crate) width: Option<usize>,
    pub(crate) depth: Option<usize>,
    pub(crate) heads: Option<usize>,
    pub(crate) pool: Option<Pool>,
    pub(crate) pre_norm: Option<bool>,
    pub(crate) position: Position,
    pub(crate) position_size: Option<usize>,
    pub(crate) patch: Option<usize>,
    /// The key that states the image size, and its value.
    pub(crate) image_size: Option<(&'static str, usize)>,
    pub(crate) gelu: Gelu,
    pub(crate) norm_eps: f64,
    pub(crate) mean: [f64; 3],
    pub(crate) std: [f64; 3],
    pub(crate) class_count: Option<usize>,
    pub(crate) class_names: Vec<String>,
    /// Meaning of the outputs; if absent, the names determine it.
    pub(crate) outputs: Option<Outputs>,
    /// timm's tag for how the weights were trained.
    pub(crate) tag: String,
    /// Whether a head may be missing because a new one replaces it.
    pub(crate) needs_no_head: bool,
    pub(crate) preprocessing: PreprocessingFields,
    /// Notes for the user.
    pub(crate) notes: Vec<String>,
}

/// Embedding sizes of CLIP models.
pub(crate) const EMBEDDINGS: [usize; 7] = [256, 384, 512, 640, 768, 1024, 1280];

impl StatedModel {
    /// Returns what an architecture name determines: timm's, ours, or open_clip's with the settings of its model of
    /// that name.
    pub(crate) fn by_name(architecture: &str) -> Self {
        let open_clip = architecture.starts_with(OPEN_CLIP_PREFIX);
        let clipa = open_clip && architecture.contains("-CLIPA");
        let clip = open_clip || architecture.contains("_clip_");
        let (mean, std) = match clip && !clipa {
            true => (CLIP_MEAN, CLIP_STD),
            false => (IMAGENET_MEAN, IMAGENET_STD),
        };
        let (name, tag) = architecture.split_once('.').unwrap_or((architecture, ""));
        Self {
            source: "config.json",
            words: ConfigKeys {
                classes: "num_classes",
                width: "embed_dim",
                depth: "depth",
                heads: "num_heads",
                pool: "global_pool",
            },
            architecture: architecture.to_owned(),
            by_name_alone: true,
            size: match open_clip {
                true => String::new(),
                false => architecture.to_owned(),
            },
            width: None,
            depth: None,
            pre_norm: None,
            heads: None,
            pool: match (open_clip, clipa) {
                (false, _) => None,
                (true, false) => Some(Pool::Token),
                (true, true) => Some(Pool::Average),
            },
            position: Position::Learned,
            position_size: None,
            patch: None,
            image_size: None,
            gelu: match clip && architecture.contains("quickgelu") {
                true => Gelu::Quick,
                false => Gelu::Erf,
            },
            norm_eps: if clip { CLIP_EPS } else { NORM_EPS },
            mean,
            std,
            class_count: None,
            class_names: Vec::new(),
            outputs: (open_clip && known(name).is_some()).then_some(Outputs::Embedding),
            tag: tag.to_owned(),
            needs_no_head: false,
            preprocessing: PreprocessingFields::default(),
            notes: Vec::new(),
        }
    }

    /// Returns the meaning of a model's outputs, given their number.
    ///
    /// timm has CLIP towers whose head is the projection, such as `vit_base_patch16_clip_224.openai`, and classifiers
    /// fine-tuned from them, such as `vit_base_patch16_clip_224.openai_ft_in1k`.
    pub(crate) fn outputs(&self, outputs: usize) -> Outputs {
        let is_tower = self.architecture.contains("_clip_")
            && !self.tag.contains("_ft_")
            && self.class_names.is_empty()
            && EMBEDDINGS.contains(&outputs);
        match (self.outputs, is_tower) {
            (Some(stated), _) => stated,
            (None, true) => Outputs::Embedding,
            (None, false) => Outputs::Logits,
        }
    }

    /// Checks that the configuration, if it states a number, agrees with the weights.
    pub(crate) fn agrees(&self, key: &str, stated: Option<usize>, found: usize) -> Result<()> {
        match stated {
            Some(stated) if stated != found => {
                let source = self.source;
                let message =
                    format!("`{source}` has {key} = {stated}, but the weights have {found}");
                Err(Error::input(message).hint("correct whichever is wrong"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the number of attention heads, which no shape determines, for tokens of a width.
    pub(crate) fn heads(&self, width: usize) -> Result<usize> {
        let heads = match (self.heads, known(&self.architecture)) {
            (Some(heads), _) => heads,
            (None, Some(NamedArchitecture::Vit(right, heads))) if right == width => heads,
            (None, Some(NamedArchitecture::Vit(right, _))) => {
                let name = &self.architecture;
                let message =
                    format!("`{name}` has width {right}, but the weights have width {width}");
                let error = Error::input(message);
                let (sizes, prefix) = match open_clip(name) {
                    Some(_) => (OPEN_CLIP, OPEN_CLIP_PREFIX),
                    None => (TIMM, "vit_"),
                };
                let fitting = sizes.iter().find(|size| size.1 == width);
                return Err(match fitting {
                    Some((word, ..)) => error.hint(format!("is it a `{prefix}{word}`?")),
                    None => error.hint("use the architecture that the weights were trained with"),
                });
            }
            (None, _) => {
                let message = format!(
                    "`{}` does not state the number of attention heads",
                    self.source
                );
                return Err(Error::input(message)
                    .hint("add it, for example \"model_args\": { \"num_heads\": 12 }"));
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            let key = self.words.heads;
            let message = format!("{key} = {heads} must divide width = {width}");
            return Err(Error::input(message).hint("correct it in the configuration"));
        }
        Ok(heads)
    }
}

/// Returns the naming scheme of a file with a named architecture.
pub(crate) fn scheme(architecture: &str) -> Scheme {
    match (
        open_clip(architecture),
        StatedModel::by_name(architecture).pool,
    ) {
        (Some(_), Some(pool)) => Scheme::OpenClip(pool),
        _ => Scheme::Timm,
    }
}
