//! Results as Hugging Face reads them: YAML files in the folder `.eval_results` of a model repository.
//!
//! Source: <https://huggingface.co/docs/hub/eval-results>. A file for each number, since a benchmark may have several.

use serde_json::Value;

use crate::units::grouped;

/// The benchmark that results belong to.
#[derive(Clone, Debug)]
pub struct Benchmark {
    /// Id of the data set on the Hub, registered as a benchmark.
    pub dataset: String,
    /// Id of the task in the benchmark's `eval.yaml`.
    pub task: String,
    /// Link to attribute the results to.
    pub source: Option<String>,
}

/// Returns the files of a `result.json`: clean accuracy and the robust accuracy of each norm, by file name. Values are in
/// percent.
pub fn files(benchmark: &Benchmark, result: &Value) -> Vec<(String, String)> {
    let single = std::slice::from_ref(result);
    let evaluations = result["evaluations"]
        .as_array()
        .map_or(single, Vec::as_slice);
    let mut files: Vec<(String, String)> = Vec::new();
    for evaluation in evaluations {
        let stages = evaluation["stages"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let images = grouped(result["images"].as_u64().unwrap_or_default());
        let entry = |accuracy: &Value, notes: String| {
            let quoted = |text: &str| Value::from(text).to_string();
            let mut lines = vec![
                "- dataset:".to_owned(),
                format!("    id: {}", quoted(&benchmark.dataset)),
                format!("    task_id: {}", quoted(&benchmark.task)),
                format!(
                    "  value: {:.2}",
                    100.0 * accuracy.as_f64().unwrap_or(f64::NAN)
                ),
            ];
            if let Some(source) = &benchmark.source {
                lines.extend([
                    "  source:".to_owned(),
                    format!("    url: {}", quoted(source)),
                ]);
            }
            lines.push(format!("  notes: {}", quoted(&notes)));
            lines.join("\n") + "\n"
        };
        let [clean, attacks @ ..] = stages else {
            continue;
        };
        let about_clean = format!("clean accuracy on {images} images");
        if files.is_empty() {
            let text = entry(&clean["robust_accuracy"], about_clean);
            files.push(("clean.yaml".to_owned(), text));
        }
        let Some(last) = attacks.last() else { continue };
        let names: Vec<&str> = attacks
            .iter()
            .filter_map(|stage| stage["attack"].as_str())
            .collect();
        let names = names.join(", ");
        let (threat, file) = match (evaluation["norm"].as_str(), evaluation["epsilon"].as_str()) {
            (Some(norm), Some(epsilon)) => {
                (format!(" in {norm} {epsilon}"), format!("{norm}_{epsilon}"))
            }
            // Unseen attacks have no norm.
            _ => (String::new(), names.clone()),
        };
        let notes = format!("robust accuracy under {names}{threat} on {images} images");
        let name = format!("robust_{}.yaml", file.replace(['/', '.', ',', ' '], "_"));
        files.push((name, entry(&last["robust_accuracy"], notes)));
    }
    files
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_number_has_a_file_with_its_conditions() {
        let stage = |attack, accuracy| json!({ "attack": attack, "robust_accuracy": accuracy });
        let result = json!({
            "images": 5000, "norm": "linf", "epsilon": "4/255",
            "stages": [stage("clean", 0.72561), stage("apgd-ce", 0.5), stage("apgd-t", 0.4808)],
        });
        let benchmark = Benchmark {
            dataset: "org/robust: images".into(),
            task: "default".into(),
            source: Some("https://example.org".into()),
        };
        let files = files(&benchmark, &result);
        let names: Vec<&str> = files.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, ["clean.yaml", "robust_linf_4_255.yaml"]);
        assert_eq!(
            files[1].1,
            "- dataset:\n    id: \"org/robust: images\"\n    task_id: \"default\"\n  value: 48.08\n  source:\n    url: \
             \"https://example.org\"\n  notes: \"robust accuracy under apgd-ce, apgd-t in linf 4/255 on 5,000 images\"\n"
        );
        assert!(files[0].1.contains("value: 72.56\n"));
    }
}
