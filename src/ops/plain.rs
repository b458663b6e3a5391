//! Operations that are Burn's own everywhere but on an NVIDIA GPU, where Burn has none.

use advxl_cuda::RowDistance;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Bool, Int, Tensor, TensorData};

use super::device::Device;
use super::spec::{KeptRows, Places};
use super::tensor::{from_vec, to_vec};

/// See [`crate::ops::cross_entropy`].
pub(crate) fn cross_entropy(logits: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    // [batch, classes] -> [batch]
    -(log_softmax(logits, 1) * targets).sum_dim(1).squeeze_dim(1)
}

/// See [`crate::ops::row_dots`].
pub(crate) fn row_dots(x: Tensor<2>, weights: &Tensor<2>) -> Tensor<1> {
    // [rows, width] -> [rows]
    (x * weights.clone()).sum_dim(1).squeeze_dim(1)
}

/// See [`crate::ops::predictions`].
pub(crate) fn predictions(logits: &Tensor<2>) -> Vec<u32> {
    let classes: Tensor<1, Int> = logits.clone().without_autodiff().argmax(1).squeeze_dim(1);
    let classes = classes.into_data();
    classes.iter::<i64>().map(|class| class as u32).collect()
}

/// See [`crate::ops::select`].
pub(crate) fn select<const D: usize>(x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let device = x.device().without_autodiff();
    x.select(0, indices(rows.iter().copied(), &device))
}

fn indices(rows: impl Iterator<Item = usize>, device: &burn::tensor::Device) -> Tensor<1, Int> {
    let rows: Vec<i64> = rows.map(|row| row as i64).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), device)
}

/// See [`crate::ops::keep`].
pub(crate) fn keep(x: Tensor<3>, kept: &KeptRows) -> Tensor<3> {
    let [batch, patches, width] = x.dims();
    let device = x.device().without_autodiff();
    let count = kept.count();
    let flat = kept.rows.iter().enumerate();
    let flat = flat.map(|(at, patch)| at / count * patches + patch);
    let indices = indices(flat, &device);
    // [batch, patches, width] -> [batch * patches, width] -> [batch, kept, width]
    let rows = x.reshape([batch * patches, width]);
    rows.select(0, indices).reshape([batch, count, width])
}

/// See [`crate::ops::tokens`].
pub(crate) fn tokens(patches: Tensor<3>, class: Option<&Tensor<1>>, places: &Places) -> Tensor<3> {
    let [batch, _, width] = patches.dims();
    let rows = places.table.dims()[0] / width;
    let table: Tensor<2> = places.table.clone().reshape([rows, width]);
    let first = usize::from(places.has_class_row);
    let class_place = places.has_class_row.then(|| table.clone().narrow(0, 0, 1));
    let of_patches = table.narrow(0, first, rows - first);
    let of_patches = match &places.resampling {
        None => of_patches,
        Some(matrix) => matrix.clone().matmul(of_patches),
    };
    let of_patches = match &places.kept {
        None => of_patches.unsqueeze(),
        Some(kept) => {
            let device = of_patches.device().without_autodiff();
            let indices = indices(kept.rows.iter().copied(), &device);
            of_patches
                .select(0, indices)
                .reshape([kept.batch, kept.count(), width])
        }
    };
    let tokens = patches + of_patches;
    let Some(class) = class else {
        return tokens;
    };
    let token: Tensor<3> = class.clone().reshape([1, 1, width]);
    let token = match class_place {
        Some(place) => token + place.unsqueeze(),
        None => token,
    };
    Tensor::cat(vec![token.expand([batch, 1, width]), tokens], 1)
}

/// See [`crate::ops::pool`].
pub(crate) fn pool(x: Tensor<3>, first: usize, end: usize) -> Tensor<3> {
    match end - first {
        1 => x.narrow(1, first, 1),
        count if count == x.dims()[1] => x.mean_dim(1),
        count => x.narrow(1, first, count).mean_dim(1),
    }
}

/// See [`crate::ops::kernel_last`].
pub(crate) fn kernel_last(weight: Tensor<1>, [inputs, pixels]: [usize; 2]) -> Tensor<1> {
    let length = weight.dims()[0];
    let weight = weight.reshape([length / (inputs * pixels), inputs, pixels]);
    // [outputs, inputs, pixels] -> [outputs, pixels, inputs]
    weight.permute([0, 2, 1]).reshape([length])
}

/// See [`crate::ops::replace_rows`].
pub(crate) fn replace_rows(images: Tensor<4>, others: &Tensor<4>, chosen: &[bool]) -> Tensor<4> {
    let mask = TensorData::new(chosen.to_vec(), [chosen.len(), 1, 1, 1]);
    let mask: Tensor<4, Bool> = Tensor::from_data(mask, &images.device());
    let mask = mask.expand(images.dims());
    images.mask_where(mask, others.clone())
}

/// See [`crate::ops::put_rows`].
pub(crate) fn put_rows(images: Tensor<4>, rows: &[usize], others: Tensor<4>) -> Tensor<4> {
    let (shape, device) = (images.dims(), Device::of(&images));
    let pixels = shape[1..].iter().product();
    let (mut images, others) = (to_vec(images), to_vec(others));
    for (row, image) in rows.iter().zip(others.chunks_exact(pixels)) {
        images[row * pixels..][..pixels].copy_from_slice(image);
    }
    from_vec(images, shape, &device)
}

/// See [`crate::ops::momentum`].
pub(crate) fn momentum(
    images: &Tensor<4>,
    ahead: Tensor<4>,
    before: &Tensor<4>,
    share: f64,
) -> Tensor<4> {
    let last = (images.clone() - before.clone()) * (1.0 - share);
    images.clone() + (ahead - images.clone()) * share + last
}

/// See [`crate::ops::finite`].
pub(crate) fn finite(gradient: Tensor<4>) -> Tensor<4> {
    // A sum is finite only if all terms are, and costs less than to look at each.
    let sum = gradient.clone().sum().into_scalar::<f32>();
    match sum.is_finite() {
        true => gradient,
        false => {
            let undefined = gradient.clone().is_nan();
            gradient.mask_fill(undefined, 0.0).clamp(f32::MIN, f32::MAX)
        }
    }
}

/// See [`crate::ops::changed_pixels`].
pub(crate) fn changed_pixels(images: &Tensor<4>, others: &Tensor<4>) -> Vec<usize> {
    let pixels = images.dims()[1..].iter().product();
    let [images, others] = [images, others].map(|images| to_vec(images.clone()));
    let pairs = images.chunks_exact(pixels).zip(others.chunks_exact(pixels));
    pairs
        .map(|(image, other)| image.iter().zip(other).filter(|(a, b)| a != b).count())
        .collect()
}

/// See [`crate::ops::pull_back`].
pub(crate) fn pull_back(
    images: Tensor<4>,
    clean: &Tensor<4>,
    chosen: &[bool],
    share: f32,
) -> Tensor<4> {
    let (shape, device) = (images.dims(), Device::of(&images));
    let pixels = shape[1..].iter().product();
    let (mut images, clean) = (to_vec(images), to_vec(clean.clone()));
    let rows = images
        .chunks_exact_mut(pixels)
        .zip(clean.chunks_exact(pixels))
        .zip(chosen);
    for ((image, clean), _) in rows.filter(|(_, chosen)| **chosen) {
        for (at, clean) in image.iter_mut().zip(clean) {
            *at = clean + (*at - clean) * share;
        }
    }
    from_vec(images, shape, &device)
}

/// See [`crate::ops::embed`].
pub(crate) fn embed(
    ids: &[u32],
    table: Tensor<1>,
    places: &Tensor<1>,
    [count, length, width]: [usize; 3],
) -> Tensor<3> {
    let matrix = |flat: Tensor<1>| -> Tensor<2> {
        let rows = flat.dims()[0] / width;
        flat.reshape([rows, width])
    };
    let table = matrix(table);
    let device = table.device().without_autodiff();
    let rows = table.select(0, indices(ids.iter().map(|id| *id as usize), &device));
    // [count * length, width] -> [count, length, width]
    rows.reshape([count, length, width]) + matrix(places.clone()).narrow(0, 0, length).unsqueeze()
}

/// See [`crate::ops::take`].
pub(crate) fn take(x: Tensor<3>, which: &[usize]) -> Tensor<3> {
    let [count, tokens, width] = x.dims();
    let rows = which.iter().enumerate();
    let rows = rows.map(|(row, place)| row * tokens + place);
    let device = x.device().without_autodiff();
    let x = x.reshape([count * tokens, width]);
    x.select(0, indices(rows, &device))
        .reshape([count, 1, width])
}

/// See [`crate::ops::select_columns`].
pub(crate) fn select_columns(x: Tensor<2>, columns: &[usize]) -> Tensor<2> {
    let device = x.device().without_autodiff();
    x.select(1, indices(columns.iter().copied(), &device))
}

/// See [`crate::ops::project`].
pub(crate) fn project(x: Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
    let inputs = x.dims()[1];
    let outputs = weight.dims()[0] / inputs;
    x.matmul(weight.clone().reshape([inputs, outputs]))
}

/// See [`crate::ops::unit_length`].
pub(crate) fn unit_length(rows: Tensor<2>) -> Tensor<2> {
    let squares = (rows.clone() * rows.clone()).sum_dim(1);
    // As torch.nn.functional.normalize, for rows of zeros.
    rows / squares.sqrt().clamp_min(1e-12)
}

/// See [`crate::ops::row_distances`].
pub(crate) fn row_distances(kind: RowDistance, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
    // [rows, width] -> [rows]
    let sums = |products: Tensor<2>| products.sum_dim(1).squeeze_dim::<1>(1);
    match kind {
        RowDistance::SquaredL2 => {
            let difference = x - y;
            sums(difference.clone() * difference)
        }
        // The square root's slope at 0 is infinite; below the bound the gradient is 0.
        RowDistance::L2 => row_distances(RowDistance::SquaredL2, x, y)
            .clamp_min(1e-24)
            .sqrt(),
        RowDistance::Cosine => -sums(unit_length(x) * unit_length(y)),
        RowDistance::Kl => {
            let (x, y) = (log_softmax(x, 1), log_softmax(y, 1));
            sums(x.clone().exp() * (x - y))
        }
    }
}

/// See [`crate::ops::scaled_similarities`].
pub(crate) fn scaled_similarities(rows: Tensor<2>, texts: &Tensor<2>, scale: f64) -> Tensor<2> {
    unit_length(rows).matmul(texts.clone().transpose()) * scale
}

/// See [`crate::ops::contrastive`].
pub(crate) fn contrastive(images: Tensor<2>, texts: Tensor<2>, log_scale: Tensor<1>) -> Tensor<1> {
    let batch = images.dims()[0];
    let device = images.device().without_autodiff();
    let scale = log_scale.exp().reshape([1, 1]);
    // Row i, column k: image i and text k.
    let similarities = unit_length(images).matmul(texts.transpose()) * scale;
    let own = Tensor::<2>::eye(batch, &device);
    let found = |similarities: Tensor<2>| {
        let own = log_softmax(similarities, 1) * own.clone();
        // [batch, batch] -> [batch]
        own.sum_dim(1).squeeze_dim::<1>(1)
    };
    (found(similarities.clone()) + found(similarities.transpose())) * -0.5
}
