//! What model a file of weights holds: given by the names and shapes of its tensors, and by the files next to it.

use super::architecture::{NamedArchitecture, known};
use super::archive::shown;
use super::names::Names;
use super::stated::StatedModel;
use crate::error::{Error, Result};
use crate::model::config::convnext::KERNEL;
use crate::model::{ConvNextConfig, ModelConfig, Pool, Position, Stem, VitConfig};

pub(crate) struct Description {
    pub(crate) config: ModelConfig,
    pub(crate) classes: usize,
    pub(crate) image_size: usize,
}

/// The images that ConvNeXts are made for where nothing tells a size: ImageNet's.
const IMAGE_SIZE: usize = 224;

/// What the shapes of the tensors, and what else is stated, say of the model.
pub(crate) fn describe(weights: &Names, stated: &StatedModel) -> Result<Description> {
    let is_convnext = weights.contains("stages.0.blocks.0.conv_dw.weight");
    let name = &stated.architecture;
    if known(name).is_none() && !name.is_empty() {
        let message = format!("`{}` has architecture = `{}`", stated.source, shown(name));
        return Err(Error::input(message).hint(
            "only plain vision transformers and ConvNeXts can be loaded, such as `vit_base_patch16_224` or `convnext_tiny`",
        ));
    }
    match (is_convnext, known(name)) {
        (true, Some(NamedArchitecture::Vit(..))) => Err(unlike(stated, "a ConvNeXt")),
        (true, _) => convnext(weights, stated),
        (false, Some(NamedArchitecture::ConvNext)) => Err(unlike(stated, "no ConvNeXt")),
        (false, _) => vit(weights, stated),
    }
}

fn unlike(stated: &StatedModel, found: &str) -> Error {
    let name = shown(&stated.architecture);
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
fn shape(weights: &Names, name: &str) -> Result<Vec<usize>> {
    match weights.shape(name)? {
        shape if shape.contains(&0) => {
            Err(unfit(&format!("{} has no numbers", weights.called(name))))
        }
        shape => Ok(shape),
    }
}

/// The number of classes, if the configuration tells no other; 1 where there is no head and none is needed.
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
            let message = format!("`{source}` has {key} = {count}, and {called} {classes} rows");
            Err(Error::input(message).hint("correct the one that is wrong"))
        }
        _ => Ok(classes),
    }
}

fn without_head(called: &str) -> Error {
    Error::input(format!("these weights end before a head: {called} is missing")).hint(
        "give them one by training with start.head = \"new\"; a model without a head can be nothing but a start",
    )
}

/// Patches along a side for the places of all tokens, or of the patches alone (DeiT-3, timm's `no_embed_class`).
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

/// How often in a row a name with a number is there.
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
        return Err(unfit(&format!("{called} is not [width, 3, patch, patch]")));
    };
    let patch = match stem {
        Stem::Patch if channels == 3 => patch,
        Stem::Patch => return Err(unfit(&format!("{called} is not [width, 3, patch, patch]"))),
        // Each layer halves the image; no picture is larger than that.
        Stem::Conv => 1 << layers.min(16),
    };
    if let Some(told_width) = stated.width.filter(|stated| *stated != width) {
        let (source, key) = (stated.source, stated.words.width);
        let message =
            format!("`{source}` has {key} = {told_width}, and {called} makes tokens {width} wide");
        return Err(Error::input(message).hint("correct the one that is wrong"));
    }
    stated.agrees("patch_size", stated.patch, patch)?;
    let first = "blocks.0.mlp.fc1.weight";
    let [hidden, _] = shape(weights, first)?[..] else {
        return Err(unfit(&format!("{} is not a matrix", weights.called(first))));
    };
    let places = weights.called("pos_embed");
    let [1, tokens, _] = shape(weights, "pos_embed")?[..] else {
        return Err(unfit(&format!("{places} is not [1, tokens, width]")));
    };
    let class_token = weights.contains("cls_token");
    let grid = grid(tokens, class_token)
        .ok_or_else(|| unfit(&format!("{places} does not belong to a square grid")))?;
    if let Some((key, size)) = stated.image_size
        && size != grid * patch
    {
        let source = stated.source;
        let message = format!(
            "`{source}` has {key} = {size}, and {places} has {grid} x {grid} patches of {patch} pixels, those of {} pixels",
            grid * patch
        );
        return Err(Error::input(message).hint(format!(
            "correct {key}; --image-size {size} evaluates at another size with resampled positions"
        )));
    }
    if stated.position == Position::Sincos2d && !width.is_multiple_of(4) {
        let message = format!("position = `sincos2d` needs a width that 4 divides, not {width}");
        return Err(Error::input(message));
    }
    let (depth, heads) = (
        count(weights, |i| format!("blocks.{i}.norm1.weight")),
        stated.heads(width)?,
    );
    // A file that lost its last blocks would make another model.
    if let Some(told_depth) = stated.depth.filter(|stated| *stated != depth) {
        let (source, key) = (stated.source, stated.words.depth);
        let message =
            format!("`{source}` has {key} = {told_depth}, and the weights are of {depth} blocks");
        return Err(Error::input(message).hint("copy or download both again"));
    }
    let pool = pool(weights, stated)?;
    if pool == Pool::Token && !class_token {
        let message =
            "the head of these weights sees the mean of patches that are normed before it is taken";
        return Err(
            Error::input(message).hint("models without class token need `fc_norm`, the norm after")
        );
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
            "`{}` has widths {:?} and depths {:?}, these weights {widths:?} and {depths:?}",
            named.size, named.widths, named.depths
        );
        return Err(
            Error::input(message).hint("name the architecture that the weights were trained as")
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

/// Our name of a transformer of these sizes: patch, width, depth, heads, hidden.
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

/// What the head sees: the norm before it tells.
fn pool(weights: &Names, stated: &StatedModel) -> Result<Pool> {
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
            "`avg` goes with `fc_norm` and `token` with `norm`; other models cannot be loaded",
        ));
    }
    Ok(pool)
}
