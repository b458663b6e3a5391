//! Attacks on degenerate models: too few classes; non-finite, flat or huge logits and gradients.
//!
//! For any model, an attack ends, returns only images within the threat model, and is right about them; an image with a
//! non-finite logit is never robust.

use advxl::attack::unseen::{Corruption, Strength, Unseen};
use advxl::attack::{Attack, Batch, Norm, TargetModel};
use advxl::distributed::Comm;
use advxl::eval::autoattack::{ATTACKS, Settings, Version};
use advxl::eval::{Evaluation, Images, Outcome, checks};
use advxl::ops::{Device, from_vec, to_vec};
use advxl::rng::{Rng, Stream};
use advxl::settings::Words;
use burn::tensor::Tensor;

const NORMS: [Norm; 3] = [Norm::Linf, Norm::L2, Norm::L1];
const IMAGES: usize = 4;

/// A change to the logits of a linear model, given the mean of each image, `[batch, 1]`.
type Twist = fn(Tensor<2>, Tensor<2>) -> Tensor<2>;

/// The changes. The mean of the first image is exactly 0.5, and those of all others are below it.
const TWISTS: [(&str, Twist); 14] = [
    ("sound", |z, _| z),
    ("constant", |z, _| z.zeros_like()),
    ("flat", |z, _| z * 0.0),
    ("rounded", |z, _| (z * 4.0).without_autodiff().round()),
    ("huge", |z, _| z * 1e37),
    ("overflowing", |z, _| z * 1e38 * 1e10),
    ("tiny", |z, _| z * 1e-30 * 1e-14),
    ("undefined", |z, _| z * f32::NAN),
    ("one infinite", |z, _| {
        let [rows, classes] = z.dims();
        z.slice_fill([0..rows, 0..classes.min(1)], f32::INFINITY)
    }),
    ("minus infinity", |z, _| {
        let [rows, classes] = z.dims();
        z.slice_fill([0..rows, 0..classes.min(1)], f32::NEG_INFINITY)
    }),
    // The gradient of a square root at 0 is infinite, and NaN when multiplied by 0.
    ("undefined gradient", |z, mean| z + (mean * 0.0).sqrt()),
    ("steep gradient", |z, mean| {
        z + (mean - 0.5).abs().powf_scalar(0.1)
    }),
    // The margin shrinks to zero as the mean grows.
    ("undefined in the ball", |z, mean| {
        z * (-mean + 0.501).sqrt()
    }),
    ("undefined at the image", |z, mean| z + (mean - 0.5).recip()),
];

/// A linear model of images; logits are `[batch, classes]`.
struct Model {
    weights: Tensor<2>,
    twist: Twist,
}

impl Model {
    fn new(pixels: usize, classes: usize, twist: Twist) -> Self {
        let mut rng = Rng::new(7, Stream::Bench);
        let weights = (0..pixels * classes).map(|_| rng.normal()).collect();
        let weights = from_vec(weights, [pixels, classes], &Device::cpu());
        Self { weights, twist }
    }

    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let [batch, channels, height, width] = images.dims();
        let flat = images.reshape([batch, channels * height * width]);
        let mean = flat.clone().mean_dim(1);
        (self.twist)(flat.matmul(self.weights.clone()), mean)
    }
}

fn images([height, width]: [usize; 2]) -> Tensor<4> {
    let mut rng = Rng::new(8, Stream::Bench);
    let pixels = 3 * height * width;
    let mut values: Vec<f32> = (0..IMAGES * pixels)
        .map(|_| rng.between(0.3, 0.4))
        .collect();
    values[..pixels].fill(0.5);
    from_vec(values, [IMAGES, 3, height, width], &Device::cpu())
}

fn attack(name: &str, norm: Norm, epsilon: &str, version: Version) -> Attack {
    let settings = Settings {
        steps: Some(5),
        restarts: Some(2),
        queries: Some(12),
        ..Settings::new(version, norm, epsilon.parse().unwrap())
    };
    let mut attack = settings.attack(name).unwrap();
    if let Attack::Apgd(apgd) = &mut attack {
        apgd.averages = apgd.averages.min(2);
    }
    attack
}

/// Whether a row of logits predicts `label`, computed independently of the library.
fn says(row: &[f32], label: usize) -> bool {
    let finite = row.iter().all(|logit| logit.is_finite());
    let beaten = |class: usize| {
        let (own, other) = (row[label], row[class]);
        other > own || (other == own && class < label)
    };
    finite && label < row.len() && (0..row.len()).all(|class| class == label || !beaten(class))
}

#[test]
fn unseen_attacks_on_every_model_end_and_return_only_images() {
    let device = Device::cpu();
    let mut turn = 0;
    for (kind, twist) in TWISTS {
        for corruption in Corruption::VALUES {
            turn += 1;
            let shape = [[2, 2], [5, 3], [9, 17]][turn % 3];
            let model = Model::new(3 * shape[0] * shape[1], 3, twist);
            let logits = |images| model.logits(images);
            let batch = Batch {
                images: images(shape),
                labels: vec![turn as u32 % 3; IMAGES],
                keys: vec![3, 1, 4, 1],
                seed: turn as u64,
            };
            let attack = Unseen {
                steps: 4,
                ..Unseen::new(*corruption, Strength::High, 32)
            };
            let attack = Attack::Unseen(attack);
            let found = attack.perturb(&TargetModel::new(&logits, &device), &batch);
            for image in found.into_iter().flatten().flatten() {
                let case = format!("{} {kind} {shape:?}", corruption.word());
                assert!((0.0..=1.0).contains(&image), "{case}: {image}");
            }
        }
    }
}

#[test]
fn every_attack_on_every_model_ends_and_returns_only_images_of_its_ball() {
    let device = Device::cpu();
    let shapes = [[1, 1], [2, 2], [5, 3]];
    // Small, larger than the pixel range and than any image, zero, and beyond f32.
    let epsilons = ["0.05", "40", "0", "1e300"];
    let mut turn = 0;
    for (kind, twist) in TWISTS {
        for classes in [0, 1, 2, 3, 5] {
            for (name, norm) in ATTACKS
                .iter()
                .flat_map(|name| NORMS.map(|norm| (name, norm)))
            {
                turn += 1;
                let shape = shapes[turn % 3];
                let (epsilon, version) = (epsilons[turn % 4], Version::VALUES[turn % 3]);
                let label = turn % 6;
                let case = format!("{name} {norm:?} {epsilon} {kind} {classes} {shape:?} {label}");
                let model = Model::new(3 * shape[0] * shape[1], classes, twist);
                let logits = |images| model.logits(images);
                let batch = Batch {
                    images: images(shape),
                    labels: vec![label as u32; IMAGES],
                    keys: vec![3, 1, 4, 1],
                    seed: turn as u64,
                };
                let attack = attack(name, norm, epsilon, version);
                let found = attack.perturb(&TargetModel::new(&logits, &device), &batch);
                assert_eq!(found.len(), IMAGES, "{case}");
                let clean = to_vec(batch.images.clone());
                let clean = clean.chunks(clean.len() / IMAGES);
                for (image, clean) in found.into_iter().zip(clean) {
                    let Some(image) = image else { continue };
                    assert!(
                        image.iter().all(|pixel| (0.0..=1.0).contains(pixel)),
                        "{case}"
                    );
                    let distance = norm.distance(&image, clean);
                    assert!(
                        distance <= attack.epsilon().unwrap().value() + 1e-6,
                        "{case}: {distance}"
                    );
                    let image = from_vec(image, [1, 3, shape[0], shape[1]], &device);
                    let row = to_vec(model.logits(image));
                    // PGD returns its last image, fooled or not; of equal logits the first class is predicted.
                    assert!(*name == "pgd" || !says(&row, label), "{case}: {row:?}");
                }
            }
        }
    }
}

#[test]
fn empty_batches_and_images_without_pixels_are_left_alone() {
    let device = Device::cpu();
    let model = Model::new(12, 3, |z, _| z);
    let logits = |images| model.logits(images);
    let classifier = TargetModel::new(&logits, &device);
    for (name, norm) in ATTACKS
        .iter()
        .flat_map(|name| NORMS.map(|norm| (name, norm)))
    {
        for [count, height] in [[0, 2], [2, 0]] {
            let batch = Batch {
                images: Tensor::zeros([count, 3, height, 2], &device.burn()),
                labels: vec![0; count],
                keys: vec![0; count],
                seed: 0,
            };
            let attack = attack(name, norm, "0.1", Version::Standard);
            assert_eq!(attack.perturb(&classifier, &batch), vec![None; count]);
        }
    }
}

/// Runs an evaluation of a model with all attacks. Returns the outcome and the names of its flags.
fn evaluate(
    model: &Model,
    given: &Tensor<4>,
    labels: &[u32],
    attacks: &[Attack],
) -> advxl::error::Result<(Outcome, Vec<String>)> {
    let logits = |images| model.logits(images);
    let images = Images::Given {
        images: given,
        labels,
    };
    let device = Device::cpu();
    let evaluation = Evaluation {
        network: &logits,
        search: None,
        images: &images,
        attacks,
        sample: None,
        batch: 3,
        seed: 0,
        device: &device,
        comm: &Comm::single(),
    };
    let mut flags = checks::before(&evaluation)?;
    let outcome = evaluation.run(&())?;
    flags.extend(checks::after(&outcome));
    Ok((outcome, flags.into_iter().map(|flag| flag.check).collect()))
}

#[test]
fn a_non_finite_logit_is_never_robust_and_is_counted() {
    // The number of the four images whose logits are finite and correct everywhere in the ball.
    let right = [
        ("overflowing", 0),
        ("undefined", 0),
        ("one infinite", 0),
        ("minus infinity", 0),
        ("undefined in the ball", 3),
        ("undefined at the image", 3),
    ];
    for (kind, most) in right {
        let (_, twist) = TWISTS.into_iter().find(|(name, _)| *name == kind).unwrap();
        let given = images([2, 2]);
        for classes in [2, 3, 5] {
            // Labels with which all images would be correct if the logits were finite.
            let sound = Model::new(12, classes, |z, _| z);
            let labels = advxl::loss::predictions(sound.logits(given.clone()));
            let model = Model::new(12, classes, twist);
            for (norm, epsilon) in NORMS.into_iter().zip(["0.004", "0.01", "0.05"]) {
                let attacks = ATTACKS.map(|name| attack(name, norm, epsilon, Version::Standard));
                let (outcome, flags) = evaluate(&model, &given, &labels, &attacks).unwrap();
                let (standing, bad) = (outcome.standing(), outcome.not_finite());
                let case =
                    format!("{kind} {classes} {norm:?}: {standing} robust, {bad} not finite");
                assert!(
                    standing <= most && bad >= 1 && standing + bad <= IMAGES,
                    "{case}"
                );
                assert!(
                    flags.contains(&"not_finite".to_owned()),
                    "{case}: {flags:?}"
                );
                assert!(
                    outcome
                        .margin
                        .iter()
                        .flatten()
                        .all(|margin| margin.is_finite())
                );
                // The first image has non-finite logits, or reaches some in its ball.
                assert!(!outcome.robust[0], "{case}");
            }
        }
    }
}

#[test]
fn on_a_linear_model_each_attack_is_right_about_every_image() {
    let given = images([3, 3]);
    for classes in [2, 3, 5] {
        let model = Model::new(27, classes, |z, _| z);
        let rows = to_vec(model.logits(given.clone()));
        let labels = advxl::loss::predictions(model.logits(given.clone()));
        let weights = to_vec(model.weights.clone());
        for norm in NORMS {
            // The distance to the nearest boundary, by the dual norm of the difference of two classes' weights.
            let dual = [Norm::L1, Norm::L2, Norm::Linf][norm as usize];
            let radius = |(row, label): (&[f32], &u32)| {
                let label = *label as usize;
                let to = |class: usize| {
                    let weights = weights.chunks(classes);
                    let slope = dual.length(weights.map(|w| f64::from(w[label] - w[class])));
                    f64::from(row[label] - row[class]) / slope
                };
                let others = (0..classes).filter(|class| *class != label);
                others.map(to).fold(f64::INFINITY, f64::min)
            };
            let radii: Vec<f64> = rows.chunks(classes).zip(&labels).map(radius).collect();
            for (share, robust) in [(0.95, IMAGES), (1.25, 0)] {
                // Evaluate each image with a ball that nearly reaches the boundary, or just crosses it.
                for (index, radius) in radii.iter().enumerate() {
                    let image = given.clone().narrow(0, index, 1);
                    let epsilon = (share * radius).to_string();
                    for name in ATTACKS {
                        let settings = Settings {
                            queries: Some(400),
                            ..Settings::new(Version::Standard, norm, epsilon.parse().unwrap())
                        };
                        let attack = settings.attack(name).unwrap();
                        let (outcome, _) =
                            evaluate(&model, &image, &labels[index..=index], &[attack]).unwrap();
                        let case = format!("{name} {norm:?} {classes} {share}");
                        // Random search needs more queries to come this close to the boundary.
                        if name != "square" || robust > 0 {
                            assert_eq!(outcome.standing(), robust.min(1), "{case}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn accuracy_over_fewer_than_two_classes_or_no_images_is_refused() {
    let given = images([2, 2]);
    let attacks = [attack("apgd-ce", Norm::Linf, "0.1", Version::Standard)];
    let refused = |classes: usize, given: &Tensor<4>, labels: &[u32]| {
        let model = Model::new(12, classes, |z, _| z);
        let error = evaluate(&model, given, labels, &attacks).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let one = refused(1, &given, &[0; IMAGES]);
    assert!(one.contains("the model has 1 class"), "{one}");
    let none = refused(0, &given, &[0; IMAGES]);
    assert!(none.contains("the model has no classes"), "{none}");
    let empty = refused(3, &Tensor::zeros([0, 3, 2, 2], &Device::cpu().burn()), &[]);
    assert!(empty.contains("no images"), "{empty}");
    let normalized = refused(3, &(given * 4.0), &[0; IMAGES]);
    assert!(
        normalized.contains("image 0 has a pixel value of 2, outside [0, 1]"),
        "{normalized}"
    );
}
