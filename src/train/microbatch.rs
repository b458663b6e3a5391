//! Forward and backward passes over a process's part of a batch: whole, or in chunks of images where it would not fit.
//!
//! Gradients are added up over chunks one after another, and over the shards of a batch pairwise, as [`crate::distributed::zero`] goes
//! on over the processes. Chunks change no gradient but by the order of sums. Where the loss compares images with each
//! other, the outputs of all chunks and all processes are gathered first, the loss and its gradient computed from all of them,
//! and then each chunk is passed once more with that gradient ("GradCache", Gao et al. 2021): a third more arithmetic in an
//! update, a half more in an attack.

use std::ops::Range;

use burn::tensor::{Gradients, Tensor};

use crate::attack::input_gradient;
use crate::distributed::Group;
use crate::distributed::zero::{PairwiseSum, both};
use crate::loss::Objective;
use crate::model::{DropPath, Model, Pass};
use crate::ops::{from_vec, to_vec};

/// How the passes over one batch are done.
pub(crate) struct Passes<'a> {
    pub(crate) model: &'a Model,
    /// Of this process's part of the batch as a whole; its `kept` and `drop_path` are cut with the chunks.
    pub(crate) pass: Pass<'a>,
    /// Images at a time; all of a shard if absent.
    pub(crate) chunk: Option<usize>,
    /// Equal parts of this process's part, which are never passed together.
    pub(crate) shards: usize,
    /// The processes that share the batch.
    pub(crate) group: &'a Group,
}

/// What an update needs to know of a process's part of a batch.
pub(crate) struct Found {
    /// For images that stand alone those of this process, `[part, classes]`; else all, `[batch, dimensions]`.
    pub(crate) outputs: Tensor<2>,
    /// Sums of the losses of this process's shards; where images are compared, shares of the one loss that all know.
    pub(crate) losses: Vec<f64>,
    /// This part of the gradient of the batch's mean loss, in the order of the model's parameters.
    pub(crate) gradients: Vec<Tensor<1>>,
    /// Of the mean loss, for what stands beside the model.
    pub(crate) beside: Beside,
}

/// Gradients for what the contrastive loss depends on beside the images; all processes find the same.
#[derive(Default)]
pub(crate) struct Beside {
    /// For the logarithm of the similarities' factor.
    pub(crate) log_scale: Option<Tensor<1>>,
    /// For the embeddings of the texts, where they learn: `[batch, dimensions]`.
    pub(crate) texts: Option<Tensor<2>>,
}

impl Passes<'_> {
    /// The gradient of the sum of the losses for the images of this process.
    ///
    /// Processes exchange nothing here, unless the loss compares images with each other: then their outputs.
    pub(crate) fn input_gradient(&self, images: Tensor<4>, objective: &Objective) -> Tensor<4> {
        let chunks = self.chunks(images.dims()[0]).concat();
        if chunks.len() == 1 && self.group.size() == 1 {
            let loss = |images| objective.losses(self.model.logits(images, &self.pass));
            return input_gradient(&loss, images).0;
        }
        let towards = self.output_gradient(&images, objective, &chunks, 1.0);
        let parts = chunks.into_iter().map(|rows| {
            let loss = |images| {
                let outputs = self.outputs(self.model, images, &rows);
                match &towards {
                    None => of_part(objective, &rows).losses(outputs),
                    Some(towards) => along(outputs, towards.of(&rows)),
                }
            };
            input_gradient(&loss, part(&images, &rows)).0
        });
        Tensor::cat(parts.collect(), 0)
    }

    /// Outputs, losses and this part of the gradient of the mean loss over a batch of `batch` images for the weights.
    pub(crate) fn weight_gradients(
        &self,
        images: Tensor<4>,
        objective: &Objective,
        batch: usize,
    ) -> Found {
        let own = images.dims()[0];
        let shards = self.chunks(own);
        let share = 1.0 / batch as f64;
        if objective.compares_images() && shards.concat().len() == 1 && self.group.size() == 1 {
            return self.at_once(images, objective);
        }
        let towards = self.output_gradient(&images, objective, &shards.concat(), share);
        let (mut outputs, mut losses) = (Vec::new(), Vec::new());
        let mut sum = PairwiseSum::default();
        for chunks in shards {
            let mut of_shard: Option<Vec<Tensor<1>>> = None;
            let mut loss = 0.0;
            for rows in chunks {
                let tracked = self.model.tracked();
                let out = self.outputs(&tracked, part(&images, &rows), &rows);
                let climbed = match &towards {
                    None => {
                        outputs.push(out.clone().without_autodiff());
                        let values = of_part(objective, &rows).losses(out);
                        loss +=
                            f64::from(values.clone().without_autodiff().sum().into_scalar::<f32>());
                        values.sum() * share
                    }
                    Some(towards) => along(out, towards.of(&rows)).sum(),
                };
                let found = tracked.gradients(&mut climbed.backward());
                of_shard = Some(match of_shard {
                    None => found,
                    Some(sums) => both(sums, found),
                });
            }
            losses.push(loss);
            sum.add(of_shard.expect("a shard has images"));
        }
        let gradients = sum.sum();
        match towards {
            None => Found {
                outputs: Tensor::cat(outputs, 0),
                losses,
                gradients,
                beside: Beside::default(),
            },
            Some(towards) => Found {
                outputs: towards.outputs,
                losses: vec![towards.loss * own as f64 / losses.len() as f64; losses.len()],
                gradients,
                beside: towards.beside,
            },
        }
    }

    /// The same for a whole batch of images that are compared with each other, in one pass.
    fn at_once(&self, images: Tensor<4>, objective: &Objective) -> Found {
        let batch = images.dims()[0] as f64;
        let tracked = self.model.tracked();
        let objective = recorded(objective);
        let outputs = tracked.logits(images, &self.pass);
        let loss = objective.losses(outputs.clone()).mean();
        let mut found = loss.clone().backward();
        Found {
            outputs: outputs.without_autodiff(),
            losses: vec![f64::from(loss.without_autodiff().into_scalar::<f32>()) * batch],
            gradients: tracked.gradients(&mut found),
            beside: beside(&objective, &mut found),
        }
    }

    /// The chunks of each shard of this process's images.
    fn chunks(&self, count: usize) -> Vec<Vec<Range<usize>>> {
        let of_shard = count / self.shards;
        let size = self.chunk.unwrap_or(of_shard).min(of_shard).max(1);
        let shards = (0..self.shards).map(|shard| {
            let (begin, end) = (shard * of_shard, (shard + 1) * of_shard);
            let starts = (begin..end).step_by(size);
            starts.map(|start| start..(start + size).min(end)).collect()
        });
        shards.collect()
    }

    /// What the model gives for the images of some rows of the batch.
    fn outputs(&self, model: &Model, images: Tensor<4>, rows: &Range<usize>) -> Tensor<2> {
        let kept = self.pass.kept.map(|kept| kept.of_rows(rows));
        let drop_path = self.pass.drop_path.as_ref().map(|path| DropPath {
            position: path.position + rows.start as u64,
            ..path.clone()
        });
        let pass = Pass {
            precision: self.pass.precision,
            kept: kept.as_ref(),
            drop_path,
            recompute: self.pass.recompute,
        };
        model.logits(images, &pass)
    }

    /// The losses and their gradient for the outputs, times `share`, where images are compared with each other.
    fn output_gradient(
        &self,
        images: &Tensor<4>,
        objective: &Objective,
        chunks: &[Range<usize>],
        share: f64,
    ) -> Option<Towards> {
        if !objective.compares_images() {
            return None;
        }
        let own = images.dims()[0];
        let outputs = chunks
            .iter()
            .map(|rows| self.outputs(self.model, part(images, rows), rows));
        let outputs = of_all(self.group, Tensor::cat(outputs.collect(), 0));
        let outputs = outputs.autodiff().require_grad();
        let objective = recorded(objective);
        let losses = objective.losses(outputs.clone());
        let mut found = (losses.clone().sum() * share).backward();
        let gradient = outputs
            .grad_remove(&mut found)
            .expect("the loss depends on the outputs");
        Some(Towards {
            gradient: gradient.narrow(0, self.group.rank() * own, own),
            outputs: outputs.without_autodiff(),
            loss: f64::from(losses.without_autodiff().mean().into_scalar::<f32>()),
            beside: beside(&objective, &mut found),
        })
    }
}

/// The rows of all processes, of which each has as many.
pub(crate) fn of_all(group: &Group, rows: Tensor<2>) -> Tensor<2> {
    if group.size() == 1 {
        return rows;
    }
    let ([count, width], device) = (rows.dims(), rows.device());
    let all = group.start_all_gather(to_vec(rows)).wait();
    from_vec(all, [count * group.size(), width], &device)
}

/// Where the loss wants the outputs to go.
struct Towards {
    /// The gradient for the outputs of this process: `[part, dimensions]`.
    gradient: Tensor<2>,
    /// The outputs of all: `[batch, dimensions]`.
    outputs: Tensor<2>,
    /// Mean over the batch.
    loss: f64,
    beside: Beside,
}

impl Towards {
    fn of(&self, rows: &Range<usize>) -> Tensor<2> {
        self.gradient.clone().narrow(0, rows.start, rows.len())
    }
}

/// The objective, recorded for the gradients of all that learns in it.
fn recorded(objective: &Objective) -> Objective {
    match objective.clone() {
        Objective::Captions {
            texts,
            log_scale,
            learning,
        } => Objective::Captions {
            texts: match learning {
                true => texts.autodiff().require_grad(),
                false => texts,
            },
            log_scale: log_scale.autodiff().require_grad(),
            learning,
        },
        classes => classes,
    }
}

/// The gradients of a recorded objective.
fn beside(objective: &Objective, found: &mut Gradients) -> Beside {
    match objective {
        Objective::Classes(_) => Beside::default(),
        Objective::Captions {
            texts, log_scale, ..
        } => Beside {
            log_scale: log_scale.grad_remove(found),
            texts: texts
                .is_autodiff()
                .then(|| texts.grad_remove(found))
                .flatten(),
        },
    }
}

fn of_part(objective: &Objective, rows: &Range<usize>) -> Objective {
    let part = objective.of_part(rows.clone());
    part.expect("asked only where images stand alone")
}

/// What has `gradient` as its gradient for the outputs: `[chunk]`.
fn along(outputs: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    (outputs * gradient).sum_dim(1).squeeze_dim(1)
}

fn part(images: &Tensor<4>, rows: &Range<usize>) -> Tensor<4> {
    images.clone().narrow(0, rows.start, rows.len())
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::loss::{Targets, unit_length};
    use crate::model::config::ModelConfig;
    use crate::model::config::vit::{Position, VitConfig};
    use crate::model::tokens::Masking;
    use crate::ops::{Precision, from_vec, to_vec};
    use crate::rng::{Purpose, Rng};

    fn draw<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
        let mut rng = Rng::new(seed, Purpose::Bench, 0, 0);
        let values = (0..shape.iter().product()).map(|_| rng.uniform()).collect();
        from_vec(values, shape, &Device::flex())
    }

    fn assert_close<const D: usize>(found: Tensor<D>, right: Tensor<D>, what: &str) {
        let (found, right) = (to_vec(found), to_vec(right));
        let most = right.iter().fold(0f32, |most, value| most.max(value.abs()));
        for (found, right) in found.iter().zip(right) {
            // Sums in another order.
            assert!(
                (found - right).abs() <= 2e-6 * most.max(1e-3),
                "{what}: {found} {right}"
            );
        }
    }

    #[test]
    fn chunks_give_the_gradients_of_the_whole_batch() {
        let device = Device::flex();
        let config = ModelConfig::Vit(VitConfig {
            width: 16,
            depth: 2,
            heads: 2,
            hidden: 32,
            position: Position::Learned,
            ..VitConfig::named("vit_micro").unwrap()
        });
        let model = Model::new(&config, 6, 16, 1, &device);
        let masking = Masking {
            kind: crate::model::tokens::MaskingKind::Random,
            ratio: 0.25,
        };
        let kept = masking.choose(0, 10, 7, 4);
        let group = Group::solo();
        let images = draw([7, 3, 16, 16], 1);
        let classes = Targets::classes(&[0, 5, 2, 2, 1, 3, 4]).distributions(6, 0.1, &device);
        let captions = Objective::Captions {
            texts: unit_length(draw([7, 6], 2) - 0.5),
            log_scale: from_vec(vec![1.5], [1], &device),
            learning: true,
        };
        for objective in [Objective::Classes(classes), captions] {
            let passes = |chunk| Passes {
                model: &model,
                pass: Pass {
                    precision: Precision::F32,
                    kept: Some(&kept),
                    drop_path: Some(DropPath {
                        rate: 0.4,
                        seed: 3,
                        position: 10,
                    }),
                    recompute: false,
                },
                chunk,
                shards: 1,
                group: &group,
            };
            let whole = passes(None).weight_gradients(images.clone(), &objective, 7);
            let slope = passes(None).input_gradient(images.clone(), &objective);
            for chunk in [1, 3, 7, 100] {
                let passes = passes(Some(chunk));
                let found = passes.weight_gradients(images.clone(), &objective, 7);
                assert_close(found.outputs, whole.outputs.clone(), "outputs");
                let (loss, of_whole): (f64, f64) =
                    (found.losses.iter().sum(), whole.losses.iter().sum());
                assert!((loss - of_whole).abs() < 1e-5, "{loss} {of_whole}");
                for (found, right) in found.gradients.into_iter().zip(&whole.gradients) {
                    assert_close(found, right.clone(), "weights");
                }
                let (beside, of_whole) = (found.beside, &whole.beside);
                assert_eq!(beside.texts.is_some(), of_whole.texts.is_some());
                if let (Some(found), Some(right)) = (beside.log_scale, &of_whole.log_scale) {
                    assert_close(found, right.clone(), "scale");
                }
                if let (Some(found), Some(right)) = (beside.texts, &of_whole.texts) {
                    assert_close(found, right.clone(), "texts");
                }
                let found = passes.input_gradient(images.clone(), &objective);
                assert_close(found, slope.clone(), "images");
            }
        }
    }
}
