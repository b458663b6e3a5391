//! Images of bytes, sent to a GPU as they are.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::ops::device::Device;
use crate::ops::tensor::from_vec;

/// Images of bytes on a GPU, in `[0, 1]`: they cross the bus as bytes.
///
/// Four in a word, which every device has; the floats come from a table, and so are those of the processor to the bit.
pub(crate) fn from_bytes<const D: usize>(
    bytes: &[u8],
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let burn = device.burn().without_autodiff();
    let words: Vec<i32> = bytes
        .chunks(4)
        .map(|four| {
            let mut word = [0; 4];
            word[..four.len()].copy_from_slice(four);
            i32::from_le_bytes(word)
        })
        .collect();
    let count = words.len();
    let words: Tensor<1, Int> =
        Tensor::from_data(TensorData::new(words, [count]), (&burn, DType::I32));
    let byte = |shift: i32| {
        words
            .clone()
            .bitwise_right_shift_scalar(shift)
            .bitwise_and_scalar(255)
    };
    // [words] each -> [words, 4], in the order of the bytes
    let places: Tensor<2, Int> = Tensor::stack([0, 8, 16, 24].map(byte).to_vec(), 1);
    let places = places.reshape([4 * count]).narrow(0, 0, bytes.len());
    let table: Vec<f32> = (0..=u8::MAX).map(|byte| f32::from(byte) / 255.0).collect();
    let table: Tensor<1> = from_vec(table, [256], device);
    table.select(0, places).reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::to_vec;

    #[test]
    fn bytes_become_the_floats_of_the_processor_to_the_bit() {
        let bytes: Vec<u8> = (0..=u8::MAX).rev().take(3 * 5 * 5).collect();
        let found = from_bytes(&bytes, [1, 3, 5, 5], &Device::cpu());
        let right: Vec<f32> = bytes.iter().map(|byte| f32::from(*byte) / 255.0).collect();
        assert_eq!(to_vec(found), right);
    }
}
