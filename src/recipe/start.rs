//! The weights that a run starts from, and what becomes of the head.

use std::path::PathBuf;

use crate::settings::{Table, settings, words};

settings! {
    /// Weights that training starts from; random ones without the table. Their model must be that of the recipe.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Start(table) {
        /// Model folder, run or weight file.
        pub weights: PathBuf { example: "\"models/vit_b16\"" },
        /// Architecture of a weight file, by timm's name; pixels are then normalized as the recipe says.
        pub architecture: Option<String> { example: "\"vit_huge_patch14_224\"" },
        /// What becomes of the head of the weights.
        pub head: Head { example: "\"new\"" } [= Head::Keep],
    }
    check { check_head(table, head) }
}

words! {
    /// What becomes of the head when weights meet other images.
    pub enum Head {
        /// Keep it; other classes are an error.
        Keep = "keep",
        /// Initialize it at random for the classes of the images.
        New = "new",
        /// Build it from the class names, embedded by the text model of the stage before.
        Text = "text",
    }
}

fn check_head(table: &Table, head: Option<Head>) {
    if head == Some(Head::Text) {
        let message = "head = `text` needs a stage with captions before it";
        table.problem_with_hint("head", message, "use `keep` or `new`");
    }
}
