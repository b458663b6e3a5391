//! Tar files, their saved indexes, and captions in JSON.

use std::fs;

use advxl::data::shards::Shards;
use advxl::data::shards::index::{ShardIndex, fault_of};
use advxl::data::shards::tar;
use advxl::data::shards::tar::TarEntry;
use advxl::fuzzing;
use advxl::fuzzing::INDEX_SIZES;
use advxl::storage::cache::use_cache;
use advxl::storage::store::{Location, Object};

use crate::scratch;

const BLOCK: usize = 512;

/// Scans a tar unmodified, then with the checksums of all headers corrected, which are rarely valid by chance.
pub fn tar(data: &[u8]) {
    scanned(data);
    let mut sealed = data.to_vec();
    for block in sealed.chunks_exact_mut(BLOCK) {
        if &block[257..262] == b"ustar" {
            seal(block);
        }
    }
    if sealed != data {
        scanned(&sealed);
    }
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn scanned(data: &[u8]) {
    let path = scratch::write("a.tar", data);
    let _ = fs::remove_file(scratch::path("a.tar.index"));
    // Clear the cache: gzipped shards are unpacked there by stamp, and files written at the same moment have equal
    // ones.
    let cache = scratch::path("cache");
    use_cache(&cache);
    let _ = fs::remove_dir_all(&cache);
    let object = object(&path);
    let reader = object.reader().unwrap();
    let size = reader.length();
    let mut end = 0;
    let scanned = tar::scan(&reader, |found| {
        if let TarEntry::Member { at, length, .. } = found {
            assert!(at >= end, "members overlap");
            end = at + length;
            assert!(end <= size, "a member exceeds the file");
        }
    });
    scanned.unwrap();
    let index = ShardIndex::scan(&reader).unwrap();
    for (number, entry) in index.entries().iter().enumerate() {
        for span in [entry.image, entry.text, entry.json] {
            assert!(span.range().end <= size, "a span exceeds the file");
        }
        index.name(number);
    }
    index.save(&object).unwrap();
    let loaded = ShardIndex::load(&object).unwrap();
    assert!(
        loaded.as_ref() == Some(&index),
        "a saved index reads back differently"
    );
    if let Ok(shards) = Shards::open(path.to_str().unwrap()) {
        assert_eq!(shards.len(), index.entries().len());
        for sample in 0..shards.len().min(64) {
            let _ = shards.caption(sample);
            let _ = shards.image_bytes(sample);
            let _ = shards.label(sample);
            assert_eq!(shards.key_of(sample).unwrap(), index.name(sample));
            shards.name_of(sample);
        }
        shards.health().unwrap();
    }
}

fn object(path: &std::path::Path) -> Object {
    let mut found = Object::find(vec![Location::File(path.to_owned())]).unwrap();
    found.pop().unwrap()
}

/// Reads a saved index with valid hashes and stamp and the input as content.
pub fn index(data: &[u8]) {
    let object = object(&scratch::write("b.tar", &[0; 1024]));
    let [header, entry] = INDEX_SIZES;
    let mut bytes = fuzzing::INDEX_MAGIC.to_vec();
    let stamp = object.stamp();
    bytes.extend([stamp.0, stamp.1].map(u64::to_le_bytes).concat());
    // Counts and lengths: unmodified, or such that they add up.
    let (counts, rest) = data.split_at(data.len().min(header - 32));
    bytes.extend(counts);
    bytes.resize(header - 8, 0);
    if counts.first().is_some_and(|first| first % 2 == 0) {
        let samples = rest.len() / entry;
        let names = (rest.len() - samples * entry) / 2;
        let health = rest.len() - samples * entry - names;
        for (at, value) in [(24, samples), (40, names), (44, health)] {
            bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
    }
    let hash = blake3(&bytes);
    bytes.extend(&hash[..8]);
    bytes.extend(rest);
    let hash = blake3(&bytes);
    bytes.extend(&hash[..16]);
    let Some(index) = fuzzing::shard_index(&bytes, &object) else {
        return;
    };
    for (number, entry) in index.entries().iter().enumerate() {
        index.name(number);
        let _ = fault_of(entry);
        for span in [entry.image, entry.text, entry.json] {
            span.range();
        }
    }
    index.save(&object).unwrap();
    let again = ShardIndex::load(&object).unwrap();
    assert!(again == Some(index), "a saved index reads back differently");
}

fn blake3(bytes: &[u8]) -> [u8; 32] {
    fuzzing::hash(bytes)
}

/// Reads the caption in a sample's JSON. It must equal serde's if serde can read the JSON.
pub fn caption(data: &[u8]) {
    let mut tar = Vec::new();
    for (name, content) in [("a.jpg", &b"x"[..]), ("a.json", data)] {
        let mut block = [0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        block[156] = b'0';
        block[257..265].copy_from_slice(b"ustar\x0000");
        seal(&mut block);
        tar.extend(block);
        tar.extend(content);
        tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    }
    tar.resize(tar.len() + 2 * BLOCK, 0);
    let path = scratch::write("c.tar", &tar);
    let shards = Shards::open(path.to_str().unwrap()).unwrap();
    let found = shards.caption(0);
    let plain = serde_json::from_slice::<serde_json::Value>(data);
    let Some(caption) = plain
        .ok()
        .and_then(|json| json["caption"].as_str().map(str::to_owned))
    else {
        return;
    };
    match caption.trim_start_matches('\u{feff}').trim() {
        "" => assert!(found.is_err(), "an empty caption is accepted"),
        text => assert!(
            found.is_ok_and(|found| found.as_deref() == Some(text)),
            "the caption differs from serde's"
        ),
    }
}
