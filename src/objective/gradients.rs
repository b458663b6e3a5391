//! Gradients of an objective with respect to images and weights, over microbatches and ranks.
//!
//! Gradients are summed over microbatches one after another, and over the shards of a batch pairwise, which
//! [`crate::distributed::zero`] continues over the ranks. Microbatches change gradients only through the order of
//! summation. If the loss compares images with each other, the outputs of all microbatches and ranks are gathered
//! first, and the loss and its gradient with respect to the outputs are computed from all of them. Each microbatch then
//! passes through the model once more with its part of that gradient ("GradCache", Gao et al. 2021), which costs a
//! third more arithmetic in an update and half as much again in an attack.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};

use super::batch_loss::{BatchLoss, Views};
use super::microbatch::{Microbatches, rows_of};
use crate::attack::input_gradient;
use crate::distributed::Comm;
use crate::distributed::zero::{PairwiseSum, both};
use crate::model::{DropPath, Model};
use crate::ops::{Device, Numerics, add, from_vec, join, mean, row_dots, scaled_sum, sum, to_vec};

/// The loss of a batch, how the batch is passed through the model, and the ranks that share it.
pub struct Objective<'a> {
    loss: Box<dyn BatchLoss>,
    microbatches: Microbatches,
    comm: &'a Comm,
    /// The frozen model that the loss compares with, if it does so on adversarial images.
    reference: Option<&'a Model>,
}

/// The gradients of one batch on this rank, before they are summed over the ranks.
pub struct StepGradients {
    /// Gradients of the mean loss over the whole batch: of the model's parameters, then of the objective's own.
    pub gradients: Vec<Tensor<1>>,
    /// Sum of the losses of each of this rank's shards; for losses that compare images, equal shares of the total.
    pub losses: Vec<f64>,
    /// Number of correctly classified images, if the loss has correct answers. For losses that compare images, only rank
    /// 0 counts them.
    pub correct: Option<u64>,
}

impl<'a> Objective<'a> {
    /// Creates the objective of a batch.
    pub fn new(loss: Box<dyn BatchLoss>, microbatches: Microbatches, comm: &'a Comm) -> Self {
        Self {
            loss,
            microbatches,
            comm,
            reference: None,
        }
    }

    /// Adds the frozen model that the loss compares adversarial outputs with.
    pub fn with_reference(self, reference: Option<&'a Model>) -> Self {
        Self { reference, ..self }
    }

    /// Computes what the update's loss needs of the reference on the adversarial images. Collective if the loss compares
    /// images.
    ///
    /// Shapes: `[images, 3, height, width]`.
    pub fn observe(&mut self, adversarial: &Tensor<4>) {
        if !self.loss.uses_adversarial_reference() {
            return;
        }
        let reference = self
            .reference
            .expect("objectives have the reference they use");
        let outputs = self.microbatches.reference_outputs(reference, adversarial);
        let outputs = match self.is_coupled() {
            true => gather_rows(self.comm, outputs),
            false => outputs,
        };
        self.loss.set_adversarial_reference(outputs);
    }

    /// Returns whether training also needs the clean images.
    pub fn uses_clean_images(&self) -> bool {
        self.loss.uses_clean_images()
    }

    /// Computes the attack's loss of each of this rank's images, in evaluation mode.
    ///
    /// Ranks communicate only if the loss compares images with each other.
    ///
    /// Shapes: `images` `[images, 3, height, width]`; the result `[images]`.
    pub fn attack_losses(&self, model: &Model, images: &Tensor<4>) -> Tensor<1> {
        let count = images.dims()[0];
        let outputs = self.microbatches.own_outputs(model, images);
        if !self.is_coupled() {
            return self.loss.attack_losses(outputs);
        }
        let losses = self.loss.attack_losses(gather_rows(self.comm, outputs));
        self.own(losses, count)
    }

    /// Computes the gradient of the sum of the attack's losses with respect to this rank's images, in evaluation mode,
    /// and the loss of each image.
    ///
    /// Ranks communicate only if the loss compares images with each other.
    ///
    /// Shapes: `images` and the gradient `[images, 3, height, width]`; the losses `[images]`.
    pub fn ascent(&self, model: &Model, images: Tensor<4>) -> (Tensor<4>, Tensor<1>) {
        let passes = &self.microbatches;
        let numerics = passes.attack_numerics;
        let microbatches = passes.rows(images.dims()[0]).concat();
        if microbatches.len() == 1 && self.comm.world_size() == 1 {
            let loss = |images| {
                self.loss
                    .attack_losses(passes.forward(model, images, numerics, None))
            };
            return input_gradient(&loss, images);
        }
        let coupled = self.is_coupled().then(|| {
            let losses = |outputs: Views<_>| self.loss.attack_losses(outputs.adversarial);
            let images = Views::adversarial(&images);
            let passes = (numerics, None);
            self.output_gradient(model, images, &microbatches, passes, 1.0, &losses)
        });
        let (gradients, losses): (Vec<_>, Vec<_>) = microbatches
            .into_iter()
            .map(|rows| {
                let loss = |images| {
                    let outputs = passes.forward_rows(model, images, &rows, numerics, None);
                    match &coupled {
                        None => self.loss_of(&rows).attack_losses(outputs),
                        Some(coupled) => along(outputs, &coupled.gradient.adversarial, &rows),
                    }
                };
                input_gradient(&loss, rows_of(&images, &rows))
            })
            .unzip();
        let losses = match coupled {
            None => join(losses),
            Some(coupled) => self.own(coupled.losses, images.dims()[0]),
        };
        (join(gradients), losses)
    }

    /// Computes the gradients of the mean loss over the whole batch, in training mode.
    ///
    /// `meanwhile` is called after all gradients have been queued, before the loss is read, which waits for the device.
    ///
    /// Shapes: `images` `[images, 3, height, width]`, this rank's part of a batch of `batch` images.
    pub fn gradients(
        &self,
        model: &Model,
        images: Views<Tensor<4>>,
        batch: usize,
        drop_path: Option<&DropPath>,
        meanwhile: impl FnOnce(),
    ) -> StepGradients {
        let count = images.adversarial.dims()[0];
        let shards = self.microbatches.rows(count);
        if !self.is_coupled() {
            return self.separate_gradients(model, images, shards, batch, drop_path, meanwhile);
        }
        if shards.concat().len() == 1 && self.comm.world_size() == 1 {
            return self.joint_gradients(model, images, drop_path, meanwhile);
        }
        let loss = self.loss.tracked();
        let loss = loss.as_deref().unwrap_or(&*self.loss);
        let losses = |outputs| loss.losses(outputs);
        let all = shards.concat();
        let share = 1.0 / batch as f64;
        let passes = (self.microbatches.numerics, drop_path);
        let mut coupled =
            self.output_gradient(model, images.as_ref(), &all, passes, share, &losses);
        let parameters = loss.parameter_gradients(&mut coupled.found, self.comm);
        let parts = shards.len();
        let mut gradients = sum_over(shards, |_, rows| {
            let tracked = tracked(model, &images);
            let outputs = self.outputs(&tracked, images.as_ref(), &rows, drop_path);
            let pairs = outputs.into_iter().zip(coupled.gradient.as_ref());
            let value = pairs
                .map(|(outputs, gradient)| sum(along(outputs, gradient, &rows)))
                .reduce(add)
                .expect("there is an adversarial view");
            sum_over_views(&tracked, &mut value.backward())
        });
        gradients.extend(parameters);
        meanwhile();
        let mean = f64::from(to_vec(mean(coupled.losses))[0]);
        StepGradients {
            gradients,
            losses: vec![mean * count as f64 / parts as f64; parts],
            correct: self.count_correct(coupled.outputs.adversarial),
        }
    }

    /// Computes gradients of a loss that depends on each image alone.
    fn separate_gradients(
        &self,
        model: &Model,
        images: Views<Tensor<4>>,
        shards: Vec<Vec<Range<usize>>>,
        batch: usize,
        drop_path: Option<&DropPath>,
        meanwhile: impl FnOnce(),
    ) -> StepGradients {
        let share = 1.0 / batch as f64;
        let (mut all_outputs, mut all_losses) = (Vec::new(), Vec::new());
        let count = shards.len();
        let gradients = sum_over(shards, |shard, rows| {
            let tracked = tracked(model, &images);
            let outputs = self.outputs(&tracked, images.as_ref(), &rows, drop_path);
            all_outputs.push(outputs.adversarial.clone().without_autodiff());
            let values = self.loss_of(&rows).losses(outputs);
            all_losses.push((shard, sum(values.clone().without_autodiff())));
            sum_over_views(&tracked, &mut scaled_sum(values, share).backward())
        });
        meanwhile();
        let mut losses = vec![0.0; count];
        for (shard, loss) in all_losses {
            losses[shard] += f64::from(to_vec(loss)[0]);
        }
        StepGradients {
            gradients,
            losses,
            correct: self.loss.count_correct(join(all_outputs)),
        }
    }

    /// Computes gradients of a loss that compares images, if the whole batch passes at once.
    fn joint_gradients(
        &self,
        model: &Model,
        images: Views<Tensor<4>>,
        drop_path: Option<&DropPath>,
        meanwhile: impl FnOnce(),
    ) -> StepGradients {
        let batch = images.adversarial.dims()[0] as f64;
        let tracked = tracked(model, &images);
        let loss = self.loss.tracked();
        let loss = loss.as_deref().unwrap_or(&*self.loss);
        let passes = &self.microbatches;
        let outputs = tracked
            .as_ref()
            .zip(images)
            .map(|(model, images)| passes.forward(model, images, passes.numerics, drop_path));
        let value = mean(loss.losses(outputs.clone()));
        let mut found = value.clone().backward();
        let mut gradients = sum_over_views(&tracked, &mut found);
        gradients.extend(loss.parameter_gradients(&mut found, self.comm));
        meanwhile();
        StepGradients {
            gradients,
            losses: vec![f64::from(to_vec(value.without_autodiff())[0]) * batch],
            correct: self.count_correct(outputs.adversarial.without_autodiff()),
        }
    }

    /// Returns this rank's `count` rows of those of all ranks.
    fn own<const D: usize>(&self, all: Tensor<D>, count: usize) -> Tensor<D> {
        all.narrow(0, self.comm.rank() * count, count)
    }

    /// Returns whether the loss of an image depends on the other images in its batch.
    fn is_coupled(&self) -> bool {
        self.loss.of_rows(0..1).is_none()
    }

    fn loss_of(&self, rows: &Range<usize>) -> Box<dyn BatchLoss> {
        let part = self.loss.of_rows(rows.clone());
        part.expect("the loss does not compare images")
    }

    /// Counts correct images among the outputs of all ranks. Every rank has these outputs; only rank 0 counts.
    fn count_correct(&self, outputs: Tensor<2>) -> Option<u64> {
        match self.comm.is_main() {
            true => self.loss.count_correct(outputs),
            false => Some(0),
        }
    }

    /// Computes the models' outputs for some rows of each view.
    fn outputs(
        &self,
        models: &Views<Model>,
        images: Views<&Tensor<4>>,
        rows: &Range<usize>,
        drop_path: Option<&DropPath>,
    ) -> Views<Tensor<2>> {
        let passes = &self.microbatches;
        let numerics = passes.numerics;
        models.as_ref().zip(images).map(|(model, images)| {
            passes.forward_rows(model, rows_of(images, rows), rows, numerics, drop_path)
        })
    }

    /// Computes the losses over the outputs of all ranks, and `share` times their gradient with respect to this rank's
    /// outputs.
    fn output_gradient(
        &self,
        model: &Model,
        images: Views<&Tensor<4>>,
        microbatches: &[Range<usize>],
        (numerics, drop_path): (Numerics, Option<&DropPath>),
        share: f64,
        losses: &dyn Fn(Views<Tensor<2>>) -> Tensor<1>,
    ) -> OutputGradient {
        let count = images.adversarial.dims()[0];
        let outputs = images.map(|images| {
            let parts = microbatches.iter().map(|rows| {
                let part = rows_of(images, rows);
                let passes = &self.microbatches;
                passes.forward_rows(model, part, rows, numerics, drop_path)
            });
            let all = gather_rows(self.comm, join(parts.collect()));
            all.autodiff().require_grad()
        });
        let values = losses(outputs.clone());
        let mut found = scaled_sum(values.clone(), share).backward();
        let gradient = outputs.as_ref().map(|outputs| {
            let gradient = outputs.grad_remove(&mut found);
            let gradient = gradient.expect("the loss depends on the outputs");
            self.own(gradient, count)
        });
        OutputGradient {
            gradient,
            outputs: outputs.map(Tensor::without_autodiff),
            losses: values.without_autodiff(),
            found,
        }
    }
}

/// The gradient of a loss that compares images.
struct OutputGradient {
    /// With respect to the outputs of this rank: `[images, outputs]`.
    gradient: Views<Tensor<2>>,
    /// The outputs of all ranks: `[batch, outputs]`.
    outputs: Views<Tensor<2>>,
    /// Of the images of all ranks, `[batch]`.
    losses: Tensor<1>,
    /// Gradients of everything else, such as the objective's own parameters.
    found: Gradients,
}

/// Returns a tracked copy of the model for each view. Their gradients are separate, since automatic differentiation
/// would add those of shared tensors on the host.
fn tracked(model: &Model, images: &Views<Tensor<4>>) -> Views<Model> {
    images.as_ref().map(|_| model.tracked())
}

/// Sums the weight gradients of the views.
fn sum_over_views(tracked: &Views<Model>, found: &mut Gradients) -> Vec<Tensor<1>> {
    let of_views = tracked.as_ref().into_iter();
    let of_views = of_views.map(|model| model.gradients(found));
    of_views.reduce(both).expect("there is an adversarial view")
}

/// Sums `gradients(shard, rows)` over the microbatches of each shard in turn, and over the shards pairwise.
fn sum_over(
    shards: Vec<Vec<Range<usize>>>,
    mut gradients: impl FnMut(usize, Range<usize>) -> Vec<Tensor<1>>,
) -> Vec<Tensor<1>> {
    let mut sum = PairwiseSum::default();
    for (shard, microbatches) in shards.into_iter().enumerate() {
        let of_rows = microbatches.into_iter().map(|rows| gradients(shard, rows));
        let of_shard = of_rows.reduce(both);
        sum.add(of_shard.expect("a shard has images"));
    }
    sum.sum()
}

/// Gathers the rows of all ranks, which have the same number of rows each.
pub(super) fn gather_rows(comm: &Comm, rows: Tensor<2>) -> Tensor<2> {
    if comm.world_size() == 1 {
        return rows;
    }
    let ([count, width], device) = (rows.dims(), Device::of(&rows));
    let all = comm.all_gather_f32(to_vec(rows)).wait();
    from_vec(all, [count * comm.world_size(), width], &device)
}

/// Returns values whose gradient with respect to the outputs is the rows of `gradient`.
///
/// Shapes: `outputs` `[rows, outputs]`; `gradient` `[images, outputs]`; the result `[rows]`.
fn along(outputs: Tensor<2>, gradient: &Tensor<2>, rows: &Range<usize>) -> Tensor<1> {
    let gradient = gradient.clone().narrow(0, rows.start, rows.len());
    row_dots(outputs, &gradient)
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::loss::{Targets, cross_entropy, unit_length};
    use crate::model::config::ModelConfig;
    use crate::model::config::vit::{Position, VitConfig};
    use crate::model::tokens::Masking;
    use crate::model::tokens::MaskingKind;
    use crate::objective::contrastive::{ContrastiveLoss, TowerPasses};
    use crate::objective::labels::LabelLoss;
    use crate::ops::{Device, Gelu};
    use crate::rng::{Rng, Stream};
    use crate::text::{TextConfig, TextPool, TextTower};

    fn draw<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let mut rng = Rng::new(seed, Stream::Bench);
        let values = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
        from_vec(values, shape, &Device::cpu())
    }

    fn assert_close<const D: usize>(found: Tensor<D>, right: Tensor<D>, what: &str) {
        let (found, right) = (to_vec(found), to_vec(right));
        let most = right.iter().fold(0f32, |most, value| most.max(value.abs()));
        for (found, right) in found.iter().zip(right) {
            // Sums are in a different order.
            assert!(
                (found - right).abs() <= 2e-6 * most.max(1e-3),
                "{what}: {found} {right}"
            );
        }
    }

    fn model() -> Model {
        let config = ModelConfig::Vit(VitConfig {
            width: 16,
            depth: 2,
            heads: 2,
            hidden: 32,
            position: Position::Learned,
            ..VitConfig::named("vit_micro").unwrap()
        });
        Model::new(&config, 6, 16, 1, &Device::cpu())
    }

    fn drop_path() -> DropPath {
        DropPath {
            rate: 0.4,
            seed: 3,
            position: 10,
        }
    }

    fn microbatches(size: Option<usize>) -> Microbatches {
        let masking = Masking {
            kind: MaskingKind::Random,
            ratio: 0.25,
        };
        Microbatches {
            numerics: Numerics::F32,
            attack_numerics: Numerics::F32,
            recompute: false,
            kept: Some(masking.choose(0, 10, 7, 4)),
            size,
            shards: 1,
        }
    }

    fn labels() -> Box<dyn BatchLoss> {
        let targets = Targets::classes(&[0, 5, 2, 2, 1, 3, 4]);
        Box::new(LabelLoss::new(&targets, 6, 0.1, &Device::cpu()))
    }

    /// A contrastive loss with a trainable text tower.
    fn captions() -> Box<dyn BatchLoss> {
        let device = Device::cpu();
        let config = TextConfig {
            context: 4,
            vocabulary: 9,
            width: 8,
            heads: 2,
            depth: 1,
            hidden: 16,
            embedding: 6,
            causal: false,
            pool: TextPool::Last,
            gelu: Gelu::Erf,
            eps: 1e-5,
        };
        let tower = TextTower::new(&config, 5, &device).unwrap().tracked();
        let ids: Vec<u32> = (0..7 * 4).map(|place| place * 5 % 9).collect();
        let texts = unit_length(tower.encode(&ids).unwrap());
        let scale = from_vec(vec![1.5], [1], &device);
        let passes = TowerPasses(vec![(tower, texts.clone())]);
        let texts = texts.without_autodiff();
        Box::new(ContrastiveLoss::new(texts, scale, Some(passes)))
    }

    /// An example of a more complex objective: TRADES (Zhang et al. 2019, equation 5), with squared distance instead of
    /// the divergence, plus the distance to a frozen reference model (FARE, Schlarmann et al. 2024, equation 2).
    struct Weighted {
        labels: Tensor<2>,
        reference: Tensor<2>,
        weights: [f64; 2],
    }

    fn squared_distance(left: Tensor<2>, right: Tensor<2>) -> Tensor<1> {
        let difference = left - right;
        (difference.clone() * difference).sum_dim(1).squeeze_dim(1)
    }

    impl BatchLoss for Weighted {
        fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1> {
            let clean = outputs.clean.expect("`uses_clean_images`");
            let [robust, faithful] = self.weights;
            cross_entropy(clean.clone(), self.labels.clone())
                + squared_distance(outputs.adversarial, clean.clone()) * robust
                + squared_distance(clean, self.reference.clone()) * faithful
        }

        fn attack_losses(&self, outputs: Tensor<2>) -> Tensor<1> {
            squared_distance(outputs, self.reference.clone())
        }

        fn uses_clean_images(&self) -> bool {
            true
        }

        fn of_rows(&self, rows: Range<usize>) -> Option<Box<dyn BatchLoss>> {
            let part = |all: &Tensor<2>| all.clone().narrow(0, rows.start, rows.len());
            Some(Box::new(Self {
                labels: part(&self.labels),
                reference: part(&self.reference),
                weights: self.weights,
            }))
        }

        fn count_correct(&self, _: Tensor<2>) -> Option<u64> {
            None
        }
    }

    fn weighted() -> Weighted {
        let targets = Targets::classes(&[0, 5, 2, 2, 1, 3, 4]);
        Weighted {
            labels: targets.distributions(6, 0.0, &Device::cpu()),
            reference: draw([7, 6], 8),
            weights: [6.0, 0.5],
        }
    }

    fn views(loss: &dyn BatchLoss) -> Views<Tensor<4>> {
        let adversarial = draw([7, 3, 16, 16], 1);
        let clean = loss.uses_clean_images();
        Views {
            adversarial,
            clean: clean.then(|| draw([7, 3, 16, 16], 4)),
        }
    }

    #[test]
    fn microbatches_give_the_gradients_of_the_whole_batch() {
        let (model, comm) = (model(), Comm::single());
        let weighted = || Box::new(weighted()) as Box<dyn BatchLoss>;
        for loss in [labels, captions, weighted as fn() -> Box<dyn BatchLoss>] {
            let images = views(&*loss());
            let objective = |size| Objective::new(loss(), microbatches(size), &comm);
            let gradients = |size| {
                objective(size).gradients(&model, images.clone(), 7, Some(&drop_path()), || ())
            };
            let whole = gradients(None);
            let slope = objective(None).ascent(&model, images.adversarial.clone()).0;
            for size in [1, 3, 7, 100] {
                let found = gradients(Some(size));
                let (loss, of_whole): (f64, f64) =
                    (found.losses.iter().sum(), whole.losses.iter().sum());
                assert!(
                    (loss - of_whole).abs() < 1e-5 * of_whole,
                    "{loss} {of_whole}"
                );
                assert_eq!(found.correct, whole.correct);
                assert_eq!(found.gradients.len(), whole.gradients.len());
                for (found, right) in found.gradients.into_iter().zip(&whole.gradients) {
                    assert_close(found, right.clone(), "weights");
                }
                let objective = objective(Some(size));
                let found = objective.ascent(&model, images.adversarial.clone()).0;
                assert_close(found, slope.clone(), "images");
            }
        }
    }

    #[test]
    fn a_weighted_sum_of_terms_has_the_sum_of_their_gradients() {
        let (model, comm) = (model(), Comm::single());
        let images = views(&weighted());
        let objective = Objective::new(Box::new(weighted()), microbatches(Some(3)), &comm);
        let found = objective.gradients(&model, images.clone(), 7, None, || ());
        let tracked = model.tracked();
        let passes = microbatches(None);
        let [adversarial, clean] = [images.adversarial, images.clean.unwrap()]
            .map(|images| passes.forward(&tracked, images, Numerics::F32, None));
        let Weighted {
            labels, reference, ..
        } = weighted();
        let loss = cross_entropy(clean.clone(), labels).mean()
            + squared_distance(adversarial, clean.clone()).mean() * 6.0
            + squared_distance(clean, reference).mean() * 0.5;
        let right = tracked.gradients(&mut loss.backward());
        for (found, right) in found.gradients.into_iter().zip(right) {
            assert_close(found, right, "weights");
        }
    }
}
