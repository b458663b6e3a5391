//! Architecture names of timm, open_clip and advxl, and what they determine.

use crate::error::Error;
use crate::model::ModelConfig;
use crate::settings::nearest;
use crate::storage::archive::shown;

/// Epsilon of the layer norms in CLIP's image towers: PyTorch's default.
pub(crate) const CLIP_EPS: f64 = 1e-5;

/// Prefix of open_clip's names of vision transformers.
pub(crate) const OPEN_CLIP_PREFIX: &str = "ViT-";

/// open_clip's size names: (name, width, heads).
///
/// Source: `open_clip/model_configs`.
pub(crate) const OPEN_CLIP: [(&str, usize, usize); 8] = [
    ("S", 384, 6),
    ("M", 512, 8),
    ("B", 768, 12),
    ("L", 1024, 16),
    ("H", 1280, 16),
    ("g", 1408, 16),
    ("bigG", 1664, 16),
    ("e", 1792, 16),
];

/// Returns the width and heads of an open_clip model such as `ViT-B-32-quickgelu` or `ViT-H-14-CLIPA-336`.
pub(crate) fn open_clip(architecture: &str) -> Option<(usize, usize)> {
    let mut words = architecture.strip_prefix(OPEN_CLIP_PREFIX)?.split('-');
    let word = words.next()?;
    let &(_, width, heads) = OPEN_CLIP.iter().find(|size| size.0 == word)?;
    let is_number = |word: &str| word.parse::<u32>().is_ok();
    let patch = words.next()?;
    // Names with other words, such as SigLIP, denote other models.
    let known =
        |word: &str| is_number(word) || ["quickgelu", "CLIPA", "alt", "worldwide"].contains(&word);
    (is_number(patch) && words.all(known)).then_some((width, heads))
}

/// timm's size names: (name, width, heads).
///
/// Source: the definitions in `timm/models/vision_transformer.py`.
pub(crate) const TIMM: [(&str, usize, usize); 8] = [
    ("tiny", 192, 3),
    ("small", 384, 6),
    ("medium", 512, 8),
    ("base", 768, 12),
    ("large", 1024, 16),
    ("huge", 1280, 16),
    ("giant", 1408, 16),
    ("gigantic", 1664, 16),
];

/// What an architecture name determines.
pub(crate) enum NamedArchitecture {
    /// Width and heads of a vision transformer.
    Vit(usize, usize),
    ConvNext,
}

/// Looks up an architecture name: ours, timm's `vit_SIZE_...`, `deit_SIZE_...`, `deit3_SIZE_...` and `convnext_...`, or
/// open_clip's `ViT-SIZE-PATCH...`.
pub(crate) fn known(architecture: &str) -> Option<NamedArchitecture> {
    match ModelConfig::named(architecture) {
        Some(ModelConfig::Vit(vit)) => return Some(NamedArchitecture::Vit(vit.width, vit.heads)),
        Some(ModelConfig::ConvNext(_)) => return Some(NamedArchitecture::ConvNext),
        None => {}
    }
    if let Some((width, heads)) = open_clip(architecture) {
        return Some(NamedArchitecture::Vit(width, heads));
    }
    let mut words = architecture.split(['_', '.']);
    match words.next() {
        Some("convnext") => return Some(NamedArchitecture::ConvNext),
        Some("vit" | "deit" | "deit3") => {}
        _ => return None,
    }
    // Res-post-norm models apply norms after the layers, but use the same names.
    if architecture.contains("_rpn_") {
        return None;
    }
    let word = words.next()?;
    let found = TIMM.iter().find(|size| size.0 == word)?;
    Some(NamedArchitecture::Vit(found.1, found.2))
}

pub(crate) fn unknown(architecture: &str) -> Error {
    let error = Error::input(format!("unknown architecture `{}`", shown(architecture)));
    let of_timm: Vec<String> = TIMM
        .iter()
        .flat_map(|(word, ..)| [14, 16].map(|patch| format!("vit_{word}_patch{patch}_224")))
        .collect();
    let ours = ModelConfig::names();
    let names: Vec<&str> = of_timm
        .iter()
        .map(String::as_str)
        .chain(ours.clone())
        .collect();
    match nearest(architecture, &names) {
        Some(near) if architecture.len() < 100 => error.hint(format!("did you mean `{near}`?")),
        _ => error.hint(format!(
            "use a timm name such as `vit_huge_patch14_224`, an open_clip name such as `ViT-B-16`, or one of {}",
            ours.join(", ")
        )),
    }
}
