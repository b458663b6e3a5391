//! Exports to open_clip and timm, and models that cannot be exported.

use super::*;

#[test]
fn models_from_open_clip_are_exported_bit_for_bit() {
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

/// Returns a model that open_clip's own tower cannot express, because its head has a bias.
fn with_head_bias(config: impl Into<ModelConfig>) -> Loaded {
    let mut ours = loaded(config, 10, 224);
    let bias = ours.model.parameters_mut().into_iter().last().unwrap();
    bias.value = from_vec((1..=10).map(|i| i as f32).collect(), [10], &Device::cpu());
    ours
}

#[test]
fn a_model_with_biases_is_exported_to_open_clip_as_a_timm_tower() {
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
        // timm models need not use the text tower's activation.
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
            // open_clip stores fixed positions as weights.
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
fn models_that_another_program_cannot_express_are_not_exported() {
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
        "has a bias in its head",
        "a different activation",
        "timm registers no model",
        "--to timm",
    ];
    refusal(export_to(&ours, "open_clip", &out), &parts);
    let parts = [
        "text tower in",
        "it has embed_dim = 10, but the model's embedding has size 7",
    ];
    refusal(
        export_to(&loaded(small.clone(), 7, 16), "clipa", &out),
        &parts,
    );
    let sizeless = tempfile::tempdir().unwrap();
    let forget = |config: &mut Value| config["model_cfg"]["embed_dim"] = Value::Null;
    changed("clipa", sizeless.path(), forget, |_| {});
    refusal(
        export::open_clip(&ours, &Facts::default(), sizeless.path(), &out),
        &["it has no embed_dim, but the model's embedding has size 10"],
    );
    let parts = ["is not an open_clip folder"];
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
    refusal(to_timm(&ours), &["no option for a convolutional stem"]);
    let eps = VitConfig {
        norm_eps: 1e-4,
        ..small
    };
    refusal(
        to_timm(&loaded(eps, 10, 16)),
        &["the layer norms use epsilon 1e-4"],
    );
    let patch = ConvNextConfig {
        patch: 2,
        ..ConvNextConfig::named("convnext_atto").unwrap()
    };
    refusal(
        export_to(&loaded(patch, 10, 32), "clipa", &out),
        &["is a ConvNeXt"],
    );
    assert!(!out.exists());
    // A smaller epsilon than timm's changes rounding in timm, which the card mentions.
    let vit = load(&golden("hugging_face_vit")).unwrap();
    to_timm(&vit).unwrap();
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("trained with 1e-12"), "{card}");
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
            "add --text with the folder of the model whose text tower",
        ),
        (
            &["--to", "timm", "--text", text],
            "--text requires --to open-clip or --to hf-clip",
        ),
        (
            &["--to", "jax"],
            "use timm, open-clip, hf-clip or robustbench",
        ),
    ] {
        let (code, text) = run(more);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(part), "{text}");
    }
    let (code, text) = run(&["--to", "open-clip", "--text", text]);
    assert_eq!(code, Some(0), "{text}");
    assert!(Path::new(out).join("open_clip_config.json").is_file());
}

/// Returns a result of AutoAttack in the format of `advxl eval`.
fn autoattack(data: &str, classes: &[&str], images: usize, norm: Norm, epsilon: &str) -> Value {
    let attacks = Settings::new(Version::Standard, norm, epsilon.parse().unwrap()).autoattack();
    let settings = std::iter::once(Value::Null).chain(attacks.iter().map(|attack| json!(attack)));
    let stages: Vec<Value> = settings
        .map(|settings| json!({ "attack": "", "settings": settings, "robust_accuracy": 0.5 }))
        .collect();
    json!({
        "data": data,
        "data_classes": classes,
        "precision": "f32",
        "norm": norm,
        "epsilon": epsilon,
        "robust_accuracy": 0.25,
        "flags": [],
        "stages": stages,
        "robust": vec![true; images],
    })
}

const CIFAR10: [&str; 10] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];

#[test]
fn a_robustbench_entry_is_written_only_for_results_of_its_leaderboard() {
    let folder = tempfile::tempdir().unwrap();
    let small = VitConfig {
        depth: 1,
        hidden: 24,
        ..VitConfig::named("vit_micro").unwrap()
    };
    let entry = |dataset: &str, classes: usize, results: &[Value]| {
        let out = folder.path().join("out");
        let facts = Facts {
            name: "Doe2026Small".to_owned(),
            dataset: dataset.to_owned(),
            results: results.to_vec(),
            ..Facts::default()
        };
        let classifier = Loaded {
            outputs: Outputs::Logits,
            ..loaded(small.clone(), classes, 16)
        };
        let made = export::robustbench(&classifier, &facts, &out);
        made.map(|()| {
            let text = std::fs::read_to_string(out.join("Doe2026Small.json")).unwrap();
            std::fs::remove_dir_all(&out).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()
        })
    };
    let linf = autoattack(
        "cifar-10-batches-bin",
        &CIFAR10,
        10_000,
        Norm::Linf,
        "8/255",
    );
    let made = entry("cifar10", 10, std::slice::from_ref(&linf)).unwrap();
    assert_eq!(made["eps"], "8/255");
    assert_eq!(made["dataset"], "cifar10");
    assert_eq!(
        (&made["clean_acc"], &made["autoattack_acc"]),
        (&json!("50.00"), &json!("25.00"))
    );
    assert_eq!(made["unreliable"], false);
    // A decimal epsilon instead of a fraction; the order of class folders.
    let mut backwards = CIFAR10;
    backwards.reverse();
    let decimal = autoattack("cifar", &backwards, 10_000, Norm::Linf, "0.03137255");
    assert_eq!(entry("cifar10", 10, &[decimal]).unwrap()["eps"], "8/255");
    let l2 = autoattack("cifar", &CIFAR10, 10_000, Norm::L2, "0.5");
    assert_eq!(entry("cifar10", 10, &[l2]).unwrap()["eps"], "0.5");
    let ids: Vec<String> = (0..1000)
        .map(|id| format!("n{:08}", 1_440_764 + id))
        .collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let imagenet = autoattack("imagenet/val", &ids, 5_000, Norm::Linf, "4/255");
    assert_eq!(
        entry("imagenet", 1000, std::slice::from_ref(&imagenet)).unwrap()["eps"],
        "4/255"
    );

    let refused = |dataset: &str, classes: usize, result: &Value, parts: &[&str]| {
        refusal(entry(dataset, classes, std::slice::from_ref(result)), parts);
    };
    refused(
        "",
        10,
        &linf,
        &["--dataset is missing", "use cifar10, cifar100 or imagenet"],
    );
    refused("cifar-10", 10, &linf, &["unknown RobustBench leaderboard"]);
    refused(
        "cifar100",
        10,
        &linf,
        &[
            "10 classes, expected 100",
            "(`airplane` to `truck`) are not",
        ],
    );
    refused(
        "imagenet",
        10,
        &linf,
        &[
            "10,000 images, expected 5,000",
            "linf 8/255, expected linf 4/255",
        ],
    );
    refused(
        "cifar10",
        1000,
        &imagenet,
        &["5,000 images, expected 10,000", "1000 classes, expected 10"],
    );
    let few = autoattack("cifar", &CIFAR10, 1000, Norm::Linf, "8/255");
    refused(
        "cifar10",
        10,
        &few,
        &["1,000 images, expected 10,000", "--eps 8/255"],
    );
    let weak = autoattack("cifar", &CIFAR10, 10_000, Norm::Linf, "0.3/255");
    refused(
        "cifar10",
        10,
        &weak,
        &["linf 0.3/255, expected linf 8/255 or l2 0.5"],
    );
    let l1 = autoattack("cifar", &CIFAR10, 10_000, Norm::L1, "12");
    refused(
        "cifar10",
        10,
        &l1,
        &["l1 12, expected linf 8/255 or l2 0.5"],
    );
    let synthetic = autoattack("synthetic:10000", &CIFAR10, 10_000, Norm::Linf, "8/255");
    refused(
        "cifar10",
        10,
        &synthetic,
        &["the images are synthetic (`synthetic:10000`)"],
    );
    let numbers = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    let unnamed = autoattack(
        "tensors:a.safetensors",
        &numbers,
        10_000,
        Norm::Linf,
        "8/255",
    );
    refused(
        "cifar10",
        10,
        &unnamed,
        &["the 10 classes of the dataset (`0` to `9`) are not the leaderboard's"],
    );
    let mut rounded = linf.clone();
    rounded["precision"] = json!("bf16");
    refused(
        "cifar10",
        10,
        &rounded,
        &["precision \"bf16\", expected \"f32\""],
    );
    let mut old = linf.clone();
    old.as_object_mut().unwrap().remove("data_classes");
    refused(
        "cifar10",
        10,
        &old,
        &["the 0 classes of the dataset are not the leaderboard's"],
    );
    let mut shortened = linf.clone();
    shortened["stages"][1]["settings"]["steps"] = json!(50);
    refused(
        "cifar10",
        10,
        &shortened,
        &["expected one result of standard AutoAttack with its default settings, got 0"],
    );
    refusal(
        entry("cifar10", 10, &[linf.clone(), linf]),
        &["expected one result of standard AutoAttack with its default settings, got 2"],
    );
}
