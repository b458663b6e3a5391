//! Model cards and the facts that exports state about a model.

use std::path::Path;

use serde_json::{Value, json};

use crate::attack::Norm;
use crate::error::{Error, Result};
use crate::eval::autoattack::{Settings, Version};
use crate::eval::bound;
use crate::files;
use crate::image::Preprocessing;
use crate::model::{ModelConfig, NORM_EPS, Stem};
use crate::settings::Words;
use crate::weights::import::Loaded;
use crate::weights::outputs::Outputs;

/// Facts for model cards and RobustBench entries that the weights do not hold.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Name of the model.
    pub name: String,
    /// Authors.
    pub authors: String,
    /// Link to a description, such as a paper.
    pub link: String,
    /// Training data.
    pub dataset: String,
    /// Whether training used images beyond those of the dataset.
    pub additional_data: bool,
    /// Training recipe, if the model comes from a run.
    pub recipe: Option<String>,
    /// Results of `advxl eval`.
    pub results: Vec<Value>,
}

/// Program that a folder is exported for.
#[derive(Clone, Copy)]
pub(crate) enum Use {
    Timm,
    OpenClip,
    Transformers { with_text: bool },
}

/// Refuses a folder that is not empty, so that nothing is overwritten.
pub(crate) fn refuse_full(folder: &Path) -> Result<()> {
    if folder.is_dir() && !files::list(folder)?.is_empty() {
        let message = format!("`{}` is not empty", folder.display());
        return Err(Error::input(message).hint("choose a new folder with --out"));
    }
    Ok(())
}

pub(crate) fn percent(share: &Value) -> String {
    format!("{:.2}", 100.0 * share.as_f64().unwrap_or(f64::NAN))
}

/// Returns the model card: architecture, training, usage, results and their limits.
pub(crate) fn card(
    loaded: &Loaded,
    preprocessing: &Preprocessing,
    facts: &Facts,
    program: Use,
) -> String {
    let config = loaded.model.config();
    let (mean, std) = config.statistics();
    let size = loaded.image_size;
    let parameters = config.parameters(loaded.model.classes(), size) as f64 / 1e6;
    let (head, code) = match program {
        Use::Timm => (
            "library_name: timm\ntags:\n- image-classification\n- timm",
            "import timm\n\nmodel = timm.create_model(\"local-dir:FOLDER\", pretrained=True).eval()",
        ),
        Use::OpenClip => (
            "library_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags:\n- clip",
            "import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms(\"local-dir:FOLDER\")\n\
             model.eval()\n# Embeddings of images returned by `preprocess`, in the space of the text tower's:\n\
             features = model.encode_image(images)",
        ),
        Use::Transformers { with_text: false } => (
            "library_name: transformers\npipeline_tag: image-feature-extraction\ntags:\n- clip",
            "from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection\n\n\
             processor = CLIPImageProcessor.from_pretrained(\"FOLDER\")\n\
             model = CLIPVisionModelWithProjection.from_pretrained(\"FOLDER\").eval()\n\
             embeddings = model(**processor(images, return_tensors=\"pt\")).image_embeds\n\
             # CLIPVisionModel loads the folder too: the hidden states, without the projection.",
        ),
        Use::Transformers { with_text: true } => (
            "library_name: transformers\npipeline_tag: zero-shot-image-classification\ntags:\n- clip",
            "from transformers import CLIPImageProcessor, CLIPModel\n\n\
             processor = CLIPImageProcessor.from_pretrained(\"FOLDER\")\n\
             model = CLIPModel.from_pretrained(\"FOLDER\").eval()\n\
             features = model.get_image_features(**processor(images, return_tensors=\"pt\"))\n\
             # CLIPVisionModelWithProjection and CLIPVisionModel load the image tower of the folder alone.",
        ),
    };
    let outputs = match loaded.outputs {
        Outputs::Logits => "classes",
        Outputs::Embedding => "dimensions of the embedding",
    };
    let mut text = format!(
        "---\n{head}\n- adversarial-robustness\n---\n\n# {}\n\n\
         {}, {parameters:.1} M parameters, {} {outputs}. Exported by advxl, the open trainer for the method of \
         [AdvXL](https://arxiv.org/abs/2401.04727).\n\n",
        facts.name,
        architecture(loaded),
        loaded.model.classes()
    );
    text += match &facts.recipe {
        Some(_) => "Trained with the recipe at the end of this card.\n\n",
        None => "The training recipe is not available.\n\n",
    };
    for (what, value) in [
        ("Authors", &facts.authors),
        ("Description", &facts.link),
        ("Training data", &facts.dataset),
    ] {
        if !value.is_empty() {
            text += &format!("- {what}: {value}\n");
        }
    }
    text += &format!(
        "- Source weights: BLAKE3 hash `{}`\n\n## Usage\n\n```python\n{code}\n```\n\n\
         Preprocessing: {}; pixels in [0, 1], then normalization with mean {:?} and std {:?}. Attacks must perturb \
         pixels in [0, 1], before normalization.\n\n",
        loaded.hash,
        preprocessing.describe(),
        mean,
        std
    );
    match (&config, program) {
        (ModelConfig::Vit(vit), Use::Timm) if vit.norm_eps < NORM_EPS => {
            let eps = vit.norm_eps;
            text += &format!(
                "timm's layer norms use epsilon {NORM_EPS:e}, but this model was trained with {eps:e}, so its logits \
                 in timm differ by rounding.\n\n"
            );
        }
        _ => {}
    }
    text += "## Evaluation\n\n";
    text += &measured(facts);
    if let Some(recipe) = &facts.recipe {
        text += &format!("\n## Recipe\n\n```toml\n{}\n```\n", recipe.trim_end());
    }
    text
}

/// Returns the card's table of results.
pub(crate) fn measured(facts: &Facts) -> String {
    let evaluations = evaluations(&facts.results);
    if evaluations.is_empty() {
        return "No result of `advxl eval` was provided for this card.\n".to_owned();
    }
    let mut text =
        "| threat model | images | attack | accuracy | 95 % interval |\n|---|---|---|---|---|\n"
            .to_owned();
    for (_, result) in evaluations {
        for stage in stages(result) {
            let threat = match stage["attack"].as_str() {
                Some("clean") => "none".to_owned(),
                _ => format!(
                    "{} {}",
                    result["norm"].as_str().unwrap_or_default(),
                    result["epsilon"].as_str().unwrap_or_default()
                ),
            };
            let images = result["robust"]
                .as_array()
                .map(Vec::len)
                .unwrap_or_default();
            text += &format!(
                "| {threat} | {images} | {} | {} % | {} to {} % |\n",
                stage["attack"].as_str().unwrap_or_default(),
                percent(&stage["robust_accuracy"]),
                percent(&stage["interval_95"][0]),
                percent(&stage["interval_95"][1]),
            );
        }
        let bound = &result["bound"];
        if !bound.is_null() {
            let most =
                [&bound["points"], &bound["confidence"]].map(|n| n.as_f64().unwrap_or(f64::NAN));
            text += &format!(
                "\nThis is AutoAttack's fast version: the last attacks ran on a random sample of {} of {} images, and {}.\n\n",
                bound["sampled"],
                bound["of"],
                bound::text(most[0], most[1])
            );
        } else if !is_standard(result) {
            text += "\nThe attacks above are not the standard version of AutoAttack with its default settings.\n\n";
        }
        for flag in result["flags"].as_array().into_iter().flatten() {
            text += &format!("\nFlag `{}`: {}\n\n", flag["check"], flag["message"]);
        }
    }
    text += "\nAccuracy is the share of images still classified correctly after the attack of the row and all before \
             it in the same threat model. Robustness to other norms, larger perturbations, other images or adaptive \
             attacks was not measured and must not be assumed.\n";
    text
}

/// Returns an architecture name such as `ViT-B/16`, `ConvNeXt-L + ConvStem` or `ViT, width 768, depth 6, patch 16`.
pub(crate) fn architecture(loaded: &Loaded) -> String {
    let config = loaded.model.config();
    let named = ModelConfig::named(config.size());
    let text = match (&config, named) {
        (ModelConfig::Vit(vit), Some(ModelConfig::Vit(named)))
            if (vit.width, vit.depth, vit.patch) == (named.width, named.depth, named.patch) =>
        {
            let word = vit.size.trim_start_matches("vit_");
            let word = word.trim_end_matches(|letter: char| letter.is_ascii_digit());
            let word = match word {
                "ti" => "Ti".to_owned(),
                "g" => "g".to_owned(),
                word => word.to_uppercase(),
            };
            format!("ViT-{word}/{}", vit.patch)
        }
        (ModelConfig::Vit(vit), _) => format!(
            "ViT, width {}, depth {}, patch {}",
            vit.width, vit.depth, vit.patch
        ),
        (ModelConfig::ConvNext(convnext), Some(ModelConfig::ConvNext(named)))
            if (convnext.widths, convnext.depths) == (named.widths, named.depths) =>
        {
            let word = convnext.size.trim_start_matches("convnext_");
            let short = [("tiny", "T"), ("small", "S"), ("base", "B"), ("large", "L")];
            let short = short.iter().find(|(long, _)| *long == word);
            format!("ConvNeXt-{}", short.map_or(word, |(_, short)| short))
        }
        (ModelConfig::ConvNext(convnext), _) => format!(
            "ConvNeXt, widths {:?}, depths {:?}",
            convnext.widths, convnext.depths
        ),
    };
    match config.stem() {
        Stem::Patch => text,
        Stem::Conv => format!("{text} + ConvStem"),
    }
}

/// Returns the evaluations of all results, one per norm, each with the result that it is part of.
pub(crate) fn evaluations(results: &[Value]) -> Vec<(&Value, &Value)> {
    let mut found = Vec::new();
    for result in results {
        match result["evaluations"].as_array() {
            Some(several) => found.extend(several.iter().map(|evaluation| (result, evaluation))),
            None if !stages(result).is_empty() => found.push((result, result)),
            None => {}
        }
    }
    found
}

/// Returns whether an evaluation ran the standard version of AutoAttack with its default settings, as published numbers
/// do.
pub(crate) fn is_standard(evaluation: &Value) -> bool {
    let word = evaluation["norm"].as_str();
    let norm = word.and_then(Norm::from_word);
    let epsilon = evaluation["epsilon"]
        .as_str()
        .and_then(|text| text.parse().ok());
    let (Some(norm), Some(epsilon)) = (norm, epsilon) else {
        return false;
    };
    // The fast version has the same settings, but ran its last attacks on a sample.
    if !evaluation["bound"].is_null() {
        return false;
    }
    let attacks = Settings::new(Version::Standard, norm, epsilon).autoattack();
    let right = std::iter::once(Value::Null).chain(attacks.iter().map(|attack| json!(attack)));
    stages(evaluation)
        .iter()
        .map(|stage| stage["settings"].clone())
        .eq(right)
}

pub(crate) fn stages(result: &Value) -> &[Value] {
    result["stages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
}
