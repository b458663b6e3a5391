//! Determines the model in a weights file from the names and shapes of its tensors and the files next to it.

use super::architecture::{NamedArchitecture, known};
use super::names::Names;
use super::stated::StatedModel;
use crate::error::{Error, Result};
use crate::model::config::convnext::KERNEL;
use crate::model::{ConvNextConfig, ModelConfig, Pool, Position, Stem, VitConfig};
use crate::storage::archive::shown;

pub(crate) struct Description {
    pub(crate) config: ModelConfig,
    pub(crate) classes: usize,
    pub(crate) image_size: usize,
}

/// Image size of a ConvNeXt if none is stated: ImageNet's.
const IMAGE_SIZE: usize = 224;

/// Determines the model from the shapes of the tensors and the stated settings.
pub(crate) fn describe(weights: &Names, stated: &StatedModel) -> Result<Description> {
    let is_convnext = weights.contains("stages.0.blocks.0.conv_dw.weight");
    let name = &stated.architecture;
    if known(name).is_none() && !name.is_empty() {
        let message = format!(
            "`{}` has unsupported architecture = `{}`",
            stated.source,
            shown(name)
        );
        return Err(Error::input(message).hint(
            "only plain vision transformers and ConvNeXts can be loaded, such as `vit_base_patch16_224` or \
             `convnext_tiny`",
        ));
    }
    match (is_convnext, known(name)) {
        (true, Some(NamedArchitecture::Vit(..))) => Err(unlike(stated, "are those of a ConvNeXt")),
        (true, _) => convnext(weights, stated),
        (false, Some(NamedArchitecture::ConvNext)) => {
            Err(unlike(stated, "are not those of a ConvNeXt"))
        }
        (false, _) => vit(weights, stated),
    }
}

fn unlike(stated: &StatedModel, found: &str) -> Error {
    let name = shown(&stated.architecture);
    Error::input(format!(
        "the architecture is `{name}`, but the weights {found}"
    ))
    .hint("use the architecture that the weights were trained with")
}

fn unfit(what: &str) -> Error {
    Error::input(format!(
        "{what}, so this is not a plain vision transformer or ConvNeXt"
    ))
    .hint("only vision transformers and ConvNeXts can be loaded")
}

/// Returns a shape and refuses sizes of zero: next to a zero, the file length would not bound the other sizes.
fn shape(weights: &Names, name: &str) -> Result<Vec<usize>> {
    match weights.shape(name)? {
        shape if shape.contains(&0) => Err(unfit(&format!("{} is empty", weights.called(name)))),
        shape => Ok(shape),
    }
}

/// Returns the number of classes, or 1 if there is no head and none is needed.
///
/// Errors: a missing head, or a configuration with a different number.
fn classes(weights: &Names, head: &str, stated: &StatedModel) -> Result<usize> {
    let called = weights.called(head);
    if !weights.contains(head) {
        return match stated.needs_no_head {
            true => Ok(1),
            false => Err(without_head(&called)),
        };
    }
    let [classes, _, ..] = shape(weights, head)?[..] else {
        return Err(unfit(&format!("{called} is not a matrix")));
    };
    match stated.class_count {
        Some(count) if count != classes => {
            let (source, key) = (stated.source, stated.words.classes);
            let message =
                format!("`{source}` has {key} = {count}, but {called} has {classes} rows");
            Err(Error::input(message).hint("correct whichever is wrong"))
        }
        _ => Ok(classes),
    }
}

fn without_head(called: &str) -> Error {
    Error::input(format!("the weights have no head: {called} is missing")).hint(
        "train a new head with start.head = \"new\"; weights without a head can only be a starting point",
    )
}

/// Returns the patches per side from the number of positions, which cover all tokens or only the patches (DeiT-3,
/// timm's `no_embed_class`).
fn grid(places: usize, class_token: bool) -> Option<usize> {
    let side = |patches: usize| {
        let side = patches.isqrt();
        (side > 0 && side * side == patches).then_some(side)
    };
    match class_token {
        true => side(places.saturating_sub(1)).or(side(places)),
        false => side(places),
    }
}

/// Counts the consecutive numbers from 0 on for which a name exists.
fn count(weights: &Names, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|i| weights.contains(&name(*i))).count()
}

fn vit(weights: &Names, stated: &StatedModel) -> Result<Description> {
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
    let called = weights.called(&last);
    let [width, channels, patch, _] = shape(weights, &last)?[..] else {
        return Err(unfit(&format!(
            "{called} does not have shape [width, 3, patch, patch]"
        )));
    };
    let patch = match stem {
        Stem::Patch if channels == 3 => patch,
        Stem::Patch => {
            return Err(unfit(&format!(
                "{called} does not have shape [width, 3, patch, patch]"
            )));
        }
        // Each layer halves the image; no image is larger than 2^16 pixels.
        Stem::Conv => 1 << layers.min(16),
    };
    if let Some(expected) = stated.width.filter(|stated| *stated != width) {
        let (source, key) = (stated.source, stated.words.width);
        let message = format!(
            "`{source}` has {key} = {expected}, but {called} gives tokens of width {width}"
        );
        return Err(Error::input(message).hint("correct whichever is wrong"));
    }
    stated.agrees("patch_size", stated.patch, patch)?;
    let first = "blocks.0.mlp.fc1.weight";
    let [hidden, _] = shape(weights, first)?[..] else {
        return Err(unfit(&format!("{} is not a matrix", weights.called(first))));
    };
    let places = weights.called("pos_embed");
    let [1, tokens, _] = shape(weights, "pos_embed")?[..] else {
        return Err(unfit(&format!(
            "{places} does not have shape [1, tokens, width]"
        )));
    };
    let class_token = weights.contains("cls_token");
    let grid = grid(tokens, class_token)
        .ok_or_else(|| unfit(&format!("{places} does not belong to a square grid")))?;
    if let Some((key, size)) = stated.image_size
        && size != grid * patch
    {
        let source = stated.source;
        let message = format!(
            "`{source}` has {key} = {size}, but {places} has {grid} x {grid} patches of {patch} pixels, for images of \
             {} pixels",
            grid * patch
        );
        return Err(Error::input(message).hint(format!(
            "correct {key}; to evaluate at another size with resampled positions, use --image-size {size}"
        )));
    }
    if stated.position == Position::Sincos2d && !width.is_multiple_of(4) {
        let message = format!("position = `sincos2d` needs a width divisible by 4, got {width}");
        return Err(Error::input(message));
    }
    let (depth, heads) = (
        count(weights, |i| format!("blocks.{i}.norm1.weight")),
        stated.heads(width)?,
    );
    // A file that lost its last blocks would give a different model.
    if let Some(expected) = stated.depth.filter(|stated| *stated != depth) {
        let (source, key) = (stated.source, stated.words.depth);
        let message =
            format!("`{source}` has {key} = {expected}, but the weights have {depth} blocks");
        return Err(Error::input(message).hint("copy or download both again"));
    }
    let pool = pool(weights, stated)?;
    if pool == Pool::Token && !class_token {
        let message = "unsupported pooling: the mean of the patches is taken after the norm";
        return Err(Error::input(message)
            .hint("models without a class token need `fc_norm`, the norm after pooling"));
    }
    let config = VitConfig {
        size: match &stated.size[..] {
            "" => size([patch, width, depth, heads, hidden]),
            size => size.to_owned(),
        },
        patch,
        width,
        depth,
        heads,
        hidden,
        pool,
        class_token,
        position: stated.position,
        position_size: stated.position_size,
        stem,
        pre_norm: stated
            .pre_norm
            .unwrap_or_else(|| weights.contains("norm_pre.weight")),
        gelu: stated.gelu,
        norm_eps: stated.norm_eps,
        mean: stated.mean,
        std: stated.std,
    };
    Ok(Description {
        config: ModelConfig::Vit(config),
        classes: classes(weights, "head.weight", stated)?,
        image_size: grid * patch,
    })
}

fn convnext(weights: &Names, stated: &StatedModel) -> Result<Description> {
    let (mut widths, mut depths) = ([0; 4], [0; 4]);
    for stage in 0..4 {
        let name = format!("stages.{stage}.blocks.0.conv_dw.weight");
        let [width, 1, KERNEL, KERNEL] = shape(weights, &name)?[..] else {
            let called = weights.called(&name);
            return Err(unfit(&format!("{called} is not [width, 1, 7, 7]")));
        };
        widths[stage] = width;
        depths[stage] = count(weights, |i| {
            format!("stages.{stage}.blocks.{i}.conv_dw.weight")
        });
    }
    let (stem, patch) = match weights.contains("stem.stem.0.weight") {
        true => (Stem::Conv, stated.patch.unwrap_or(4)),
        false => match shape(weights, "stem.0.weight")?[..] {
            [_, 3, patch, _] => {
                stated.agrees("patch_size", stated.patch, patch)?;
                (Stem::Patch, patch)
            }
            _ => {
                let called = weights.called("stem.0.weight");
                return Err(unfit(&format!("{called} is not [width, 3, patch, patch]")));
            }
        },
    };
    let config = ConvNextConfig {
        size: match &stated.size[..] {
            "" => "convnext".to_owned(),
            size => size.to_owned(),
        },
        patch,
        widths,
        depths,
        stem,
        mean: stated.mean,
        std: stated.std,
    };
    if let Some(named) = ConvNextConfig::named(&stated.architecture)
        && stated.by_name_alone
        && (named.widths, named.depths) != (widths, depths)
    {
        let message = format!(
            "`{}` has widths {:?} and depths {:?}, but the weights have {widths:?} and {depths:?}",
            named.size, named.widths, named.depths
        );
        return Err(
            Error::input(message).hint("use the architecture that the weights were trained with")
        );
    }
    let image_size = stated.image_size.map_or(IMAGE_SIZE, |(_, size)| size);
    if let Err((message, hint)) = config.grid(image_size) {
        return Err(Error::input(message).hint(hint));
    }
    Ok(Description {
        classes: classes(weights, "head.fc.weight", stated)?,
        config: ModelConfig::ConvNext(config),
        image_size,
    })
}

/// Returns our name of a transformer of these sizes: patch, width, depth, heads, hidden.
fn size(found: [usize; 5]) -> String {
    let is_it = |name: &&str| {
        VitConfig::named(name)
            .is_some_and(|vit| [vit.patch, vit.width, vit.depth, vit.heads, vit.hidden] == found)
    };
    VitConfig::names()
        .into_iter()
        .find(is_it)
        .unwrap_or("vit")
        .to_owned()
}

/// Determines the pooling from the norm before the head.
fn pool(weights: &Names, stated: &StatedModel) -> Result<Pool> {
    let has = |pool: Pool| weights.contains(&format!("{}.weight", pool.norm()));
    let pool = match (has(Pool::Average), has(Pool::Token)) {
        (true, true) => {
            let message =
                "the file has both `norm` and `fc_norm`, but a model uses only one of them";
            return Err(Error::input(message).hint(
                "remove the other: class token pooling uses `norm`, average pooling uses `fc_norm`",
            ));
        }
        (true, false) => Pool::Average,
        (false, _) => Pool::Token,
    };
    if stated.pool.is_some_and(|stated| stated != pool) {
        let (norm, other) = match pool {
            Pool::Average => ("fc_norm", "token"),
            Pool::Token => ("norm", "avg"),
        };
        let message = format!(
            "`{}` has {} = `{other}`, but the weights have `{norm}`",
            stated.source, stated.words.pool
        );
        return Err(Error::input(message).hint(
            "`avg` requires `fc_norm`, and `token` requires `norm`; other models cannot be loaded",
        ));
    }
    Ok(pool)
}
