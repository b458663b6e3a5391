//! The same model on `advxl-kernels`: the reference.

use advxl_kernels::{
    AdamW, BlockGradients, BlockShape, BlockWeights, Finish, Gelu, Layout, PackedBlock, Patches, Precision, Wanted,
    block_backward, block_forward, gemm, layer_norm, layer_norm_gradient, pgd, sum_of_rows, sum_of_squares,
};

use crate::vit::{Config, EPS, MEAN, STD};

/// Logits, and the gradients of images and parameters, of the cross entropy summed and times `factor`.
pub struct Gradients {
    pub logits: Vec<f32>,
    pub losses: Vec<f64>,
    pub images: Vec<f32>,
    pub parameters: Vec<Vec<f32>>,
}

pub fn gradients(
    config: &Config,
    p: &[Vec<f32>],
    images: &[f32],
    targets: &[f32],
    gelu: Gelu,
    precision: Precision,
    factor: f32,
) -> Gradients {
    let Config { image, patch, width, heads, classes, depth } = *config;
    let (tokens, hidden) = (config.tokens(), config.hidden());
    let batch = images.len() / (3 * image * image);
    let (rows, length, row) = (batch * (tokens - 1), 3 * patch * patch, tokens * width);
    let patches = Patches { batch, size: image, patch, mean: MEAN, factor: STD.map(|std| 1.0 / std) };
    let product = |sizes, a: (&[f32], Layout), b: (&[f32], Layout), finish: Finish, len: usize| {
        let mut c = vec![0.0; len];
        gemm(sizes, a, b, Precision::F32, finish, &mut c);
        c
    };
    let (plain, turned) = (Layout::Plain, Layout::Transposed);

    let mut cut = vec![0.0; images.len()];
    patches.cut(images, &mut cut);
    let embedded = product([rows, length, width], (&cut, plain), (&p[2], turned), Finish::Bias(&p[3]), rows * width);
    let mut x: Vec<f32> = Vec::with_capacity(batch * row);
    for sample in embedded.chunks(row - width) {
        x.extend(p[0].iter().chain(sample).zip(&p[1]).map(|(value, place)| value + place));
    }
    let shape = BlockShape { batch, tokens, width, heads, hidden };
    let mut saved = Vec::new();
    for index in 0..depth {
        let slices = BlockWeights::from_array(std::array::from_fn(|i| &p[4 + 12 * index + i][..]));
        let block = PackedBlock::new(heads, &slices, precision);
        let mut y = vec![0.0; x.len()];
        let kept = block_forward(shape, &block, gelu, EPS, None, &x, &mut y, Wanted::Weights).expect("wanted");
        saved.push((block, kept));
        x = y;
    }
    let last = p.len() - 4;
    let mut pooled = vec![0.0; batch * width];
    for (sample, to) in x.chunks(row).zip(pooled.chunks_mut(width)) {
        sum_of_rows(&sample[width..], to);
        to.iter_mut().for_each(|v| *v /= (tokens - 1) as f32);
    }
    let mut normed = vec![0.0; pooled.len()];
    layer_norm(&pooled, &p[last], &p[last + 1], EPS, &mut normed);
    let bias = Finish::Bias(&p[last + 3]);
    let logits = product([batch, width, classes], (&normed, plain), (&p[last + 2], turned), bias, batch * classes);

    let (mut losses, mut slope) = (Vec::new(), Vec::new());
    for (logits, targets) in logits.chunks(classes).zip(targets.chunks(classes)) {
        let most = logits.iter().fold(f32::NEG_INFINITY, |most, v| most.max(*v));
        let sum: f64 = logits.iter().map(|v| f64::from(v - most).exp()).sum();
        let loss = |l: &f32, t: &f32| f64::from(*t) * (sum.ln() - f64::from(l - most));
        losses.push(logits.iter().zip(targets).map(|(l, t)| loss(l, t)).sum());
        let of = |l: &f32, t: &f32| factor * ((f64::from(l - most).exp() / sum) as f32 - t);
        slope.extend(logits.iter().zip(targets).map(|(l, t)| of(l, t)));
    }

    let mut all: Vec<Vec<f32>> = p.iter().map(|values| vec![0.0; values.len()]).collect();
    let to_head = product([classes, batch, width], (&slope, turned), (&normed, plain), Finish::Store, classes * width);
    all[last + 2] = to_head;
    sum_of_rows(&slope, &mut all[last + 3]);
    let d_normed =
        product([batch, classes, width], (&slope, plain), (&p[last + 2], plain), Finish::Store, batch * width);
    let mut d_pooled = vec![0.0; pooled.len()];
    let [mut to_weight, mut to_bias] = [(); 2].map(|()| vec![0.0; width]);
    layer_norm_gradient(&pooled, &p[last], EPS, &d_normed, &mut d_pooled, Some((&mut to_weight, &mut to_bias)));
    (all[last], all[last + 1]) = (to_weight, to_bias);
    let mut dx = vec![0.0; x.len()];
    for (from, to) in d_pooled.chunks(width).zip(dx.chunks_mut(row)) {
        let spread = from.iter().map(|v| v / (tokens - 1) as f32);
        to[width..].chunks_mut(width).for_each(|to| to.iter_mut().zip(spread.clone()).for_each(|(to, v)| *to = v));
    }
    for (index, (block, kept)) in saved.iter().enumerate().rev() {
        let (mut found, mut to) = (BlockGradients::new(width, hidden), vec![0.0; dx.len()]);
        block_backward(block, kept, &dx, &mut to, Some(&mut found));
        found.iter().enumerate().for_each(|(i, values)| all[4 + 12 * index + i] = values.to_vec());
        dx = to;
    }
    sum_of_rows(&dx, &mut all[1]);
    all[0] = all[1][..width].to_vec();
    let d_patches: Vec<f32> = dx.chunks(row).flat_map(|sample| sample[width..].to_vec()).collect();
    all[2] = product([width, rows, length], (&d_patches, turned), (&cut, plain), Finish::Store, width * length);
    sum_of_rows(&d_patches, &mut all[3]);
    let d_cut = product([rows, width, length], (&d_patches, plain), (&p[2], plain), Finish::Store, cut.len());
    let mut of_images = vec![0.0; images.len()];
    patches.gradient(&d_cut, &mut of_images);
    Gradients { logits, losses, images: of_images, parameters: all }
}

/// Updates of the model without an attack, the losses and norms before each.
pub fn train(
    config: &Config,
    weights: &mut [Vec<f32>],
    images: &[f32],
    targets: &[f32],
    gelu: Gelu,
    learning_rate: f32,
    count: u64,
) -> Vec<(f32, f64)> {
    let batch = targets.len() / config.classes;
    let mut moments: Vec<_> = weights.iter().map(|p| (vec![0.0; p.len()], vec![0.0; p.len()])).collect();
    let decays = config.parameters();
    let mut all = Vec::new();
    for step in 1..=count {
        let found = gradients(config, weights, images, targets, gelu, Precision::F32, 1.0 / batch as f32);
        let norm = found.parameters.iter().map(|values| sum_of_squares(values)).sum::<f64>().sqrt();
        for (((p, gradient), (first, second)), (_, decays)) in
            weights.iter_mut().zip(&found.parameters).zip(&mut moments).zip(&decays)
        {
            let update = AdamW {
                learning_rate,
                betas: (0.9, 0.95),
                eps: 1e-8,
                weight_decay: if *decays { 0.05 } else { 0.0 },
                step,
                gradient_scale: (1.0 / (norm + 1e-6)).min(1.0) as f32,
                average_decay: 0.99,
            };
            update.update(p, gradient, first, second, None);
        }
        all.push(((found.losses.iter().sum::<f64>() / batch as f64) as f32, norm));
    }
    all
}

/// One step of the linf attack.
pub fn linf_step(x: &mut [f32], gradient: &[f32], origin: &[f32], step: f32, epsilon: f32, batch: usize) {
    pgd::linf_step(x, gradient, origin, &vec![step; batch], epsilon);
}
