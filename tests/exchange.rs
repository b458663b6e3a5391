//! Models of open_clip and transformers: read, held to what those programs answered, and written for open_clip.
//!
//! How the recorded models were made: `tests/golden/make_clip.py`.

use std::path::{Path, PathBuf};
use std::process::Command;

use advxl::attack::input_gradient;
use advxl::export::{self, Facts};
use advxl::fused::{Gelu, from_vec, to_vec};
use advxl::model::config::{CLIP_MEAN, CLIP_STD};
use advxl::model::weights::{self, Loaded};
use advxl::model::{
    ConvNextConfig, Model, ModelConfig, Pass, Pool, Position, StateDict, Stem, VitConfig,
};
use burn::tensor::{Device, Tensor};
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
    weights::load(folder, &Device::flex())
}

fn vit(model: &Model) -> &VitConfig {
    match model {
        Model::Vit(vit) => &vit.config,
        Model::ConvNext(_) => panic!("a ConvNeXt"),
    }
}

fn images(size: usize) -> Tensor<4> {
    let values = (0..3 * size * size).map(|i| (i % 17) as f32 / 17.0);
    from_vec(values.collect(), [1, 3, size, size], &Device::flex())
}

fn logits(model: &Model, size: usize) -> Vec<f32> {
    to_vec(model.logits(images(size), &Pass::evaluation()))
}

/// A model of ours as if it had been loaded.
fn loaded(config: impl Into<ModelConfig>, classes: usize, image_size: usize) -> Loaded {
    Loaded {
        model: Model::new(&config.into(), classes, image_size, 1, &Device::flex()),
        image_size,
        classes: Vec::new(),
        hash: String::new(),
        wrapper: None,
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

/// A copy of a recorded folder, its configuration and its weights changed.
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
fn models_of_other_programs_answer_as_they_do_there() {
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
        let images: Tensor<4> = from_vec(images, [2, 3, 16, 16], &Device::flex());
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
fn what_stands_beside_the_weights_is_read() {
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

#[test]
fn timms_names_of_clips_towers_tell_epsilon_activation_and_statistics() {
    let folder = tempfile::tempdir().unwrap();
    let config = VitConfig {
        depth: 1,
        hidden: 32,
        pre_norm: true,
        pool: Pool::Token,
        position: Position::Learned,
        norm_eps: 1e-5,
        gelu: Gelu::Quick,
        ..VitConfig::named("vit_micro").unwrap()
    };
    let ours = loaded(config.clone(), 3, 8);
    weights::save(&ours.model, 8, &[], folder.path()).unwrap();
    // As it was, from a folder of ours.
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
fn what_came_from_open_clip_goes_back_bit_for_bit() {
    for name in ["open_clip", "clipa"] {
        let folder = tempfile::tempdir().unwrap();
        let first = load(&golden(name)).unwrap();
        export_to(&first, name, folder.path()).unwrap();
        let file = "open_clip_model.safetensors";
        assert_eq!(
            tensors(&folder.path().join(file)),
            tensors(&golden(name).join(file)),
            "{name}"
        );
        let second = load(folder.path()).unwrap();
        assert_eq!(second.model.config(), first.model.config());
        assert_eq!(logits(&second.model, 16), logits(&first.model, 16));
        let card = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
        assert!(card.contains("library_name: open_clip"), "{card}");
        assert!(card.contains("10 dimensions of the embedding"), "{card}");
    }
}

/// A model of `timm`'s sizes that open_clip's own tower cannot be: its head has a bias.
fn with_head_bias(config: impl Into<ModelConfig>) -> Loaded {
    let mut ours = loaded(config, 10, 224);
    let bias = ours.model.parameters_mut().into_iter().last().unwrap();
    bias.value = from_vec((1..=10).map(|i| i as f32).collect(), [10], &Device::flex());
    ours
}

#[test]
fn a_model_with_biases_goes_to_open_clip_as_timms_of_its_form() {
    for (config, name, pool) in [
        (
            ModelConfig::named("vit_ti16").unwrap(),
            "vit_tiny_patch16_224",
            "avg",
        ),
        (
            ModelConfig::Vit(VitConfig {
                pool: Pool::Token,
                ..VitConfig::named("vit_ti16").unwrap()
            }),
            "vit_tiny_patch16_224",
            "token",
        ),
        (
            ModelConfig::named("convnext_atto").unwrap(),
            "convnext_atto",
            "avg",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let ours = with_head_bias(config);
        // The text tower's activation does not bind timm's models.
        export_to(&ours, "open_clip", folder.path()).unwrap();
        let path = folder.path().join("open_clip_config.json");
        let config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let vision = &config["model_cfg"]["vision_cfg"];
        assert_eq!(vision["timm_model_name"], name);
        assert_eq!(
            (&vision["timm_pool"], &vision["timm_proj"]),
            (&json!(pool), &json!(""))
        );
        let found = load(folder.path()).unwrap();
        let others = ours.model.parameters();
        let others: Vec<_> = others
            .iter()
            .map(|parameter| (&parameter.name, parameter.to_vec()))
            .collect();
        for parameter in found.model.parameters() {
            // Fixed positions are weights there.
            let Some((_, values)) = others.iter().find(|(name, _)| **name == parameter.name) else {
                assert_eq!(parameter.name, "pos_embed");
                continue;
            };
            assert_eq!(parameter.to_vec(), *values, "{}", parameter.name);
        }
        if let Model::Vit(vit) = &found.model {
            assert_eq!(vit.config.norm_eps, 1e-6);
            assert_close(
                &logits(&found.model, 224),
                &logits(&ours.model, 224),
                1e-6,
                name,
            );
        }
        if name.starts_with("convnext") {
            let file = StateDict::open(&folder.path().join("open_clip_model.safetensors")).unwrap();
            let shape = file.shape("visual.trunk.stages.0.blocks.0.mlp.fc1.weight");
            assert_eq!(shape.unwrap(), [160, 40, 1, 1]);
        }
    }
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
    ours.model.normalise_by(Some(CLIP_MEAN), Some(CLIP_STD));
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
fn a_file_of_open_clip_alone_is_loaded_by_its_name_there() {
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
    let device = Device::flex();
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
        let parts = ["open_clip's names", "--arch ViT-B-16"];
        refusal(
            weights::load_file(&file, "vit_small_patch16_224", &device),
            &parts,
        );
        let parts = ["768 wide", "384 wide", "is it a `ViT-S`?"];
        refusal(weights::load_file(&file, "ViT-B-16", &device), &parts);
        let parts = ["`ViT-B-16-SigLIP` is no architecture"];
        refusal(
            weights::load_file(&file, "ViT-B-16-SigLIP", &device),
            &parts,
        );
    }
    let file = golden("hugging_face_vit").join("model.safetensors");
    let parts = ["transformers's names", "load the folder"];
    refusal(
        weights::load_file(&file, "vit_small_patch16_224", &device),
        &parts,
    );
}

#[test]
fn a_configuration_of_open_clip_that_is_another_model_is_refused() {
    type Case<'a> = (&'a str, Value, &'a [&'a str]);
    let cases: &[Case] = &[
        (
            "vision_cfg/attentional_pool",
            json!(true),
            &["attentional_pool = true"],
        ),
        (
            "vision_cfg/ls_init_value",
            json!(0.1),
            &["ls_init_value = 0.1"],
        ),
        ("vision_cfg/scale_fc", json!(true), &["scale_fc = true"]),
        (
            "vision_cfg/layers",
            json!([3, 4, 6, 3]),
            &["layers = [3,4,6,3]", "ResNet"],
        ),
        (
            "vision_cfg/pool_type",
            json!("avg"),
            &["pool_type = `avg` without final_ln_after_pool"],
        ),
        (
            "vision_cfg/pool_type",
            json!("none"),
            &["pool_type = `none`"],
        ),
        (
            "vision_cfg/act_kwargs",
            json!({ "approximate": "tanh" }),
            &["act_kwargs", "quick_gelu"],
        ),
        (
            "vision_cfg/norm_kwargs",
            json!({ "bias": false }),
            &["norm_kwargs = {\"bias\":false}"],
        ),
        (
            "vision_cfg/norm_kwargs",
            json!({ "eps": 0 }),
            &["norm_kwargs.eps = 0"],
        ),
        (
            "vision_cfg/rope",
            json!(true),
            &["rope = true", "not known here"],
        ),
        (
            "vision_cfg/head_width",
            json!(0),
            &["width / head_width = 0 do not divide the width, 24"],
        ),
        (
            "vision_cfg/width",
            json!(768),
            &["width = 768", "tokens 24 wide"],
        ),
        (
            "vision_cfg/layers",
            json!(3),
            &["layers = 3", "weights are of 2 blocks"],
        ),
        (
            "vision_cfg/no_ln_pre",
            json!(true),
            &["no place for the weights `visual.ln_pre.bias`"],
        ),
        ("embed_dim", json!(512), &["embed_dim = 512", "10 rows"]),
        ("vision_cfg", json!(3), &["has no `vision_cfg`"]),
        (
            "vision_cfg/timm_model_name",
            json!("resnet50"),
            &["timm_model_name = `resnet50`"],
        ),
        (
            "vision_cfg",
            json!({ "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map" }),
            &["timm_pool = `map`"],
        ),
        (
            "vision_cfg",
            json!({ "timm_model_name": "vit_tiny_patch16_224", "timm_proj": "mlp" }),
            &["timm_proj = `mlp`"],
        ),
    ];
    for (key, value, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        let change = |config: &mut Value| {
            let mut place = &mut config["model_cfg"];
            for key in key.split('/') {
                place = &mut place[key];
            }
            *place = value.clone();
        };
        changed("open_clip", folder.path(), change, |_| {});
        refusal(load(folder.path()), parts);
    }
    let folder = tempfile::tempdir().unwrap();
    let change = |config: &mut Value| config["preprocess_cfg"]["std"] = json!([1, 0, 1]);
    changed("open_clip", folder.path(), change, |_| {});
    refusal(
        load(folder.path()),
        &["`open_clip_config.json` has std = [1,0,1]"],
    );
    std::fs::write(folder.path().join("open_clip_config.json"), "{").unwrap();
    refusal(
        load(folder.path()),
        &["`open_clip_config.json` is not JSON"],
    );
}

#[test]
fn a_configuration_of_transformers_that_is_another_model_is_refused() {
    for (name, key, value, parts) in [
        (
            "hugging_face_vit",
            "model_type",
            json!("siglip"),
            &["model_type = `siglip`"][..],
        ),
        (
            "hugging_face_vit",
            "hidden_act",
            json!("relu"),
            &["hidden_act = `relu`", "`gelu_new`"],
        ),
        (
            "hugging_face_vit",
            "num_attention_heads",
            json!(5),
            &["num_attention_heads = 5 do not divide"],
        ),
        (
            "hugging_face_vit",
            "num_hidden_layers",
            json!(1),
            &["num_hidden_layers = 1", "weights are of 2 blocks"],
        ),
        (
            "hugging_face_vit",
            "hidden_size",
            json!(48),
            &["hidden_size = 48", "24 wide"],
        ),
        (
            "hugging_face_vit",
            "layer_norm_eps",
            json!("small"),
            &["layer_norm_eps = \"small\""],
        ),
        (
            "hugging_face_vit",
            "id2label",
            json!({ "0": "a", "1": "b" }),
            &["num_labels = 2", "`classifier.weight` 3 rows"],
        ),
        (
            "hugging_face_clip_vision",
            "projection_dim",
            json!(11),
            &["projection_dim = 11"],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        changed(name, folder.path(), |config| config[key] = value, |_| {});
        refusal(load(folder.path()), parts);
    }
    let folder = tempfile::tempdir().unwrap();
    changed("hugging_face_vit", folder.path(), |_| {}, |_| {});
    let preprocessor = folder.path().join("preprocessor_config.json");
    std::fs::write(&preprocessor, r#"{ "image_std": [1, 1] }"#).unwrap();
    refusal(
        load(folder.path()),
        &["`preprocessor_config.json` has image_std = [1,1]"],
    );
    std::fs::write(
        &preprocessor,
        r#"{ "do_normalize": false, "image_std": [2, 2, 2] }"#,
    )
    .unwrap();
    assert_eq!(vit(&load(folder.path()).unwrap().model).std, [1.0; 3]);
}

#[test]
fn weights_of_other_programs_that_do_not_make_the_model_are_refused_under_their_names() {
    type Case<'a> = (&'a str, fn(&mut Tensors), &'a [&'a str]);
    const QKV: &str = "visual.transformer.resblocks.1.attn.in_proj_weight";
    const QUERY: &str = "vit.encoder.layer.0.attention.attention.query.weight";
    let cases: &[Case] = &[
        (
            "open_clip",
            |tensors| tensors.retain(|tensor| tensor.0 != "visual.proj"),
            &["`visual.proj` is missing"],
        ),
        (
            "open_clip",
            |tensors| tensors.retain(|tensor| tensor.0 != QKV),
            &["`visual.transformer.resblocks.1.attn.in_proj_weight` is missing"],
        ),
        (
            "open_clip",
            |tensors| tensors.retain(|tensor| !tensor.0.starts_with("visual.")),
            &["`visual.conv1.weight` is missing"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, QKV).1.reverse(),
            &["in_proj_weight` has shape [24, 72] where [72, 24] is needed"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, "visual.proj").1 = vec![240],
            &["`visual.proj` has shape [240], not a matrix"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, "visual.proj").1 = vec![20, 12],
            &["`visual.proj` transposed", "embed_dim = 10"],
        ),
        (
            "open_clip",
            |tensors| {
                let proj = at(tensors, "visual.proj");
                (proj.1, proj.2) = (vec![0, 1 << 40], vec![]);
            },
            &["`visual.proj` transposed has no numbers"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, "visual.class_embedding").2[5] = f32::NAN,
            &["`visual.class_embedding` holds NaN at place 5"],
        ),
        (
            "open_clip",
            |tensors| tensors.push(("visual.attn_pool.query".into(), vec![1], vec![1.0])),
            &["no place for the weights `visual.attn_pool.query`"],
        ),
        (
            "open_clip",
            |tensors| tensors.push(("transformer.resblocks.0.lora".into(), vec![1], vec![1.0])),
            &["no place for the weights `transformer.resblocks.0.lora`"],
        ),
        (
            "hugging_face_vit",
            |tensors| tensors.retain(|tensor| tensor.0 != QUERY),
            &["attention.query.weight` is missing"],
        ),
        (
            "hugging_face_vit",
            |tensors| {
                let query = at(tensors, QUERY);
                (query.1, query.2) = (vec![12, 24], vec![0.0; 288]);
            },
            &["attention.key.weight` has shape [24, 24], not [12, 24], as"],
        ),
        (
            "hugging_face_vit",
            |tensors| tensors.push(("vit.encoder.layer.0.extra".into(), vec![1], vec![1.0])),
            &["no place for the weights `vit.encoder.layer.0.extra`"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.retain(|tensor| !tensor.0.contains("pre_layrnorm")),
            &["`vision_model.pre_layrnorm.weight` is missing"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.retain(|tensor| tensor.0 != "visual_projection.weight"),
            &["`visual_projection.weight` is missing"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.push(("text_model.encoder.layers.0.new".into(), vec![1], vec![1.0])),
            &["no place for the weights `text_model.encoder.layers.0.new`"],
        ),
    ];
    for (name, change, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        changed(name, folder.path(), |_| {}, change);
        refusal(load(folder.path()), parts);
    }
}

#[test]
fn what_another_program_has_no_word_for_is_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let small = VitConfig {
        depth: 1,
        hidden: 24,
        ..VitConfig::named("vit_micro").unwrap()
    };
    let mut ours = with_head_bias(small.clone());
    ours.image_size = 16;
    let parts = [
        "adds a bias in its head",
        "another activation",
        "timm has none",
        "--to timm",
    ];
    refusal(export_to(&ours, "open_clip", &out), &parts);
    let parts = [
        "text tower in",
        "an embedding of 10 numbers, and the model gives 7",
    ];
    refusal(
        export_to(&loaded(small.clone(), 7, 16), "clipa", &out),
        &parts,
    );
    let parts = ["is not a folder of open_clip"];
    refusal(export_to(&ours, "hugging_face_vit", &out), &parts);
    let tokenless = VitConfig {
        class_token: false,
        ..small.clone()
    };
    refusal(
        export_to(&loaded(tokenless, 10, 16), "clipa", &out),
        &["has no class token"],
    );
    let stem = VitConfig {
        stem: Stem::Conv,
        ..small.clone()
    };
    let ours = loaded(stem, 10, 16);
    refusal(
        export_to(&ours, "clipa", &out),
        &["has a convolutional stem"],
    );
    let to_timm = |ours: &Loaded| export::timm(ours, &Facts::default(), &out);
    refusal(to_timm(&ours), &["no word for a convolutional stem"]);
    let eps = VitConfig {
        norm_eps: 1e-4,
        ..small
    };
    refusal(to_timm(&loaded(eps, 10, 16)), &["the norms add 1e-4"]);
    let patch = ConvNextConfig {
        patch: 2,
        ..ConvNextConfig::named("convnext_atto").unwrap()
    };
    refusal(
        export_to(&loaded(patch, 10, 32), "clipa", &out),
        &["is a ConvNeXt"],
    );
    assert!(!out.exists());
    // A smaller epsilon than timm's changes a rounding there, which the card tells.
    let vit = load(&golden("hugging_face_vit")).unwrap();
    to_timm(&vit).unwrap();
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("made with 1e-12"), "{card}");
    assert_eq!(load(&out).unwrap().model.config(), vit.model.config());
    refusal(to_timm(&vit), &["is not empty"]);
}

#[test]
fn the_command_exports_for_open_clip_and_asks_for_its_text_tower() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let (model, out) = (golden("clipa"), out.to_str().unwrap());
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_advxl"));
        command.arg("export").arg(&model).args(["--out", out]);
        let output = command.args(more).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), text)
    };
    let text = model.to_str().unwrap();
    for (more, part) in [
        (
            &["--to", "open-clip"][..],
            "give the folder of the model whose text tower",
        ),
        (
            &["--to", "timm", "--text", text],
            "--text is for --to open-clip",
        ),
        (&["--to", "jax"], "use timm, open-clip or robustbench"),
    ] {
        let (code, text) = run(more);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(part), "{text}");
    }
    let (code, text) = run(&["--to", "open-clip", "--text", text]);
    assert_eq!(code, Some(0), "{text}");
    assert!(Path::new(out).join("open_clip_config.json").is_file());
}
