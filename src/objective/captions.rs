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

/// Captions that are embedded at a time.
const CHUNK: usize = 256;
/// Captions that a new vocabulary is made of, from the first.
const VOCABULARY_CAPTIONS: usize = 10_000;

/// The folder of a run, as the text side of its stages uses it.
pub struct RunPaths<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// Whether this rank writes there; the others find what it wrote.
    pub writes: bool,
    /// Whether training has begun there.
    pub has_begun: bool,
}

/// The text side of a stage that is trained on captions.
pub struct Captions {
    source: Source,
    file: Option<EmbeddingFile>,
    /// Dimensions of an embedding.
    pub width: usize,
    /// The test images' classes in words.
    zero_shot: ZeroShot,
    device: Device,
}

enum Source {
    /// Embeddings of captions alone.
    Nothing,
    /// A model that stands still; of an earlier stage it is read when it is needed, and then is there.
    Model {
        folder: PathBuf,
        read: OnceCell<Box<TextModel>>,
    },
    /// A model that learns: its tower is part of the run's state.
    New {
        tokenizer: Tokenizer,
        config: TextConfig,
    },
}

impl Captions {
    /// Opens what a stage's table `text` names.
    ///
    /// Errors: text models or embeddings that cannot be read or do not belong together, class names that are not one
    /// for each class.
    pub fn open(
        recipe: &Recipe,
        text: &Text,
        (train, test): (&Dataset, &Dataset),
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
                (Source::New { tokenizer, config }, new.embedding)
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
            classes: test.classes().to_vec(),
            templates: text.templates.clone(),
        };
        if let Some(path) = &text.classes {
            let named = ZeroShot::read(path, None)?.classes;
            let (names, classes) = (named.len(), zero_shot.classes.len());
            let path = format!("`{}`", path.display());
            if names != classes {
                let message = format!(
                    "text.classes {path} has {names} names, and there are {classes} classes"
                );
                return Err(
                    Error::input(message).hint("give one name for each class, in their order")
                );
            }
            let map = match_prompts(&named, &path, test.classes(), "the test images")?;
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
            device: device.clone(),
        })
    }

    /// What the stage trains besides the model, at its beginning: a new text tower has random weights.
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

    /// The contrastive loss of a batch: that of all ranks. `batch` is this rank's part, in shards that are embedded one by one.
    ///
    /// Errors: captions without an embedding.
    pub fn loss(
        &self,
        parameters: &ExtraParameters,
        dataset: &Dataset,
        batch: &Batch,
        shards: usize,
        comm: &Comm,
    ) -> Result<ContrastiveLoss> {
        let size = batch.samples.len() / shards;
        let rows = (0..shards).map(|shard| shard * size..(shard + 1) * size);
        let (texts, passes) = match (&self.source, &parameters.tower) {
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
        let scale = parameters.log_scale.as_ref();
        let scale = scale.expect("contrastive stages have one").value.clone();
        Ok(ContrastiveLoss::new(texts, scale, passes))
    }

    /// How many classes have names that the text model can embed.
    pub fn class_count(&self) -> usize {
        match self.source {
            Source::Nothing => 0,
            _ => self.zero_shot.classes.len(),
        }
    }

    /// Whether images can be classified by the names of their classes.
    pub fn classifies(&self) -> bool {
        self.class_count() > 0
    }

    /// Whether batches need their captions, or embeddings are read in their place.
    pub fn needs_captions(&self) -> bool {
        self.file.is_none()
    }

    /// The embeddings of some of a batch's captions by what stands still, of length 1.
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

    /// A head that classifies by text: the mean embedding of each class's sentences, of length 1.
    ///
    /// `tower` is the one that learns, if one does. None where there is no text model or no class.
    ///
    /// Shapes: `[classes, width]`.
    /// Source: Radford et al. 2021, section 3.1.4.
    pub fn class_head(&self, tower: Option<&TextTower>) -> Result<Option<Tensor<2>>> {
        if !self.classifies() {
            return Ok(None);
        }
        let head = self
            .zero_shot
            .head(|sentences| self.embed(sentences, tower))?;
        Ok(Some(head))
    }

    /// The head of class names at the end of a stage, from the text model that the run has saved if it is one that learned.
    ///
    /// Shapes: `[classes, width]`.
    /// Errors: there is no text model, or no class.
    pub fn final_head(&self, stage: &str, run: &Path) -> Result<Tensor<2>> {
        let saved = match self.source {
            Source::New { .. } => Some(TextModel::load(&folder_of(run, stage), &self.device)?),
            _ => None,
        };
        let head = self.class_head(saved.as_ref().map(|model| &model.tower))?;
        head.ok_or_else(|| {
            let message = format!("stage `{stage}` has no names of classes to compare images with");
            Error::input(message).hint("give text.classes, or test images that have classes")
        })
    }

    /// Embeddings of length 1.
    fn embed(&self, captions: &[String], tower: Option<&TextTower>) -> Result<Tensor<2>> {
        let (tower, tokenizer) = match (&self.source, tower) {
            (Source::New { tokenizer, .. }, Some(tower)) => (tower, tokenizer),
            (Source::Model { folder, read }, _) => {
                if read.get().is_none() {
                    // Nobody else sets it: a run is one thread's.
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

    /// Writes the text model of a stage that ends, if it learned, to where later stages look for it.
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
            "the embeddings have {} dimensions, and the text model {width}",
            file.width()
        );
        return Err(Error::input(message).hint("embed the captions with this text model"));
    }
    let by_key = file.has_keys() && dataset.key_of(0)?.is_some();
    if !by_key && file.len() != dataset.len() {
        let message = format!(
            "there are {} embeddings without keys for {} samples",
            file.len(),
            dataset.len()
        );
        return Err(Error::input(message)
            .hint("embed one caption for each sample, in their order, or give keys"));
    }
    match dataset.shards() {
        Some(shards) if by_key => check_keys(file, shards),
        _ => Ok(()),
    }
}

/// Holds that every sound sample has an embedding of its own. Takes some seconds for a million.
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
        "{} samples have the key `{twice}`, and would share one embedding: {}",
        same.len(),
        names.collect::<Vec<_>>().join(", ")
    );
    Err(Error::input(message).hint(
        "give samples of different shards different keys, or embed captions in the order of the samples, without keys",
    ))
}

/// Tokenizer and sizes of a new text model; the vocabulary is written once and read from then on.
fn new_model(new: &NewText, train: &Dataset, run: &RunPaths) -> Result<(Tokenizer, TextConfig)> {
    let folder = run.folder.join("vocabulary");
    let path = folder.join("vocab.txt");
    // In the folder of a run that never began it may be made of other captions.
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

/// WordPiece's special tokens, all characters, and the words of the first captions.
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
            // Damaged samples are for the loader to tell.
            caption => caption.ok().flatten().unwrap_or_default(),
        };
        let lower = caption.to_lowercase();
        let split = lower.split(|letter: char| !letter.is_alphanumeric());
        words.extend(split.filter(|word| !word.is_empty()).map(str::to_owned));
    }
    if words.is_empty() {
        let message = "the training images have no captions to make a vocabulary of";
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
