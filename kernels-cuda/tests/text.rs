//! Token embeddings and the token that is taken of each sample, on the software GPU.

mod support;

use advxl_cuda::{self as cuda, Gpu, Kind, Values};
use support::{assert_near, host, in_any_order, numbers, rounded, soft};

fn send(gpu: &Gpu, values: &[f32], kind: Kind) -> Values {
    Values::send(gpu, values).cast(kind)
}

#[test]
fn tokens_are_rows_of_the_table_plus_their_places_and_gradients_go_back_there() {
    // The second has one token often enough for several sums.
    for (batch, tokens, rows, width) in [(3, 5, 11, 16), (70, 7, 4, 8), (1, 1, 1, 24)] {
        let ids: Vec<u32> = (0..batch * tokens).map(|i| ((i * i + i / 3) % rows.min(9)) as u32).collect();
        let ids: Vec<u32> = ids.iter().map(|id| if batch == 70 && *id != 3 { 2 } else { *id }).collect();
        assert!(batch != 70 || ids.iter().filter(|id| **id == 2).count() > 257);
        let (table, places) = (numbers(rows * width, 1, 1.0), numbers(tokens * width, 2, 1.0));
        for kind in [Kind::F32, Kind::Bf16] {
            let d = numbers(batch * tokens * width, 3, 1.0);
            let d = if kind == Kind::Bf16 { rounded(&d) } else { d };
            let found = in_any_order(|gpu| {
                let [table, places] = [&table, &places].map(|values| Values::send(gpu, values));
                let (x, saved) = cuda::embed(&ids, &table, &places, width, kind);
                let (d_table, d_places) = cuda::embed_gradient(&saved, &send(gpu, &d, kind));
                [x, d_table, d_places].iter().flat_map(host).collect()
            });
            let (mut x, mut d_table, mut d_places) = (Vec::new(), vec![0f64; rows * width], vec![0f64; tokens * width]);
            for (position, id) in ids.iter().enumerate() {
                let (row, place) = (*id as usize * width, position % tokens * width);
                for i in 0..width {
                    x.push(table[row + i] + places[place + i]);
                    d_table[row + i] += f64::from(d[position * width + i]);
                    d_places[place + i] += f64::from(d[position * width + i]);
                }
            }
            let x = if kind == Kind::Bf16 { rounded(&x) } else { x };
            let (of_x, rest) = found.split_at(x.len());
            assert_eq!(of_x, x);
            let sums: Vec<f32> = d_table.iter().chain(&d_places).map(|v| *v as f32).collect();
            assert_near(&format!("{batch} x {tokens} {kind:?}"), rest, &sums, 1e-6);
            let unused = (0..rows).filter(|row| !ids.contains(&(*row as u32)));
            unused.for_each(|row| assert!(rest[row * width..][..width].iter().all(|v| *v == 0.0)));
        }
    }
}

#[test]
#[should_panic(expected = "id 4, the table 4 rows")]
fn an_id_without_a_row_is_a_mistake_of_the_caller() {
    let gpu = soft();
    let [table, places] = [32, 16].map(|len| Values::zeros(&gpu, len, Kind::F32));
    cuda::embed(&[0, 4], &table, &places, 8, Kind::F32);
}

#[test]
fn the_taken_token_and_its_gradient_are_where_they_belong() {
    let (batch, tokens, width) = (4, 9, 16);
    let which = [8, 0, 3, 3];
    let (x, dy) = (rounded(&numbers(batch * tokens * width, 1, 1.0)), rounded(&numbers(batch * width, 2, 1.0)));
    let mut taken = Vec::new();
    let mut dx = vec![0.0; x.len()];
    for (sample, token) in which.iter().enumerate() {
        let at = (sample * tokens + token) * width;
        taken.extend_from_slice(&x[at..at + width]);
        dx[at..at + width].copy_from_slice(&dy[sample * width..][..width]);
    }
    for kind in [Kind::F32, Kind::Bf16] {
        let found = in_any_order(|gpu| {
            let y = cuda::take_rows(&send(gpu, &x, kind), tokens, width, &which);
            let back = cuda::take_rows_gradient(&send(gpu, &dy, kind), tokens, width, &which);
            assert_eq!((y.kind(), back.kind()), (kind, kind));
            [host(&y), host(&back)].concat()
        });
        assert_eq!(found, [&taken[..], &dx].concat(), "{kind:?}");
    }
}
