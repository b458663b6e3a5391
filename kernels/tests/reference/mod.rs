//! A plain f64 block, forward and backward, one loop per formula.
#![allow(dead_code)] // Each test file takes what it needs.

use advxl_kernels::{DepthwiseShape, Gelu};

/// Numbers that look random: the same on every run.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
    }
    /// Between -1 and 1.
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    pub fn vec(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * size).collect()
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// Largest difference, relative to the largest right element (or to 1, if that is smaller).
pub fn worst(found: &[f32], right: &[f64]) -> f64 {
    assert_eq!(found.len(), right.len());
    let size = right.iter().fold(1.0, |size: f64, v| size.max(v.abs()));
    found.iter().zip(right).fold(0.0, |off: f64, (f, r)| {
        let difference = (f64::from(*f) - r).abs() / size;
        if difference.is_nan() { f64::INFINITY } else { off.max(difference) }
    })
}

/// `erf` by its series below 3 and its continued fraction above: about 1e-15.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = 0.0;
        for k in (1..60).rev() {
            fraction = f64::from(k) / 2.0 / (a + fraction);
        }
        1.0 - (-a * a).exp() / (a + fraction) / std::f64::consts::PI.sqrt()
    };
    value.copysign(x)
}

/// GELU and its derivative.
pub fn gelu(x: f64, kind: Gelu) -> (f64, f64) {
    match kind {
        Gelu::Tanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (x + 0.044715 * x * x * x)).tanh();
            let du = c * (1.0 + 3.0 * 0.044715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du)
        }
        Gelu::Erf => {
            let gate = 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            (x * gate, gate + x * density)
        }
        Gelu::Quick => {
            let gate = 1.0 / (1.0 + (-1.702 * x).exp());
            (x * gate, gate + 1.702 * x * gate * (1.0 - gate))
        }
    }
}

/// `y[i] = W x[i] + b` for every row.
pub fn linear(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let (out, inp) = (bias.len(), weight.len() / bias.len().max(1));
    let mut y = Vec::new();
    for row in x.chunks_exact(inp) {
        for o in 0..out {
            y.push(bias[o] + row.iter().zip(&weight[o * inp..]).map(|(a, b)| a * b).sum::<f64>());
        }
    }
    y
}

/// Gradients of [`linear`]: input, weight, bias.
pub fn linear_gradients(x: &[f64], weight: &[f64], dy: &[f64], out: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let inp = weight.len() / out;
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; out]);
    for (row, dy) in dy.chunks_exact(out).enumerate() {
        for o in 0..out {
            db[o] += dy[o];
            for i in 0..inp {
                dx[row * inp + i] += dy[o] * weight[o * inp + i];
                dw[o * inp + i] += dy[o] * x[row * inp + i];
            }
        }
    }
    (dx, dw, db)
}

/// Normalized rows and inverse deviations.
pub fn normalize(x: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut inverse) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
        inverse.push(1.0 / (variance + 1e-6).sqrt());
        out.extend(row.iter().map(|v| (v - mean) / (variance + 1e-6).sqrt()));
    }
    (out, inverse)
}

/// Gradients of a norm with weight `g`: input, weight, bias.
pub fn norm_gradients(x: &[f64], g: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let width = g.len();
    let (hat, inverse) = normalize(x, width);
    let (mut dx, mut dg, mut db) = (Vec::new(), vec![0.0; width], vec![0.0; width]);
    for ((hat, dy), inverse) in hat.chunks_exact(width).zip(dy.chunks_exact(width)).zip(inverse) {
        let d: Vec<f64> = dy.iter().zip(g).map(|(a, b)| a * b).collect();
        let mean = d.iter().sum::<f64>() / width as f64;
        let along = d.iter().zip(hat).map(|(a, b)| a * b).sum::<f64>() / width as f64;
        for i in 0..width {
            dx.push(inverse * (d[i] - mean - hat[i] * along));
            dg[i] += dy[i] * hat[i];
            db[i] += dy[i];
        }
    }
    (dx, dg, db)
}

/// Attention probabilities and output of one sample, `qkv` being `[tokens, 3, heads, head_dim]`.
pub fn attention(qkv: &[f64], tokens: usize, heads: usize, head_dim: usize) -> (Vec<f64>, Vec<f64>) {
    let width = heads * head_dim;
    let at = |token: usize, which: usize, head: usize, i: usize| {
        qkv[token * 3 * width + which * width + head * head_dim + i]
    };
    let mut p = vec![0.0; heads * tokens * tokens];
    let mut out = vec![0.0; tokens * width];
    for h in 0..heads {
        for a in 0..tokens {
            let row = &mut p[(h * tokens + a) * tokens..][..tokens];
            for (b, score) in row.iter_mut().enumerate() {
                *score = (0..head_dim).map(|i| at(a, 0, h, i) * at(b, 1, h, i)).sum::<f64>() / (head_dim as f64).sqrt();
            }
            let largest = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v));
            row.iter_mut().for_each(|v| *v = (*v - largest).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|v| *v /= sum);
            for i in 0..head_dim {
                out[a * width + h * head_dim + i] = (0..tokens).map(|b| row[b] * at(b, 2, h, i)).sum();
            }
        }
    }
    (p, out)
}

/// Gradient of [`attention`].
pub fn attention_gradient(qkv: &[f64], dout: &[f64], tokens: usize, heads: usize, head_dim: usize) -> Vec<f64> {
    let width = heads * head_dim;
    let (p, _) = attention(qkv, tokens, heads, head_dim);
    let index =
        |token: usize, which: usize, head: usize, i: usize| token * 3 * width + which * width + head * head_dim + i;
    let mut d = vec![0.0; qkv.len()];
    let scale = 1.0 / (head_dim as f64).sqrt();
    for h in 0..heads {
        for a in 0..tokens {
            let p = &p[(h * tokens + a) * tokens..][..tokens];
            let dout = &dout[a * width + h * head_dim..][..head_dim];
            let dp: Vec<f64> =
                (0..tokens).map(|b| (0..head_dim).map(|i| dout[i] * qkv[index(b, 2, h, i)]).sum()).collect();
            let along: f64 = p.iter().zip(&dp).map(|(a, b)| a * b).sum();
            for b in 0..tokens {
                let ds = p[b] * (dp[b] - along) * scale;
                for i in 0..head_dim {
                    d[index(b, 2, h, i)] += p[b] * dout[i];
                    d[index(a, 0, h, i)] += ds * qkv[index(b, 1, h, i)];
                    d[index(b, 1, h, i)] += ds * qkv[index(a, 0, h, i)];
                }
            }
        }
    }
    d
}

/// Weights in the order of `BlockWeights`.
pub struct Block {
    pub tokens: usize,
    pub heads: usize,
    pub gelu: Gelu,
    pub parts: Vec<Vec<f64>>,
}

/// Everything a backward pass wants.
struct Steps {
    norm1: Vec<f64>,
    qkv: Vec<f64>,
    attended: Vec<f64>,
    x1: Vec<f64>,
    norm2: Vec<f64>,
    hidden: Vec<f64>,
    after: Vec<f64>,
    y: Vec<f64>,
}

impl Block {
    pub fn new(tokens: usize, heads: usize, gelu: Gelu, parts: Vec<Vec<f64>>) -> Self {
        Self { tokens, heads, gelu, parts }
    }

    fn width(&self) -> usize {
        self.parts[0].len()
    }

    fn norm(&self, x: &[f64], part: usize) -> Vec<f64> {
        let width = self.width();
        let (hat, _) = normalize(x, width);
        let (g, b) = (&self.parts[part], &self.parts[part + 1]);
        hat.iter().enumerate().map(|(i, v)| v * g[i % width] + b[i % width]).collect()
    }

    fn add(&self, x: &[f64], branch: &[f64], scale: &[f64]) -> Vec<f64> {
        let size = self.tokens * self.width();
        x.iter().zip(branch).enumerate().map(|(i, (x, b))| x + scale[i / size] * b).collect()
    }

    fn steps(&self, x: &[f64], scale: &(Vec<f64>, Vec<f64>)) -> Steps {
        let (p, width) = (&self.parts, self.width());
        let norm1 = self.norm(x, 0);
        let qkv = linear(&norm1, &p[2], &p[3]);
        let attended: Vec<f64> = qkv
            .chunks_exact(self.tokens * 3 * width)
            .flat_map(|qkv| attention(qkv, self.tokens, self.heads, width / self.heads).1)
            .collect();
        let x1 = self.add(x, &linear(&attended, &p[4], &p[5]), &scale.0);
        let norm2 = self.norm(&x1, 6);
        let hidden = linear(&norm2, &p[8], &p[9]);
        let after: Vec<f64> = hidden.iter().map(|&h| gelu(h, self.gelu).0).collect();
        let y = self.add(&x1, &linear(&after, &p[10], &p[11]), &scale.1);
        Steps { norm1, qkv, attended, x1, norm2, hidden, after, y }
    }

    pub fn forward(&self, x: &[f64], scale: &(Vec<f64>, Vec<f64>)) -> Vec<f64> {
        self.steps(x, scale).y
    }

    /// Output, gradient of the input, gradients of the parts.
    pub fn gradients(
        &self,
        x: &[f64],
        scale: &(Vec<f64>, Vec<f64>),
        dy: &[f64],
    ) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
        let (p, width) = (&self.parts, self.width());
        let size = self.tokens * width;
        let zeros = |d: &[f64]| vec![0.0; d.len()];
        let step = self.steps(x, scale);
        let scaled = |d: &[f64], scale: &[f64]| -> Vec<f64> {
            self.add(&zeros(d), d, scale).into_iter().take(size * scale.len()).collect()
        };
        let (d_after, dw2, db2) = linear_gradients(&step.after, &p[10], &scaled(dy, &scale.1), width);
        let d_hidden: Vec<f64> = d_after.iter().zip(&step.hidden).map(|(d, &h)| d * gelu(h, self.gelu).1).collect();
        let (d_norm2, dw1, db1) = linear_gradients(&step.norm2, &p[8], &d_hidden, p[9].len());
        let (through, dg2, dn2) = norm_gradients(&step.x1, &p[6], &d_norm2);
        let d_x1: Vec<f64> = dy.iter().zip(through).map(|(a, b)| a + b).collect();
        let (d_attended, dwp, dbp) = linear_gradients(&step.attended, &p[4], &scaled(&d_x1, &scale.0), width);
        let d_qkv: Vec<f64> = step
            .qkv
            .chunks_exact(3 * size)
            .zip(d_attended.chunks_exact(size))
            .flat_map(|(qkv, d)| attention_gradient(qkv, d, self.tokens, self.heads, width / self.heads))
            .collect();
        let (d_norm1, dwq, dbq) = linear_gradients(&step.norm1, &p[2], &d_qkv, 3 * width);
        let (through, dg1, dn1) = norm_gradients(x, &p[0], &d_norm1);
        let dx = d_x1.iter().zip(through).map(|(a, b)| a + b).collect();
        (step.y, dx, vec![dg1, dn1, dwq, dbq, dwp, dbp, dg2, dn2, dw1, db1, dw2, db2])
    }
}

/// Calls `f` with output, input and weight of every product of a depthwise convolution.
fn for_each_tap(shape: DepthwiseShape, mut f: impl FnMut(usize, usize, usize)) {
    let DepthwiseShape { batch, height, width, channels, kernel } = shape;
    for (line, x) in (0..batch * height).flat_map(|line| (0..width).map(move |x| (line, x))) {
        for (ky, kx) in (0..kernel).flat_map(|ky| (0..kernel).map(move |kx| (ky, kx))) {
            let (y, column) = (line % height + ky, x + kx);
            let half = kernel / 2;
            if y >= half && y < height + half && column >= half && column < width + half {
                for c in 0..channels {
                    let from = ((line + ky - half) * width + column - half) * channels + c;
                    f((line * width + x) * channels + c, from, (c * kernel + ky) * kernel + kx);
                }
            }
        }
    }
}

/// `y = convolution(x) + bias`, one kernel a channel.
pub fn depthwise(shape: DepthwiseShape, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let mut y: Vec<f64> = (0..x.len()).map(|i| bias[i % bias.len()]).collect();
    for_each_tap(shape, |to, from, tap| y[to] += x[from] * weight[tap]);
    y
}

/// Gradients of [`depthwise`]: input, weight, bias.
pub fn depthwise_gradients(
    shape: DepthwiseShape,
    x: &[f64],
    weight: &[f64],
    dy: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; shape.channels]);
    for_each_tap(shape, |to, from, tap| {
        dx[from] += dy[to] * weight[tap];
        dw[tap] += dy[to] * x[from];
    });
    dy.iter().enumerate().for_each(|(i, d)| db[i % shape.channels] += d);
    (dx, dw, db)
}

/// A ConvNeXt block, weights in the order of `ConvNextWeights`.
pub struct ConvNext {
    pub shape: DepthwiseShape,
    pub gelu: Gelu,
    pub parts: Vec<Vec<f64>>,
}

impl ConvNext {
    /// Output of the convolution, of the norm, hidden layer before and after the GELU, output of fc2.
    fn steps(&self, x: &[f64]) -> [Vec<f64>; 5] {
        let (p, width) = (&self.parts, self.shape.channels);
        let convolved = depthwise(self.shape, x, &p[1], &p[2]);
        let (hat, _) = normalize(&convolved, width);
        let normed: Vec<f64> = hat.iter().enumerate().map(|(i, v)| v * p[3][i % width] + p[4][i % width]).collect();
        let hidden = linear(&normed, &p[5], &p[6]);
        let after: Vec<f64> = hidden.iter().map(|&h| gelu(h, self.gelu).0).collect();
        let branch = linear(&after, &p[7], &p[8]);
        [convolved, normed, hidden, after, branch]
    }

    fn sample(&self) -> usize {
        self.shape.height * self.shape.width * self.shape.channels
    }

    pub fn forward(&self, x: &[f64], scale: &[f64]) -> Vec<f64> {
        let [.., branch] = self.steps(x);
        let of =
            |(i, x): (usize, &f64)| x + scale[i / self.sample()] * self.parts[0][i % self.shape.channels] * branch[i];
        x.iter().enumerate().map(of).collect()
    }

    /// Output, gradient of the input, gradients of the parts.
    pub fn gradients(&self, x: &[f64], scale: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
        let (p, width) = (&self.parts, self.shape.channels);
        let [convolved, normed, hidden, after, branch] = self.steps(x);
        let mut d_gamma = vec![0.0; width];
        let mut d_branch = Vec::new();
        for (i, dy) in dy.iter().enumerate() {
            d_gamma[i % width] += dy * scale[i / self.sample()] * branch[i];
            d_branch.push(dy * scale[i / self.sample()] * p[0][i % width]);
        }
        let (d_after, dw2, db2) = linear_gradients(&after, &p[7], &d_branch, width);
        let d_hidden: Vec<f64> = d_after.iter().zip(&hidden).map(|(d, &h)| d * gelu(h, self.gelu).1).collect();
        let (d_normed, dw1, db1) = linear_gradients(&normed, &p[5], &d_hidden, p[6].len());
        let (d_convolved, dg, dn) = norm_gradients(&convolved, &p[3], &d_normed);
        let (through, dw, db) = depthwise_gradients(self.shape, x, &p[1], &d_convolved);
        let dx = dy.iter().zip(through).map(|(a, b)| a + b).collect();
        (self.forward(x, scale), dx, vec![d_gamma, dw, db, dg, dn, dw1, db1, dw2, db2])
    }
}
