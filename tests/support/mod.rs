//! A recipe small enough to run in a second, with every source of randomness enabled.

pub mod processes;

use std::path::Path;

/// Two stages on synthetic images; masking, mixing, RandAugment, drop path and average included.
pub const RECIPE: &str = r#"
seed = 3
precision = "f32"
model = { size = "vit_micro", width = 32, depth = 2, heads = 2, hidden = 64, pool = "average", class_token = true, position = "learned" }
data = { train = "synthetic:200", test = "synthetic:64" }
average = { decay = 0.9 }
checkpoint = { every_samples = 64, keep = 3 }
log = { every_samples = 32 }

[evaluation]
every_samples = 128
images = 32
attack = { norm = "linf", epsilon = "8/255", step_size = "2/255", steps = 2, start = "random" }

[[stage]]
name = "pretrain"
batch = 32
phases = [{ image_size = 16, samples = 128, masking = { kind = "random", ratio = 0.5 } }, { image_size = 16, samples = 64 }]
attack = { norm = "linf", epsilon = "8/255", step_size = "8/255", steps = 1, start = "random" }
objective = { kind = "cross_entropy", label_smoothing = 0.1 }
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95], clip_norm = 1.0 }
learning_rate = { peak = 1e-3, warmup_samples = 64, decay = "cosine" }
drop_path = 0.2
augmentation = { random_resized_crop = { area = [0.5, 1.0], ratio = [0.75, 1.33] }, flip = true, rand_augment = { operations = 2, magnitude = 9.0, deviation = 0.5 } }
mixing = { mixup_alpha = 0.8, cutmix_alpha = 1.0, probability = 1.0, switch_probability = 0.5 }

[[stage]]
name = "finetune"
batch = 32
phases = [{ image_size = 32, samples = 128 }]
attack = { norm = "l2", epsilon = "0.5", step_size = "0.2", steps = 2, start = "random" }
objective = { kind = "cross_entropy" }
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }
learning_rate = { peak = 5e-4, warmup_samples = 32, decay = "cosine", end = 1e-5 }
augmentation = { pad_crop = 4, flip = true }
"#;

/// Writes the recipe into a folder.
pub fn write_recipe(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("recipe.toml");
    std::fs::write(&path, RECIPE).unwrap();
    path
}

/// Runs the program and returns its exit code and standard error.
pub fn advxl(arguments: &[&str]) -> (i32, String) {
    let output = command(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Returns a command that runs the program with arguments.
pub fn command(arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_advxl"));
    command.args(arguments);
    command
}

/// Trains the recipe in a folder below `folder` and returns its path.
#[allow(dead_code)] // Not every test file trains.
pub fn trained(folder: &Path) -> std::path::PathBuf {
    let recipe = write_recipe(folder);
    let run = folder.join("run");
    let (code, text) = advxl(&[
        "train",
        recipe.to_str().unwrap(),
        "--out",
        run.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{text}");
    run
}

/// Starts the program, kills it once its run has written `lines` lines of metrics, and waits until it ends.
///
/// Uses SIGKILL, so the process cannot clean up.
#[allow(dead_code)] // Not every test file kills.
pub fn kill_after(lines: usize, arguments: &[&str], run: &Path) {
    let mut command = command(arguments);
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    let metrics = run.join("metrics.jsonl");
    loop {
        let written = std::fs::read_to_string(&metrics).unwrap_or_default();
        if written.lines().count() >= lines || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait().unwrap();
}

/// Writes class folders of gray images, each of a different shade, of 16 pixels.
#[allow(dead_code)] // Not every test file uses images.
pub fn class_folders(root: &Path, classes: &[&str], count: u8) {
    for class in classes {
        let folder = root.join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for number in 0..count {
            let picture = image::GrayImage::from_pixel(16, 16, image::Luma([number * 7]));
            picture
                .save(folder.join(format!("{number:02}.png")))
                .unwrap();
        }
    }
}

/// Returns all files below a folder.
#[allow(dead_code)] // Not every test file needs this.
pub fn files_below(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => files_below(&path),
            false => vec![path],
        })
        .collect()
}
