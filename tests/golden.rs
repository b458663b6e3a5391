//! Compares our results with recorded results of timm, PyTorch and torchattacks.
//!
//! `tests/golden/make_golden.py` records them; `tests/golden/README.md` lists the tensors.
//! Tolerances are relative to the largest entry of a tensor: f32 sums of up to a few hundred terms
//! differ by about 1e-6 of it between two orders of summation.

use std::path::{Path, PathBuf};

use advxl::attack::threat::Ball;
use advxl::attack::{Norm, Pgd, Start, input_gradient};
use advxl::distributed::Comm;
use advxl::loss::{Targets, contrastive, cross_entropy};
use advxl::model::{Model, Pass, position};
use advxl::objective::{
    BatchLoss, ContrastiveLoss, LabelLoss, Microbatches, Objective, Views, WeightedLoss, named,
};
use advxl::ops as fused;
use advxl::ops::{Device, Gelu, Numerics, Precision, from_vec, to_vec};
use advxl::optim;
use advxl::optim::{AverageConfig, Now, Optimizer, OptimizerConfig, OptimizerKind, Rule};
use advxl::recipe::ObjectiveConfig;
use advxl::settings;
use advxl::settings::{Field, Key};
use advxl::weights::import as weights;
use burn::tensor::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    std::fs::read(path).unwrap()
}

fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
}

fn labels(tensors: &SafeTensors) -> Vec<u32> {
    let data: Vec<i64> = bytemuck::pod_collect_to_vec(tensors.tensor("labels").unwrap().data());
    data.into_iter().map(|label| label as u32).collect()
}

/// Asserts that two lists agree within `tolerance` times the largest entry of `right`.
#[track_caller]
fn assert_close(found: &[f32], right: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), right.len(), "{what}");
    let largest = right
        .iter()
        .fold(1e-6f32, |most, value| most.max(value.abs()));
    for (index, (found, right)) in found.iter().zip(right).enumerate() {
        let off = (found - right).abs() / largest;
        assert!(
            off <= tolerance,
            "{what} [{index}]: {found} is not {right}, off by {off:e}"
        );
    }
}

/// Loads a recorded model from a folder with timm's layout, as users' models are loaded.
fn model(tensors: &SafeTensors, name: &str, architecture: &str, folder: &Path) -> Model {
    let prefix = format!("{name}.");
    let all = tensors.tensors();
    let views: Vec<(String, TensorView)> = all
        .into_iter()
        .filter_map(|(name, view)| {
            name.strip_prefix(&prefix)
                .map(|name| (name.to_owned(), view))
        })
        .collect();
    let folder: PathBuf = folder.join(name);
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(
        folder.join("model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
    // The weights of a ConvNeXt with a convolutional stem do not determine its patch size.
    let patch = match architecture.starts_with("convnext") {
        true => r#", "patch_size": 1"#,
        false => "",
    };
    let config = format!(
        r#"{{ "architecture": "{architecture}", "model_args": {{ "num_heads": 3{patch} }},
        "pretrained_cfg": {{ "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 16, 16] }} }}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    weights::load(&folder, &Device::cpu()).unwrap().model
}

/// Compares logits, loss, and the gradients of images and weights with the recorded ones.
fn check_model(tensors: &SafeTensors, name: &str, model: &Model, weights: bool) {
    let images = from_vec(floats(tensors, "images"), [4, 3, 16, 16], &Device::cpu());
    let targets = Targets::classes(&labels(tensors)).distributions(5, 0.1, &Device::cpu());
    let recorded = |what: &str| floats(tensors, &format!("{name}_{what}"));
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
        let pass = Pass {
            numerics: precision.into(),
            ..Pass::evaluation()
        };
        let logits = to_vec(model.logits(images.clone(), &pass));
        let what = format!("{name} {precision:?}");
        assert_close(&logits, &recorded("logits"), tolerance, &what);

        // The gradient of the mean loss is a quarter of that of the sum, for four images.
        let loss = |images| cross_entropy(model.logits(images, &pass), targets.clone()) / 4.0;
        let (gradient, losses) = input_gradient(&loss, images.clone());
        let loss: f32 = to_vec(losses).iter().sum();
        assert_close(&[loss], &recorded("loss"), tolerance, &what);
        let tolerance = 10.0 * tolerance;
        let gradient = to_vec(gradient);
        assert_close(&gradient, &recorded("image_gradient"), tolerance, &what);
        if !weights {
            continue;
        }
        let tracked = model.tracked();
        let loss = cross_entropy(tracked.logits(images.clone(), &pass), targets.clone()).mean();
        let gradients = tracked.gradients(&mut loss.backward());
        for (parameter, gradient) in model.parameters().iter().zip(gradients) {
            let right = recorded(&format!("gradient.{}", parameter.name));
            let what = format!("{what} {}", parameter.name);
            assert_close(&to_vec(gradient), &right, tolerance, &what);
        }
    }
}

#[test]
fn logits_and_all_gradients_of_a_vision_transformer_match_timm() {
    let bytes = golden("vit.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for pool in ["token", "avg"] {
        let model = model(&tensors, pool, "vit_tiny_patch16_224", folder.path());
        check_model(&tensors, pool, &model, true);
    }
}

#[test]
fn logits_and_all_gradients_of_a_convnext_and_of_convolutional_stems_match_timm_and_pytorch() {
    let bytes = golden("models.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, architecture, weights) in [
        ("convnext", "convnext_tiny", true),
        // With products written as 1 x 1 convolutions.
        ("products", "convnext_atto", false),
        ("convnext_stem", "convnext_tiny", true),
        ("vit_stem", "vit_tiny_patch16_224", true),
    ] {
        let model = model(&tensors, name, architecture, folder.path());
        check_model(&tensors, name, &model, weights);
    }
}

#[test]
fn tanh_gelu_matches_pytorch() {
    let bytes = golden("vit.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu();
    let mut model = model(&tensors, "avg", "vit_tiny_patch16_224", folder.path());
    let Model::Vit(vit) = &mut model else {
        panic!("expected a transformer");
    };
    vit.config.gelu = Gelu::Tanh;
    let images = from_vec(floats(&tensors, "images"), [4, 3, 16, 16], &device);
    let targets = Targets::classes(&labels(&tensors)).distributions(5, 0.1, &device);
    let pass = Pass::evaluation();
    let logits = to_vec(model.logits(images.clone(), &pass));
    assert_close(&logits, &floats(&tensors, "tanh_logits"), 1e-5, "logits");
    let loss = |images| cross_entropy(model.logits(images, &pass), targets.clone()) / 4.0;
    let gradient = to_vec(input_gradient(&loss, images).0);
    assert_close(
        &gradient,
        &floats(&tensors, "tanh_image_gradient"),
        1e-4,
        "image gradient",
    );
    // It differs from the exact GELU.
    let exact = floats(&tensors, "avg_logits");
    assert!(logits.iter().zip(&exact).any(|(a, b)| (a - b).abs() > 1e-4));
}

#[test]
fn fixed_positions_match_mae_and_learned_ones_are_resampled_as_in_timm() {
    let bytes = golden("position.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for grid in [4, 7] {
        let right = floats(&tensors, &format!("sincos_{grid}x{grid}"));
        // The recorded tensor starts with the zeros of the class token.
        assert_close(
            &position::sincos2d(grid, grid, 24),
            &right[24..],
            1e-6,
            "sincos",
        );
    }
    let learned = floats(&tensors, "learned_4x4")[8..].to_vec();
    for to in [7, 2, 3] {
        let right = floats(&tensors, &format!("learned_4x4_to_{to}x{to}"));
        let found = position::resampled(&learned, 4, to);
        assert_close(&found, &right[8..], 1e-5, &format!("resampled to {to}"));
    }
}

#[test]
fn updates_clipping_and_average_match_pytorch() {
    let bytes = golden("adamw.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let device = Device::cpu();
    let rates = floats(&tensors, "learning_rates");
    let norms = floats(&tensors, "gradient_norms");
    let tensor = |values: &[f32]| from_vec(values.to_vec(), [values.len()], &device);
    let names = ["weight", "bias"];
    let mut values: Vec<Tensor<1>> = names
        .iter()
        .map(|name| tensor(&floats(&tensors, name)))
        .collect();
    let config = OptimizerConfig {
        kind: OptimizerKind::Adamw,
        weight_decay: 0.05,
        betas: [0.9, 0.95],
        clip_norm: Some(1.0),
        layer_decay: None,
        head_rate: 1.0,
    };
    let average = AverageConfig { decay: 0.9 };
    let refs: Vec<_> = values.iter().collect();
    // The recorded average has no warmup, so start after the warmup ends.
    let mut optimizer = Optimizer::new(&config, Some(&average), &refs, None, 1000);
    for step in 0..rates.len() {
        let gradients: Vec<_> = names
            .iter()
            .zip(&values)
            .map(|(name, value)| {
                let all = floats(&tensors, &format!("{name}_gradients"));
                let length = value.dims()[0];
                tensor(&all[step * length..(step + 1) * length])
            })
            .collect();
        let norm = optim::norm(&gradients);
        assert_close(&[norm as f32], &norms[step..=step], 1e-6, "norm");
        let rules = [true, false].map(|decays| Rule { decays, rate: 1.0 });
        let now = Now {
            norm,
            learning_rate: f64::from(rates[step]),
            rounded: false,
        };
        optimizer.update(values.iter_mut().collect(), &rules, gradients, &now);
        for (index, name) in names.iter().enumerate() {
            let found = to_vec(values[index].clone());
            let at = step * found.len()..(step + 1) * found.len();
            let right = &floats(&tensors, &format!("{name}_after"))[at.clone()];
            assert_close(&found, right, 1e-6, &format!("{name} after step {step}"));
            let averaged = to_vec(optimizer.moments[index].average.clone().unwrap());
            let right = &floats(&tensors, &format!("{name}_ema_after"))[at];
            assert_close(
                &averaged,
                right,
                1e-6,
                &format!("average of {name} after step {step}"),
            );
        }
    }
}

#[test]
fn the_iterates_of_pgd_match_torchattacks() {
    let bytes = golden("pgd.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let vit = golden("vit.safetensors");
    let vit = SafeTensors::deserialize(&vit).unwrap();
    let model = model(&vit, "token", "vit_tiny_patch16_224", folder.path());
    let device = Device::cpu();
    let clean = from_vec(floats(&tensors, "images"), [4, 3, 16, 16], &device);
    let targets = Targets::classes(&labels(&tensors)).distributions(5, 0.0, &device);
    let loss = |images| cross_entropy(model.logits(images, &Pass::evaluation()), targets.clone());
    for (norm, epsilon, step_size) in [(Norm::Linf, "8/255", "2/255"), (Norm::L2, "0.5", "0.2")] {
        let after = floats(&tensors, &format!("{}_after", norm.word()));
        for steps in 1..=5 {
            let attack = Pgd {
                norm,
                epsilon: epsilon.parse().unwrap(),
                step_size: step_size.parse().unwrap(),
                steps,
                start: Start::Clean,
            };
            let found = to_vec(attack.perturb(clean.clone(), &loss, 0, &[0, 1, 2, 3]));
            let right = &after[(steps as usize - 1) * found.len()..][..found.len()];
            let what = format!("{} after step {steps}", norm.word());
            assert_close(&found, right, 1e-5, &what);
        }
    }
}

#[test]
fn mixed_and_smoothed_cross_entropy_matches_timm() {
    let bytes = golden("loss.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let device = Device::cpu();
    let labels = labels(&tensors);
    let second: Vec<u32> = labels.iter().rev().copied().collect();
    let targets = Targets {
        first: labels,
        second,
        weight: floats(&tensors, "weights"),
    };
    let goal = targets.distributions(7, 0.1, &device);
    assert_close(
        &to_vec(goal.clone()),
        &floats(&tensors, "targets"),
        1e-6,
        "targets",
    );
    let logits = from_vec(floats(&tensors, "logits"), [6, 7], &device)
        .autodiff()
        .require_grad();
    let values = cross_entropy(logits.clone(), goal);
    let found = to_vec(values.clone().without_autodiff());
    assert_close(&found, &floats(&tensors, "values"), 1e-6, "values");
    let mut gradients = values.mean().backward();
    let gradient = fused::to_vec(logits.grad_remove(&mut gradients).unwrap());
    assert_close(&gradient, &floats(&tensors, "gradient"), 1e-6, "gradient");
}

#[test]
fn the_contrastive_loss_and_its_gradients_match_pytorch_in_f64() {
    let bytes = golden("contrastive.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tracked = |name: &str| {
        let values: Tensor<2> = from_vec(floats(&tensors, name), [6, 5], &Device::cpu());
        values.autodiff().require_grad()
    };
    let (images, texts) = (tracked("images"), tracked("texts"));
    let log_scale: Tensor<1> = from_vec(floats(&tensors, "log_scale"), [1], &Device::cpu());
    let log_scale = log_scale.autodiff().require_grad();
    let loss = contrastive(images.clone(), texts.clone(), log_scale.clone()).mean();
    assert_close(
        &to_vec(loss.clone()),
        &floats(&tensors, "loss"),
        1e-6,
        "loss",
    );
    let mut gradients = loss.backward();
    for (name, tensor) in [("image_gradient", images), ("text_gradient", texts)] {
        let found = to_vec(tensor.grad_remove(&mut gradients).unwrap());
        assert_close(&found, &floats(&tensors, name), 1e-5, name);
    }
    let found = to_vec(log_scale.grad_remove(&mut gradients).unwrap());
    assert_close(
        &found,
        &floats(&tensors, "log_scale_gradient"),
        1e-5,
        "log_scale",
    );
}

/// An objective of `make_objectives.py`, with its numbers.
fn objective(name: &str) -> ObjectiveConfig {
    let toml = match name {
        "trades" => "kind = \"trades\"\nbeta = 6",
        "tecoa" => "kind = \"tecoa\"\nscale = 20",
        "advflyp" => "kind = \"advflyp\"\nfeatures = 1\nlogits = 0.5\nscale = 20",
        "deacl" => "kind = \"deacl\"\ngamma = 2",
        // A share of 0.2.
        "gradient_norm" => "kind = \"gradient_norm\"\nweight = 2e-3\nstep = \"1/100\"",
        name => &format!("kind = \"{name}\""),
    };
    let text = format!("[objective]\n{toml}\n");
    let key = Key::of::<ObjectiveConfig>("objective", "");
    let read = settings::read(&text, &[], |table| ObjectiveConfig::read(table, &key));
    read.map_err(|problems| format!("{problems:?}")).unwrap()
}

#[test]
fn the_terms_of_every_objective_and_their_gradients_match_pytorch() {
    let bytes = golden("objectives.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let device = Device::cpu();
    let tensor = |name: &str, rows| from_vec(floats(&tensors, name), [rows, 5], &device);
    let all_labels = labels(&tensors);
    for name in [
        "trades",
        "fare",
        "tecoa",
        "sim_clip",
        "advflyp",
        "deacl",
        "gradient_norm",
    ] {
        let config = objective(name);
        let [terms, attack] = named::terms(&config).unwrap();
        let classes = if name == "tecoa" { 4 } else { 5 };
        let of_classes: Vec<u32> = all_labels.iter().map(|label| label % classes).collect();
        let targets = Targets::classes(&of_classes);
        let log_scale = from_vec(vec![20f32.ln()], [1], &device);
        let loss = WeightedLoss {
            terms,
            attack,
            labels: config
                .uses_labels()
                .then(|| LabelLoss::new(&targets, classes as usize, 0.1, &device)),
            classes: (name == "tecoa").then(|| (tensor("classes", 4), 20.0)),
            captions: config
                .uses_captions()
                .then(|| ContrastiveLoss::new(tensor("captions", 6), log_scale, None)),
            reference: ["reference_clean", "reference_adversarial"]
                .map(|name| Some(tensor(name, 6))),
        };
        assert_eq!(
            loss.uses_clean_images(),
            config.uses_clean_images(),
            "{name}"
        );
        let adversarial = tensor("adversarial", 6).autodiff().require_grad();
        let clean = tensor("clean", 6).autodiff().require_grad();
        let views = Views {
            adversarial: adversarial.clone(),
            clean: Some(clean.clone()),
        };
        let of_attack = loss.attack_losses(adversarial.clone());
        for (what, losses) in [("", loss.losses(views)), ("_attack", of_attack)] {
            let value = losses.mean();
            let mut found = value.clone().backward();
            let value = to_vec(value.without_autodiff());
            let recorded = floats(&tensors, &format!("{name}{what}_loss"));
            assert_close(&value, &recorded, 1e-5, &format!("{name}{what}"));
            for (output, key) in [(&adversarial, "adversarial"), (&clean, "clean")] {
                let key = format!("{name}{what}_gradient_{key}");
                let gradient = output.grad_remove(&mut found).map(to_vec);
                match tensors.tensor(&key) {
                    Ok(_) => {
                        assert_close(&gradient.unwrap(), &floats(&tensors, &key), 1e-5, &key);
                    }
                    Err(_) => assert!(gradient.is_none_or(|all| all.iter().all(|x| *x == 0.0))),
                }
            }
        }
    }
}

/// The attack's gradient, the update's gradients and the new weights.
#[test]
fn an_update_of_trades_and_one_of_fare_match_pytorch() {
    let recorded = golden("updates.safetensors");
    let recorded = SafeTensors::deserialize(&recorded).unwrap();
    let vit = golden("vit.safetensors");
    let vit = SafeTensors::deserialize(&vit).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (device, comm) = (Device::cpu(), Comm::single());
    let mut model = model(&vit, "avg", "vit_tiny_patch16_224", folder.path());
    let frozen = model.clone();
    let scaled = frozen.parameters().into_iter();
    let scaled: Vec<_> = scaled.map(|part| part.value.clone() * 1.05).collect();
    let frozen = frozen.with_values(scaled);
    let images = from_vec(floats(&vit, "images"), [4, 3, 16, 16], &device);
    let start = from_vec(floats(&recorded, "start"), [4, 3, 16, 16], &device);
    let original = model.clone();
    for name in ["trades", "fare"] {
        model = original.clone();
        let config = objective(name);
        // Microbatches of 3 and 1, to cover the narrowing of references and labels.
        let microbatches = Microbatches {
            numerics: Numerics::F32,
            attack_numerics: Numerics::F32,
            recompute: false,
            kept: None,
            size: Some(3),
            shards: 1,
        };
        let reference = match name {
            "trades" => microbatches.own_outputs(&model, &images),
            _ => microbatches.reference_outputs(&frozen, &images),
        };
        let [terms, attack] = named::terms(&config).unwrap();
        let loss = WeightedLoss {
            terms,
            attack,
            labels: config
                .uses_labels()
                .then(|| LabelLoss::new(&Targets::classes(&labels(&vit)), 5, 0.1, &device)),
            reference: [Some(reference), None],
            ..WeightedLoss::default()
        };
        let objective = Objective::new(Box::new(loss), microbatches, &comm);
        let gradient = objective.ascent(&model, start.clone()).0;
        let right = floats(&recorded, &format!("{name}_input_gradient"));
        assert_close(&to_vec(gradient.clone()), &right, 1e-4, name);
        let ball = Ball::new(Norm::Linf, 8.0 / 255.0, images.clone());
        let adversarial = ball.step(start.clone(), gradient, &[(4.0 / 255.0) as f32; 4]);
        let right = floats(&recorded, &format!("{name}_adversarial"));
        assert_close(&to_vec(adversarial.clone()), &right, 1e-6, name);
        let views = Views {
            adversarial,
            clean: objective.uses_clean_images().then(|| images.clone()),
        };
        let step = objective.gradients(&model, views, 4, None, || ());
        let loss = step.losses.iter().sum::<f64>() / 4.0;
        let right = floats(&recorded, &format!("{name}_loss"));
        assert_close(&[loss as f32], &right, 1e-5, name);
        let names: Vec<String> = model
            .parameters()
            .iter()
            .map(|part| part.name.clone())
            .collect();
        for (part, gradient) in names.iter().zip(&step.gradients) {
            let right = floats(&recorded, &format!("{name}_gradient.{part}"));
            // Gradients of the keys' biases are zero in exact arithmetic.
            let most = right
                .iter()
                .fold(1e-4f32, |most, value| most.max(value.abs()));
            for (found, right) in to_vec(gradient.clone()).iter().zip(&right) {
                assert!(
                    (found - right).abs() <= 1e-5 * most.max(0.1),
                    "{name} {part}: {found} {right}"
                );
            }
        }
        let adamw = OptimizerConfig {
            kind: OptimizerKind::Adamw,
            weight_decay: 0.0,
            betas: [0.9, 0.95],
            clip_norm: None,
            layer_decay: None,
            head_rate: 1.0,
        };
        let weights: Vec<_> = model.parameters().iter().map(|part| &part.value).collect();
        let mut optimizer = Optimizer::new(&adamw, None, &weights, None, 0);
        let rules = vec![
            Rule {
                decays: false,
                rate: 1.0
            };
            names.len()
        ];
        let now = Now {
            norm: 1.0,
            learning_rate: 1e-3,
            rounded: false,
        };
        let recorded_gradients: Vec<_> = names
            .iter()
            .map(|part| floats(&recorded, &format!("{name}_gradient.{part}")))
            .collect();
        let mut parameters = model.parameters_mut();
        let values = parameters.iter_mut().map(|part| &mut part.value).collect();
        optimizer.update(values, &rules, step.gradients, &now);
        for ((part, parameter), gradient) in
            names.iter().zip(model.parameters()).zip(recorded_gradients)
        {
            let right = floats(&recorded, &format!("{name}.{part}"));
            for ((found, right), gradient) in to_vec(parameter.value.clone())
                .iter()
                .zip(&right)
                .zip(gradient)
            {
                // Adam divides by the gradient's size: where that is rounding, the direction is too.
                if gradient.abs() > 1e-5 {
                    assert!(
                        (found - right).abs() <= 1e-5,
                        "{name} {part}: {found} {right}"
                    );
                }
            }
        }
    }
}
