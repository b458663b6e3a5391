//! Convolutions: depthwise, unfolded, and the whole ConvNeXt block, on every path, against plain f64 references.

use advxl_kernels::*;
use proptest::prelude::*;

mod reference;
use reference::{Rng, wide, worst};

fn available() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.is_available())
}

fn check_depthwise(shape: DepthwiseShape) {
    let DepthwiseShape { channels, kernel, .. } = shape;
    let mut rng = Rng::new((shape.elements() + kernel) as u64);
    let (x, dy) = (rng.vec(shape.elements(), 1.0), rng.vec(shape.elements(), 1.0));
    let (weight, bias) = (rng.vec(channels * kernel * kernel, 1.0), rng.vec(channels, 1.0));
    let residual = rng.vec(shape.elements(), 1.0);
    let y = reference::depthwise(shape, &wide(&x), &wide(&weight), &wide(&bias));
    let (dx, dw, db) = reference::depthwise_gradients(shape, &wide(&x), &wide(&weight), &wide(&dy));
    for path in available() {
        let what = format!("{path:?} {shape:?}");
        with_path(path, || {
            let packed = PackedDepthwise::new(&weight, &bias, kernel);
            let mut found = vec![7.0; x.len()];
            depthwise(shape, &packed, &x, &mut found);
            // Sums of 49 products below 1, so below 50 * 49 * 2^-25; `worst` is relative to the largest, above 1.
            assert!(worst(&found, &y) < 2e-6, "{what}: y off by {}", worst(&found, &y));
            depthwise_input_gradient(shape, &packed, &dy, None, &mut found);
            assert!(worst(&found, &dx) < 2e-6, "{what}: dx off by {}", worst(&found, &dx));
            depthwise_input_gradient(shape, &packed, &dy, Some(&residual), &mut found);
            let with_residual: Vec<_> = dx.iter().zip(&residual).map(|(d, r)| d + f64::from(*r)).collect();
            assert!(worst(&found, &with_residual) < 2e-6, "{what}: dx and residual");
            let (mut found_dw, mut found_db) = (vec![7.0; weight.len()], vec![7.0; channels]);
            depthwise_weight_gradient(shape, &x, &dy, &mut found_dw, &mut found_db);
            // Sums of as many products as there are pixels, thousands at most, in f32.
            assert!(worst(&found_dw, &dw) < 1e-5, "{what}: dw off by {}", worst(&found_dw, &dw));
            assert!(worst(&found_db, &db) < 1e-5, "{what}: db off by {}", worst(&found_db, &db));
        });
    }
}

#[test]
fn depthwise_convolutions_of_chosen_shapes_agree_with_f64() {
    for (batch, height, width, channels, kernel) in [
        (0, 4, 4, 16, 7),
        (1, 1, 1, 1, 1),
        (2, 1, 5, 3, 7),
        (1, 14, 14, 40, 7),
        (3, 7, 7, 32, 7),
        (2, 9, 29, 20, 7),
        (2, 30, 33, 17, 5),
        (2, 4, 2, 80, 7),
        (1, 12, 19, 16, 3),
        (1, 12, 19, 18, 9),
        (2, 17, 16, 5, 15),
    ] {
        check_depthwise(DepthwiseShape { batch, height, width, channels, kernel });
    }
}

fn check_unfold(sizes: Unfold) {
    let ([down, along], row) = (sizes.output(), sizes.row());
    let Unfold { batch, height, width, channels, kernel, stride, padding } = sizes;
    let mut rng = Rng::new((batch * height * width + row) as u64);
    let x = rng.vec(batch * height * width * channels, 1.0);
    // Where every element of the rows comes from, if from anywhere.
    let source = |index: usize| {
        let (place, at) = (index / row, index % row);
        let (ky, kx, c) = (at / channels / kernel, at / channels % kernel, at % channels);
        let (image, oy, ox) = (place / along / down, place / along % down, place % along);
        let (y, x) = (oy * stride + ky, ox * stride + kx);
        let inside = y >= padding && x >= padding && y < height + padding && x < width + padding;
        inside.then(|| ((image * height + y - padding) * width + x - padding) * channels + c)
    };
    let count = batch * down * along * row;
    let d_rows = rng.vec(count, 1.0);
    let right: Vec<f32> = (0..count).map(|i| source(i).map_or(0.0, |from| x[from])).collect();
    let mut right_gradient = vec![0.0; x.len()];
    for (i, d) in d_rows.iter().enumerate() {
        if let Some(to) = source(i) {
            right_gradient[to] += f64::from(*d);
        }
    }
    for path in available() {
        with_path(path, || {
            let (mut rows, mut gradient) = (vec![7.0; count], vec![7.0; x.len()]);
            sizes.unfold(&x, &mut rows);
            assert_eq!(rows, right, "{path:?} {sizes:?}");
            sizes.gradient(&d_rows, &mut gradient);
            // Sums of at most 49 numbers below 1.
            assert!(worst(&gradient, &right_gradient) < 5e-6, "{path:?} {sizes:?}");
        });
    }
}

#[test]
fn unfolding_of_chosen_shapes_is_as_its_definition_says() {
    for (height, width, channels, kernel, stride, padding) in [
        (8, 8, 3, 4, 4, 0),
        (6, 10, 16, 2, 2, 0),
        (7, 9, 5, 3, 2, 1),
        (5, 5, 17, 3, 1, 1),
        (9, 4, 2, 2, 3, 0),
        (2, 2, 1, 7, 1, 3),
        (1, 1, 1, 3, 1, 0),
        (3, 3, 2, 1, 2, 2),
    ] {
        check_unfold(Unfold { batch: 2, height, width, channels, kernel, stride, padding });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn depthwise_convolutions_of_any_shape_agree_with_f64(
        batch in 0_usize..4, height in 1_usize..20, width in 1_usize..34, channels in 1_usize..50, half in 0_usize..5,
    ) {
        check_depthwise(DepthwiseShape { batch, height, width, channels, kernel: 2 * half + 1 });
    }

    #[test]
    fn unfolding_of_any_shape_is_as_its_definition_says(
        height in 1_usize..9, width in 1_usize..9, channels in 1_usize..20, kernel in 1_usize..6, stride in 1_usize..4,
        padding in 0_usize..4,
    ) {
        check_unfold(Unfold { batch: 2, height, width, channels, kernel, stride, padding });
    }
}

#[test]
fn gradients_of_depthwise_weights_have_the_same_bits_for_any_number_of_threads() {
    let shape = DepthwiseShape { batch: 5, height: 28, width: 28, channels: 24, kernel: 7 };
    let mut rng = Rng::new(3);
    let (x, dy) = (rng.vec(shape.elements(), 1.0), rng.vec(shape.elements(), 1.0));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        let (mut dw, mut db) = (vec![0.0; 24 * 49], vec![0.0; 24]);
        pool.install(|| depthwise_weight_gradient(shape, &x, &dy, &mut dw, &mut db));
        (dw, db)
    };
    assert_eq!(run(1), run(3));
}

#[test]
#[should_panic(expected = "kernel = 4 must be odd")]
fn an_even_kernel_is_refused() {
    PackedDepthwise::new(&[0.0; 16], &[0.0], 4);
}
