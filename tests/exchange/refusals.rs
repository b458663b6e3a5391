//! Configurations and weights of other programs that do not match a supported model are refused with the reason.

use super::*;

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
            &["unknown setting rope = true", "a different model"],
        ),
        (
            "vision_cfg/head_width",
            json!(0),
            &["width / head_width = 0 must divide width = 24"],
        ),
        (
            "vision_cfg/width",
            json!(768),
            &["width = 768", "tokens of width 24"],
        ),
        (
            "vision_cfg/layers",
            json!(3),
            &["layers = 3", "weights have 2 blocks"],
        ),
        (
            "vision_cfg/no_ln_pre",
            json!(true),
            &["unexpected weights in the model: `visual.ln_pre.bias`"],
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
        &["`open_clip_config.json` is not valid JSON"],
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
            &["num_attention_heads = 5 must divide width = 24"],
        ),
        (
            "hugging_face_vit",
            "num_hidden_layers",
            json!(1),
            &["num_hidden_layers = 1", "weights have 2 blocks"],
        ),
        (
            "hugging_face_vit",
            "hidden_size",
            json!(48),
            &["hidden_size = 48", "tokens of width 24"],
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
            &["num_labels = 2", "`classifier.weight` has 3 rows"],
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
        &["`preprocessor_config.json` has invalid image_std = [1,1]"],
    );
    std::fs::write(
        &preprocessor,
        r#"{ "do_normalize": false, "image_std": [2, 2, 2] }"#,
    )
    .unwrap();
    assert_eq!(vit(&load(folder.path()).unwrap().model).std, [1.0; 3]);
}

#[test]
fn weights_of_other_programs_that_do_not_match_the_model_are_refused_under_their_names() {
    type Case<'a> = (&'a str, fn(&mut Tensors), &'a [&'a str]);
    const QKV: &str = "visual.transformer.resblocks.1.attn.in_proj_weight";
    const QUERY: &str = "vit.encoder.layer.0.attention.attention.query.weight";
    let cases: &[Case] = &[
        (
            "open_clip",
            |tensors| tensors.retain(|tensor| tensor.0 != "visual.proj"),
            &["the weights have no head: `visual.proj` transposed is missing"],
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
            &["in_proj_weight` has shape [24, 72], expected [72, 24]"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, "visual.proj").1 = vec![240],
            &["`visual.proj` has shape [240], expected a matrix"],
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
            &["`visual.proj` transposed is empty"],
        ),
        (
            "open_clip",
            |tensors| at(tensors, "visual.class_embedding").2[5] = f32::NAN,
            &["`visual.class_embedding` contains NaN at index 5"],
        ),
        (
            "open_clip",
            |tensors| tensors.push(("visual.attn_pool.query".into(), vec![1], vec![1.0])),
            &["unexpected weights in the model: `visual.attn_pool.query`"],
        ),
        (
            "open_clip",
            |tensors| tensors.push(("transformer.resblocks.0.lora".into(), vec![1], vec![1.0])),
            &["unexpected weights in the model: `transformer.resblocks.0.lora`"],
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
            &["attention.key.weight` has shape [24, 24], expected [12, 24] like"],
        ),
        (
            "hugging_face_vit",
            |tensors| {
                for part in ["query", "key", "value"] {
                    let name = format!("vit.encoder.layer.0.attention.attention.{part}.bias");
                    let bias = at(tensors, &name);
                    (bias.1, bias.2) = (vec![], vec![0.0]);
                }
            },
            &["query.bias` has shape [], expected a vector or a matrix"],
        ),
        (
            "hugging_face_vit",
            |tensors| tensors.push(("vit.encoder.layer.0.extra".into(), vec![1], vec![1.0])),
            &["unexpected weights in the model: `vit.encoder.layer.0.extra`"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.retain(|tensor| !tensor.0.contains("pre_layrnorm")),
            &["`vision_model.pre_layrnorm.weight` is missing"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.retain(|tensor| tensor.0 != "visual_projection.weight"),
            &["`visual_projection.weight`", "is missing"],
        ),
        (
            "hugging_face_clip",
            |tensors| tensors.push(("text_model.encoder.layers.0.new".into(), vec![1], vec![1.0])),
            &["unexpected weights in the model: `text_model.encoder.layers.0.new`"],
        ),
    ];
    for (name, change, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        changed(name, folder.path(), |_| {}, change);
        refusal(load(folder.path()), parts);
    }
}
