//! Evaluation attacks on a GPU compared with the CPU: the same verdicts, nearly the same images, and no pixels copied
//! to the host except those of images that fooled the model.
//!
//! `cargo test` runs them on the CUDA engine's software GPU, or on the device named by `ADVXL_TEST_DEVICE`.

use std::cell::Cell;
use std::path::Path;

use advxl::attack::{Adversarials, Attack, Batch, Mark, Norm, Passes, TargetModel};
use advxl::distributed::Comm;
use advxl::eval::autoattack::{ATTACKS, Settings, Version};
use advxl::eval::{Classifier, Evaluation, Images};
use advxl::loss::predictions;
use advxl::model::{Model, ModelConfig};
use advxl::ops::{Device, DeviceName, Precision, from_vec, to_vec};
use advxl::rng::{Rng, Stream};
use advxl::text::zero_shot::by_text;
use advxl::units::Fraction;
use advxl_cuda::{Gpu, Traffic};
use burn::tensor::Tensor;

const SIZE: usize = 16;
const PIXELS: usize = 3 * SIZE * SIZE;
const CLASSES: usize = 5;
const IMAGES: usize = 6;
/// For each norm, an epsilon at which some images are fooled and some survive.
const RADII: [(Norm, &str); 3] = [(Norm::Linf, "1/255"), (Norm::L2, "0.08"), (Norm::L1, "0.8")];

fn device() -> Device {
    match std::env::var("ADVXL_TEST_DEVICE") {
        Err(_) => Device::Cuda(Gpu::soft(Path::new(env!("CARGO_TARGET_TMPDIR")))),
        Ok(name) => name.parse::<DeviceName>().unwrap().open(0).unwrap().device,
    }
}

/// Returns a ViT with one block and weights large enough for logits to differ.
fn model(outputs: usize, device: &Device) -> Model {
    let mut config = ModelConfig::named("vit_micro").unwrap();
    if let ModelConfig::Vit(config) = &mut config {
        (config.width, config.depth, config.heads, config.hidden) = (32, 1, 2, 64);
    }
    let mut rng = Rng::new(7, Stream::Bench);
    let mut weights = |name: &str, shape: &[usize]| {
        let center = match name.contains("norm") && name.ends_with("weight") {
            true => 1.0,
            false => 0.0,
        };
        let count: usize = shape.iter().product();
        let values = (0..count).map(|_| center + 0.3 * rng.normal());
        Ok::<_, std::convert::Infallible>(values.collect::<Vec<f32>>())
    };
    let Ok(model) = Model::with_weights(&config, outputs, SIZE, device, &mut weights);
    model
}

fn images() -> Vec<f32> {
    let mut rng = Rng::new(3, Stream::Bench);
    (0..IMAGES * PIXELS).map(|_| rng.uniform()).collect()
}

fn batch(labels: &[u32], device: &Device) -> Batch {
    Batch {
        images: from_vec(images(), [IMAGES, 3, SIZE, SIZE], device),
        labels: labels.to_vec(),
        keys: (10..10 + IMAGES as u64).collect(),
        seed: 1,
    }
}

/// Returns the number of restarts of an attack; FAB's second is random.
fn restarts(name: &str) -> u64 {
    if name == "fab-t" { 2 } else { 1 }
}

/// Returns an attack with few steps.
fn attack(name: &str, norm: Norm, epsilon: &str) -> Attack {
    let epsilon: Fraction = epsilon.parse().unwrap();
    // A few random queries find fewer images than gradients.
    let share = if name == "square" { 4.0 } else { 1.0 };
    let settings = Settings {
        steps: Some(4),
        targets: Some(2),
        restarts: Some(restarts(name)),
        queries: Some(16),
        ..Settings::new(Version::Standard, norm, epsilon.times(share))
    };
    settings.attack(name).unwrap()
}

/// Returns the traffic between two measurements.
fn crossed(before: Traffic, after: Traffic) -> Traffic {
    let less = |after: (u64, u64), before: (u64, u64)| (after.0 - before.0, after.1 - before.1);
    Traffic {
        sent: less(after.sent, before.sent),
        fetched: less(after.fetched, before.fetched),
        unplanned: less(after.unplanned, before.unplanned),
    }
}

/// Asserts that passes copy only logits, slopes and a few numbers per image, and that found images are copied as
/// pixels.
fn assert_small(name: &str, traffic: Traffic, passes: Passes, classes: usize, found: usize) {
    assert_eq!(traffic.unplanned, (0, 0), "{name}: {traffic:?}");
    let logits = 4 * classes as u64;
    let fetched = passes.forward * (logits + 32) + (found * PIXELS * 4) as u64;
    assert!(
        traffic.fetched.1 <= fetched,
        "{name}: {traffic:?}, {passes:?}"
    );
    // Tables and patterns of an attack, and FAB's random starts.
    let starts = (restarts(name.split(' ').next().unwrap()) - 1) * 2 * (IMAGES * PIXELS * 4) as u64;
    let sent = passes.forward * (logits + 192) + 8192 + starts;
    assert!(traffic.sent.1 <= sent, "{name}: {traffic:?}, {passes:?}");
}

/// Returns the fraction of pixels that differ.
fn off(found: &Adversarials, right: &Adversarials) -> f64 {
    let pairs = found.iter().flatten().zip(right.iter().flatten());
    let pixels = pairs.flat_map(|(found, right)| found.iter().zip(right));
    let (mut count, mut wrong) = (0, 0);
    for (found, right) in pixels {
        count += 1;
        wrong += usize::from((found - right).abs() > 1e-4);
    }
    wrong as f64 / f64::from(count.max(1))
}

#[test]
fn attacks_find_the_same_images_and_keep_pixels_on_the_gpu() {
    let devices = [device(), Device::cpu()];
    let classifiers = devices
        .each_ref()
        .map(|device| Classifier::new(model(CLASSES, device), None, Precision::F32));
    let [gpu, cpu] = &classifiers;
    let clean = from_vec(images(), [IMAGES, 3, SIZE, SIZE], &devices[1]);
    let labels = predictions(cpu.logits(clean));
    let (mut fell, mut tried) = (0, 0);
    for (norm, epsilon) in RADII {
        for name in ATTACKS {
            let attack = attack(name, norm, epsilon);
            let run = |classifier: &Classifier, device: &Device| {
                let logits = |images| classifier.logits(images);
                let target = TargetModel::new(&logits, device);
                let batch = batch(&labels, device);
                let before = device.gpu().map(Gpu::traffic);
                let found = attack.perturb(&target, &batch);
                let traffic = device
                    .gpu()
                    .map(|gpu| crossed(before.unwrap(), gpu.traffic()));
                (found, target.take_passes(), traffic)
            };
            let begun = std::time::Instant::now();
            let (found, passes, traffic) = run(gpu, &devices[0]);
            let seconds = begun.elapsed().as_secs_f64();
            let (right, right_passes, _) = run(cpu, &devices[1]);
            let which =
                |found: &Adversarials| -> Vec<bool> { found.iter().map(Option::is_some).collect() };
            let name = format!("{name} {}", norm.word());
            let off = off(&found, &right);
            eprintln!(
                "{name}: {} fooled, off {off:.4}, {seconds:.2} s, {traffic:?}",
                found.iter().flatten().count()
            );
            assert_eq!(which(&found), which(&right), "{name}");
            match name.starts_with("fab") {
                // FAB's images are at the boundary, where rounding decides whether it searches again.
                true => assert!(passes.forward.abs_diff(right_passes.forward) < 10, "{name}"),
                false => assert_eq!(passes, right_passes, "{name}"),
            }
            // The sign of a gradient close to zero is random.
            assert!(off < 0.01, "{name}: {off}");
            if let Some(traffic) = traffic {
                let found = found.iter().flatten().count();
                assert_small(&name, traffic, passes, CLASSES, found);
            }
            if !name.starts_with("pgd") {
                fell += found.iter().flatten().count();
                tried += found.len();
            }
        }
    }
    assert!(0 < fell && fell < tried, "{fell} of {tried}");
}

/// Runs an attack that is stopped after increasing numbers of passes until it finishes. Returns the images and the
/// number of stops.
fn with_stops(attack: &Attack, classifier: &Classifier, batch: &Batch) -> (Adversarials, usize) {
    let device = Device::of(&batch.images);
    let logits = |images| classifier.logits(images);
    let mut found: Adversarials = vec![None; IMAGES];
    let mut left: Vec<(usize, Option<Mark>)> = (0..IMAGES).map(|index| (index, None)).collect();
    let mut stops = 0;
    for limit in [3, 5, 7, usize::MAX] {
        let seen = Cell::new(0);
        let watch = |_| seen.set(seen.get() + 1);
        let stop = || seen.get() >= limit;
        let target = TargetModel::watched(&logits, &device, &watch).stopped_by(&stop);
        let (rows, marks): (Vec<usize>, Vec<Option<Mark>>) = left.drain(..).unzip();
        let part = Batch {
            images: advxl::ops::select(batch.images.clone(), &rows),
            labels: rows.iter().map(|row| batch.labels[*row]).collect(),
            keys: rows.iter().map(|row| batch.keys[*row]).collect(),
            seed: batch.seed,
        };
        let attempt = attack.go_on(&target, &part, &marks);
        stops += usize::from(attempt.stopped);
        for ((row, image), mark) in rows.iter().zip(attempt.found).zip(attempt.marks) {
            match image {
                Some(image) => found[*row] = Some(image),
                None => left.push((*row, mark)),
            }
        }
        if !attempt.stopped {
            break;
        }
        // Some images continue from their marks, the others start over.
        if let Some((_, mark)) = left.last_mut().filter(|_| limit == 3) {
            *mark = None;
        }
    }
    (found, stops)
}

#[test]
fn a_stopped_search_resumes_on_the_gpu() {
    let device = device();
    let classifier = Classifier::new(model(CLASSES, &device), None, Precision::F32);
    let clean = from_vec(images(), [IMAGES, 3, SIZE, SIZE], &device);
    let batch = batch(&predictions(classifier.logits(clean)), &device);
    for (norm, epsilon) in RADII {
        let attack = attack("square", norm, epsilon);
        let logits = |images| classifier.logits(images);
        let whole = attack.perturb(&TargetModel::new(&logits, &device), &batch);
        let (found, stops) = with_stops(&attack, &classifier, &batch);
        assert!(stops > 1);
        assert!(found == whole, "{norm:?}");
    }
}

#[test]
fn a_zero_shot_head_is_attacked_on_the_gpu_too() {
    const WIDTH: usize = 24;
    let mut rng = Rng::new(5, Stream::Bench);
    let head: Vec<f32> = (0..CLASSES * WIDTH).map(|_| rng.normal()).collect();
    let head = head.chunks(WIDTH).flat_map(|row| {
        let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        row.iter().map(move |value| value / length)
    });
    let head: Vec<f32> = head.collect();
    let on = |device: &Device| from_vec(head.clone(), [CLASSES, WIDTH], device);
    let devices = [device(), Device::cpu()];

    // Logits and slopes, also of rows whose squares overflow or underflow.
    let mut outputs: Vec<f32> = (0..4 * WIDTH).map(|_| rng.normal()).collect();
    outputs[WIDTH..2 * WIDTH]
        .iter_mut()
        .for_each(|v| *v *= 1e30);
    outputs[2 * WIDTH..3 * WIDTH]
        .iter_mut()
        .for_each(|v| *v *= 1e-9);
    let [found, right] = devices.each_ref().map(|device| {
        let rows: Tensor<2> = from_vec(outputs.clone(), [4, WIDTH], device);
        let rows = rows.autodiff().require_grad();
        let logits = by_text(rows.clone(), &on(device));
        let weights: Vec<f32> = (0..4 * CLASSES).map(|at| at as f32 - 7.5).collect();
        let weights: Tensor<2> = from_vec(weights, [4, CLASSES], device);
        let sum = advxl::ops::sum(advxl::ops::row_dots(logits.clone(), &weights.autodiff()));
        let gradient = rows.grad_remove(&mut sum.backward()).unwrap();
        [to_vec(logits), to_vec(gradient)]
    });
    for (found, right) in found.iter().zip(&right) {
        for (found, right) in found
            .chunks(found.len() / 4)
            .zip(right.chunks(right.len() / 4))
        {
            let most = right.iter().fold(1e-30f32, |most, v| most.max(v.abs()));
            for (found, right) in found.iter().zip(right) {
                assert!(
                    (found - right).abs() <= 2e-5 * most,
                    "{found} is not {right}"
                );
            }
        }
    }
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut row = vec![1.0; WIDTH];
        row[3] = bad;
        let row = from_vec(row, [1, WIDTH], &devices[0]);
        let logits = to_vec(by_text(row, &on(&devices[0])));
        assert!(logits.iter().any(|logit| !logit.is_finite()), "{logits:?}");
    }

    // A whole evaluation, from images on the host.
    let clean = from_vec(images(), [IMAGES, 3, SIZE, SIZE], &Device::cpu());
    let classifiers = devices
        .each_ref()
        .map(|device| Classifier::new(model(WIDTH, device), Some(on(device)), Precision::F32));
    let labels = predictions(classifiers[1].logits(clean.clone()));
    let attacks = ["apgd-ce", "fab-t"].map(|name| attack(name, Norm::L2, "0.08"));
    let [found, right] = [0, 1].map(|which| {
        let device = &devices[which];
        let before = device.gpu().map(Gpu::traffic);
        let evaluation = Evaluation {
            network: &|images| classifiers[which].logits(images),
            search: None,
            images: &Images::Given {
                images: &clean,
                labels: &labels,
            },
            attacks: &attacks,
            sample: None,
            batch: 4,
            seed: 1,
            device,
            comm: &Comm::single(),
        };
        let outcome = evaluation.run(&()).unwrap();
        if let (Some(gpu), Some(before)) = (device.gpu(), before) {
            assert_eq!(crossed(before, gpu.traffic()).unplanned, (0, 0));
        }
        outcome
    });
    assert_eq!(found.robust, right.robust);
    assert_eq!(found.broken_by, right.broken_by);
    assert!(right.standing() < IMAGES, "no attack fooled the model");
}
