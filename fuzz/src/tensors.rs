//! Files of numbers: safetensors, `torch.save` files, CIFAR binaries, checkpoints.

use std::collections::BTreeMap;
use std::path::Path;

use advxl::data::sources::cifar::Cifar;
use advxl::data::sources::npy::Header;
use advxl::data::sources::npz::Npz;
use advxl::data::sources::tensors::{Tensors, save_parts};
use advxl::data::{Spec, Split};
use advxl::fuzzing;
use advxl::weights::EmbeddingFile;
use advxl::weights::StateDict;
use safetensors::{Dtype, SafeTensors};

use crate::scratch;

/// The three readers of safetensors files: weights, `tensors:` data sets, embeddings.
pub fn safetensors(data: &[u8]) {
    let path = scratch::write("a.safetensors", data);
    if let Some(weights) = all_floats(&path) {
        same_as_crate(data, &weights);
    }
    if let Ok(file) = EmbeddingFile::open(&path) {
        let last = file.len() - 1;
        let _ = file.rows(&[0, last]);
        assert!(
            file.rows(&[last + 1]).is_err(),
            "a row after the last one is read"
        );
        let _ = file.row_of("a");
        file.made_by();
    }
    if let Ok(tensors) = Tensors::open(&path) {
        written_again(&tensors);
    }
    let _: Spec = format!("tensors:{}", path.display()).parse().unwrap();
}

/// Reads every tensor of a weights file, if it opens.
fn all_floats(path: &Path) -> Option<BTreeMap<String, Vec<f32>>> {
    let weights = StateDict::open(path).ok()?;
    weights.wrapper();
    let mut floats = BTreeMap::new();
    for name in weights.names().map(str::to_owned).collect::<Vec<_>>() {
        let count: usize = weights.shape(&name).unwrap().iter().product();
        weights.dtype(&name).unwrap();
        if let Ok(values) = weights.floats(&name) {
            assert_eq!(
                values.len(),
                count,
                "the number of values differs from the shape"
            );
            floats.insert(name, values);
        }
    }
    let _ = weights.floats("no such tensor");
    Some(floats)
}

/// Checks that f32 tensors have the values that the crate `safetensors` reads.
fn same_as_crate(data: &[u8], weights: &BTreeMap<String, Vec<f32>>) {
    let Ok(file) = SafeTensors::deserialize(data) else {
        return;
    };
    for (name, values) in weights {
        let Ok(tensor) = file.tensor(name) else {
            continue;
        };
        if tensor.dtype() == Dtype::F32 {
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            assert!(
                bytes == tensor.data(),
                "values differ from those of the crate `safetensors`"
            );
        }
    }
}

/// Checks that a data set of tensors, written and read again, is equal to the bit.
fn written_again(tensors: &Tensors) {
    let count = tensors.len();
    let pictures: Vec<_> = (0..count)
        .map(|index| tensors.picture(index).unwrap())
        .collect();
    let (width, height) = (pictures[0].width(), pictures[0].height());
    // None if the file has no labels.
    let labels: Option<Vec<i64>> = (0..count)
        .map(|index| tensors.label(index).map(i64::from).ok())
        .collect();
    let path = scratch::path("b.safetensors");
    let parts = pictures.iter().map(|picture| Ok(picture.to_planes()));
    save_parts(
        &path,
        parts,
        [count, 3, height, width],
        labels.as_deref(),
        tensors.classes(),
    )
    .unwrap();
    let again = Tensors::open(&path).unwrap();
    assert_eq!((again.len(), again.classes()), (count, tensors.classes()));
    for (index, picture) in pictures.iter().enumerate() {
        assert!(
            again.picture(index).unwrap() == *picture,
            "image {index} differs"
        );
        assert_eq!(again.label(index).ok(), tensors.label(index).ok());
    }
}

/// Input: a zip of `torch.save`, or a pickle, which is put into one.
pub fn pytorch(data: &[u8]) {
    let archive = match data.starts_with(b"PK") {
        true => data.to_vec(),
        false => zip(&[
            ("a/data.pkl", data),
            ("a/data/0", &[0x3c; 256]),
            ("a/data/1", &[0; 16]),
        ]),
    };
    let path = scratch::write("a.pth", &archive);
    all_floats(&path);
}

/// Input: an archive of `numpy.savez`, or an array, which is put into one.
pub fn npz(data: &[u8]) {
    if let Ok(header) = Header::read(data) {
        same_header(&header);
    }
    let archive = match data.starts_with(b"PK") {
        true => data.to_vec(),
        false => zip(&[("image.npy", data), ("label.npy", data)]),
    };
    let path = scratch::write("a.npz", &archive);
    // Compressed images are unpacked into the cache.
    advxl::storage::cache::use_cache(&scratch::path("cache"));
    let Ok(npz) = Npz::open(&path) else {
        return;
    };
    for index in [0, npz.len() - 1] {
        npz.name_of(index);
        if let Ok(label) = npz.label(index) {
            assert!((label as usize) < npz.classes().len());
        }
        let picture = npz.picture(index).unwrap();
        assert!(npz.image_size().is_none_or(|size| size == picture.width()));
    }
}

/// Checks that a header, written and read again, is the same.
fn same_header(header: &Header) {
    let sides: String = header.shape.iter().map(|side| format!("{side},")).collect();
    let order = if header.is_fortran { "True" } else { "False" };
    let dtype = match &header.dtype {
        list if list.starts_with('[') => list.clone(),
        text if text.contains('\'') => format!("\"{text}\""),
        text => format!("'{text}'"),
    };
    let text = format!("{{'descr': {dtype}, 'fortran_order': {order}, 'shape': ({sides})}}");
    let start = [
        &b"\x93NUMPY\x02\x00"[..],
        &(text.len() as u32).to_le_bytes(),
    ]
    .concat();
    if let Ok(again) = Header::read(&[&start, text.as_bytes()].concat()) {
        let start = again.start;
        assert_eq!(
            again,
            Header {
                start,
                ..header.clone()
            }
        );
    }
}

/// Returns a zip archive of uncompressed entries.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut table) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let at = bytes.len() as u32;
        let sizes = [0, content.len() as u32, content.len() as u32]
            .map(u32::to_le_bytes)
            .concat();
        let lengths = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
        bytes.extend(
            [
                b"PK\x03\x04",
                &[0; 10][..],
                &sizes,
                &lengths,
                name.as_bytes(),
                content,
            ]
            .concat(),
        );
        let start = [b"PK\x01\x02", &[0; 12][..], &sizes, &lengths, &[0; 10]].concat();
        table.extend([&start, &at.to_le_bytes()[..], name.as_bytes()].concat());
    }
    let (at, size, count) = (bytes.len() as u32, table.len() as u32, entries.len() as u16);
    bytes.append(&mut table);
    bytes.extend(
        [
            b"PK\x05\x06",
            &[0; 4][..],
            &[count; 2].map(u16::to_le_bytes).concat(),
        ]
        .concat(),
    );
    bytes.extend([size, at].map(u32::to_le_bytes).concat());
    bytes.extend([0; 2]);
    bytes
}

/// Input: class names, a zero byte, records. Images must have the bytes of the records.
pub fn cifar(data: &[u8]) {
    let [names, records] = scratch::parts(data, 0);
    // A record is long for a fuzzer, so the input is repeated.
    let long: Vec<u8> = records
        .iter()
        .copied()
        .cycle()
        .take(2 * 3074 * usize::from(!records.is_empty()))
        .collect();
    for (folder, file, names_file, record) in [
        ("ten", "test_batch.bin", "batches.meta.txt", 3073),
        ("hundred", "test.bin", "fine_label_names.txt", 3074),
    ] {
        let whole = long.len() / record * record;
        let bytes = if records.len() % 7 == 0 {
            records
        } else {
            &long[..whole]
        };
        let path = scratch::write(&format!("{folder}/{file}"), bytes);
        scratch::write(&format!("{folder}/{names_file}"), names);
        let Ok(cifar) = Cifar::open(path.parent().unwrap(), Split::Test) else {
            continue;
        };
        assert_eq!(cifar.len() * record, bytes.len());
        for index in 0..cifar.len() {
            let record = &bytes[index * record..][..record];
            let pixels = &record[record.len() - 3072..];
            assert_eq!(u32::from(record[record.len() - 3073]), cifar.label(index));
            assert!((cifar.label(index) as usize) < cifar.classes().len());
            let picture = cifar.picture(index).unwrap().to_bytes();
            let plane = |byte: usize| picture[byte % 1024 * 3 + byte / 1024];
            assert!(
                (0..3072).all(|byte| plane(byte) == pixels[byte]),
                "pixels differ from the record"
            );
            cifar.name_of(index);
        }
    }
}

/// Reads a checkpoint unmodified, and one with a valid hash whose counters are the input.
pub fn checkpoint(data: &[u8]) {
    let _ = fuzzing::checkpoint(data);
    if let Ok(counters) = serde_json::from_slice::<BTreeMap<String, String>>(data) {
        let sealed = fuzzing::sealed_checkpoint(counters, &data[..data.len().min(64)]);
        let read = fuzzing::checkpoint(&sealed).map_err(|error| error.to_string());
        assert!(read != Err("content does not match its hash".into()));
        if read.is_ok() {
            let at = scratch::number(data) as usize % sealed.len();
            let mut flipped = sealed;
            flipped[at] ^= 1 << (data.len() % 8);
            assert!(
                fuzzing::checkpoint(&flipped).is_err(),
                "a flipped bit at {at} is not detected"
            );
        }
    }
}
