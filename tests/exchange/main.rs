//! Models of open_clip and transformers: loading, compared with the outputs of those programs. `refusals.rs` tests
//! errors, `written.rs` exports to open_clip and timm, `hugging_face.rs` those to transformers.
//!
//! `tests/golden/make_clip.py` writes the recorded models.

mod hugging_face;
mod refusals;
mod written;

use std::path::{Path, PathBuf};
use std::process::Command;

use advxl::attack::{Norm, input_gradient};
use advxl::eval::autoattack::{Settings, Version};
use advxl::image::Preprocessing;
use advxl::model::config::common::{CLIP_MEAN, CLIP_STD};
use advxl::model::{ConvNextConfig, Model, ModelConfig, Pass, Pool, Position, Stem, VitConfig};
use advxl::ops::{Device, Gelu, from_vec, to_vec};
use advxl::weights::StateDict;
use advxl::weights::export;
use advxl::weights::export::card::Facts;
use advxl::weights::{Loaded, Outputs, StatedPreprocessing, import as weights};
use burn::tensor::Tensor;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/clip")
        .join(name)
}

#[track_caller]
fn refusal<T>(result: advxl::error::Result<T>, parts: &[&str]) {
    let error = result.err().expect("it is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    assert!(text.contains("hint: "), "{text}");
}

fn load(folder: &Path) -> advxl::error::Result<Loaded> {
    weights::load(folder, &Device::cpu())
}

fn vit(model: &Model) -> &VitConfig {
    match model {
        Model::Vit(vit) => &vit.config,
        Model::ConvNext(_) => panic!("a ConvNeXt"),
    }
}

fn images(size: usize) -> Tensor<4> {
    let values = (0..3 * size * size).map(|i| (i % 17) as f32 / 17.0);
    from_vec(values.collect(), [1, 3, size, size], &Device::cpu())
}

fn logits(model: &Model, size: usize) -> Vec<f32> {
    to_vec(model.logits(images(size), &Pass::evaluation()))
}

/// Wraps one of our models as if it had been loaded.
fn loaded(config: impl Into<ModelConfig>, classes: usize, image_size: usize) -> Loaded {
    Loaded {
        model: Model::new(&config.into(), classes, image_size, 1, &Device::cpu()),
        image_size,
        preprocessing: StatedPreprocessing {
            source: "config.json",
            preprocessing: Ok(Preprocessing::new(image_size)),
        },
        outputs: Outputs::Embedding,
        classes: Vec::new(),
        hash: String::new(),
        wrapper: None,
        statistics: None,
        notes: Vec::new(),
    }
}

fn export_to(loaded: &Loaded, text: &str, folder: &Path) -> advxl::error::Result<()> {
    export::open_clip(loaded, &Facts::default(), &golden(text), folder)
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn tensors(file: &Path) -> Tensors {
    let file = StateDict::open(file).unwrap();
    let names = file.names().map(str::to_owned);
    let tensor = |name: String| {
        let (shape, values) = (file.shape(&name).unwrap().to_vec(), file.floats(&name));
        (name, shape, values.unwrap())
    };
    names.map(tensor).collect()
}

/// Copies a recorded folder with changed configuration and weights.
fn changed(
    name: &str,
    into: &Path,
    change_config: impl FnOnce(&mut Value),
    change_weights: impl FnOnce(&mut Tensors),
) {
    let (config, file) = match name {
        "open_clip" | "clipa" => ("open_clip_config.json", "open_clip_model.safetensors"),
        _ => ("config.json", "model.safetensors"),
    };
    let text = std::fs::read_to_string(golden(name).join(config)).unwrap();
    let mut settings = serde_json::from_str(&text).unwrap();
    change_config(&mut settings);
    std::fs::write(into.join(config), settings.to_string()).unwrap();
    let mut weights = tensors(&golden(name).join(file));
    change_weights(&mut weights);
    let views = weights.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(into.join(file), bytes).unwrap();
}

fn at<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, Vec<usize>, Vec<f32>) {
    tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
}

#[track_caller]
fn assert_close(found: &[f32], right: &[f32], tolerance: f32, what: &str) {
    let largest = right
        .iter()
        .fold(0.0f32, |most, value| most.max(value.abs()));
    assert_eq!(found.len(), right.len(), "{what}");
    for (found, right) in found.iter().zip(right) {
        let off = (found - right).abs();
        assert!(off <= tolerance * largest, "{what}: {found}, not {right}");
    }
}

#[test]
fn models_of_other_programs_give_the_same_outputs() {
    for name in [
        "open_clip",
        "clipa",
        "hugging_face_vit",
        "hugging_face_clip_vision",
        "hugging_face_clip",
    ] {
        let loaded = load(&golden(name)).unwrap();
        let recorded = StateDict::open(&golden(name).join("recorded.safetensors")).unwrap();
        let images = recorded.floats("images").unwrap();
        let images: Tensor<4> = from_vec(images, [2, 3, 16, 16], &Device::cpu());
        let outputs = |images| loaded.model.logits(images, &Pass::evaluation());
        let right = recorded.floats("outputs").unwrap();
        assert_close(&to_vec(outputs(images.clone())), &right, 1e-5, name);
        let half_square = |images| {
            let squares = outputs(images).powi_scalar(2) * 0.5;
            squares.sum_dim(1).squeeze_dim(1)
        };
        let gradients = to_vec(input_gradient(&half_square, images).0);
        let right = recorded.floats("gradients").unwrap();
        assert_close(&gradients, &right, 1e-4, name);
    }
}

#[test]
fn configuration_next_to_the_weights_is_read() {
    let found = load(&golden("open_clip")).unwrap();
    let config = vit(&found.model);
    assert_eq!((config.gelu, config.pre_norm), (Gelu::Quick, true));
    assert_eq!((config.pool, config.heads), (Pool::Token, 2));
    assert_eq!((config.norm_eps, config.mean[0]), (1e-5, 0.48145466));
    assert_eq!((found.model.classes(), found.image_size), (10, 16));

    let found = load(&golden("clipa")).unwrap();
    let config = vit(&found.model);
    assert_eq!((config.gelu, config.pre_norm), (Gelu::Tanh, false));
    assert_eq!((config.pool, config.class_token), (Pool::Average, true));
    assert_eq!((config.norm_eps, config.mean[0]), (1e-6, 0.485));

    let found = load(&golden("hugging_face_vit")).unwrap();
    assert_eq!(found.classes, ["cat", "dog", "ship"]);
    let config = vit(&found.model);
    assert_eq!((config.norm_eps, config.mean[0]), (1e-12, 0.4));

    let found = load(&golden("hugging_face_clip")).unwrap();
    assert_eq!(vit(&found.model).gelu, Gelu::Quick);
}

/// Returns a small transformer of CLIP's form.
fn clip_form() -> VitConfig {
    VitConfig {
        depth: 1,
        hidden: 24,
        pre_norm: true,
        pool: Pool::Token,
        position: Position::Learned,
        norm_eps: 1e-5,
        gelu: Gelu::Quick,
        ..VitConfig::named("vit_micro").unwrap()
    }
}

#[test]
fn timms_names_of_clip_towers_imply_epsilon_activation_and_statistics() {
    let folder = tempfile::tempdir().unwrap();
    let config = VitConfig {
        hidden: 32,
        ..clip_form()
    };
    let ours = loaded(config.clone(), 3, 8);
    weights::save(
        &ours.model,
        &Preprocessing::new(8),
        Outputs::Embedding,
        &[],
        folder.path(),
    )
    .unwrap();
    // Unchanged, from a folder that advxl wrote.
    let found = load(folder.path()).unwrap();
    assert_eq!(*vit(&found.model), config);
    assert_eq!(logits(&found.model, 8), logits(&ours.model, 8));
    let of_timm = r#"{ "architecture": "vit_base_patch16_clip_quickgelu_224.openai",
        "model_args": { "num_heads": 3 } }"#;
    std::fs::write(folder.path().join("config.json"), of_timm).unwrap();
    let found = load(folder.path()).unwrap();
    let config = vit(&found.model);
    assert_eq!((config.norm_eps, config.gelu), (1e-5, Gelu::Quick));
    assert_eq!(config.std[2], 0.27577711);
}

#[test]
fn a_timm_tower_of_open_clip_with_a_projection_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let config = VitConfig {
        depth: 1,
        pool: Pool::Token,
        position: Position::Learned,
        ..VitConfig::named("vit_ti16").unwrap()
    };
    let mut ours = loaded(config, 10, 32);
    ours.model.normalize_by(Some(CLIP_MEAN), Some(CLIP_STD));
    changed(
        "open_clip",
        folder.path(),
        |config| {
            config["model_cfg"]["vision_cfg"] = json!({
                "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 32,
            });
        },
        |tensors| {
            tensors.retain(|tensor| !tensor.0.starts_with("visual."));
            for parameter in ours.model.parameters() {
                let name = match &parameter.name[..] {
                    "head.bias" => continue,
                    "head.weight" => "visual.head.proj.weight".to_owned(),
                    name => format!("visual.trunk.{name}"),
                };
                tensors.push((name, parameter.shape.clone(), parameter.to_vec()));
            }
        },
    );
    let found = load(folder.path()).unwrap();
    assert_eq!(logits(&found.model, 32), logits(&ours.model, 32));
}

#[test]
fn a_single_file_of_open_clip_is_loaded_by_its_name_there() {
    let folder = tempfile::tempdir().unwrap();
    let small = |pool| VitConfig {
        depth: 1,
        hidden: 24,
        pool,
        position: Position::Learned,
        pre_norm: true,
        norm_eps: 1e-5,
        gelu: Gelu::Quick,
        ..VitConfig::named("vit_s16").unwrap()
    };
    let device = Device::cpu();
    for (pool, name) in [
        (Pool::Token, "ViT-S-16-quickgelu"),
        (Pool::Average, "ViT-S-16-CLIPA-336"),
    ] {
        let out = folder.path().join(name);
        let ours = loaded(small(pool), 10, 32);
        export_to(&ours, "open_clip", &out).unwrap();
        let file = out.join("open_clip_model.safetensors");
        let found = weights::load_file(&file, name, &device).unwrap();
        let config = vit(&found.model);
        assert_eq!((config.pool, config.heads), (pool, 6));
        let (gelu, mean) = match pool {
            Pool::Token => (Gelu::Quick, 0.48145466),
            Pool::Average => (Gelu::Erf, 0.485),
        };
        assert_eq!(
            (config.gelu, config.mean[0], config.norm_eps),
            (gelu, mean, 1e-5)
        );
        for (found, ours) in found.model.parameters().iter().zip(ours.model.parameters()) {
            assert_eq!(found.to_vec(), ours.to_vec(), "{}", ours.name);
        }
        let parts = ["weights have open_clip tensor names", "--arch ViT-B-16"];
        refusal(
            weights::load_file(&file, "vit_small_patch16_224", &device),
            &parts,
        );
        let parts = ["width 768", "width 384", "is it a `ViT-S`?"];
        refusal(weights::load_file(&file, "ViT-B-16", &device), &parts);
        let parts = ["unknown architecture `ViT-B-16-SigLIP`"];
        refusal(
            weights::load_file(&file, "ViT-B-16-SigLIP", &device),
            &parts,
        );
    }
    let file = golden("hugging_face_vit").join("model.safetensors");
    let parts = ["weights have transformers tensor names", "load the folder"];
    refusal(
        weights::load_file(&file, "vit_small_patch16_224", &device),
        &parts,
    );
}
