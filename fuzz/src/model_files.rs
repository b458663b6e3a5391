//! Configuration files in model folders.

use std::fs;
use std::path::PathBuf;

use advxl::ops::Device;
use advxl::text::TextModel;
use advxl::weights::import as weights;

use crate::scratch::{self, golden, parts};

/// Folders of valid models, and the names of their configuration files.
const MODELS: [(&str, &str); 5] = [
    ("clip/open_clip", "open_clip_config.json"),
    ("clip/clipa", "open_clip_config.json"),
    ("clip/hugging_face_clip_vision", "config.json"),
    ("clip/hugging_face_vit", "config.json"),
    ("timm", "config.json"),
];
const TEXTS: [(&str, &str); 3] = [
    ("text/clipa", "open_clip_config.json"),
    ("text/custom", "open_clip_config.json"),
    ("text/hf_gelu", "config.json"),
];

/// Input: a letter for the model, its configuration, a zero byte, its preprocessing configuration. Weights are valid.
pub fn config(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let [config, preprocessor] = parts(rest, 0);
    let choice = usize::from(*first) % (MODELS.len() + TEXTS.len());
    let (folder, name) = [&MODELS[..], &TEXTS].concat()[choice];
    let path = copied(folder);
    fs::write(path.join(name), config).unwrap();
    fs::write(path.join("preprocessor_config.json"), preprocessor).unwrap();
    match choice < MODELS.len() {
        true => drop(weights::load(&path, &Device::cpu())),
        false => drop(TextModel::load(&path, &Device::cpu())),
    }
}

/// Returns this thread's copy of the folder, copied once.
fn copied(folder: &str) -> PathBuf {
    let path = scratch::path(folder);
    if path.is_dir() {
        return path;
    }
    fs::create_dir_all(&path).unwrap();
    if folder == "timm" {
        fs::copy(golden("weights/advxl.pth"), path.join("pytorch_model.bin")).unwrap();
        return path;
    }
    for entry in fs::read_dir(golden(folder)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    path
}
