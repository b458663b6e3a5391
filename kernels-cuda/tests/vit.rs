//! A whole vision transformer on the software GPU: attacked, differentiated, trained, beside `advxl-kernels`.

#![allow(missing_docs)]

#[path = "../examples/gpu_check/cpu.rs"]
#[allow(dead_code)] // The checks on a GPU use more.
mod cpu;
mod support;
#[path = "../examples/gpu_check/vit.rs"]
#[allow(dead_code)]
mod vit;

use advxl_cuda::{Gelu, Gpu, Kind, Precision, Traffic, Values, Wanted, cross_entropy};
use advxl_kernels as kernels;
use support::{assert_near, host, pixels, soft};
use vit::{Batch, Config, Mode, Recipe, Training, Vit};

const CONFIG: Config = Config { image: 16, patch: 4, width: 48, depth: 2, heads: 3, classes: 10 };
const BATCH: usize = 2;
const PLAIN: Mode = Mode { gelu: Gelu::Erf, stream: Kind::F32 };

/// Draws the model's weights.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut all = support::numbers(1 << 17, seed, 1.0).into_iter();
    move || all.next().expect("enough for a tiny model")
}

fn batch(gpu: &Gpu) -> (Batch, Vec<f32>, Vec<f32>) {
    let images = pixels(BATCH * 3 * CONFIG.image * CONFIG.image, 9);
    let mut targets = vec![0.01; BATCH * CONFIG.classes];
    (targets[3], targets[CONFIG.classes + 7]) = (0.91, 0.91);
    let [i, t, l] = [&images[..], &targets, &[3.0, 7.0]].map(|values| Values::send(gpu, values));
    (Batch { images: i, targets: t, labels: l, keys: vec![11, 12] }, images, targets)
}

#[test]
fn gradients_of_images_and_weights_are_the_cpus() {
    // Patches of five pixels have rows of 75 numbers, no multiple of eight.
    for config in [CONFIG, Config { image: 15, patch: 5, depth: 1, ..CONFIG }] {
        let gpu = soft();
        let weights = config.weights(1);
        let images = pixels(BATCH * 3 * config.image * config.image, 9);
        let targets = batch(&gpu).2;
        let right = |gelu| cpu::gradients(&config, &weights, &images, &targets, gelu, kernels::Precision::F32, 1.0);
        for (precision, mode, tolerance) in [
            (Precision::F32, PLAIN, 3e-6),
            (Precision::Bf16, PLAIN, 0.02),
            (Precision::Bf16, Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 }, 0.02),
        ] {
            let right = right(if mode.gelu == Gelu::Erf { kernels::Gelu::Erf } else { kernels::Gelu::Tanh });
            let model = Vit::new(&gpu, config, precision, &weights);
            let (logits, saved) = model.forward(&Values::send(&gpu, &images), mode, Wanted::Weights);
            let (_, slope) = cross_entropy(&logits, &Values::send(&gpu, &targets), config.classes, 1.0);
            let found = model.gradients(saved.unwrap(), &slope);
            assert_near("logits", &host(&logits), &right.logits, tolerance);
            for (index, (found, right)) in found.iter().zip(&right.parameters).enumerate() {
                assert_near(&format!("{precision:?} {mode:?}, parameter {index}"), &host(found), right, tolerance);
            }
            let (_, saved) = model.forward(&Values::send(&gpu, &images), mode, Wanted::Input);
            let of_images = model.input_gradient(saved.unwrap(), &slope);
            assert_near("images", &host(&of_images), &right.images, tolerance);
        }
    }
}

#[test]
fn training_follows_the_cpus_and_brings_three_numbers_a_step_to_the_host() {
    let gpu = soft();
    let (data, images, targets) = batch(&gpu);
    let mut weights = CONFIG.weights(2);
    let mut training = Training::new(Vit::new(&gpu, CONFIG, Precision::F32, &weights));
    let recipe =
        Recipe { attack_steps: 0, epsilon: 0.0, step_size: 0.01, learning_rate: 1e-3, attack: PLAIN, update: PLAIN };
    let right = cpu::train(&CONFIG, &mut weights, &images, &targets, kernels::Gelu::Erf, 1e-3, 4);
    for (loss, norm) in right {
        let before = gpu.traffic().fetched;
        let found = training.step(&data, &recipe, 0).unwrap();
        let after = gpu.traffic().fetched;
        assert_eq!((after.0 - before.0, after.1 - before.1), (3, 16), "loss, gradient norm, correct answers");
        assert!((found.loss / loss - 1.0).abs() < 1e-5, "{found:?}, on the CPU {loss}");
        assert!((found.gradient_norm / norm - 1.0).abs() < 1e-4, "{found:?}, on the CPU {norm}");
    }
    for (found, right) in training.model.parameters.iter().zip(&weights) {
        assert_near("weights", &host(found), right, 1e-3);
    }
}

#[test]
fn an_attack_brings_nothing_to_the_host_and_stays_in_its_ball() {
    let gpu = soft();
    let (data, images, _) = batch(&gpu);
    let training = Training::new(Vit::new(&gpu, CONFIG, Precision::Bf16, &CONFIG.weights(3)));
    let mode = Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 };
    let epsilon = 4.0 / 255.0;
    let recipe =
        Recipe { attack_steps: 3, epsilon, step_size: epsilon / 2.0, learning_rate: 0.0, attack: mode, update: mode };
    let before = gpu.traffic().fetched;
    let adversarial = training.attack(&data, &recipe, 5);
    assert_eq!(gpu.traffic(), Traffic { fetched: before, ..gpu.traffic() });
    let loss = |images: &Values| {
        let logits = training.model.forward(images, mode, Wanted::Nothing).0;
        host(&cross_entropy(&logits, &data.targets, CONFIG.classes, 1.0).0).iter().sum::<f32>()
    };
    assert!(loss(&adversarial) > loss(&data.images));
    for (found, clean) in host(&adversarial).iter().zip(&images) {
        assert!((found - clean).abs() <= epsilon + 1e-7 && (0.0..=1.0).contains(found));
    }
}
