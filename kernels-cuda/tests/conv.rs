//! Convolutions and ConvNeXt blocks on the software GPU, compared with `advxl-kernels`.

mod support;

use advxl_cuda::{self as cuda, Gpu, Kind, Precision, Values, Wanted};
use advxl_kernels as cpu;
use support::{assert_near, host, in_any_order, numbers, rounded, soft};

/// Half of bf16's last place.
const BF16: f32 = 1.0 / 256.0;

fn send(gpu: &Gpu, values: &[f32], kind: Kind) -> Values {
    Values::send(gpu, values).cast(kind)
}

/// As they are after a stay in this format.
fn through(values: &[f32], kind: Kind) -> Vec<f32> {
    match kind {
        Kind::F32 => values.to_vec(),
        Kind::Bf16 => rounded(values),
        Kind::E4m3 => unreachable!("convolutions have no such operands"),
    }
}

fn tolerance(kind: Kind) -> f32 {
    if kind == Kind::F32 { 2e-6 } else { BF16 }
}

#[test]
fn depthwise_convolutions_and_their_gradients_are_the_cpus() {
    for (batch, height, width, channels, kernel) in [
        // Blocks of 8, 16, 32 and 64 channels; tiles of 4, 6, 7 and 8 columns; cut off below and at the right.
        (2, 5, 9, 8, 3),
        (3, 7, 7, 24, 7),
        (1, 6, 13, 96, 7),
        (1, 3, 16, 64, 7),
        (2, 9, 14, 16, 5),
        (1, 5, 11, 8, 11),
        (2, 4, 2, 40, 7),
        (1, 1, 1, 8, 3),
        (2, 30, 8, 8, 3),
        // Several partial sums, and more than one block along the channels.
        (3, 20, 9, 128, 7),
    ] {
        let shape = cuda::DepthwiseShape { batch, height, width, channels, kernel };
        let on_cpu = cpu::DepthwiseShape { batch, height, width, channels, kernel };
        let [x, dy, residual] = [1, 2, 3].map(|seed| numbers(shape.elements(), seed, 1.0));
        let (weight, bias) = (numbers(channels * kernel * kernel, 4, 0.5), numbers(channels, 5, 1.0));
        let packed = cpu::PackedDepthwise::new(&weight, &bias, kernel);
        for (stream, kind) in [(Kind::F32, Kind::F32), (Kind::F32, Kind::Bf16), (Kind::Bf16, Kind::Bf16)] {
            let what = format!("{shape:?} {stream:?} {kind:?}");
            let (x, residual, dy) = (through(&x, stream), through(&residual, stream), through(&dy, kind));
            let lens = [x.len(), x.len(), x.len(), weight.len(), channels];
            let found = in_any_order(|gpu| {
                let weights = cuda::Depthwise::new(&Values::send(gpu, &weight), &Values::send(gpu, &bias), kernel);
                let [x, rest] = [&x, &residual].map(|values| send(gpu, values, stream));
                let dy = send(gpu, &dy, kind);
                let y = cuda::depthwise(shape, &weights, &x, kind);
                let dx = cuda::depthwise_input_gradient(shape, &weights, &dy, None, stream);
                let added = cuda::depthwise_input_gradient(shape, &weights, &dy, Some(&rest), stream);
                let (to_weight, to_bias) = cuda::depthwise_weight_gradient(shape, &x, &dy);
                [y, dx, added, to_weight, to_bias].iter().flat_map(host).collect()
            });
            let [mut y, mut dx, mut added, mut to_weight, mut to_bias] = lens.map(|len| vec![0.0; len]);
            cpu::depthwise(on_cpu, &packed, &x, &mut y);
            cpu::depthwise_input_gradient(on_cpu, &packed, &dy, None, &mut dx);
            cpu::depthwise_input_gradient(on_cpu, &packed, &dy, Some(&residual), &mut added);
            cpu::depthwise_weight_gradient(on_cpu, &x, &dy, &mut to_weight, &mut to_bias);
            let mut rest = &found[..];
            for (name, right, tolerance) in [
                ("y", y, tolerance(kind)),
                ("dx", dx, tolerance(stream)),
                ("dx and residual", added, tolerance(stream)),
                ("weight", to_weight, 3e-6),
                ("bias", to_bias, 3e-6),
            ] {
                let found;
                (found, rest) = rest.split_at(right.len());
                assert_near(&format!("{what}, {name}"), found, &right, tolerance);
            }
        }
    }
}

#[test]
fn a_pixel_reaches_its_neighbors_alone() {
    let shape = cuda::DepthwiseShape { batch: 2, height: 9, width: 8, channels: 8, kernel: 7 };
    let gpu = soft();
    let weights = cuda::Depthwise::new(&Values::send(&gpu, &[1.0; 8 * 49]), &Values::send(&gpu, &[0.0; 8]), 7);
    let mut x = vec![0.0; shape.elements()];
    // Line 2, column 4, channel 3 of the second image.
    x[((9 + 2) * 8 + 4) * 8 + 3] = f32::NAN;
    let y = host(&cuda::depthwise(shape, &weights, &Values::send(&gpu, &x), Kind::F32));
    for (at, y) in y.iter().enumerate() {
        let (channel, column, line) = (at % 8, at / 8 % 8, at / 64);
        let near = channel == 3 && (1..=7).contains(&column) && (9..=14).contains(&line);
        assert_eq!(y.is_nan(), near, "{at}");
    }
}

#[test]
#[should_panic(expected = "kernel = 4 must be odd")]
fn even_kernels_are_refused() {
    let gpu = soft();
    let _ = cuda::Depthwise::new(&Values::zeros(&gpu, 8 * 16, Kind::F32), &Values::zeros(&gpu, 8, Kind::F32), 4);
}

#[test]
fn unfolded_rows_and_their_gradient_are_the_cpus_to_the_bit() {
    for (batch, height, width, channels, kernel, stride, padding) in [
        (2, 8, 12, 3, 4, 4, 0),
        (2, 7, 5, 3, 3, 2, 1),
        (3, 6, 4, 16, 2, 2, 0),
        (1, 7, 7, 8, 3, 2, 1),
        (2, 11, 9, 24, 5, 3, 2),
        (2, 5, 6, 5, 3, 1, 1),
        // Strides beyond the kernel leave pixels out; a kernel larger than the image sees none.
        (1, 9, 9, 8, 2, 3, 0),
        (1, 2, 2, 8, 7, 1, 0),
    ] {
        let sizes = cuda::Unfold { batch, height, width, channels, kernel, stride, padding };
        let on_cpu = cpu::Unfold { batch, height, width, channels, kernel, stride, padding };
        assert_eq!((sizes.output(), sizes.row()), (on_cpu.output(), on_cpu.row()));
        let len = batch * sizes.output().iter().product::<usize>() * sizes.row();
        let (x, d_rows) = (numbers(batch * height * width * channels, 1, 1.0), numbers(len, 2, 1.0));
        let found = in_any_order(|gpu| {
            let rows = sizes.unfold(&Values::send(gpu, &x));
            let dx = sizes.gradient(&Values::send(gpu, &d_rows));
            [rows, dx].iter().flat_map(host).collect()
        });
        let (mut rows, mut dx) = (vec![0.0; len], vec![0.0; x.len()]);
        on_cpu.unfold(&x, &mut rows);
        on_cpu.gradient(&d_rows, &mut dx);
        assert_eq!(found, [rows, dx].concat(), "{sizes:?}");
    }
}

#[test]
fn a_product_of_unfolded_rows_is_a_convolution() {
    for (channels, kernel, stride, padding) in [(3, 4, 4, 0), (8, 3, 2, 1), (3, 3, 1, 1)] {
        let (batch, height, width, outputs) = (2, 8, 12, 16);
        let sizes = cuda::Unfold { batch, height, width, channels, kernel, stride, padding };
        let ([down, along], row) = (sizes.output(), sizes.row());
        let x = numbers(batch * height * width * channels, 1, 1.0);
        let dy = numbers(batch * down * along * outputs, 2, 1.0);
        let (weight, bias) = (numbers(outputs * row, 3, 0.3), numbers(outputs, 4, 1.0));
        let (mut y, mut dx) = (vec![0.0f64; dy.len()], vec![0.0f64; x.len()]);
        for place in 0..batch * down * along {
            let (image, top, left) = (place / along / down, place / along % down * stride, place % along * stride);
            for output in 0..outputs {
                y[place * outputs + output] = f64::from(bias[output]);
                for tap in 0..row {
                    let (channel, column, line) =
                        (tap % channels, left + tap / channels % kernel, top + tap / channels / kernel);
                    let (Some(line), Some(column)) = (line.checked_sub(padding), column.checked_sub(padding)) else {
                        continue;
                    };
                    if line < height && column < width {
                        let at = ((image * height + line) * width + column) * channels + channel;
                        let w = f64::from(weight[output * row + tap]);
                        y[place * outputs + output] += w * f64::from(x[at]);
                        dx[at] += w * f64::from(dy[place * outputs + output]);
                    }
                }
            }
        }
        let [y, dx] = [y, dx].map(|values| values.iter().map(|v| *v as f32).collect::<Vec<_>>());
        let gpu = soft();
        let layer = cuda::Linear::new(&Values::send(&gpu, &weight), &Values::send(&gpu, &bias), Precision::F32);
        // Rows that are not a multiple of eight are filled up, as layers want them.
        let fill = |rows: &[f32]| -> Vec<f32> {
            rows.chunks(row).flat_map(|row| [row, &vec![0.0; layer.inputs() - row.len()]].concat()).collect()
        };
        let rows = fill(&host(&sizes.unfold(&Values::send(&gpu, &x))));
        let found = host(&layer.forward(&Values::send(&gpu, &rows), Kind::F32));
        assert_near(&format!("{sizes:?}"), &found, &y, 2e-6);
        let d_rows = host(&layer.input_gradient(&Values::send(&gpu, &dy)));
        let d_rows: Vec<f32> = d_rows.chunks(layer.inputs()).flat_map(|from| from[..row].to_vec()).collect();
        let found = host(&sizes.gradient(&Values::send(&gpu, &d_rows)));
        assert_near(&format!("{sizes:?}, gradient"), &found, &dx, 2e-6);
    }
}

/// A block's weights in timm's order.
fn block_weights(shape: cuda::ConvNextShape) -> [Vec<f32>; 9] {
    let cuda::ConvNextShape { channels, hidden, kernel, .. } = shape;
    let scale = 1.0 / (channels as f32).sqrt();
    [
        numbers(channels, 1, 0.5),
        numbers(channels * kernel * kernel, 2, 1.0 / kernel as f32),
        numbers(channels, 3, 0.2),
        numbers(channels, 4, 0.2).iter().map(|v| v + 1.0).collect(),
        numbers(channels, 5, 0.2),
        numbers(hidden * channels, 6, scale),
        numbers(hidden, 7, 0.2),
        numbers(channels * hidden, 8, scale),
        numbers(channels, 9, 0.2),
    ]
}

/// y, dx and the nine gradients on the CPU, in f32.
fn cpu_block(
    shape: cuda::ConvNextShape,
    weights: &[Vec<f32>; 9],
    gelu: cpu::Gelu,
    path: Option<&[f32]>,
    x: &[f32],
    dy: &[f32],
) -> [Vec<f32>; 11] {
    let cuda::ConvNextShape { batch, height, width, channels, hidden, kernel } = shape;
    let shape = cpu::ConvNextShape { batch, height, width, channels, hidden, kernel };
    let slices = cpu::ConvNextWeights::from_array(weights.each_ref().map(|values| &values[..]));
    let packed = cpu::PackedConvNext::new(kernel, &slices, cpu::Precision::F32);
    let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let saved = cpu::convnext_forward(shape, &packed, gelu, 1e-6, path, x, &mut y, cpu::Wanted::Weights).unwrap();
    let mut all = cpu::ConvNextGradients::new(channels, hidden, kernel);
    cpu::convnext_backward(&packed, &saved, dy, &mut dx, Some((x, &mut all)));
    let mut results = vec![y, dx];
    results.extend(all.iter().map(|values| values.to_vec()));
    results.try_into().unwrap()
}

#[test]
fn a_convnext_block_and_all_its_gradients_are_the_cpus() {
    let large = cuda::ConvNextShape { batch: 3, height: 7, width: 5, channels: 24, hidden: 96, kernel: 7 };
    let small = cuda::ConvNextShape { batch: 2, height: 5, width: 9, channels: 40, hidden: 80, kernel: 3 };
    let dropped = [1.25, 0.0, 1.25];
    for (shape, precision, stream, gelu, path, tolerance) in [
        (large, Precision::F32, Kind::F32, (cuda::Gelu::Erf, cpu::Gelu::Erf), None, 4e-6),
        (large, Precision::F32, Kind::F32, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), Some(&dropped), 4e-6),
        (small, Precision::Tf32, Kind::F32, (cuda::Gelu::Quick, cpu::Gelu::Quick), None, 4e-6),
        (large, Precision::Bf16, Kind::F32, (cuda::Gelu::Erf, cpu::Gelu::Erf), Some(&dropped), 0.02),
        (small, Precision::Bf16, Kind::F32, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), None, 0.02),
        (large, Precision::Bf16, Kind::Bf16, (cuda::Gelu::Tanh, cpu::Gelu::Tanh), None, 0.02),
        (large, Precision::Bf16, Kind::Bf16, (cuda::Gelu::Quick, cpu::Gelu::Quick), Some(&dropped), 0.02),
    ] {
        let weights = block_weights(shape);
        let (x, dy) = (numbers(shape.elements(), 20, 1.0), numbers(shape.elements(), 21, 1.0));
        let path = path.map(|factors| &factors[..]);
        let right = cpu_block(shape, &weights, gelu.1, path, &x, &dy);
        let what = format!("{shape:?} {precision:?} {stream:?} {:?} dropped {}", gelu.0, path.is_some());
        let run = |gpu: &Gpu, wanted| {
            let list = cuda::ConvNextWeights::of(weights.each_ref().map(|values| Values::send(gpu, values)));
            let block = cuda::ConvNext::new(shape.kernel, &list, precision);
            let path = path.map(|factors| Values::send(gpu, factors));
            let x = send(gpu, &x, stream);
            let (y, saved) = cuda::convnext_forward(shape, &block, gelu.0, 1e-6, path.as_ref(), &x, wanted);
            let Some(saved) = saved else { return vec![host(&y)] };
            let (dx, gradients) = cuda::convnext_backward(&block, &saved, &send(gpu, &dy, stream), wanted);
            let mut all = vec![host(&y), host(&dx)];
            all.extend(gradients.into_iter().flat_map(|gradients| gradients.in_order()).map(|values| host(&values)));
            all
        };
        let gpu = soft();
        let found = run(&gpu, Wanted::Weights);
        assert_eq!(found.len(), 11);
        for (index, (found, right)) in found.iter().zip(&right).enumerate() {
            assert_near(&format!("{what}, result {index}"), found, right, tolerance);
        }
        // An attack's passes give the same bits, and saved values come back for the next pass.
        assert_eq!(run(&gpu, Wanted::Input), found[..2], "{what}");
        assert_eq!(run(&gpu, Wanted::Nothing), found[..1], "{what}");
        gpu.shuffle_threads(99);
        assert_eq!(run(&gpu, Wanted::Weights), found, "{what}, other order");
    }
}

#[test]
fn a_block_saves_for_its_input_what_that_needs() {
    let shape = cuda::ConvNextShape { batch: 1, height: 4, width: 4, channels: 8, hidden: 32, kernel: 3 };
    let gpu = soft();
    let list = cuda::ConvNextWeights::of(block_weights(shape).map(|values| Values::send(&gpu, &values)));
    let block = cuda::ConvNext::new(shape.kernel, &list, Precision::F32);
    let held = |wanted| {
        let x = Values::send(&gpu, &numbers(shape.elements(), 1, 1.0));
        let before = gpu.usage().0;
        let (y, saved) = cuda::convnext_forward(shape, &block, cuda::Gelu::Erf, 1e-6, None, &x, wanted);
        drop((x, y));
        let held = gpu.usage().0 + 4 * shape.elements() - before;
        drop(saved);
        held
    };
    let (pixels, channels, hidden) = (16, 8, 32);
    assert_eq!(held(Wanted::Nothing), 0);
    // The convolution's output, two numbers of the norm, and the hidden layer before its GELU.
    let input = 4 * pixels * (channels + 2 + hidden);
    assert_eq!(held(Wanted::Input), input);
    // And the inputs of the convolution and of both layers.
    assert_eq!(held(Wanted::Weights), input + 4 * pixels * (2 * channels + hidden));
}
