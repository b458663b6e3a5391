//! What the files next to the weights state about a model.

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

/// The keys of a configuration under which a program tells classes, width, depth, heads and pooling.
#[derive(Clone, Copy)]
pub(crate) struct ConfigKeys {
    pub(crate) classes: &'static str,
    pub(crate) width: &'static str,
    pub(crate) depth: &'static str,
    pub(crate) heads: &'static str,
    pub(crate) pool: &'static str,
}

/// What the tensors do not tell of a model.
pub(crate) struct StatedModel {
    /// The file that tells it.
    pub(crate) source: &'static str,
    /// Its words, for messages.
    pub(crate) words: ConfigKeys,
    /// timm's or our name of the architecture.
    pub(crate) architecture: String,
    /// Whether nothing but the name is known.
    pub(crate) by_name_alone: bool,
    /// Our name of the size; found by the shapes where it is empty.
    pub(crate) size: String,
    pub(crate) width: Option<usize>,
    pub(crate) depth: Option<usize>,
    pub(crate) heads: Option<usize>,
    pub(crate) pool: Option<Pool>,
    pub(crate) pre_norm: Option<bool>,
    pub(crate) position: Position,
    pub(crate) position_size: Option<usize>,
    pub(crate) patch: Option<usize>,
    /// Pixels on a side, and the key that says so.
    pub(crate) image_size: Option<(&'static str, usize)>,
    pub(crate) gelu: Gelu,
    pub(crate) norm_eps: f64,
    pub(crate) mean: [f64; 3],
    pub(crate) std: [f64; 3],
    pub(crate) class_count: Option<usize>,
    pub(crate) class_names: Vec<String>,
    /// What the outputs are; else given by the names.
    pub(crate) outputs: Option<Outputs>,
    /// What timm calls the training that made the weights.
    pub(crate) tag: String,
    /// Whether a head may be missing, since a new one takes its place.
    pub(crate) needs_no_head: bool,
    pub(crate) preprocessing: PreprocessingFields,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

/// Sizes of the embeddings of CLIP's models.
pub(crate) const EMBEDDINGS: [usize; 7] = [256, 384, 512, 640, 768, 1024, 1280];

impl StatedModel {
    /// What a name tells: of timm's, of ours, or of open_clip's, as that program's model of the name is.
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

    /// What the outputs of a model with so many of them are.
    ///
    /// timm has CLIP's towers with their projection in the place of the head, `vit_base_patch16_clip_224.openai`, and
    /// classifiers that were trained from them, `vit_base_patch16_clip_224.openai_ft_in1k`.
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

    /// An error where the configuration tells another number than the weights.
    pub(crate) fn agrees(&self, key: &str, stated: Option<usize>, found: usize) -> Result<()> {
        match stated {
            Some(stated) if stated != found => {
                let source = self.source;
                let message =
                    format!("`{source}` has {key} = {stated}, and the weights have {found}");
                Err(Error::input(message).hint("correct the one that is wrong"))
            }
            _ => Ok(()),
        }
    }

    /// Attention heads, which no shape tells, for tokens of a width.
    pub(crate) fn heads(&self, width: usize) -> Result<usize> {
        let heads = match (self.heads, known(&self.architecture)) {
            (Some(heads), _) => heads,
            (None, Some(NamedArchitecture::Vit(right, heads))) if right == width => heads,
            (None, Some(NamedArchitecture::Vit(right, _))) => {
                let name = &self.architecture;
                let message =
                    format!("`{name}` is {right} wide, and these weights are {width} wide");
                let error = Error::input(message);
                let (sizes, prefix) = match open_clip(name) {
                    Some(_) => (OPEN_CLIP, OPEN_CLIP_PREFIX),
                    None => (TIMM, "vit_"),
                };
                let fitting = sizes.iter().find(|size| size.1 == width);
                return Err(match fitting {
                    Some((word, ..)) => error.hint(format!("is it a `{prefix}{word}`?")),
                    None => error.hint("name the architecture that the weights were trained as"),
                });
            }
            (None, _) => {
                let message = format!(
                    "`{}` does not tell the number of attention heads",
                    self.source
                );
                return Err(Error::input(message)
                    .hint("write it there, for example \"model_args\": { \"num_heads\": 12 }"));
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            let key = self.words.heads;
            let message = format!("{key} = {heads} do not divide the width, {width}");
            return Err(Error::input(message).hint("correct it in the configuration"));
        }
        Ok(heads)
    }
}

/// Whose names a file of a named architecture has.
pub(crate) fn scheme(architecture: &str) -> Scheme {
    match (
        open_clip(architecture),
        StatedModel::by_name(architecture).pool,
    ) {
        (Some(_), Some(pool)) => Scheme::OpenClip(pool),
        _ => Scheme::Timm,
    }
}
