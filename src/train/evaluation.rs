//! Evaluation during training, on the readable test images. A failed evaluation never stops training.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use super::monitor;
use super::monitor::Monitor;
use super::run::Run;
use super::state::State;
use super::test_set::TestSet;
use crate::attack::{Algorithm, Apgd, Attack, BatchAttack, Climbs};
use crate::error::{Error, Kind, Result};
use crate::eval::{BatchReport, Classifier, Images, Observer, Outcome, Setup};
use crate::image::Preprocessing;
use crate::ops::Precision;
use crate::recipe::{Phase, Stage, TestImages};

/// Evaluates the model: clean accuracy, and accuracy under the evaluation's attack and the stage's own attack. If the
/// evaluation fails, the reason is reported and training continues.
///
/// Errors: a stop was requested, or a store does not respond.
pub(super) fn evaluate(run: &Run, state: &State, monitor: &mut Monitor) -> Result<()> {
    let place = run.recipe.update_at(state.samples);
    let (stage, phase, _) = place.expect("every update belongs to a phase");
    match evaluate_stage(run, state, stage, phase, monitor) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == Kind::TryAgain => Err(error),
        Err(error) => {
            // Read the test images again next time, to find any that became unreadable.
            run.test_images.borrow_mut().remove(&state.stage);
            monitor.evaluation_failed(stage, &error, state.samples);
            Ok(())
        }
    }
}

fn evaluate_stage(
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
    let Some(classifier) = classifier(run, state)? else {
        return Ok(());
    };
    let test = test_images(run, state.stage, &evaluation.images, monitor)?;
    test.check_rate(run.recipe.data_of(stage).broken_rate)?;
    let images = Images::Stored {
        dataset: &run.images[state.stage].test,
        preprocessing: Preprocessing::new(phase.image_size as usize),
        subset: &test.subset,
    };
    let watcher = Watcher {
        monitor: RefCell::new(monitor),
        run,
    };
    let setup = Setup {
        batch: stage.batch as usize,
        seed: run.recipe.seed,
        device: &run.device,
        comm: &run.comm,
    };
    // Every norm attacks all images, so that its own accuracy is known too.
    let outcomes = |attacks: Vec<Attack>| {
        let outcomes = attacks
            .into_iter()
            .map(|attack| classifier.evaluate(&images, &[attack], setup, &watcher));
        outcomes.collect::<Result<Vec<Outcome>>>()
    };
    let threats = &evaluation.attack.0;
    let all = outcomes(threats.iter().cloned().map(Attack::Pgd).collect())?;
    let weak = match &stage.attack {
        // Without labels in training, this attacks zero-shot classification: not the training loss, but the closest
        // proxy.
        Some(attack) => Some(union(&outcomes(on_labels(&attack.attack))?)),
        None => None,
    };
    let strong = &all[0];
    let norms = threats.iter().zip(&all);
    let norms = norms.map(|(threat, outcome)| (threat.norm, outcome.accuracy_after(1)));
    let found = monitor::Accuracies {
        clean: strong.accuracy_after(0),
        strong: union(&all),
        norms: norms.collect(),
        weak,
        images: images.count(),
        broken: test.broken.len(),
        not_finite: strong.not_finite(),
        took: begun.elapsed(),
    };
    let monitor = watcher.monitor.into_inner();
    monitor.evaluated(stage, evaluation, &found, state.samples);
    Ok(())
}

/// Returns the share of images that are classified correctly under every attack.
fn union(outcomes: &[Outcome]) -> f64 {
    let count = outcomes[0].robust.len();
    let is_robust = |image: &usize| outcomes.iter().all(|outcome| outcome.robust[*image]);
    (0..count).filter(is_robust).count() as f64 / count.max(1) as f64
}

/// Returns a training attack as attacks of an evaluation, which maximize the cross entropy.
fn on_labels(attack: &BatchAttack) -> Vec<Attack> {
    let threats = attack.threats.iter();
    let threats = threats.map(|threat| match attack.algorithm {
        Algorithm::Pgd => Attack::Pgd(threat.clone()),
        Algorithm::Apgd => Attack::Apgd(Apgd {
            norm: threat.norm,
            epsilon: threat.epsilon.clone(),
            climbs: Climbs::CrossEntropy,
            steps: threat.steps,
            restarts: 1,
            averages: 1,
            enlarged: false,
        }),
    });
    threats.collect()
}

/// Returns a classifier with the EMA weights, zero-shot if the model outputs embeddings. `None` if there are no class
/// names. Collective.
fn classifier(run: &Run, state: &State) -> Result<Option<Classifier>> {
    let zero = run.zero();
    let model = state.averaged(&zero);
    if run.has_logits(state.stage) {
        return Ok(Some(Classifier::new(model, None, Precision::F32)));
    }
    let Some(captions) = &run.captions[state.stage] else {
        return Ok(None);
    };
    let head = captions.class_head(state.averaged_tower(&zero).as_ref());
    let head = run.comm.all_ok(head)?;
    Ok(head.map(|head| Classifier::new(model, Some(head), Precision::F32)))
}

/// Returns the test images of a stage's evaluations, cached after the first call. Broken images are reported once.
fn test_images(
    run: &Run,
    stage: usize,
    requested: &TestImages,
    monitor: &mut Monitor,
) -> Result<Rc<TestSet>> {
    if let Some(known) = run.test_images.borrow().get(&stage) {
        return Ok(Rc::clone(known));
    }
    let chosen = Rc::new(TestSet::choose(&run.images[stage], requested, &run.comm)?);
    for broken in &chosen.broken {
        if run.reported.borrow_mut().insert(broken.name.clone()) {
            monitor.broken_test_image(broken);
        }
    }
    let mut known = run.test_images.borrow_mut();
    known.insert(stage, Rc::clone(&chosen));
    Ok(chosen)
}

/// Shows the progress of an evaluation, and stops it if the run should stop.
struct Watcher<'a, 'b> {
    monitor: RefCell<&'a mut Monitor<'b>>,
    run: &'a Run,
}

impl Observer for Watcher<'_, '_> {
    fn batch(&self, outcome: &Outcome, done: &BatchReport) -> Result<()> {
        let of = outcome.stages.last().map_or(0, |stage| stage.tried);
        let left = outcome.queue.len();
        self.monitor
            .borrow_mut()
            .evaluating(done.attack, of - left, of);
        match self.run.comm.any_stop_requested() {
            true => Err(Error::new(Kind::TryAgain, "stopped during an evaluation").everywhere()),
            false => Ok(()),
        }
    }
}
