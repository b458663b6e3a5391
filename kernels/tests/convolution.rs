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

/// Weights as f32, in the order of the reference.
fn weights(parts: &[Vec<f32>]) -> ConvNextWeights<&[f32]> {
    ConvNextWeights::from_array(std::array::from_fn(|index| &parts[index][..]))
}

fn gradient_parts(gradients: &ConvNextGradients) -> [&[f32]; 9] {
    gradients.as_ref().into_array().map(|values| &values[..])
}

struct Case {
    shape: ConvNextShape,
    gelu: Gelu,
    parts: Vec<Vec<f32>>,
    scale: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new([batch, height, width, channels, hidden, kernel]: [usize; 6], gelu: Gelu) -> Self {
        let shape = ConvNextShape { batch, height, width, channels, hidden, kernel };
        let mut rng = Rng::new((shape.elements() + hidden) as u64);
        let small = 2.0 / (channels as f32).sqrt();
        let near = |values: Vec<f32>, center: f32| values.into_iter().map(|v| v + center).collect();
        let parts = vec![
            near(rng.vec(channels, 0.3), 0.5),
            rng.vec(channels * kernel * kernel, 1.0 / kernel as f32),
            rng.vec(channels, 0.3),
            near(rng.vec(channels, 0.3), 1.0),
            rng.vec(channels, 0.3),
            rng.vec(hidden * channels, small),
            rng.vec(hidden, 0.3),
            rng.vec(channels * hidden, small),
            rng.vec(channels, 0.3),
        ];
        let scale = near(rng.vec(batch, 1.0), 1.2);
        let (x, dy) = (rng.vec(shape.elements(), 1.5), rng.vec(shape.elements(), 1.0));
        Self { shape, gelu, parts, scale, x, dy }
    }

    fn reference(&self) -> reference::ConvNext {
        let ConvNextShape { batch, height, width, channels, kernel, .. } = self.shape;
        let shape = DepthwiseShape { batch, height, width, channels, kernel };
        reference::ConvNext { shape, gelu: self.gelu, parts: self.parts.iter().map(|part| wide(part)).collect() }
    }

    fn run(&self, precision: Precision) -> (Vec<f32>, Vec<f32>, ConvNextGradients) {
        let packed = PackedConvNext::new(self.shape.kernel, &weights(&self.parts), precision);
        let forward = |y: &mut [f32], wanted| {
            convnext_forward(self.shape, &packed, self.gelu, 1e-6, Some(&self.scale), &self.x, y, wanted)
        };
        let (mut y, mut dx) = (vec![0.0; self.x.len()], vec![0.0; self.x.len()]);
        let saved = forward(&mut y, Wanted::Weights).expect("saved");
        let mut gradients = ConvNextGradients::default();
        convnext_backward(&packed, &saved, &self.dy, &mut dx, Some((&self.x, &mut gradients)));
        let mut only_input = vec![0.0; self.x.len()];
        convnext_backward(&packed, &saved, &self.dy, &mut only_input, None);
        let mut unsaved = vec![0.0; self.x.len()];
        assert!(forward(&mut unsaved, Wanted::Nothing).is_none());
        assert_eq!(y, unsaved, "the output is the same whether saved for backward or not");
        assert_eq!(dx, only_input, "the gradient of the input is the same without those of the weights");
        let saved = forward(&mut y, Wanted::Input).expect("saved");
        convnext_backward(&packed, &saved, &self.dy, &mut only_input, None);
        match precision {
            Precision::F32 => assert_eq!(dx, only_input, "and the same from what is saved for it alone"),
            // The slope of the GELU is rounded in place of what went into it.
            Precision::Bf16 => {
                let off = worst(&only_input, &wide(&dx));
                assert!(off < 1.0 / 64.0, "dx of what is saved for it alone is off by {off}");
            }
        }
        (y, dx, gradients)
    }
}

/// Relative to the largest element of each result. f32: sums of a few hundred terms of 2^-24 each. bf16: the operands of
/// two products in a row are rounded by up to 2^-9 of themselves, of four backward; 2^-6 and 2^-5 leave a factor of two.
#[test]
fn convnext_blocks_agree_with_the_f64_reference_on_odd_shapes_on_every_path() {
    for sizes in [
        // batch, height, width, channels, hidden, kernel
        [0, 4, 4, 16, 32, 7],
        [2, 1, 1, 5, 7, 7],
        [3, 7, 7, 40, 50, 7],
        [2, 9, 14, 16, 64, 7],
        [5, 8, 8, 33, 80, 5],
        [1, 40, 29, 12, 20, 7],
        [9, 4, 4, 48, 192, 3],
    ] {
        for gelu in [Gelu::Erf, Gelu::Quick] {
            let case = Case::new(sizes, gelu);
            let (y, dx, gradients) = case.reference().gradients(&wide(&case.x), &wide(&case.scale), &wide(&case.dy));
            for path in available() {
                for (precision, forward, backward) in
                    [(Precision::F32, 3e-6, 2e-5), (Precision::Bf16, 1.0 / 64.0, 1.0 / 32.0)]
                {
                    let what = format!("{path:?} {precision:?} {gelu:?} {:?}", case.shape);
                    let found = with_path(path, || case.run(precision));
                    assert!(worst(&found.0, &y) < forward, "{what}: y off by {}", worst(&found.0, &y));
                    assert!(worst(&found.1, &dx) < backward, "{what}: dx off by {}", worst(&found.1, &dx));
                    for (i, (found, right)) in gradient_parts(&found.2).into_iter().zip(&gradients).enumerate() {
                        let off = worst(found, right);
                        assert!(off < backward, "{what}: gradient {i} off by {off}");
                    }
                }
            }
        }
    }
}

/// The reference's own gradients, in f64, by central differences of 1e-5: error about 1e-9.
#[test]
fn the_gradients_of_the_convnext_reference_are_those_of_finite_differences() {
    let case = Case::new([2, 3, 4, 5, 8, 3], Gelu::Quick);
    let mut block = case.reference();
    let (mut x, scale, dy) = (wide(&case.x), wide(&case.scale), wide(&case.dy));
    let (_, dx, gradients) = block.gradients(&x, &scale, &dy);
    let loss = |block: &reference::ConvNext, x: &[f64]| -> f64 {
        block.forward(x, &scale).iter().zip(&dy).map(|(y, d)| y * d).sum()
    };
    let step = 1e-5;
    for i in 0..x.len() {
        let kept = x[i];
        x[i] = kept + step;
        let above = loss(&block, &x);
        x[i] = kept - step;
        let below = loss(&block, &x);
        x[i] = kept;
        assert!(((above - below) / (2.0 * step) - dx[i]).abs() < 1e-7, "dx {i}");
    }
    for (part, gradient) in gradients.iter().enumerate() {
        for (i, right) in gradient.iter().enumerate() {
            let kept = block.parts[part][i];
            block.parts[part][i] = kept + step;
            let above = loss(&block, &x);
            block.parts[part][i] = kept - step;
            let below = loss(&block, &x);
            block.parts[part][i] = kept;
            let found = (above - below) / (2.0 * step);
            assert!((found - right).abs() < 1e-7, "part {part}, element {i}: {found} {right}");
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit_of_a_convnext_block() {
    let case = Case::new([6, 20, 28, 24, 96, 7], Gelu::Erf);
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
            pool.install(|| case.run(precision))
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(one, run(threads), "{threads} threads");
        }
    }
}

#[test]
fn an_image_in_a_convnext_block_does_not_depend_on_the_rest_of_its_batch() {
    let case = Case::new([7, 9, 11, 40, 100, 7], Gelu::Erf);
    let size = case.x.len() / 7;
    for precision in [Precision::F32, Precision::Bf16] {
        let (y, dx, _) = case.run(precision);
        for image in [0, 3, 6] {
            let alone = Case {
                shape: ConvNextShape { batch: 1, ..case.shape },
                gelu: case.gelu,
                parts: case.parts.clone(),
                scale: vec![case.scale[image]],
                x: case.x[image * size..][..size].to_vec(),
                dy: case.dy[image * size..][..size].to_vec(),
            };
            let (y_alone, dx_alone, _) = alone.run(precision);
            assert_eq!(y[image * size..][..size], y_alone[..], "{precision:?}");
            assert_eq!(dx[image * size..][..size], dx_alone[..], "{precision:?}");
        }
    }
}

#[test]
#[should_panic(expected = "`x` has 3 elements")]
fn a_slice_of_the_wrong_length_is_named() {
    let case = Case::new([1, 2, 2, 4, 8, 3], Gelu::Erf);
    let packed = PackedConvNext::new(3, &weights(&case.parts), Precision::F32);
    convnext_forward(case.shape, &packed, Gelu::Erf, 1e-6, None, &[0.0; 3], &mut [0.0; 16], Wanted::Nothing);
}
