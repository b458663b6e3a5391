//! Preprocessing settings of model folders, in the formats of timm, open_clip and transformers.
//!
//! Unsupported settings become an error that is only raised when images are to be preprocessed.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::image::resize::Filter;
use crate::image::{Preprocessing, ResizeMode};
use crate::settings::Words;

/// Preprocessing stated by a model folder.
#[derive(Clone, Debug)]
pub struct StatedPreprocessing {
    /// Where it is stated: a file of the folder, or a program's defaults.
    pub source: &'static str,
    /// The settings, or an error if they are unsupported.
    pub preprocessing: Result<Preprocessing>,
}

/// Preprocessing read from a file, before the image size is known from the weights.
pub(crate) struct PreprocessingFields {
    pub(crate) source: &'static str,
    pub(crate) preprocessing: Result<Preprocessing>,
    /// The file's key and value for the image size, if it must match the weights.
    pub(crate) size: Option<(&'static str, usize)>,
}

impl PreprocessingFields {
    /// Returns bicubic resizing and a center crop, which most programs use if nothing is stated.
    pub(crate) fn default() -> Self {
        Self {
            source: "defaults for a weights file",
            preprocessing: Ok(bicubic()),
            size: None,
        }
    }

    /// Completes the settings with the image size of the weights.
    pub(crate) fn at(self, image_size: usize) -> StatedPreprocessing {
        let source = self.source;
        let preprocessing = self.preprocessing.and_then(|found| match self.size {
            Some((key, size)) if size != image_size => {
                let what = format!(
                    "{key} = {size}, but the weights are for images of {image_size} pixels"
                );
                Err(refused(source, &what))
            }
            _ => {
                let found = Preprocessing {
                    image_size,
                    ..found
                };
                found
                    .check()
                    .map(|()| found)
                    .map_err(|error| error.context(source.to_owned()))
            }
        });
        StatedPreprocessing {
            source,
            preprocessing,
        }
    }
}

fn bicubic() -> Preprocessing {
    Preprocessing {
        interpolation: Filter::Bicubic,
        ..Preprocessing::new(1)
    }
}

fn refused(source: &str, what: &str) -> Error {
    Error::input(format!("`{source}` has {what}"))
        .hint("set --resize-mode, --crop-fraction and --interpolation together to override it")
}

/// Formats a value of a file, truncated to 80 characters.
fn brief(found: &Value) -> String {
    let text = found.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Looks up the choice that a word of a file names.
fn choice<T: Copy>(source: &str, key: &str, found: &Value, words: &[(&str, T)]) -> Result<T> {
    let known = words.iter().find(|(word, _)| Some(*word) == found.as_str());
    known.map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let what = format!(
            "{key} = {}, expected one of {}",
            brief(found),
            words.join(", ")
        );
        refused(source, &what)
    })
}

/// Returns the image size of a model.
///
/// Errors: images that are not square.
pub(crate) fn square(source: &str, key: &str, found: &Value) -> Result<Option<usize>> {
    side(key, found).map_err(|what| {
        Error::input(format!("`{source}` has {what}"))
            .hint("only models for square images can be loaded")
    })
}

/// Parses the side of square images, written as a number, as `[3, side, side]` or `[side, side]`, or as `{height,
/// width}`.
///
/// Errors: a description of what is wrong.
fn side(key: &str, found: &Value) -> std::result::Result<Option<usize>, String> {
    let sides: Vec<&Value> = match found {
        Value::Null => return Ok(None),
        Value::Array(sides) => sides.iter().rev().take(2).collect(),
        Value::Object(sides) => [sides.get("height"), sides.get("width")]
            .into_iter()
            .flatten()
            .collect(),
        number => vec![number],
    };
    let sides: Option<Vec<u64>> = sides.into_iter().map(Value::as_u64).collect();
    let wrong = |what: &str| Err(format!("{key} = {}, {what}", brief(found)));
    match sides.as_deref() {
        Some([0] | [0, _] | []) | None => wrong("which is not an image size"),
        Some([side]) if !found.is_object() => Ok(Some(*side as usize)),
        Some([height, width]) if height == width => Ok(Some(*height as usize)),
        Some([_, _]) => wrong("but images must be square"),
        Some(_) => wrong("which is not an image size"),
    }
}

/// timm's crop modes; borders are filled with the mean color.
const TIMM_MODES: [(&str, ResizeMode); 3] = [
    ("center", ResizeMode::Shortest),
    ("squash", ResizeMode::Squash),
    ("border", ResizeMode::Longest { fill: [0; 3] }),
];

/// open_clip's resize modes.
const OPEN_CLIP_MODES: [(&str, ResizeMode); 3] = [
    ("shortest", ResizeMode::Shortest),
    ("squash", ResizeMode::Squash),
    ("longest", ResizeMode::Longest { fill: [0; 3] }),
];

/// Reads timm's `pretrained_cfg` as its `resolve_data_config` does. `ours` may hold the border color.
pub(crate) fn of_timm(config: &Value, ours: &Value, mean: [f64; 3]) -> PreprocessingFields {
    let source = "config.json";
    let read = || {
        let interpolation = match &config["interpolation"] {
            Value::Null => Filter::Bicubic,
            found => choice(source, "interpolation", found, &Filter::pairs())?,
        };
        let crop_fraction = match &config["crop_pct"] {
            Value::Null => 0.875,
            found => found.as_f64().unwrap_or(f64::NAN),
        };
        let mut resize_mode = match &config["crop_mode"] {
            Value::Null => ResizeMode::Shortest,
            found => choice(source, "crop_mode", found, &TIMM_MODES)?,
        };
        if let ResizeMode::Longest { fill } = &mut resize_mode {
            *fill = color(&ours["fill"]).unwrap_or(mean_color(mean));
        }
        Ok(Preprocessing {
            interpolation,
            crop_fraction,
            resize_mode,
            ..bicubic()
        })
    };
    PreprocessingFields {
        source,
        preprocessing: read(),
        size: None,
    }
}

/// Returns the color of timm's borders, rounded as in Python.
pub(crate) fn mean_color(mean: [f64; 3]) -> [u8; 3] {
    mean.map(|mean| (255.0 * mean).round_ties_even() as u8)
}

/// Parses an RGB color from a list of three numbers, or from one number for all channels.
fn color(found: &Value) -> Option<[u8; 3]> {
    let byte = |value: &Value| value.as_u64().and_then(|value| u8::try_from(value).ok());
    match found {
        Value::Array(values) => {
            let bytes: Option<Vec<u8>> = values.iter().map(byte).collect();
            bytes?.try_into().ok()
        }
        one => byte(one).map(|one| [one; 3]),
    }
}

/// Describes the separate test size of timm's `pretrained_cfg`, which its `validate.py` uses; `None` if there is none.
pub(crate) fn test_size(config: &Value) -> Option<String> {
    let number = |key: &str| match &config[key] {
        Value::Array(sizes) => sizes.last().and_then(Value::as_f64),
        found => found.as_f64(),
    };
    let or = |key: &str, other: &str, usual: f64| number(key).or(number(other)).unwrap_or(usual);
    let used = [or("input_size", "", 224.0), or("crop_pct", "", 0.875)];
    let test = [
        or("test_input_size", "input_size", 224.0),
        or("test_crop_pct", "crop_pct", 0.875),
    ];
    (test != used).then(|| {
        let [size, fraction] = test;
        format!(
            "`config.json` also has a test size, which timm's validate.py uses: --image-size {size} \
             --crop-fraction {fraction}"
        )
    })
}

/// Returns the preprocessing under the keys of timm's `pretrained_cfg`.
pub(crate) fn to_timm(preprocessing: &Preprocessing) -> [(&'static str, Value); 3] {
    let kind = std::mem::discriminant(&preprocessing.resize_mode);
    let mode = TIMM_MODES
        .iter()
        .find(|(_, mode)| std::mem::discriminant(mode) == kind);
    [
        ("interpolation", preprocessing.interpolation.word().into()),
        ("crop_pct", preprocessing.crop_fraction.into()),
        ("crop_mode", mode.expect("every mode has a word").0.into()),
    ]
}

/// Reads open_clip's `preprocess_cfg` as its `image_transform` does for evaluation.
pub(crate) fn of_open_clip(config: &Value) -> PreprocessingFields {
    let source = crate::weights::outputs::OPEN_CLIP_CONFIG;
    // `random` is drawn only in training.
    let filters = [
        ("bicubic", Filter::Bicubic),
        ("bilinear", Filter::Bilinear),
        ("random", Filter::Bicubic),
    ];
    let read = || {
        if !(config["mode"].is_null() || config["mode"] == "RGB") {
            return Err(refused(
                source,
                &format!("mode = {}, but images must be RGB", config["mode"]),
            ));
        }
        let interpolation = match &config["interpolation"] {
            Value::Null => Filter::Bicubic,
            found => choice(source, "interpolation", found, &filters)?,
        };
        let mut resize_mode = match &config["resize_mode"] {
            Value::Null => ResizeMode::Shortest,
            found => choice(source, "resize_mode", found, &OPEN_CLIP_MODES)?,
        };
        if let (ResizeMode::Longest { fill }, found @ (Value::Number(_) | Value::Array(_))) =
            (&mut resize_mode, &config["fill_color"])
        {
            *fill = color(found).ok_or_else(|| {
                refused(
                    source,
                    &format!("fill_color = {found}, which is not a color"),
                )
            })?;
        }
        Ok(Preprocessing {
            interpolation,
            resize_mode,
            ..bicubic()
        })
    };
    let size = side("size", &config["size"]).map_err(|what| refused(source, &what));
    PreprocessingFields {
        source,
        size: size.clone().ok().flatten().map(|size| ("size", size)),
        preprocessing: size.and_then(|_| read()),
    }
}

/// Returns open_clip's `preprocess_cfg` for a model.
///
/// Errors: settings that open_clip does not support.
pub(crate) fn to_open_clip(preprocessing: &Preprocessing) -> Result<Value> {
    let lacks = |what: String| {
        let message =
            format!("open_clip does not support {what}, which the model was evaluated with");
        Error::input(message).hint("export it with --to timm")
    };
    let (filter, fraction) = (preprocessing.interpolation, preprocessing.crop_fraction);
    if !matches!(filter, Filter::Bicubic | Filter::Bilinear) {
        return Err(lacks(format!("{} interpolation", filter.word())));
    }
    if fraction != 1.0 {
        return Err(lacks(format!("a crop fraction of {fraction}")));
    }
    let mut config = serde_json::json!({
        "size": preprocessing.image_size,
        "mode": "RGB",
        "interpolation": filter.word(),
    });
    config["resize_mode"] = match preprocessing.resize_mode {
        ResizeMode::Shortest => "shortest".into(),
        ResizeMode::Squash => "squash".into(),
        ResizeMode::Crop => return Err(lacks("cropping without resizing".into())),
        ResizeMode::Longest { fill: [r, g, b] } => {
            config["fill_color"] = match r == g && g == b {
                true => r.into(),
                false => serde_json::json!([r, g, b]),
            };
            "longest".into()
        }
    };
    Ok(config)
}

/// Filters in the order of Pillow's numbers.
const PILLOW: [Filter; 6] = [
    Filter::Nearest,
    Filter::Lanczos,
    Filter::Bilinear,
    Filter::Bicubic,
    Filter::Box,
    Filter::Hamming,
];

/// Returns the `preprocessor_config.json` of transformers' CLIP for a model.
///
/// Errors: settings that its image processor does not support.
pub(crate) fn to_hugging_face(
    preprocessing: &Preprocessing,
    (mean, std): ([f64; 3], [f64; 3]),
) -> Result<Value> {
    let lacks = |what: String| {
        let message = format!(
            "transformers' CLIP image processor does not support {what}, which the model was evaluated with"
        );
        Error::input(message).hint("export it with --to timm")
    };
    let filter = preprocessing.interpolation;
    // Its default backend is torchvision, which has no others.
    if !matches!(filter, Filter::Bicubic | Filter::Bilinear | Filter::Nearest) {
        return Err(lacks(format!("{} interpolation", filter.word())));
    }
    let (resized, crop) = (preprocessing.resized(), preprocessing.image_size);
    let size = match preprocessing.resize_mode {
        ResizeMode::Shortest => serde_json::json!({ "shortest_edge": resized }),
        ResizeMode::Squash => serde_json::json!({ "height": resized, "width": resized }),
        ResizeMode::Longest { .. } => return Err(lacks("padding".into())),
        ResizeMode::Crop => return Err(lacks("cropping without resizing".into())),
    };
    Ok(serde_json::json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": size,
        "resample": PILLOW.iter().position(|known| *known == filter),
        "do_center_crop": true,
        "crop_size": { "height": crop, "width": crop },
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean,
        "image_std": std,
    }))
}

/// Reads what transformers' image processor does, from the `preprocessor_config.json` (or null) of a CLIP or ViT
/// folder.
pub(crate) fn of_hugging_face(config: &Value, is_clip: bool) -> PreprocessingFields {
    let source = match config.is_null() {
        true => "transformers' defaults",
        false => "preprocessor_config.json",
    };
    match hugging_face(source, config, is_clip) {
        Ok((preprocessing, size)) => PreprocessingFields {
            source,
            preprocessing: Ok(preprocessing),
            size,
        },
        Err(error) => PreprocessingFields {
            source,
            preprocessing: Err(error),
            size: None,
        },
    }
}

type Sized = (Preprocessing, Option<(&'static str, usize)>);

fn hugging_face(source: &'static str, config: &Value, is_clip: bool) -> Result<Sized> {
    let is = |key: &str, usual: bool| config[key].as_bool().unwrap_or(usual);
    let refused = |what: &str| refused(source, what);
    if !is("do_resize", true) {
        return Err(refused("do_resize = false, but images differ in size"));
    }
    for key in ["do_pad", "do_thumbnail", "do_align_long_axis", "crop_pct"] {
        if !(config[key].is_null() || config[key] == Value::Bool(false)) {
            return Err(refused(&format!(
                "{key} = {}, which is unsupported",
                config[key]
            )));
        }
    }
    if !is("do_rescale", true) {
        return Err(refused("do_rescale = false, but pixels are in [0, 1]"));
    }
    let factor = &config["rescale_factor"];
    let is_usual = |factor: f64| (factor * 255.0 - 1.0).abs() < 1e-4;
    if !(factor.is_null() || factor.as_f64().is_some_and(is_usual)) {
        return Err(refused(&format!(
            "rescale_factor = {factor}, but pixels are in [0, 1]"
        )));
    }
    let usual = if is_clip {
        Filter::Bicubic
    } else {
        Filter::Bilinear
    };
    let interpolation = match (&config["resample"], config["resample"].as_u64()) {
        (Value::Null, _) => usual,
        (_, Some(number)) if (number as usize) < PILLOW.len() => PILLOW[number as usize],
        (found, _) => {
            return Err(refused(&format!(
                "resample = {found}, which is not a Pillow filter"
            )));
        }
    };
    let found = Preprocessing {
        interpolation,
        ..bicubic()
    };
    let side = |key: &str, found: &Value| side(key, found).map_err(|what| refused(&what));
    let size = &config["size"];
    let edge = &size["shortest_edge"];
    // A bare number is the shorter side for CLIP's processor and both sides for ViT's.
    let keeps_proportions = !edge.is_null() || (is_clip && !size.is_object());
    let resized = match edge {
        Value::Null => side("size", size)?,
        _ if !size["longest_edge"].is_null() => {
            return Err(refused(&format!("size = {size}, which is unsupported")));
        }
        edge => side("size", edge)?,
    };
    let crop = match is("do_center_crop", is_clip) {
        true => side("crop_size", &config["crop_size"])?,
        false if keeps_proportions => {
            return Err(refused("do_center_crop = false, but images must be square"));
        }
        false => None,
    };
    let found = Preprocessing {
        resize_mode: match keeps_proportions {
            true => ResizeMode::Shortest,
            false => ResizeMode::Squash,
        },
        crop_fraction: match (resized, crop) {
            (Some(side), Some(crop)) => fraction(side, crop).map_err(|what| refused(&what))?,
            _ => 1.0,
        },
        ..found
    };
    let size = crop.map(|crop| ("crop_size", crop));
    Ok((found, size.or(resized.map(|side| ("size", side)))))
}

/// Returns the fraction of `side` that the crop keeps, such that timm's rounding gives `side` back.
fn fraction(side: usize, crop: usize) -> std::result::Result<f64, String> {
    if crop > side {
        return Err(format!(
            "crop_size = {crop} for images resized to {side}, but padding is unsupported"
        ));
    }
    let fraction = crop as f64 / side as f64;
    Ok(match (crop as f64 / fraction) as usize == side {
        true => fraction,
        // The division rounded up; the next smaller float gives slightly more than `side`.
        false => fraction.next_down(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn preprocessing(
        mode: ResizeMode,
        fraction: f64,
        filter: Filter,
        size: usize,
    ) -> Preprocessing {
        Preprocessing {
            image_size: size,
            resize_mode: mode,
            crop_fraction: fraction,
            interpolation: filter,
        }
    }

    #[track_caller]
    fn refusal(found: PreprocessingFields, size: usize, part: &str) {
        let error = found.at(size).preprocessing.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn timm_settings_are_read_with_timms_defaults() {
        let read = |config: Value| {
            of_timm(&config, &Value::Null, [0.485, 0.456, 0.406])
                .at(224)
                .preprocessing
                .unwrap()
        };
        let usual = preprocessing(ResizeMode::Shortest, 0.875, Filter::Bicubic, 224);
        assert_eq!(read(json!({})), usual);
        assert_eq!(read(json!({ "crop_pct": null, "crop_mode": null })), usual);
        let squash = json!({ "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear" });
        assert_eq!(
            read(squash),
            preprocessing(ResizeMode::Squash, 0.9, Filter::Bilinear, 224)
        );
        let border = ResizeMode::Longest {
            fill: [124, 116, 104],
        };
        let found =
            read(json!({ "crop_pct": 1.0, "crop_mode": "border", "interpolation": "lanczos" }));
        assert_eq!(found, preprocessing(border, 1.0, Filter::Lanczos, 224));
        // Round trip.
        for mode in [ResizeMode::Shortest, ResizeMode::Squash, border] {
            let found = preprocessing(mode, 0.95, Filter::Hamming, 224);
            let written: serde_json::Map<_, _> = to_timm(&found)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect();
            assert_eq!(read(Value::Object(written)), found);
        }
        for (config, part) in [
            (json!({ "interpolation": "cubic" }), "interpolation = "),
            (json!({ "crop_mode": "edge" }), "crop_mode"),
            (json!({ "crop_pct": 1.5 }), "invalid crop fraction 1.5"),
            (json!({ "crop_pct": 0 }), "invalid crop fraction 0"),
            (json!({ "crop_pct": "all" }), "invalid crop fraction NaN"),
        ] {
            refusal(of_timm(&config, &Value::Null, [0.5; 3]), 224, part);
        }
    }

    #[test]
    fn a_different_test_size_is_reported() {
        assert_eq!(
            test_size(&json!({ "input_size": [3, 224, 224], "crop_pct": 0.95 })),
            None
        );
        let config = json!({
            "input_size": [3, 224, 224], "crop_pct": 0.95, "test_input_size": [3, 288, 288], "test_crop_pct": 1.0,
        });
        let note = test_size(&config).unwrap();
        assert!(
            note.ends_with("--image-size 288 --crop-fraction 1"),
            "{note}"
        );
    }

    #[test]
    fn open_clip_settings_are_read() {
        let read = |config: Value| of_open_clip(&config).at(224).preprocessing.unwrap();
        let usual = preprocessing(ResizeMode::Shortest, 1.0, Filter::Bicubic, 224);
        assert_eq!(read(json!({})), usual);
        assert_eq!(
            read(json!({ "size": [224, 224], "mode": "RGB", "interpolation": "random" })),
            usual
        );
        let squash = json!({ "resize_mode": "squash", "interpolation": "bilinear", "size": 224 });
        assert_eq!(
            read(squash),
            preprocessing(ResizeMode::Squash, 1.0, Filter::Bilinear, 224)
        );
        let longest = |fill| preprocessing(ResizeMode::Longest { fill }, 1.0, Filter::Bicubic, 224);
        assert_eq!(read(json!({ "resize_mode": "longest" })), longest([0; 3]));
        assert_eq!(
            read(json!({ "resize_mode": "longest", "fill_color": 7 })),
            longest([7; 3])
        );
        let written = to_open_clip(&longest([1, 2, 3])).unwrap();
        assert_eq!(read(written), longest([1, 2, 3]));
        for (config, part) in [
            (json!({ "resize_mode": "crop" }), "resize_mode"),
            (json!({ "interpolation": "nearest" }), "interpolation"),
            (json!({ "mode": "BGR" }), "mode = \"BGR\""),
            (json!({ "size": [224, 196] }), "must be square"),
            (
                json!({ "size": 336 }),
                "size = 336, but the weights are for images of 224 pixels",
            ),
            (
                json!({ "resize_mode": "longest", "fill_color": 300 }),
                "fill_color = 300",
            ),
        ] {
            refusal(of_open_clip(&config), 224, part);
        }
        assert!(
            to_open_clip(&preprocessing(
                ResizeMode::Shortest,
                0.9,
                Filter::Bicubic,
                224
            ))
            .is_err()
        );
    }

    #[test]
    fn transformers_settings_are_read_as_its_processors_apply_them() {
        let read = |config: Value, is_clip| {
            of_hugging_face(&config, is_clip)
                .at(224)
                .preprocessing
                .unwrap()
        };
        let squash = preprocessing(ResizeMode::Squash, 1.0, Filter::Bilinear, 224);
        let clip = preprocessing(ResizeMode::Shortest, 1.0, Filter::Bicubic, 224);
        assert_eq!(read(Value::Null, false), squash);
        assert_eq!(read(Value::Null, true), clip);
        assert_eq!(read(json!({ "size": 224, "resample": 2 }), false), squash);
        assert_eq!(
            read(
                json!({ "size": 224, "crop_size": 224, "resample": 3 }),
                true
            ),
            clip
        );
        let modern = json!({
            "do_resize": true, "size": { "shortest_edge": 256 }, "do_center_crop": true,
            "crop_size": { "height": 224, "width": 224 }, "resample": 1, "do_rescale": true,
            "rescale_factor": 0.00392156862745098, "do_normalize": true,
        });
        let right = preprocessing(ResizeMode::Shortest, 0.875, Filter::Lanczos, 224);
        assert_eq!(read(modern, true), right);
        let both = json!({
            "size": { "height": 256, "width": 256 }, "do_center_crop": true, "crop_size": 224, "resample": 0,
        });
        assert_eq!(
            read(both, false),
            preprocessing(ResizeMode::Squash, 0.875, Filter::Nearest, 224)
        );
        for (config, part) in [
            (json!({ "do_resize": false }), "do_resize = false"),
            (json!({ "do_rescale": false }), "do_rescale = false"),
            (
                json!({ "rescale_factor": 0.00784 }),
                "rescale_factor = 0.00784",
            ),
            (json!({ "resample": 6 }), "resample = 6"),
            (
                json!({ "size": { "height": 224, "width": 196 } }),
                "must be square",
            ),
            (
                json!({ "size": { "height": 384, "width": 384 } }),
                "size = 384, but the weights are for images of 224",
            ),
            (
                json!({ "size": { "shortest_edge": 224 } }),
                "do_center_crop = false",
            ),
            (
                json!({ "size": { "longest_edge": 224 } }),
                "which is not an image size",
            ),
            (json!({ "crop_pct": 0.9 }), "crop_pct = 0.9"),
        ] {
            refusal(of_hugging_face(&config, false), 224, part);
        }
        let larger = json!({ "size": { "shortest_edge": 200 }, "crop_size": 224 });
        refusal(
            of_hugging_face(&larger, true),
            224,
            "but padding is unsupported",
        );
    }

    #[test]
    fn every_crop_fraction_gives_back_the_resized_side() {
        for side in 1..600usize {
            for crop in 1..=side {
                let fraction = fraction(side, crop).unwrap();
                assert_eq!(
                    (crop as f64 / fraction).floor() as usize,
                    side,
                    "{crop} of {side}"
                );
            }
        }
    }
}
