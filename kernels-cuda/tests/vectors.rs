//! Small operations on rows of any length, parts of values, and values as lazy bytes.

#![allow(missing_docs)]

mod support;

use advxl_cuda::{self as cuda, ErrorKind, Kind, Transposed, Values, caught, lazy_bytes, values_of};
use support::{assert_near, host, in_any_order, numbers, soft};

#[test]
fn small_operations_are_those_of_plain_loops() {
    // Lengths that are not a multiple of eight, and rows longer than a block of threads.
    for (rows, width) in [(1, 1), (3, 10), (5, 300)] {
        let (x, y) = (numbers(rows * width, 1, 1.0), numbers(rows * width, 2, 1.0));
        let factors = numbers(rows, 3, 1.0);
        let found = in_any_order(|gpu| {
            let [a, b, f] = [&x, &y, &factors].map(|values| Values::send(gpu, values));
            let all = [
                cuda::times_rows(&a, &f),
                cuda::row_dots(&a, &b, width),
                cuda::sum(&a, &b),
                Values::filled(gpu, width, 0.25),
                Values::joined(&[&a, &f, &b]),
            ];
            all.iter().flat_map(host).collect()
        });
        let dots = x.chunks(width).zip(y.chunks(width));
        let dots = dots.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>());
        let mut right: Vec<f32> = x.iter().enumerate().map(|(at, v)| factors[at / width] * v).collect();
        right.extend(dots);
        right.extend(x.iter().zip(&y).map(|(a, b)| a + b));
        right.extend(vec![0.25; width]);
        right.extend(x.iter().chain(&factors).chain(&y));
        assert_near("small operations", &found, &right, 2e-6);
    }
}

#[test]
fn swapping_axes_twice_changes_nothing() {
    let x = numbers(2 * 5 * 9, 1, 1.0);
    let found = in_any_order(|gpu| {
        let swapped = cuda::swap_axes(&Values::send(gpu, &x), [5, 9]);
        [host(&swapped), host(&cuda::swap_axes(&swapped, [9, 5]))].concat()
    });
    let at = |i: usize| x[i / 45 * 45 + i % 5 * 9 + i / 5 % 9];
    let right: Vec<f32> = (0..90).map(at).chain(x.iter().copied()).collect();
    assert_eq!(found, right);
}

#[test]
fn products_take_either_operand_transposed() {
    let (rows, inner, columns) = (3, 7, 5);
    let (a, b) = (numbers(rows * inner, 1, 1.0), numbers(inner * columns, 2, 1.0));
    let transposed = |values: &[f32], columns: usize| -> Vec<f32> {
        (0..values.len())
            .map(|i| values[i % (values.len() / columns) * columns + i / (values.len() / columns)])
            .collect()
    };
    let right: Vec<f32> = (0..rows * columns)
        .map(|i| (0..inner).map(|k| a[i / columns * inner + k] * b[k * columns + i % columns]).sum())
        .collect();
    let gpu = soft();
    for (form, first, second) in [
        (Transposed::Neither, a.clone(), b.clone()),
        (Transposed::First, transposed(&a, inner), b.clone()),
        (Transposed::Second, a.clone(), transposed(&b, columns)),
    ] {
        let [first, second] = [&first, &second].map(|values| Values::send(&gpu, values));
        let found = cuda::matmul(&first, &second, form, [rows, inner, columns]);
        assert_near(&format!("{form:?}"), &host(&found), &right, 1e-6);
    }
}

#[test]
fn a_slice_shares_memory_where_kernels_can_read_it_and_is_a_copy_elsewhere() {
    let gpu = soft();
    let x: Vec<f32> = (0..40).map(|v| v as f32).collect();
    let sent = Values::send(&gpu, &x);
    for range in [0..40, 8..31, 3..4, 13..40, 40..40] {
        let found = sent.slice(range.clone());
        assert_eq!(host(&found), x[range.clone()]);
        // Kernels read what starts anywhere.
        assert_eq!(host(&cuda::sum(&found, &found)), x[range].iter().map(|v| 2.0 * v).collect::<Vec<_>>());
    }
}

#[test]
fn lazy_bytes_are_copied_when_they_are_read_and_forget_the_gpu_when_they_are_written() {
    let gpu = soft();
    let x = [1.0f32, -2.0, 3.5];
    let mut bytes = lazy_bytes(Values::send(&gpu, &x));
    assert_eq!(bytes.len(), 12);
    assert_eq!(host(&values_of(&bytes).expect("on the GPU")), x);
    let shared = bytes.clone();
    assert_eq!(gpu.traffic().unplanned, (0, 0));
    assert_eq!(&bytes[4..8], (-2.0f32).to_le_bytes());
    assert_eq!(&bytes[..4], 1.0f32.to_le_bytes());
    assert_eq!(gpu.traffic().unplanned, (1, 12));
    assert!(values_of(&bytes).is_some(), "reading changes nothing");
    bytes[..4].copy_from_slice(&5.0f32.to_le_bytes());
    assert!(values_of(&bytes).is_none());
    assert_eq!(&bytes[..4], 5.0f32.to_le_bytes());
    assert_eq!(host(&values_of(&shared).expect("a clone keeps its own")), x);
}

#[test]
fn a_failure_ends_the_work_that_reads_and_is_an_error_outside() {
    let gpu = soft();
    let bytes = lazy_bytes(Values::zeros(&gpu, 4, Kind::F32));
    // More than the software GPU has.
    drop(Values::zeros(&gpu, 1 << 30, Kind::F32));
    let error = caught(|| bytes[0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Memory);
    assert!(caught(|| 3).is_ok());
    let panic = std::panic::catch_unwind(|| caught(|| std::panic::resume_unwind(Box::new("another"))));
    assert!(panic.is_err(), "other panics pass through");
}
