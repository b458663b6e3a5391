//! A vision transformer made of the crate's operations: what the program's model does on a GPU, step for step.

use advxl_cuda::{
    AdamW, Block, BlockSaved, BlockShape, BlockWeights, Gelu, Gpu, Kind, Linear, NormSaved, Parameter, Patches, Pool,
    Precision, Result, Tokens, Values, Wanted, block_backward, block_forward, cross_entropy, layer_norm,
    layer_norm_gradient, pgd, right, sum_of_squares, total,
};

/// Sizes of a model. Class token, learned positions, average of the patches' tokens, as timm with `global_pool="avg"`.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub image: usize,
    pub patch: usize,
    pub width: usize,
    pub depth: usize,
    pub heads: usize,
    pub classes: usize,
}

pub const EPS: f32 = 1e-6;
pub const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
pub const STD: [f32; 3] = [0.229, 0.224, 0.225];

impl Config {
    pub fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2) + 1
    }

    pub fn hidden(&self) -> usize {
        4 * self.width
    }

    /// Lengths of all parameters, in timm's order, and whether weight decay applies.
    pub fn parameters(&self) -> Vec<(usize, bool)> {
        let (w, h) = (self.width, self.hidden());
        let mut all = vec![(w, false), (self.tokens() * w, false), (w * 3 * self.patch.pow(2), true), (w, false)];
        let block = [w, w, 3 * w * w, 3 * w, w * w, w, w, w, h * w, h, w * h, w];
        for _ in 0..self.depth {
            all.extend(block.iter().enumerate().map(|(i, len)| (*len, [2, 4, 8, 10].contains(&i))));
        }
        all.extend([(w, false), (w, false), (self.classes * w, true), (self.classes, false)]);
        all
    }

    /// Random weights of sensible sizes, the same for every machine.
    pub fn weights(&self, seed: u64) -> Vec<Vec<f32>> {
        let mut draw = crate::numbers(seed);
        let per_block = 12;
        let of_block = |index: usize| (4..4 + self.depth * per_block).contains(&index).then(|| (index - 4) % per_block);
        let last = 4 + self.depth * per_block;
        let norm = |index: usize| matches!(of_block(index), Some(0 | 6)) || index == last;
        let lens = self.parameters();
        lens.iter()
            .enumerate()
            .map(|(index, (len, matrix))| {
                let deviation = match matrix {
                    true => 1.0 / (*len as f32 / self.width as f32).min(self.width as f32).sqrt() * 0.7,
                    false => 0.05,
                };
                let middle = if norm(index) { 1.0 } else { 0.0 };
                (0..*len).map(|_| middle + deviation * draw()).collect()
            })
            .collect()
    }
}

/// How a pass computes.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    pub gelu: Gelu,
    /// Format of the residual stream.
    pub stream: Kind,
}

/// A model on a GPU.
pub struct Vit {
    pub config: Config,
    precision: Precision,
    gpu: Gpu,
    pub parameters: Vec<Values>,
    mean: Values,
    factor: Values,
    ready: Ready,
}

/// Weights as the products want them, made once per update.
struct Ready {
    patch: Linear,
    blocks: Vec<Block>,
    head: Linear,
}

/// What a forward pass leaves for the backward pass.
pub struct Saved {
    patches: Patches,
    cut: Option<Values>,
    blocks: Vec<BlockSaved>,
    norm: NormSaved,
    normed: Values,
    mode: Mode,
}

impl Vit {
    pub fn new(gpu: &Gpu, config: Config, precision: Precision, weights: &[Vec<f32>]) -> Self {
        let parameters: Vec<_> = weights.iter().map(|values| Values::send(gpu, values)).collect();
        let mean = Values::send(gpu, &MEAN);
        let factor = Values::send(gpu, &STD.map(|std| 1.0 / std));
        let ready = Self::ready(&config, precision, &parameters);
        Self { config, precision, gpu: gpu.clone(), parameters, mean, factor, ready }
    }

    fn ready(config: &Config, precision: Precision, p: &[Values]) -> Ready {
        let block = |index: usize| {
            let list: [Values; 12] = p[4 + 12 * index..][..12].to_vec().try_into().expect("twelve");
            Block::new(config.heads, &BlockWeights::of(list), precision)
        };
        let last = p.len() - 4;
        // The head is f32 as on the CPU: its logits decide.
        let of_head = if precision == Precision::Bf16 { Precision::F32 } else { precision };
        Ready {
            patch: Linear::new(&p[2], &p[3], precision),
            blocks: (0..config.depth).map(block).collect(),
            head: Linear::new(&p[last + 2], &p[last + 3], of_head),
        }
    }

    /// After the parameters changed.
    pub fn refresh(&mut self) {
        self.ready = Self::ready(&self.config, self.precision, &self.parameters);
    }

    pub fn prepare(&self, batch: usize) -> Result<()> {
        self.shape(batch).prepare(&self.gpu, self.precision)
    }

    fn shape(&self, batch: usize) -> BlockShape {
        let Config { width, heads, .. } = self.config;
        BlockShape { batch, tokens: self.config.tokens(), width, heads, hidden: self.config.hidden(), causal: false }
    }

    fn tokens(&self) -> Tokens {
        Tokens { tokens: self.config.tokens(), width: self.config.width, class_token: true }
    }

    fn pool(&self) -> Pool {
        let tokens = self.config.tokens();
        Pool { tokens, width: self.config.width, first: 1, end: tokens }
    }

    /// Logits `[batch, classes]`.
    pub fn forward(&self, images: &Values, mode: Mode, wanted: Wanted) -> (Values, Option<Saved>) {
        let Config { image, patch, .. } = self.config;
        let (kind, p) = (self.precision.kind(), &self.parameters);
        let batch = images.len() / (3 * image * image);
        let patches = Patches { batch, size: image, patch, mean: self.mean.clone(), factor: self.factor.clone() };
        let cut = patches.cut(images, kind);
        let embedded = self.ready.patch.forward(&cut, kind);
        let mut x = self.tokens().assemble(&embedded, &p[1], Some(&p[0]), None, mode.stream);
        drop(embedded);
        let mut blocks = Vec::new();
        for block in &self.ready.blocks {
            let (y, saved) = block_forward(self.shape(batch), block, mode.gelu, EPS, None, &x, wanted);
            blocks.extend(saved);
            x = y;
        }
        let last = p.len() - 4;
        let (normed, norm) = layer_norm(&self.pool().forward(&x), &p[last], &p[last + 1], EPS, Kind::F32);
        let logits = self.ready.head.forward(&normed, Kind::F32);
        let cut = (wanted == Wanted::Weights).then_some(cut);
        let saved = (wanted != Wanted::Nothing).then_some(Saved { patches, cut, blocks, norm, normed, mode });
        (logits, saved)
    }

    /// The gradient of the images.
    pub fn input_gradient(&self, mut saved: Saved, d_logits: &Values) -> Values {
        let mut dx = self.through_head(&saved, d_logits, false).0;
        for block in self.ready.blocks.iter().rev() {
            let saved = saved.blocks.pop().expect("one a block");
            dx = block_backward(block, &saved, &dx, Wanted::Input).0;
        }
        let d_patches = self.tokens().patches_gradient(&dx, self.precision.kind());
        saved.patches.gradient(&self.ready.patch.input_gradient(&d_patches))
    }

    /// The gradients of all parameters, in their order.
    pub fn gradients(&self, mut saved: Saved, d_logits: &Values) -> Vec<Values> {
        let (mut dx, of_end) = self.through_head(&saved, d_logits, true);
        let mut of_blocks = Vec::new();
        for block in self.ready.blocks.iter().rev() {
            let saved = saved.blocks.pop().expect("one a block");
            let (to, gradients) = block_backward(block, &saved, &dx, Wanted::Weights);
            of_blocks.push(gradients.expect("wanted").in_order());
            dx = to;
        }
        let (tokens, width) = (self.tokens(), self.config.width);
        let places = tokens.places_gradient(&dx, None);
        let d_patches = tokens.patches_gradient(&dx, self.precision.kind());
        let cut = saved.cut.as_ref().expect("saved for the weights");
        let patch = &self.ready.patch;
        let mut all = vec![places.part(0..width), places];
        all.extend([patch.weight_gradient(cut, &d_patches), patch.bias_gradient(&d_patches)]);
        all.extend(of_blocks.into_iter().rev().flatten());
        all.extend(of_end);
        all
    }

    fn through_head(&self, saved: &Saved, d_logits: &Values, parameters: bool) -> (Values, Vec<Values>) {
        let (head, p) = (&self.ready.head, &self.parameters);
        let d_normed = head.input_gradient(d_logits);
        let (d_pooled, of_norm) = layer_norm_gradient(&saved.norm, &p[p.len() - 4], &d_normed, None, parameters);
        let of_end = of_norm.map(|(weight, bias)| {
            vec![weight, bias, head.weight_gradient(&saved.normed, d_logits), head.bias_gradient(d_logits)]
        });
        (self.pool().gradient(&d_pooled, saved.mode.stream), of_end.unwrap_or_default())
    }
}

/// The state of training.
pub struct Training {
    pub model: Vit,
    first: Vec<Values>,
    second: Vec<Values>,
    average: Vec<Values>,
    step: u64,
}

/// Images, targets and labels of a step, on the GPU.
pub struct Batch {
    pub images: Values,
    pub targets: Values,
    pub labels: Values,
    pub keys: Vec<u64>,
}

/// What a step brings to the host.
#[derive(Clone, Copy, Debug)]
pub struct Metrics {
    pub loss: f32,
    pub gradient_norm: f64,
    pub right: f32,
}

/// How a step is made.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub attack_steps: usize,
    pub epsilon: f32,
    pub step_size: f32,
    pub learning_rate: f32,
    pub attack: Mode,
    pub update: Mode,
}

impl Training {
    pub fn new(model: Vit) -> Self {
        let zeros = || model.parameters.iter().map(|p| Values::zeros(&model.gpu, p.len(), Kind::F32)).collect();
        let (first, second, average) = (zeros(), zeros(), model.parameters.clone());
        Self { model, first, second, average, step: 0 }
    }

    /// The adversarial images of a batch.
    pub fn attack(&self, batch: &Batch, recipe: &Recipe, seed: u64) -> Values {
        let (model, classes) = (&self.model, self.model.config.classes);
        let draws = pgd::Draws { seed, purpose: 5, keys: &batch.keys, sub_key: 0 };
        let mut images = pgd::linf_start(&batch.images, &draws, recipe.epsilon);
        let steps = Values::send(&model.gpu, &vec![recipe.step_size; batch.keys.len()]);
        for _ in 0..recipe.attack_steps {
            let (logits, saved) = model.forward(&images, recipe.attack, Wanted::Input);
            let (_, slope) = cross_entropy(&logits, &batch.targets, classes, 1.0);
            let gradient = model.input_gradient(saved.expect("wanted"), &slope);
            pgd::linf_step(&mut images, &gradient, &batch.images, &steps, recipe.epsilon);
        }
        images
    }

    /// One step of adversarial training.
    pub fn step(&mut self, batch: &Batch, recipe: &Recipe, seed: u64) -> Result<Metrics> {
        let images = self.attack(batch, recipe, seed);
        let (gpu, classes) = (self.model.gpu.clone(), self.model.config.classes);
        let (logits, saved) = self.model.forward(&images, recipe.update, Wanted::Weights);
        let (losses, slope) = cross_entropy(&logits, &batch.targets, classes, 1.0 / batch.keys.len() as f32);
        let (loss, hits) = (total(&losses), total(&right(&logits, &batch.labels, classes)));
        let gradients = self.model.gradients(saved.expect("wanted"), &slope);
        let gradient_norm = sum_of_squares(&gpu, &gradients.iter().collect::<Vec<_>>())?.sqrt();
        self.step += 1;
        let update = AdamW {
            learning_rate: recipe.learning_rate,
            betas: (0.9, 0.95),
            eps: 1e-8,
            step: self.step,
            gradient_scale: (1.0 / (gradient_norm + 1e-6)).min(1.0) as f32,
            average_decay: 0.99,
        };
        let decays = self.model.config.parameters();
        let mut parameters: Vec<_> = (self.model.parameters.iter_mut().zip(&gradients).zip(&decays))
            .zip(self.first.iter_mut().zip(&mut self.second).zip(&mut self.average))
            .map(|(((weights, gradient), (_, decays)), ((first, second), average))| {
                let weight_decay = if *decays { 0.05 } else { 0.0 };
                Parameter { weights, gradient, first, second, average: Some(average), weight_decay }
            })
            .collect();
        update.update(&gpu, &mut parameters);
        self.model.refresh();
        let loss = loss.to_vec()?[0] / batch.keys.len() as f32;
        Ok(Metrics { loss, gradient_norm, right: hits.to_vec()?[0] })
    }
}
