//! Text models and embeddings for training with captions.

use std::path::PathBuf;

use crate::model::config::common::{DEEPEST, LARGEST_WIDTH};
use crate::settings::{Table, settings};

settings! {
    /// Embeddings of the captions: from a frozen text model, from a new one that is trained with the images, or from a file. Exactly one of `model`, `from` and `new`, or `embeddings`, is needed.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct Text(table) {
        /// Folder of a frozen text model.
        pub model: Option<PathBuf> { example: "\"models/ViT-L-16-CLIPA\"" },
        /// Earlier stage whose `new` text model is used, frozen.
        pub from: Option<String> { example: "\"clip\"" },
        /// New text model that is trained in this stage.
        pub new: Option<NewText> {},
        /// File of embeddings by `advxl embed`, in place of computing them.
        pub embeddings: Option<PathBuf> { example: "\"captions.safetensors\"" },
        /// File with the names of the test images' classes, one a line, for zero-shot evaluation; the names of the data set without it.
        pub classes: Option<PathBuf> { example: "\"data/imagenet_classes.txt\"" },
        /// Prompts with `{}` in place of the class; the bare names if there are none.
        pub templates: Vec<String> { omit_default: true, example: "[\"a photo of a {}\"]" } [= Vec::new()],
    }
    check {
        check_source(table);
        check_templates(table, templates.as_deref().unwrap_or_default());
    }
}

settings! {
    /// A text model to be trained, of CLIPA's architecture; its vocabulary is built from the words of the training captions.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct NewText(table) {
        /// Length of a caption in tokens.
        pub context: usize { limits: within(1.0, 65536.0), unit: "tokens", example: "16" },
        /// Width of the tokens.
        pub width: usize { limits: within(1.0, LARGEST_WIDTH as f64), example: "64" },
        /// Number of blocks.
        pub depth: usize { limits: within(1.0, DEEPEST as f64), example: "2" },
        /// Attention heads; they divide the width.
        pub heads: usize { limits: within(1.0, LARGEST_WIDTH as f64), example: "2" },
        /// Dimensions of an embedding.
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
            format!("heads = {heads} do not divide width = {width}"),
        );
    }
}

/// Captions have one source, and class names are embedded by a text model.
fn check_source(table: &Table) {
    let models = ["model", "from", "new"].map(|key| table.has(key));
    let count = models.iter().filter(|given| **given).count();
    let has_embeddings = table.has("embeddings");
    if count > 1 {
        table.problem("model", "set exactly one of `model`, `from` or `new`");
    }
    if count == 0 && !has_embeddings {
        let message =
            "text needs a `model`, a stage to take it `from`, a `new` one, or `embeddings`";
        table.problem("model", message);
    }
    if count == 0 && (table.has("classes") || table.has("templates")) {
        let message = "classes and templates are embedded by a text model, and text has none";
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
        let message = format!("the template `{wrong}` has no {{}} for the class");
        table.problem("templates", message);
    }
}

impl Text {
    /// Whether there is a text model, which embeds class names, rather than embeddings of captions alone.
    pub(super) fn has_model(&self) -> bool {
        self.model.is_some() || self.from.is_some() || self.new.is_some()
    }

    /// Replaces missing files by a tiny new text model, as synthetic images replace real ones.
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
