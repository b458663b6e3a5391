//! Tokens of text: rows of a table and their places, and one token of each sample.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Text;
use crate::rows::{blocks_for, check_eights, same_gpu, sum_of_rows};
use crate::values::Values;

/// Positions that one sum takes before sums are summed: a token that fills a batch must not keep one thread busy.
const LIST: usize = 256;

/// What [`embed_gradient`] needs of [`embed`]: the tokens' ids.
#[derive(Clone, Debug)]
pub struct EmbedSaved {
    ids: Vec<u32>,
    width: usize,
    /// Rows of the table, and tokens of a sample.
    rows: usize,
    tokens: usize,
}

/// Token embeddings plus their places: `table[ids] + places`, in `kind`.
///
/// Shapes: `ids` `[batch, tokens]`; `table` `[rows, width]` and `places` `[tokens, width]` in f32; the result
/// `[batch, tokens, width]`.
///
/// # Panics
///
/// If the lengths do not match, `width` is not a multiple of 8, or the table has no row for an id.
pub fn embed(ids: &[u32], table: &Values, places: &Values, width: usize, kind: Kind) -> (Values, EmbedSaved) {
    check_eights("a token", width);
    for (name, values) in [("table", table), ("places", places)] {
        let whole = values.kind() == Kind::F32 && width > 0 && values.len().is_multiple_of(width);
        assert!(whole, "`{name}` is {values:?}, not whole rows of {width} in f32");
    }
    let (gpu, rows, tokens) = (table.gpu(), table.len() / width, places.len() / width);
    same_gpu(gpu, &[places]);
    assert!(tokens > 0 && ids.len().is_multiple_of(tokens), "{} ids, samples of {tokens} tokens", ids.len());
    if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
        panic!("a token has id {id}, the table {rows} rows");
    }
    let x = Values::new(gpu, ids.len() * width, kind);
    let sent = send(gpu, ids.iter().map(|id| *id as usize));
    let (name, count) = (format!("embed_{}", kind.suffix()), x.len() as u64);
    let (n, columns) = (tokens as i32, width as i32);
    // SAFETY: the lengths were checked above, and every id has a row.
    unsafe { launch!(gpu, Text, &name, blocks_for(x.len()), 256, 0, &x, table, places, &sent, count, n, columns) };
    (x, EmbedSaved { ids: ids.to_vec(), width, rows, tokens })
}

/// The gradients of [`embed`]'s table and places from that of its result, in f32. Rows of the table without a token get
/// zeros; tokens of the same id are summed in the order of the batch.
///
/// # Panics
///
/// If `d` does not have the length of the forward pass.
pub fn embed_gradient(saved: &EmbedSaved, d: &Values) -> (Values, Values) {
    let EmbedSaved { ids, width, rows, tokens } = saved;
    assert!(d.len() == ids.len() * width, "`d` is {d:?}, the result had {} numbers", ids.len() * width);
    let gpu = d.gpu();
    let table = Values::zeros(gpu, rows * width, Kind::F32);
    // Positions by id, in lists of at most LIST; then the lists of each id.
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|position| ids[*position]);
    let (mut bounds, mut lists, mut which) = (vec![0], vec![0], Vec::new());
    for group in order.chunk_by(|a, b| ids[*a] == ids[*b]) {
        for list in group.chunks(LIST) {
            bounds.push(bounds[bounds.len() - 1] + list.len());
        }
        lists.push(bounds.len() - 1);
        which.push(ids[group[0]] as usize);
    }
    let sums = Values::new(gpu, (bounds.len() - 1) * width, Kind::F32);
    let [order, bounds, lists, to] = [order, bounds, lists, which.clone()].map(|list| send(gpu, list.into_iter()));
    let name = format!("sum_lists_{}", d.kind().suffix());
    let (count, columns) = (which.len() * width, *width as i32);
    // SAFETY: every list names positions of `d`, the lists of an id are in order, and every id has a row of its own.
    unsafe {
        let all = sums.len();
        launch!(gpu, Text, &name, blocks_for(all), 256, 0, &sums, d, &order, &bounds, None, all as u64, columns);
        launch!(
            gpu,
            Text,
            "sum_lists_f32",
            blocks_for(count),
            256,
            0,
            &table,
            &sums,
            None,
            &lists,
            &to,
            count as u64,
            columns
        );
    }
    (table, sum_of_rows(d, tokens * width))
}

/// One token of each sample, such as the end-of-text token.
///
/// Shapes: `x` `[batch, tokens, width]`; `which` `[batch]`, below `tokens`; the result `[batch, width]`, in the format of `x`.
///
/// # Panics
///
/// If the lengths do not match, or `width` is not a multiple of 8.
pub fn take_rows(x: &Values, tokens: usize, width: usize, which: &[usize]) -> Values {
    check_taken(tokens, width, which);
    let right = which.len() * tokens * width;
    assert!(x.len() == right, "`x` is {x:?}, {} samples of {tokens} tokens need {right}", which.len());
    let taken = Values::new(x.gpu(), which.len() * width, x.kind());
    launch_take("take", &taken, x, which, tokens, width);
    taken
}

/// The gradient of [`take_rows`]' `x` from that of its result, in its format: zeros for the tokens that were not taken.
///
/// # Panics
///
/// If the lengths do not match, or `width` is not a multiple of 8.
pub fn take_rows_gradient(dy: &Values, tokens: usize, width: usize, which: &[usize]) -> Values {
    check_taken(tokens, width, which);
    let right = which.len() * width;
    assert!(dy.len() == right, "`dy` is {dy:?}, {} samples need {right}", which.len());
    let dx = Values::new(dy.gpu(), which.len() * tokens * width, dy.kind());
    launch_take("take_gradient", &dx, dy, which, tokens, width);
    dx
}

fn check_taken(tokens: usize, width: usize, which: &[usize]) {
    check_eights("a token", width);
    if let Some(token) = which.iter().find(|token| **token >= tokens) {
        panic!("token {token} of samples of {tokens} tokens");
    }
}

fn launch_take(what: &str, to: &Values, from: &Values, which: &[usize], tokens: usize, width: usize) {
    let sent = send(from.gpu(), which.iter().copied());
    let name = format!("{what}_{}", from.kind().suffix());
    let (grid, count) = (blocks_for(to.len()), to.len() as u64);
    // SAFETY: the caller checked the lengths, and that every sample has its token.
    unsafe { launch!(from.gpu(), Text, &name, grid, 256, 0, to, from, &sent, count, tokens as i32, width as i32) };
}

/// Whole numbers as the kernels take them.
fn send(gpu: &Gpu, numbers: impl Iterator<Item = usize>) -> Values {
    let number = |number: usize| i32::try_from(number).expect("fewer than 2^31 tokens").to_le_bytes();
    Values::send_bytes(gpu, &numbers.flat_map(number).collect::<Vec<u8>>())
}
