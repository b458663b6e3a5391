//! ConvNeXt blocks compared with the CPU, and the speed of their parts.

use advxl_cuda::{
    ConvNext, ConvNextShape, ConvNextWeights, Depthwise, DepthwiseShape, Gelu, Kind, Precision, Unfold, Values, Wanted,
    convnext_backward, convnext_forward, depthwise, depthwise_input_gradient, depthwise_weight_gradient,
};
use advxl_kernels as kernels;

use super::{Check, Flag, Number, Outcome, Text, line, list, off};

/// A block's weights in timm's order.
fn weights(shape: ConvNextShape) -> [Vec<f32>; 9] {
    let ConvNextShape { channels, hidden, kernel, .. } = shape;
    let scale = 1.0 / (channels as f32).sqrt();
    [
        list(channels, 1, 0.5),
        list(channels * kernel * kernel, 2, 1.0 / kernel as f32),
        list(channels, 3, 0.2),
        list(channels, 4, 0.2).iter().map(|v| v + 1.0).collect(),
        list(channels, 5, 0.2),
        list(hidden * channels, 6, scale),
        list(hidden, 7, 0.2),
        list(channels * hidden, 8, scale),
        list(channels, 9, 0.2),
    ]
}

/// y, dx and the nine gradients on the CPU, in f32.
fn on_cpu(shape: ConvNextShape, weights: &[Vec<f32>; 9], path: &[f32], x: &[f32], dy: &[f32]) -> Vec<Vec<f32>> {
    let ConvNextShape { batch, height, width, channels, hidden, kernel } = shape;
    let shape = kernels::ConvNextShape { batch, height, width, channels, hidden, kernel };
    let slices = kernels::ConvNextWeights::from_array(weights.each_ref().map(|values| &values[..]));
    let packed = kernels::PackedConvNext::new(kernel, &slices, kernels::Precision::F32);
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let (gelu, wanted) = (kernels::Gelu::Erf, kernels::Wanted::Weights);
    let saved = kernels::convnext_forward(shape, &packed, gelu, 1e-6, Some(path), x, &mut y, wanted);
    let mut all = kernels::ConvNextGradients::new(channels, hidden, kernel);
    kernels::convnext_backward(&packed, &saved.expect("wanted"), dy, &mut dx, Some((x, &mut all)));
    let mut results = vec![y, dx];
    results.extend(all.iter().map(|values| values.to_vec()));
    results
}

impl Check {
    /// Blocks of the sizes of ConvNeXt-T compared with the CPU, and unfolded images.
    pub(crate) fn convnext(&self) -> Outcome {
        let shapes = match self.tiny {
            true => vec![(5, 24, 7), (9, 8, 3)],
            false => vec![(56, 96, 7), (28, 192, 7), (14, 384, 7), (7, 768, 7), (13, 40, 5), (11, 24, 11), (9, 64, 3)],
        };
        for (side, channels, kernel) in shapes {
            let shape = ConvNextShape { batch: 3, height: side, width: side, channels, hidden: 4 * channels, kernel };
            let weights = weights(shape);
            let (x, dy) = (list(shape.elements(), 20, 1.0), list(shape.elements(), 21, 1.0));
            let path = [1.25, 0.0, 1.25];
            let right = on_cpu(shape, &weights, &path, &x, &dy);
            for (precision, stream, most) in [
                (Precision::F32, Kind::F32, 2e-5),
                (Precision::Tf32, Kind::F32, 5e-3),
                (Precision::Bf16, Kind::F32, 0.03),
                (Precision::Bf16, Kind::Bf16, 0.03),
            ] {
                let run = || -> Result<Vec<Vec<f32>>, advxl_cuda::Error> {
                    let send = |values: &[f32]| Values::send(&self.gpu, values);
                    let list = ConvNextWeights::of(weights.each_ref().map(|values| send(values)));
                    let block = ConvNext::new(kernel, &list, precision);
                    let (x, dy, path) = (send(&x).cast(stream), send(&dy).cast(stream), send(&path));
                    let (y, saved) = convnext_forward(shape, &block, Gelu::Erf, 1e-6, Some(&path), &x, Wanted::Weights);
                    let (dx, all) = convnext_backward(&block, &saved.expect("wanted"), &dy, Wanted::Weights);
                    let all = [y, dx].into_iter().chain(all.expect("wanted").in_order());
                    all.map(|values| values.to_vec()).collect()
                };
                let found = run()?;
                let again = run()?;
                let differences = found.iter().zip(&right).map(|(found, right)| off(found, right));
                let (largest, rms) =
                    differences.fold((0.0f64, 0.0f64), |(a, b), (largest, rms)| (a.max(largest), b.max(rms)));
                line(
                    "convnext",
                    &[
                        ("shape", Text(format!("3 x {side} x {side} x {channels}, kernel {kernel}"))),
                        ("precision", Text(format!("{precision:?}, {stream:?} stream"))),
                        ("off", Number(largest)),
                        ("rms", Number(rms)),
                        ("equal_bits", Flag(found == again)),
                        ("right", Flag(largest <= most && found == again)),
                    ],
                );
            }
        }
        for (side, channels, kernel, stride, padding) in [(32, 3, 4, 4, 0), (15, 3, 3, 2, 1), (14, 16, 2, 2, 0)] {
            let (batch, height, width) = (2, side, side);
            let sizes = Unfold { batch, height, width, channels, kernel, stride, padding };
            let same = kernels::Unfold { batch, height, width, channels, kernel, stride, padding };
            let len = batch * sizes.output().iter().product::<usize>() * sizes.row();
            let (x, d_rows) = (list(batch * side * side * channels, 1, 1.0), list(len, 2, 1.0));
            let (mut rows, mut dx) = (vec![0.0; len], vec![0.0; x.len()]);
            same.unfold(&x, &mut rows);
            same.gradient(&d_rows, &mut dx);
            let found = sizes.unfold(&Values::send(&self.gpu, &x)).to_vec()?;
            let gradient = sizes.gradient(&Values::send(&self.gpu, &d_rows)).to_vec()?;
            line("convnext", &[("what", Text(format!("{sizes:?}"))), ("right", Flag(found == rows && gradient == dx))]);
        }
        Ok(())
    }

    /// The blocks of ConvNeXt-B at 224 pixels, 128 images: their convolutions, and the whole.
    pub(crate) fn convnext_speed(&self) -> Outcome {
        let (batch, stages) = match self.tiny {
            true => (2, vec![(5, 16)]),
            false => (128, vec![(56, 128), (28, 256), (14, 512), (7, 1024)]),
        };
        let time = |run: &dyn Fn()| -> Result<f64, advxl_cuda::Error> {
            run();
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                best = best.min(self.gpu.time(run)?);
            }
            Ok(best)
        };
        for (side, channels) in stages {
            let (height, width, kernel) = (side, side, 7);
            let shape = ConvNextShape { batch, height, width, channels, hidden: 4 * channels, kernel };
            let conv = DepthwiseShape { batch, height, width, channels, kernel };
            let list = ConvNextWeights::of(weights(shape).map(|values| Values::send(&self.gpu, &values)));
            let dw = Depthwise::new(&list.conv_dw_weight, &list.conv_dw_bias, kernel);
            for (precision, kind) in [(Precision::Bf16, Kind::Bf16), (Precision::Tf32, Kind::F32)] {
                self.gpu.release_memory();
                let block = ConvNext::new(kernel, &list, precision);
                let x = self.noise(shape.elements(), kind);
                let dy = self.noise(shape.elements(), kind);
                let forward = |wanted| convnext_forward(shape, &block, Gelu::Tanh, 1e-6, None, &x, wanted).1;
                let saved = forward(Wanted::Weights).expect("wanted");
                let backward = |wanted| drop(convnext_backward(&block, &saved, &dy, wanted));
                let work = 2.0 * (shape.elements() * kernel * kernel) as f64;
                for (what, seconds, own) in [
                    ("depthwise", time(&|| drop(depthwise(conv, &dw, &x, kind)))?, true),
                    (
                        "depthwise input gradient",
                        time(&|| drop(depthwise_input_gradient(conv, &dw, &dy, Some(&x), kind)))?,
                        true,
                    ),
                    ("depthwise weight gradient", time(&|| drop(depthwise_weight_gradient(conv, &x, &dy)))?, true),
                    ("block forward", time(&|| drop(forward(Wanted::Weights)))?, false),
                    ("block backward to the input", time(&|| backward(Wanted::Input))?, false),
                    ("block backward", time(&|| backward(Wanted::Weights))?, false),
                ] {
                    let mut values = vec![
                        ("shape", Text(format!("{batch} x {side} x {side} x {channels}"))),
                        ("precision", Text(format!("{precision:?}"))),
                        ("what", Text(what.into())),
                        ("us", Number(1e6 * seconds)),
                    ];
                    if own {
                        values.push(("tflops", Number(work / seconds / 1e12)));
                    }
                    line("convnext_speed", &values);
                }
            }
        }
        Ok(())
    }
}
