//! `advxl eval`.

use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use serde_json::json;

use super::device::device;
use super::inputs::{ChosenImages, inputs, open_data};
use super::memory::check_memory;
use super::model::{NamedClasses, NamedModel, check_image_size};
use super::preprocessing::{PreprocessingFlags, announce};
use super::print::{note, print_json};
use super::screen::Terminal;
use super::shared::TestRun;
use super::values::{one_of, usable_precision};
use crate::attack::unseen::{ALL, Corruption, Strength};
use crate::attack::{Attack, Norm, Unseen};
use crate::data::real::{self, RealLabels};
use crate::data::{Dataset, Split};
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::eval::autoattack::{Settings, Suite, Version};
use crate::eval::bound::{self, Sample};
use crate::eval::interval::wilson;
use crate::eval::result::{Findings, Subject, to_json, ua2};
use crate::eval::session::{Progress, conclude, examine, watch};
use crate::eval::{Classifier, Evaluation, Images, Setup, curve};
use crate::files;
use crate::ops::Precision;
use crate::output::Content;
use crate::plan::Work;
use crate::screen::Screen;
use crate::settings::{Words, nearest};
use crate::text::{TextModel, ZeroShot};
use crate::units::{Fraction, duration};
use crate::weights::{Loaded, Outputs};

/// Evaluate the accuracy of a model under attacks
///
/// Each attack runs only on the images that survived the attacks before it; an unseen attack is evaluated alone, on all
/// correctly classified images. Progress is saved after every batch: rerun the same command to resume.
#[derive(clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Examples:\n  advxl eval runs/demo/robust --data synthetic:1000 --attack clean,pgd --eps 8/255\n  \
    advxl eval runs/demo/robust --data synthetic:100 --attack autoattack --norm linf,l2,l1 --eps 8/255,0.5,12\n  \
    advxl eval runs/demo/robust --data synthetic:100 --attack ua --strength medium"
)]
pub(crate) struct Eval {
    #[command(flatten)]
    model: NamedModel,
    #[command(flatten)]
    test: TestRun,
    /// Attacks to run, in order: clean, pgd, apgd-ce, apgd-dlr, apgd-t, malt, pma, fab, fab-t, square, or autoattack for
    /// the attacks of --version. Unseen attacks, each evaluated alone: gabor, snow, pixel, jpeg, kaleidoscope, glitch, wood,
    /// elastic, or ua for all eight and their mean
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "clean,pgd"
    )]
    attack: Vec<String>,
    /// Norms that bound the perturbation, each evaluated separately [default: linf]
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        value_parser = one_of::<Norm>("norm")
    )]
    norm: Vec<Norm>,
    /// Largest perturbation in each norm of --norm, for pixels in [0, 1], such as 8/255
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    eps: Vec<String>,
    /// Strength of the unseen attacks [default: medium]
    #[arg(long, value_name = "NAME", value_parser = one_of::<Strength>("strength"))]
    strength: Option<Strength>,
    /// Version of AutoAttack
    #[arg(
        long,
        value_name = "NAME",
        default_value = "standard",
        value_parser = one_of::<Version>("version")
    )]
    version: Version,
    /// With --version fast: sample just enough images to show that standard would be at most POINTS percentage points
    /// lower (95 %), if none of them is fooled [default: 0.4]
    #[arg(long, value_name = "POINTS")]
    bound: Option<f64>,
    /// Step size of pgd [default: a quarter of eps, as in the paper's PGD-20]
    #[arg(long, value_name = "FRACTION")]
    step_size: Option<String>,
    /// Number of steps of pgd, apgd, fab and unseen attacks [default: 20 for pgd, 100 for apgd and fab, as published for
    /// unseen attacks]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Number of target classes of apgd-t, malt and fab-t [default: as in AutoAttack, 9, or 5 for apgd-t in l1]
    #[arg(long, value_name = "N")]
    targets: Option<u64>,
    /// Number of restarts of apgd and fab [default: as in AutoAttack]
    #[arg(long, value_name = "N")]
    restarts: Option<u64>,
    /// Number of queries of square [default: 5000]
    #[arg(long, value_name = "N")]
    queries: Option<u64>,
    /// Search in this precision: attacks iterate in it, every success is confirmed in f32, and so is the closest iterate
    /// of each image that survives [default: --precision]
    #[arg(long, value_name = "PRECISION", value_parser = one_of::<Precision>("precision"))]
    search_precision: Option<Precision>,
    /// Also evaluate robust accuracy from epsilon 0 to 8 times eps, where it must fall to about zero
    #[arg(long)]
    eps_curve: bool,
    /// Save the final adversarial images and labels to FILE, for `--data tensors:FILE`; several norms or unseen
    /// attacks get one file each
    #[arg(long, value_name = "FILE")]
    save_adversarial: Option<PathBuf>,
    #[command(flatten)]
    chosen: ChosenImages,
    #[command(flatten)]
    classes: NamedClasses,
    /// Predict only among the classes of the data set, as the protocols of ImageNet-A and -R do; by default predictions
    /// range over all classes of the model
    #[arg(long)]
    only_data_classes: bool,
    /// Also compute clean accuracy with ImageNet-ReaL's labels, from its real.json; with --attack clean only
    #[arg(long, value_name = "FILE")]
    real_labels: Option<PathBuf>,
    #[command(flatten)]
    preprocessing: PreprocessingFlags,
    /// Classify by text with the class names in FILE, one per line, for models trained with captions
    #[arg(long, value_name = "FILE", requires = "text")]
    zero_shot: Option<PathBuf>,
    /// Text model that embeds the class names of --zero-shot
    #[arg(long, value_name = "FOLDER", requires = "zero_shot")]
    text: Option<PathBuf>,
    /// File with prompt templates for --zero-shot, one per line, with {} for the class name [default: the name alone]
    #[arg(long, value_name = "FILE", requires = "zero_shot")]
    templates: Option<PathBuf>,
    /// Write result.json to this folder; required for a weights file [default: the model's folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Eval {
    pub(crate) fn run(&self, json: bool, comm: &Comm) -> Result<()> {
        let settings = self.settings()?;
        let out = self.folder()?;
        comm.all_ok(match comm.is_main() {
            true => self.check_outputs(&out),
            false => Ok(()),
        })?;
        let mut loaded = self.model.load()?;
        let zero_shot = self.class_head(&mut loaded)?;
        let dataset = open_data(&self.test.data, Split::Test, self.test.seed)?;
        let prompts = zero_shot.as_ref().map(|(prompts, _)| &prompts.classes[..]);
        let prompts = prompts.zip(self.zero_shot.as_deref());
        let map = self
            .classes
            .matched(&loaded, prompts, &dataset, &self.test.data)?;
        let (map, kept) = match self.only_data_classes {
            true => {
                let classes = dataset.classes().len();
                note(&format!(
                    "note: predictions range over the {classes} classes of the data"
                ));
                let (map, kept) = map.restricted(classes);
                (map, Some(kept))
            }
            false => (map, None),
        };
        let names = map.names(dataset.classes());
        let real = self.real_labels(&dataset)?;
        let labels = map.labels(dataset.classes().len());
        let subset = self.chosen.of(&dataset)?.mapped(map);
        let count = subset.len();
        let config = loaded.model.config();
        let (preprocessing, text) =
            self.preprocessing
                .over(&loaded.preprocessing, loaded.image_size, &dataset)?;
        check_image_size(&config, preprocessing.image_size)?;
        let threats = self.threats(&settings, preprocessing.image_size)?;
        let is_attacked = threats.iter().any(|threat| !threat.attacks.is_empty());
        let work = match is_attacked || self.eps_curve {
            true => Work::Attack,
            false => Work::Forward,
        };
        // All images at the end, both clean and adversarial.
        let saved = match self.save_adversarial {
            Some(_) => 3 * count * preprocessing.numbers(),
            None => 0,
        };
        check_memory(
            &loaded,
            &preprocessing,
            self.test.batch.min(count),
            work,
            saved,
        )?;
        announce(&text, Some(&config));
        let images = Images::Stored {
            dataset: &dataset,
            subset: &subset,
            preprocessing,
        };
        let precision = usable_precision(self.test.precision)?;
        let head = zero_shot.map(|(_, head)| head);
        let search = self.search(precision)?;
        let mut classifier = Classifier::new(loaded.model, head.clone(), precision)
            .named(&self.model.path.display().to_string(), &loaded.hash);
        if let Some(search) = search {
            classifier = classifier.searching(head, search);
        }
        if let Some(kept) = kept {
            classifier = classifier.restricted(kept);
        }
        let subject = classifier.subject(
            &self.test.data,
            &dataset,
            &subset,
            preprocessing,
            self.test.seed,
        )?;

        comm.stop_on_signals()?;
        let device = device()?;
        let mut screen = Terminal::new();
        let mut all = Vec::new();
        let mut finished = Vec::new();
        for threat in &threats {
            let one = OneThreat {
                eval: self,
                subject: &subject,
                classifier: &classifier,
                images: &images,
                names: &names,
                out: &out,
                count: threats.len(),
                setup: Setup {
                    batch: self.test.batch,
                    seed: self.test.seed,
                    device: &device,
                    comm,
                },
            };
            let (findings, progress) = one.evaluate(threat, &mut screen)?;
            all.push(findings);
            finished.extend(progress);
        }
        summary(&all, &mut screen);
        let mut result = to_json(&subject, &all);
        if let (Some(real), [clean]) = (real, &all[..]) {
            let predicted = clean.outcome.predicted.iter();
            let predicted = predicted.map(|class| labels.get(&(*class)?).copied());
            let found = real.accuracy(&dataset, &subset, &predicted.collect::<Vec<_>>())?;
            screen.line(&format!(
                "  ReaL      {:6.2} %  ({} of {} images with labels)",
                100.0 * found.accuracy,
                found.right,
                found.images
            ));
            result["real_labels"] = json!(found);
        }
        conclude(
            &out.join("result.json"),
            &result,
            &finished,
            &mut screen,
            comm,
        )?;
        drop(screen);
        if json {
            print_json(&result);
        }
        Ok(())
    }

    /// Returns the class names of --zero-shot and the head made of their embeddings. The head becomes part of the
    /// model's hash, since evaluations must treat it as a different model.
    fn class_head(&self, loaded: &mut Loaded) -> Result<Option<(ZeroShot, Tensor<2>)>> {
        let model = self.model.path.display();
        let outputs = loaded.model.classes();
        let (Some(classes), Some(text)) = (&self.zero_shot, &self.text) else {
            return match loaded.outputs {
                Outputs::Logits => Ok(None),
                Outputs::Embedding => Err(Error::input(format!(
                    "the {outputs} outputs of `{model}` are an embedding, not class logits"
                ))
                .hint("add --zero-shot CLASSES --text FOLDER to classify by text")),
            };
        };
        if loaded.outputs == Outputs::Logits {
            let message = format!(
                "--zero-shot requires embeddings, but the {outputs} outputs of `{model}` are class logits"
            );
            return Err(Error::input(message).hint(
                "remove --zero-shot and --text; if the model is an image tower, add \"advxl\": { \"outputs\": \
                 \"embedding\" } to its config.json",
            ));
        }
        let zero_shot = ZeroShot::read(classes, self.templates.as_deref())?;
        let text = TextModel::load(text, &device()?)?;
        let width = text.tower.config().embedding;
        if width != outputs {
            let message = format!(
                "the embedding size of the model is {outputs}, but that of the text model is {width}"
            );
            return Err(Error::input(message)
                .hint("use the text model whose caption embeddings the model was trained with"));
        }
        let identity = format!("{} {} {zero_shot:?}", loaded.hash, text.hash);
        loaded.hash = blake3::hash(identity.as_bytes()).to_string();
        let head = zero_shot.head_of(&text)?;
        Ok(Some((zero_shot, head)))
    }

    /// Reads the labels of --real-labels.
    fn real_labels(&self, dataset: &Dataset) -> Result<Option<RealLabels>> {
        let Some(path) = &self.real_labels else {
            return Ok(None);
        };
        if self.eps_curve || self.attack.iter().any(|name| name != "clean") {
            return Err(
                Error::input("--real-labels is for clean accuracy only").hint("add --attack clean")
            );
        }
        real::check(dataset)?;
        RealLabels::read(path).map(Some)
    }

    /// Returns the precision that attacks search in, if it differs from that of the verdicts.
    fn search(&self, precision: Precision) -> Result<Option<Precision>> {
        let Some(wanted) = self.search_precision else {
            return Ok(None);
        };
        if self.test.precision != Precision::F32 {
            let message = format!(
                "--search-precision confirms what attacks find in f32, but --precision is {}",
                self.test.precision.word()
            );
            return Err(Error::input(message).hint("remove --precision"));
        }
        let search = usable_precision(wanted)?;
        Ok((search != precision).then_some(search))
    }

    /// Returns an error if an output would replace an input. The result may be in the model's folder.
    fn check_outputs(&self, out: &Path) -> Result<()> {
        inputs(None, Some(&self.test.data))?.check_folder("--out", out)?;
        let mut inputs = inputs(Some(&self.model.path), Some(&self.test.data))?;
        for (flag, path) in [
            ("--zero-shot", &self.zero_shot),
            ("--text", &self.text),
            ("--templates", &self.templates),
            ("--real-labels", &self.real_labels),
        ] {
            path.iter().for_each(|path| inputs.add(flag, path));
        }
        let result = out.join("result.json");
        inputs.check_same("--out", &result)?;
        files::make_folder(out)?;
        files::try_writing(&result)?;
        let Some(path) = &self.save_adversarial else {
            return Ok(());
        };
        let (_, unseen) = self.names()?;
        let norms = self.norms()?;
        let norms = norms.iter().map(|norm| norm.word());
        let labels: Vec<&str> = norms.chain(unseen.iter().map(|name| name.word())).collect();
        labels.iter().try_for_each(|label| {
            let path = adversarial_path(path, label, labels.len());
            inputs.check_file("--save-adversarial", &path, Content::Tensors("images"))
        })
    }

    /// Returns the folder of the result.
    fn folder(&self) -> Result<PathBuf> {
        self.model.check_path()?;
        let model = &self.model.path;
        match &self.out {
            Some(out) => Ok(out.clone()),
            None if model.is_dir() => Ok(model.clone()),
            None => Err(Error::input("--out is missing")
                .hint("add --out DIR: a weights file has no folder for result.json")),
        }
    }

    /// Returns the names of the attacks that a norm bounds, and the unseen attacks.
    ///
    /// Errors: an unseen attack is given twice.
    fn names(&self) -> Result<(Vec<String>, Vec<Corruption>)> {
        let (mut bounded, mut unseen) = (Vec::new(), Vec::new());
        for name in &self.attack {
            let Some(corruptions) = Corruption::named(name) else {
                bounded.push(name.clone());
                continue;
            };
            for corruption in corruptions {
                if unseen.contains(&corruption) {
                    let word = corruption.word();
                    let error = Error::input(format!("--attack: `{word}` is given twice"));
                    return Err(error.hint(format!("`{ALL}` means all unseen attacks")));
                }
                unseen.push(corruption);
            }
        }
        Ok((bounded, unseen))
    }

    /// Returns the norms to evaluate: none if there are only unseen attacks.
    fn norms(&self) -> Result<Vec<Norm>> {
        let (bounded, unseen) = self.names()?;
        let is_bounded = self.eps_curve || bounded.iter().any(|name| name != "clean");
        let only = |flag: &str| {
            let message = format!("{flag} has no effect on unseen attacks");
            Err(Error::input(message).hint(format!(
                "remove {flag}: no norm bounds unseen attacks; --strength selects theirs"
            )))
        };
        match (is_bounded || unseen.is_empty(), &self.norm[..]) {
            (true, []) => Ok(vec![Norm::Linf]),
            (true, norms) => Ok(norms.to_vec()),
            (false, []) if self.eps.is_empty() && self.step_size.is_none() => Ok(Vec::new()),
            (false, []) if self.eps.is_empty() => only("--step-size"),
            (false, []) => only("--eps"),
            (false, _) => only("--norm"),
        }
    }

    /// Returns the evaluations: one per norm, then one per unseen attack.
    fn threats<'a>(&self, settings: &'a [Settings], image_size: usize) -> Result<Vec<Threat<'a>>> {
        let of_norm = |settings: &'a Settings| {
            let suite = self.suite(settings)?;
            Ok(Threat {
                label: settings.norm.word(),
                title: format!("{}, epsilon {}", settings.norm.word(), settings.epsilon),
                attacks: suite.attacks,
                sample: suite.sample,
                settings: Some(settings),
            })
        };
        let mut threats: Vec<Threat> = settings.iter().map(of_norm).collect::<Result<_>>()?;
        let strength = self.strength.unwrap_or(Strength::Medium);
        for corruption in self.names()?.1 {
            let mut attack = Unseen::new(corruption, strength, image_size);
            attack.steps = self.steps.unwrap_or(attack.steps);
            threats.push(Threat {
                label: attack.name(),
                title: unseen_title(&attack),
                attacks: vec![Attack::Unseen(attack)],
                sample: None,
                settings: None,
            });
        }
        Ok(threats)
    }

    /// Returns the settings of the attacks, one per norm.
    fn settings(&self) -> Result<Vec<Settings>> {
        // Check the names first: whether an epsilon is required depends on them.
        self.suite(&Settings::new(
            self.version,
            Norm::Linf,
            fraction("--eps", "0")?,
        ))?;
        self.check_bound()?;
        let (bounded, unseen) = self.names()?;
        if self.strength.is_some() && unseen.is_empty() {
            return Err(
                Error::input("--strength has no effect without unseen attacks")
                    .hint(format!("add one, such as --attack {ALL}, or use --eps")),
            );
        }
        let norms = self.norms()?;
        let is_attacked = self.eps_curve || bounded.iter().any(|name| name != "clean");
        if self.eps.is_empty() && is_attacked {
            let message = "--eps is missing";
            return Err(
                Error::input(message).hint("add the largest perturbation, such as --eps 8/255")
            );
        }
        if !self.eps.is_empty() && self.eps.len() != norms.len() {
            let (eps, norms) = (self.eps.len(), norms.len());
            let message = format!("--eps has {eps} values, but --norm has {norms}");
            return Err(Error::input(message)
                .hint("use one value per norm, as in --norm linf,l2,l1 --eps 8/255,0.5,12"));
        }
        let version = self.version;
        for (flag, value) in [
            ("--batch", Some(self.test.batch as u64)),
            ("--steps", self.steps),
            ("--targets", self.targets),
            ("--restarts", self.restarts),
            ("--queries", self.queries),
        ] {
            let expected = match value {
                Some(0) => "at least 1",
                Some(value) if value > LARGEST_COUNT => "at most 1000000000",
                _ => continue,
            };
            let value = value.unwrap_or_default();
            return Err(Error::input(format!(
                "{flag} must be {expected}, got {value}"
            )));
        }
        let step_size = self
            .step_size
            .as_ref()
            .map(|text| fraction("--step-size", text))
            .transpose()?;
        if step_size.as_ref().is_some_and(|size| size.value() == 0.0) {
            return Err(Error::input("--step-size must be above 0, got 0"));
        }
        let of_norm = |(index, norm): (usize, &Norm)| {
            let norm = *norm;
            let epsilon = fraction("--eps", self.eps.get(index).map_or("0", String::as_str))?;
            if norm == Norm::Linf && epsilon.value() > 1.0 {
                let message = format!("--eps {epsilon} is larger than the range of a pixel");
                return Err(Error::input(message).hint("pixels are in [0, 1]: use 8/255, not 8"));
            }
            Ok(Settings {
                step_size: step_size.clone(),
                steps: self.steps,
                targets: self.targets,
                restarts: self.restarts,
                queries: self.queries,
                bound: self.bound,
                ..Settings::new(version, norm, epsilon)
            })
        };
        let settings: Vec<Settings> = norms
            .iter()
            .enumerate()
            .map(of_norm)
            .collect::<Result<_>>()?;
        self.check_norms(&settings)?;
        Ok(settings)
    }

    /// Returns an error if two evaluations are the same or write the same file, or if a curve has a single point.
    fn check_norms(&self, settings: &[Settings]) -> Result<()> {
        for (index, one) in settings.iter().enumerate() {
            let (norm, epsilon) = (one.norm.word(), &one.epsilon);
            if self.eps_curve && epsilon.value() == 0.0 {
                let message = format!("--eps-curve with --eps {epsilon} has only one point");
                return Err(Error::input(message).hint("use an epsilon above 0, such as 8/255"));
            }
            let mut before = settings[..index]
                .iter()
                .filter(|other| other.norm == one.norm);
            if before
                .clone()
                .any(|other| other.epsilon.value() == epsilon.value())
            {
                let message = format!("--norm {norm} with --eps {epsilon} is given twice");
                return Err(Error::input(message));
            }
            if self.save_adversarial.is_some() && before.next().is_some() {
                let message = format!("--save-adversarial: --norm {norm} is given twice");
                return Err(Error::input(message)
                    .hint("both files would have the same name: run two evaluations instead"));
            }
        }
        Ok(())
    }

    /// Returns an error if --bound is out of range or has no effect.
    fn check_bound(&self) -> Result<()> {
        let Some(points) = self.bound else {
            return Ok(());
        };
        if self.version != Version::Fast {
            let message = "--bound requires --version fast";
            return Err(Error::input(message)
                .hint("add --version fast, which runs fab-t and square on a sample only"));
        }
        if !self.attack.iter().any(|name| name == "autoattack") {
            let message = "--bound has no effect without autoattack in --attack";
            return Err(Error::input(message).hint("use --attack autoattack, or remove --bound"));
        }
        if !(points > 0.0 && points <= 100.0) {
            let message = format!("--bound must be above 0 and at most 100, got {points}");
            return Err(
                Error::input(message).hint("it is a difference in percentage points, such as 0.4")
            );
        }
        Ok(())
    }

    fn suite(&self, settings: &Settings) -> Result<Suite> {
        if self.attack.iter().all(|name| name.trim().is_empty()) {
            return Err(Error::input("--attack is empty")
                .hint("use for example --attack clean,pgd or --attack autoattack"));
        }
        let suite = settings
            .named(&self.names()?.0)
            .map_err(|(unknown, hint)| {
                let words = Corruption::WORDS.iter().map(|(word, _)| *word);
                let words: Vec<&str> = words.chain([ALL]).collect();
                let hint = match nearest(&unknown, &words) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None if hint.starts_with("use") => format!("{hint}, {}", words.join(", ")),
                    None => hint,
                };
                Error::input(format!("--attack: unknown attack `{unknown}`")).hint(hint)
            })?;
        let sampled = settings.version.sampled();
        match &suite.sample {
            Some(sample) if suite.attacks.len() > sample.first + sampled.len() => {
                let next = suite.attacks[sample.first + sampled.len()].name();
                let message = format!(
                    "--attack: with --version fast, `{next}` after autoattack would run on a sample only"
                );
                Err(Error::input(message).hint("put autoattack last"))
            }
            _ => Ok(suite),
        }
    }
}

/// Limit for steps, restarts, targets and queries, far above any practical value.
const LARGEST_COUNT: u64 = 1_000_000_000;

fn fraction(flag: &str, text: &str) -> Result<Fraction> {
    let found = text
        .parse::<Fraction>()
        .map_err(|error| Error::input(format!("{flag}: {error}")))?;
    match found.value() >= 0.0 {
        true => Ok(found),
        false => Err(Error::input(format!(
            "{flag} must be at least 0, got {text}"
        ))),
    }
}

/// What one evaluation is about.
struct Threat<'a> {
    /// The norm, or the unseen attack.
    label: &'static str,
    /// The same with its size.
    title: String,
    attacks: Vec<Attack>,
    /// Restricts the last attacks to a sample.
    sample: Option<Sample>,
    /// The settings of a norm.
    settings: Option<&'a Settings>,
}

/// The evaluation of one threat.
struct OneThreat<'a> {
    eval: &'a Eval,
    subject: &'a Subject,
    classifier: &'a Classifier,
    images: &'a Images<'a>,
    /// Names of the labels, if they are known.
    names: &'a [String],
    out: &'a Path,
    setup: Setup<'a>,
    /// Number of evaluations.
    count: usize,
}

impl<'a> OneThreat<'a> {
    /// Returns the findings, and the progress files to remove once they are saved.
    fn evaluate(
        &self,
        threat: &Threat,
        screen: &mut Terminal,
    ) -> Result<(Findings, Vec<Progress<'a>>)> {
        let (attacks, sample) = (&threat.attacks, threat.sample);
        if !attacks.is_empty() {
            let names: Vec<String> = attacks.iter().map(Attack::name).collect();
            let (all, sampled) = names.split_at(sample.map_or(names.len(), |sample| sample.first));
            let mut line = match threat.settings {
                Some(_) => format!("{}: {}", threat.title, all.join(", ")),
                None => threat.title.clone(),
            };
            if sample.is_some() {
                let sampled = sampled.join(", ");
                line += &format!(", then on a sample {sampled} (autoattack fast)");
            }
            screen.line(&line);
        }
        let keep_images = self.eval.save_adversarial.is_some();
        let progress = self.progress(attacks, sample.as_ref(), keep_images);
        let evaluation = Evaluation {
            sample,
            ..self.evaluation(attacks)
        };
        let mut findings = examine(&evaluation, &progress, screen)?;
        if let Some(path) = &self.eval.save_adversarial {
            let path = adversarial_path(path, threat.label, self.count);
            progress.save_adversarial(self.images, self.names, &path, self.setup.device)?;
        }
        let mut finished = vec![progress];
        if let Some(settings) = threat.settings.filter(|_| self.eval.eps_curve) {
            screen.line(&format!("{} at increasing epsilon", settings.norm.word()));
            let attacks = curve::attacks(settings);
            let progress = self.progress(&attacks, None, false);
            let outcome = watch(&self.evaluation(&attacks), &progress, screen)?;
            finished.push(progress);
            let points = curve::points(&outcome, &attacks);
            if let Some(flag) = curve::check(&points) {
                screen.line(&flag.to_string());
                findings.flags.push(flag);
            }
            findings.curve = Some(points);
        }
        Ok((findings, finished))
    }

    fn progress(
        &self,
        attacks: &[Attack],
        sample: Option<&Sample>,
        keep_images: bool,
    ) -> Progress<'a> {
        Progress::new(
            self.out,
            &self.subject.fingerprint(attacks, sample),
            keep_images,
            self.setup.comm,
        )
    }

    fn evaluation<'b>(&'b self, attacks: &'b [Attack]) -> Evaluation<'b> {
        self.classifier.evaluation(self.images, attacks, self.setup)
    }
}

/// Returns the corruption, the strength, and what bounds the parameters.
fn unseen_title(attack: &Unseen) -> String {
    format!(
        "{}, strength {} ({} norm of the parameters at most {})",
        attack.name(),
        attack.strength.word(),
        attack.parameter_norm.word(),
        attack.parameter_epsilon
    )
}

/// Returns the file of the adversarial images of one of `count` evaluations: `DIR/NAME-linf.safetensors` for
/// `DIR/NAME.safetensors` if there are several.
fn adversarial_path(path: &Path, label: &str, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = format!("{stem}-{label}");
    match path.extension() {
        Some(extension) => path.with_file_name(name).with_extension(extension),
        None => path.with_file_name(name),
    }
}

/// Prints a table of the accuracy after each attack.
fn summary(all: &[Findings], screen: &mut Terminal) {
    screen.line("");
    for found in all {
        let outcome = &found.outcome;
        let count = outcome.robust.len();
        let bounded = found.attacks.first();
        let bounded = bounded.and_then(|attack| attack.norm().zip(attack.epsilon()));
        if let Some((norm, epsilon)) = bounded {
            screen.line(&format!("{}, epsilon {epsilon}", norm.word()));
        }
        if let Some(attack) = found.unseen() {
            screen.line(&unseen_title(attack));
        }
        // As wide as `apgd-dlr` at least.
        let names = outcome.stages.iter().map(|stage| stage.attack.len());
        let width = names.fold(9, usize::max);
        for (index, stage) in outcome.stages.iter().enumerate() {
            let (low, high) = wilson(stage.robust_count, count);
            let sampled = match found.sample {
                Some(sample) if index > sample.first => {
                    format!(", sample of {}", stage.tried)
                }
                _ => String::new(),
            };
            screen.line(&format!(
                "  {:<width$} {:6.2} %  (95 %: {:.1} to {:.1}, {} of {count} images, {}{sampled})",
                stage.attack,
                100.0 * outcome.accuracy_after(index),
                100.0 * low,
                100.0 * high,
                stage.robust_count,
                duration(stage.seconds),
            ));
        }
        if let Some(bound) = outcome.bound() {
            let share = 100.0 * outcome.standing() as f64 / count.max(1) as f64;
            let bound = bound.text();
            screen.line(&format!("  autoattack fast: robust {share:.1} %; {bound}"));
        }
        for point in found.curve.iter().flatten() {
            let bar = "#".repeat((40.0 * point.robust_accuracy).round() as usize);
            let (epsilon, share) = (point.value, 100.0 * point.robust_accuracy);
            screen.line(&format!("  epsilon {epsilon:<8.5} {share:6.2} %  {bar}"));
        }
    }
    if all.len() > 1 {
        let count = all[0].outcome.robust.len();
        let is_robust = |index: &usize| all.iter().all(|found| found.outcome.robust[*index]);
        let robust = (0..count).filter(is_robust).count();
        let share = 100.0 * robust as f64 / count.max(1) as f64;
        let all_of_them = match all.iter().any(|found| found.unseen().is_some()) {
            true => "evaluations",
            false => "norms",
        };
        let mut line =
            format!("robust under all {all_of_them}: {share:.2} % ({robust} of {count} images)");
        let bounds = all.iter().filter_map(|found| found.outcome.bound());
        if bounds.clone().next().is_some() {
            let (points, confidence) = bound::joint(bounds);
            line += &format!("; {}", bound::text(points, confidence));
        }
        screen.line(&line);
    }
    if let Some(mean) = ua2(all) {
        let mean = 100.0 * mean;
        screen.line(&format!("mean over the unseen attacks (UA2): {mean:.2} %"));
    }
}
