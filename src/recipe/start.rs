//! The weights that a run starts from, and the handling of the head.

use std::path::PathBuf;

use crate::settings::{Table, settings, words};

settings! {
    /// Weights to start from; random initialization if the table is omitted. Their architecture must match the recipe's
    /// `model`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Start(table) {
        /// Model folder, run folder or weights file.
        pub weights: PathBuf { example: "\"models/vit_b16\"" },
        /// timm name of a weights file's architecture. Pixels are normalized as the recipe's `model` says if the file
        /// does not contain a mean and standard deviation.
        pub architecture: Option<String> { example: "\"vit_huge_patch14_224\"" },
        /// What to do with the head of the loaded weights.
        pub head: Head { example: "\"new\"" } [= Head::Keep],
    }
    check { check_head(table, head) }
}

words! {
    /// What to do with the head when weights are loaded or a stage begins.
    pub enum Head {
        /// Keep it. The classes must be the same.
        Keep = "keep",
        /// Initialize a new head at random for the classes of the images.
        New = "new",
        /// Build it from the class names, embedded by the text model of the previous stage.
        Text = "text",
    }
}

fn check_head(table: &Table, head: Option<Head>) {
    if head == Some(Head::Text) {
        let message =
            "start.head = `text` is invalid: there is no previous stage with a text model";
        table.problem_with_hint("head", message, "use `keep` or `new`");
    }
}
