//! Images of bytes, MixUp and CutMix on the software GPU against plain loops.

#![allow(missing_docs)]

mod support;

use advxl_cuda::mixing::{Mix, images_of_bytes, mix, targets};
use advxl_cuda::{Values, evaluation};
use support::{host, in_any_order, pixels, soft};

#[test]
fn bytes_become_the_cpus_numbers_to_the_bit() {
    for len in [0, 1, 15, 16, 17, 147, 256, 5000] {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 167 % 256) as u8).collect();
        let right: Vec<f32> = bytes.iter().map(|byte| f32::from(*byte) / 255.0).collect();
        assert_eq!(in_any_order(|gpu| host(&images_of_bytes(gpu, &bytes))), right);
    }
    let all: Vec<u8> = (0..=255).collect();
    let found = host(&images_of_bytes(&soft(), &all));
    assert!(found.iter().zip(all).all(|(found, byte)| found.to_bits() == (f32::from(byte) / 255.0).to_bits()));
}

/// As the CPU blends: pairs of counterparts at once.
fn blend(images: &mut [f32], len: usize, share: f32) {
    let pairs = images.len() / len / 2;
    let (front, back) = images.split_at_mut(pairs * len);
    for (image, other) in front.chunks_exact_mut(len).zip(back.rchunks_exact_mut(len)) {
        for (one, two) in image.iter_mut().zip(other) {
            (*one, *two) = (*one * share + *two * (1.0 - share), *two * share + *one * (1.0 - share));
        }
    }
}

/// As the CPU cuts: rectangles of counterparts are exchanged.
fn cut(images: &mut [f32], size: usize, [left, right, top, bottom]: [usize; 4]) {
    let len = 3 * size * size;
    let pairs = images.len() / len / 2;
    let (front, back) = images.split_at_mut(pairs * len);
    for (image, other) in front.chunks_exact_mut(len).zip(back.rchunks_exact_mut(len)) {
        let lines = image.chunks_exact_mut(size).zip(other.chunks_exact_mut(size));
        for (line, (one, two)) in lines.enumerate() {
            if (top..bottom).contains(&(line % size)) {
                one[left..right].swap_with_slice(&mut two[left..right]);
            }
        }
    }
}

#[test]
fn images_are_mixed_with_their_counterparts_as_on_the_cpu() {
    for (batch, size) in [(4, 8), (5, 7), (1, 4), (3, 24), (2, 1)] {
        let images = pixels(batch * 3 * size * size, 1);
        let counterpart = |image: usize| batch - 1 - image;
        for share in [0.3, 0.0, 1.0, 1e-7] {
            let mut right = images.clone();
            blend(&mut right, 3 * size * size, share);
            let mixes: Vec<Mix> = (0..batch).map(|image| Mix::Blend { with: counterpart(image), share }).collect();
            assert_eq!(in_any_order(|gpu| host(&mix(&Values::send(gpu, &images), size, &mixes))), right);
        }
        for edges in
            [[0, size, 0, size], [size / 2, size, 0, size / 2], [0, 0, 0, size], [1.min(size), size, size, size]]
        {
            let mut right_images = images.clone();
            cut(&mut right_images, size, edges);
            let [left, right, top, bottom] = edges;
            let mixes: Vec<Mix> =
                (0..batch).map(|image| Mix::Cut { with: counterpart(image), left, right, top, bottom }).collect();
            assert_eq!(in_any_order(|gpu| host(&mix(&Values::send(gpu, &images), size, &mixes))), right_images);
        }
    }
}

#[test]
fn parts_of_a_batch_are_mixed_apart() {
    let (size, len) = (6, 3 * 6 * 6);
    let images = pixels(7 * len, 2);
    let mut right = images.clone();
    blend(&mut right[len..3 * len], len, 0.25);
    cut(&mut right[3 * len..6 * len], size, [1, 4, 2, 6]);
    let square = |with| Mix::Cut { with, left: 1, right: 4, top: 2, bottom: 6 };
    let mixes = [
        Mix::Alone,
        Mix::Blend { with: 2, share: 0.25 },
        Mix::Blend { with: 1, share: 0.25 },
        square(5),
        square(4),
        square(3),
        Mix::Alone,
    ];
    let gpu = soft();
    let sent = Values::send(&gpu, &images);
    assert_eq!(host(&mix(&sent, size, &mixes)), right);
    assert_eq!(host(&sent), images);
    assert_eq!(evaluation::changed_pixels(&mix(&sent, size, &[Mix::Alone; 7]), &sent, 7).unwrap(), [0; 7]);
}

#[test]
fn targets_are_those_that_the_host_would_send() {
    let (first, second, share) = ([2, 0, 4, 1], [2, 3, 4, 0], [1.0, 0.7, 0.3, 0.25f32]);
    let (classes, rest, hot) = (5, 0.02f32, 0.9f32);
    let mut right = vec![rest; 20];
    for (row, values) in right.chunks_mut(classes).enumerate() {
        values[first[row] as usize] += hot * share[row];
        values[second[row] as usize] += hot * (1.0 - share[row]);
    }
    assert_eq!(in_any_order(|gpu| host(&targets(gpu, [&first, &second], &share, classes, rest, hot))), right);
}
