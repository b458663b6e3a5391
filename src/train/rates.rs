//! Learning-rate factors of a stage's parameters: frozen ones, layer-wise decay, the head's own rate.

use crate::error::{Context, Error, Result};
use crate::model::Model;
use crate::ops::Device;
use crate::optim::OptimizerConfig;
use crate::recipe::Recipe;

/// Sets the factor of each parameter's learning rate; 0 where no pattern of `train` matches.
///
/// Errors: a pattern that matches no parameter.
pub(super) fn set(model: &mut Model, train: &[String], config: &OptimizerConfig) -> Result<()> {
    let names: Vec<String> = model
        .parameters()
        .iter()
        .map(|parameter| parameter.name.clone())
        .collect();
    let layers = layers(&names);
    let last = layers.iter().copied().max().unwrap_or_default();
    if let Some(pattern) = train
        .iter()
        .find(|pattern| !names.iter().any(|name| matches(pattern, name)))
    {
        let first: Vec<String> = names
            .iter()
            .take(4)
            .map(|name| format!("`{name}`"))
            .collect();
        let message = format!("train: `{pattern}` matches no parameter of the model");
        return Err(Error::input(message).hint(format!(
            "names are timm's, such as {}; `advxl inspect MODEL` lists them",
            first.join(", ")
        )));
    }
    for ((parameter, name), layer) in model.parameters_mut().into_iter().zip(&names).zip(layers) {
        let is_trained = train.is_empty() || train.iter().any(|pattern| matches(pattern, name));
        let decay = config.layer_decay.unwrap_or(1.0);
        // The head of a ConvNeXt is named `head.fc`, and its final norm `head.norm`.
        let is_head = name.starts_with("head.") && !name.starts_with("head.norm.");
        let head = if is_head { config.head_rate } else { 1.0 };
        parameter.rate = match is_trained {
            true => head * decay.powi((last - layer) as i32),
            false => 0.0,
        };
    }
    Ok(())
}

/// Checks the patterns of all stages.
///
/// Errors: a pattern that matches no parameter.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    if recipe.stage.iter().all(|stage| stage.train.is_empty()) {
        return Ok(());
    }
    // Names do not depend on the number of outputs.
    let mut model = Model::new(
        &recipe.model,
        1,
        recipe.first_image_size(),
        0,
        &Device::cpu(),
    );
    for stage in &recipe.stage {
        set(&mut model, &stage.train, &stage.optimizer)
            .context(|| format!("stage `{}`", stage.name))?;
    }
    Ok(())
}

/// Returns whether a name begins with the parts of a pattern. A part is a word, a number, a range of numbers such as
/// `0-5`, or `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = name.split('.');
    pattern.split('.').all(|wanted| {
        let Some(part) = parts.next() else {
            return false;
        };
        let range = wanted.split_once('-');
        let range = range.and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
        let within = |(low, high): (usize, usize)| {
            let number = part.parse::<usize>();
            number.is_ok_and(|number| (low..=high).contains(&number))
        };
        wanted == "*" || wanted == part || range.is_some_and(within)
    })
}

/// Returns the layer of each parameter, from 0 at the input: the stem, each block (and each downsampling of a ConvNeXt),
/// and last the final norm with the head.
///
/// Source: timm's `param_groups_layer_decay`, with the groups of its models.
fn layers(names: &[String]) -> Vec<usize> {
    // Groups of the middle, in their order in the model.
    let mut groups: Vec<String> = Vec::new();
    let mut group_of = |name: &str| {
        let parts: Vec<&str> = name.split('.').collect();
        let group = match parts[..] {
            ["blocks", block, ..] => format!("blocks.{block}"),
            ["stages", stage, "blocks", block, ..] => format!("stages.{stage}.{block}"),
            ["stages", stage, ..] => format!("stages.{stage}"),
            _ => return None,
        };
        if !groups.contains(&group) {
            groups.push(group.clone());
        }
        groups.iter().position(|known| *known == group)
    };
    let of_middle: Vec<Option<usize>> = names.iter().map(|name| group_of(name)).collect();
    let last = groups.len() + 1;
    let is_stem = |name: &str| {
        [
            "cls_token",
            "pos_embed",
            "patch_embed.",
            "stem.",
            "norm_pre.",
        ]
        .iter()
        .any(|stem| name.starts_with(stem))
    };
    names
        .iter()
        .zip(of_middle)
        .map(|(name, middle)| match middle {
            Some(group) => group + 1,
            None if is_stem(name) => 0,
            None => last,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;
    use crate::optim::OptimizerKind;

    fn rates(
        size: &str,
        train: &[&str],
        layer_decay: Option<f64>,
        head_rate: f64,
    ) -> Vec<(String, f64)> {
        let config = ModelConfig::named(size).unwrap();
        let mut model = Model::new(&config, 10, 32, 0, &Device::cpu());
        let train: Vec<String> = train.iter().map(|&pattern| pattern.to_owned()).collect();
        let optimizer = OptimizerConfig {
            kind: OptimizerKind::Adamw,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            clip_norm: None,
            layer_decay,
            head_rate,
        };
        set(&mut model, &train, &optimizer).unwrap();
        let all = model.parameters().into_iter();
        all.map(|part| (part.name.clone(), part.rate)).collect()
    }

    #[test]
    fn layers_decay_from_the_head_to_the_stem_as_in_timm() {
        for (name, rate) in rates("vit_micro", &[], Some(0.5), 3.0) {
            let layer = match &name[..] {
                name if name.starts_with("head.") => {
                    assert_eq!(rate, 3.0);
                    continue;
                }
                name if name.starts_with("blocks.") => {
                    1 + name.split('.').nth(1).unwrap().parse::<i32>().unwrap()
                }
                name if name.starts_with("fc_norm") || name.starts_with("norm.") => 10,
                _ => 0,
            };
            assert_eq!(rate, 0.5f64.powi(10 - layer), "{name}");
        }
        let convnext = rates("convnext_atto", &[], Some(0.5), 1.0);
        let rate = |wanted: &str| convnext.iter().find(|(name, _)| name == wanted).unwrap().1;
        assert_eq!(rate("head.fc.weight"), 1.0);
        assert!(rate("stages.3.blocks.1.norm.weight") == 0.5);
        assert!(rate("stages.1.downsample.1.weight") > rate("stages.0.blocks.1.norm.weight"));
        assert!(rate("stem.0.weight") < rate("stages.0.blocks.0.norm.weight"));
    }

    #[test]
    fn patterns_choose_what_is_trained() {
        for (pattern, matching, others) in [
            (
                "blocks.0-1",
                "blocks.1.attn.qkv.bias",
                "blocks.2.attn.qkv.bias",
            ),
            (
                "blocks.*.attn",
                "blocks.8.attn.proj.weight",
                "blocks.8.mlp.fc1.weight",
            ),
            ("head", "head.bias", "blocks.0.norm1.weight"),
        ] {
            let rates = rates("vit_micro", &[pattern], None, 1.0);
            let rate = |wanted: &str| rates.iter().find(|(name, _)| name == wanted).unwrap().1;
            assert_eq!((rate(matching), rate(others)), (1.0, 0.0), "{pattern}");
        }
    }
}
