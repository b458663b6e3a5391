//! A figure of adversarial examples and accuracy over epsilon, as SVG: the picture of the README, which `advxl demo` draws.
//!
//! It computes nothing: predictions and accuracies come from an evaluation.

use std::fmt::Write;
use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use crate::error::{Error, Result};
use crate::image::picture::planes_to_bytes;

/// A test image, and the attack on it of each model.
pub struct Example {
    /// Pixels of the clean image in [0, 1], `[3, side, side]`.
    pub clean: Vec<f32>,
    /// Name of its class.
    pub class: String,
    /// One entry per model, in the order of [`Figure::curves`].
    pub attacked: Vec<Attacked>,
}

/// A model's adversarial image, and its answer.
pub struct Attacked {
    /// Pixels in [0, 1], `[3, side, side]`.
    pub adversarial: Vec<f32>,
    /// Name of the predicted class.
    pub prediction: String,
    /// Whether the prediction is the image's class.
    pub is_right: bool,
}

/// Accuracy of a model over epsilon.
pub struct Curve {
    /// Name of the model.
    pub model: String,
    /// Epsilon, in pixels of [0, 1], and accuracy; epsilon rises.
    pub points: Vec<(f64, f64)>,
}

/// Examples on the left, curves on the right.
pub struct Figure {
    /// One curve per model.
    pub curves: Vec<Curve>,
    /// Images, one row each.
    pub examples: Vec<Example>,
    /// Side of the images in pixels.
    pub side: usize,
    /// The attack on the examples, such as `PGD-20, linf 8/255`.
    pub attack: String,
    /// Factor by which perturbations are enlarged.
    pub gain: f32,
}

const CELL: usize = 106;
const GAP: usize = 10;
const TOP: usize = 58;
const ROW: usize = CELL + 28;
const CHART: (usize, usize) = (330, 250);
const COLORS: [&str; 2] = ["#c2410c", "#0f766e"];

impl Figure {
    /// Returns the figure as SVG with white ground, readable on light and dark pages.
    ///
    /// Errors: an image that does not have the stated side.
    pub fn to_svg(&self) -> Result<String> {
        let columns = 1 + 2 * self.curves.len();
        let left = GAP + columns * (CELL + GAP);
        let width = left + 70 + CHART.0 + 20;
        let height = (TOP + self.examples.len() * ROW + 8).max(TOP + CHART.1 + 60);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#1f2937\">\n\
             <rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"#ffffff\"/>\n"
        );
        self.examples_to(&mut svg)?;
        self.chart_to(&mut svg, left + 50);
        svg.push_str("</svg>\n");
        Ok(svg)
    }

    fn examples_to(&self, svg: &mut String) -> Result<()> {
        let x = |column: usize| GAP + column * (CELL + GAP);
        text(svg, x(0), 24, "clean image", "font-weight=\"bold\"");
        for (number, curve) in self.curves.iter().enumerate() {
            let at = x(1 + 2 * number);
            let title = format!("attack on the {} model", curve.model);
            text(svg, at, 24, &title, "font-weight=\"bold\"");
            let enlarged = format!("change x {}", self.gain);
            text(svg, at, 44, &enlarged, "fill=\"#6b7280\"");
            text(svg, x(2 + 2 * number), 44, "result", "fill=\"#6b7280\"");
        }
        text(svg, x(0), 44, &self.attack, "fill=\"#6b7280\"");
        for (row, example) in self.examples.iter().enumerate() {
            let y = TOP + row * ROW;
            self.image_to(svg, x(0), y, &example.clean)?;
            text(svg, x(0), y + CELL + 15, &example.class, "");
            for (number, attacked) in example.attacked.iter().enumerate() {
                let change = attacked.adversarial.iter().zip(&example.clean);
                let change: Vec<f32> = change
                    .map(|(after, before)| (0.5 + self.gain * (after - before)).clamp(0.0, 1.0))
                    .collect();
                self.image_to(svg, x(1 + 2 * number), y, &change)?;
                self.image_to(svg, x(2 + 2 * number), y, &attacked.adversarial)?;
                let (mark, color) = match attacked.is_right {
                    true => ("✓", COLORS[1]),
                    false => ("✗", COLORS[0]),
                };
                let answer = format!("{mark} {}", attacked.prediction);
                let style = format!("fill=\"{color}\" font-weight=\"bold\"");
                text(svg, x(2 + 2 * number), y + CELL + 15, &answer, &style);
            }
        }
        Ok(())
    }

    fn image_to(&self, svg: &mut String, x: usize, y: usize, planes: &[f32]) -> Result<()> {
        let side = self.side;
        if planes.len() != 3 * side * side {
            let message = format!(
                "a figure's image has {} values, expected 3 x {side} x {side}",
                planes.len()
            );
            return Err(Error::failed(message));
        }
        let mut png = Cursor::new(Vec::new());
        PngEncoder::new(&mut png)
            .write_image(
                &planes_to_bytes(planes),
                side as u32,
                side as u32,
                ExtendedColorType::Rgb8,
            )
            .map_err(|error| Error::failed(format!("cannot encode an image: {error}")))?;
        let data = STANDARD.encode(png.into_inner());
        writeln!(
            svg,
            "<image x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" style=\"image-rendering:pixelated\" \
             href=\"data:image/png;base64,{data}\"/>"
        )
        .expect("writes to a string succeed");
        Ok(())
    }

    /// Accuracy over epsilon, in units of 1/255, with one line per model.
    fn chart_to(&self, svg: &mut String, left: usize) {
        let (width, height) = (CHART.0 as f64, CHART.1 as f64);
        let (x0, y0) = (left as f64, TOP as f64);
        let epsilons = self.curves.iter().flat_map(|curve| &curve.points);
        let largest = epsilons
            .map(|(epsilon, _)| 255.0 * epsilon)
            .fold(1.0, f64::max);
        let place = |(epsilon, accuracy): (f64, f64)| {
            (
                x0 + width * 255.0 * epsilon / largest,
                y0 + height * (1.0 - accuracy),
            )
        };
        text(
            svg,
            left,
            24,
            "accuracy under attack",
            "font-weight=\"bold\"",
        );
        for percent in [0, 25, 50, 75, 100] {
            let (_, y) = place((0.0, f64::from(percent) / 100.0));
            line(svg, &format!("M{x0} {y:.1}h{width}"), "#e5e7eb", 1.0);
            let style = "fill=\"#6b7280\" text-anchor=\"end\"";
            text(
                svg,
                left - 6,
                y as usize + 4,
                &format!("{percent} %"),
                style,
            );
        }
        for step in 0..=4 {
            let units = largest * f64::from(step) / 4.0;
            let (x, y) = place((units / 255.0, 0.0));
            let style = "fill=\"#6b7280\" text-anchor=\"middle\"";
            text(
                svg,
                x as usize,
                y as usize + 18,
                &format!("{units:.0}"),
                style,
            );
        }
        let style = "fill=\"#6b7280\" text-anchor=\"middle\"";
        let (x, y) = place((largest / 510.0, 0.0));
        text(
            svg,
            x as usize,
            y as usize + 38,
            "epsilon (largest change of a pixel, in 1/255)",
            style,
        );
        for (number, curve) in self.curves.iter().enumerate() {
            let color = COLORS[number % COLORS.len()];
            let points: Vec<String> = curve
                .points
                .iter()
                .map(|point| place(*point))
                .map(|(x, y)| format!("{x:.1} {y:.1}"))
                .collect();
            line(svg, &format!("M{}", points.join("L")), color, 2.5);
            for (x, y) in curve.points.iter().map(|point| place(*point)) {
                writeln!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{color}\"/>"
                )
                .expect("writes to a string succeed");
            }
            let y = TOP + 16 + 18 * number;
            let style = format!("fill=\"{color}\" font-weight=\"bold\" text-anchor=\"end\"");
            text(
                svg,
                left + CHART.0 - 6,
                y,
                &format!("{} model", curve.model),
                &style,
            );
        }
    }
}

fn text(svg: &mut String, x: usize, y: usize, words: &str, style: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {style}>{words}</text>")
        .expect("writes to a string succeed");
}

fn line(svg: &mut String, path: &str, color: &str, width: f64) {
    writeln!(
        svg,
        "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\"/>"
    )
    .expect("writes to a string succeed");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(side: usize) -> Figure {
        let attacked = Attacked {
            adversarial: vec![0.75; 12],
            prediction: "a <b> & c".to_owned(),
            is_right: false,
        };
        Figure {
            curves: vec![Curve {
                model: "normal".to_owned(),
                points: vec![(0.0, 1.0), (8.0 / 255.0, 0.0)],
            }],
            examples: vec![Example {
                clean: vec![0.5; 12],
                class: "circle".to_owned(),
                attacked: vec![attacked],
            }],
            side,
            attack: "PGD-20".to_owned(),
            gain: 8.0,
        }
    }

    #[test]
    fn names_are_escaped_and_images_and_curves_are_drawn() {
        let svg = figure(2).to_svg().unwrap();
        assert!(svg.contains("✗ a &lt;b&gt; &amp; c"), "{svg}");
        assert_eq!(svg.matches("data:image/png;base64,iVBOR").count(), 3);
        // From the corner of the chart, accuracy 1 at epsilon 0, to its opposite.
        let (x, y) = (GAP + 3 * (CELL + GAP) + 50, TOP);
        let path = format!("M{x}.0 {y}.0L{}.0 {}.0", x + CHART.0, y + CHART.1);
        assert!(svg.contains(&path), "{path}: {svg}");
    }

    #[test]
    fn an_image_of_another_size_is_an_error() {
        let error = figure(3).to_svg().unwrap_err().to_string();
        assert!(error.contains("12 values, expected 3 x 3 x 3"), "{error}");
    }
}
