//! Pieces of evaluation attacks on the software GPU against plain loops, and what logits decide.

#![allow(missing_docs)]

mod support;

use advxl_cuda::{Norm, Values, evaluation, fab::fab_step};
use support::{host, in_any_order, numbers, pixels, soft};

const NORMS: [Norm; 3] = [Norm::Linf, Norm::L2, Norm::L1];
/// Lengths of a row: whole vectors, odd, a single one, more than a block takes at once.
const LENGTHS: [usize; 5] = [48, 147, 1, 3 * 8 * 8, 6171];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
fn assert_bits(found: &[f32], right: &[f32]) {
    assert_eq!(bits(found), bits(right));
}

#[test]
fn rows_are_selected_in_any_order_and_replaced_where_chosen() {
    for len in LENGTHS {
        let (x, others) = (numbers(5 * len, 1, 1.0), numbers(5 * len, 2, 1.0));
        let row = |of: &[f32], at: usize| of[at * len..][..len].to_vec();
        for rows in [vec![3, 0, 4], vec![2], vec![1, 1, 4, 0, 2, 3, 3], (0..5).collect(), vec![]] {
            let right: Vec<f32> = rows.iter().flat_map(|at| row(&x, *at)).collect();
            let found = in_any_order(|gpu| host(&evaluation::select_rows(&Values::send(gpu, &x), len, &rows)));
            assert_bits(&found, &right);
        }
        for rows in [vec![3, 0, 4], vec![2], vec![], vec![4, 3, 2, 1, 0]] {
            let mut right = x.clone();
            for (from, to) in rows.iter().enumerate() {
                right[to * len..][..len].copy_from_slice(&row(&others, from));
            }
            let found = in_any_order(|gpu| {
                let mut found = Values::send(gpu, &x);
                let others = Values::send(gpu, &others[..rows.len() * len]);
                evaluation::put_rows(&mut found, len, &rows, &others);
                host(&found)
            });
            assert_bits(&found, &right);
        }
        for chosen in 0..32 {
            let chosen: Vec<bool> = (0..5).map(|row| chosen >> row & 1 == 1).collect();
            let right: Vec<f32> = (0..5).flat_map(|at| row(if chosen[at] { &others } else { &x }, at)).collect();
            let gpu = soft();
            let (mut found, others) = (Values::send(&gpu, &x), Values::send(&gpu, &others));
            let before = found.clone();
            evaluation::replace_rows(&mut found, &others, &chosen);
            assert_bits(&host(&found), &right);
            assert_bits(&host(&before), &x);
        }
    }
}

#[test]
fn more_rows_than_a_grid_has_lines_are_selected() {
    let gpu = soft();
    let x = numbers(8 * 3, 1, 1.0);
    let rows: Vec<usize> = (0..40_000).map(|at| at * 7 % 3).collect();
    let found = host(&evaluation::select_rows(&Values::send(&gpu, &x), 8, &rows));
    assert!(found.chunks(8).zip(&rows).all(|(found, row)| *found == x[row * 8..][..8]));
}

#[test]
fn parts_are_joined() {
    let gpu = soft();
    let x = numbers(100, 1, 1.0);
    let all = Values::send(&gpu, &x);
    let parts = [all.part(0..37), all.part(40..40), all.part(40..41), all.part(48..100)];
    let right = [&x[..37], &x[40..41], &x[48..]].concat();
    assert_bits(&host(&evaluation::join(&parts.iter().collect::<Vec<_>>())), &right);
    assert_bits(&host(&evaluation::join(&[&parts[3]])), &x[48..]);
}

#[test]
fn sums_momentum_and_limits_are_rounded_as_on_the_cpu() {
    for len in LENGTHS {
        let [x, y, z] = [1, 2, 3].map(|seed| numbers(len, seed, 0.7));
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MAX, f32::MIN, 1e-40];
        let mut special = x.clone();
        special.iter_mut().zip(odd).for_each(|(to, odd)| *to = odd);
        let found = in_any_order(|gpu| {
            let [x, y, z, special] = [&x, &y, &z, &special].map(|v| Values::send(gpu, v));
            let mut finite = special.clone();
            evaluation::finite(&mut finite);
            let kept = special.clone();
            [
                evaluation::clamp(&x, 0.0, 1.0),
                evaluation::scaled_sum(&x, &y, 0.3, None),
                evaluation::scaled_sum(&x, &y, 0.3, Some((0.0, 1.0))),
                evaluation::momentum(&x, &y, &z, 0.75),
                evaluation::momentum(&x, &y, &z, 1.0),
                finite,
                kept,
                evaluation::clamp(&special, f32::NEG_INFINITY, f32::INFINITY),
            ]
            .iter()
            .flat_map(host)
            .collect()
        });
        let momentum = |share: f64| -> Vec<f32> {
            let (share, rest) = (share as f32, (1.0 - share) as f32);
            let of = |i: usize| {
                let ahead = (y[i] - x[i]) * share;
                let back = (x[i] - z[i]) * rest;
                x[i] + ahead + back
            };
            (0..len).map(of).collect()
        };
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y * 0.3).collect();
        let finite = special.iter().map(|v| if v.is_nan() { 0.0 } else { v.clamp(f32::MIN, f32::MAX) }).collect();
        let right: [Vec<f32>; 8] = [
            x.iter().map(|v| v.clamp(0.0, 1.0)).collect(),
            sum.clone(),
            sum.iter().map(|v| v.clamp(0.0, 1.0)).collect(),
            momentum(0.75),
            momentum(1.0),
            finite,
            special.clone(),
            special.clone(),
        ];
        assert_bits(&found, &right.concat());
    }
}

#[test]
fn images_are_pulled_back_where_chosen() {
    for len in LENGTHS {
        let (at, clean) = (pixels(4 * len, 1), pixels(4 * len, 2));
        for chosen in [[true, false, true, false], [true; 4], [false; 4]] {
            let found = in_any_order(|gpu| {
                let (mut found, clean) = (Values::send(gpu, &at), Values::send(gpu, &clean));
                evaluation::pull_back(&mut found, &clean, &chosen, 0.9);
                host(&found)
            });
            let of = |i: usize| if chosen[i / len] { clean[i] + (at[i] - clean[i]) * 0.9 } else { at[i] };
            assert_bits(&found, &(0..4 * len).map(of).collect::<Vec<_>>());
        }
    }
}

#[test]
fn changed_pixels_distances_and_dual_lengths_are_counted_for_each_image() {
    let gpu = soft();
    for len in LENGTHS {
        let images = 3;
        let (x, mut other) = (numbers(images * len, 1, 1.0), numbers(images * len, 2, 1.0));
        // The first image is the other; of the second some pixels differ; zeros of either sign are equal.
        other[..len].copy_from_slice(&x[..len]);
        for i in (len..2 * len).step_by(3) {
            other[i] = x[i];
        }
        let mut x = x;
        (x[0], other[0]) = (0.0, -0.0);
        let pairs = |image: usize| x[image * len..][..len].iter().zip(&other[image * len..][..len]);
        let counts: Vec<u32> = (0..images).map(|image| pairs(image).filter(|(a, b)| a != b).count() as u32).collect();
        let sent = [&x, &other].map(|v| Values::send(&gpu, v));
        for seed in [0, 77] {
            gpu.shuffle_threads(seed);
            assert_eq!(evaluation::changed_pixels(&sent[0], &sent[1], images).unwrap(), counts);
            for norm in NORMS {
                let near = |found: &[f64], right: Vec<f64>| {
                    assert_eq!(found.len(), images);
                    for (found, right) in found.iter().zip(right) {
                        assert!((found - right).abs() <= 1e-12 * right, "{norm:?} {len}: {found} {right}");
                        assert!(norm != Norm::Linf || *found == right || right == 0.0, "{found} {right}");
                    }
                };
                let found = evaluation::distances(&sent[0], &sent[1], images, norm).unwrap();
                let changes = |image| pairs(image).map(|(a, b)| f64::from(*a) - f64::from(*b));
                near(&found, (0..images).map(|image| length(norm, changes(image))).collect());
                let found = evaluation::dual_lengths(&sent[0], images, norm).unwrap();
                let dual = (0..images).map(|image| length(norm.dual(), pairs(image).map(|(a, _)| f64::from(*a))));
                let right: Vec<f64> = dual.collect();
                for (found, right) in found.iter().zip(right) {
                    assert!((found - right).abs() <= 1e-12 * right, "{norm:?} {len}: {found} {right}");
                }
            }
        }
    }
    // What is not a number counts as changed and does not hide the largest change.
    let [x, zero] = [[0.0, f32::NAN, 2.0, 1.0], [0.0; 4]].map(|v| Values::send(&gpu, &v));
    assert_eq!(evaluation::changed_pixels(&x, &zero, 1).unwrap(), [3]);
    assert_eq!(evaluation::distances(&x, &zero, 1, Norm::Linf).unwrap(), [2.0]);
    assert!(evaluation::distances(&x, &zero, 1, Norm::L2).unwrap()[0].is_nan());
}

fn length(norm: Norm, values: impl Iterator<Item = f64>) -> f64 {
    let sizes = values.map(f64::abs);
    match norm {
        Norm::Linf => sizes.fold(0.0, f64::max),
        Norm::L2 => sizes.map(|size| size * size).sum::<f64>().sqrt(),
        Norm::L1 => sizes.sum(),
    }
}

#[test]
fn logits_decide_as_on_the_cpu() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let mut rows: Vec<Vec<f32>> = vec![
        vec![1.0, 3.0, 2.0, 0.0],
        vec![1.0, 3.0, 3.0, 0.0],
        vec![-1.0, -1.0, -1.0, -1.0],
        vec![0.0, -0.0, 0.0, -0.0],
        vec![1.0, nan, 2.0, nan],
        vec![nan, 9.0, 2.0, 0.0],
        vec![1.0, inf, 2.0, 0.0],
        vec![-inf, -inf, -inf, -inf],
        vec![-inf, 1.0, 0.0, 0.0],
        vec![f32::MAX, f32::MIN, 0.0, 0.0],
    ];
    rows.extend((0..20).map(|seed| numbers(4, seed, 3.0)));
    check_decisions(&rows);
    // Fewer classes than threads, as many, more; ties far apart; one class.
    for classes in [1, 2, 255, 256, 257, 1000] {
        let mut rows: Vec<Vec<f32>> = (0..6).map(|seed| numbers(classes, seed, 3.0)).collect();
        for (place, row) in rows.iter_mut().enumerate() {
            row[place * 331 % classes] = 100.0;
            row[place * 77 % classes] = 100.0;
            if place == 5 {
                row[classes - 1] = nan;
                row[classes / 2] = nan;
            }
        }
        check_decisions(&rows);
    }
}

fn check_decisions(rows: &[Vec<f32>]) {
    let classes = rows[0].len();
    let gpu = soft();
    let logits = Values::send(&gpu, &rows.concat());
    // Burn's: the first that is not a number, else the first of the largest.
    let burn = |row: &Vec<f32>| {
        let nan = row.iter().position(|v| v.is_nan());
        nan.unwrap_or_else(|| (1..classes).fold(0, |best, class| if row[class] > row[best] { class } else { best }))
    };
    let is_finite = |row: &Vec<f32>| row.iter().all(|v| v.is_finite());
    for seed in [0, 5] {
        gpu.shuffle_threads(seed);
        let found = evaluation::predictions(&logits, classes).unwrap();
        assert_eq!(found, rows.iter().map(|row| burn(row) as u32).collect::<Vec<_>>());
        for label in [0, 1, classes as u32 - 1, classes as u32, 1 << 31, u32::MAX] {
            let verdicts = evaluation::verdicts(&logits, &vec![label; rows.len()], classes).unwrap();
            for (row, found) in rows.iter().zip(verdicts) {
                let label = label as usize;
                let right = is_finite(row) && label < classes && burn(row) == label;
                let others = row.iter().enumerate().filter(|(class, _)| *class != label);
                let rival = others.fold(f32::NEG_INFINITY, |most, (_, logit)| most.max(*logit));
                let margin = match is_finite(row) && label < classes {
                    true => f64::from(row[label]) - f64::from(rival),
                    false => f64::NEG_INFINITY,
                };
                assert_eq!((found.is_right, found.margin), (right, margin), "{label} {row:?}");
            }
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let gpu = soft();
    let [x, y] = [24, 16].map(|len| Values::zeros(&gpu, len, advxl_cuda::Kind::F32));
    let refused = |work: &dyn Fn()| {
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        assert!(found.is_err());
    };
    refused(&|| drop(evaluation::select_rows(&x, 8, &[3])));
    refused(&|| drop(evaluation::select_rows(&x, 7, &[0])));
    refused(&|| evaluation::put_rows(&mut x.clone(), 8, &[1, 1], &y));
    refused(&|| evaluation::put_rows(&mut x.clone(), 8, &[1, 3], &y));
    refused(&|| evaluation::put_rows(&mut x.clone(), 8, &[1], &y));
    refused(&|| evaluation::replace_rows(&mut x.clone(), &y, &[true; 2]));
    refused(&|| evaluation::replace_rows(&mut x.clone(), &x, &[true; 5]));
    refused(&|| drop(evaluation::momentum(&x, &x, &y, 0.5)));
    refused(&|| drop(evaluation::scaled_sum(&x, &y, 0.5, None)));
    refused(&|| drop(evaluation::distances(&x, &y, 2, Norm::L2)));
    refused(&|| drop(evaluation::verdicts(&x, &[0; 3], 12)));
    refused(&|| fab_step(Norm::L2, &mut x.clone(), &x, &y, &[0.0; 2]));
    refused(&|| fab_step(Norm::L2, &mut x.clone(), &x, &x, &[0.0; 5]));
    gpu.check().unwrap();
}
