//! The evaluations of a run: of those test images that can be read, and while it trains never a reason to stop.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use super::monitor::Monitor;
use super::state::State;
use super::{Run, monitor};
use crate::attack::{Attack, Pgd};
use crate::data::check::broken_among;
use crate::data::{Broken, Subset};
use crate::error::{Error, Kind, Result};
use crate::eval::{Done, Evaluation, Images, Observer, Outcome};
use crate::image::Preprocessing;
use crate::model::Pass;
use crate::recipe::{Phase, Stage, TestImages};
use crate::text::zero_shot::by_text;

/// The test images of a stage that an evaluation uses: those that can be read, and those that cannot.
#[derive(Debug)]
pub(crate) struct Readable {
    pub subset: Subset,
    pub broken: Vec<Broken>,
}

impl Readable {
    /// The test images of a stage that an evaluation asks for, each of which is read once.
    ///
    /// Errors: those of stores.
    pub(crate) fn choose(run: &Run, stage: usize, wanted: &TestImages) -> Result<Self> {
        let (dataset, group) = (&run.images[stage].test, &run.exchange.group);
        let subset = run.images[stage].subset(wanted)?;
        let own = broken_among(dataset, &subset.places()[group.part(subset.len())]);
        let broken: Vec<Broken> = group.gather(group.agree(own)?).concat();
        let subset =
            subset.without(|place| broken.iter().any(|broken| broken.sample == place as u64));
        Ok(Self { subset, broken })
    }

    /// An error where more are broken than the stage's data allows.
    pub(crate) fn check_rate(&self, run: &Run, stage: usize) -> Result<()> {
        let Some(first) = self.broken.first() else {
            return Ok(());
        };
        let allowed = run.recipe.data_of(&run.recipe.stage[stage]).broken_rate;
        let (broken, all) = (self.broken.len(), self.broken.len() + self.subset.len());
        let message = match allowed {
            Some(rate) if broken as f64 <= rate * all as f64 => return Ok(()),
            Some(rate) => format!(
                "{broken} of {all} test images are broken, above data.broken_rate = {rate}; the first is {first}"
            ),
            None => format!("{broken} of {all} test images are broken; the first is {first}"),
        };
        Err(Error::input(message)
            .hint("repair or remove them (`advxl data check` lists all), or set a higher data.broken_rate: they are left out then"))
    }
}

/// Evaluates the model as the recipe says: clean accuracy and accuracy under the evaluation's attack and under the stage's
/// own. What makes that impossible is told, and training goes on.
///
/// Errors: a signal to stop, a store that does not answer.
pub(crate) fn measure(run: &Run, state: &State, monitor: &mut Monitor) -> Result<()> {
    let place = run.recipe.update_at(state.samples);
    let (stage, phase, _) = place.expect("updates belong to a phase");
    match measured(run, state, stage, phase, monitor) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == Kind::TryAgain => Err(error),
        Err(error) => {
            // An image that broke since they were read is found the next time.
            run.test_images.borrow_mut().remove(&state.stage);
            monitor.not_measured(stage, &error, state.samples);
            Ok(())
        }
    }
}

fn measured(
    run: &Run,
    state: &State,
    stage: &Stage,
    phase: &Phase,
    monitor: &mut Monitor,
) -> Result<()> {
    let Some(evaluation) = &run.recipe.evaluation else {
        return Ok(());
    };
    let begun = Instant::now();
    let model = state.averaged();
    // Images that are compared with captions are classified by the names of the classes.
    let head = match &run.captions[state.stage] {
        None => None,
        Some(captions) => {
            let head = captions.class_head(state.averaged_text().as_ref());
            match run.exchange.group.agree(head)? {
                Some(head) => Some(head),
                None => return Ok(()),
            }
        }
    };
    let test = test_images(run, state.stage, &evaluation.images, monitor)?;
    test.check_rate(run, state.stage)?;
    let logits = |images| {
        let outputs = model.logits(images, &Pass::evaluation());
        match &head {
            None => outputs,
            Some(head) => by_text(outputs, head),
        }
    };
    let images = Images::Stored {
        dataset: &run.images[state.stage].test,
        preprocessing: Preprocessing::new(phase.image_size as usize),
        subset: &test.subset,
    };
    let watcher = Watcher {
        monitor: RefCell::new(monitor),
        run,
    };
    let accuracies = |attack: &Pgd| {
        let evaluation = Evaluation {
            logits: &logits,
            images: &images,
            attacks: &[Attack::Pgd(attack.clone())],
            batch: stage.batch as usize,
            seed: run.recipe.seed,
            device: &run.device,
            group: &run.exchange.group,
        };
        let outcome = evaluation.run(&watcher)?;
        Ok((outcome.accuracy_after(0), outcome.accuracy_after(1)))
    };
    let (clean, strong) = accuracies(&evaluation.attack)?;
    let weak = match &stage.attack {
        // By the names of the classes, which is not what training climbs, but as near as it comes.
        Some(attack) => Some(accuracies(attack)?.1),
        None => None,
    };
    let found = monitor::Measured {
        clean,
        strong,
        weak,
        images: images.count(),
        broken: test.broken.len(),
        took: begun.elapsed(),
    };
    let monitor = watcher.monitor.into_inner();
    monitor.measured(stage, evaluation, &found, state.samples);
    Ok(())
}

/// The test images of a stage's evaluations, read the first time and known from then on. Broken ones are named once.
fn test_images(
    run: &Run,
    stage: usize,
    wanted: &TestImages,
    monitor: &mut Monitor,
) -> Result<Rc<Readable>> {
    if let Some(known) = run.test_images.borrow().get(&stage) {
        return Ok(Rc::clone(known));
    }
    let chosen = Rc::new(Readable::choose(run, stage, wanted)?);
    for broken in &chosen.broken {
        if run.named.borrow_mut().insert(broken.name.clone()) {
            monitor.broken_test_image(broken);
        }
    }
    let mut known = run.test_images.borrow_mut();
    known.insert(stage, Rc::clone(&chosen));
    Ok(chosen)
}

/// Shows a run's own evaluations, and ends them where the run is to stop.
struct Watcher<'a, 'b> {
    monitor: RefCell<&'a mut Monitor<'b>>,
    run: &'a Run,
}

impl Observer for Watcher<'_, '_> {
    fn batch(&self, outcome: &Outcome, done: &Done) -> Result<()> {
        let of = outcome.stages.last().map_or(0, |stage| stage.tried);
        let left = outcome.queue.len();
        self.monitor
            .borrow_mut()
            .evaluating(done.attack, of - left, of);
        match self.run.exchange.group.is_stopping() {
            true => Err(Error::new(Kind::TryAgain, "stopped within an evaluation").everywhere()),
            false => Ok(()),
        }
    }
}
