//! The text side of stages with a contrastive loss: embeddings of captions and of class names.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use super::contrastive::{ContrastiveLoss, TowerPasses};
use super::gradients::gather_rows;
use super::parameters::ExtraParameters;
use crate::data::shards::Shards;
use crate::data::{Batch, Dataset, Part, match_prompts};
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::loss::unit_length;
use crate::ops::{Device, Gelu, from_vec, join};
use crate::recipe::{NewText, Recipe, Text};
use crate::storage::store::Ahead;
use crate::text::{
    Cleaning, TextConfig, TextModel, TextPool, TextTower, Tokenizer, TokenizerConfig, ZeroShot,
};
use crate::weights::EmbeddingFile;
use crate::weights::embeddings::plain_key;

/// Number of captions embedded at a time.
const CHUNK: usize = 256;
/// Number of captions, from the first, that a new vocabulary is built from.
const VOCABULARY_CAPTIONS: usize = 10_000;

/// The run folder, as used by the text side of stages.
pub struct RunPaths<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// Whether this rank writes to the folder; the other ranks read what it wrote.
    pub writes: bool,
    /// Whether training has started in the folder.
    pub has_begun: bool,
}

/// The text side of a stage that trains on captions.
pub struct Captions {
    source: Source,
    file: Option<EmbeddingFile>,
    /// Dimension of an embedding.
    pub width: usize,
    /// Class names of the test images, with prompt templates.
    zero_shot: ZeroShot,
    /// The head of a frozen text model, after its first use.
    head: OnceCell<Tensor<2>>,
    device: Device,
}

enum Source {
    /// No text model: only precomputed caption embeddings.
    Nothing,
    /// A frozen model. The model of an earlier stage is loaded when it is first needed, since the stage must save it
    /// first.
    Model {
        folder: PathBuf,
        read: OnceCell<Box<TextModel>>,
    },
    /// A trainable model, whose tower is part of the run's state.
    New {
        tokenizer: Tokenizer,
        config: TextConfig,
    },
}

impl Captions {
    /// Opens the models and files in a stage's table `text`.
    ///
    /// `is_trained`: whether the stage trains a `new` text model. Otherwise a `new` one stands in for a missing model in
    /// a dry run, with random weights.
    ///
    /// `train` has the captions. Class names are those of `classified`: of the test images, or of the training images if
    /// the objective compares these with them.
    ///
    /// Errors: text models or embeddings that cannot be read or do not match, or a wrong number of class names.
    pub fn open(
        recipe: &Recipe,
        text: &Text,
        is_trained: bool,
        (train, classified): (&Dataset, &Dataset),
        run: &RunPaths,
        device: &Device,
    ) -> Result<Self> {
        let file = match &text.embeddings {
            Some(path) => Some(EmbeddingFile::open(path)?),
            None => None,
        };
        let model = |folder: &Path| {
            let model = TextModel::load(folder, device)?;
            let width = model.tower.config().embedding;
            Ok::<_, Error>((Box::new(model), width))
        };
        let (source, width) = match (&text.model, &text.from, &text.new) {
            (Some(folder), ..) => {
                let (model, width) = model(folder)?;
                let read = OnceCell::from(model);
                let folder = folder.clone();
                (Source::Model { folder, read }, width)
            }
            (None, Some(name), _) => {
                let new = new_text_of(recipe, name);
                let folder = folder_of(run.folder, name);
                let read = OnceCell::new();
                (Source::Model { folder, read }, new.embedding)
            }
            (None, None, Some(new)) => {
                let (tokenizer, config) = new_model(new, train, run)?;
                let source = match is_trained {
                    true => Source::New { tokenizer, config },
                    false => {
                        let tower = TextTower::new(&config, recipe.seed, device);
                        let tower = tower.expect("the recipe's sizes were checked");
                        let read = OnceCell::from(Box::new(TextModel {
                            tower,
                            tokenizer,
                            hash: String::new(),
                        }));
                        let folder = PathBuf::new();
                        Source::Model { folder, read }
                    }
                };
                (source, new.embedding)
            }
            (None, None, None) => {
                let file = file.as_ref().expect("recipes are checked");
                (Source::Nothing, file.width())
            }
        };
        if let Some(file) = &file {
            check_file(file, width, train)?;
            if let Source::Model { read, .. } = &source
                && let Some(model) = read.get()
            {
                file.check(&model.made_by())?;
            }
        }
        let mut zero_shot = ZeroShot {
            classes: classified.classes().to_vec(),
            templates: text.templates.clone(),
        };
        if let Some(path) = &text.classes {
            let named = ZeroShot::read(path, None)?.classes;
            let (names, classes) = (named.len(), zero_shot.classes.len());
            let path = format!("`{}`", path.display());
            if names != classes {
                let message = format!(
                    "text.classes {path} has {names} names, but there are {classes} classes"
                );
                return Err(Error::input(message)
                    .hint("list one name per class, in the order of the classes"));
            }
            let map = match_prompts(&named, &path, classified.classes(), "the images")?;
            let labels = 0..classes as u32;
            zero_shot.classes = labels
                .map(|label| named[map.class_of(label) as usize].clone())
                .collect();
        }
        Ok(Self {
            source,
            file,
            width,
            zero_shot,
            head: OnceCell::new(),
            device: device.clone(),
        })
    }

    /// Returns the stage's initial additional parameters. A new text tower has random weights.
    pub fn parameters(&self, seed: u64) -> ExtraParameters {
        let tower = match &self.source {
            Source::New { config, .. } => {
                let tower = TextTower::new(config, seed, &self.device);
                Some(tower.expect("the recipe's sizes were checked"))
            }
            _ => None,
        };
        ExtraParameters::contrastive(tower, &self.device)
    }

    /// Returns the contrastive loss of a batch over all ranks. `batch` is this rank's part, whose shards are embedded
    /// one by one.
    ///
    /// `tower` is the trainable text tower, if there is one. Shapes: `log_scale` `[1]`.
    /// Errors: captions without an embedding.
    pub fn loss(
        &self,
        tower: Option<&TextTower>,
        log_scale: Tensor<1>,
        dataset: &Dataset,
        batch: &Batch,
        shards: usize,
        comm: &Comm,
    ) -> Result<ContrastiveLoss> {
        let size = batch.samples.len() / shards;
        let rows = (0..shards).map(|shard| shard * size..(shard + 1) * size);
        let (texts, passes) = match (&self.source, tower) {
            (Source::New { tokenizer, .. }, Some(tower)) => {
                let passes = rows.map(|rows| {
                    let tower = tower.tracked();
                    let ids = tokenizer.rows(&batch.captions[rows])?;
                    let embeddings = unit_length(tower.encode(&ids)?);
                    Ok((tower, embeddings))
                });
                let passes: Vec<_> = passes.collect::<Result<_>>()?;
                let texts = passes
                    .iter()
                    .map(|(_, texts)| texts.clone().without_autodiff());
                (texts.collect(), Some(TowerPasses(passes)))
            }
            _ => {
                let texts = rows.map(|rows| self.embeddings(dataset, batch, rows));
                (texts.collect::<Result<Vec<_>>>()?, None)
            }
        };
        let texts = gather_rows(comm, join(texts));
        Ok(ContrastiveLoss::new(texts, log_scale, passes))
    }

    /// Returns the number of classes whose names the text model can embed.
    pub fn class_count(&self) -> usize {
        match self.source {
            Source::Nothing => 0,
            _ => self.zero_shot.classes.len(),
        }
    }

    /// Returns whether images can be classified zero-shot, by class names.
    pub fn classifies(&self) -> bool {
        self.class_count() > 0
    }

    /// Returns whether batches need captions, rather than precomputed embeddings.
    pub fn needs_captions(&self) -> bool {
        self.file.is_none()
    }

    /// Returns the embeddings of some of a batch's captions from a frozen source, normalized to length 1.
    ///
    /// Shapes: `[rows, width]`.
    fn embeddings(
        &self,
        dataset: &Dataset,
        batch: &Batch,
        rows: Range<usize>,
    ) -> Result<Tensor<2>> {
        let Some(file) = &self.file else {
            return self.embed(&batch.captions[rows], None);
        };
        let row = |sample: &u64| {
            let index = *sample as usize;
            let key = match file.has_keys() {
                true => dataset.key_of(index)?,
                false => None,
            };
            match key {
                Some(key) => file.row_of(&key),
                None => Ok(index),
            }
        };
        let rows: Vec<usize> = batch.samples[rows].iter().map(row).collect::<Result<_>>()?;
        let values = file.rows(&rows)?;
        let shape = [rows.len(), self.width];
        Ok(unit_length(from_vec(values, shape, &self.device)))
    }

    /// Returns a zero-shot head: the mean embedding of each class's prompts, normalized to length 1.
    ///
    /// `tower` is the trainable text tower, if there is one. `None` if there is no text model or no class.
    ///
    /// Shapes: `[classes, width]`.
    /// Source: Radford et al. 2021, section 3.1.4.
    pub fn class_head(&self, tower: Option<&TextTower>) -> Result<Option<Tensor<2>>> {
        if !self.classifies() {
            return Ok(None);
        }
        if let Some(head) = self.head.get() {
            return Ok(Some(head.clone()));
        }
        let head = self
            .zero_shot
            .head(|sentences| self.embed(sentences, tower))?;
        if tower.is_none() {
            let _ = self.head.set(head.clone());
        }
        Ok(Some(head))
    }

    /// Returns the zero-shot head at the end of a stage. A trained text model is loaded from the run folder.
    ///
    /// Shapes: `[classes, width]`.
    /// Errors: there is no text model or no class.
    pub fn final_head(&self, stage: &str, run: &Path) -> Result<Tensor<2>> {
        let saved = match self.source {
            Source::New { .. } => Some(TextModel::load(&folder_of(run, stage), &self.device)?),
            _ => None,
        };
        let head = self.class_head(saved.as_ref().map(|model| &model.tower))?;
        head.ok_or_else(|| {
            let message = format!("stage `{stage}` has no class names to classify images by");
            Error::input(message).hint("set text.classes, or use test images that have classes")
        })
    }

    /// Embeds captions, normalized to length 1.
    fn embed(&self, captions: &[String], tower: Option<&TextTower>) -> Result<Tensor<2>> {
        let (tower, tokenizer) = match (&self.source, tower) {
            (Source::New { tokenizer, .. }, Some(tower)) => (tower, tokenizer),
            (Source::Model { folder, read }, _) => {
                if read.get().is_none() {
                    // No race: a run is single-threaded.
                    let _ = read.set(Box::new(TextModel::load(folder, &self.device)?));
                }
                let model = read.get().expect("just set");
                (&model.tower, &model.tokenizer)
            }
            _ => {
                return Err(Error::failed(
                    "there is no text model to embed captions with",
                ));
            }
        };
        let parts = captions.chunks(CHUNK).map(|part| {
            let embeddings = tower.encode(&tokenizer.rows(part)?)?;
            Ok(unit_length(embeddings))
        });
        Ok(join(parts.collect::<Result<_>>()?))
    }

    /// Saves the text model of a stage that ends, if it was trained, to the folder where later stages look for it.
    pub fn save(&self, tower: Option<TextTower>, stage: &str, run: &Path) -> Result<()> {
        let (Source::New { tokenizer, .. }, Some(tower)) = (&self.source, tower) else {
            return Ok(());
        };
        TextModel::save_parts(&tower, tokenizer, &folder_of(run, stage))
    }
}

fn folder_of(run: &Path, stage: &str) -> PathBuf {
    run.join("stages").join(stage).join("text")
}

fn new_text_of(recipe: &Recipe, name: &str) -> NewText {
    let stage = recipe.stage.iter().find(|stage| stage.name == name);
    let text = stage.and_then(|stage| stage.text.as_ref());
    text.and_then(|text| text.new).expect("recipes are checked")
}

fn check_file(file: &EmbeddingFile, width: usize, dataset: &Dataset) -> Result<()> {
    if file.width() != width {
        let message = format!(
            "the embeddings have {} dimensions, but the text model has {width}",
            file.width()
        );
        return Err(Error::input(message).hint("embed the captions with this text model"));
    }
    let by_key = file.has_keys() && dataset.key_of(0)?.is_some();
    if !by_key && file.len() != dataset.len() {
        let message = format!(
            "expected one embedding per sample, got {} embeddings without keys for {} samples",
            file.len(),
            dataset.len()
        );
        return Err(Error::input(message)
            .hint("embed one caption per sample, in the order of the samples, or use keys"));
    }
    match dataset.shards() {
        Some(shards) if by_key => check_keys(file, shards),
        _ => Ok(()),
    }
}

/// Checks that every intact sample has its own embedding. Takes a few seconds for a million samples.
fn check_keys(file: &EmbeddingFile, shards: &Shards) -> Result<()> {
    let used: Vec<AtomicU64> = (0..file.len().div_ceil(64))
        .map(|_| AtomicU64::new(0))
        .collect();
    let twice = Mutex::new(None);
    shards.each_key(|_, key| {
        let row = file.row_of(key)?;
        let bit = 1 << (row % 64);
        if used[row / 64].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            *twice.lock().unwrap_or_else(PoisonError::into_inner) = Some(key.to_owned());
        }
        Ok(())
    })?;
    let Some(twice) = twice.into_inner().unwrap_or_else(PoisonError::into_inner) else {
        return Ok(());
    };
    let same = Mutex::new(Vec::new());
    shards.each_key(|sample, key| {
        if plain_key(key.as_bytes()) == plain_key(twice.as_bytes()) {
            same.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(sample);
        }
        Ok(())
    })?;
    let mut same = same.into_inner().unwrap_or_else(PoisonError::into_inner);
    same.sort_unstable();
    let names = same
        .iter()
        .take(2)
        .map(|sample| format!("`{}`", shards.name_of(*sample)));
    let message = format!(
        "{} samples have the same key `{twice}` and would share one embedding: {}",
        same.len(),
        names.collect::<Vec<_>>().join(", ")
    );
    Err(Error::input(message).hint(
        "use unique keys across shards, or embed captions in the order of the samples, without keys",
    ))
}

/// Returns tokenizer and sizes of a new text model. The vocabulary is built once, and read from the run folder
/// afterwards.
fn new_model(new: &NewText, train: &Dataset, run: &RunPaths) -> Result<(Tokenizer, TextConfig)> {
    let folder = run.folder.join("vocabulary");
    let path = folder.join("vocab.txt");
    // If the run never started, an existing vocabulary may come from other captions.
    if run.writes && (!path.is_file() || !run.has_begun) {
        files::make_folder(&folder)?;
        let words = vocabulary(train)?;
        files::write(&path, (words.join("\n") + "\n").as_bytes())?;
    }
    let config = TokenizerConfig {
        name: Some("bert-base-uncased".to_owned()),
        context: new.context,
        cleaning: Cleaning::Whitespace,
        strip_separator: true,
    };
    let tokenizer = Tokenizer::open(&folder, config)?;
    let config = TextConfig {
        context: new.context,
        vocabulary: tokenizer.vocabulary(),
        width: new.width,
        heads: new.heads,
        depth: new.depth,
        hidden: 4 * new.width,
        embedding: new.embedding,
        causal: false,
        pool: TextPool::Last,
        gelu: Gelu::Tanh,
        eps: 1e-5,
    };
    Ok((tokenizer, config.checked()?))
}

/// Builds a vocabulary: WordPiece's special tokens, and all characters and words of the first captions.
fn vocabulary(dataset: &Dataset) -> Result<Vec<String>> {
    let mut words = BTreeSet::new();
    let count = dataset.len().min(VOCABULARY_CAPTIONS);
    let ahead = Ahead::new(count as u64);
    for index in 0..count {
        ahead.ask(index as u64..index as u64 + 1, |soon| {
            dataset.ask(soon as usize, Part::Caption);
        });
        let caption = match dataset.caption(index) {
            Err(fault) if fault.outage => return Err(fault.error),
            // The loader reports damaged samples.
            caption => caption.ok().flatten().unwrap_or_default(),
        };
        let lower = caption.to_lowercase();
        let split = lower.split(|letter: char| !letter.is_alphanumeric());
        words.extend(split.filter(|word| !word.is_empty()).map(str::to_owned));
    }
    if words.is_empty() {
        let message = "the training images have no captions to build a vocabulary from";
        return Err(
            Error::input(message).hint("use images with captions, such as `shards:data/*.tar`")
        );
    }
    let letters: BTreeSet<char> = words.iter().flat_map(|word| word.chars()).collect();
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
    let single = letters
        .iter()
        .flat_map(|letter| [letter.to_string(), format!("##{letter}")]);
    let mut all: Vec<String> = special.into_iter().chain(single).collect();
    all.extend(words.into_iter().filter(|word| word.chars().count() > 1));
    Ok(all)
}
