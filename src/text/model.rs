//! A text tower with its tokenizer.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};

use super::tokenizer::Tokenizer;
use super::tower::TextTower;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::ops::Stored;
use crate::weights::StateDict;
use crate::weights::embeddings::MadeBy;
use crate::weights::text::{OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, build, describe, hash};

/// A text tower and its tokenizer.
#[derive(Debug)]
pub struct TextModel {
    /// Token ids to embeddings.
    pub tower: TextTower,
    /// Captions to token ids.
    pub tokenizer: Tokenizer,
    /// Hash of all that makes an embedding: weights, configuration, tokenizer.
    pub hash: String,
}

impl TextModel {
    /// Reads a model folder: `open_clip_config.json` or Hugging Face's `config.json`, a file of weights (safetensors or
    /// PyTorch's) and the files of the tokenizer.
    ///
    /// Errors: files missing or damaged; tensors missing, left over or of the wrong shape; values not finite; settings
    /// of other models; a tokenizer with ids that the tower lacks.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let (config, tokenizer, file) = describe(folder)?;
        let tokenizer = Tokenizer::open(folder, tokenizer)?;
        if tokenizer.vocabulary() > config.vocabulary {
            let (ids, rows) = (tokenizer.vocabulary(), config.vocabulary);
            let message = format!(
                "`{}`: the tokenizer has {ids} tokens and the tower {rows}",
                folder.display()
            );
            return Err(Error::input(message).hint("the tokenizer belongs to another model"));
        }
        let weights = StateDict::open(&file)?;
        let tower = build(&weights, &config, device).context(|| format!("`{}`", file.display()))?;
        let hash = hash(&weights.hash()?, &config, &tokenizer)?;
        Ok(Self {
            tower,
            tokenizer,
            hash,
        })
    }

    /// The embeddings of captions, not normalised.
    ///
    /// Shapes: `[captions.len(), embedding]`.
    /// Errors: no captions.
    pub fn embed(&self, captions: &[String]) -> Result<Tensor<2>> {
        self.tower.encode(&self.tokenizer.rows(captions)?)
    }

    /// What files of embeddings say of the model that made them.
    pub fn made_by(&self) -> MadeBy {
        MadeBy {
            text_model: self.hash.clone(),
            context: self.tower.config().context,
        }
    }

    /// Writes a folder that [`Self::load`] reads: weights in open_clip's names, a configuration, the tokenizer's files.
    pub fn save(&self, folder: &Path) -> Result<()> {
        Self::save_parts(&self.tower, &self.tokenizer, folder)
    }

    /// The same for a tower and a tokenizer that are not together yet.
    pub fn save_parts(tower: &TextTower, tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
        files::make_folder(folder)?;
        tokenizer.copy_to(folder)?;
        let parameters = tower.parameters();
        let tensors = parameters.iter().map(|parameter| {
            let (values, shape) = (&parameter.value, &parameter.shape[..]);
            (parameter.name.clone(), Stored { values, shape })
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        files::write_tensors(&folder.join(OPEN_CLIP_WEIGHTS[0]), tensors, &metadata)?;
        let config = tower.config().to_open_clip(tokenizer.config());
        // Last, so that a folder with a configuration has its weights.
        let path = folder.join(OPEN_CLIP_CONFIG);
        files::write(&path, format!("{config:#}\n").as_bytes())
    }
}
