//! The whole block against a plain f64 reference, and that reference against finite differences.

use advxl_kernels::{
    BlockGradients, BlockShape, BlockWeights, Gelu, PackedBlock, Path, Precision, Wanted, block_backward,
    block_forward, with_path,
};

mod reference;
use reference::{Block, Rng, worst};

/// Weights as f32, in the order of the reference.
fn weights(parts: &[Vec<f32>]) -> BlockWeights<&[f32]> {
    BlockWeights::from_array(std::array::from_fn(|index| &parts[index][..]))
}

fn gradient_parts(gradients: &BlockGradients) -> [&[f32]; 12] {
    gradients.as_ref().into_array().map(|values| &values[..])
}

struct Case {
    shape: BlockShape,
    gelu: Gelu,
    parts: Vec<Vec<f32>>,
    scale: (Vec<f32>, Vec<f32>),
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(shape: BlockShape, gelu: Gelu) -> Self {
        let mut rng = Rng::new(shape.tokens as u64 * 1000 + shape.width as u64);
        let (w, h) = (shape.width, shape.hidden);
        let small = 1.0 / (w as f32).sqrt();
        let lengths = [w, w, 3 * w * w, 3 * w, w * w, w, w, w, h * w, h, w * h, w];
        let parts = lengths
            .iter()
            .enumerate()
            .map(|(i, &len)| {
                let size = if [2, 4, 8, 10].contains(&i) { 2.0 * small } else { 0.3 };
                let center = if i == 0 || i == 6 { 1.0 } else { 0.0 };
                rng.vec(len, size).into_iter().map(|v| v + center).collect()
            })
            .collect();
        let scale = (rng.vec(shape.batch, 1.0), rng.vec(shape.batch, 1.0));
        let scale = (scale.0.iter().map(|v| v + 1.2).collect(), scale.1.iter().map(|v| v + 1.2).collect());
        let x = rng.vec(shape.elements(), 1.5);
        let dy = rng.vec(shape.elements(), 1.0);
        Self { shape, gelu, parts, scale, x, dy }
    }

    fn reference(&self) -> Block {
        Block::new(
            self.shape.tokens,
            self.shape.heads,
            self.gelu,
            self.parts.iter().map(|part| reference::wide(part)).collect(),
        )
    }

    fn run(&self, precision: Precision) -> (Vec<f32>, Vec<f32>, BlockGradients) {
        let packed = PackedBlock::new(self.shape.heads, &weights(&self.parts), precision);
        let (mut y, mut dx) = (vec![0.0; self.x.len()], vec![0.0; self.x.len()]);
        let scale = Some((&self.scale.0[..], &self.scale.1[..]));
        let saved = block_forward(self.shape, &packed, self.gelu, 1e-6, scale, &self.x, &mut y, Wanted::Weights)
            .expect("saved");
        let mut gradients = BlockGradients::default();
        block_backward(&packed, &saved, &self.dy, &mut dx, Some(&mut gradients));
        let mut only_input = vec![0.0; self.x.len()];
        block_backward(&packed, &saved, &self.dy, &mut only_input, None);
        let mut unsaved = vec![0.0; self.x.len()];
        let nothing =
            block_forward(self.shape, &packed, self.gelu, 1e-6, scale, &self.x, &mut unsaved, Wanted::Nothing);
        assert!(nothing.is_none());
        assert_eq!(y, unsaved, "the output is the same whether saved for backward or not");
        assert_eq!(dx, only_input, "the gradient of the input is the same without those of the weights");
        let saved = block_forward(self.shape, &packed, self.gelu, 1e-6, scale, &self.x, &mut y, Wanted::Input);
        block_backward(&packed, &saved.expect("saved"), &self.dy, &mut only_input, None);
        match precision {
            Precision::F32 => assert_eq!(dx, only_input, "and the same from what is saved for it alone"),
            // The slope of the GELU is rounded in place of what went into it.
            Precision::Bf16 => {
                let off = worst(&only_input, &reference::wide(&dx));
                assert!(off < 1.0 / 64.0, "dx of what is saved for it alone is off by {off}");
            }
        }
        (y, dx, gradients)
    }
}

const ODD: [(usize, usize, usize, usize, usize); 9] = [
    // batch, tokens, width, heads, hidden
    (0, 5, 16, 2, 32),
    (1, 1, 1, 1, 1),
    (2, 1, 5, 1, 7),
    (1, 3, 15, 3, 20),
    (3, 17, 48, 3, 50),
    (2, 16, 64, 1, 128),
    (5, 33, 10, 2, 33),
    (9, 50, 32, 4, 96),
    (4, 65, 128, 2, 260),
];

fn available() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.is_available())
}

/// Relative to the largest element of each result. f32: a sum of a few hundred terms of 2^-24 each.
/// bf16: every operand is rounded by up to 2^-9 of itself, so an output built by four products in a
/// row may be off by a few times 2^-9; gradients pass eight. 2^-6 and 2^-5 leave a factor of two.
#[test]
fn every_path_agrees_with_the_f64_reference_on_odd_shapes() {
    for (batch, tokens, width, heads, hidden) in ODD {
        for gelu in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
            let case = Case::new(BlockShape { batch, tokens, width, heads, hidden }, gelu);
            let block = case.reference();
            let scale = (reference::wide(&case.scale.0), reference::wide(&case.scale.1));
            let (y, dx, gradients) = block.gradients(&reference::wide(&case.x), &scale, &reference::wide(&case.dy));
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
fn the_reference_gradients_are_those_of_finite_differences() {
    let case = Case::new(BlockShape { batch: 2, tokens: 3, width: 6, heads: 2, hidden: 10 }, Gelu::Erf);
    for gelu in [Gelu::Erf, Gelu::Tanh, Gelu::Quick] {
        let mut block = Block { gelu, ..case.reference() };
        let scale = (reference::wide(&case.scale.0), reference::wide(&case.scale.1));
        let (mut x, dy) = (reference::wide(&case.x), reference::wide(&case.dy));
        let (_, dx, gradients) = block.gradients(&x, &scale, &dy);
        let loss =
            |block: &Block, x: &[f64]| -> f64 { block.forward(x, &scale).iter().zip(&dy).map(|(y, d)| y * d).sum() };
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
                assert!((found - right).abs() < 1e-7, "part {part}, element {i}");
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = Case::new(BlockShape { batch: 12, tokens: 33, width: 64, heads: 2, hidden: 144 }, Gelu::Erf);
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
fn a_sample_does_not_depend_on_the_rest_of_its_batch() {
    let case = Case::new(BlockShape { batch: 7, tokens: 17, width: 48, heads: 3, hidden: 100 }, Gelu::Erf);
    let size = case.shape.tokens * case.shape.width;
    for precision in [Precision::F32, Precision::Bf16] {
        let (y, dx, _) = case.run(precision);
        for sample in [0, 3, 6] {
            let alone = Case {
                shape: BlockShape { batch: 1, ..case.shape },
                gelu: case.gelu,
                parts: case.parts.clone(),
                scale: (vec![case.scale.0[sample]], vec![case.scale.1[sample]]),
                x: case.x[sample * size..][..size].to_vec(),
                dy: case.dy[sample * size..][..size].to_vec(),
            };
            let (y_alone, dx_alone, _) = alone.run(precision);
            assert_eq!(y[sample * size..][..size], y_alone[..], "{precision:?}");
            assert_eq!(dx[sample * size..][..size], dx_alone[..], "{precision:?}");
        }
    }
}

#[test]
#[should_panic(expected = "`x` has 3 elements")]
fn a_slice_of_the_wrong_length_is_named() {
    let case = Case::new(BlockShape { batch: 1, tokens: 2, width: 4, heads: 1, hidden: 4 }, Gelu::Erf);
    let packed = PackedBlock::new(1, &weights(&case.parts), Precision::F32);
    block_forward(case.shape, &packed, Gelu::Erf, 1e-6, None, &[0.0; 3], &mut [0.0; 8], Wanted::Nothing);
}
