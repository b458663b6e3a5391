//! Distances between rows on the software GPU against definitions in f64.

mod support;

use advxl_cuda::{RowDistance, Values, row_distances, row_distances_gradient};
use support::{assert_near, host, in_any_order, numbers};

const KINDS: [RowDistance; 4] = [RowDistance::SquaredL2, RowDistance::L2, RowDistance::Cosine, RowDistance::Kl];

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn log_softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::MIN, f64::max);
    let log_sum = most + x.iter().map(|v| (v - most).exp()).sum::<f64>().ln();
    x.iter().map(|v| v - log_sum).collect()
}

fn distance(kind: RowDistance, x: &[f64], y: &[f64]) -> f64 {
    let difference: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
    match kind {
        RowDistance::SquaredL2 => dot(&difference, &difference),
        RowDistance::L2 => dot(&difference, &difference).sqrt(),
        RowDistance::Cosine => -dot(x, y) / (dot(x, x) * dot(y, y)).sqrt(),
        RowDistance::Kl => {
            let (p, q) = (log_softmax(x), log_softmax(y));
            p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
        }
    }
}

/// The slopes of `f` at `at`, by central differences.
fn slopes(at: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f32> {
    let shifted = |index: usize, by: f64| {
        let mut at = at.to_vec();
        at[index] += by;
        f(&at)
    };
    let slope = |index| (shifted(index, 1e-5) - shifted(index, -1e-5)) / 2e-5;
    (0..at.len()).map(|index| slope(index) as f32).collect()
}

#[test]
fn distances_and_gradients_are_those_of_the_definitions() {
    for (rows, width) in [(5, 10), (3, 300), (2, 1)] {
        let [x, y] = [1, 2].map(|seed| numbers(rows * width, seed, 2.0));
        let d = numbers(rows, 3, 1.0);
        for kind in KINDS {
            let found = in_any_order(|gpu| {
                let [x, y, d] = [&x, &y, &d].map(|values| Values::send(gpu, values));
                let (dx, dy) = row_distances_gradient(kind, &x, &y, width, &d, true);
                let alone = row_distances_gradient(kind, &x, &y, width, &d, false);
                assert_eq!((host(&alone.0), alone.1.is_none()), (host(&dx), true));
                [host(&row_distances(kind, &x, &y, width)), host(&dx), host(&dy.expect("wanted"))].concat()
            });
            for row in 0..rows {
                let part = row * width..(row + 1) * width;
                let (x, y) = (wide(&x[part.clone()]), wide(&y[part.clone()]));
                let name = format!("{kind:?}, {rows} x {width}, row {row}");
                assert_near(&name, &found[row..=row], &[distance(kind, &x, &y) as f32], 2e-6);
                let times = |slopes: Vec<f32>| slopes.iter().map(|slope| slope * d[row]).collect::<Vec<_>>();
                let of_x = times(slopes(&x, |x| distance(kind, x, &y)));
                let of_y = times(slopes(&y, |y| distance(kind, &x, y)));
                let at = rows + part.start..rows + part.end;
                assert_near(&format!("dx of {name}"), &found[at.clone()], &of_x, 1e-5);
                let at = at.start + rows * width..at.end + rows * width;
                assert_near(&format!("dy of {name}"), &found[at], &of_y, 1e-5);
            }
        }
    }
}

#[test]
fn equal_rows_and_rows_of_zeros_have_finite_gradients() {
    let (x, zeros) = (numbers(8, 1, 1.0), vec![0.0; 8]);
    for kind in KINDS {
        for (x, y) in [(&x, &x), (&zeros, &zeros)] {
            let found = in_any_order(|gpu| {
                let [x, y, d] = [x, y, &vec![1.0]].map(|values| Values::send(gpu, values));
                let (dx, dy) = row_distances_gradient(kind, &x, &y, 8, &d, true);
                [host(&row_distances(kind, &x, &y, 8)), host(&dx), host(&dy.expect("wanted"))].concat()
            });
            let expected = match kind {
                RowDistance::Cosine if x[0] != 0.0 => -1.0,
                _ => 0.0,
            };
            assert!((found[0] - expected).abs() < 1e-6, "{kind:?}: {found:?}");
            assert!(found[1..].iter().all(|slope| slope.abs() < 1e-6), "{kind:?}: {found:?}");
        }
    }
}
