//! Runs AutoAttack on your own model: any function from images in [0, 1] to logits that Burn can differentiate.
//!
//! ```text
//! cargo run --release --example attack_your_own_model
//! ```

use advxl::attack::Norm;
use advxl::distributed::Comm;
use advxl::error::Result;
use advxl::eval::autoattack::{Settings, Version};
use advxl::eval::{Evaluation, Images, checks};
use advxl::ops::Device;
use burn::tensor::{Distribution, Tensor};

fn main() -> Result<()> {
    let device = Device::cpu();

    // The model predicts the class whose color is nearest to the image's mean color. If a model needs normalization,
    // it belongs in this function.
    let colors = Tensor::<2>::random([10, 3], Distribution::Uniform(0.2, 0.8), &device.burn());
    let mean_color = |images: Tensor<4>| {
        let [batch, channels, height, width] = images.dims();
        images
            .reshape([batch, channels, height * width])
            .mean_dim(2) // [batch, 3, 1]
    };
    let logits = |images: Tensor<4>| {
        // [batch, 3, 1] - [1, 3, classes] -> [batch, 3, classes]
        let away = mean_color(images) - colors.clone().transpose().unsqueeze::<3>();
        (away.clone() * away).sum_dim(1).squeeze_dim(1) * -100.0
    };

    // The images in [0, 1] are noise around a random color; their labels are the model's predictions.
    let paint = Tensor::<4>::random(
        [64, 3, 1, 1],
        Distribution::Uniform(0.2, 0.8),
        &device.burn(),
    );
    let noise = Tensor::<4>::random(
        [64, 3, 16, 16],
        Distribution::Uniform(-0.2, 0.2),
        &device.burn(),
    );
    let images = paint + noise;
    let labels = advxl::loss::predictions(logits(images.clone()));

    let settings = Settings::new(
        Version::Standard,
        Norm::Linf,
        "8/255".parse().expect("a fraction"),
    );
    let attacks = settings.autoattack();
    let images = Images::Given {
        images: &images,
        labels: &labels,
    };
    let evaluation = Evaluation {
        network: &logits,
        search: None,
        images: &images,
        attacks: &attacks,
        sample: None,
        batch: 64,
        seed: 0,
        device: &device,
        comm: &Comm::single(),
    };

    for flag in checks::before(&evaluation)? {
        println!("warning: {}", flag.message);
    }
    let outcome = evaluation.run(&())?;
    for (index, stage) in outcome.stages.iter().enumerate() {
        println!(
            "{:<8} {:5.1} % robust",
            stage.attack,
            100.0 * outcome.accuracy_after(index)
        );
    }
    Ok(())
}
