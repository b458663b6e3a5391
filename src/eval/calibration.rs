//! Calibration of a model and the distribution of its margins, from what an evaluation has seen anyway.

use serde::Serialize;

use super::accuracy::Outcome;

/// Number of bins of the expected calibration error, as in Guo et al. 2017.
pub const BINS: usize = 15;

/// Number of bins of the margin histogram.
pub const MARGIN_BINS: usize = 20;

/// Expected calibration errors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// Of the clean images.
    pub ece_clean: Option<f64>,
    /// Of the final images: the adversarial image where the model was fooled, else the clean one.
    pub ece_attacked: Option<f64>,
    /// Number of bins.
    pub bins: usize,
}

/// A histogram of margins.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// Edges of the bins, of equal width, from the smallest to the largest margin.
    pub edges: Vec<f64>,
    /// Images in each bin; the last includes its upper edge.
    pub counts: Vec<usize>,
}

impl Calibration {
    /// Returns the calibration of a finished evaluation. An error is None if an image has no finite confidence.
    pub fn of(outcome: &Outcome) -> Self {
        let broken = |index: &usize| outcome.broken_by[*index].as_deref();
        let error = |confidence: &[Option<f64>], is_right: &dyn Fn(usize) -> bool| {
            let pairs = confidence.iter().enumerate();
            let pairs: Option<Vec<(f64, bool)>> = pairs
                .map(|(index, confidence)| Some(((*confidence)?, is_right(index))))
                .collect();
            expected_calibration_error(&pairs?)
        };
        Self {
            ece_clean: error(&outcome.clean_confidence, &|index| {
                broken(&index) != Some("clean")
            }),
            ece_attacked: error(&outcome.confidence, &|index| outcome.robust[index]),
            bins: BINS,
        }
    }
}

/// Returns the expected calibration error: the mean over images of the difference between accuracy and mean confidence
/// in the image's bin of confidence. `pairs` are confidences and whether the prediction was right; None without images.
///
/// Source: Guo et al. 2017, equation 3; bins of equal width, which include their upper edge.
pub fn expected_calibration_error(pairs: &[(f64, bool)]) -> Option<f64> {
    let mut sums = [(0.0, 0.0); BINS];
    for (confidence, is_right) in pairs {
        let bin = (confidence * BINS as f64).ceil().max(1.0) as usize - 1;
        let (confidences, right) = &mut sums[bin.min(BINS - 1)];
        *confidences += confidence;
        *right += f64::from(u8::from(*is_right));
    }
    let differences = sums
        .iter()
        .map(|(confidences, right)| (right - confidences).abs());
    (!pairs.is_empty()).then(|| differences.sum::<f64>() / pairs.len() as f64)
}

/// Returns the histogram of the finite margins; None if there are none.
pub fn margin_histogram(outcome: &Outcome) -> Option<Histogram> {
    let margins: Vec<f64> = outcome.margin.iter().copied().flatten().collect();
    let low = margins.iter().copied().reduce(f64::min)?;
    let high = margins.iter().copied().reduce(f64::max)?;
    let width = (high - low) / MARGIN_BINS as f64;
    let mut counts = vec![0; MARGIN_BINS];
    for margin in margins {
        let bin = ((margin - low) / width).floor();
        // Equal margins have bins of width 0.
        let bin = if bin.is_finite() { bin as usize } else { 0 };
        counts[bin.min(MARGIN_BINS - 1)] += 1;
    }
    let edge = |bin| low + width * bin as f64;
    Some(Histogram {
        edges: (0..=MARGIN_BINS).map(edge).collect(),
        counts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calibration_error_is_the_mean_gap_of_the_bins() {
        // One bin: three of four right at a confidence of 0.95; another: none of one at 0.4.
        let pairs = [
            (0.95, true),
            (0.95, true),
            (0.95, true),
            (0.95, false),
            (0.4, false),
        ];
        let error = expected_calibration_error(&pairs).unwrap();
        assert!((error - (4.0 * 0.2 + 0.4) / 5.0).abs() < 1e-12, "{error}");
        assert_eq!(expected_calibration_error(&[(1.0, true)]), Some(0.0));
        assert_eq!(expected_calibration_error(&[]), None);
    }

    #[test]
    fn every_finite_margin_is_in_a_bin() {
        let of = |margin: Vec<Option<f64>>| {
            margin_histogram(&Outcome {
                margin,
                ..Outcome::default()
            })
        };
        let found = of(vec![Some(-1.0), Some(1.0), None, Some(0.95)]).unwrap();
        assert_eq!((found.edges[0], found.edges[MARGIN_BINS]), (-1.0, 1.0));
        assert_eq!((found.counts[0], found.counts[MARGIN_BINS - 1]), (1, 2));
        assert_eq!(of(vec![Some(2.0); 3]).unwrap().counts[0], 3);
        assert_eq!(of(vec![None]), None);
    }
}
