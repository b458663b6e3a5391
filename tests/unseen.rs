//! Compares the corruptions of unseen attacks with PyTorch, and checks what holds for each attack.
//!
//! `tests/golden/make_unseen.py` records the numbers; `tests/golden/README.md` lists the tensors.

use std::path::Path;

use advxl::attack::unseen::gabor::{self, Gabor};
use advxl::attack::unseen::glitch::Glitch;
use advxl::attack::unseen::jpeg::Jpeg;
use advxl::attack::unseen::kaleidoscope::{self, Kaleidoscope};
use advxl::attack::unseen::pixel::Pixel;
use advxl::attack::unseen::renderer::Stamp;
use advxl::attack::unseen::snow::{Flake, Snow};
use advxl::attack::unseen::{
    Corruption, Extent, Preset, Renderer, Strength, Unseen, elastic::Elastic, wood::Wood,
};
use advxl::attack::{Attack, Batch, Goal, Norm, TargetModel};
use advxl::distributed::Comm;
use advxl::eval::{Evaluation, Images};
use advxl::ops::{Device, from_vec, to_vec};
use advxl::rng::{AttackKind, Rng, Stream};
use advxl::settings::Words;
use burn::tensor::Tensor;
use safetensors::SafeTensors;

const SIZES: [Extent; 2] = [
    Extent {
        height: 24,
        width: 24,
    },
    Extent {
        height: 40,
        width: 32,
    },
];

struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/unseen.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&self.bytes(name))
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        let numbers: Vec<i64> = bytemuck::pod_collect_to_vec(&self.bytes(name));
        numbers.into_iter().map(|number| number as usize).collect()
    }
}

#[track_caller]
fn assert_close(found: &[f32], right: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), right.len(), "{what}");
    for (index, (found, right)) in found.iter().zip(right).enumerate() {
        let off = (found - right).abs();
        assert!(
            off <= tolerance,
            "{what} [{index}]: {found} is not {right}, off by {off:e}"
        );
    }
}

/// Compares image and gradient. `chosen` takes the renderer's parameters from the recorded ones.
fn compare(
    golden: &Golden,
    name: &str,
    extent: Extent,
    renderer: &dyn Renderer,
    chosen: &dyn Fn(Vec<Vec<f32>>) -> Vec<f32>,
) {
    let size = format!("{}x{}", extent.height, extent.width);
    let recorded = |what: &str| {
        let count = if name == "kaleidoscope" { 2 } else { 1 };
        let all = (0..count).map(|number| golden.floats(&format!("{name} {size} {what} {number}")));
        chosen(all.collect())
    };
    let clean = golden.floats(&format!("images {size}"));
    let slopes = golden.floats(&format!("slopes {size}"));
    let parameters = recorded("parameters");
    assert_eq!(parameters.len(), renderer.count(), "{name}");
    let image = renderer.render(&clean, &parameters);
    let right = golden.floats(&format!("{name} {size} image"));
    assert_close(&image, &right, 1e-5, &format!("{name} {size}"));
    let gradient = renderer.pull(&clean, &parameters, &slopes);
    let right = recorded("gradient");
    let largest = right
        .iter()
        .fold(0.0f32, |most, slope| most.max(slope.abs()));
    assert!(largest > 0.0, "{name}");
    let what = format!("gradient of {name} {size}");
    assert_close(&gradient, &right, 1e-4 * largest, &what);
}

fn first(recorded: Vec<Vec<f32>>) -> Vec<f32> {
    recorded.into_iter().next().unwrap()
}

#[test]
fn pixelation_elastic_glitch_jpeg_and_wood_match_pytorch() {
    let golden = Golden::open();
    for extent in SIZES {
        let is_large = extent.height > 24;
        let pixel = Pixel {
            extent,
            size: if is_large { 16 } else { 4 },
        };
        compare(&golden, "pixel", extent, &pixel, &first);
        let elastic = Elastic::new(extent, if is_large { 8 } else { 2 });
        compare(&golden, "elastic", extent, &elastic, &first);
        let glitch = Glitch {
            extent,
            bars: if is_large { 8 } else { 12 },
        };
        compare(&golden, "glitch", extent, &glitch, &first);
        compare(&golden, "jpeg", extent, &Jpeg { extent }, &first);
        let (resolution, rings) = if is_large { (32, 4.0) } else { (16, 5.0) };
        let wood = Wood::new(extent, resolution, rings);
        compare(&golden, "wood", extent, &wood, &first);
    }
}

#[test]
fn gabor_noise_and_its_kernel_match_pytorch() {
    let golden = Golden::open();
    for extent in SIZES {
        let size = format!("{}x{}", extent.height, extent.width);
        let sides = if extent.height > 24 { 5 } else { 3 };
        let kernel = gabor::kernel(23, sides, 4.25, 0.6);
        let right = golden.floats(&format!("gabor {size} kernel"));
        assert_close(&kernel.values(), &right, 1e-5, "kernel");
        let points = golden.indices(&format!("gabor {size} points"));
        let chosen = |recorded: Vec<Vec<f32>>| -> Vec<f32> {
            points.iter().map(|point| recorded[0][*point]).collect()
        };
        let gabor = Gabor {
            extent,
            points: points.clone(),
            sides,
            kernel,
        };
        compare(&golden, "gabor", extent, &gabor, &chosen);
    }
}

#[test]
fn snow_and_its_flakes_match_pytorch() {
    let golden = Golden::open();
    for extent in SIZES {
        let size = format!("{}x{}", extent.height, extent.width);
        let (side, blur) = if extent.height > 24 { (15, 3) } else { (3, 1) };
        let draws = golden.floats(&format!("snow {size} draws"));
        let flakes: Vec<Stamp> = draws
            .chunks(5)
            .map(|draw| {
                let flake = Flake {
                    end: [draw[0] as usize, draw[1] as usize],
                    thickness: draw[2].into(),
                    is_mirrored: draw[3] == 1.0,
                    sigma: draw[4].into(),
                };
                flake.kernel(side, blur)
            })
            .collect();
        let values: Vec<f32> = flakes.iter().flat_map(Stamp::values).collect();
        let right = golden.floats(&format!("snow {size} kernels"));
        assert_close(&values, &right, 1e-5, "flakes");
        let points = golden.indices(&format!("snow {size} points"));
        let points: Vec<[usize; 3]> = points.chunks(3).map(|p| [p[0], p[1], p[2]]).collect();
        let chosen = |recorded: Vec<Vec<f32>>| -> Vec<f32> {
            let place = |[layer, row, column]: &[usize; 3]| {
                (layer * extent.height + row) * extent.width + column
            };
            points
                .iter()
                .map(|point| recorded[0][place(point)])
                .collect()
        };
        let snow = Snow {
            extent,
            points: points.clone(),
            flakes,
        };
        compare(&golden, "snow", extent, &snow, &chosen);
    }
}

#[test]
fn kaleidoscope_its_edges_and_colors_match_pytorch() {
    let golden = Golden::open();
    for extent in SIZES {
        let size = format!("{}x{}", extent.height, extent.width);
        let of = |what: &str| format!("kaleidoscope {size} {what}");
        let masks = golden.bytes(&of("masks"));
        let shapes: Vec<Vec<usize>> = masks
            .chunks(extent.pixels())
            .map(|mask| (0..mask.len()).filter(|index| mask[*index] == 1).collect())
            .collect();
        let colors: Vec<[f32; 3]> = golden
            .floats(&of("hsv"))
            .chunks(3)
            .map(|hsv| kaleidoscope::color(hsv[0], hsv[1], hsv[2]))
            .collect();
        assert_close(
            &colors.concat(),
            &golden.floats(&of("colors")),
            1e-5,
            "colors",
        );
        let transparency = if extent.height > 24 { 0.1 } else { 0.2 };
        let shapes = Kaleidoscope::new(extent, shapes, colors, transparency);
        let edges = golden.indices(&of("edges"));
        assert_eq!(shapes.edges(), edges);
        let chosen = |recorded: Vec<Vec<f32>>| -> Vec<f32> {
            let greys = edges.iter().map(|edge| recorded[1][*edge]);
            recorded[0].iter().copied().chain(greys).collect()
        };
        compare(&golden, "kaleidoscope", extent, &shapes, &chosen);
    }
}

const CLASSES: usize = 6;

fn draw(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, Stream::Bench);
    (0..count).map(|_| rng.uniform()).collect()
}

/// Two layers on images of 3 x 32 x 32 pixels.
fn logits(images: Tensor<4>) -> Tensor<2> {
    let device = Device::of(&images);
    let layer =
        |rows, columns, seed| from_vec(draw(rows * columns, seed), [rows, columns], &device) - 0.5;
    let [batch, ..] = images.dims();
    let hidden = (images.reshape([batch, 3072]) - 0.5).matmul(layer(3072, 16, 1));
    (hidden * 0.5).tanh().matmul(layer(16, CLASSES, 2)) * 4.0
}

/// Smooth images, as corruptions displace and blend neighbors.
fn batch(count: usize) -> Batch {
    let mut pixels = Vec::new();
    for image in 0..count * 3 {
        let waves = draw(4, 10 + image as u64);
        for y in 0..32 {
            for x in 0..32 {
                let wave = (waves[0] * y as f32 + waves[1] * x as f32 + 6.0 * waves[2]).sin();
                pixels.push(0.5 + 0.45 * wave * waves[3]);
            }
        }
    }
    let images = from_vec(pixels, [count, 3, 32, 32], &Device::cpu());
    let classifier = TargetModel::new(&logits, &Device::cpu());
    let logits = classifier.logits(images.clone());
    Batch {
        labels: (0..count)
            .map(|row| logits.prediction(row).unwrap() as u32)
            .collect(),
        images,
        keys: (0..count as u64).map(|index| 3 * index + 1).collect(),
        seed: 1,
    }
}

fn attacks(strength: Strength) -> impl Iterator<Item = Unseen> {
    let all = Corruption::VALUES.iter();
    all.map(move |corruption| Unseen::new(*corruption, strength, 32))
}

#[test]
fn images_are_in_range_parameters_in_their_set_and_rendering_again_gives_the_same_image() {
    let batch = batch(3);
    let classifier = TargetModel::new(&logits, &Device::cpu());
    let clean = to_vec(batch.images.clone());
    for strength in [Strength::Low, Strength::High] {
        for attack in attacks(strength) {
            let name = attack.name();
            let found = Attack::Unseen(attack.clone()).go_on(&classifier, &batch, &[]);
            for index in 0..3 {
                let image = found.found[index].as_ref().unwrap();
                assert!(
                    image.iter().all(|pixel| (0.0..=1.0).contains(pixel)),
                    "{name}"
                );
                let parameters = found.parameters[index].as_ref().unwrap();
                let values = parameters.iter().map(|value| f64::from(*value));
                let length = attack.parameter_norm.length(values);
                let epsilon = attack.parameter_epsilon.value();
                assert!(length <= epsilon * (1.0 + 1e-6), "{name}: {length}");
                let clean = &clean[index * 3072..][..3072];
                let extent = Extent {
                    height: 32,
                    width: 32,
                };
                let key = batch.keys[index];
                let again = attack.render(clean, extent, batch.seed, key, parameters);
                assert_eq!(again.as_ref(), Some(image), "{name}");
                assert_ne!(image, clean, "{name}");
            }
        }
    }
}

/// The mean cross entropy of a batch after an attack.
fn loss(attack: &Unseen, batch: &Batch) -> f64 {
    let classifier = TargetModel::new(&logits, &Device::cpu());
    let found = Attack::Unseen(attack.clone()).perturb(&classifier, batch);
    let pixels: Vec<f32> = found.into_iter().flatten().flatten().collect();
    let count = batch.labels.len();
    let logits = classifier.logits(from_vec(pixels, [count, 3, 32, 32], &Device::cpu()));
    let losses = batch.labels.iter().enumerate().map(|(row, label)| {
        let label = *label as usize;
        let goal = Goal::CrossEntropy { label };
        goal.slope(logits.row(row), &mut [0.0; CLASSES])
    });
    losses.sum::<f64>() / count as f64
}

#[test]
fn an_attack_raises_the_loss_above_that_of_its_start() {
    let batch = batch(4);
    for attack in attacks(Strength::High) {
        let start = loss(
            &Unseen {
                steps: 0,
                ..attack.clone()
            },
            &batch,
        );
        let end = loss(&attack, &batch);
        assert!(end > start + 1e-3, "{}: {start} to {end}", attack.name());
    }
}

/// The same, one image at a time: a product of several rows rounds differently.
fn logits_one_by_one(images: Tensor<4>) -> Tensor<2> {
    let rows = 0..images.dims()[0];
    let rows = rows.map(|row| logits(images.clone().narrow(0, row, 1)));
    Tensor::cat(rows.collect(), 0)
}

fn evaluated(attack: Unseen, batch: usize, images: &Batch) -> advxl::eval::Outcome {
    let images = Images::Given {
        images: &images.images,
        labels: &images.labels,
    };
    let evaluation = Evaluation {
        network: &logits_one_by_one,
        search: None,
        sample: None,
        images: &images,
        attacks: &[Attack::Unseen(attack)],
        batch,
        seed: 4,
        device: &Device::cpu(),
        comm: &Comm::single(),
    };
    evaluation.run(&()).unwrap()
}

#[test]
fn a_higher_strength_lowers_accuracy_and_the_batch_size_changes_nothing() {
    let images = batch(24);
    let (mut low_total, mut high_total) = (0, 0);
    for (low, high) in attacks(Strength::Low).zip(attacks(Strength::High)) {
        let name = low.name();
        let weak = evaluated(low, 24, &images).standing();
        let strong = evaluated(high.clone(), 24, &images);
        assert!(
            strong.standing() <= weak,
            "{name}: {weak} to {}",
            strong.standing()
        );
        (low_total, high_total) = (low_total + weak, high_total + strong.standing());
        let in_parts = evaluated(high, 5, &images);
        assert_eq!(in_parts.robust, strong.robust, "{name}");
        assert_eq!(in_parts.distance, strong.distance, "{name}");
        assert_eq!(in_parts.margin, strong.margin, "{name}");
    }
    assert!(high_total < low_total, "{low_total} to {high_total}");
}

#[test]
fn every_corruption_renders_every_image_size() {
    for preset in Preset::VALUES {
        for corruption in Corruption::VALUES {
            for (height, width) in [(1, 1), (3, 5), (8, 30), (33, 17)] {
                let extent = Extent { height, width };
                let stream = Stream::Attack {
                    kind: AttackKind::Unseen,
                    image: 0,
                    run: 0,
                    iteration: 0,
                };
                let mut rng = Rng::new(0, stream);
                let mut renderer = preset.renderer(*corruption, extent, &mut rng);
                let parameters = renderer.start(0.1, &mut rng);
                renderer.redraw(&mut rng);
                let clean = draw(3 * extent.pixels(), 8);
                let image = renderer.render(&clean, &parameters);
                let what = format!("{} {height} {width}", corruption.word());
                assert!(
                    image.iter().all(|pixel| (0.0..=1.0).contains(pixel)),
                    "{what}"
                );
                let slopes = renderer.pull(&clean, &parameters, &clean);
                assert_eq!(slopes.len(), parameters.len(), "{what}");
                assert!(slopes.iter().all(|slope| slope.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn the_settings_are_the_published_ones() {
    let of = |corruption, strength, size| {
        let attack = Unseen::new(corruption, strength, size);
        let epsilon = attack.parameter_epsilon.value();
        (
            epsilon,
            attack.steps,
            attack.step_size,
            attack.parameter_norm,
        )
    };
    let gabor = of(Corruption::Gabor, Strength::Medium, 224);
    assert_eq!(gabor, (0.04, 100, 0.0003125, Norm::Linf));
    let snow = of(Corruption::Snow, Strength::High, 224);
    assert_eq!(snow, (25.0, 100, 0.1, Norm::L2));
    let jpeg = of(Corruption::Jpeg, Strength::Low, 32);
    assert_eq!(jpeg, (1.0 / 255.0, 50, 0.0024, Norm::Linf));
    let elastic = of(Corruption::Elastic, Strength::Low, 32);
    assert_eq!(elastic, (0.1, 30, 0.006, Norm::L2));
}
