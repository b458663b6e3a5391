//! Packed shards: training images decoded and resized once, so that an epoch reads pixels instead of decoding JPEGs.
//!
//! Packed shards are ordinary shards: tar files with a binary PPM (`KEY.ppm`), a caption (`KEY.txt`) and a label
//! (`KEY.cls`) for each sample, which WebDataset and Pillow can also read. Each source shard becomes one packed shard
//! with the same keys in the same order, so training visits the samples in the same order. Images of other sources are
//! shuffled into shards.
//! A resized PPM is marked with a comment. [`Picture::is_packed`] reads it, so that training can refuse sizes above
//! that of the pack and evaluations can refuse packed images altogether. The first header of each tar records the data
//! set and the size, so that an interrupted pack can continue.
//!
//! Not for evaluations, which need the exact bits of their preprocessing ([`crate::data::sources::tensors`]).

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::loader::Broken;
use super::shards::{Part, Sample};
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::image::decode::pnm;
use crate::image::picture::Pixels;
use crate::image::resize::{Filter, resize_bytes};
use crate::image::{Picture, Region};
use crate::rng::{Rng, Stream};

/// Samples per packed shard if the source has no shards.
const SAMPLES: usize = 1024;
/// Samples that all threads together prepare at a time.
const AT_A_TIME: usize = 64;
const BLOCK: usize = 512;
/// Longest member name that fits into a plain header.
const LONGEST_NAME: usize = 100;

/// Settings for packing a data set.
#[derive(Clone, Copy, Debug)]
pub struct Packing {
    /// Length of the shorter side in pixels. Larger images are resized to it, smaller ones are kept unchanged.
    pub shorter_side: usize,
    /// Whether to leave out broken samples; otherwise the first one is an error.
    pub skip_broken: bool,
}

/// The result of packing.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Packed {
    /// Shards of the pack.
    pub shards: usize,
    /// Shards that an earlier, interrupted call had completed.
    pub kept: usize,
    /// Samples written.
    pub samples: usize,
    /// Samples written that were resized.
    pub resized: usize,
    /// Bytes written.
    pub bytes: u64,
    /// Samples left out.
    pub broken: Vec<Broken>,
}

/// A shard to write.
struct Shard {
    name: String,
    samples: Vec<usize>,
}

/// Writes a data set as packed shards into a folder. The ranks divide the shards among themselves.
///
/// `progress` is called with the number of samples that this rank has processed and the number of all its samples.
///
/// Errors: the first broken sample unless broken samples are skipped; float images; an existing file of the same name
/// that does not belong to this pack; a folder that cannot be written.
pub fn pack(
    dataset: &Dataset,
    folder: &Path,
    packing: Packing,
    comm: &Comm,
    mut progress: impl FnMut(usize, usize),
) -> Result<Packed> {
    let shards = comm.all_ok(shards(dataset, packing.shorter_side))?;
    let own = &shards[comm.local_range(shards.len())];
    let all = own.iter().map(|shard| shard.samples.len()).sum();
    let first = first_header(dataset, packing.shorter_side);
    let mut write = || {
        files::make_folder(folder)?;
        let mut packed = Packed::default();
        let mut done = 0;
        for shard in own {
            let path = folder.join(&shard.name);
            packed.shards += 1;
            if is_complete(&path, &first)? {
                packed.kept += 1;
                done += shard.samples.len();
            } else {
                write_shard(
                    dataset,
                    &path,
                    &first,
                    shard,
                    packing,
                    &mut packed,
                    |made| {
                        done += made;
                        progress(done, all);
                    },
                )?;
            }
        }
        Ok(packed)
    };
    let packed = comm.all_gather(comm.all_ok(write())?);
    Ok(packed.into_iter().fold(Packed::default(), Packed::join))
}

impl Packed {
    fn join(mut self, other: Self) -> Self {
        self.shards += other.shards;
        self.kept += other.kept;
        self.samples += other.samples;
        self.resized += other.resized;
        self.bytes += other.bytes;
        self.broken.extend(other.broken);
        self
    }
}

/// Returns the shards to write. Their names differ from those of the source shards, so that the fingerprint of a run
/// changes with the pixels.
fn shards(dataset: &Dataset, shorter_side: usize) -> Result<Vec<Shard>> {
    let Some(source) = dataset.shards() else {
        let order = Rng::new(0, Stream::Order { epoch: 0 }).permutation(dataset.len());
        let parts = order.chunks(SAMPLES).enumerate();
        let shard = |(number, samples): (usize, &[usize])| Shard {
            name: format!("{number:05}-{shorter_side}px.tar"),
            samples: samples.to_vec(),
        };
        return Ok(parts.map(shard).collect());
    };
    let starts = source.starts().windows(2);
    let parts = source.names().zip(starts);
    let shards: Vec<Shard> = parts
        .filter(|(_, range)| range[0] < range[1])
        .map(|(name, range)| Shard {
            name: format!("{}-{shorter_side}px.tar", name.trim_end_matches(".tar")),
            samples: (range[0]..range[1]).collect(),
        })
        .collect();
    let mut names = BTreeSet::new();
    match shards.iter().find(|shard| !names.insert(&shard.name)) {
        None => Ok(shards),
        Some(twice) => {
            let message = format!("two shards would be packed as `{}`", twice.name);
            Err(Error::input(message).hint("pack shards of the same name into different folders"))
        }
    }
}

/// Returns the start of every shard of the pack: a global header with a comment that other programs skip.
fn first_header(dataset: &Dataset, shorter_side: usize) -> Vec<u8> {
    let text = format!(
        "comment=advxl data pack: shorter side {shorter_side}, data {}\n",
        dataset.fingerprint()
    );
    // The leading length includes its own digits.
    let length = |digits: usize| text.len() + digits + 1;
    let digits = (1..).find(|digits| length(*digits).to_string().len() == *digits);
    let record = format!("{} {text}", length(digits.unwrap_or_default()));
    block("pax_global_header", b'g', record.as_bytes())
}

/// Returns whether a complete shard of this pack exists.
///
/// Errors: a file that has its name but does not belong to this pack.
fn is_complete(path: &Path, first: &[u8]) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let start = files::Source::open(path)?.bytes(0, first.len() as u64)?;
    if start.is_some_and(|start| start == first) {
        return Ok(true);
    }
    let message = format!(
        "`{}` exists but does not belong to this pack",
        path.display()
    );
    Err(Error::input(message)
        .hint("it was packed from other data or at another size: choose another folder with --out"))
}

fn write_shard(
    dataset: &Dataset,
    path: &Path,
    first: &[u8],
    shard: &Shard,
    packing: Packing,
    packed: &mut Packed,
    mut progress: impl FnMut(usize),
) -> Result<()> {
    let mut keys = HashSet::new();
    let parts = shard.samples.chunks(AT_A_TIME).map(|samples| {
        let part = match dataset.is_captioned() {
            true => Part::Both,
            false => Part::Picture,
        };
        samples.iter().for_each(|sample| dataset.ask(*sample, part));
        let made: Vec<Result<Made>> = samples
            .par_iter()
            .map(|sample| make(dataset, *sample, packing))
            .collect();
        let mut members = Vec::new();
        for (sample, made) in samples.iter().zip(made) {
            match made? {
                Made::Broken(broken) => packed.broken.push(broken),
                Made::Members(mut made) => {
                    // Two files that differ only in their extensions have the same key.
                    if !keys.insert(made.key.clone()) {
                        made.key = format!("{}_{sample}", made.key);
                    }
                    packed.samples += 1;
                    packed.resized += usize::from(made.is_resized);
                    members.extend(made.blocks());
                }
            }
        }
        packed.bytes += members.len() as u64;
        progress(samples.len());
        Ok(members)
    });
    let start = std::iter::once(Ok(first.to_vec()));
    let end = std::iter::once(Ok(vec![0; 2 * BLOCK]));
    files::write_parts(path, start.chain(parts).chain(end))
}

/// A sample that is ready to be written, or a broken one.
enum Made {
    Members(Members),
    Broken(Broken),
}

struct Members {
    key: String,
    ppm: Vec<u8>,
    caption: Option<String>,
    label: Option<u32>,
    is_resized: bool,
}

impl Members {
    /// Returns headers and contents. The caption is next to the image, so that one read returns both.
    fn blocks(&self) -> Vec<u8> {
        let mut blocks = member(&format!("{}.ppm", self.key), &self.ppm);
        if let Some(caption) = &self.caption {
            blocks.extend(member(&format!("{}.txt", self.key), caption.as_bytes()));
        }
        if let Some(label) = self.label {
            let label = label.to_string();
            blocks.extend(member(&format!("{}.cls", self.key), label.as_bytes()));
        }
        blocks
    }
}

fn make(dataset: &Dataset, index: usize, packing: Packing) -> Result<Made> {
    let Sample { picture, caption } = match dataset.read(index, dataset.is_captioned()) {
        Ok(sample) => sample,
        Err(fault) if fault.outage => return Err(fault.error.context("reading the data")),
        Err(fault) if packing.skip_broken => {
            return Ok(Made::Broken(Broken::new(dataset, index, &fault)));
        }
        Err(fault) => {
            let error = fault.error.context("broken sample");
            return Err(error.hint("use --skip-broken to leave out broken samples"));
        }
    };
    let (ppm, is_resized) = resized(&picture.picture, packing.shorter_side)
        .map_err(|error| error.context(dataset.name_of(index)))?;
    Ok(Made::Members(Members {
        key: key(dataset, index)?,
        ppm,
        caption,
        label: match dataset.classes() {
            [] => None,
            _ => Some(dataset.label(index)?),
        },
        is_resized,
    }))
}

/// Encodes a picture as PPM with a shorter side of at most `shorter_side` pixels. Also returns whether it was resized,
/// now or by an earlier pack.
fn resized(picture: &Picture, shorter_side: usize) -> Result<(Vec<u8>, bool)> {
    let Pixels::Bytes(bytes) = picture.pixels() else {
        let message = "float images cannot be packed: packed shards store bytes";
        return Err(Error::input(message).hint("train on them directly: they need no decoding"));
    };
    let (width, height) = (picture.width(), picture.height());
    let shortest = width.min(height);
    if shortest <= shorter_side {
        let is_packed = picture.is_packed();
        return Ok((pnm::encode(width, height, bytes, is_packed), is_packed));
    }
    // The same rounding as torchvision's `Resize`.
    let scaled = |side: usize| side * shorter_side / shortest;
    let (columns, rows) = (scaled(width), scaled(height));
    let all = Region::whole(columns, rows);
    let bytes = resize_bytes(
        bytes,
        (width, height),
        (columns, rows),
        &all,
        Filter::Bicubic,
    );
    Ok((pnm::encode(columns, rows, &bytes, true), true))
}

/// Returns the key of a sample in its packed shard.
fn key(dataset: &Dataset, index: usize) -> Result<String> {
    if let Some(key) = dataset.key_of(index)? {
        return Ok(key);
    }
    let id = PathBuf::from(dataset.id_of(index)?);
    let stem = id.file_stem().unwrap_or_default().to_string_lossy();
    // A key ends at the first dot of the file name.
    let stem = stem.replace('.', "_");
    Ok(match dataset.is_decoded() {
        true => id.with_file_name(stem).to_string_lossy().into_owned(),
        false => format!("{index:09}"),
    })
}

/// Returns the blocks of a file in a tar. A name that does not fit into the header precedes it, as GNU tar writes it.
fn member(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut blocks = Vec::new();
    if name.len() > LONGEST_NAME {
        let long = [name.as_bytes(), b"\0"].concat();
        blocks.extend(block("././@LongLink", b'L', &long));
    }
    blocks.extend(block(name, b'0', contents));
    blocks
}

/// Returns a header and its contents, padded to whole blocks. Source: POSIX.1-1988, ustar.
fn block(name: &str, kind: u8, contents: &[u8]) -> Vec<u8> {
    let mut header = [0; BLOCK];
    let name = &name.as_bytes()[..name.len().min(LONGEST_NAME)];
    header[..name.len()].copy_from_slice(name);
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..124].copy_from_slice(b"0000000\x000000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", contents.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut blocks = header.to_vec();
    blocks.extend(contents);
    blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    blocks
}
