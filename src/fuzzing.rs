//! Gives the fuzz targets (`fuzz/`) access to private parsers. Not part of the public interface.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::result;

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

use crate::data::shards::index as shard_index;
use crate::data::shards::index::ShardIndex;
use crate::error::Result;
use crate::eval::session;
use crate::image::{Examined, Fault, View, decode};
use crate::storage::pattern;
use crate::storage::store::Object;
use crate::train::checkpoint;

/// Decodes a picture of at most `most_pixels` pixels.
pub fn examine(bytes: &[u8], most_pixels: usize, view: View) -> result::Result<Examined, Fault> {
    decode::decode_up_to(bytes, most_pixels, view)
}

/// The first bytes of a saved index.
pub const INDEX_MAGIC: &[u8; 8] = shard_index::MAGIC;
/// Sizes in bytes of a saved index's header and of each entry.
pub const INDEX_SIZES: [usize; 2] = [shard_index::HEADER, shard_index::ENTRY];

/// Reads the saved index of a tar.
pub fn shard_index(bytes: &[u8], tar: &Object) -> Option<ShardIndex> {
    ShardIndex::read(bytes, tar)
}

/// Expands the braces of a shard pattern to names, without looking for files.
pub fn shard_names(pattern: &str) -> Result<Vec<String>> {
    let parts = pattern::split_outside_braces(pattern).into_iter();
    let names = parts.map(|part| pattern::braces(part.trim(), pattern));
    Ok(names.collect::<Result<Vec<_>>>()?.concat())
}

/// Reads a checkpoint and returns its number of counters.
pub fn checkpoint(bytes: &[u8]) -> Result<usize> {
    let counters = checkpoint::parse(bytes, Path::new("checkpoint"))??;
    Ok(counters.len())
}

/// Returns a checkpoint of one tensor with a valid hash and arbitrary counters.
pub fn sealed_checkpoint(mut counters: BTreeMap<String, String>, tensor: &[u8]) -> Vec<u8> {
    let view = TensorView::new(Dtype::U8, vec![tensor.len()], tensor);
    let view = view.expect("the bytes have their own length");
    let parts = || std::iter::once(("weights.norm", view.clone()));
    counters.insert("hash".into(), checkpoint::hash(&counters, parts()));
    let counters = serde_json::to_string(&counters).expect("strings are JSON");
    let metadata = HashMap::from([(checkpoint::HEADER.to_owned(), counters)]);
    serialize(parts(), Some(metadata)).expect("the tensor has its shape")
}

/// Reads the progress file of an evaluation and writes it again.
pub fn progress(bytes: &[u8]) -> Option<Vec<u8>> {
    session::Saved::read(bytes).map(|saved| saved.to_bytes())
}

/// Returns the hash that advxl's files contain.
pub fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}
