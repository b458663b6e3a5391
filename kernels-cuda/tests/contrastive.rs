//! The contrastive loss, rows of length 1 and cross entropy's gradient on the software GPU against definitions in f64.

mod support;

use advxl_cuda::{self as cuda, Gpu, Values};
use support::{assert_near, host, in_any_order, numbers, soft};

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn unit(rows: &[f64], width: usize) -> Vec<f64> {
    let length = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
    rows.chunks(width).flat_map(|row| row.iter().map(|v| v / length(row)).collect::<Vec<_>>()).collect()
}

/// `contrastive` of `src/loss.rs`.
fn losses(images: &[f64], texts: &[f64], log_scale: f64, width: usize) -> Vec<f64> {
    let batch = images.len() / width;
    let units = unit(images, width);
    let logit = |i: usize, k: usize| {
        let pairs = units[i * width..][..width].iter().zip(&texts[k * width..][..width]);
        pairs.map(|(a, b)| a * b).sum::<f64>() * log_scale.exp()
    };
    let table: Vec<f64> = (0..batch * batch).map(|at| logit(at / batch, at % batch)).collect();
    let log_sum = |of: &dyn Fn(usize) -> f64| {
        let most = (0..batch).map(of).fold(f64::MIN, f64::max);
        most + (0..batch).map(|k| (of(k) - most).exp()).sum::<f64>().ln()
    };
    let loss = |i: usize| {
        let own = table[i * batch + i];
        let (row, column) = (log_sum(&|k| table[i * batch + k]), log_sum(&|k| table[k * batch + i]));
        -0.5 * ((own - row) + (own - column))
    };
    (0..batch).map(loss).collect()
}

fn case(batch: usize, width: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let images = numbers(batch * width, 1, 3.0);
    let texts = unit(&wide(&numbers(batch * width, 2, 1.0)), width).iter().map(|v| *v as f32).collect();
    (images, texts, numbers(batch, 3, 1.0))
}

/// Losses, and the gradients of images, texts and scale.
fn on_gpu(gpu: &Gpu, batch: usize, width: usize, log_scale: f32) -> Vec<f32> {
    let (images, texts, upstream) = case(batch, width);
    let [images, texts, upstream] = [images, texts, upstream].map(|values| Values::send(gpu, &values));
    let log_scale = Values::send(gpu, &[log_scale]);
    let (losses, saved) = cuda::contrastive(&images, &texts, &log_scale, width);
    let (alone, nothing) = cuda::contrastive_gradient(saved.clone(), &upstream, false);
    assert!(nothing.is_none());
    let (d_images, others) = cuda::contrastive_gradient(saved, &upstream, true);
    assert_eq!(host(&alone), host(&d_images));
    let (d_texts, d_scale) = others.unwrap();
    [losses, d_images, d_texts, d_scale].iter().flat_map(host).collect()
}

#[test]
fn the_contrastive_loss_and_its_gradients_are_those_of_the_definition() {
    for (batch, width, log_scale) in [(1, 3, 0.5), (5, 6, 2.0), (9, 8, 4.6), (40, 5, 1.0), (70, 24, 3.0), (300, 7, 4.6)]
    {
        let found = in_any_order(|gpu| on_gpu(gpu, batch, width, log_scale));
        let (images, texts, upstream) = case(batch, width);
        let (images, texts, upstream) = (wide(&images), wide(&texts), wide(&upstream));
        let scale = f64::from(log_scale);
        let right: Vec<f32> = losses(&images, &texts, scale, width).iter().map(|v| *v as f32).collect();
        assert_near(&format!("losses of {batch}"), &found[..batch], &right, 2e-6);
        // Slopes by differences of the definition in f64.
        let value = |images: &[f64], texts: &[f64], scale: f64| -> f64 {
            losses(images, texts, scale, width).iter().zip(&upstream).map(|(loss, d)| loss * d).sum()
        };
        let slope = |of: &dyn Fn(f64) -> f64| ((of(1e-4) - of(-1e-4)) / 2e-4) as f32;
        let moved = |values: &[f64], at: usize, by: f64| {
            let mut values = values.to_vec();
            values[at] += by;
            values
        };
        let len = batch * width;
        // A few of many.
        let places: Vec<usize> = (0..len).step_by((len / 12).max(1)).collect();
        let (mut of_found, mut of_right) = (Vec::new(), Vec::new());
        for at in &places {
            of_found.push(found[batch + at]);
            of_right.push(slope(&|by| value(&moved(&images, *at, by), &texts, scale)));
        }
        assert_near(&format!("images of {batch}"), &of_found, &of_right, 1e-4);
        (of_found, of_right) = (Vec::new(), Vec::new());
        for at in &places {
            of_found.push(found[batch + len + at]);
            of_right.push(slope(&|by| value(&images, &moved(&texts, *at, by), scale)));
        }
        assert_near(&format!("texts of {batch}"), &of_found, &of_right, 1e-4);
        let of_scale = slope(&|by| value(&images, &texts, scale + by));
        assert!((found[batch + 2 * len] - of_scale).abs() <= 1e-4 * of_scale.abs().max(1.0), "scale of {batch}");
    }
}

#[test]
fn embeddings_that_are_all_alike_cost_the_logarithm_of_the_batch() {
    let gpu = soft();
    let same: Vec<f32> = [0.6, 0.8].repeat(5);
    let images: Vec<f32> = same.iter().map(|v| v * 3.0).collect();
    let [images, texts, scale] = [&images[..], &same, &[2.0]].map(|values| Values::send(&gpu, values));
    let (losses, _) = cuda::contrastive(&images, &texts, &scale, 2);
    assert!(host(&losses).iter().all(|loss| (loss - 5f32.ln()).abs() < 1e-6));
}

#[test]
fn rows_of_length_one_and_their_gradient_are_those_of_the_definition() {
    for (rows, width) in [(9, 5), (3, 64), (17, 100)] {
        let mut x = numbers(rows * width, 1, 3.0);
        x[width..2 * width].fill(0.0); // As torch's normalize: zeros stay.
        let dy = numbers(rows * width, 2, 1.0);
        let found = in_any_order(|gpu| {
            let (y, saved) = cuda::unit_length(&Values::send(gpu, &x), width);
            let dx = cuda::unit_length_gradient(&saved, &Values::send(gpu, &dy));
            [host(&y), host(&dx)].concat()
        });
        let y: Vec<f32> = unit(&wide(&x), width).iter().map(|v| *v as f32).collect();
        assert_near("y", &found[..rows * width], &y, 1e-6);
        for row in (0..rows).filter(|row| *row != 1) {
            let part = row * width..(row + 1) * width;
            let (x, dy) = (wide(&x[part.clone()]), wide(&dy[part]));
            let length = x.iter().map(|v| v * v).sum::<f64>().sqrt();
            let along = x.iter().zip(&dy).map(|(a, b)| a * b).sum::<f64>() / length / length;
            let right: Vec<f32> = x.iter().zip(&dy).map(|(x, d)| ((d - x * along) / length) as f32).collect();
            assert_near("dx", &found[(rows + row) * width..][..width], &right, 2e-6);
        }
        let zeros = &found[(rows + 1) * width..][..width];
        assert_near("dx of zeros", zeros, &dy[width..2 * width].iter().map(|v| v * 1e12).collect::<Vec<_>>(), 1e-6);
    }
}

#[test]
fn cross_entropy_in_two_passes_is_that_of_one() {
    let (rows, classes) = (5, 37);
    let (logits, targets) = (numbers(rows * classes, 1, 3.0), numbers(rows * classes, 2, 0.2));
    let targets: Vec<f32> = targets.iter().map(|v| v.abs()).collect();
    let found = in_any_order(|gpu| {
        let [l, t] = [&logits, &targets].map(|values| Values::send(gpu, values));
        let (losses, slopes) = cuda::cross_entropy(&l, &t, classes, 0.25);
        assert_eq!(host(&losses), host(&cuda::cross_entropy_losses(&l, &t, classes)));
        let same = cuda::cross_entropy_gradient(&l, &t, classes, &Values::send(gpu, &[0.25; 5]));
        assert_eq!(host(&slopes), host(&same));
        host(&cuda::cross_entropy_gradient(&l, &t, classes, &Values::send(gpu, &[0.25, -1.0, 0.0, 2.0, 0.5])))
    });
    let gpu = soft();
    let [l, t] = [&logits, &targets].map(|values| Values::send(&gpu, values));
    let one = host(&cuda::cross_entropy(&l, &t, classes, 1.0).1);
    let right: Vec<f32> = (one.chunks(classes).zip([0.25, -1.0, 0.0, 2.0, 0.5]))
        .flat_map(|(row, d)| row.iter().map(move |v| v * d).collect::<Vec<_>>())
        .collect();
    assert_near("slopes", &found, &right, 1e-6);
}
