//! Exports to transformers' CLIP.
//!
//! `scripts/parity` loads such folders in transformers; here they are compared with recorded folders of transformers.

use advxl::image::ResizeMode;
use advxl::image::resize::Filter;
use advxl::text::TextModel;

use super::*;

fn export_to_transformers(
    loaded: &Loaded,
    text: Option<&Path>,
    folder: &Path,
) -> advxl::error::Result<Vec<String>> {
    export::hugging_face_clip(loaded, &Facts::default(), text, folder)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Replaces the weights of a parameter with different numbers.
fn fill(model: &mut Model, name: &str, value: impl Fn(usize) -> f32) {
    let mut parameters = model.parameters_mut().into_iter();
    let found = parameters.find(|parameter| parameter.name == name).unwrap();
    let count = found.shape.iter().product();
    found.value = from_vec((0..count).map(value).collect(), [count], &Device::cpu());
}

#[test]
fn models_from_transformers_are_exported_bit_for_bit() {
    for (name, has_text) in [
        ("hugging_face_clip_vision", false),
        ("hugging_face_clip", true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let first = load(&golden(name)).unwrap();
        let text = has_text.then(|| golden(name));
        let notes = export_to_transformers(&first, text.as_deref(), folder.path()).unwrap();
        let file = "model.safetensors";
        assert_eq!(
            tensors(&folder.path().join(file)),
            tensors(&golden(name).join(file)),
            "{name}"
        );
        // Every setting is written with the value that transformers wrote, except sizes that it ignores there.
        let found = json_of(&folder.path().join("config.json"));
        let right = json_of(&golden(name).join("config.json"));
        let agree = |found: &Value, right: &Value| {
            for (key, value) in found.as_object().unwrap() {
                let ignored = has_text && key == "projection_dim";
                if !(value.is_object() || ignored) {
                    assert_eq!(*value, right[key], "{name} {key}");
                }
            }
        };
        agree(&found, &right);
        if has_text {
            assert_eq!(found["projection_dim"], 10);
            for part in ["text_config", "vision_config"] {
                agree(&found[part], &right[part]);
                // Where the classes of one tower look for it.
                assert_eq!(found[part]["projection_dim"], 10);
            }
        }
        let second = load(folder.path()).unwrap();
        assert_eq!(second.model.config(), first.model.config());
        assert_eq!(logits(&second.model, 16), logits(&first.model, 16));
        assert_eq!(
            second.preprocessing.preprocessing.unwrap(),
            first.preprocessing.preprocessing.clone().unwrap()
        );
        assert_eq!(notes.len(), usize::from(has_text), "{notes:?}");
        let tokenizerless = |note: &String| note.contains("no tokenizer is written");
        assert!(notes.iter().all(tokenizerless), "{notes:?}");
        let card = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
        assert!(card.contains("library_name: transformers"), "{card}");
        assert_eq!(card.contains("CLIPModel.from_pretrained"), has_text);
    }
}

#[test]
fn a_model_from_open_clip_passes_through_transformers_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let [out, again] = ["out", "again"].map(|name| folder.path().join(name));
    let first = load(&golden("open_clip")).unwrap();
    export_to_transformers(&first, Some(&golden("open_clip")), &out).unwrap();
    let second = load(&out).unwrap();
    assert_eq!(second.model.config(), first.model.config());
    assert_eq!(logits(&second.model, 16), logits(&first.model, 16));
    for (a, b) in first
        .model
        .parameters()
        .iter()
        .zip(second.model.parameters())
    {
        assert_eq!(a.to_vec(), b.to_vec(), "{}", a.name);
    }
    export_to_transformers(&second, Some(&out), &again).unwrap();
    for file in [
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    ] {
        let [first, second] = [&out, &again].map(|folder| std::fs::read(folder.join(file)));
        assert_eq!(first.unwrap(), second.unwrap(), "{file}");
    }
    // The scale of the similarities is open_clip's.
    let scale = |file: &Path| StateDict::open(file).unwrap().floats("logit_scale");
    assert_eq!(
        scale(&out.join("model.safetensors")).unwrap(),
        scale(&golden("open_clip").join("open_clip_model.safetensors")).unwrap()
    );
}

#[test]
fn text_towers_are_exported_with_their_tokenizers() {
    let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text");
    let recorded = json_of(&texts.join("captions.json"));
    let mut captions: Vec<String> = serde_json::from_value(recorded["captions"].clone()).unwrap();
    // The converted vocabulary spells the start and the end token as OpenAI does, not as open_clip.
    captions.retain(|caption| !caption.contains("_of_text>") && !caption.contains("<|"));
    assert!(captions.len() > 200);
    let ours = loaded(clip_form(), 12, 16);
    for (name, has_scale) in [
        ("hf_quick", false),
        ("hf_gelu", false),
        ("open_clip", true),
        ("custom", true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let notes = export_to_transformers(&ours, Some(&texts.join(name)), folder.path()).unwrap();
        let scaleless = notes.iter().any(|note| note.contains("`logit_scale`"));
        assert_eq!(
            (scaleless, notes.len()),
            (!has_scale, usize::from(!has_scale)),
            "{name}"
        );
        for file in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            assert!(folder.path().join(file).is_file(), "{name} {file}");
        }
        let processor = json_of(&folder.path().join("preprocessor_config.json"));
        assert_eq!(processor["processor_class"], "CLIPProcessor");
        let embeddings = |folder: &Path| {
            let model = TextModel::load(folder, &Device::cpu()).unwrap();
            (
                model.tokenizer.rows(&captions).unwrap(),
                to_vec(model.embed(&captions).unwrap()),
            )
        };
        // Without printing the thousands of values.
        assert!(
            embeddings(folder.path()) == embeddings(&texts.join(name)),
            "{name}"
        );
        let merges = std::fs::read_to_string(folder.path().join("merges.txt")).unwrap();
        assert!(merges.starts_with("#version:"), "{name}");
        let (start, end) = (812, 813);
        let vocabulary = json_of(&folder.path().join("vocab.json"));
        assert_eq!(vocabulary["<|startoftext|>"], start, "{name}");
        assert_eq!(vocabulary["<|endoftext|>"], end, "{name}");
    }
    let out = tempfile::tempdir().unwrap();
    let clipa = export_to_transformers(&ours, Some(&texts.join("clipa")), out.path());
    let parts = [
        "text tower in",
        "pools the last token of the context, not the end token and has no causal mask",
        "remove --text",
    ];
    refusal(clipa, &parts);
}

#[test]
fn a_bias_of_the_head_is_folded_into_the_last_norm() {
    let folder = tempfile::tempdir().unwrap();
    let fixed = VitConfig {
        position: Position::Sincos2d,
        gelu: Gelu::Tanh,
        norm_eps: 1e-6,
        mean: [0.1, 0.2, 0.3],
        ..clip_form()
    };
    let mut ours = loaded(fixed, 10, 16);
    fill(&mut ours.model, "head.weight", |i| ((i * i) as f32).sin());
    fill(&mut ours.model, "head.bias", |i| i as f32 - 4.0);
    fill(&mut ours.model, "norm.bias", |i| (i as f32).cos());
    let notes = export_to_transformers(&ours, None, folder.path()).unwrap();
    assert!(notes[0].contains("the bias of the head"), "{notes:?}");
    let found = load(folder.path()).unwrap();
    let right = logits(&ours.model, 16);
    assert_close(&logits(&found.model, 16), &right, 1e-6, "folded");
    let config = vit(&found.model);
    assert_eq!((config.gelu, config.norm_eps), (Gelu::Tanh, 1e-6));
    assert_eq!(config.mean, [0.1, 0.2, 0.3]);

    // A head whose rows are dependent cannot take up every bias.
    fill(&mut ours.model, "head.weight", |_| 1.0);
    let out = folder.path().join("out");
    let refused = export_to_transformers(&ours, None, &out);
    refusal(refused, &["the head has a bias", "linearly dependent"]);
}

#[test]
fn models_that_clip_cannot_express_are_refused_with_all_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refused = |config: VitConfig, parts: &[&str]| {
        let ours = loaded(config, 10, 16);
        refusal(export_to_transformers(&ours, None, &out), parts);
    };
    let plain = VitConfig {
        depth: 1,
        ..VitConfig::named("vit_micro").unwrap()
    };
    let parts = [
        "pools the mean of the patches instead of the class token",
        "has no norm before the first block",
        "--to open-clip",
    ];
    refused(plain.clone(), &parts);
    let tokenless = VitConfig {
        class_token: false,
        pool: Pool::Average,
        ..clip_form()
    };
    refused(tokenless, &["has no class token"]);
    let stem = VitConfig {
        stem: Stem::Conv,
        ..clip_form()
    };
    refused(stem, &["which has a convolutional stem\n"]);
    let mut biased = loaded(plain, 10, 16);
    fill(&mut biased.model, "patch_embed.proj.bias", |_| 1.0);
    refusal(
        export_to_transformers(&biased, None, &out),
        &["has a bias in its patch embedding"],
    );
    let convnext = loaded(ModelConfig::named("convnext_atto").unwrap(), 10, 32);
    refusal(
        export_to_transformers(&convnext, None, &out),
        &["is a ConvNeXt"],
    );
    let classifier = Loaded {
        outputs: Outputs::Logits,
        ..loaded(clip_form(), 10, 16)
    };
    refusal(
        export_to_transformers(&classifier, None, &out),
        &["outputs class logits"],
    );
    let parts = [
        "text tower in",
        "its embedding has size 10, but the model's has size 7",
    ];
    let text = golden("hugging_face_clip");
    refusal(
        export_to_transformers(&loaded(clip_form(), 7, 16), Some(&text), &out),
        &parts,
    );
    for (resize_mode, interpolation, part) in [
        (
            ResizeMode::Longest { fill: [0; 3] },
            Filter::Bicubic,
            "does not support padding",
        ),
        (
            ResizeMode::Shortest,
            Filter::Lanczos,
            "does not support lanczos interpolation",
        ),
    ] {
        let mut ours = loaded(clip_form(), 10, 16);
        ours.preprocessing.preprocessing = Ok(Preprocessing {
            resize_mode,
            interpolation,
            ..Preprocessing::new(16)
        });
        refusal(export_to_transformers(&ours, None, &out), &[part]);
    }
    assert!(!out.exists());
    refusal(
        export_to_transformers(&loaded(clip_form(), 10, 16), None, &golden("open_clip")),
        &["is not empty"],
    );
}

#[test]
fn preprocessing_is_written_as_it_is_read() {
    for (resize_mode, crop_fraction) in [(ResizeMode::Shortest, 0.875), (ResizeMode::Squash, 1.0)] {
        let folder = tempfile::tempdir().unwrap();
        let mut ours = loaded(clip_form(), 10, 28);
        let preprocessing = Preprocessing {
            resize_mode,
            crop_fraction,
            interpolation: Filter::Bicubic,
            ..Preprocessing::new(28)
        };
        ours.preprocessing.preprocessing = Ok(preprocessing);
        export_to_transformers(&ours, None, folder.path()).unwrap();
        let found = load(folder.path()).unwrap().preprocessing;
        assert_eq!(found.source, "preprocessor_config.json");
        assert_eq!(found.preprocessing.unwrap(), preprocessing);
    }
}

#[test]
fn the_command_exports_for_transformers_with_and_without_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = golden("hugging_face_clip");
    let text = model.to_str().unwrap();
    for (name, more, said) in [
        ("vision", &[][..], None),
        (
            "whole",
            &["--text", text],
            Some("note: no tokenizer is written"),
        ),
    ] {
        let out = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_advxl"));
        command.arg("export").arg(&model).arg("--out").arg(&out);
        let output = command.args(["--to", "hf-clip"]).args(more).output();
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{errors}");
        assert!(said.is_none_or(|said| errors.contains(said)), "{errors}");
        let kind = json_of(&out.join("config.json"))["model_type"].clone();
        assert_eq!(
            kind,
            if said.is_some() {
                "clip"
            } else {
                "clip_vision_model"
            }
        );
    }
}
