//! Patches to tokens and tokens to one vector an image.

use std::sync::Arc;

use advxl_cuda::{Gpu, Kept, Kind, Pool, Tokens, Transposed, Values, matmul};
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::values::{primitive, sent, values};
use crate::ops::node::{Differentiable, parents, record};
use crate::ops::spec::{KeptRows, Places};
use crate::ops::words::Numerics;

fn kept_rows(gpu: &Gpu, kept: &KeptRows, patches: usize) -> Kept {
    Kept::new(gpu, kept.batch, patches, kept.rows)
}

/// See [`crate::ops::keep`].
pub(crate) fn keep(gpu: &Gpu, x: Tensor<3>, kept: &KeptRows) -> Tensor<3> {
    let [batch, patches, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, []);
    let (x, kept) = (values(gpu, &x), Arc::new(kept_rows(gpu, kept, patches)));
    record(parents, |_| {
        let y = primitive(kept.rows(&x, width), &[batch, kept.count(), width]);
        let (gpu, shape) = (gpu.clone(), [batch, patches, width]);
        (y, KeepGradient { gpu, kept, shape })
    })
}

#[derive(Clone, Debug)]
struct KeepGradient {
    gpu: Gpu,
    kept: Arc<Kept>,
    shape: [usize; 3],
}

impl Differentiable for KeepGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dy = sent(&self.gpu, &dy);
        vec![Some(primitive(
            self.kept.rows_gradient(&dy, self.shape[2]),
            &self.shape,
        ))]
    }
}

/// See [`crate::ops::tokens`].
pub(crate) fn tokens(
    gpu: &Gpu,
    patches: Tensor<3>,
    class: Option<&Tensor<1>>,
    places: &Places,
    numerics: Numerics,
) -> Tensor<3> {
    let [batch, count, width] = patches.dims();
    let prefix = usize::from(class.is_some());
    let parents = parents::<Flex, 3>(&patches, [&places.table].into_iter().chain(class));
    let patches = values(gpu, &patches);
    let (table, class) = (
        values(gpu, &places.table),
        class.map(|class| values(gpu, class)),
    );
    let in_table = prefix * usize::from(places.has_class_row) * width;
    let resampling = places.resampling.as_ref().map(|matrix| {
        let [to, from] = matrix.dims();
        Resampling {
            matrix: values(gpu, matrix),
            to,
            from,
        }
    });
    let rows = table.slice(in_table..table.len());
    let rows = match &resampling {
        None => rows,
        Some(resampling) => resampling.apply(&rows, width),
    };
    let all = match (prefix, in_table) {
        (0, _) => rows,
        (_, 0) => Values::joined(&[&Values::zeros(gpu, width, Kind::F32), &rows]),
        _ => Values::joined(&[&table.slice(0..width), &rows]),
    };
    let there = all.len() / width - prefix;
    let kept = places.kept.as_ref();
    let kept = kept.map(|kept| Arc::new(kept_rows(gpu, kept, there)));
    let shape = Tokens {
        tokens: count + prefix,
        width,
        class_token: prefix == 1,
    };
    record(parents, |_| {
        let kept_now = kept.as_deref();
        let y = shape.assemble(&patches, &all, class.as_ref(), kept_now, numerics.stream());
        let saved = TokensGradient {
            gpu: gpu.clone(),
            shape,
            batch,
            kind: patches.kind(),
            kept,
            resampling,
            in_table: in_table > 0,
        };
        (primitive(y, &[batch, count + prefix, width]), saved)
    })
}

#[derive(Clone, Debug)]
struct TokensGradient {
    gpu: Gpu,
    shape: Tokens,
    batch: usize,
    /// Of the patches.
    kind: Kind,
    kept: Option<Arc<Kept>>,
    resampling: Option<Resampling>,
    /// Whether the table's first row is the class token's.
    in_table: bool,
}

/// A matrix that resamples places, `[to, from]`.
#[derive(Clone, Debug)]
struct Resampling {
    matrix: Values,
    to: usize,
    from: usize,
}

impl Resampling {
    fn apply(&self, rows: &Values, width: usize) -> Values {
        matmul(
            &self.matrix,
            rows,
            Transposed::Neither,
            [self.to, self.from, width],
        )
    }

    fn gradient(&self, rows: &Values, width: usize) -> Values {
        matmul(
            &self.matrix,
            rows,
            Transposed::First,
            [self.from, self.to, width],
        )
    }
}

impl Differentiable for TokensGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, wanted: &[bool]) -> Vec<Option<FlexTensor>> {
        let (shape, width) = (self.shape, self.shape.width);
        let dy = sent(&self.gpu, &dy);
        let prefix = usize::from(shape.class_token);
        let count = shape.tokens - prefix;
        let dx = primitive(
            shape.patches_gradient(&dy, self.kind),
            &[self.batch, count, width],
        );
        let mut found = vec![Some(dx)];
        if wanted.len() == 1 {
            return found;
        }
        let all = shape.places_gradient(&dy, self.kept.as_deref());
        let rows = all.slice(prefix * width..all.len());
        let rows = match &self.resampling {
            None => rows,
            Some(resampling) => resampling.gradient(&rows, width),
        };
        let table = match self.in_table {
            true => Values::joined(&[&all.slice(0..width), &rows]),
            false => rows,
        };
        let length = table.len();
        found.push(wanted[1].then(|| primitive(table, &[length])));
        if prefix == 1 {
            found.push(wanted[2].then(|| primitive(all.slice(0..width), &[width])));
        }
        found
    }
}

/// See [`crate::ops::pool`].
pub(crate) fn pool(gpu: &Gpu, x: Tensor<3>, first: usize, end: usize) -> Tensor<3> {
    let [batch, tokens, width] = x.dims();
    let parents = parents::<Flex, 3>(&x, []);
    let x = values(gpu, &x);
    let pool = Pool {
        tokens,
        width,
        first,
        end,
    };
    record(parents, |_| {
        let y = primitive(pool.forward(&x), &[batch, 1, width]);
        let (gpu, kind) = (gpu.clone(), x.kind());
        let saved = PoolGradient {
            gpu,
            pool,
            batch,
            kind,
        };
        (y, saved)
    })
}

#[derive(Clone, Debug)]
struct PoolGradient {
    gpu: Gpu,
    pool: Pool,
    batch: usize,
    /// Of the tokens.
    kind: Kind,
}

impl Differentiable for PoolGradient {
    type Backend = Flex;

    fn backward(self, dy: FlexTensor, _: &[bool]) -> Vec<Option<FlexTensor>> {
        let dx = self.pool.gradient(&sent(&self.gpu, &dy), self.kind);
        let shape = [self.batch, self.pool.tokens, self.pool.width];
        vec![Some(primitive(dx, &shape))]
    }
}
