//! A table of results as text, Markdown, LaTeX, CSV and JSON.

use std::path::Path;

use serde_json::{Value, json};

use super::cells::{Cell, Plan, source_of};
use super::protocol::{Layout, Protocol, TableModel};
use crate::error::{Error, Result};
use crate::eval::interval::wilson;

/// A number with its 95 % interval, all in percent.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// The value.
    pub value: f64,
    /// Its 95 % interval.
    pub interval: (f64, f64),
    /// Paths of the results it was computed from, relative to the table.
    pub results: Vec<String>,
}

/// A row: its names, and a number for each column that has results.
#[derive(Clone, Debug)]
pub struct Row {
    /// The model, and the evaluation where rows have one.
    pub names: Vec<String>,
    /// The numbers.
    pub numbers: Vec<Option<Number>>,
}

/// A table of results.
#[derive(Clone, Debug)]
pub struct Table {
    /// The title.
    pub title: String,
    /// Digits after the decimal point.
    decimals: usize,
    /// The names of the columns, those of a row's names first.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Notes below the table.
    pub notes: Vec<String>,
}

/// The results of a plan's cells so far. Each is read once, without its lists of images: those of ImageNet-C are
/// hundreds of megabytes.
pub struct Results<'a> {
    plan: &'a Plan,
    /// Folder of the table.
    out: &'a Path,
    found: Vec<Option<Finished<'a>>>,
}

/// A finished cell.
struct Finished<'a> {
    cell: &'a Cell,
    result: Value,
    /// What says which images it was computed on.
    images: String,
    /// Path of the result, relative to the table.
    path: String,
}

/// Long parts of `result.json` that no table prints.
const LISTS: [&str; 7] = [
    "robust",
    "broken_by",
    "distance",
    "margin",
    "predicted",
    "subset",
    "data_classes",
];

impl<'a> Results<'a> {
    /// Returns the results of a plan, none of which is read yet.
    pub fn new(plan: &'a Plan, out: &'a Path) -> Self {
        let found = plan.cells.iter().map(|_| None).collect();
        Self { plan, out, found }
    }

    /// Returns whether a cell has finished, and reads its result when it has.
    ///
    /// Errors: a file that cannot be read.
    pub fn has(&mut self, index: usize) -> Result<bool> {
        let cell = &self.plan.cells[index];
        if self.found[index].is_none()
            && let Some(mut result) = cell.finished()?
        {
            let path = cell.result();
            let path = path.strip_prefix(self.out).unwrap_or(&path);
            let subset = &result["subset"];
            let images = json!([
                result["data_hash"],
                result["images"],
                subset["rule"],
                subset["ids"],
                result["seed"]
            ]);
            let images = blake3::hash(images.to_string().as_bytes()).to_string();
            forget_lists(&mut result);
            self.found[index] = Some(Finished {
                cell,
                result,
                images,
                path: path.display().to_string(),
            });
        }
        Ok(self.found[index].is_some())
    }

    /// Reads the results of all finished cells, and counts the others.
    pub fn unfinished(&mut self) -> Result<usize> {
        let mut count = 0;
        for index in 0..self.plan.cells.len() {
            count += usize::from(!self.has(index)?);
        }
        Ok(count)
    }
}

fn forget_lists(result: &mut Value) {
    if let Value::Object(fields) = result {
        LISTS.iter().for_each(|list| {
            fields.remove(*list);
        });
        if let Some(Value::Array(evaluations)) = fields.get_mut("evaluations") {
            evaluations.iter_mut().for_each(forget_lists);
        }
    }
}

impl Table {
    /// Makes the table of the results that have been read.
    ///
    /// Errors: cells of one column that were computed on different images.
    pub fn new(protocol: &Protocol, models: &[TableModel], results: &Results) -> Result<Self> {
        let finished: Vec<&Finished> = results.found.iter().flatten().collect();
        check_images(&finished)?;
        check_sizes(&finished)?;
        let of = Cells {
            protocol,
            plan: results.plan,
            finished: &finished,
        };
        let (columns, rows) = match protocol.layout {
            Layout::Data => of.by_data(models),
            Layout::Models => of.by_model(models),
            Layout::Transfer => of.by_target(models),
        };
        Ok(Self {
            title: protocol.title.clone(),
            decimals: protocol.decimals as usize,
            columns,
            rows,
            notes: of.notes(models),
        })
    }

    fn text_of(&self, number: &Number) -> [String; 2] {
        let (low, high) = number.interval;
        let digits = self.decimals;
        [
            format!("{:.digits$}", number.value),
            format!("{:.digits$}", (high - low) / 2.0),
        ]
    }

    /// Returns the text of all cells, with a function for numbers.
    fn grid(&self, number: impl Fn(&Number) -> String, none: &str) -> Vec<Vec<String>> {
        let rows = self.rows.iter().map(|row| {
            let numbers = row.numbers.iter();
            let numbers = numbers.map(|found| found.as_ref().map_or(none.to_owned(), &number));
            row.names.iter().cloned().chain(numbers).collect()
        });
        rows.collect()
    }

    /// Returns the table for a terminal.
    pub fn to_text(&self) -> String {
        let grid = self.grid(
            |number| {
                let [value, half] = self.text_of(number);
                format!("{value} ±{half}")
            },
            "-",
        );
        let all: Vec<&Vec<String>> = std::iter::once(&self.columns).chain(&grid).collect();
        let width = |column: usize| {
            let lengths = all.iter().map(|row| row[column].chars().count());
            lengths.max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let names = self.columns.len() - self.rows.first().map_or(0, |row| row.numbers.len());
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(column, (text, width))| match column < names {
                true => format!("{text:<width$}"),
                false => format!("{text:>width$}"),
            });
            let cells: Vec<String> = cells.collect();
            cells.join("  ").trim_end().to_owned()
        };
        let mut lines = vec![self.title.clone(), String::new()];
        lines.extend(all.into_iter().map(line));
        lines.push(String::new());
        lines.extend(self.notes.iter().cloned());
        lines.join("\n") + "\n"
    }

    /// Returns the table as Markdown; numbers link to their results.
    pub fn to_markdown(&self) -> String {
        let escaped = |text: &str| text.replace('|', "\\|");
        let grid = self.grid(
            |number| {
                let [value, half] = self.text_of(number);
                match &number.results[..] {
                    [path] => format!("[{value}]({}) ± {half}", path.replace(' ', "%20")),
                    _ => format!("{value} ± {half}"),
                }
            },
            "–",
        );
        let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let header: Vec<String> = self.columns.iter().map(|name| escaped(name)).collect();
        let mut lines = vec![format!("## {}", self.title), String::new()];
        lines.push(line(&header));
        lines.push(line(&vec!["---".to_owned(); header.len()]));
        for row in grid {
            let cells: Vec<String> = row.iter().map(|text| escaped(text)).collect();
            lines.push(line(&cells));
        }
        lines.push(String::new());
        for note in &self.notes {
            lines.extend([note.clone(), String::new()]);
        }
        lines.join("\n")
    }

    /// Returns the table as LaTeX, for the package booktabs.
    pub fn to_latex(&self) -> String {
        let grid = self.grid(
            |number| {
                let [value, half] = self.text_of(number);
                format!("{value} {{\\scriptsize $\\pm$ {half}}}")
            },
            "--",
        );
        let names = self.rows.first().map_or(1, |row| row.names.len());
        let numbers = self.columns.len() - names;
        let line = |cells: Vec<String>| format!("{} \\\\", cells.join(" & "));
        let header = self.columns.iter().map(|name| latex(name)).collect();
        let mut lines = vec![format!("% {}", self.title)];
        lines.extend(self.notes.iter().map(|note| format!("% {note}")));
        let columns = ["l".repeat(names), "r".repeat(numbers)].concat();
        lines.push(format!("\\begin{{tabular}}{{{columns}}}"));
        lines.extend(["\\toprule".to_owned(), line(header), "\\midrule".to_owned()]);
        for (row, cells) in self.rows.iter().zip(grid) {
            let names = row.names.iter().map(|name| latex(name));
            let numbers = cells.into_iter().skip(row.names.len());
            lines.push(line(names.chain(numbers).collect()));
        }
        lines.extend(["\\bottomrule", "\\end{tabular}"].map(str::to_owned));
        lines.join("\n") + "\n"
    }

    /// Returns the table as CSV: a line for each number, with its interval.
    pub fn to_csv(&self) -> String {
        let quoted = |text: &str| match text.contains([',', '"', '\n']) {
            true => format!("\"{}\"", text.replace('"', "\"\"")),
            false => text.to_owned(),
        };
        let names = self.rows.first().map_or(1, |row| row.names.len());
        let header: Vec<String> = self.columns[..names]
            .iter()
            .map(|name| quoted(name))
            .collect();
        let mut lines = vec![format!(
            "{},column,value,low,high,results",
            header.join(",")
        )];
        for row in &self.rows {
            for (column, number) in self.columns[names..].iter().zip(&row.numbers) {
                let Some(number) = number else { continue };
                let mut cells: Vec<String> = row.names.iter().map(|name| quoted(name)).collect();
                let (low, high) = number.interval;
                cells.push(quoted(column));
                cells.extend([number.value, low, high].map(|value| format!("{value:.4}")));
                cells.push(quoted(&number.results.join(";")));
                lines.push(cells.join(","));
            }
        }
        lines.join("\n") + "\n"
    }

    /// Returns the table as JSON.
    pub fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let numbers = row.numbers.iter().map(|number| match number {
                None => Value::Null,
                Some(number) => json!({
                    "value": number.value,
                    "interval_95": [number.interval.0, number.interval.1],
                    "results": number.results,
                }),
            });
            json!({ "names": row.names, "numbers": numbers.collect::<Vec<_>>() })
        });
        json!({
            "title": self.title,
            "columns": self.columns,
            "rows": rows.collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// Escapes text for LaTeX.
fn latex(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        if "&%$#_{}".contains(letter) {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

/// Compares what the cells of a data set were computed on.
fn check_images(finished: &[&Finished]) -> Result<()> {
    for (index, one) in finished.iter().enumerate() {
        let is_same = |other: &&&Finished| {
            let spec = |cell: &Cell| {
                let at = cell.arguments.iter().position(|flag| flag == "--data");
                at.map(|at| cell.arguments[at + 1].clone())
            };
            other.cell.data == one.cell.data && spec(other.cell) == spec(one.cell)
        };
        let Some(first) = finished[..index].iter().find(is_same) else {
            continue;
        };
        if first.images != one.images {
            let message = format!(
                "`{}` and `{}` were computed on different images",
                first.path, one.path
            );
            let hint = "the data set has changed: remove the folders of the older results and run the same command again";
            return Err(Error::input(message).hint(hint));
        }
    }
    Ok(())
}

/// Refuses transfers between image sizes: resizing would change the perturbations.
fn check_sizes(finished: &[&Finished]) -> Result<()> {
    for found in finished.iter().filter(|found| found.cell.target.is_some()) {
        let is_source = |other: &&&Finished| {
            other.cell.target.is_none() && other.cell.model == found.cell.model
        };
        let Some(source) = finished.iter().find(is_source) else {
            continue;
        };
        let [from, to] = [source, found].map(|found| found.result["image_size"].clone());
        if from != to {
            let message = format!(
                "`{}`: the adversarial images have {from} pixels, the model {to}",
                found.path
            );
            return Err(Error::input(message).hint(
                "compare models of one image size, or set --image-size in their `arguments`",
            ));
        }
    }
    Ok(())
}

/// The finished cells of a table.
struct Cells<'a> {
    protocol: &'a Protocol,
    plan: &'a Plan,
    finished: &'a [&'a Finished<'a>],
}

impl Cells<'_> {
    /// Returns the data sets that the user has.
    fn sets(&self) -> impl Iterator<Item = usize> {
        let is_missing = |data: &usize| self.plan.missing.contains_key(data);
        (0..self.protocol.data.len()).filter(move |data| !is_missing(data))
    }

    fn names(&self) -> Vec<String> {
        let names = self
            .sets()
            .map(|data| self.protocol.data[data].name.clone());
        names.collect()
    }

    fn has_mean(&self) -> bool {
        self.protocol.mean && self.sets().count() > 1
    }

    fn has_corruption_error(&self) -> bool {
        let mut sets = self.sets();
        sets.any(|data| self.protocol.data[data].baseline_error.is_some())
    }

    /// Returns the columns and rows of a table with a column for each data set.
    fn by_data(&self, models: &[TableModel]) -> (Vec<String>, Vec<Row>) {
        let mut columns = vec!["model".to_owned(), "evaluation".to_owned()];
        columns.extend(self.names());
        columns.extend(self.has_mean().then(|| "mean".to_owned()));
        let mut rows = Vec::new();
        for (evaluation, wanted) in self.protocol.evaluation.iter().enumerate() {
            rows.extend(models.iter().enumerate().map(|(model, named)| Row {
                names: vec![named.name.clone(), wanted.name.clone()],
                numbers: self.of_evaluation(model, evaluation),
            }));
        }
        (columns, rows)
    }

    /// Returns the columns and rows of a table with a row for each model.
    fn by_model(&self, models: &[TableModel]) -> (Vec<String>, Vec<Row>) {
        let (evaluations, sets) = (&self.protocol.evaluation, self.names());
        let mut columns = vec!["model".to_owned()];
        for evaluation in evaluations {
            let title = |set: &str| match (sets.len(), evaluations.len()) {
                (1, _) => evaluation.name.clone(),
                (_, 1) => set.to_owned(),
                (..) => format!("{set}, {}", evaluation.name),
            };
            columns.extend(sets.iter().map(|set| title(set)));
            columns.extend(self.has_mean().then(|| title("mean")));
        }
        let has_corruption_error = self.has_corruption_error();
        columns.extend(has_corruption_error.then(|| "mCE".to_owned()));
        let rows = models.iter().enumerate().map(|(model, named)| {
            let of_one = |evaluation| self.of_evaluation(model, evaluation);
            let mut numbers: Vec<_> = (0..evaluations.len()).flat_map(of_one).collect();
            if has_corruption_error {
                numbers.push(self.corruption_error(model));
            }
            Row {
                names: vec![named.name.clone()],
                numbers,
            }
        });
        (columns, rows.collect())
    }

    /// Returns the matrix of a table of transfers.
    fn by_target(&self, models: &[TableModel]) -> (Vec<String>, Vec<Row>) {
        let mut columns = vec!["adversarial images of".to_owned()];
        columns.extend(models.iter().map(|model| model.name.clone()));
        let rows = models.iter().enumerate().map(|(model, named)| {
            let number = |target| {
                let is_wanted = |found: &&&Finished| {
                    (found.cell.model, found.cell.target) == (model, Some(target))
                };
                let found = self.finished.iter().find(is_wanted)?;
                of_stage(found, true)
            };
            Row {
                names: vec![named.name.clone()],
                numbers: (0..models.len()).map(number).collect(),
            }
        });
        (columns, rows.collect())
    }

    fn notes(&self, models: &[TableModel]) -> Vec<String> {
        let mut notes = vec!["Accuracies in percent; ± half of the 95 % interval.".to_owned()];
        let source = self.protocol.source.iter();
        notes.extend(source.map(|source| format!("Protocol: {source}")));
        let (count, all) = (self.sets().count(), self.protocol.data.len());
        if count < all && (self.has_mean() || self.has_corruption_error()) {
            notes.push(format!(
                "Means are over {count} of the protocol's {all} data sets."
            ));
        }
        if self.has_corruption_error() {
            notes.push("mCE: mean error relative to AlexNet's; lower is better.".to_owned());
        }
        notes.extend(models.iter().filter_map(|model| {
            let reported = model.reported.as_ref()?;
            Some(format!("{}: its source reports {reported}", model.name))
        }));
        let missing = self.plan.missing.values();
        notes.extend(missing.map(|text| format!("missing data set {text}")));
        notes
    }

    /// Returns the numbers of a model and an evaluation, one for each data set, and their mean.
    fn of_evaluation(&self, model: usize, evaluation: usize) -> Vec<Option<Number>> {
        let numbers = self.sets().map(|data| self.number(model, data, evaluation));
        let mut numbers: Vec<_> = numbers.collect();
        if self.has_mean() {
            let all: Option<Vec<Number>> = numbers.iter().cloned().collect();
            let same = self.protocol.same_images;
            numbers.push(all.and_then(|all| mean_of(&all, same)));
        }
        numbers
    }

    /// Returns the accuracy of a model on a data set, the mean over its severities, if all of them are finished.
    fn number(&self, model: usize, data: usize, evaluation: usize) -> Option<Number> {
        let source = source_of(self.protocol, evaluation);
        let is_attacked = self.protocol.evaluation[evaluation].is_attacked();
        let is_wanted =
            |cell: &Cell| (cell.model, cell.data, cell.evaluation) == (model, data, source);
        let parts = self.finished.iter().filter(|found| is_wanted(found.cell));
        let numbers: Vec<Number> = parts
            .filter_map(|found| of_stage(found, is_attacked))
            .collect();
        let wanted = self
            .plan
            .cells
            .iter()
            .filter(|cell| is_wanted(cell))
            .count();
        match &numbers[..] {
            [] => None,
            [only] if wanted == 1 => Some(only.clone()),
            all if all.len() == wanted => mean_of(all, true),
            _ => None,
        }
    }

    /// Returns the mean corruption error (Hendrycks and Dietterich 2019) in percent: the errors of a model over those of
    /// the baseline, averaged over the data sets that have one.
    fn corruption_error(&self, model: usize) -> Option<Number> {
        let evaluation = self
            .protocol
            .evaluation
            .iter()
            .position(|one| !one.is_attacked())?;
        let mut parts = Vec::new();
        for data in self.sets() {
            let Some(baseline) = self.protocol.data[data].baseline_error else {
                continue;
            };
            let accuracy = self.number(model, data, evaluation)?;
            let error = |value: f64| (100.0 - value) / baseline;
            let (low, high) = accuracy.interval;
            parts.push(Number {
                value: error(accuracy.value),
                interval: (error(high), error(low)),
                results: accuracy.results,
            });
        }
        mean_of(&parts, self.protocol.same_images)
    }
}

/// Returns the robust accuracy of a cell, or its clean accuracy. Of several norms it is that in all of them; of all unseen
/// attacks their mean, UA2.
fn of_stage(found: &Finished, is_last: bool) -> Option<Number> {
    let result = &found.result;
    let real = &result["real_labels"];
    let images = match real["images"].as_u64() {
        Some(labeled) => labeled as usize,
        None => result["images"].as_u64()? as usize,
    };
    let number = |count: usize| {
        let (low, high) = wilson(count, images);
        Number {
            value: 100.0 * count as f64 / images as f64,
            interval: (100.0 * low, 100.0 * high),
            results: vec![found.path.clone()],
        }
    };
    let at_stage = |evaluation: &Value| {
        let stages = evaluation["stages"].as_array()?;
        let stage = if is_last {
            stages.last()
        } else {
            stages.first()
        }?;
        Some(number(stage["robust_count"].as_u64()? as usize))
    };
    if let Some(right) = real["right"].as_u64() {
        return Some(number(right as usize));
    }
    let Some(evaluations) = result["evaluations"].as_array() else {
        return at_stage(result);
    };
    if !is_last {
        return at_stage(evaluations.first()?);
    }
    if result["ua2"].is_number() {
        let all: Option<Vec<Number>> = evaluations.iter().map(at_stage).collect();
        return mean_of(&all?, true).map(|mean| Number {
            results: vec![found.path.clone()],
            ..mean
        });
    }
    let share = result["robust_accuracy"].as_f64()?;
    Some(number((share * images as f64).round() as usize))
}

/// Returns the mean of numbers. Half the width of its interval is the root of the sum of their squares over the count, or
/// if they are of the same images, which may all be right or wrong together, the mean half.
fn mean_of(numbers: &[Number], same_images: bool) -> Option<Number> {
    let count = numbers.len() as f64;
    let value = numbers.iter().map(|number| number.value).sum::<f64>() / count;
    let halves = numbers
        .iter()
        .map(|number| (number.interval.1 - number.interval.0) / 2.0);
    let spread = match same_images {
        true => halves.sum::<f64>() / count,
        false => halves.map(|half| half * half).sum::<f64>().sqrt() / count,
    };
    (!numbers.is_empty()).then(|| Number {
        value,
        interval: (value - spread, value + spread),
        results: numbers
            .iter()
            .flat_map(|number| number.results.clone())
            .collect(),
    })
}
