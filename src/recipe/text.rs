//! Text models and embeddings for training on captions.

use std::path::PathBuf;

use crate::model::config::common::{DEEPEST, LARGEST_WIDTH};
use crate::settings::{Table, settings};

settings! {
    /// Source of the caption embeddings: a frozen text model, a new one trained jointly with the images, or a file. Set
    /// exactly one of `model`, `from` and `new`, or use `embeddings`. With `embeddings`, a frozen `model` or `from` is
    /// optional and only embeds class names.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct Text(table) {
        /// Folder of a frozen text model.
        pub model: Option<PathBuf> { example: "\"models/ViT-L-16-CLIPA\"" },
        /// Name of an earlier stage whose trained text model (`new`) is used, frozen.
        pub from: Option<String> { example: "\"clip\"" },
        /// New text model to train in this stage.
        pub new: Option<NewText> {},
        /// File of precomputed caption embeddings, written by `advxl embed`.
        pub embeddings: Option<PathBuf> { example: "\"captions.safetensors\"" },
        /// File with the class names of the test images, one per line, for zero-shot evaluation. If omitted, the names
        /// in the data set are used.
        pub classes: Option<PathBuf> { example: "\"data/imagenet_classes.txt\"" },
        /// Prompt templates for zero-shot evaluation, with `{}` in place of the class name. If empty, the bare names
        /// are used.
        pub templates: Vec<String> { omit_default: true, example: "[\"a photo of a {}\"]" } [= Vec::new()],
    }
    check {
        check_source(table);
        check_templates(table, templates.as_deref().unwrap_or_default());
    }
}

settings! {
    /// A text model to train, with CLIPA's architecture. Its vocabulary is built from the words of the training
    /// captions.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct NewText(table) {
        /// Context length: tokens per caption.
        pub context: usize { limits: within(1.0, 65536.0), unit: "tokens", example: "16" },
        /// Embedding dimension of the tokens.
        pub width: usize { limits: within(1.0, LARGEST_WIDTH as f64), example: "64" },
        /// Number of transformer blocks.
        pub depth: usize { limits: within(1.0, DEEPEST as f64), example: "2" },
        /// Number of attention heads; must divide `width`.
        pub heads: usize { limits: within(1.0, LARGEST_WIDTH as f64), example: "2" },
        /// Dimension of the joint image-text embedding.
        pub embedding: usize { limits: within(1.0, LARGEST_WIDTH as f64), example: "64" },
    }
    check { check_heads(table, width, heads) }
}

fn check_heads(table: &Table, width: Option<usize>, heads: Option<usize>) {
    if let (Some(width), Some(heads)) = (width, heads)
        && !width.is_multiple_of(heads)
    {
        table.problem(
            "heads",
            format!("heads = {heads} must divide width = {width}"),
        );
    }
}

/// Reports missing or conflicting sources of embeddings.
fn check_source(table: &Table) {
    let models = ["model", "from", "new"].map(|key| table.has(key));
    let count = models.iter().filter(|given| **given).count();
    let has_embeddings = table.has("embeddings");
    if count > 1 {
        table.problem("model", "set exactly one of `model`, `from` or `new`");
    }
    if count == 0 && !has_embeddings {
        let message = "text requires one of `model`, `from`, `new` or `embeddings`";
        table.problem("model", message);
    }
    if count == 0 && (table.has("classes") || table.has("templates")) {
        let message = "`classes` and `templates` require a text model: `model`, `from` or `new`";
        table.problem("classes", message);
    }
    if table.has("new") && has_embeddings {
        let message =
            "precomputed `embeddings` cannot be combined with a trainable (`new`) text model";
        table.problem("embeddings", message);
    }
}

fn check_templates(table: &Table, templates: &[String]) {
    if let Some(wrong) = templates.iter().find(|text| !text.contains("{}")) {
        let message = format!("the template `{wrong}` has no placeholder {{}} for the class");
        table.problem("templates", message);
    }
}

impl Text {
    /// Returns whether there is a text model, which can embed class names, rather than only caption embeddings.
    pub(super) fn has_model(&self) -> bool {
        self.model.is_some() || self.from.is_some() || self.new.is_some()
    }

    /// Replaces missing files with a tiny new text model, as synthetic images replace real ones.
    pub(super) fn rehearse(&mut self) {
        let missing = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| !path.exists());
        if missing(&self.classes) {
            self.classes = None;
        }
        if missing(&self.model) || missing(&self.embeddings) {
            let new = NewText {
                context: 32,
                width: 64,
                depth: 1,
                heads: 1,
                embedding: 64,
            };
            *self = Self {
                new: Some(new),
                ..Self::default()
            };
        }
    }
}
