//! Weight files of other programs: loading, and errors.
//!
//! `tests/golden/make_weights.py` writes the files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use advxl::model::{Model, ModelConfig, Pass, Pool, Position, VitConfig};
use advxl::ops::{Device, from_vec, to_vec};
use advxl::weights::state_dict::Dtype;
use advxl::weights::{StateDict, import as weights};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/weights")
        .join(name)
}

/// Returns the recorded tensors of a file: names, shapes, values.
fn recorded(file: &str) -> HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(golden("tensors.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let of_file = all.iter().filter_map(|(name, view)| {
        let name = name.strip_prefix(file)?.strip_prefix('.')?;
        let values = bytemuck::pod_collect_to_vec(view.data());
        Some((name.to_owned(), (view.shape().to_vec(), values)))
    });
    of_file.collect()
}

#[track_caller]
fn refusal<T>(result: advxl::error::Result<T>) -> String {
    let error = result.err().expect("it is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

/// Returns a small transformer: `vit_micro` with one block. The name determines the number of heads.
fn small() -> Model {
    let config = ModelConfig::Vit(VitConfig {
        depth: 1,
        hidden: 32,
        position: Position::Learned,
        ..VitConfig::named("vit_micro").unwrap()
    });
    Model::new(&config, 3, 8, 1, &Device::cpu())
}

/// Returns the configuration of a transformer.
fn vit(model: &Model) -> &VitConfig {
    match model {
        Model::Vit(vit) => &vit.config,
        Model::ConvNext(_) => panic!("expected a transformer"),
    }
}

/// Writes a model's tensors, changed, to a safetensors file.
fn write_changed(path: &Path, change: impl FnOnce(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) {
    let model = small();
    let tensors = model.parameters().into_iter();
    let mut tensors: Vec<_> = tensors
        .map(|parameter| {
            (
                parameter.name.clone(),
                parameter.shape.clone(),
                parameter.to_vec(),
            )
        })
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        (
            name,
            TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn logits(model: &Model, size: usize) -> Vec<f32> {
    let values = (0..3 * size * size)
        .map(|i| (i % 17) as f32 / 17.0)
        .collect();
    let images = from_vec(values, [1, 3, size, size], &Device::cpu());
    to_vec(model.logits(images, &Pass::evaluation()))
}

#[test]
fn tensors_that_pytorch_saved_are_read_to_the_bit() {
    for (file, wrapper) in [
        ("plain", None),
        ("wrapped", Some("state_dict")),
        ("average", Some("state_dict_ema")),
        ("half", None),
        ("views", None),
        ("advxl", None),
        ("compiled", Some("net")),
        ("distilled", Some("teacher")),
    ] {
        let found = StateDict::open(&golden(&format!("{file}.pth"))).unwrap();
        assert_eq!(found.wrapper(), wrapper, "{file}");
        let recorded = recorded(file);
        let floats = found
            .names()
            .filter(|name| found.dtype(name).unwrap() != Dtype::I64);
        assert_eq!(floats.count(), recorded.len(), "{file}");
        for (name, (shape, values)) in recorded {
            assert_eq!(found.shape(&name).unwrap(), shape, "{file} {name}");
            assert_eq!(found.floats(&name).unwrap(), values, "{file} {name}");
        }
    }
}

#[test]
fn a_normalization_layer_is_separated_from_the_weights() {
    let found = StateDict::open(&golden("compiled.pth")).unwrap();
    let statistics = found.statistics().unwrap();
    assert_eq!(statistics.names, ["normalize.mean", "normalize.std"]);
    assert_eq!(statistics.mean, [0.5, 0.25, 0.125]);
    assert_eq!(statistics.std, [0.2, 0.3, 0.4]);
    assert_eq!(found.names().collect::<Vec<_>>(), ["a.weight", "b.bias"]);
    assert!(
        StateDict::open(&golden("average.pth"))
            .unwrap()
            .statistics()
            .is_none()
    );
}

#[test]
fn a_file_of_several_models_is_refused_with_their_keys() {
    let text = refusal(StateDict::open(&golden("several.pth")));
    assert!(
        text.contains("several sets of weights: `generator`, `inner.critic`"),
        "{text}"
    );
    assert!(
        !text.contains("lr_scheduler") && text.contains("hint: save the one"),
        "{text}"
    );
}

/// Loads a folder with a timm model in DeiT-3's layout; also returns the recorded images and logits.
fn deit3(folder: &Path) -> (advxl::error::Result<weights::Loaded>, Vec<f32>, Vec<f32>) {
    std::fs::copy(
        golden("deit3.safetensors"),
        folder.join("model.safetensors"),
    )
    .unwrap();
    let recorded = StateDict::open(&golden("deit3.safetensors")).unwrap();
    let [images, logits] = ["images", "logits"].map(|name| recorded.floats(name).unwrap());
    let tensors = recorded
        .names()
        .filter(|name| !["images", "logits"].contains(name));
    let tensors: Vec<_> = tensors
        .map(|name| {
            (
                name,
                recorded.shape(name).unwrap(),
                recorded.floats(name).unwrap(),
            )
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        let view = TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes);
        (*name, view.unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let config = r#"{ "architecture": "deit3_small_patch16_224", "num_classes": 5, "global_pool": "token",
        "model_args": { "num_heads": 3, "img_size": 8, "patch_size": 2, "no_embed_class": true },
        "pretrained_cfg": { "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25] } }"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    (weights::load(folder, &Device::cpu()), images, logits)
}

/// Position embeddings without one for the class token, and layer scale.
#[test]
fn models_of_deit3s_form_give_timms_logits() {
    let folder = tempfile::tempdir().unwrap();
    let (loaded, images, right) = deit3(folder.path());
    let loaded = loaded.unwrap();
    assert!(
        loaded.notes.iter().any(|note| note.contains("layer scale")),
        "{:?}",
        loaded.notes
    );
    let images = from_vec(images, [2, 3, 8, 8], &Device::cpu());
    let found = to_vec(loaded.model.logits(images, &Pass::evaluation()));
    let largest = right
        .iter()
        .fold(0.0f32, |most, value| most.max(value.abs()));
    for (found, right) in found.iter().zip(&right) {
        assert!(
            (found - right).abs() < 1e-5 * largest,
            "{found}, not {right}"
        );
    }
}

#[test]
fn pickle_protocol_4_holds_the_same_tensors() {
    let found = StateDict::open(&golden("protocol4.pth")).unwrap();
    assert_eq!(found.names().collect::<Vec<_>>(), ["a", "double"]);
    for (name, (_, values)) in recorded("wrapped") {
        assert_eq!(found.floats(&name).unwrap(), values, "{name}");
    }
}

#[test]
fn dtypes_are_reported_and_integers_are_not_read_as_weights() {
    let found = StateDict::open(&golden("half.pth")).unwrap();
    assert_eq!(found.dtype("bf16").unwrap(), Dtype::BF16);
    let text = refusal(found.floats("i64"));
    assert!(text.contains("`i64` has unsupported dtype I64"), "{text}");
    let text = refusal(found.floats("f32"));
    assert!(
        text.contains("`f32` is missing") && text.contains("the file has `f16`"),
        "{text}"
    );
}

#[test]
fn safetensors_files_are_read_and_common_prefixes_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.of.someone");
    write_changed(&path, |tensors| {
        for (name, ..) in tensors {
            *name = format!("module.base_model.{name}");
        }
    });
    let found = StateDict::open(&path).unwrap();
    for parameter in small().parameters() {
        assert_eq!(found.shape(&parameter.name).unwrap(), parameter.shape);
        assert_eq!(found.floats(&parameter.name).unwrap(), parameter.to_vec());
    }
}

#[test]
fn prefixes_of_training_programs_are_removed_anywhere_in_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    let renamed = |change: &dyn Fn(&str) -> String| {
        write_changed(&path, |tensors| {
            for (name, ..) in tensors {
                *name = change(name);
            }
        });
        weights::load_file(&path, "vit_micro", &Device::cpu()).unwrap()
    };
    for change in [
        &(|name: &str| format!("_orig_mod.{name}")) as &dyn Fn(&str) -> String,
        &|name| format!("module._orig_mod.{name}"),
        &|name| format!("_orig_mod.module.{name}"),
        &|name| format!("net.model.module.{name}"),
        // Each block compiled separately, and wrapped for activation checkpointing.
        &|name| {
            name.replace(
                "blocks.0.",
                "blocks.0._orig_mod._checkpoint_wrapped_module.",
            )
        },
    ] {
        let found = renamed(change);
        assert_eq!(logits(&found.model, 8), logits(&small(), 8));
    }
    for [mean, std] in [
        ["module.normalize.mean", "module.normalize.std"],
        ["module.mu", "module.sigma"],
    ] {
        write_changed(&path, |tensors| {
            for (name, ..) in tensors.iter_mut() {
                *name = format!("module.model.{name}");
            }
            tensors.push((mean.into(), vec![1, 3, 1, 1], vec![0.1, 0.2, 0.3]));
            tensors.push((std.into(), vec![3], vec![0.4, 0.5, 0.6]));
        });
        let found = weights::load_file(&path, "vit_micro", &Device::cpu()).unwrap();
        assert_eq!(vit(&found.model).mean, [0.1, 0.2, 0.3]);
        assert_eq!(vit(&found.model).std, [0.4, 0.5, 0.6]);
        assert!(
            found.notes[0].contains("images are normalized with"),
            "{:?}",
            found.notes
        );
    }
    // Modules of a sequence, named by number; pixels from 0 to 255.
    write_changed(&path, |tensors| {
        for (name, ..) in tensors.iter_mut() {
            *name = format!("1.{name}");
        }
        tensors.push(("0.mean".into(), vec![3], vec![123.675, 116.28, 103.53]));
        tensors.push(("0.std".into(), vec![3], vec![58.395, 57.12, 57.375]));
    });
    let text = refusal(weights::load_file(&path, "vit_micro", &Device::cpu()));
    assert!(
        text.contains("`0.mean`") && text.contains("divide it by 255"),
        "{text}"
    );
}

#[test]
fn weights_without_a_head_are_accepted_only_as_start_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pretrained.safetensors");
    let device = Device::cpu();
    let is_body = |name: &str| !name.starts_with("head.");
    type Change = fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>);
    let changes: [(Change, &str); 3] = [
        (|_| {}, ""),
        // MAE, with its decoder.
        (
            |tensors| {
                tensors.push(("mask_token".into(), vec![1, 1, 4], vec![0.0; 4]));
                tensors.push(("decoder_embed.bias".into(), vec![4], vec![0.0; 4]));
            },
            "decoder is ignored",
        ),
        // DINO, with its projection.
        (
            |tensors| {
                for (name, ..) in tensors.iter_mut() {
                    *name = format!("module.backbone.{name}");
                }
                tensors.push(("module.head.mlp.0.bias".into(), vec![4], vec![0.0; 4]));
            },
            "below `backbone.`",
        ),
    ];
    for (change, note) in changes {
        write_changed(&path, |tensors| {
            tensors.retain(|tensor| is_body(&tensor.0));
            change(tensors);
        });
        let found = weights::load_body(&path, Some("vit_micro"), &device).unwrap();
        assert!(found.notes.concat().contains(note), "{:?}", found.notes);
        let (found, right) = (
            found.model.with_new_head(4, 5, 0),
            small().with_new_head(4, 5, 0),
        );
        assert_eq!(logits(&found, 8), logits(&right, 8));
    }
    write_changed(&path, |tensors| tensors.retain(|tensor| is_body(&tensor.0)));
    let text = refusal(weights::load_file(&path, "vit_micro", &device));
    assert!(text.contains("`head.weight` is missing"), "{text}");
    assert!(text.contains("start.head = \"new\""), "{text}");
}

#[test]
fn sharded_weights_equal_those_of_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = small();
    let all = |name: &str| {
        model
            .parameters()
            .iter()
            .any(|parameter| parameter.name == name)
    };
    assert!(all("pos_embed"));
    let mut map = serde_json::Map::new();
    for (number, file) in ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
        .iter()
        .enumerate()
    {
        write_changed(&folder.path().join(file), |tensors| {
            let mut place = 0;
            tensors.retain(|_| {
                place += 1;
                place % 2 == number
            });
            for (name, ..) in tensors {
                map.insert(name.clone(), (*file).into());
            }
        });
    }
    let index = folder.path().join("model.safetensors.index.json");
    let write = |map: &serde_json::Map<String, serde_json::Value>| {
        let text = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
        std::fs::write(&index, text.to_string()).unwrap();
    };
    write(&map);
    std::fs::write(
        folder.path().join("config.json"),
        r#"{ "architecture": "vit_micro" }"#,
    )
    .unwrap();
    let load = || weights::load(folder.path(), &Device::cpu());
    let found = load().unwrap();
    assert_eq!(logits(&found.model, 8), logits(&model, 8));
    assert_eq!(found.hash.len(), 64);

    map.insert("norm.weight".into(), "model-1-of-2.safetensors".into());
    write(&map);
    let text = refusal(load());
    assert!(
        text.contains("tensor `norm.weight` is missing from shard `model-1-of-2.safetensors`"),
        "{text}"
    );
    map.insert("norm.weight".into(), "../model.safetensors".into());
    write(&map);
    assert!(refusal(load()).contains("`../model.safetensors` is not a file name"));
    map.insert("norm.weight".into(), "model-3-of-2.safetensors".into());
    write(&map);
    let text = refusal(load());
    assert!(
        text.contains("shard `model-3-of-2.safetensors` is missing"),
        "{text}"
    );
}

#[test]
fn the_missing_file_of_a_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = || refusal(weights::load(folder.path(), &Device::cpu()));
    assert!(refused().contains("is not a model folder"));
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    let text = refused();
    assert!(
        text.contains("`config.json` but no weights: `model.safetensors` is missing"),
        "{text}"
    );
    std::fs::write(folder.path().join("checkpoint.pth"), "").unwrap();
    let text = refused();
    assert!(text.contains("the folder has `checkpoint.pth`"), "{text}");
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    let text = refused();
    assert!(
        text.contains("`pytorch_model.bin` but no `config.json`"),
        "{text}"
    );
}

#[test]
fn files_that_are_not_weights_are_refused_with_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.pth");
    let plain = std::fs::read(golden("plain.pth")).unwrap();
    let header = |size: u64, rest: &[u8]| [&size.to_le_bytes()[..], rest].concat();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2528\n";
    for (content, message) in [
        (&b""[..], "is empty"),
        (b"\n <!DOCTYPE html><html>", "is a web page"),
        (pointer, "is a git-lfs pointer"),
        (b"\x80\x04\x95\0\0", "is a bare Python pickle"),
        (b"some other file", "is neither a safetensors file nor"),
        (&plain[..plain.len() - 1], "truncated or invalid zip file"),
        (&plain[..100], "truncated or invalid zip file"),
        (
            &header(10_000_000_000, b"{"),
            "header of 10000000000 bytes in a file of 9 bytes",
        ),
        (
            &header(u64::MAX, b"{}"),
            "header of 18446744073709551615 bytes",
        ),
        (&header(2, b"{"), "header of 2 bytes in a file of 9 bytes"),
        (&header(2, b"{}."), "expected 10 bytes, got 11"),
        (&header(3, b"{.}"), "truncated or invalid safetensors file"),
        (
            &header(
                64,
                br#"{"a":{"dtype":"F32","shape":[4294967296],"data_offsets":[0,4]}} "#,
            ),
            "truncated or invalid safetensors file",
        ),
    ] {
        std::fs::write(&path, content).unwrap();
        let text = refusal(StateDict::open(&path));
        assert!(text.contains(message), "{text}");
        assert!(
            text.contains("weights.pth") && text.contains("hint: "),
            "{text}"
        );
    }
    let text = refusal(StateDict::open(folder.path()));
    assert!(text.contains("it is not a file"), "{text}");
}

#[test]
fn pytorch_files_without_weights_are_refused_with_their_content() {
    for (file, parts) in [
        (
            "hostile",
            ["tries to run `posix.system`", "only weights are read"],
        ),
        (
            "old",
            [
                "written by PyTorch before 1.6",
                "save it again with `torch.save`",
            ],
        ),
        (
            "module",
            [
                "torch.nn.modules.linear.Linear",
                "save `model.state_dict()`",
            ],
        ),
        ("endless", ["tensor `a`", "only 1 values are stored"]),
    ] {
        let text = refusal(StateDict::open(&golden(&format!("{file}.pth"))));
        for part in parts {
            assert!(text.contains(part), "{text}");
        }
    }
}

/// Opening and reading real files with flipped bits or truncated content ends without a panic.
#[test]
fn damaged_files_give_an_error_or_numbers_but_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        if let Ok(found) = StateDict::open(&path) {
            for name in found.names() {
                let _ = found.floats(name);
            }
        }
    };
    let safetensors = folder.path().join("small.safetensors");
    write_changed(&safetensors, |tensors| tensors.truncate(2));
    for file in [golden("wrapped.pth"), golden("views.pth"), safetensors] {
        let whole = std::fs::read(file).unwrap();
        // All of the small files, and the header of the large one.
        for at in 0..whole.len().min(3000) {
            let mut bytes = whole.clone();
            bytes[at] = [0, 0xff, whole[at] ^ 1][at % 3];
            read(&bytes);
            if at % 10 == 0 {
                read(&whole[..at]);
            }
        }
    }
}

#[test]
fn a_file_laid_out_as_advxls_loads_from_a_folder_with_a_class_token_and_mean_pooling() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("advxl.pth"), folder.path().join("pytorch_model.bin")).unwrap();
    let config = r#"{ "architecture": "vit_huge_patch14_224", "num_classes": 5,
        "global_pool": "avg", "model_args": { "num_heads": 2 } }"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let loaded = weights::load(folder.path(), &Device::cpu()).unwrap();
    let config = vit(&loaded.model);
    assert_eq!((config.pool, config.class_token), (Pool::Average, true));
    assert_eq!((config.depth, config.heads, loaded.image_size), (2, 2, 6));
    let recorded = recorded("advxl");
    let parameters = loaded.model.parameters();
    assert_eq!(parameters.len(), recorded.len());
    for parameter in parameters {
        assert_eq!(
            parameter.to_vec(),
            recorded[&parameter.name].1,
            "{}",
            parameter.name
        );
    }
    assert!(
        logits(&loaded.model, 6)
            .iter()
            .all(|logit| logit.is_finite())
    );
    // Learned positions are resampled for another image size.
    assert!(
        logits(&loaded.model, 8)
            .iter()
            .all(|logit| logit.is_finite())
    );
}

#[test]
fn a_single_file_is_loaded_by_the_name_of_its_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_changed(&path, |_| {});
    // timm's tiny transformers are as wide as `vit_micro` and have as many heads.
    for name in [
        "vit_micro",
        "vit_tiny_patch16_224.augreg_in1k",
        "deit_tiny_patch16_224",
    ] {
        let loaded = weights::load_file(&path, name, &Device::cpu()).unwrap();
        assert_eq!((loaded.image_size, loaded.model.classes()), (8, 3));
        assert_eq!(vit(&loaded.model).heads, 3);
        assert_eq!(logits(&loaded.model, 8), logits(&small(), 8));
    }
    let refused = |name: &str, parts: &[&str]| {
        let text = refusal(weights::load_file(&path, name, &Device::cpu()));
        for part in parts {
            assert!(text.contains(part), "{text}");
        }
    };
    refused(
        "vit_base_patch16_224",
        &["width 768", "width 192", "is it a `vit_tiny`?"],
    );
    refused(
        "vit_hug_patch14_224",
        &["did you mean `vit_huge_patch14_224`?"],
    );
    refused("resnet50", &["unknown architecture `resnet50`", "vit_h14"]);
}

#[test]
fn weights_that_do_not_match_the_model_are_refused() {
    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;
    type Case = (fn(&mut Tensors), &'static [&'static str]);
    fn at<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, Vec<usize>, Vec<f32>) {
        tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
    let cases: &[Case] = &[
        (
            |tensors| at(tensors, "blocks.0.norm1.bias").2[3] = f32::INFINITY,
            &["`blocks.0.norm1.bias` contains inf at index 3"],
        ),
        (
            |tensors| at(tensors, "blocks.0.mlp.fc2.weight").1.reverse(),
            &["`blocks.0.mlp.fc2.weight` has shape [32, 192], expected [192, 32]"],
        ),
        (
            |tensors| at(tensors, "head.bias").0 = "head.biases".into(),
            &["`head.bias` is missing", "the file has `head.biases`"],
        ),
        (
            |tensors| {
                for i in 0..7 {
                    tensors.push((format!("blocks.0.le{i}.gamma"), vec![1], vec![1.0]));
                }
            },
            &[
                "unexpected weights in the model: `blocks.0.le0.gamma`",
                "le4.gamma` and 2 more",
            ],
        ),
        (
            |tensors| tensors.push(("blocks.0.ls1.gamma".into(), vec![1], vec![1.0])),
            &["`blocks.0.ls1.gamma` has shape [1], expected [192]"],
        ),
        (
            |tensors| tensors.push(("norm.weight".into(), vec![192], vec![1.0; 192])),
            &["both `norm` and `fc_norm`"],
        ),
        (
            |tensors| tensors.retain(|tensor| tensor.0 != "cls_token"),
            &["`pos_embed` does not belong to a square grid"],
        ),
        // timm's `_gap_` models normalize each token and then take the mean.
        (
            |tensors| {
                tensors.retain(|tensor| tensor.0 != "cls_token");
                let places = at(tensors, "pos_embed");
                places.1[1] -= 1;
                places.2.truncate(places.1[1] * 192);
                for kind in ["weight", "bias"] {
                    at(tensors, &format!("fc_norm.{kind}")).0 = format!("norm.{kind}");
                }
            },
            &["the mean of the patches is taken after the norm"],
        ),
        (
            |tensors| {
                let head = at(tensors, "head.weight");
                (head.1, head.2) = (vec![0, 192], vec![]);
            },
            &["`head.weight` is empty"],
        ),
        (
            |tensors| {
                let patches = at(tensors, "patch_embed.proj.weight");
                (patches.1, patches.2) = (vec![1 << 30, 3, 1 << 30, 0], vec![]);
            },
            &["`patch_embed.proj.weight` is empty"],
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.safetensors");
    for (change, parts) in cases {
        write_changed(&path, change);
        let text = refusal(weights::load_file(&path, "vit_micro", &Device::cpu()));
        for part in *parts {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn a_folder_whose_configuration_contradicts_its_weights_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_changed(&folder.path().join("model.safetensors"), |_| {});
    for (config, part) in [
        (r#"{}"#, "does not state the number of attention heads"),
        (r#"{ "architecture": "vit_base_patch16_224" }"#, "width 768"),
        (
            r#"{ "model_args": { "num_heads": 5 } }"#,
            "num_heads = 5 must divide width = 192",
        ),
        (
            r#"{ "architecture": "vit_micro", "model_args": { "depth": 2 } }"#,
            "depth = 2, but the weights have 1 blocks",
        ),
        (
            r#"{ "architecture": "vit_micro", "advxl": { "norm_eps": -1 } }"#,
            "norm_eps = -1",
        ),
        (
            r#"{ "architecture": "vit_micro", "num_classes": 10 }"#,
            "num_classes = 10",
        ),
        (
            r#"{ "architecture": "vit_micro", "global_pool": "token" }"#,
            "have `fc_norm`",
        ),
        (
            r#"{ "architecture": "vit_micro", "global_pool": "map" }"#,
            "global_pool = `map`",
        ),
        (
            r#"{ "architecture": "vit_micro", "pretrained_cfg": { "std": [1, 0, 1] } }"#,
            "`config.json` has std = [1,0,1]",
        ),
        (
            r#"{ "architecture": "vit_micro", "pretrained_cfg": { "mean": [123.675, 116.28, 103.53] } }"#,
            "gives 0.485, 0.456, 0.406",
        ),
        (
            r#"{ "architecture": "resnet50", "model_args": { "num_heads": 3 } }"#,
            "architecture = `resnet50`",
        ),
        (
            r#"{ "architecture": "convnext_tiny", "model_args": { "num_heads": 3 } }"#,
            "not those of a ConvNeXt",
        ),
        (
            r#"{ "architecture": "vit_micro", "model_args": { "img_size": 16 } }"#,
            "img_size = 16, but `pos_embed` has 2 x 2 patches of 4 pixels, for images of 8 pixels",
        ),
        (
            r#"{ "architecture": "vit_micro", "pretrained_cfg": { "input_size": [3, 224, 224] } }"#,
            "input_size = 224",
        ),
        (
            r#"{ "architecture": "vit_micro", "pretrained_cfg": { "input_size": [3, 8, 16] } }"#,
            "images must be square",
        ),
        (
            r#"{ "architecture": "vit_micro", "model_args": { "patch_size": 8 } }"#,
            "patch_size = 8, but the weights have 4",
        ),
        (
            r#"{ "architecture": "vit_micro", "label_names": ["a", "b"] }"#,
            "names 2 classes, but the head has 3",
        ),
        (
            r#"{ "architecture": "vit_micro", "advxl": { "outputs": "boxes" } }"#,
            "outputs = \"boxes\"",
        ),
    ] {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let text = refusal(weights::load(folder.path(), &Device::cpu()));
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_new_head_has_its_number_of_classes_and_leaves_the_rest() {
    let (old, new) = (small(), small().with_new_head(7, 0, 0));
    assert_eq!(new.classes(), 7);
    assert_eq!(logits(&new, 8).len(), 7);
    let head = old.parameters().len() - 2;
    for (old, new) in old.parameters().iter().zip(new.parameters()).take(head) {
        assert_eq!(old.to_vec(), new.to_vec());
    }
}

/// Runs `advxl predict` on synthetic images. Returns the exit code and standard error.
fn predict(model: &Path, out: &Path, more: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_advxl"));
    command.arg("predict").arg(model).arg("--out").arg(out);
    let output = command
        .args(["--data", "synthetic:2"])
        .args(more)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

#[test]
fn predict_accepts_a_weights_file_with_its_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (
        folder.path().join("small.bin"),
        folder.path().join("out.safetensors"),
    );
    write_changed(&file, |_| {});
    let run = |more: &[&str]| {
        let (code, text) = predict(&file, &out, more);
        assert_eq!(code, 0, "{text}");
        std::fs::read(&out).unwrap()
    };
    let usual = run(&["--arch", "vit_micro"]);
    let imagenet = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"];
    assert_eq!(
        run(&[&["--arch", "vit_micro"], &imagenet[..]].concat()),
        usual
    );
    assert_ne!(
        run(&["--arch", "vit_micro", "--mean", "0.5,0.5,0.5"]),
        usual
    );
    assert_ne!(run(&["--arch", "vit_micro", "--image-size", "16"]), usual);
}

#[test]
fn predict_refuses_a_file_without_architecture_and_options_without_effect() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (
        folder.path().join("small.bin"),
        folder.path().join("out.safetensors"),
    );
    write_changed(&file, |_| {});
    let refuses = |model: &Path, more: &[&str], part: &str| {
        let (code, text) = predict(model, &out, more);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(part) && !text.contains("panicked"), "{text}");
    };
    refuses(&file, &[], "--arch vit_huge_patch14_224");
    refuses(
        &file,
        &["--arch", "vit_micro", "--image-size", "9"],
        "use 8 or 12",
    );
    refuses(&file, &["--arch", "vit_micro", "--std", "0,1,1"], "above 0");
    refuses(
        &file,
        &["--arch", "vit_micro", "--mean", "0.5"],
        "three numbers",
    );
    refuses(
        folder.path(),
        &["--arch", "vit_micro"],
        "--arch requires a weights file, got a folder",
    );
    refuses(
        &golden("hostile.pth"),
        &["--arch", "vit_micro"],
        "`posix.system`",
    );
    assert!(!out.exists());
}
