//! A run that is ready to start: recipe, folder and data, checked against each other.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use advxl_cuda::Gpu;

use super::checkpoint::Provenance;
use super::checks::{check, check_folder};
use super::folder::RunFolder;
use super::images::{StageImages, open_images};
use super::outputs::StageOutputs;
use super::phase::PhaseContext;
use super::references::Reference;
use super::state::{StageOptimizer, State};
use super::test_set::TestSet;
use super::{rates, references, start};
use crate::distributed::gpus::Gpus;
use crate::distributed::{Comm, Zero};
use crate::error::{Context, Result};
use crate::model::Model;
use crate::objective::captions::RunPaths;
use crate::objective::{Captions, ExtraParameters};
use crate::ops::{self, Device, Numerics, Precision};
use crate::plan::{self, DeviceEngine, Devices};
use crate::recipe::{ObjectiveKind, Recipe, Stage};
use crate::settings::changes;
use crate::weights::Outputs;

/// A run that is ready to start: a checked recipe, its folder and its data.
pub struct Run {
    /// The recipe.
    pub recipe: Recipe,
    /// The run folder.
    pub folder: RunFolder,
    /// The images of each stage.
    pub images: Vec<StageImages>,
    /// The text side of each stage that has one.
    pub captions: Vec<Option<Captions>>,
    /// What the model outputs in each stage.
    outputs: Vec<StageOutputs>,
    /// The frozen model of each stage whose objective compares with one.
    references: Vec<Reference>,
    /// The device to train on.
    pub device: Device,
    /// Precision of training: the recipe's, or f32 if the device is not faster with bf16.
    pub precision: Precision,
    /// Precision of the attack's passes in each stage.
    pub attack_numerics: Vec<Numerics>,
    /// Notice about the precision of attacks.
    pub(super) attack_notice: Option<&'static str>,
    /// The ranks of the run.
    pub comm: Comm,
    /// The ranks' GPUs, if they exchange gradients directly.
    gpus: Option<Gpus>,
    /// Notices of the checks, shown when the run starts.
    pub(super) notices: Vec<String>,
    /// Cached test images of each stage's evaluations.
    pub(super) test_images: RefCell<BTreeMap<usize, Rc<TestSet>>>,
    /// Names of broken test images that were already reported.
    pub(super) reported: RefCell<BTreeSet<String>>,
}

impl Run {
    /// Opens the data sets and the folder of a run.
    ///
    /// Errors: unusable data, or a folder that contains another run.
    pub fn open(
        recipe: Recipe,
        folder: &Path,
        accept_changes: bool,
        device: &Device,
        comm: &Comm,
    ) -> Result<Self> {
        let differs = |first: &str, other: &str| {
            format!(
                " (process 0 -> this process):\n\n  {}\n",
                changes(first, other).join("\n  ")
            )
        };
        comm.check_equal("recipe", &recipe.to_toml(), differs)?;
        Zero::new(comm, recipe.parallel)?;
        let open = || Self::open_here(recipe, folder, accept_changes, device, comm);
        // Rank 0 writes what the others read.
        let mut run = match comm.is_main() {
            true => {
                let run = comm.all_ok(open())?;
                comm.all_ok(Ok(()))?;
                run
            }
            false => {
                comm.all_ok(Ok(()))?;
                comm.all_ok(open())?
            }
        };
        if let (Some(gpu), true) = (device.gpu(), comm.world_size() > 1) {
            run.gpus = Gpus::join(comm, gpu, run.recipe.parallel.reduce)?;
            if run.gpus.is_none() {
                let notice = "processes share a GPU, so gradients are exchanged through the host";
                run.notices.push(notice.to_owned());
            }
        }
        Ok(run)
    }

    fn open_here(
        recipe: Recipe,
        folder: &Path,
        accept_changes: bool,
        device: &Device,
        comm: &Comm,
    ) -> Result<Self> {
        if comm.is_main() {
            check_folder(&recipe, folder)?;
        }
        recipe.model.check_device(device)?;
        for new in recipe
            .stage
            .iter()
            .filter_map(|stage| stage.text.as_ref()?.new.as_ref())
        {
            let head = new.width / new.heads.max(1);
            device.check_block("text.new", &[new.width, 4 * new.width], Some(head))?;
        }
        let (attack_numerics, attack_notice) = attack_numerics(&recipe, device)?;
        let images = open_images(&recipe)?;
        let folder = RunFolder::open(folder, &recipe.to_toml(), accept_changes, comm)?;
        let paths = RunPaths {
            folder: folder.path(),
            writes: folder.writes(),
            has_begun: folder.has_begun(),
        };
        let stages = recipe.stage.iter().zip(&images);
        let captions = stages.map(|(stage, images)| match &stage.text {
            None => Ok(None),
            Some(text) => {
                let classified = match stage.objective.uses_labels() {
                    true => &images.train,
                    false => &images.test,
                };
                let images = (&*images.train, &**classified);
                let is_trained = stage.objective.kind() == ObjectiveKind::Contrastive;
                Captions::open(&recipe, text, is_trained, images, &paths, device)
                    .map(Some)
                    .context(|| format!("stage `{}`", stage.name))
            }
        });
        let captions: Vec<_> = captions.collect::<Result<_>>()?;
        let (outputs, references) = references::of_stages(&recipe, &images, &captions, device)?;
        rates::check(&recipe)?;
        let notices = check(&recipe, &images, &captions, &outputs)?;
        Ok(Self {
            notices,
            test_images: RefCell::default(),
            reported: RefCell::default(),
            precision: ops::usable(recipe.precision, device).0,
            attack_numerics,
            attack_notice,
            recipe,
            folder,
            images,
            captions,
            outputs,
            references,
            device: device.clone(),
            comm: comm.clone(),
            gpus: None,
        })
    }

    /// Returns how optimizer state is partitioned over the ranks.
    pub fn zero(&self) -> Zero<'_> {
        let zero = Zero::new(&self.comm, self.recipe.parallel);
        let zero = zero.expect("checked when the run was opened");
        zero.with_gpus(self.gpus.as_ref())
    }

    /// Returns the number of model outputs in a stage: classes, or the dimension of an embedding.
    pub fn outputs(&self, stage: usize) -> usize {
        self.outputs[stage].count
    }

    /// Returns whether the model outputs logits of classes in a stage.
    pub(super) fn has_logits(&self, stage: usize) -> bool {
        self.outputs[stage].kind == Outputs::Logits
    }

    /// Returns the phases of all stages, in order.
    pub fn phases(&self) -> Vec<PhaseContext<'_>> {
        let (mut phases, mut end) = (Vec::new(), 0);
        for (number, stage) in self.recipe.stage.iter().enumerate() {
            let stage_start = end;
            for phase in &stage.phases {
                end += phase.samples;
                phases.push(PhaseContext {
                    recipe: &self.recipe,
                    number,
                    stage,
                    phase,
                    stage_start,
                    end,
                    dataset: &self.images[number].train,
                    captions: self.captions[number].as_ref(),
                    outputs: self.outputs[number].kind,
                    reference: self.references[number].as_deref(),
                    zero: self.zero(),
                    device: &self.device,
                    numerics: self.precision.into(),
                    attack_numerics: self.attack_numerics[number],
                });
            }
        }
        phases
    }

    /// Returns whether gradients and weights are exchanged directly between GPUs.
    pub(super) fn exchanges_on_gpus(&self) -> bool {
        self.gpus.is_some()
    }

    pub(super) fn stage_optimizer(&self, stage: usize) -> StageOptimizer<'_> {
        StageOptimizer {
            stage,
            config: &self.recipe.stage[stage].optimizer,
            average: self.recipe.average.as_ref(),
        }
    }

    pub(super) fn extra(&self, stage: usize) -> ExtraParameters {
        let kind = self.recipe.stage[stage].objective.kind();
        match &self.captions[stage] {
            Some(captions) if kind == ObjectiveKind::Contrastive => {
                captions.parameters(self.recipe.seed)
            }
            _ => ExtraParameters::default(),
        }
    }

    /// Sets the learning-rate factors of a stage's parameters.
    pub(super) fn set_rates(&self, stage: usize, model: &mut Model) {
        let stage = &self.recipe.stage[stage];
        let set = rates::set(model, &stage.train, &stage.optimizer);
        set.expect("checked when the run was opened");
    }

    fn state_of(&self, mut model: Model, stage: usize) -> State {
        let optimizer = self.stage_optimizer(stage);
        self.set_rates(stage, &mut model);
        State::new(model, self.extra(stage), optimizer, &self.zero())
    }

    /// Returns the initial state of the run: random weights, or the recipe's start weights.
    ///
    /// Errors: weights that cannot be loaded or have another architecture than the recipe's model.
    pub(super) fn initial_state(&self) -> Result<State> {
        let Some(start) = &self.recipe.start else {
            return Ok(self.blank_state(0));
        };
        let (classes, outputs) = (self.images[0].classes(), self.outputs[0]);
        let model = start::load(start, &self.recipe, classes, outputs, &self.device);
        let weights = start.weights.display();
        let model = model.context(|| format!("start weights `{weights}`"))?;
        Ok(self.state_of(model, 0))
    }

    /// Returns a state of a stage whose values are still to be filled in, such as from a checkpoint.
    pub(super) fn blank_state(&self, stage: usize) -> State {
        let (recipe, size) = (&self.recipe, self.recipe.first_image_size());
        let outputs = self.outputs(stage);
        let model = Model::new(&recipe.model, outputs, size, recipe.seed, &self.device);
        self.state_of(model, stage)
    }

    /// Returns the provenance of the run's current state.
    pub(super) fn provenance(&self, stage: usize) -> Provenance {
        let images = &self.images[stage];
        let classes = match self.has_logits(stage) {
            true => images.classes(),
            false => &[],
        };
        Provenance {
            data: images.train.fingerprint(),
            classes: Some(classes.to_vec()),
            algorithms: self.device.gpu().map(Gpu::algorithms),
        }
    }

    /// Returns a plan of the run, used for its memory.
    pub(super) fn plan(&self) -> plan::Plan {
        let recipe = &self.recipe;
        let devices = Devices {
            count: self.comm.world_size() as u64,
            tflops: 1.0,
            price: None,
            link: None,
            engine: DeviceEngine::of(&self.device),
        };
        let outputs = (0..recipe.stage.len()).map(|stage| self.outputs(stage));
        let outputs = outputs.max().unwrap_or_default();
        plan::Plan::new(recipe, outputs, self.precision, devices)
    }

    /// Checks memory. Returns a warning if the run needs nearly all of it.
    ///
    /// Errors: the run needs more memory than is free.
    pub(super) fn check_memory(&self) -> Result<Option<String>> {
        plan::check_memory(&self.plan(), plan::free_memory(&self.device))
    }
}

/// Returns the precision of each stage's attack, and a notice if the device uses another one than requested.
///
/// Errors: the device does not support the precision.
fn attack_numerics(
    recipe: &Recipe,
    device: &Device,
) -> Result<(Vec<Numerics>, Option<&'static str>)> {
    let mut notice = None;
    let of_stage = |stage: &Stage| {
        let requested = stage.attack.as_ref().and_then(|attack| attack.precision);
        let (numerics, why) = ops::usable_in_attacks(requested, recipe.precision, device)
            .map_err(|error| error.context(format!("stage `{}`", stage.name)))?;
        notice = notice.or(why);
        Ok(numerics)
    };
    let all: Result<_> = recipe.stage.iter().map(of_stage).collect();
    Ok((all?, notice))
}
