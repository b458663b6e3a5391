//! Files of weights of other programs: what is read of them, and what is refused.
//!
//! How the files were made: `tests/golden/make_weights.py`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use advxl::fused::{from_vec, to_vec};
use advxl::model::state_dict::Dtype;
use advxl::model::{Model, ModelConfig, Pass, Pool, Position, StateDict, VitConfig, weights};
use burn::tensor::Device;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/weights")
        .join(name)
}

/// The tensors that PyTorch recorded of a file: names, shapes, values.
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

/// A small transformer of ours: `vit_micro` with one block, whose name gives the heads.
fn small() -> Model {
    let config = ModelConfig::Vit(VitConfig {
        depth: 1,
        hidden: 32,
        position: Position::Learned,
        ..VitConfig::named("vit_micro").unwrap()
    });
    Model::new(&config, 3, 8, 1, &Device::flex())
}

/// What a transformer is.
fn vit(model: &Model) -> &VitConfig {
    match model {
        Model::Vit(vit) => &vit.config,
        Model::ConvNext(_) => panic!("a ConvNeXt"),
    }
}

/// Writes a model's tensors, changed, into a safetensors file.
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
    let images = from_vec(values, [1, 3, size, size], &Device::flex());
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
fn pickle_protocol_4_holds_the_same_tensors() {
    let found = StateDict::open(&golden("protocol4.pth")).unwrap();
    assert_eq!(found.names().collect::<Vec<_>>(), ["a", "double"]);
    for (name, (_, values)) in recorded("wrapped") {
        assert_eq!(found.floats(&name).unwrap(), values, "{name}");
    }
}

#[test]
fn types_are_told_and_whole_numbers_are_not_read_as_weights() {
    let found = StateDict::open(&golden("half.pth")).unwrap();
    assert_eq!(found.dtype("bf16").unwrap(), Dtype::BF16);
    let text = refusal(found.floats("i64"));
    assert!(text.contains("`i64` is stored as I64"), "{text}");
    let text = refusal(found.floats("f32"));
    assert!(
        text.contains("`f32` is missing") && text.contains("the file has `f16`"),
        "{text}"
    );
}

#[test]
fn safetensors_hold_what_they_hold_and_common_prefixes_fall() {
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
fn what_is_no_file_of_weights_is_refused_with_what_it_is() {
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
        (b"some other file", "is not a whole safetensors file, nor"),
        (&plain[..plain.len() - 1], "is not a whole zip file"),
        (&plain[..100], "is not a whole zip file"),
        (
            &header(10_000_000_000, b"{"),
            "a header of 10000000000 bytes, in a file of 9",
        ),
        (
            &header(u64::MAX, b"{}"),
            "a header of 18446744073709551615 bytes",
        ),
        (&header(2, b"{"), "a header of 2 bytes, in a file of 9"),
        (&header(2, b"{}."), "it has 11 bytes of 10"),
        (&header(3, b"{.}"), "is not a whole safetensors file"),
        (
            &header(
                64,
                br#"{"a":{"dtype":"F32","shape":[4294967296],"data_offsets":[0,4]}} "#,
            ),
            "is not a whole safetensors file",
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
fn pytorch_files_that_hold_something_else_are_refused_with_what_it_is() {
    for (file, parts) in [
        (
            "hostile",
            ["wants to run `posix.system`", "only weights are read"],
        ),
        (
            "old",
            ["from before 1.6", "save it again with `torch.save`"],
        ),
        (
            "module",
            [
                "torch.nn.modules.linear.Linear",
                "save `model.state_dict()`",
            ],
        ),
        ("endless", ["the tensor `a`", "1 numbers are stored"]),
    ] {
        let text = refusal(StateDict::open(&golden(&format!("{file}.pth"))));
        for part in parts {
            assert!(text.contains(part), "{text}");
        }
    }
}

/// Bytes of real files turned and cut: whatever they then are, opening and reading end.
#[test]
fn damaged_files_end_in_an_error_or_in_numbers_but_never_in_a_panic() {
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
    let loaded = weights::load(folder.path(), &Device::flex()).unwrap();
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
    // Learned positions follow another image size.
    assert!(
        logits(&loaded.model, 8)
            .iter()
            .all(|logit| logit.is_finite())
    );
}

#[test]
fn a_file_alone_is_loaded_by_the_name_of_its_architecture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_changed(&path, |_| {});
    // timm's tiny transformers are as wide as `vit_micro` and have as many heads.
    for name in [
        "vit_micro",
        "vit_tiny_patch16_224.augreg_in1k",
        "deit_tiny_patch16_224",
    ] {
        let loaded = weights::load_file(&path, name, &Device::flex()).unwrap();
        assert_eq!((loaded.image_size, loaded.model.classes()), (8, 3));
        assert_eq!(vit(&loaded.model).heads, 3);
        assert_eq!(logits(&loaded.model, 8), logits(&small(), 8));
    }
    let refused = |name: &str, parts: &[&str]| {
        let text = refusal(weights::load_file(&path, name, &Device::flex()));
        for part in parts {
            assert!(text.contains(part), "{text}");
        }
    };
    refused(
        "vit_base_patch16_224",
        &["768 wide", "192 wide", "is it a `vit_tiny`?"],
    );
    refused(
        "vit_hug_patch14_224",
        &["did you mean `vit_huge_patch14_224`?"],
    );
    refused("resnet50", &["no architecture that is known", "vit_h14"]);
}

#[test]
fn weights_that_do_not_make_the_model_are_refused() {
    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;
    type Case = (fn(&mut Tensors), &'static [&'static str]);
    fn at<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, Vec<usize>, Vec<f32>) {
        tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
    let cases: &[Case] = &[
        (
            |tensors| at(tensors, "blocks.0.norm1.bias").2[3] = f32::INFINITY,
            &["`blocks.0.norm1.bias` holds inf at place 3"],
        ),
        (
            |tensors| at(tensors, "blocks.0.mlp.fc2.weight").1.reverse(),
            &["`blocks.0.mlp.fc2.weight` has shape [32, 192] where [192, 32] is needed"],
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
                "no place for the weights `blocks.0.le0.gamma`",
                "le4.gamma` and 2 more",
            ],
        ),
        (
            |tensors| tensors.push(("blocks.0.ls1.gamma".into(), vec![1], vec![1.0])),
            &["`blocks.0.ls1.gamma` has shape [1] where [192] is needed"],
        ),
        (
            |tensors| tensors.push(("norm.weight".into(), vec![192], vec![1.0; 192])),
            &["both `norm` and `fc_norm`"],
        ),
        (
            |tensors| tensors.retain(|tensor| tensor.0 != "cls_token"),
            &["`pos_embed` does not belong to a square grid"],
        ),
        // timm's `_gap_` models norm each token and then take the mean.
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
            &["the mean of patches that are normed before it is taken"],
        ),
        (
            |tensors| {
                let head = at(tensors, "head.weight");
                (head.1, head.2) = (vec![0, 192], vec![]);
            },
            &["`head.weight` has no numbers"],
        ),
        (
            |tensors| {
                let patches = at(tensors, "patch_embed.proj.weight");
                (patches.1, patches.2) = (vec![1 << 30, 3, 1 << 30, 0], vec![]);
            },
            &["`patch_embed.proj.weight` has no numbers"],
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.safetensors");
    for (change, parts) in cases {
        write_changed(&path, change);
        let text = refusal(weights::load_file(&path, "vit_micro", &Device::flex()));
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
        (r#"{}"#, "does not tell the number of attention heads"),
        (r#"{ "architecture": "vit_base_patch16_224" }"#, "768 wide"),
        (
            r#"{ "model_args": { "num_heads": 5 } }"#,
            "num_heads = 5 do not divide the width, 192",
        ),
        (
            r#"{ "architecture": "vit_micro", "model_args": { "depth": 2 } }"#,
            "depth = 2, and the weights are of 1 blocks",
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
    ] {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let text = refusal(weights::load(folder.path(), &Device::flex()));
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

/// Runs `advxl predict` on synthetic images; the exit code and what it wrote to standard error.
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
fn predict_takes_a_file_of_weights_with_its_architecture() {
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
        "--arch is for a file of weights",
    );
    refuses(
        &golden("hostile.pth"),
        &["--arch", "vit_micro"],
        "`posix.system`",
    );
    assert!(!out.exists());
}
