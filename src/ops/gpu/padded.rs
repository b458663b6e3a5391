//! Matrix products with sides padded to what a GPU reads fast.

use burn::tensor::{DType, Tensor};

use crate::ops::words::Precision;

/// Rows and columns of what a GPU multiplies are padded to multiples of this: it then reads several numbers at a time,
/// of bf16 too.
const ALIGNMENT: usize = 8;

/// A product of matrices; operands are rounded to bf16 if that is the precision, and the result is f32.
///
/// Operands are padded with zeros, so that this product and those of its backward pass, whose inner sides are the outer
/// ones here, are fast. (And right: SwiftShader returns wrong products where inner sides are not multiples of 4.)
pub(crate) fn product<const D: usize>(
    precision: Precision,
    a: Tensor<D>,
    b: Tensor<D>,
) -> Tensor<D> {
    let (rows, columns) = (a.dims()[D - 2], b.dims()[D - 1]);
    let [a, b] = [a, b].map(|operand| pad(pad(operand, D - 2), D - 1));
    let product = match precision {
        Precision::F32 | Precision::Tf32 => a.matmul(b),
        Precision::Bf16 => {
            let [a, b] = [a, b].map(|operand| operand.cast(DType::BF16));
            a.matmul(b).cast(DType::F32)
        }
    };
    truncate(truncate(product, D - 2, rows), D - 1, columns)
}

/// Appends zeros along an axis, to a multiple of [`ALIGNMENT`].
pub(crate) fn pad<const D: usize>(tensor: Tensor<D>, axis: usize) -> Tensor<D> {
    let mut shape = tensor.dims();
    let missing = shape[axis].next_multiple_of(ALIGNMENT) - shape[axis];
    if missing == 0 {
        return tensor;
    }
    shape[axis] = missing;
    let zeros = Tensor::zeros(shape, &tensor.device());
    Tensor::cat(vec![tensor, zeros], axis)
}

/// The first `length` along an axis.
pub(crate) fn truncate<const D: usize>(tensor: Tensor<D>, axis: usize, length: usize) -> Tensor<D> {
    if tensor.dims()[axis] == length {
        tensor
    } else {
        tensor.narrow(axis, 0, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Device, from_vec, to_vec};

    #[test]
    fn a_padded_product_is_the_product() {
        let matrix = |rows: usize, columns: usize| {
            let values = (0..rows * columns).map(|i| (i % 7) as f32 - 3.0).collect();
            from_vec(values, [rows, columns], &Device::cpu())
        };
        for [rows, inner, columns] in [[8, 16, 8], [3, 5, 9], [1, 8, 7]] {
            let (a, b) = (matrix(rows, inner), matrix(inner, columns));
            let found = product(Precision::F32, a.clone(), b.clone());
            assert_eq!(found.dims(), [rows, columns]);
            // Small whole numbers: every sum is exact.
            assert_eq!(to_vec(found), to_vec(a.matmul(b)));
        }
    }
}
