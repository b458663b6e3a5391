//! Checks of the CUDA engine on a GPU, one part a call: `gpu_check PART [--tiny | --soft]`. Results are JSON lines on the
//! standard output, as they come; `scripts/gpu-check` runs the parts. `--tiny`: sizes for NVIDIA's `compute-sanitizer`.
//! `--soft`: the same on the software GPU.

mod conv;
mod cpu;
mod vit;

use std::env;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use advxl_cuda::{
    self as cuda, AttentionShape, BlockShape, Gelu, Gpu, Kind, Linear, Precision, Values, Wanted, attention,
    attention_gradient,
};
use advxl_kernels as kernels;
use vit::{Batch, Config, Mode, Recipe, Training, Vit};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let part = arguments.iter().find(|argument| !argument.starts_with("--")).map_or("", String::as_str);
    let outcome = open(has("--soft"), has("--tiny")).and_then(|check| match part {
        "open" => check.device(),
        "attention" => check.attention(),
        "rows" => check.rows(),
        "memory" => check.memory(),
        "gradients" => check.gradients(),
        "repeat" => check.repeat(),
        "updates" => check.updates(),
        "step" => check.step(),
        "profile" => check.profile(),
        "products" => check.products(),
        "attention_speed" => check.attention_speed(),
        "convnext" => check.convnext(),
        "convnext_speed" => check.convnext_speed(),
        _ => Err(format!("unknown part `{part}`").into()),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            line(part, &[("error", Text(error.to_string()))]);
            ExitCode::FAILURE
        }
    }
}

fn open(soft: bool, tiny: bool) -> Result<Check, Box<dyn std::error::Error>> {
    let start = Instant::now();
    let gpu = match soft {
        true => Gpu::soft(&env::temp_dir()),
        false => Gpu::open(0)?,
    };
    Ok(Check { gpu, tiny: soft || tiny, opened: start.elapsed().as_secs_f64() })
}

struct Check {
    gpu: Gpu,
    tiny: bool,
    opened: f64,
}

enum Json {
    Number(f64),
    Text(String),
    Flag(bool),
}
use Json::{Flag, Number, Text};

/// Prints a result.
fn line(part: &str, values: &[(&str, Json)]) {
    let mut text = format!("{{\"part\": \"{part}\"");
    for (name, value) in values {
        let _ = match value {
            Number(value) if value.is_finite() => write!(text, ", \"{name}\": {}", short(*value)),
            Number(value) => write!(text, ", \"{name}\": \"{value}\""),
            Text(value) => write!(text, ", \"{name}\": {value:?}"),
            Flag(value) => write!(text, ", \"{name}\": {value}"),
        };
    }
    println!("{text}}}");
}

/// Six digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-3..1e9).contains(&size) => {
            let digits = (5 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{value:.digits$}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
        }
        _ => format!("{value:.5e}"),
    }
}

/// Deterministic numbers around 0 of deviation 1.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        let mut sum = 0.0;
        for _ in 0..4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (state >> 40) as f32 / (1u64 << 24) as f32;
        }
        (sum - 2.0) * 1.732
    }
}

fn list(len: usize, seed: u64, deviation: f32) -> Vec<f32> {
    let mut draw = numbers(seed);
    (0..len).map(|_| draw() * deviation).collect()
}

fn images(len: usize, seed: u64) -> Vec<f32> {
    list(len, seed, 0.25).into_iter().map(|v| (v + 0.5).clamp(0.0, 1.0)).collect()
}

/// The largest difference and the root of the mean squared one, as parts of the largest and the root of the mean square of
/// the right values.
fn off(found: &[f32], right: &[f32]) -> (f64, f64) {
    assert_eq!(found.len(), right.len());
    let (mut largest, mut most, mut squares, mut all) = (f64::MIN_POSITIVE, 0.0f64, 0.0, f64::MIN_POSITIVE);
    for (found, right) in found.iter().zip(right) {
        let (found, right) = (f64::from(*found), f64::from(*right));
        let off = if found.is_finite() { (found - right).abs() } else { f64::INFINITY };
        largest = largest.max(right.abs());
        most = most.max(off);
        squares += off * off;
        all += right * right;
    }
    (most / largest, (squares / all).sqrt())
}

const B16: Config = Config { image: 112, patch: 16, width: 768, depth: 12, heads: 12, classes: 1000 };
const L16: Config = Config { image: 112, patch: 16, width: 1024, depth: 24, heads: 16, classes: 1000 };
const H14: Config = Config { image: 84, patch: 14, width: 1280, depth: 32, heads: 16, classes: 1000 };
const B16_224: Config = Config { image: 224, ..B16 };
const TINY: Config = Config { image: 16, patch: 4, width: 48, depth: 2, heads: 3, classes: 10 };

const PLAIN: Mode = Mode { gelu: Gelu::Erf, stream: Kind::F32 };

impl Check {
    fn device(&self) -> Outcome {
        let facts = self.gpu.facts();
        let (free, total) = self.gpu.memory();
        let start = Instant::now();
        self.gpu.self_test()?;
        let tested = start.elapsed().as_secs_f64();
        let model = Vit::new(&self.gpu, TINY, Precision::F32, &TINY.weights(1));
        let start = Instant::now();
        model.prepare(2)?;
        if !self.tiny {
            BlockShape { batch: 1, tokens: 50, width: 768, heads: 12, hidden: 3072, causal: false }
                .prepare(&self.gpu, Precision::Bf16)?;
            BlockShape { batch: 1, tokens: 197, width: 768, heads: 12, hidden: 3072, causal: false }
                .prepare(&self.gpu, Precision::Bf16)?;
        }
        let prepared = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let x = Values::send(&self.gpu, &images(2 * 3 * 16 * 16, 1));
        let logits = model.forward(&x, PLAIN, Wanted::Nothing).0.to_vec()?;
        line(
            "open",
            &[
                ("name", Text(facts.name.clone())),
                ("capability", Text(format!("{}.{}", facts.capability.0, facts.capability.1))),
                ("multiprocessors", Number(facts.multiprocessors as f64)),
                ("shared_memory", Number(facts.shared_memory as f64)),
                ("free_mib", Number((free >> 20) as f64)),
                ("total_mib", Number((total >> 20) as f64)),
                ("seconds_to_open", Number(self.opened)),
                ("seconds_of_self_test", Number(tested)),
                ("seconds_to_prepare", Number(prepared)),
                ("seconds_to_first_logits", Number(start.elapsed().as_secs_f64())),
                ("finite", Flag(logits.iter().all(|v| v.is_finite()))),
            ],
        );
        Ok(())
    }

    /// What does not fit is an error that says so, and the next GPU that is opened works.
    fn memory(&self) -> Outcome {
        let kept = Values::zeros(&self.gpu, 1 << 20, Kind::F32);
        let large = Values::zeros(&self.gpu, 1 << 38, Kind::F32);
        let error = kept.to_vec().expect_err("a terabyte does not fit");
        drop((kept, large));
        line(
            "memory",
            &[("error", Text(error.message().into())), ("right", Flag(error.kind() == cuda::ErrorKind::Memory))],
        );
        let again = if self.gpu.facts().name == "software" { return Ok(()) } else { Gpu::open(0)? };
        let found = cuda::gelu(Gelu::Erf, &Values::zeros(&again, 8, Kind::F32)).to_vec()?;
        line("memory", &[("what", Text("opened again".into())), ("right", Flag(found == [0.0; 8]))]);
        Ok(())
    }

    /// Attention of the recipes' shapes beside the CPU's, from operands that are bf16 numbers.
    fn attention(&self) -> Outcome {
        let shapes = match self.tiny {
            true => vec![(2, 17, 2, 24), (1, 97, 1, 64)],
            false => vec![
                (4, 50, 12, 64),
                (4, 37, 16, 80),
                (3, 65, 12, 64),
                (2, 17, 8, 88),
                (2, 197, 12, 64),
                (2, 257, 16, 80),
                (1, 577, 16, 64),
            ],
        };
        for (batch, tokens, heads, head_dim) in shapes {
            let shape = AttentionShape { batch, tokens, heads, head_dim, causal: false };
            let elements = batch * tokens * heads * head_dim;
            for kind in [Kind::F32, Kind::Bf16] {
                let [qkv, dy] = [(3 * elements, 1), (elements, 2)].map(|(len, seed)| {
                    let values = Values::send(&self.gpu, &list(len, seed, 1.0)).cast(kind);
                    (values.to_vec(), values)
                });
                let (right_qkv, right_dy) = (qkv.0?, dy.0?);
                let (mut y, mut dqkv) = (vec![0.0; elements], vec![0.0; 3 * elements]);
                let same = kernels::AttentionShape { batch, tokens, heads, head_dim };
                let saved = kernels::attention(same, kernels::Precision::F32, &right_qkv, &mut y);
                kernels::attention_gradient(&saved, &right_dy, &mut dqkv);
                let (found, saved) = attention(shape, &qkv.1);
                let gradient = attention_gradient(&saved, &dy.1);
                let ((forward, forward_rms), (backward, backward_rms)) =
                    (off(&found.to_vec()?, &y), off(&gradient.to_vec()?, &dqkv));
                let most = if kind == Kind::F32 { 5e-6 } else { 0.01 };
                line(
                    "attention",
                    &[
                        ("shape", Text(format!("{batch} x {tokens} x {heads} x {head_dim}"))),
                        ("kind", Text(format!("{kind:?}"))),
                        ("forward_off", Number(forward)),
                        ("forward_rms", Number(forward_rms)),
                        ("gradient_off", Number(backward)),
                        ("gradient_rms", Number(backward_rms)),
                        ("right", Flag(forward <= most && backward <= most)),
                    ],
                );
            }
        }
        Ok(())
    }

    /// The kernels between products, beside the CPU's.
    fn rows(&self) -> Outcome {
        let (rows, width) = if self.tiny { (33, 48) } else { (4096 + 3, 768) };
        let (x, dy) = (list(rows * width, 1, 2.0), list(rows * width, 2, 1.0));
        let (weight, bias) = (list(width, 3, 1.0), list(width, 4, 1.0));
        let send = |values: &[f32]| Values::send(&self.gpu, values);
        let report = |what: &str, found: &Values, right: &[f32], most: f64| -> Outcome {
            let (largest, rms) = off(&found.to_vec()?, right);
            let values = [
                ("what", Text(what.into())),
                ("off", Number(largest)),
                ("rms", Number(rms)),
                ("right", Flag(largest <= most)),
            ];
            line("rows", &values);
            Ok(())
        };
        let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; rows * width]);
        let [mut to_weight, mut to_bias] = [(); 2].map(|()| vec![0.0; width]);
        kernels::layer_norm(&x, &weight, &bias, 1e-6, &mut y);
        kernels::layer_norm_gradient(&x, &weight, 1e-6, &dy, &mut dx, Some((&mut to_weight, &mut to_bias)));
        let (w, b) = (send(&weight), send(&bias));
        let (found, saved) = cuda::layer_norm(&send(&x), &w, &b, 1e-6, Kind::F32);
        report("norm", &found, &y, 2e-6)?;
        let (found, sums) = cuda::layer_norm_gradient(&saved, &w, &send(&dy), None, true);
        let sums = sums.expect("wanted");
        report("norm gradient", &found, &dx, 2e-6)?;
        report("norm weight", &sums.0, &to_weight, 5e-6)?;
        report("norm bias", &sums.1, &to_bias, 5e-6)?;
        for (kind, right) in
            [(Gelu::Erf, kernels::Gelu::Erf), (Gelu::Tanh, kernels::Gelu::Tanh), (Gelu::Quick, kernels::Gelu::Quick)]
        {
            kernels::gelu(right, &x, &mut y);
            kernels::gelu_gradient(right, &x, &dy, &mut dx);
            kernels::sum_of_rows(&dx, &mut to_bias);
            report(&format!("gelu {kind:?}"), &cuda::gelu(kind, &send(&x)), &y, 1e-6)?;
            let (found, sums) = cuda::gelu_gradient(kind, &send(&x), &send(&dy), width, true);
            report(&format!("gelu gradient {kind:?}"), &found, &dx, 1e-6)?;
            report(&format!("gelu sums {kind:?}"), &sums.expect("wanted"), &to_bias, 5e-6)?;
        }
        // Attack: equal bits.
        let (batch, pixels) = (8, rows * width / 8);
        let (origin, gradient) = (images(batch * pixels, 5), list(batch * pixels, 6, 1.0));
        let epsilon = 8.0f32 / 255.0;
        let keys: Vec<u64> = (0..batch as u64).collect();
        let draws = cuda::pgd::Draws { seed: 3, purpose: 5, keys: &keys, sub_key: 9 };
        let mut moved = cuda::pgd::linf_start(&send(&origin), &draws, epsilon);
        let mut right = moved.to_vec()?;
        let distances = right.iter().zip(&origin).map(|(a, b)| (a - b).abs());
        let farthest = distances.fold(0.0f32, f32::max);
        cpu::linf_step(&mut right, &gradient, &origin, 0.01, epsilon, batch);
        cuda::pgd::linf_step(&mut moved, &send(&gradient), &send(&origin), &send(&vec![0.01; batch]), epsilon);
        let equal = moved.to_vec()? == right;
        let within = (0.9 * epsilon..=epsilon + 1e-7).contains(&farthest);
        line(
            "rows",
            &[
                ("what", Text("linf start and step".into())),
                ("farthest", Number(farthest.into())),
                ("right", Flag(equal && within)),
            ],
        );
        kernels::pgd::l2_step(&mut right, &gradient, &origin, &vec![0.3; batch], 0.5);
        cuda::pgd::l2_step(&mut moved, &send(&gradient), &send(&origin), &send(&vec![0.3; batch]), 0.5);
        report("l2 step", &moved, &right, 2e-7)
    }

    fn config(&self) -> Config {
        if self.tiny { TINY } else { B16 }
    }

    /// The gradients of a whole model beside the CPU's in f32.
    fn gradients(&self) -> Outcome {
        let configs = if self.tiny { vec![("tiny", TINY, 2)] } else { vec![("vit_b16", B16, 8), ("vit_l16", L16, 4)] };
        for (name, config, batch) in configs {
            let weights = config.weights(1);
            let pixels = images(batch * 3 * config.image * config.image, 2);
            let targets = targets(batch, config.classes).0;
            let start = Instant::now();
            let right = |gelu, precision| cpu::gradients(&config, &weights, &pixels, &targets, gelu, precision, 1.0);
            let (erf, tanh) = (
                right(kernels::Gelu::Erf, kernels::Precision::F32),
                right(kernels::Gelu::Tanh, kernels::Precision::F32),
            );
            let on_cpu = right(kernels::Gelu::Erf, kernels::Precision::Bf16);
            let seconds = start.elapsed().as_secs_f64();
            let largest = |found: &[Vec<f32>], right: &[Vec<f32>]| {
                let offs: Vec<_> = found.iter().zip(right).map(|(found, right)| off(found, right)).collect();
                let most = |of: fn(&(f64, f64)) -> f64| offs.iter().map(of).fold(0.0, f64::max);
                (most(|off| off.0), most(|off| off.1))
            };
            let (bf16, bf16_rms) = largest(&on_cpu.parameters, &erf.parameters);
            line(
                "gradients",
                &[
                    ("model", Text(name.into())),
                    ("batch", Number(batch as f64)),
                    ("what", Text("the CPU's bf16 beside its f32".into())),
                    ("logits_off", Number(off(&on_cpu.logits, &erf.logits).0)),
                    ("images_off", Number(off(&on_cpu.images, &erf.images).0)),
                    ("images_rms", Number(off(&on_cpu.images, &erf.images).1)),
                    ("parameters_off", Number(bf16)),
                    ("parameters_rms", Number(bf16_rms)),
                    ("cpu_seconds", Number(seconds)),
                ],
            );
            for (precision, mode, most) in [
                (Precision::F32, PLAIN, 2e-5),
                (Precision::Tf32, PLAIN, 0.02),
                (Precision::Bf16, PLAIN, 0.05),
                (Precision::Bf16, Mode { gelu: Gelu::Erf, stream: Kind::Bf16 }, 0.1),
                (Precision::Bf16, Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 }, 0.1),
            ] {
                let right = if mode.gelu == Gelu::Tanh { &tanh } else { &erf };
                let model = Vit::new(&self.gpu, config, precision, &weights);
                let [x, t] = [&pixels, &targets].map(|values| Values::send(&self.gpu, values));
                let (logits, saved) = model.forward(&x, mode, Wanted::Input);
                let (_, slope) = cuda::cross_entropy(&logits, &t, config.classes, 1.0);
                let of_images = model.input_gradient(saved.expect("wanted"), &slope).to_vec()?;
                let (logits, saved) = model.forward(&x, mode, Wanted::Weights);
                let gradients = model.gradients(saved.expect("wanted"), &slope);
                let found = gradients.iter().map(Values::to_vec).collect::<cuda::Result<Vec<_>>>()?;
                let (parameters, rms) = largest(&found, &right.parameters);
                let (of_images, logits) = (off(&of_images, &right.images), off(&logits.to_vec()?, &right.logits));
                line(
                    "gradients",
                    &[
                        ("model", Text(name.into())),
                        ("precision", Text(format!("{precision:?}"))),
                        ("gelu", Text(format!("{:?}", mode.gelu))),
                        ("stream", Text(format!("{:?}", mode.stream))),
                        ("logits_off", Number(logits.0)),
                        ("images_off", Number(of_images.0)),
                        ("images_rms", Number(of_images.1)),
                        ("parameters_off", Number(parameters)),
                        ("parameters_rms", Number(rms)),
                        ("right", Flag(parameters <= most && of_images.0 <= most && logits.0 <= most)),
                    ],
                );
            }
        }
        Ok(())
    }

    fn batch(&self, config: &Config, batch: usize, seed: u64) -> Batch {
        let (targets, labels) = targets(batch, config.classes);
        let send = |values: &[f32]| Values::send(&self.gpu, values);
        // Many images of few drawn numbers: drawing them takes longer than a step.
        let drawn = images((batch.min(64)) * 3 * config.image * config.image, seed);
        let all: Vec<f32> = drawn.iter().cycle().take(batch * 3 * config.image * config.image).copied().collect();
        Batch { images: send(&all), targets: send(&targets), labels: send(&labels), keys: (0..batch as u64).collect() }
    }

    /// The same steps twice give the same bits.
    fn repeat(&self) -> Outcome {
        let (config, batch) = (self.config(), if self.tiny { 2 } else { 64 });
        for (precision, mode) in [
            (Precision::F32, PLAIN),
            (Precision::Bf16, PLAIN),
            (Precision::Bf16, Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 }),
        ] {
            let run = || -> Result<Vec<Vec<f32>>, cuda::Error> {
                let data = self.batch(&config, batch, 3);
                let mut training = Training::new(Vit::new(&self.gpu, config, precision, &config.weights(1)));
                for step in 0..3 {
                    training.step(&data, &recipe(mode, mode), step)?;
                }
                training.model.parameters.iter().map(Values::to_vec).collect()
            };
            let bits = |all: &[Vec<f32>]| all.iter().flatten().map(|v| u64::from(v.to_bits())).collect::<Vec<_>>();
            let (first, second) = (bits(&run()?), bits(&run()?));
            let equal = first == second;
            let sum = first.iter().fold(0u64, |sum, v| sum.rotate_left(5) ^ v);
            line(
                "repeat",
                &[
                    ("precision", Text(format!("{precision:?}"))),
                    ("stream", Text(format!("{:?}", mode.stream))),
                    ("bits", Text(format!("{sum:016x}"))),
                    ("right", Flag(equal)),
                ],
            );
        }
        Ok(())
    }

    /// Ten updates beside the CPU's, in f32 and without an attack.
    fn updates(&self) -> Outcome {
        let (config, batch) = (self.config(), if self.tiny { 2 } else { 16 });
        let (targets, _) = targets(batch, config.classes);
        let data = self.batch(&config, batch, 4);
        let pixels = data.images.to_vec()?;
        let mut weights = config.weights(2);
        let mut training = Training::new(Vit::new(&self.gpu, config, Precision::F32, &weights));
        let rate = 1e-4;
        let start = Instant::now();
        let right = cpu::train(&config, &mut weights, &pixels, &targets, kernels::Gelu::Erf, rate, 10);
        let seconds = start.elapsed().as_secs_f64();
        let still = Recipe { attack_steps: 0, epsilon: 0.0, learning_rate: rate, ..recipe(PLAIN, PLAIN) };
        for (step, (loss, norm)) in right.into_iter().enumerate() {
            let found = training.step(&data, &still, 0)?;
            let off = f64::from((found.loss / loss - 1.0).abs());
            line(
                "updates",
                &[
                    ("update", Number(step as f64 + 1.0)),
                    ("loss", Number(found.loss.into())),
                    ("cpu_loss", Number(loss.into())),
                    ("gradient_norm", Number(found.gradient_norm)),
                    ("cpu_gradient_norm", Number(norm)),
                    ("correct", Number(found.right.into())),
                    ("right", Flag(off < 1e-3)),
                ],
            );
        }
        line("updates", &[("cpu_seconds", Number(seconds))]);
        Ok(())
    }

    /// Whole steps of adversarial training.
    fn step(&self) -> Outcome {
        let fast = Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 };
        let exact = Mode { gelu: Gelu::Erf, stream: Kind::Bf16 };
        let cases = match self.tiny {
            true => vec![("tiny", TINY, 2, 2, Precision::Bf16, fast, exact)],
            false => vec![
                ("vit_b16", B16, 1024, 1, Precision::Bf16, fast, exact),
                ("vit_b16", B16, 1024, 1, Precision::Bf16, fast, fast),
                ("vit_b16", B16, 1024, 1, Precision::Bf16, exact, exact),
                ("vit_b16", B16, 1024, 1, Precision::Bf16, fast, PLAIN),
                ("vit_b16", B16, 1024, 1, Precision::Bf16, PLAIN, PLAIN),
                ("vit_l16", L16, 512, 1, Precision::Bf16, fast, exact),
                ("vit_b16 at 224", B16_224, 256, 3, Precision::Bf16, fast, exact),
                ("vit_h14", H14, 512, 1, Precision::Bf16, fast, exact),
                ("vit_b16 at 224", B16_224, 256, 3, Precision::Bf16, PLAIN, PLAIN),
                ("vit_b16", B16, 256, 1, Precision::Bf16, fast, exact),
                ("vit_b16", B16, 1024, 1, Precision::Tf32, PLAIN, PLAIN),
                ("vit_b16", B16, 1024, 1, Precision::F32, PLAIN, PLAIN),
            ],
        };
        for (name, config, batch, attack_steps, precision, attack, update) in cases {
            self.gpu.release_memory();
            self.gpu.reset_peak();
            let data = self.batch(&config, batch, 5);
            let mut training = Training::new(Vit::new(&self.gpu, config, precision, &config.weights(1)));
            let recipe = Recipe { attack_steps, ..recipe(attack, update) };
            let start = Instant::now();
            training.step(&data, &recipe, 0)?;
            let first = start.elapsed().as_secs_f64();
            training.step(&data, &recipe, 1)?;
            let before = self.gpu.traffic();
            let count = if self.tiny { 2 } else { 8 };
            let mut times = Vec::new();
            let mut metrics = None;
            for step in 0..count {
                let start = Instant::now();
                metrics = Some(training.step(&data, &recipe, 2 + step)?);
                self.gpu.wait()?;
                times.push(start.elapsed().as_secs_f64());
            }
            let after = self.gpu.traffic();
            times.sort_by(f64::total_cmp);
            let (middle, metrics) = (times[times.len() / 2], metrics.expect("some steps"));
            // The host's share: an attack without waiting.
            let start = Instant::now();
            let adversarial = training.attack(&data, &recipe, 99);
            let enqueued = start.elapsed().as_secs_f64();
            self.gpu.wait()?;
            let attack_alone = start.elapsed().as_secs_f64();
            drop(adversarial);
            line(
                "step",
                &[
                    ("model", Text(name.into())),
                    ("batch", Number(batch as f64)),
                    ("attack_steps", Number(attack_steps as f64)),
                    ("precision", Text(format!("{precision:?}"))),
                    ("attack", Text(format!("{:?} {:?}", attack.gelu, attack.stream))),
                    ("update", Text(format!("{:?} {:?}", update.gelu, update.stream))),
                    ("ms", Number(1e3 * middle)),
                    ("fastest_ms", Number(1e3 * times[0])),
                    ("slowest_ms", Number(1e3 * times[times.len() - 1])),
                    ("images_per_second", Number(batch as f64 / middle)),
                    ("first_step_s", Number(first)),
                    ("attack_ms", Number(1e3 * attack_alone)),
                    ("attack_enqueue_ms", Number(1e3 * enqueued)),
                    ("loss", Number(metrics.loss.into())),
                    ("gradient_norm", Number(metrics.gradient_norm)),
                    ("peak_mib", Number((self.gpu.usage().1 >> 20) as f64)),
                    ("fetched_bytes_a_step", Number((after.fetched.1 - before.fetched.1) as f64 / count as f64)),
                ],
            );
        }
        Ok(())
    }

    /// Every kernel and product of a step by itself.
    fn profile(&self) -> Outcome {
        let fast = Mode { gelu: Gelu::Tanh, stream: Kind::Bf16 };
        let exact = Mode { gelu: Gelu::Erf, stream: Kind::Bf16 };
        let cases = match self.tiny {
            true => vec![(TINY, 2, Precision::Bf16, fast, exact)],
            false => vec![
                (B16, 1024, Precision::Bf16, fast, exact),
                (B16_224, 256, Precision::Bf16, fast, exact),
                (L16, 512, Precision::Bf16, fast, exact),
            ],
        };
        for (config, batch, precision, attack, update) in cases {
            self.gpu.release_memory();
            let data = self.batch(&config, batch, 5);
            let mut training = Training::new(Vit::new(&self.gpu, config, precision, &config.weights(1)));
            let recipe = recipe(attack, update);
            training.step(&data, &recipe, 0)?;
            training.step(&data, &recipe, 1)?;
            self.gpu.start_profile();
            training.step(&data, &recipe, 2)?;
            let mut rows = self.gpu.end_profile();
            rows.sort_by(|a, b| b.2.total_cmp(&a.2));
            let all: f64 = rows.iter().map(|row| row.2).sum();
            line(
                "profile",
                &[
                    ("width", Number(config.width as f64)),
                    ("image", Number(config.image as f64)),
                    ("precision", Text(format!("{precision:?}"))),
                    ("sum_ms", Number(1e3 * all)),
                ],
            );
            for (name, count, seconds) in rows {
                let each = seconds / count as f64;
                let mut values = vec![
                    ("width", Number(config.width as f64)),
                    ("image", Number(config.image as f64)),
                    ("what", Text(name.clone())),
                    ("count", Number(count as f64)),
                    ("us", Number(1e6 * each)),
                    ("ms", Number(1e3 * seconds)),
                ];
                if let Some(work) = flops(&name) {
                    values.push(("tflops", Number(work / each / 1e12)));
                }
                line("profile", &values);
            }
        }
        Ok(())
    }

    /// Products of one block in every precision.
    fn products(&self) -> Outcome {
        let (rows, width) = if self.tiny { (50, 48) } else { (51_200, 768) };
        for precision in [Precision::Bf16, Precision::Tf32, Precision::F32] {
            for (name, inputs, outputs) in [
                ("qkv", width, 3 * width),
                ("proj", width, width),
                ("fc1", width, 4 * width),
                ("fc2", 4 * width, width),
            ] {
                let send = |len, seed| Values::send(&self.gpu, &list(len, seed, 0.5));
                let layer = Linear::new(&send(inputs * outputs, 1), &send(outputs, 2), precision);
                let kind = precision.kind();
                let (x, dy) = (self.noise(rows * inputs, kind), self.noise(rows * outputs, kind));
                let work = 2.0 * (rows * inputs * outputs) as f64;
                let time = |run: &dyn Fn()| -> Result<f64, cuda::Error> {
                    run();
                    let mut best = f64::INFINITY;
                    for _ in 0..5 {
                        best = best.min(self.gpu.time(run)?);
                    }
                    Ok(best)
                };
                for (what, seconds) in [
                    ("forward", time(&|| drop(layer.forward(&x, kind)))?),
                    ("input gradient", time(&|| drop(layer.input_gradient(&dy)))?),
                    ("weight gradient", time(&|| drop(layer.weight_gradient(&x, &dy)))?),
                    ("bias gradient", time(&|| drop(layer.bias_gradient(&dy)))?),
                ] {
                    let tflops = if what == "bias gradient" { f64::NAN } else { work / seconds / 1e12 };
                    line(
                        "products",
                        &[
                            ("precision", Text(format!("{precision:?}"))),
                            ("layer", Text(name.into())),
                            ("what", Text(what.into())),
                            ("us", Number(1e6 * seconds)),
                            ("tflops", Number(tflops)),
                        ],
                    );
                }
            }
        }
        Ok(())
    }

    /// Random values on the device without drawing them all on the host.
    fn noise(&self, len: usize, kind: Kind) -> Values {
        let drawn = list(len.min(1 << 20), 7, 0.5);
        let all: Vec<f32> = drawn.iter().cycle().take(len).copied().collect();
        Values::send(&self.gpu, &all).cast(kind)
    }

    fn attention_speed(&self) -> Outcome {
        let shapes = match self.tiny {
            true => vec![(2, 17, 2, 24, Kind::Bf16)],
            false => vec![
                (1024, 50, 12, 64, Kind::Bf16),
                (512, 50, 16, 64, Kind::Bf16),
                (512, 37, 16, 80, Kind::Bf16),
                (512, 65, 12, 64, Kind::Bf16),
                (256, 197, 12, 64, Kind::Bf16),
                (64, 257, 16, 80, Kind::Bf16),
                (1024, 50, 12, 64, Kind::F32),
                (256, 197, 12, 64, Kind::F32),
            ],
        };
        for (batch, tokens, heads, head_dim, kind) in shapes {
            let shape = AttentionShape { batch, tokens, heads, head_dim, causal: false };
            let elements = batch * tokens * heads * head_dim;
            let (qkv, dy) = (self.noise(3 * elements, kind), self.noise(elements, kind));
            let saved = attention(shape, &qkv).1;
            drop(attention_gradient(&saved, &dy));
            let [mut forward, mut backward] = [f64::INFINITY; 2];
            for _ in 0..5 {
                forward = forward.min(self.gpu.time(|| drop(attention(shape, &qkv)))?);
                backward = backward.min(self.gpu.time(|| drop(attention_gradient(&saved, &dy)))?);
            }
            let bytes = (elements * kind.bytes()) as f64;
            line(
                "attention_speed",
                &[
                    ("shape", Text(format!("{batch} x {tokens} x {heads} x {head_dim}"))),
                    ("kind", Text(format!("{kind:?}"))),
                    ("forward_us", Number(1e6 * forward)),
                    ("forward_tb_s", Number(4.0 * bytes / forward / 1e12)),
                    ("gradient_us", Number(1e6 * backward)),
                    ("gradient_tb_s", Number(7.0 * bytes / backward / 1e12)),
                ],
            );
        }
        Ok(())
    }
}

/// The work of a product by its name in a profile.
fn flops(name: &str) -> Option<f64> {
    let sizes: Vec<f64> =
        name.split(['[', ']']).flat_map(|part| part.split(" x ")).filter_map(|n| n.parse().ok()).collect();
    match sizes[..] {
        [rows, inner, _, columns] => Some(2.0 * rows * inner * columns),
        _ => None,
    }
}

fn recipe(attack: Mode, update: Mode) -> Recipe {
    let epsilon = 4.0 / 255.0;
    Recipe { attack_steps: 1, epsilon, step_size: epsilon, learning_rate: 1e-4, attack, update }
}

/// Smoothed targets and their labels.
fn targets(batch: usize, classes: usize) -> (Vec<f32>, Vec<f32>) {
    let labels: Vec<usize> = (0..batch).map(|i| i * 37 % classes).collect();
    let mut all = vec![0.1 / classes as f32; batch * classes];
    labels.iter().enumerate().for_each(|(row, label)| all[row * classes + label] += 0.9);
    (all, labels.iter().map(|label| *label as f32).collect())
}
