//! Folds the bias of a head into the bias of the norm before it.
//!
//! The head maps a normalized token `x` to `W (g x + c) + b`. With `d = W^T (W W^T)^-1 b`, which exists if the rows of
//! `W` are independent, `W (g x + c + d)` is the same function, up to rounding.

/// Largest error of the folded bias, relative to the outputs.
const TOLERANCE: f64 = 1e-5;

/// The weights of a model's last norm and of its head. `scale` and `shift` are those of the norm.
pub(crate) struct Last<'a> {
    pub(crate) scale: &'a [f32],
    pub(crate) shift: &'a [f32],
    /// Flat `[outputs, width]`.
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
}

/// Returns the bias of the norm that makes that of the head zero; `None` if the rows of the head's weight are (nearly)
/// dependent, so that rounding would change the outputs.
pub(crate) fn folded(last: &Last) -> Option<Vec<f32>> {
    let width = last.shift.len();
    let rows: Vec<&[f32]> = last.weight.chunks_exact(width.max(1)).collect();
    let bias: Vec<f64> = last.bias.iter().copied().map(f64::from).collect();
    if rows.len() > width {
        return None;
    }
    let factors = solve(&rows, &bias)?;
    let mut delta = vec![0.0f64; width];
    for (row, factor) in rows.iter().zip(&factors) {
        for (delta, value) in delta.iter_mut().zip(*row) {
            *delta += f64::from(*value) * factor;
        }
    }
    let pairs = last.shift.iter().zip(&delta);
    let shift: Vec<f32> = pairs
        .map(|(shift, delta)| (f64::from(*shift) + delta) as f32)
        .collect();
    let largest = bias
        .iter()
        .fold(0.0f64, |most, value| most.max(value.abs()));
    // A normalized token has unit variance, so the outputs are about this large.
    let spread = rows.iter().map(|row| {
        let products = row.iter().zip(last.scale);
        let squares = products.map(|(a, b)| (f64::from(*a) * f64::from(*b)).powi(2));
        squares.sum::<f64>().sqrt()
    });
    let size = spread.fold(largest, f64::max);
    let is_close = rows.iter().zip(&bias).all(|(row, bias)| {
        let added = row.iter().zip(shift.iter().zip(last.shift));
        let added = added
            .map(|(weight, (new, old))| f64::from(*weight) * (f64::from(*new) - f64::from(*old)));
        // In f32 a large norm bias also rounds the sum itself.
        let sizes = row.iter().zip(&shift);
        let sizes = sizes.map(|(weight, new)| f64::from(*weight * *new).powi(2));
        let rounding = f64::from(f32::EPSILON) * sizes.sum::<f64>().sqrt();
        (added.sum::<f64>() - bias).abs() + rounding <= TOLERANCE * size
    });
    is_close.then_some(shift)
}

/// Solves `W W^T y = b` by Cholesky's factorization; `None` if the matrix is not safely positive definite.
fn solve(rows: &[&[f32]], right: &[f64]) -> Option<Vec<f64>> {
    let count = rows.len();
    let product = |a: &[f32], b: &[f32]| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let mut lower = vec![vec![0.0f64; count]; count];
    let largest = rows
        .iter()
        .fold(0.0f64, |most, row| most.max(product(row, row)));
    for i in 0..count {
        for j in 0..=i {
            let (of_i, of_j) = (&lower[i][..j], &lower[j][..j]);
            let taken: f64 = of_i.iter().zip(of_j).map(|(a, b)| a * b).sum();
            let rest = product(rows[i], rows[j]) - taken;
            lower[i][j] = match i == j {
                true if rest > 1e-12 * largest => rest.sqrt(),
                true => return None,
                false => rest / lower[j][j],
            };
        }
    }
    let mut solution = right.to_vec();
    for i in 0..count {
        let taken: f64 = (0..i).map(|j| lower[i][j] * solution[j]).sum();
        solution[i] = (solution[i] - taken) / lower[i][i];
    }
    for i in (0..count).rev() {
        let taken: f64 = (i + 1..count).map(|j| lower[j][i] * solution[j]).sum();
        solution[i] = (solution[i] - taken) / lower[i][i];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folded_bias_gives_the_same_outputs() {
        let weight = [1.0, 2.0, 0.0, 0.5, 0.0, 1.0, -1.0, 3.0];
        let last = Last {
            scale: &[1.0; 4],
            shift: &[0.1, 0.2, -0.3, 0.4],
            weight: &weight,
            bias: &[0.7, -0.2],
        };
        let shift = folded(&last).unwrap();
        for (row, bias) in weight.chunks_exact(4).zip(last.bias) {
            let apply = |shift: &[f32]| row.iter().zip(shift).map(|(a, b)| a * b).sum::<f32>();
            assert!((apply(&shift) - apply(last.shift) - bias).abs() < 1e-6);
        }
    }

    #[test]
    fn a_bias_outside_the_span_of_the_head_is_not_folded() {
        let of = |weight: &[f32], bias: &[f32]| {
            folded(&Last {
                scale: &[1.0; 2],
                shift: &[0.0; 2],
                weight,
                bias,
            })
        };
        // Dependent rows; more rows than columns.
        assert_eq!(of(&[1.0, 2.0, 2.0, 4.0], &[1.0, 0.0]), None);
        assert_eq!(of(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], &[1.0; 3]), None);
        assert_eq!(of(&[0.0; 4], &[1.0, 0.0]), None);
    }
}
