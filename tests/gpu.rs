//! Compares a GPU with the CPU: models, attacks, training and evaluation.
//!
//! `cargo test` runs it on the CUDA engine's software GPU, which compiles the same kernels with `c++`;
//! `scripts/test-gpu` runs it on a real GPU or another backend, named by `ADVXL_TEST_DEVICE`. Tolerances are for f32:
//! sums of a few hundred products in another order, and other implementations of functions such as `exp`.

mod support;

use std::path::Path;
use std::time::Instant;

use advxl::attack::{Norm, Pgd, Start, input_gradient};
use advxl::bench;
use advxl::bench::StepWork;
use advxl::data::{Batch, Mixing, Planes};
use advxl::distributed::Comm;
use advxl::loss::{Targets, cross_entropy, unit_length};
use advxl::model::tokens::MaskingKind;
use advxl::model::{DropPath, Masking, Model, ModelConfig, Pass};
use advxl::objective::contrastive::TowerPasses;
use advxl::objective::weighted::{Point, Space, Term, TermKind, View};
use advxl::objective::{ContrastiveLoss, LabelLoss, Microbatches, Objective, Views, WeightedLoss};
use advxl::ops::{
    BlockSpec, BlockWeights, Device, DeviceName, Gelu, Numerics, Precision, RowDistance,
    WeightCache, encoder_block, from_vec, gelu, layer_norm, linear, to_vec, usable,
};
use advxl::plan::GPU_CONTEXT;
use advxl::recipe::Recipe;
use advxl::rng::{Rng, Stream};
use advxl::text::{TextConfig, TextPool, TextTower};
use advxl_cuda::Gpu;
use burn::tensor::Tensor;
use serde_json::{Value, json};
use support::{RECIPE, trained};

const SIZE: usize = 16;
const CLASSES: usize = 10;
const BATCH: usize = 4;

/// The folder with the software GPU's kernels.
const KERNELS: &str = env!("CARGO_TARGET_TMPDIR");

fn name() -> String {
    std::env::var("ADVXL_TEST_DEVICE").unwrap_or_else(|_| "cuda".into())
}

fn gpu() -> Device {
    match std::env::var("ADVXL_TEST_DEVICE") {
        Err(_) => Device::Cuda(Gpu::soft(Path::new(KERNELS))),
        Ok(name) => name.parse::<DeviceName>().unwrap().open(0).unwrap().device,
    }
}

/// Runs the program, with the software GPU unless `ADVXL_TEST_DEVICE` names another device.
fn advxl(arguments: &[&str]) -> (i32, String) {
    let mut command = support::command(arguments);
    if std::env::var_os("ADVXL_TEST_DEVICE").is_none() {
        command.env("ADVXL_CUDA_SOFTWARE", KERNELS);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Returns the largest difference, relative to the largest value of `right`.
fn off(found: &[f32], right: &[f32]) -> f32 {
    assert_eq!(found.len(), right.len());
    let most =
        |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |most, v| most.max(v.abs()));
    let difference = most(&mut found.iter().zip(right).map(|(a, b)| a - b));
    assert!(found.iter().all(|value| value.is_finite()));
    difference / most(&mut right.iter().copied()).max(1e-12)
}

/// Returns the model of the small recipe, and a small ConvNeXt.
fn configs() -> [ModelConfig; 2] {
    let vit = Recipe::parse(RECIPE, &[]).unwrap().model;
    let mut convnext = ModelConfig::named("convnext_atto").unwrap();
    if let ModelConfig::ConvNext(config) = &mut convnext {
        (config.widths, config.depths) = ([8, 16, 24, 32], [1, 1, 2, 1]);
    }
    [vit, convnext]
}

/// Returns logits, image gradient and weight gradients of a model on a device.
fn results(config: &ModelConfig, size: usize, pass: &Pass, device: &Device) -> [Vec<f32>; 3] {
    let model = Model::new(config, CLASSES, size, 1, device);
    let mut rng = Rng::new(5, Stream::Bench);
    let pixels = (0..BATCH * 3 * size * size)
        .map(|_| rng.uniform())
        .collect();
    let images: Tensor<4> = from_vec(pixels, [BATCH, 3, size, size], device);
    let goal = Targets::classes(&[0, 3, 9, 3]).distributions(CLASSES, 0.1, device);
    let loss = |images| cross_entropy(model.logits(images, pass), goal.clone());
    let (gradient, _) = input_gradient(&loss, images.clone());
    let tracked = model.tracked();
    let climbed = cross_entropy(tracked.logits(images.clone(), pass), goal.clone()).mean();
    let weights = tracked.gradients(&mut climbed.backward());
    [
        to_vec(model.logits(images, pass)),
        to_vec(gradient),
        weights.into_iter().flat_map(to_vec).collect(),
    ]
}

#[test]
fn logits_and_gradients_match_the_cpu_with_and_without_recomputation() {
    let device = gpu();
    let mut bad = false;
    for (config, size) in configs().iter().zip([SIZE, 32]) {
        for recompute in [false, true] {
            let pass = Pass {
                recompute,
                drop_path: Some(DropPath {
                    rate: 0.3,
                    seed: 1,
                    position: 0,
                }),
                ..Pass::evaluation()
            };
            let found = results(config, size, &pass, &device);
            let right = results(config, size, &pass, &Device::cpu());
            for (what, (found, right)) in ["logits", "images", "weights"]
                .iter()
                .zip(found.iter().zip(&right))
            {
                let off = off(found, right);
                eprintln!(
                    "{} {what}, recompute {recompute}: off by {off:e}",
                    config.size()
                );
                bad |= off >= 2e-5;
            }
        }
    }
    assert!(!bad);
}

#[test]
fn bf16_is_close_to_f32_on_devices_that_support_it() {
    let device = gpu();
    if usable(Precision::Bf16, &device).0 != Precision::Bf16 {
        eprintln!("this device does not compute in bf16");
        return;
    }
    let [config, _] = configs();
    let pass = |precision: Precision| Pass {
        numerics: precision.into(),
        ..Pass::evaluation()
    };
    let found = results(&config, SIZE, &pass(Precision::Bf16), &device);
    let right = results(&config, SIZE, &pass(Precision::F32), &device);
    for (found, right) in found.iter().zip(&right) {
        // Eight bits of precision, through two blocks.
        let off = off(found, right);
        assert!(off > 0.0 && off < 5e-2, "{off:e}");
    }
}

/// Returns the image gradient in the precision of a pass.
fn image_gradient(config: &ModelConfig, pass: &Pass, device: &Device) -> Vec<f32> {
    let model = Model::new(config, CLASSES, SIZE, 1, device);
    let images: Tensor<4> = drawn(5, [BATCH, 3, SIZE, SIZE], device);
    let goal = Targets::classes(&[0, 3, 9, 3]).distributions(CLASSES, 0.1, device);
    let loss = |images| cross_entropy(model.logits(images, pass), goal.clone());
    to_vec(input_gradient(&loss, images).0)
}

#[test]
fn bf16_attacks_are_close_to_f32_and_fp8_attacks_to_the_cpu_emulation() {
    let (device, cpu) = (gpu(), Device::cpu());
    let [config, _] = configs();
    let pass = |numerics, recompute| Pass {
        numerics,
        recompute,
        ..Pass::evaluation()
    };
    let cosine = |a: &[f32], b: &[f32]| {
        let sum = |a: &[f32], b: &[f32]| {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum::<f64>()
        };
        sum(a, b) / (sum(a, a) * sum(b, b)).sqrt()
    };
    let right = image_gradient(&config, &pass(Numerics::F32, false), &cpu);
    let bf16 = image_gradient(&config, &pass(Numerics::AttackBf16, false), &device);
    let near = cosine(&bf16, &right);
    assert!((0.9995..1.0).contains(&near), "bf16: {near}");
    let emulated = image_gradient(&config, &pass(Numerics::AttackFp8, false), &cpu);
    let fp8 = image_gradient(&config, &pass(Numerics::AttackFp8, false), &device);
    let (near, same) = (cosine(&fp8, &right), cosine(&fp8, &emulated));
    // Both round the same operands; where sums differ in their last bits, an operand may round to the next number.
    assert!(
        near > 0.98 && same > 0.998 && same > near,
        "fp8: {near}, {same}"
    );
    for (numerics, kept) in [(Numerics::AttackBf16, bf16), (Numerics::AttackFp8, fp8)] {
        let recomputed = image_gradient(&config, &pass(numerics, true), &device);
        assert!(recomputed == kept, "{numerics:?}, recomputed");
    }
}

#[test]
fn a_pgd_step_moves_in_the_same_direction() {
    let step = |norm, device: &Device| {
        let [config, _] = configs();
        let model = Model::new(&config, CLASSES, SIZE, 1, device);
        let mut rng = Rng::new(6, Stream::Bench);
        let pixels = (0..BATCH * 3 * SIZE * SIZE)
            .map(|_| rng.uniform())
            .collect();
        let images: Tensor<4> = from_vec(pixels, [BATCH, 3, SIZE, SIZE], device);
        let goal = Targets::classes(&[1, 2, 3, 4]).distributions(CLASSES, 0.0, device);
        let epsilon = if norm == Norm::Linf { "8/255" } else { "0.5" };
        let attack = Pgd {
            norm,
            epsilon: epsilon.parse().unwrap(),
            step_size: epsilon.parse().unwrap(),
            steps: 1,
            start: Start::Random,
        };
        let loss = |images| cross_entropy(model.logits(images, &Pass::evaluation()), goal.clone());
        to_vec(attack.perturb(images, &loss, 3, &[0, 1, 2, 3]))
    };
    let device = gpu();
    for norm in [Norm::Linf, Norm::L2] {
        let (found, right) = (step(norm, &device), step(norm, &Device::cpu()));
        let moved = found
            .iter()
            .zip(&right)
            .filter(|(a, b)| (**a - **b).abs() > 1e-5);
        // The sign of a gradient close to zero is random.
        assert!(moved.count() * 1000 <= found.len(), "{norm:?}");
    }
}

/// Returns the gradients of the contrastive objective with a trainable text tower, with or without microbatches and
/// masking: first of the images, then of all parameters.
fn of_captions(size: Option<usize>, masked: bool, device: &Device) -> Vec<Vec<f32>> {
    let [config, _] = configs();
    let (model, comm) = (Model::new(&config, 24, SIZE, 1, device), Comm::single());
    let config = TextConfig {
        context: 7,
        vocabulary: 20,
        width: 32,
        heads: 2,
        depth: 2,
        hidden: 64,
        embedding: 24,
        causal: true,
        pool: TextPool::GreatestId,
        gelu: Gelu::Quick,
        eps: 1e-5,
    };
    let tower = TextTower::new(&config, 5, device).unwrap().tracked();
    let ids: Vec<u32> = (0..6u32)
        .flat_map(|row| [1, 2 + row, 4, 19, 0, 0, 0])
        .collect();
    let texts = unit_length(tower.encode(&ids).unwrap());
    let constant = texts.clone().without_autodiff();
    let scale = from_vec(vec![2.0], [1], device);
    let passes = TowerPasses(vec![(tower, texts)]);
    let loss = ContrastiveLoss::new(constant, scale, Some(passes));
    let kind = MaskingKind::Random;
    let masking = masked.then_some(Masking { kind, ratio: 0.5 });
    let microbatches = Microbatches {
        numerics: Precision::F32.into(),
        attack_numerics: Precision::F32.into(),
        recompute: false,
        kept: masking.map(|masking| masking.choose(2, 0, 6, SIZE / 4)),
        size,
        shards: 1,
    };
    let objective = Objective::new(Box::new(loss), microbatches, &comm);
    let images: Tensor<4> = drawn(7, [6, 3, SIZE, SIZE], device);
    let of_images = objective.ascent(&model, images.clone()).0;
    let found = objective.gradients(&model, Views::adversarial(images), 6, None, || ());
    let losses: Vec<f32> = found.losses.iter().map(|loss| *loss as f32).collect();
    let parameters = found.gradients.into_iter().map(to_vec);
    [losses, to_vec(of_images)]
        .into_iter()
        .chain(parameters)
        .collect()
}

#[test]
fn gradients_of_captions_match_the_cpu_and_stay_on_the_gpu() {
    let device = gpu();
    for (size, masked) in [(None, false), (Some(4), true)] {
        let before = device.gpu().map(|gpu| gpu.traffic().unplanned);
        let found = of_captions(size, masked, &device);
        assert_eq!(device.gpu().map(|gpu| gpu.traffic().unplanned), before);
        let right = of_captions(size, masked, &Device::cpu());
        for (index, (found, right)) in found.iter().zip(&right).enumerate() {
            let off = off(found, right);
            assert!(off < 2e-5, "{index}: off by {off:e}");
        }
    }
}

/// Objectives with clean images, a reference and labels (TRADES), embeddings (DeACL), or embedded class names.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Weighted {
    Trades,
    Deacl,
    Names,
}

/// Losses of an objective: the gradient of the images and those of the weights.
fn of_objective(case: Weighted, device: &Device) -> Vec<Vec<f32>> {
    let [config, _] = configs();
    let model = Model::new(&config, CLASSES, SIZE, 1, device);
    let images: Tensor<4> = drawn(7, [BATCH, 3, SIZE, SIZE], device);
    let term = |weight, kind| Term { weight, kind };
    let distance = |kind, from, to| TermKind::Distance(kind, from, to, Space::Outputs);
    let (adversarial, clean) = (Point::Output(View::Adversarial), Point::Output(View::Clean));
    let reference = Point::Reference(View::Clean);
    let (kind, first) = match case {
        Weighted::Trades => (RowDistance::Kl, TermKind::CrossEntropy(View::Clean)),
        Weighted::Deacl => (
            RowDistance::Cosine,
            distance(RowDistance::Cosine, clean, reference),
        ),
        Weighted::Names => (RowDistance::L2, TermKind::CrossEntropy(View::Adversarial)),
    };
    let microbatches = Microbatches {
        numerics: Numerics::F32,
        attack_numerics: Numerics::F32,
        recompute: false,
        kept: None,
        size: Some(3),
        shards: 1,
    };
    let labels = Targets::classes(&[1, 3, 0, 7]);
    let loss = WeightedLoss {
        terms: vec![
            term(1.0, first),
            term(2.0, distance(kind, adversarial, clean)),
        ],
        attack: vec![term(1.0, distance(kind, adversarial, reference))],
        labels: (case != Weighted::Deacl).then(|| LabelLoss::new(&labels, CLASSES, 0.1, device)),
        classes: (case == Weighted::Names)
            .then(|| (unit_length(drawn(9, [CLASSES, CLASSES], device)), 10.0)),
        reference: [Some(microbatches.own_outputs(&model, &images)), None],
        ..WeightedLoss::default()
    };
    let comm = Comm::single();
    let objective = Objective::new(Box::new(loss), microbatches, &comm);
    // Far from the clean images: small divergences lose digits to cancellation.
    let moved: Tensor<4> = drawn(8, [BATCH, 3, SIZE, SIZE], device);
    let unplanned = || device.gpu().map(|gpu| gpu.traffic().unplanned);
    let before = unplanned();
    let (gradient, losses) = objective.ascent(&model, moved.clone());
    let views = Views {
        adversarial: moved,
        clean: Some(images),
    };
    let step = objective.gradients(&model, views, BATCH, None, || ());
    assert_eq!(unplanned(), before, "{case:?}");
    let mut all = vec![to_vec(gradient), to_vec(losses)];
    all.extend(step.gradients.into_iter().map(to_vec));
    all
}

#[test]
fn objectives_with_a_reference_match_the_cpu() {
    for case in [Weighted::Trades, Weighted::Deacl, Weighted::Names] {
        let found = of_objective(case, &gpu());
        let right = of_objective(case, &Device::cpu());
        assert_eq!(found.len(), right.len());
        for (index, (found, right)) in found.iter().zip(&right).enumerate() {
            let off = off(found, right);
            assert!(off < 1e-4, "{case:?} {index}: off by {off:e}");
        }
    }
}

/// Returns samples and losses from the metrics of a run.
fn losses(run: &Path) -> Vec<(f64, f64)> {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let found =
        lines.filter_map(|line| Some((line["loss"].as_f64()?, line["gradient_norm"].as_f64()?)));
    found.collect()
}

#[test]
fn ten_updates_give_the_same_losses_and_the_run_resumes_on_the_other_device() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = support::write_recipe(folder.path());
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let train = |name: &str, device: &str| {
        let out = folder.path().join(name);
        let begun = Instant::now();
        let (code, text) = advxl(&[
            "train",
            &text(&recipe),
            "--out",
            &text(&out),
            "--device",
            device,
            "--set",
            "evaluation=none",
        ]);
        assert_eq!(code, 0, "{text}");
        eprintln!("{device}: {:.0} s", begun.elapsed().as_secs_f64());
        out
    };
    let (found, right) = (train("gpu", &name()), train("cpu", "cpu"));
    let (found_losses, right) = (losses(&found), losses(&right));
    assert_eq!(found_losses.len(), right.len());
    assert!(right.len() >= 10);
    for (number, (found, right)) in found_losses.iter().zip(&right).enumerate() {
        // Attacks take signs, so differences grow from update to update.
        let tolerance = 1e-4 * f64::from(2u32.pow(number as u32));
        assert!(
            (found.0 / right.0 - 1.0).abs() < tolerance
                && (found.1 / right.1 - 1.0).abs() < 10.0 * tolerance,
            "update {number}: {found:?} {right:?}"
        );
    }
    // A checkpoint of one device can be resumed on the other.
    let elsewhere = folder.path().join("elsewhere");
    std::fs::create_dir_all(elsewhere.join("checkpoints")).unwrap();
    std::fs::create_dir_all(elsewhere.join("stages/pretrain")).unwrap();
    for file in [
        "recipe.toml",
        "checkpoints/000000000256.safetensors",
        "stages/pretrain/model.safetensors",
    ] {
        std::fs::copy(found.join(file), elsewhere.join(file)).unwrap();
    }
    let (code, text) = advxl(&[
        "train",
        &text(&recipe),
        "--out",
        &text(&elsewhere),
        "--device",
        "cpu",
        "--set",
        "evaluation=none",
    ]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("resuming after 256"), "{text}");
}

#[test]
fn evaluations_give_the_same_verdicts() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let evaluate = |device: &str| {
        let out = folder.path().join(device.replace(':', "-"));
        let (code, text) = advxl(&[
            "eval",
            run.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--data",
            "synthetic:24",
            "--attack",
            "autoattack",
            "--norm",
            "linf",
            "--eps",
            "2/255",
            "--steps",
            "5",
            "--targets",
            "2",
            "--queries",
            "20",
            "--device",
            device,
        ]);
        assert_eq!(code, 0, "{text}");
        let result = std::fs::read(out.join("result.json")).unwrap();
        let result: Value = serde_json::from_slice(&result).unwrap();
        ["clean_accuracy", "robust_accuracy"].map(|key| result[key].to_string())
    };
    assert_eq!(evaluate(&name()), evaluate("cpu"));
}

#[test]
fn bytes_and_mixed_images_arrive_unchanged() {
    let size = 8;
    let mut batch = Batch {
        images: Planes::Bytes(
            (0..6 * 3 * size * size)
                .map(|at| (at * 7 % 256) as u8)
                .collect(),
        ),
        first: (0..6).collect(),
        second: (0..6).collect(),
        weight: vec![1.0; 6],
        ..Batch::default()
    };
    let arrived = |batch: &Batch| to_vec(batch.to_device(size, &gpu()));
    assert_eq!(arrived(&batch), batch.pixels(size));
    for (mixup_alpha, cutmix_alpha) in [(Some(0.8), None), (None, Some(1.0))] {
        let mixing = Mixing {
            mixup_alpha,
            cutmix_alpha,
            probability: 1.0,
            switch_probability: None,
        };
        batch.mixed.clear();
        mixing.apply(&mut batch, 0..4, size, 1, 2);
        let off = off(&arrived(&batch), &batch.pixels(size));
        assert!(off < 2e-7, "{off:e}");
    }
}

#[test]
fn a_missing_device_is_named() {
    let (code, text) = advxl(&["bench", "step", "--device", &format!("{}:99", name())]);
    assert_eq!(code, 2, "{text}");
    assert!(
        text.contains(":99`: ") && text.contains("no such GPU"),
        "{text}"
    );
}

/// A training step reads only the loss, the gradient norm and the number of correct answers from the GPU, and an attack
/// reads nothing.
#[test]
fn a_step_reads_three_numbers_from_the_gpu_and_an_attack_none() {
    let device = gpu();
    if device.gpu().is_none() {
        return; // Other backends do not count copies.
    }
    for config in configs() {
        for (attack_only, recompute) in [(false, false), (false, true), (true, false)] {
            let work = StepWork {
                model: config.clone(),
                image_size: 32,
                batch: 2,
                attack_steps: 1,
                classes: CLASSES,
                repeats: 1,
                precision: Precision::Bf16,
                attack_precision: None,
                attack_only,
                recompute,
                profile: false,
            };
            let report = bench::step(&work, &device).unwrap();
            let right = match attack_only {
                true => json!({ "copies": 0, "bytes": 0, "unplanned": 0 }),
                false => json!({ "copies": 3, "bytes": 16, "unplanned": 0 }),
            };
            let what = format!("{}, attack only {attack_only}", config.size());
            assert_eq!(report["to_host"], right, "{what}");
        }
    }
}

/// Plans must be within 15 % of what the engine allocates, as CPU plans must be of what was measured.
#[test]
fn planned_memory_matches_what_the_engine_allocates() {
    let device = Device::Cuda(Gpu::soft(Path::new(KERNELS)));
    let gpu = device.gpu().unwrap();
    for mut config in configs() {
        // Large enough that activations dominate.
        match &mut config {
            ModelConfig::Vit(vit) => (vit.depth, vit.width, vit.hidden) = (3, 64, 256),
            ModelConfig::ConvNext(convnext) => convnext.widths = [24, 32, 40, 48],
        }
        for (precision, recompute) in [
            (Precision::F32, false),
            (Precision::Bf16, false),
            (Precision::Bf16, true),
        ] {
            let work = StepWork {
                model: config.clone(),
                image_size: 32,
                batch: 8,
                attack_steps: 1,
                classes: CLASSES,
                repeats: 1,
                precision,
                attack_precision: None,
                attack_only: false,
                recompute,
                profile: false,
            };
            gpu.reset_peak();
            bench::step(&work, &device).unwrap();
            let measured = gpu.usage().1 as f64;
            let planned = (work.plan(&device).memory.total() - GPU_CONTEXT) as f64;
            let ratio = planned / measured;
            let what = format!("{} in {precision:?}, recompute {recompute}", config.size());
            eprintln!("{what}: planned {planned}, measured {measured}, ratio {ratio:.3}");
            assert!((0.87..1.15).contains(&ratio), "{what}: {ratio:.3}");
        }
    }
}

#[test]
fn models_that_do_not_fit_the_gpu_or_its_kernels_are_refused_before_the_run_begins() {
    if std::env::var_os("ADVXL_TEST_DEVICE").is_some() {
        return; // Only the software GPU has 1 GiB.
    }
    let folder = tempfile::tempdir().unwrap();
    let recipe = support::write_recipe(folder.path());
    let out = folder.path().join("run");
    let refused = |changes: &[&str]| {
        let (recipe, out) = (recipe.to_str().unwrap(), out.to_str().unwrap());
        let mut all = vec!["train", recipe, "--out", out, "--device", "cuda"];
        all.extend(changes.iter().flat_map(|change| ["--set", change]));
        let (code, text) = advxl(&all);
        assert_eq!(code, 2, "{text}");
        assert!(!Path::new(out).join("recipe.toml").exists(), "{changes:?}");
        text
    };
    let text = refused(&[
        "stage.finetune.batch=12800",
        "stage.finetune.phases=[{ image_size = 32, samples = 12800 }]",
        "stage.finetune.learning_rate.warmup_samples=0",
    ]);
    assert!(
        text.contains("GiB of GPU memory and 1.5 GiB are free"),
        "{text}"
    );
    let text = refused(&["model.width=36"]);
    assert!(
        text.contains("a width of 36 is not a multiple of 8"),
        "{text}"
    );
    let text = refused(&["model.heads=16"]);
    assert!(
        text.contains("heads of 2 are not a multiple of 8"),
        "{text}"
    );
}

#[test]
fn a_run_that_is_killed_and_resumed_on_the_gpu_has_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    // Only the first stage, without evaluation, because the software GPU is slow.
    let first = RECIPE
        .split("[[stage]]\nname = \"finetune\"")
        .next()
        .unwrap();
    let (head, tail) = first.split_once("[evaluation]").unwrap();
    let stage = tail.split_once("[[stage]]").unwrap().1;
    std::fs::write(&recipe, format!("{head}\n[[stage]]{stage}")).unwrap();
    let train = |out: &Path, more: &[&str]| {
        let (recipe, out) = (recipe.to_str().unwrap(), out.to_str().unwrap());
        let name = name();
        let all = [&["train", recipe, "--out", out, "--device", &name], more].concat();
        advxl(&all)
    };
    let whole = folder.path().join("whole");
    let (code, text) = train(&whole, &[]);
    assert_eq!(code, 0, "{text}");
    let resumed = folder.path().join("resumed");
    std::fs::create_dir_all(resumed.join("checkpoints")).unwrap();
    for file in ["recipe.toml", "checkpoints/000000000064.safetensors"] {
        std::fs::copy(whole.join(file), resumed.join(file)).unwrap();
    }
    let (code, text) = train(&resumed, &[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("resuming after 64"), "{text}");
    let weights = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&resumed));
}

#[test]
fn two_gpus_train_to_the_same_bits_as_one() {
    if std::env::var_os("ADVXL_TEST_DEVICE").is_some() {
        eprintln!("left out: this needs two GPUs, which the software has");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    let stage = RECIPE
        .split("[[stage]]\nname = \"finetune\"")
        .next()
        .unwrap();
    std::fs::write(&recipe, stage).unwrap();
    let train = |name: &str, reduce: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let parallel = format!("parallel={{ shards = 2, reduce = \"{reduce}\" }}");
        let (recipe, out_text) = (recipe.to_str().unwrap(), out.to_str().unwrap());
        let short = [
            "train",
            recipe,
            "--out",
            out_text,
            "--set",
            "evaluation=none",
            "--set",
            &parallel,
            "--set",
            "stage.pretrain.phases=[{ image_size = 16, samples = 64 }]",
            "--set",
            "stage.pretrain.learning_rate.warmup_samples=32",
        ];
        let (code, text) = advxl(&[&short, more].concat());
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("a software GPU"), "{text}");
        assert_eq!(
            text.contains("exchange: 2 GPUs over NCCL"),
            more[0] == "--gpus",
            "{text}"
        );
        [
            "checkpoints/000000000064.safetensors",
            "model/model.safetensors",
        ]
        .map(|file| std::fs::read(out.join(file)).unwrap())
    };
    let one = train("one", "exact", &["--device", "cuda"]);
    assert!(one == train("two", "exact", &["--gpus", "2"]));
    // NCCL's own sums use another order, which for two ranks is the same.
    train("fast", "fast", &["--gpus", "2"]);
}

/// Returns a tensor of normal random numbers.
fn drawn<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut rng = Rng::new(seed, Stream::Bench);
    let values = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    from_vec(values, shape, device)
}

#[test]
fn every_operation_and_its_gradient_match_the_cpu() {
    type Operation = Box<dyn Fn(Tensor<3>, &Device) -> Tensor<3>>;
    let (tokens, width, heads) = (5, 32, 2);
    let spec = BlockSpec {
        heads,
        hidden: 64,
        gelu: Gelu::Erf,
        eps: 1e-6,
        causal: false,
        numerics: Precision::F32.into(),
        recompute: false,
    };
    let causal = BlockSpec {
        causal: true,
        ..spec.clone()
    };
    let lengths = [
        width,
        width,
        3 * width * width,
        3 * width,
        width * width,
        width,
        width,
        width,
        64 * width,
        64,
        width * 64,
        width,
    ];
    let block = |spec: BlockSpec| -> Operation {
        Box::new(move |x, device| {
            let mut seed = 10;
            let weights = BlockWeights::from_array(lengths).map(|length| {
                seed += 1;
                drawn(seed, [length], device) * 0.2
            });
            encoder_block(x, &weights, &spec, None, &WeightCache::default())
        })
    };
    let operations: Vec<(&str, Operation)> = vec![
        (
            "softmax",
            Box::new(|x, _| burn::tensor::activation::softmax(x, 2)),
        ),
        (
            "norm",
            Box::new(move |x, device| {
                layer_norm(
                    x,
                    drawn(2, [width], device),
                    drawn(3, [width], device),
                    1e-6,
                )
            }),
        ),
        (
            "linear",
            Box::new(move |x, device| {
                let weight = drawn(2, [48 * width], device);
                linear(x, weight, drawn(3, [48], device), Precision::F32)
            }),
        ),
        ("gelu", Box::new(|x, _| gelu(x, Gelu::Erf))),
        ("tanh gelu", Box::new(|x, _| gelu(x, Gelu::Tanh))),
        ("quick gelu", Box::new(|x, _| gelu(x, Gelu::Quick))),
        (
            "permute",
            Box::new(move |x, _| {
                let x = x
                    .reshape([BATCH, tokens, 2, width / 2])
                    .permute([0, 2, 1, 3]);
                (x.clone() * x)
                    .permute([0, 2, 1, 3])
                    .reshape([BATCH, tokens, width])
            }),
        ),
        (
            "products",
            Box::new(move |x, _| {
                let x = x
                    .reshape([BATCH, tokens, 2, width / 2])
                    .permute([0, 2, 1, 3]);
                let scores = x.clone().matmul(x.clone().transpose());
                scores
                    .matmul(x)
                    .permute([0, 2, 1, 3])
                    .reshape([BATCH, tokens, width])
            }),
        ),
        (
            "parts",
            Box::new(move |x, _| {
                let x = x
                    .reshape([BATCH, tokens, 2, width / 2])
                    .permute([2, 0, 1, 3]);
                let part = |index| {
                    x.clone()
                        .narrow(0, index, 1)
                        .reshape([BATCH, tokens, width / 2])
                };
                part(0) * part(1)
            }),
        ),
        ("block", block(spec)),
        ("causal block", block(causal)),
    ];
    let gpu = gpu();
    let mut wrong = Vec::new();
    for (name, operation) in &operations {
        let [found, right] = [&gpu, &Device::cpu()].map(|device| {
            let x = drawn(1, [BATCH, tokens, width], device)
                .autodiff()
                .require_grad();
            let y = operation(x.clone(), device);
            let towards = drawn(9, y.dims(), device).autodiff();
            let mut gradients = (y.clone() * towards).sum().backward();
            [to_vec(y), to_vec(x.grad_remove(&mut gradients).unwrap())]
        });
        let offs = [0, 1].map(|index| off(&found[index], &right[index]));
        eprintln!("{name}: off by {offs:?}");
        if offs.iter().any(|off| *off > 2e-5) {
            wrong.push(*name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
