//! `advxl inspect`.

use serde_json::json;

use super::model::{NamedModel, check_image_size, named_sizes};
use super::preprocessing::parse_size;
use super::print::{print_json, print_line};
use super::shared::HeadSize;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, Stem};
use crate::weights::{Loaded, Outputs};

/// Inspect a model folder, a run, a weights file or a named model size such as vit_b16
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  advxl inspect runs/demo/robust\n  advxl inspect vit_h14 --image-size 336"
)]
pub(crate) struct Inspect {
    #[command(flatten)]
    what: NamedModel,
    /// Image size in pixels for counting multiply-adds [default: the model's, or 224 for a named size]
    #[arg(long, value_parser = parse_size)]
    image_size: Option<usize>,
    #[command(flatten)]
    head: HeadSize,
}

impl Inspect {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        let named = self.what.path.to_str().and_then(ModelConfig::named);
        let (config, classes, own_size, loaded) = match named {
            Some(config) if !self.what.path.exists() => (config, self.head.classes, 224, None),
            None if !self.what.path.exists() => {
                let name = self.what.path.display();
                let message = format!("`{name}` is neither an existing path nor a model size");
                return Err(Error::input(message).hint(named_sizes(&name.to_string())));
            }
            _ => {
                let loaded = self.what.load()?;
                let (config, classes) = (loaded.model.config(), loaded.model.classes());
                (config, classes, loaded.image_size, Some(loaded))
            }
        };
        let outputs = loaded
            .as_ref()
            .map_or(Outputs::Logits, |loaded| loaded.outputs);
        let image_size = self.image_size.unwrap_or(own_size);
        let grid = check_image_size(&config, image_size)?;
        let tokens = config.tokens(grid * grid);
        let parameters = config.parameters(classes, own_size);
        let macs = config.forward_macs(image_size, grid * grid);
        print_line(&format!(
            "{}: {:.1} M parameters, {classes} {}",
            config.size(),
            parameters as f64 / 1e6,
            match outputs {
                Outputs::Logits => "classes",
                Outputs::Embedding => "embedding dimensions",
            }
        ));
        print_line(&structure(&config));
        let tokens_text = match tokens {
            Some(tokens) => format!("{tokens} tokens, "),
            None => String::new(),
        };
        print_line(&format!(
            "{image_size} pixels: {tokens_text}{:.2} giga multiply-adds per forward pass",
            macs as f64 / 1e9
        ));
        if let Some(stated) = loaded.as_ref().map(|loaded| &loaded.preprocessing) {
            print_line(&match &stated.preprocessing {
                Ok(found) => format!(
                    "preprocessing: {} (from {})",
                    found.describe(),
                    stated.source
                ),
                Err(error) => format!("preprocessing: {error}"),
            });
        }
        let hash = loaded.map(|Loaded { hash, classes, .. }| {
            print_line(&format!("weights {hash}"));
            if !classes.is_empty() {
                print_line(&format!("classes {}", classes.join(", ")));
            }
            hash
        });
        if json {
            print_json(&json!({
                "model": config,
                "classes": classes,
                "outputs": outputs,
                "parameters": parameters,
                "image_size": image_size,
                "tokens": tokens,
                "forward_macs": macs,
                "hash": hash,
            }));
        }
        Ok(())
    }
}

/// Returns the structure of a model in one line.
fn structure(config: &ModelConfig) -> String {
    let stem = match config.stem() {
        Stem::Patch => "",
        Stem::Conv => ", convolutional stem",
    };
    match config {
        ModelConfig::Vit(vit) => format!(
            "width {}, depth {}, {} heads, hidden {}, patch {}, {:?} pooling, {}{}{stem}",
            vit.width,
            vit.depth,
            vit.heads,
            vit.hidden,
            vit.patch,
            vit.pool,
            if vit.class_token {
                "class token"
            } else {
                "no class token"
            },
            if vit.pre_norm {
                ", norm before the blocks"
            } else {
                ""
            },
        ),
        ModelConfig::ConvNext(convnext) => format!(
            "widths {:?}, depths {:?}, patch {}{stem}",
            convnext.widths, convnext.depths, convnext.patch
        ),
    }
}
