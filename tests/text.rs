//! Text models: token ids, embeddings and gradients compared with the programs that made them, and errors.
//!
//! `tests/golden/make_text.py` records the files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use advxl::ops::{Device, from_vec, to_vec};
use advxl::text::{
    Cleaning, TextConfig, TextModel, TextPool, TextTower, Tokenizer, TokenizerConfig,
};
use advxl::weights::EmbeddingFile;
use burn::tensor::Tensor;
use safetensors::SafeTensors;
use serde_json::{Value, json};

mod support;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/text")
        .join(name)
}

fn recorded() -> Value {
    recorded_in("captions.json")
}

fn recorded_in(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn texts(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Returns rows of ids, which are recorded without trailing zeros.
fn rows(value: &Value, context: usize) -> Vec<Vec<u32>> {
    let row = |text: String| {
        let mut row: Vec<u32> = text.split(' ').map(|id| id.parse().unwrap()).collect();
        row.resize(context, 0);
        row
    };
    texts(value).into_iter().map(row).collect()
}

/// Returns the recorded tensors of a model: shapes, and values as f64.
fn numbers(name: &str) -> HashMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = std::fs::read(golden("towers.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let of_model = all.iter().filter_map(|(key, view)| {
        let key = key.strip_prefix(name)?.strip_prefix('.')?;
        let values = match view.dtype() {
            safetensors::Dtype::I64 => {
                let values: Vec<i64> = bytemuck::pod_collect_to_vec(view.data());
                values.into_iter().map(|value| value as f64).collect()
            }
            _ => {
                let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
                values.into_iter().map(f64::from).collect()
            }
        };
        Some((key.to_owned(), (view.shape().to_vec(), values)))
    });
    of_model.collect()
}

/// Returns the largest difference, relative to the largest value of `right`.
fn off_by(found: &[f32], right: &[f64]) -> f64 {
    assert_eq!(found.len(), right.len());
    let largest = right
        .iter()
        .fold(0.0, |most: f64, value| most.max(value.abs()));
    let pairs = found.iter().zip(right);
    let differences = pairs.map(|(found, right)| (f64::from(*found) - right).abs());
    differences.fold(0.0, f64::max) / largest.max(f64::MIN_POSITIVE)
}

#[track_caller]
fn refusal<T>(result: advxl::error::Result<T>) -> String {
    let error = result.err().expect("it is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn clip(context: usize) -> TokenizerConfig {
    TokenizerConfig {
        name: None,
        context,
        cleaning: Cleaning::Lower,
        strip_separator: false,
    }
}

fn clipa(context: usize) -> TokenizerConfig {
    TokenizerConfig {
        name: Some("bert-base-uncased".into()),
        cleaning: Cleaning::Whitespace,
        strip_separator: true,
        ..clip(context)
    }
}

/// Copies a golden folder so that a test may change it.
fn copied(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

const MODELS: [&str; 5] = ["hf_quick", "hf_gelu", "open_clip", "custom", "clipa"];

#[test]
fn captions_are_cleaned_as_open_clip_cleans_them() {
    let recorded = recorded();
    let captions = texts(&recorded["captions"]);
    assert!(captions.len() > 200);
    let mut wrong = Vec::new();
    for (caption, right) in captions.iter().zip(texts(&recorded["cleaned"])) {
        let found = Cleaning::Lower.clean(caption);
        if found != right {
            wrong.push(format!("{caption:?}: {found:?}, not {right:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn byte_pairs_give_the_ids_of_openais_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bpe_simple_vocab_16e6.txt.gz");
    std::fs::copy(golden("merges.txt.gz"), file).unwrap();
    let recorded = recorded();
    let captions = texts(&recorded["captions"]);
    for (key, context) in [("clip", 77), ("clip_16", 16)] {
        let tokenizer = Tokenizer::open(folder.path(), clip(context)).unwrap();
        for (caption, right) in captions.iter().zip(rows(&recorded[key], context)) {
            assert_eq!(tokenizer.ids(caption).unwrap(), right, "{caption:?}");
        }
        let all = tokenizer.rows(&captions).unwrap();
        assert_eq!(all, rows(&recorded[key], context).concat());
    }
}

#[test]
fn references_mojibake_and_special_tokens_in_odd_places_are_read_as_open_clip_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bpe_simple_vocab_16e6.txt.gz");
    std::fs::copy(golden("merges.txt.gz"), file).unwrap();
    let recorded = recorded_in("cleaning.json");
    let captions = texts(&recorded["captions"]);
    let (cleaned, ids) = (texts(&recorded["cleaned"]), texts(&recorded["clip"]));
    assert!(captions.len() > 150);
    // Long enough for the longest caption, so that no id is truncated.
    let tokenizer = Tokenizer::open(folder.path(), clip(2000)).unwrap();
    let [start, end] = tokenizer.ids("").unwrap()[..2] else {
        panic!("an empty caption must have a start and an end");
    };
    for ((caption, cleaned), ids) in captions.iter().zip(cleaned).zip(ids) {
        assert_eq!(Cleaning::Lower.clean(caption), cleaned, "{caption:?}");
        let ids = ids.split_whitespace().map(|id| id.parse().unwrap());
        let mut row: Vec<u32> = [start].into_iter().chain(ids).chain([end]).collect();
        row.resize(2000, 0);
        assert_eq!(tokenizer.ids(caption).unwrap(), row, "{caption:?}");
    }
}

#[test]
fn word_pieces_give_the_ids_of_open_clip_with_transformers() {
    let recorded = recorded();
    let captions = texts(&recorded["captions"]);
    let right = rows(&recorded["wordpiece"], 32);
    let list = tempfile::tempdir().unwrap();
    std::fs::copy(golden("wordpiece/vocab.txt"), list.path().join("vocab.txt")).unwrap();
    // From `tokenizer.json`, and from `vocab.txt` alone.
    for folder in [golden("wordpiece"), list.path().to_owned()] {
        let tokenizer = Tokenizer::open(&folder, clipa(32)).unwrap();
        for (caption, right) in captions.iter().zip(&right) {
            assert_eq!(&tokenizer.ids(caption).unwrap(), right, "{caption:?}");
        }
    }
}

#[test]
fn embeddings_match_the_programs_that_made_the_models() {
    let some =
        texts(&serde_json::from_slice(&std::fs::read(golden("some.json")).unwrap()).unwrap());
    for name in MODELS {
        let model = TextModel::load(&golden(name), &Device::cpu()).unwrap();
        let numbers = numbers(name);
        let ids: Vec<f64> = model
            .tokenizer
            .rows(&some)
            .unwrap()
            .iter()
            .map(|id| f64::from(*id))
            .collect();
        assert_eq!(ids, numbers["ids"].1, "{name}");
        let found = to_vec(model.embed(&some).unwrap());
        let off = off_by(&found, &numbers["embeddings"].1);
        assert!(off < 1e-5, "{name}: {off}");
        // Batches of only short captions are computed with fewer tokens.
        let alone = to_vec(model.embed(&some[..1]).unwrap());
        let off = off_by(&alone, &numbers["embeddings"].1[..alone.len()]);
        assert!(off < 1e-5, "{name}: {off}");
    }
}

#[test]
fn gradients_of_every_weight_match_pytorch() {
    for name in ["open_clip", "custom", "clipa"] {
        let model = TextModel::load(&golden(name), &Device::cpu()).unwrap();
        let numbers = numbers(name);
        let ids: Vec<u32> = numbers["ids"].1.iter().map(|id| *id as u32).collect();
        let tower = model.tower.tracked();
        let (shape, weights) = &numbers["weights"];
        let weights = weights.iter().map(|value| *value as f32).collect();
        let weights: Tensor<2> = from_vec(weights, [shape[0], shape[1]], &Device::cpu());
        let loss = (tower.encode(&ids).unwrap() * weights.autodiff()).sum();
        let gradients = tower.gradients(&mut loss.backward());
        let mut checked = 0;
        for (parameter, gradient) in tower.parameters().into_iter().zip(gradients) {
            let (_, right) = &numbers[&format!("gradient.{}", parameter.name)];
            let off = off_by(&to_vec(gradient), right);
            assert!(off < 1e-4, "{name} {}: {off}", parameter.name);
            checked += 1;
        }
        let recorded = numbers.keys().filter(|key| key.starts_with("gradient."));
        assert_eq!(checked, recorded.count());
    }
}

#[test]
fn a_saved_model_gives_the_same_embeddings_to_the_bit() {
    let captions = [
        "a photo of a cat".to_owned(),
        "“Ünïcode” &amp; more".to_owned(),
    ];
    for name in MODELS {
        let model = TextModel::load(&golden(name), &Device::cpu()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path()).unwrap();
        let again = TextModel::load(folder.path(), &Device::cpu()).unwrap();
        assert_eq!(again.tower.config(), model.tower.config(), "{name}");
        assert_eq!(again.tokenizer.config(), model.tokenizer.config(), "{name}");
        let embeddings = |model: &TextModel| to_vec(model.embed(&captions).unwrap());
        assert_eq!(embeddings(&again), embeddings(&model), "{name}");
    }
}

#[test]
fn random_towers_are_functions_of_their_seed_and_change_with_their_weights() {
    let config = TextConfig {
        context: 5,
        vocabulary: 11,
        width: 8,
        heads: 2,
        depth: 2,
        hidden: 16,
        embedding: 3,
        causal: false,
        pool: TextPool::Last,
        gelu: advxl::ops::Gelu::Tanh,
        eps: 1e-5,
    };
    let tower = |seed| TextTower::new(&config, seed, &Device::cpu()).unwrap();
    let ids = [1, 2, 3, 4, 0, 1, 10, 0, 0, 0];
    let embeddings = |tower: &TextTower| to_vec(tower.encode(&ids).unwrap());
    assert_eq!(embeddings(&tower(1)), embeddings(&tower(1)));
    assert_ne!(embeddings(&tower(1)), embeddings(&tower(2)));
    let mut first = tower(1);
    let others = tower(2);
    let values = others
        .parameters()
        .into_iter()
        .map(|parameter| parameter.value.clone());
    assert_eq!(embeddings(&first.with_values(values)), embeddings(&others));
    let before = embeddings(&first);
    let bias = first
        .parameters_mut()
        .into_iter()
        .find(|one| one.name.ends_with("c_proj.bias"));
    let bias = bias.unwrap();
    bias.value = bias.value.clone() + 1.0;
    assert_ne!(embeddings(&first), before);

    let text = refusal(first.encode(&[1, 2, 3, 4, 11]));
    assert!(
        text.contains("row 0 has id 11, but the vocabulary has only 11 tokens"),
        "{text}"
    );
    assert!(refusal(first.encode(&[1, 2, 3])).contains("got 3 ids, expected a multiple of 5"));
    assert!(refusal(first.encode(&[])).contains("got 0 ids, expected a multiple of 5"));
    let lying = TextConfig { heads: 3, ..config };
    let text = refusal(TextTower::new(&lying, 1, &Device::cpu()));
    assert!(
        text.contains("the text tower's width 8 is not a multiple of its 3 heads"),
        "{text}"
    );
}

/// Changes a folder's configuration and returns the error.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let folder = copied(name);
    let file = match name.starts_with("hf") {
        true => "config.json",
        false => "open_clip_config.json",
    };
    let path = folder.path().join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let text = refusal(TextModel::load(folder.path(), &Device::cpu()));
    assert!(
        text.contains(&folder.path().display().to_string()),
        "{text}"
    );
    text
}

#[test]
fn wrong_configurations_are_detected() {
    let text = changed("hf_quick", |json| json["num_attention_heads"] = json!(3));
    assert!(
        text.contains("the text tower's width 16 is not a multiple of its 3 heads"),
        "{text}"
    );
    let text = changed("hf_quick", |json| json["vocab_size"] = json!(900));
    let found =
        "`text_model.embeddings.token_embedding.weight` has shape [814, 16], expected [900, 16]";
    assert!(text.contains(found), "{text}");
    let text = changed("hf_quick", |json| json["vocab_size"] = json!(100));
    assert!(
        text.contains("the tokenizer has 814 tokens, but the text tower has 100"),
        "{text}"
    );
    let text = changed("custom", |json| {
        json["model_cfg"]["text_cfg"]["layers"] = json!(3)
    });
    assert!(
        text.contains("`text.transformer.resblocks.2.ln_1.weight` is missing"),
        "{text}"
    );
    let text = changed("open_clip", |json| {
        json["model_cfg"]["text_cfg"]["layers"] = json!(1)
    });
    assert!(
        text.contains("unexpected weights in the text tower: `transformer.resblocks.1."),
        "{text}"
    );
    let text = changed("clipa", |json| {
        json["model_cfg"]["text_cfg"]["width"] = json!(1 << 30)
    });
    assert!(text.contains("has shape ["), "{text}");
    let text = changed("clipa", |json| {
        json["model_cfg"]["text_cfg"]["context_length"] = json!(1)
    });
    assert!(
        text.contains("context 1 is too short for the start and end tokens"),
        "{text}"
    );
    let text = changed("clipa", |json| *json = json!([1]));
    assert!(text.contains("is missing `model_cfg`"), "{text}");
    let text = changed("hf_gelu", |json| json["hidden_act"] = json!("relu"));
    assert!(text.contains("`config.hidden_act` is \"relu\""), "{text}");
}

#[test]
fn missing_and_broken_files_of_folders_are_reported() {
    let load = |folder: &Path| refusal(TextModel::load(folder, &Device::cpu()));
    let folder = copied("clipa");
    std::fs::remove_file(folder.path().join("vocab.txt")).unwrap();
    let text = load(folder.path());
    assert!(
        text.contains("no tokenizer files in `") && text.contains("bert-base-uncased"),
        "{text}"
    );

    let vocabulary = std::fs::read_to_string(golden("clipa/vocab.txt")).unwrap();
    for name in ["[CLS]", "[SEP]", "[UNK]", "[PAD]"] {
        let path = folder.path().join("vocab.txt");
        std::fs::write(path, vocabulary.replace(name, "[other]")).unwrap();
        let text = load(folder.path());
        assert!(
            text.contains(&format!("the vocabulary is missing `{name}`")),
            "{text}"
        );
    }
    std::fs::write(
        folder.path().join("tokenizer.json"),
        r#"{"model":{"type":"Unigram"}}"#,
    )
    .unwrap();
    assert!(load(folder.path()).contains("unsupported tokenizer type `Unigram`"));
    std::fs::write(
        folder.path().join("tokenizer.json"),
        r#"{"model":{"type":"WordPiece"}}"#,
    )
    .unwrap();
    assert!(load(folder.path()).contains("invalid tokenizer"));

    let folder = copied("open_clip");
    let path = folder.path().join("bpe_simple_vocab_16e6.txt.gz");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(load(folder.path()).contains("not a gzip-compressed text"));

    let folder = copied("hf_quick");
    let path = folder.path().join("merges.txt");
    let merges = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, merges.replace("\nt h\n", "\nt h e\n")).unwrap();
    let text = load(folder.path());
    assert!(
        text.contains("`merges.txt`: line ") && text.contains("is `t h e`"),
        "{text}"
    );
    std::fs::write(folder.path().join("vocab.json"), "{").unwrap();
    assert!(load(folder.path()).contains("`vocab.json` is not valid JSON"));
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(load(folder.path()).contains("has no weights file"));
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(load(folder.path()).contains("is not a text model folder"));
}

#[test]
fn weights_that_are_nan_missing_or_unexpected_are_refused() {
    let folder = copied("custom");
    let model = TextModel::load(folder.path(), &Device::cpu()).unwrap();
    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;
    let write = |change: &dyn Fn(&mut Tensors)| {
        let parameters = model.tower.parameters().into_iter();
        let mut tensors: Vec<_> = parameters
            .map(|one| {
                (
                    format!("text.{}", one.name),
                    one.shape.clone(),
                    one.to_vec(),
                )
            })
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, shape, values)| {
            let bytes = bytemuck::cast_slice(values);
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name, view.unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.path().join("open_clip_model.safetensors"), bytes).unwrap();
        TextModel::load(folder.path(), &Device::cpu())
    };
    write(&|_| ()).unwrap();
    // Weights of the whole model are known and ignored.
    write(&|tensors| tensors.push(("visual.class_embedding".into(), vec![1], vec![0.0]))).unwrap();
    let text = refusal(write(&|tensors| tensors[3].2[1] = f32::NAN));
    assert!(text.contains("contains NaN at index 1"), "{text}");
    let text = refusal(write(&|tensors| drop(tensors.remove(0))));
    assert!(
        text.contains("`token_embedding.weight` is missing"),
        "{text}"
    );
    let text = refusal(write(&|tensors| {
        tensors.push(("text.cls_emb".into(), vec![1], vec![0.0]))
    }));
    assert!(
        text.contains("unexpected weights in the text tower: `text.cls_emb`"),
        "{text}"
    );
}

/// Runs `advxl embed` in a folder.
fn embed(folder: &Path, model: &str, arguments: &[&str]) -> (i32, String) {
    let path = |name: &str| folder.join(name).display().to_string();
    let (model, captions, out) = (golden(model), path("captions.txt"), path("out.safetensors"));
    let mut all = vec![
        "embed",
        model.to_str().unwrap(),
        "--captions",
        &captions,
        "--out",
        &out,
    ];
    all.extend(arguments);
    support::advxl(&all)
}

#[test]
fn the_command_embeds_a_file_of_captions_line_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let captions: Vec<String> = texts(&recorded()["captions"])
        .into_iter()
        .filter(|caption| !caption.contains(['\n', '\r']))
        .collect();
    std::fs::write(folder.path().join("captions.txt"), captions.join("\r\n")).unwrap();
    let keys: Vec<String> = (0..captions.len())
        .map(|index| format!("shard/{index:05}"))
        .collect();
    let keys_path = folder.path().join("keys.txt");
    std::fs::write(&keys_path, keys.join("\n") + "\n").unwrap();
    let out = folder.path().join("out.safetensors");
    for (name, batch) in [("hf_quick", "7"), ("clipa", "64")] {
        let model = TextModel::load(&golden(name), &Device::cpu()).unwrap();
        let arguments = [
            "--tokens",
            "--batch",
            batch,
            "--keys",
            keys_path.to_str().unwrap(),
        ];
        let (code, text) = embed(folder.path(), name, &arguments);
        assert_eq!(code, 0, "{text}");
        let right: Vec<f64> = to_vec(model.embed(&captions).unwrap())
            .into_iter()
            .map(f64::from)
            .collect();
        let file = EmbeddingFile::open(&out).unwrap();
        assert_eq!(file.made_by().unwrap().text_model, model.hash);
        let all: Vec<usize> = (0..file.len()).collect();
        let found = file.rows(&all).unwrap();
        assert!(
            off_by(&found, &right) < 1e-6,
            "batches differ by more than rounding"
        );
        assert_eq!(file.row_of("shard/00100").unwrap(), 100);
        let bytes = std::fs::read(&out).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let ids: Vec<i32> =
            bytemuck::pod_collect_to_vec(tensors.tensor("token_ids").unwrap().data());
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        assert_eq!(ids, model.tokenizer.rows(&captions).unwrap());

        // f16 is the rounded f32, to the bit.
        let (code, text) = embed(folder.path(), name, &["--f16", "--batch", batch]);
        assert_eq!(code, 0, "{text}");
        let rounded = EmbeddingFile::open(&out).unwrap().rows(&all).unwrap();
        let right = found
            .iter()
            .map(|value| half::f16::from_f32(*value).to_f32());
        assert_eq!(rounded, right.collect::<Vec<_>>());
    }
}

#[test]
fn the_command_refuses_mismatched_inputs_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let captions = folder.path().join("captions.txt");
    let says = |arguments: &[&str], right: &str| {
        let (code, text) = embed(folder.path(), "clipa", arguments);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(right), "{text}");
        assert!(
            std::fs::read_dir(folder.path()).unwrap().count() < 3,
            "nothing must be written"
        );
    };
    says(&[], "captions.txt`: no such file");
    std::fs::write(&captions, "").unwrap();
    says(&[], "has no captions");
    std::fs::write(&captions, b"a\n\xff\n").unwrap();
    says(&[], "line 2: not UTF-8");
    std::fs::write(&captions, "a\nb\n").unwrap();
    says(&["--batch", "0"], "--batch must be at least 1");
    let keys = folder.path().join("keys.txt");
    std::fs::write(&keys, "a\n").unwrap();
    says(
        &["--keys", keys.to_str().unwrap()],
        "has 1 keys for 2 captions",
    );
    std::fs::write(&keys, "a\n\n").unwrap();
    says(
        &["--keys", keys.to_str().unwrap()],
        "the key of row 1 is empty or contains a line feed",
    );
}
