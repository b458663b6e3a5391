//! Norms, GELUs, sums and layers of widths that the fast kernels do not take, on the software GPU against
//! `advxl-kernels`.

mod support;

use advxl_cuda::{self as cuda, Gelu, Gpu, Kind, Precision, Values, Wanted};
use advxl_kernels as cpu;
use support::{assert_near, host, in_any_order, numbers, rounded, soft};

fn send(gpu: &Gpu, values: &[f32], kind: Kind) -> Values {
    Values::send(gpu, values).cast(kind)
}

#[test]
fn norms_of_any_width_and_their_gradients_are_the_cpus() {
    // Formats of the input and of the result.
    let (f32s, mixed, bf16s) = ((Kind::F32, Kind::F32), (Kind::F32, Kind::Bf16), (Kind::Bf16, Kind::Bf16));
    for (rows, width, (stream, kind)) in [
        (5, 2056, f32s),
        (11, 2304, mixed),
        (9, 4096, bf16s),
        (2, 8192, f32s),
        (1, 16_384, mixed),
        (2, 2048, f32s),
        (19, 6, f32s),
        (3, 5, f32s),
        (10, 37, f32s),
        (3, 2999, f32s),
    ] {
        let round = |values: Vec<f32>, kind| if kind == Kind::Bf16 { rounded(&values) } else { values };
        let x: Vec<f32> = numbers(rows * width, 1, 2.0).iter().map(|v| v + 3.0).collect();
        let (x, residual) = (round(x, stream), round(numbers(rows * width, 5, 1.0), stream));
        let dy = round(numbers(rows * width, 2, 1.0), kind);
        let (weight, bias) = (numbers(width, 3, 1.0), numbers(width, 4, 1.0));
        let found = in_any_order(|gpu| {
            let [w, b] = [&weight, &bias].map(|v| Values::send(gpu, v));
            let (y, saved) = cuda::layer_norm(&send(gpu, &x, stream), &w, &b, 1e-5, kind);
            assert_eq!(y.kind(), kind);
            let residual = send(gpu, &residual, stream);
            let dy = send(gpu, &dy, kind);
            let (dx, sums) = cuda::layer_norm_gradient(&saved, &w, &dy, Some(&residual), true);
            let (alone, nothing) = cuda::layer_norm_gradient(&saved, &w, &dy, None, false);
            assert!(nothing.is_none());
            let (to_weight, to_bias) = sums.unwrap();
            [y, dx, alone, to_weight, to_bias].iter().flat_map(host).collect()
        });
        let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; rows * width]);
        let [mut to_weight, mut to_bias] = [(); 2].map(|()| vec![0.0; width]);
        cpu::layer_norm(&x, &weight, &bias, 1e-5, &mut y);
        cpu::layer_norm_gradient(&x, &weight, 1e-5, &dy, &mut dx, Some((&mut to_weight, &mut to_bias)));
        let with: Vec<f32> = dx.iter().zip(&residual).map(|(a, b)| a + b).collect();
        let tolerance = |kind| if kind == Kind::Bf16 { 1.0 / 256.0 } else { 3e-6 };
        let parts = found.chunks(rows * width).collect::<Vec<_>>();
        let what = format!("{rows} rows of {width}, {stream:?} to {kind:?}");
        assert_near(&format!("y, {what}"), parts[0], &y, tolerance(kind));
        assert_near(&format!("dx and residual, {what}"), parts[1], &with, tolerance(stream));
        assert_near(&format!("dx, {what}"), parts[2], &dx, tolerance(stream));
        let sums = &found[3 * rows * width..];
        assert_near(&format!("weight, {what}"), &sums[..width], &to_weight, 3e-6);
        assert_near(&format!("bias, {what}"), &sums[width..], &to_bias, 3e-6);
    }
}

#[test]
fn a_wide_block_with_dropped_paths_is_the_one_without_where_all_stay() {
    // With a path the norm adds the branch itself.
    let shape = cuda::BlockShape { batch: 2, tokens: 1, width: 2056, heads: 257, hidden: 8, causal: false };
    let width = shape.width;
    let gpu = soft();
    let lens = [
        width,
        width,
        3 * width * width,
        3 * width,
        width * width,
        width,
        width,
        width,
        8 * width,
        8,
        8 * width,
        width,
    ];
    let mut seed = 0;
    let weights = lens.map(|len| {
        seed += 1;
        Values::send(&gpu, &numbers(len, seed, 0.05))
    });
    let x = Values::send(&gpu, &numbers(shape.elements(), 20, 1.0));
    let block = cuda::Block::new(shape.heads, &cuda::BlockWeights::of(weights), Precision::F32);
    let ones = Values::send(&gpu, &[1.0; 2]);
    let run = |path| {
        let (y, saved) = cuda::block_forward(shape, &block, Gelu::Erf, 1e-6, path, &x, Wanted::Input);
        let (dx, _) = cuda::block_backward(&block, &saved.unwrap(), &x, Wanted::Input);
        [host(&y), host(&dx)].concat()
    };
    assert_near("with a path", &run(Some((&ones, &ones))), &run(None), 2e-6);
}

#[test]
fn elementwise_work_takes_any_length() {
    for (rows, width) in [(1, 13), (21, 5), (7, 8), (300, 11), (4, 1)] {
        let len = rows * width;
        let (x, dy) = (numbers(len, 1, 2.0), numbers(len, 2, 1.0));
        let found = in_any_order(|gpu| {
            let (x, dy) = (Values::send(gpu, &x), Values::send(gpu, &dy));
            let (dx, sums) = cuda::gelu_gradient(Gelu::Erf, &x, &dy, width, true);
            let halves = x.cast(Kind::Bf16);
            let all = [
                cuda::gelu(Gelu::Erf, &x),
                dx,
                sums.unwrap(),
                cuda::add(&x, &dy),
                halves.cast(Kind::F32),
                cuda::add(&halves, &halves),
                cuda::sum_of_rows(&x, width),
            ];
            all.iter().flat_map(host).collect()
        });
        let [mut y, mut dx] = [(); 2].map(|()| vec![0.0; len]);
        let [mut sums, mut of_x] = [(); 2].map(|()| vec![0.0; width]);
        cpu::gelu(cpu::Gelu::Erf, &x, &mut y);
        cpu::gelu_gradient(cpu::Gelu::Erf, &x, &dy, &mut dx);
        cpu::sum_of_rows(&dx, &mut sums);
        cpu::sum_of_rows(&x, &mut of_x);
        let sum = x.iter().zip(&dy).map(|(a, b)| a + b).collect();
        let halves = rounded(&x);
        let twice = halves.iter().map(|v| v + v).collect();
        let right: Vec<f32> = [y, dx, sums, sum, halves, twice, of_x].concat();
        assert_near(&format!("{rows} rows of {width}"), &found, &right, 2e-6);
    }
}

#[test]
fn layers_take_rows_of_any_length() {
    let gpu = soft();
    for (rows, inputs, outputs) in [(5, 27, 10), (3, 1, 3), (4, 20, 16), (2, 8, 7)] {
        let (x, dy) = (rounded(&numbers(rows * inputs, 1, 1.0)), rounded(&numbers(rows * outputs, 2, 1.0)));
        let (weight, bias) = (rounded(&numbers(outputs * inputs, 3, 1.0)), rounded(&numbers(outputs, 4, 1.0)));
        let sum = |count: usize, of: &dyn Fn(usize) -> f32| (0..count).map(|k| f64::from(of(k))).sum::<f64>() as f32;
        let grid = |rows: usize, columns: usize, of: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
            (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).map(|(r, c)| of(r, c)).collect()
        };
        let y = grid(rows, outputs, &|r, o| bias[o] + sum(inputs, &|k| x[r * inputs + k] * weight[o * inputs + k]));
        let dx = grid(rows, inputs, &|r, i| sum(outputs, &|k| dy[r * outputs + k] * weight[k * inputs + i]));
        let dw = grid(outputs, inputs, &|o, i| sum(rows, &|k| dy[k * outputs + o] * x[k * inputs + i]));
        for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
            if precision == Precision::Bf16 && outputs % 8 != 0 {
                continue;
            }
            let kind = precision.kind();
            let layer = cuda::Linear::new(&Values::send(&gpu, &weight), &Values::send(&gpu, &bias), precision);
            assert_eq!((layer.columns(), layer.outputs()), (inputs, outputs));
            let padded = layer.pad(&Values::send(&gpu, &x));
            assert_eq!(padded.len(), rows * layer.inputs());
            let dy = send(&gpu, &dy, kind);
            assert_near("y", &host(&layer.forward(&padded, Kind::F32)), &y, 1e-6);
            let found = layer.crop(&layer.input_gradient(&dy));
            assert_near("dx", &host(&found), &dx, if kind == Kind::Bf16 { 1.0 / 256.0 } else { 1e-6 });
            assert_near("dw", &host(&layer.weight_gradient(&padded, &dy)), &dw, 1e-6);
        }
    }
}
