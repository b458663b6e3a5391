//! What model a file of weights holds: told by names and shapes, and by what stands beside them.

use super::shown;
use crate::error::{Error, Result};
use crate::fused::Gelu;
use crate::model::config::convnext::KERNEL;
use crate::model::config::{IMAGENET_MEAN, IMAGENET_STD};
use crate::model::{ConvNextConfig, ModelConfig, Pool, Position, StateDict, Stem, VitConfig};
use crate::settings::nearest;

/// What the tensors do not tell of a model.
pub(super) struct Told {
    /// timm's or our name of the architecture.
    pub(super) architecture: String,
    /// Whether nothing but the name is known.
    pub(super) by_name_alone: bool,
    /// Our name of the size.
    pub(super) size: String,
    pub(super) heads: Option<usize>,
    pub(super) pool: Option<Pool>,
    pub(super) position: Position,
    pub(super) position_size: Option<usize>,
    pub(super) patch: Option<usize>,
    pub(super) image_size: Option<usize>,
    pub(super) gelu: Gelu,
    pub(super) mean: [f64; 3],
    pub(super) std: [f64; 3],
    pub(super) class_count: Option<usize>,
    pub(super) class_names: Vec<String>,
}

impl Told {
    pub(super) fn by_name(architecture: &str) -> Self {
        Self {
            architecture: architecture.to_owned(),
            by_name_alone: true,
            size: architecture.to_owned(),
            heads: None,
            pool: None,
            position: Position::Learned,
            position_size: None,
            patch: None,
            image_size: None,
            gelu: Gelu::Erf,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            class_count: None,
            class_names: Vec::new(),
        }
    }

    /// Attention heads, which no shape tells, for tokens of a width.
    fn heads(&self, width: usize) -> Result<usize> {
        let heads = match (self.heads, known(&self.architecture)) {
            (Some(heads), _) => heads,
            (None, Some(Known::Vit(right, heads))) if right == width => heads,
            (None, Some(Known::Vit(right, _))) => {
                let name = &self.architecture;
                let message =
                    format!("`{name}` is {right} wide, and these weights are {width} wide");
                let error = Error::input(message);
                let fitting = TIMM.iter().find(|size| size.1 == width);
                return Err(match fitting {
                    Some((word, ..)) => error.hint(format!("is it a `vit_{word}`?")),
                    None => error.hint("name the architecture that the weights were trained as"),
                });
            }
            (None, _) => {
                let message = "`config.json` does not tell the number of attention heads";
                return Err(Error::input(message)
                    .hint("write it there, for example \"model_args\": { \"num_heads\": 12 }"));
            }
        };
        if heads == 0 || !width.is_multiple_of(heads) {
            let message = format!("num_heads = {heads} do not divide the width, {width}");
            return Err(Error::input(message));
        }
        Ok(heads)
    }
}

/// timm's words for sizes: (word, width, heads).
///
/// Source: the definitions in `timm/models/vision_transformer.py`.
const TIMM: [(&str, usize, usize); 8] = [
    ("tiny", 192, 3),
    ("small", 384, 6),
    ("medium", 512, 8),
    ("base", 768, 12),
    ("large", 1024, 16),
    ("huge", 1280, 16),
    ("giant", 1408, 16),
    ("gigantic", 1664, 16),
];

/// What the name of an architecture tells.
pub(super) enum Known {
    /// Width and heads of a transformer.
    Vit(usize, usize),
    ConvNext,
}

/// A named architecture: ours, or `vit_SIZE_...`, `deit_SIZE_...` and `convnext_...` of timm.
pub(super) fn known(architecture: &str) -> Option<Known> {
    match ModelConfig::named(architecture) {
        Some(ModelConfig::Vit(vit)) => return Some(Known::Vit(vit.width, vit.heads)),
        Some(ModelConfig::ConvNext(_)) => return Some(Known::ConvNext),
        None => {}
    }
    let mut words = architecture.split(['_', '.']);
    match words.next() {
        Some("convnext") => return Some(Known::ConvNext),
        Some("vit" | "deit") => {}
        _ => return None,
    }
    let word = words.next()?;
    let found = TIMM.iter().find(|size| size.0 == word)?;
    Some(Known::Vit(found.1, found.2))
}

pub(super) fn unknown(architecture: &str) -> Error {
    let error = Error::input(format!(
        "`{}` is no architecture that is known here",
        shown(architecture)
    ));
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
            "use timm's name, such as `vit_huge_patch14_224`, or one of {}",
            ours.join(", ")
        )),
    }
}

pub(super) struct Description {
    pub(super) config: ModelConfig,
    pub(super) classes: usize,
    pub(super) image_size: usize,
}

/// The images that ConvNeXts are made for where nothing tells a size: ImageNet's.
const IMAGE_SIZE: usize = 224;

/// What the shapes of the tensors, and what else is told, say of the model.
pub(super) fn describe(weights: &StateDict, told: &Told) -> Result<Description> {
    let is_convnext = weights.contains("stages.0.blocks.0.conv_dw.weight");
    match (is_convnext, known(&told.architecture)) {
        (true, Some(Known::Vit(..))) => Err(unlike(told, "a ConvNeXt")),
        (true, _) => convnext(weights, told),
        (false, Some(Known::ConvNext)) => Err(unlike(told, "no ConvNeXt")),
        (false, _) => vit(weights, told),
    }
}

fn unlike(told: &Told, found: &str) -> Error {
    let name = shown(&told.architecture);
    Error::input(format!(
        "the weights are those of {found}, not of a `{name}`"
    ))
    .hint("name the architecture that the weights were trained as")
}

fn unfit(what: &str) -> Error {
    Error::input(format!(
        "{what}, so this is not a plain vision transformer or ConvNeXt"
    ))
    .hint("only vision transformers and ConvNeXts can be loaded")
}

/// A shape; without a size of zero, beside which others could be anything: so the file's length bounds them.
fn shape<'a>(weights: &'a StateDict, name: &str) -> Result<&'a [usize]> {
    match weights.shape(name)? {
        shape if shape.contains(&0) => Err(unfit(&format!("`{name}` has no numbers"))),
        shape => Ok(shape),
    }
}

/// The number of classes, if the configuration tells no other.
fn classes(weights: &StateDict, head: &str, told: &Told) -> Result<usize> {
    let (Some(classes), true) = (
        shape(weights, head)?.first(),
        weights.shape(head)?.len() > 1,
    ) else {
        return Err(unfit(&format!("`{head}` is not a matrix")));
    };
    match told.class_count {
        Some(told) if told != *classes => {
            let message =
                format!("`config.json` has num_classes = {told}, and `{head}` {classes} rows");
            Err(Error::input(message).hint("correct the one that is wrong"))
        }
        _ => Ok(*classes),
    }
}

/// How often in a row a name with a number is there.
fn count(weights: &StateDict, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|i| weights.contains(&name(*i))).count()
}

fn vit(weights: &StateDict, told: &Told) -> Result<Description> {
    let layers = count(weights, |i| {
        format!("patch_embed.proj.stem.{}.weight", 3 * i + 1)
    });
    let (stem, last) = match layers {
        0 => (Stem::Patch, "patch_embed.proj.weight".to_owned()),
        _ => (
            Stem::Conv,
            format!("patch_embed.proj.stem.{}.weight", 3 * layers),
        ),
    };
    let &[width, channels, patch, _] = shape(weights, &last)? else {
        return Err(unfit(&format!("`{last}` is not [width, 3, patch, patch]")));
    };
    let patch = match stem {
        Stem::Patch if channels == 3 => patch,
        Stem::Patch => return Err(unfit(&format!("`{last}` is not [width, 3, patch, patch]"))),
        // Each layer halves the image; no picture is larger than that.
        Stem::Conv => 1 << layers.min(16),
    };
    let &[hidden, _] = shape(weights, "blocks.0.mlp.fc1.weight")? else {
        return Err(unfit("`blocks.0.mlp.fc1.weight` is not a matrix"));
    };
    let &[1, places, _] = shape(weights, "pos_embed")? else {
        return Err(unfit("`pos_embed` is not [1, tokens, width]"));
    };
    let class_token = weights.contains("cls_token");
    let patches = places - usize::from(class_token).min(places);
    let grid = patches.isqrt();
    if grid == 0 || grid * grid != patches {
        return Err(unfit("`pos_embed` does not belong to a square grid"));
    }
    if told.position == Position::Sincos2d && !width.is_multiple_of(4) {
        let message = format!("position = `sincos2d` needs a width that 4 divides, not {width}");
        return Err(Error::input(message));
    }
    let config = VitConfig {
        size: told.size.clone(),
        patch,
        width,
        depth: count(weights, |i| format!("blocks.{i}.norm1.weight")),
        heads: told.heads(width)?,
        hidden,
        pool: pool(weights, told.pool)?,
        class_token,
        position: told.position,
        position_size: told.position_size,
        stem,
        pre_norm: weights.contains("norm_pre.weight"),
        gelu: told.gelu,
        mean: told.mean,
        std: told.std,
    };
    Ok(Description {
        config: ModelConfig::Vit(config),
        classes: classes(weights, "head.weight", told)?,
        image_size: grid * patch,
    })
}

fn convnext(weights: &StateDict, told: &Told) -> Result<Description> {
    let (mut widths, mut depths) = ([0; 4], [0; 4]);
    for stage in 0..4 {
        let name = format!("stages.{stage}.blocks.0.conv_dw.weight");
        let &[width, 1, KERNEL, KERNEL] = shape(weights, &name)? else {
            return Err(unfit(&format!("`{name}` is not [width, 1, 7, 7]")));
        };
        widths[stage] = width;
        depths[stage] = count(weights, |i| {
            format!("stages.{stage}.blocks.{i}.conv_dw.weight")
        });
    }
    let (stem, patch) = match weights.contains("stem.stem.0.weight") {
        true => (Stem::Conv, told.patch.unwrap_or(4)),
        false => match shape(weights, "stem.0.weight")? {
            &[_, 3, patch, _] => (Stem::Patch, patch),
            _ => return Err(unfit("`stem.0.weight` is not [width, 3, patch, patch]")),
        },
    };
    let config = ConvNextConfig {
        size: told.size.clone(),
        patch,
        widths,
        depths,
        stem,
        mean: told.mean,
        std: told.std,
    };
    if let Some(named) = ConvNextConfig::named(&told.architecture)
        && told.by_name_alone
        && (named.widths, named.depths) != (widths, depths)
    {
        let message = format!(
            "`{}` has widths {:?} and depths {:?}, these weights {widths:?} and {depths:?}",
            named.size, named.widths, named.depths
        );
        return Err(
            Error::input(message).hint("name the architecture that the weights were trained as")
        );
    }
    let image_size = told.image_size.unwrap_or(IMAGE_SIZE);
    if let Err((message, hint)) = config.grid(image_size) {
        return Err(Error::input(message).hint(hint));
    }
    Ok(Description {
        classes: classes(weights, "head.fc.weight", told)?,
        config: ModelConfig::ConvNext(config),
        image_size,
    })
}

/// What the head sees: the norm before it tells.
fn pool(weights: &StateDict, told: Option<Pool>) -> Result<Pool> {
    let has = |pool: Pool| weights.contains(&format!("{}.weight", pool.norm()));
    let pool = match (has(Pool::Average), has(Pool::Token)) {
        (true, true) => {
            let message = "the file has both `norm` and `fc_norm`, and a model uses one of them";
            return Err(Error::input(message).hint(
                "take out the other: `norm` where the class token is used, `fc_norm` where the mean is",
            ));
        }
        (true, false) => Pool::Average,
        (false, _) => Pool::Token,
    };
    if told.is_some_and(|told| told != pool) {
        let (norm, other) = match pool {
            Pool::Average => ("fc_norm", "token"),
            Pool::Token => ("norm", "avg"),
        };
        let message =
            format!("`config.json` has global_pool = `{other}`, but the weights have `{norm}`");
        return Err(Error::input(message).hint(
            "`avg` goes with `fc_norm` and `token` with `norm`; other models cannot be loaded",
        ));
    }
    Ok(pool)
}
