//! Tar shards of images and captions: layouts, order, damage, and the commands that manage them.

mod support;

use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use advxl::data::shards::tar;
use advxl::data::{
    Augmentation, Dataset, Loader, Plan, RandomResizedCrop, Selection, Share, Spec, Split, Subset,
    check, evaluation_batch,
};
use advxl::distributed::Comm;
use advxl::image::resize::{Filter, resize_bytes};
use advxl::image::{Preprocessing, Reason, Region};
use advxl::storage::store;
use advxl::weights::EmbeddingWriter;
use advxl::weights::embeddings::{Layout, MadeBy};
use image::{DynamicImage, ImageFormat};
use support::{advxl, command};

/// Returns a member's ustar header and padded contents.
fn member(name: &str, contents: &[u8]) -> Vec<u8> {
    typed(name, contents, b'0', contents.len() as u64)
}

fn typed(name: &str, contents: &[u8], kind: u8, size: u64) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut block);
    block.extend(contents);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

/// Writes the checksum into a header.
fn seal(block: &mut [u8]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block[..512].iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Returns the members followed by the end marker.
fn packed(members: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = members.concat();
    bytes.extend([0; 1024]);
    bytes
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Returns an image whose color encodes its number.
fn png(number: usize) -> Vec<u8> {
    let color = image::Rgb([(number % 256) as u8, (number / 256) as u8, 7]);
    encoded(
        &image::RgbImage::from_pixel(8, 8, color).into(),
        ImageFormat::Png,
    )
}

/// Returns image, text and JSON of a sample, as img2dataset writes them.
fn sample(key: &str, number: usize) -> Vec<u8> {
    let json = format!("{{\"caption\": \"number {number}\", \"key\": \"{key}\"}}");
    [
        member(&format!("{key}.png"), &png(number)),
        member(&format!("{key}.txt"), format!("number {number}").as_bytes()),
        member(&format!("{key}.json"), json.as_bytes()),
    ]
    .concat()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn open(path: &Path) -> Dataset {
    let spec = Spec::Shards(path.display().to_string());
    Dataset::open(&spec, Split::Train, 0).unwrap()
}

/// Writes shards `00000.tar`, ... with the given numbers of samples, numbered consecutively.
fn write_shards(folder: &Path, counts: &[usize]) -> String {
    let mut number = 0;
    for (shard, count) in counts.iter().enumerate() {
        let members: Vec<_> = (0..*count)
            .map(|_| {
                number += 1;
                sample(&format!("{:09}", number - 1), number - 1)
            })
            .collect();
        write(folder, &format!("{shard:05}.tar"), &packed(&members));
    }
    format!(
        "{}/{{00000..{:05}}}.tar",
        folder.display(),
        counts.len() - 1
    )
}

fn plan(samples: u64, position: u64) -> Plan {
    Plan {
        seed: 3,
        batch: 24,
        image_size: 8,
        augmentation: Augmentation::default(),
        mixing: None,
        position,
        samples,
        broken_rate: None,
        reduced_decode: false,
        captions: true,
        share: Share::default(),
    }
}

fn run(dataset: &Arc<Dataset>, plan: Plan, threads: usize) -> (Vec<u64>, Vec<String>) {
    let mut loader = Loader::new(dataset.clone(), plan, threads).unwrap();
    let (mut samples, mut captions) = (Vec::new(), Vec::new());
    while let Some(batch) = loader.next_batch().unwrap() {
        samples.extend(batch.samples);
        captions.extend(batch.captions);
    }
    (samples, captions)
}

#[test]
fn samples_come_with_their_captions_and_labels_in_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    let long = format!("{}/image.png", "folder".repeat(30));
    let pax = {
        let path = "a pax path/9.png";
        let record = format!(" path={path}\n");
        let length = record.len() + 2;
        format!("{length}{record}")
    };
    let members = [
        typed("train/", b"", b'5', 0),
        sample("train/a.b/000", 0),
        member("./001.x.png", &png(9)),
        member("./001.jpeg", &png(1)),
        member("./001.json", br#"{"caption": "one, from the json"}"#),
        typed("././@LongLink", long.as_bytes(), b'L', long.len() as u64),
        member("cut off", &png(2)),
        typed(
            "././@LongLink",
            long.replace("png", "txt").as_bytes(),
            b'L',
            long.len() as u64,
        ),
        member("cut off", "\u{feff} zwei \u{fc}\n".as_bytes()),
        typed("pax", pax.as_bytes(), b'x', pax.len() as u64),
        member("short", &png(3)),
        member("a pax path/9.txt", b"three"),
    ];
    let dataset = open(&write(folder.path(), "a.tar", &packed(&members)));
    assert_eq!(dataset.len(), 4);
    assert!(dataset.classes().is_empty() && dataset.is_captioned());
    let captions: Vec<_> = (0..4)
        .map(|n| dataset.caption(n).unwrap().unwrap())
        .collect();
    assert_eq!(
        captions,
        ["number 0", "one, from the json", "zwei \u{fc}", "three"]
    );
    for (number, caption) in captions.iter().enumerate() {
        let sample = dataset.read(number, true).unwrap();
        assert_eq!(sample.picture.picture.to_bytes()[0] as usize, number);
        assert_eq!(sample.caption.as_deref(), Some(caption.as_str()));
    }
    assert_eq!(
        dataset.read(1, false).unwrap().picture.odd,
        [Reason::WrongExtension]
    );
    assert!(
        dataset.name_of(0).ends_with("a.tar: train/a.b/000"),
        "{}",
        dataset.name_of(0)
    );

    let members: Vec<_> = (0..3)
        .map(|n| {
            [
                member(&format!("{n}.png"), &png(n)),
                member(&format!("{n}.cls"), format!("{n}\n").as_bytes()),
            ]
            .concat()
        })
        .collect();
    let dataset = open(&write(folder.path(), "b.tar", &packed(&members)));
    assert_eq!(dataset.classes(), ["0", "1", "2"]);
    assert_eq!([0, 1, 2].map(|n| dataset.label(n).unwrap()), [0, 1, 2]);
    assert_eq!(dataset.caption(0).unwrap(), None);
}

#[test]
fn the_order_is_the_same_for_any_number_of_threads_and_from_any_position() {
    let folder = tempfile::tempdir().unwrap();
    let pattern = write_shards(folder.path(), &[17, 1, 40, 22, 31, 9, 12, 5, 19, 44]);
    let dataset = Arc::new(open(Path::new(&pattern)));
    assert_eq!(dataset.len(), 200);
    let (whole, captions) = run(&dataset, plan(500, 0), 1);
    assert_eq!(run(&dataset, plan(500, 0), 2).0, whole);
    assert_eq!(
        run(&dataset, plan(500, 0), 3),
        (whole.clone(), captions.clone())
    );
    for (sample, caption) in whole.iter().zip(&captions) {
        assert_eq!(caption, &format!("number {sample}"));
    }
    for epoch in [&whole[..200], &whole[200..400]] {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..200));
    }
    for position in [1, 23, 24, 199, 200, 201, 399, 477] {
        let fresh = Arc::new(open(Path::new(&pattern)));
        let (rest, _) = run(&fresh, plan(500 - position as u64, position as u64), 2);
        assert_eq!(rest, whole[position..], "from {position}");
    }
}

/// A name, the bytes of the tar, the damage found in it, and the number of usable samples.
type Damage = (&'static str, Vec<u8>, Vec<Reason>, usize);

fn jpeg() -> Vec<u8> {
    let recorded = include_bytes!("golden/jpeg.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(recorded).unwrap();
    tensors.tensor("baseline file").unwrap().data().to_vec()
}

fn damages() -> Vec<Damage> {
    let good = || sample("good", 1);
    let with = |members: &[Vec<u8>]| {
        packed(
            &[&[sample("first", 0)], members, &[good()]]
                .concat()
                .concat()
                .chunks(1 << 30)
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>(),
        )
    };
    let image = |name: &str, bytes: &[u8]| with(&[member(name, bytes), member("x.txt", b"words")]);
    let caption = |bytes: &[u8]| with(&[member("x.png", &png(2)), member("x.txt", bytes)]);
    let rgb = || DynamicImage::from(image::RgbImage::from_pixel(4, 4, image::Rgb([9, 8, 7])));
    let mut huge = png(0);
    huge[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    let mut flat = png(0);
    flat[16..20].fill(0);
    let mut sum = with(&[member("x.png", &png(2)), member("x.txt", b"words")]);
    let place = sample("first", 0).len();
    sum[place + 148] ^= 1;
    let mut lies = with(&[
        typed("x.png", &png(2), b'0', 1 << 30),
        member("x.txt", b"words"),
    ]);
    let no_number = {
        let mut block = typed("x.png", &png(2), b'0', 9);
        block[124..136].copy_from_slice(b"not a number");
        seal(&mut block);
        with(&[block, member("x.txt", b"words")])
    };
    let cut = |bytes: Vec<u8>, length: usize| bytes[..length].to_vec();
    let two = [sample("first", 0), good()].concat();
    lies.truncate(lies.len());
    let jpeg = jpeg();
    let webp = encoded(&rgb(), ImageFormat::WebP);
    let animated = {
        // The extended header with the animation flag before a still image.
        let chunk = [
            b"VP8X".as_slice(),
            &[10, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 3, 0, 0],
        ]
        .concat();
        let anim = [b"ANIM".as_slice(), &[6, 0, 0, 0, 0, 0, 0, 0, 1, 0]].concat();
        let inner = &webp[12..];
        let frame = [&[0_u8; 6][..], &[3, 0, 0, 3, 0, 0], &[100, 0, 0, 0], inner].concat();
        let anmf = [
            b"ANMF".as_slice(),
            &(frame.len() as u32).to_le_bytes(),
            &frame,
        ]
        .concat();
        let body = [b"WEBP".as_slice(), &chunk, &anim, &anmf].concat();
        [
            b"RIFF".as_slice(),
            &(body.len() as u32).to_le_bytes(),
            &body,
        ]
        .concat()
    };
    let exif = {
        let data = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let length = (data.len() as u16 + 2).to_be_bytes();
        [&jpeg[..2], &[0xff, 0xe1], &length, data, &jpeg[2..]].concat()
    };
    vec![
        (
            "cut within a header",
            cut(two.clone(), two.len() - 512 * 2 + 100),
            vec![Reason::TruncatedHeader],
            2,
        ),
        (
            "cut within a member",
            cut(sample("good", 1), 600),
            vec![Reason::TruncatedMember],
            0,
        ),
        (
            "wrong checksum",
            sum,
            vec![Reason::BadChecksum, Reason::MissingImage],
            2,
        ),
        (
            "garbage",
            with(&[vec![b'#'; 1536], sample("x", 2)]),
            vec![Reason::Garbage],
            3,
        ),
        (
            "garbage that moves all",
            with(&[vec![b'#'; 777], sample("x", 2)]),
            vec![Reason::Garbage],
            3,
        ),
        ("size past the end", lies, vec![Reason::SizePastEnd], 2),
        ("size no number", no_number, vec![Reason::SizePastEnd], 2),
        (
            "empty member",
            image("x.png", b""),
            vec![Reason::EmptyMember],
            2,
        ),
        (
            "text too large",
            caption(&vec![b'x'; (1 << 20) + 1]),
            vec![Reason::MemberTooLarge],
            2,
        ),
        (
            "key twice",
            with(&[sample("x", 2), sample("x", 3)]),
            vec![Reason::DuplicateKey],
            2,
        ),
        (
            "no image",
            with(&[member("x.txt", b"words")]),
            vec![Reason::MissingImage],
            2,
        ),
        (
            "no caption",
            with(&[member("x.png", &png(2))]),
            vec![Reason::MissingCaption],
            2,
        ),
        (
            "json without caption",
            with(&[member("x.png", &png(2)), member("x.json", b"{}")]),
            vec![Reason::MissingCaption],
            2,
        ),
        (
            "empty caption",
            caption(b" \n"),
            vec![Reason::CaptionEmpty],
            2,
        ),
        (
            "caption in Latin-1",
            caption(b"caf\xe9"),
            vec![Reason::CaptionNotUtf8],
            2,
        ),
        (
            "broken json",
            with(&[
                member("x.png", &png(2)),
                member("x.json", b"{\"caption\": \"a"),
            ]),
            vec![Reason::JsonBroken],
            2,
        ),
        (
            "label no number",
            with(&[
                member("x.png", &png(2)),
                member("x.txt", b"w"),
                member("x.cls", b"cat"),
            ]),
            vec![Reason::BadLabel],
            2,
        ),
        (
            "cut JPEG",
            image("x.jpg", &jpeg[..jpeg.len() / 2]),
            vec![Reason::TruncatedImage],
            2,
        ),
        (
            "cut PNG",
            image("x.png", &png(2)[..60]),
            vec![Reason::TruncatedImage],
            2,
        ),
        (
            "cut WebP",
            image("x.webp", &webp[..webp.len() - 4]),
            vec![Reason::TruncatedImage],
            2,
        ),
        (
            "damaged JPEG",
            image("x.jpg", b"\xff\xd8\xff\xc4\0\x03\0\xff\xd9"),
            vec![Reason::DamagedImage],
            2,
        ),
        (
            "web page",
            image("x.jpg", b"<html>"),
            vec![Reason::NotAnImage],
            2,
        ),
        (
            "AVIF",
            image("x.jpg", b"\0\0\0\x1cftypavif"),
            vec![Reason::UnknownFormat],
            2,
        ),
        (
            "arithmetic coding",
            image("x.jpg", &{
                let mut file = jpeg.clone();
                let frame = file.windows(2).position(|two| two == [0xff, 0xc0]);
                file[frame.unwrap() + 1] = 0xc9;
                file
            }),
            vec![Reason::UnsupportedImage],
            2,
        ),
        (
            "bytes between segments",
            image("x.jpg", &[&jpeg[..2], b"stray", &jpeg[2..]].concat()),
            vec![Reason::Irregular],
            3,
        ),
        (
            "a link",
            with(&[typed("x.png", b"", b'2', 0), member("x.txt", b"words")]),
            vec![Reason::LinkMember],
            2,
        ),
        (
            "a link that is not a sample",
            with(&[typed("latest.log", b"", b'2', 0)]),
            vec![Reason::UnusedMember],
            2,
        ),
        (
            "an old sparse file",
            with(&[
                typed("x.png", &png(2), b'S', png(2).len() as u64),
                member("x.txt", b"words"),
            ]),
            vec![Reason::SparseMember],
            2,
        ),
        (
            "more dots than one",
            with(&[
                member("22.05.0.png", &png(2)),
                member("22.05.1.png", &png(3)),
            ]),
            vec![Reason::DottedKey],
            2,
        ),
        (
            "pixel bomb",
            image("x.png", &huge),
            vec![Reason::TooManyPixels],
            2,
        ),
        ("no width", image("x.png", &flat), vec![Reason::ZeroSize], 2),
        (
            "wrong extension",
            image("x.jpg", &png(2)),
            vec![Reason::WrongExtension],
            3,
        ),
        (
            "grey",
            image(
                "x.png",
                &encoded(&rgb().to_luma8().into(), ImageFormat::Png),
            ),
            vec![Reason::Grey],
            3,
        ),
        (
            "16 bits",
            image(
                "x.png",
                &encoded(&rgb().to_rgb16().into(), ImageFormat::Png),
            ),
            vec![Reason::SixteenBit],
            3,
        ),
        (
            "alpha",
            image(
                "x.png",
                &encoded(&rgb().to_rgba8().into(), ImageFormat::Png),
            ),
            vec![Reason::Alpha],
            3,
        ),
        ("turned", image("x.jpg", &exif), vec![Reason::Rotated], 3),
        (
            "animated",
            image("x.webp", &animated),
            vec![Reason::Animated],
            3,
        ),
        (
            "no extension",
            with(&[member("README", b"hello")]),
            vec![Reason::NoExtension],
            2,
        ),
        (
            "hidden",
            with(&[member("a/._x.png", b"hello")]),
            vec![Reason::NoExtension],
            2,
        ),
        (
            "unsafe name",
            with(&[sample("../../x", 2)]),
            vec![Reason::UnsafeName],
            3,
        ),
        (
            "other members",
            with(&[member("x.npy", b"1")]),
            vec![Reason::UnusedMember],
            2,
        ),
        ("no end marker", two.clone(), vec![Reason::NoEndMarker], 2),
        (
            "two tars in one",
            [packed(&[sample("first", 0)]), packed(&[good()])].concat(),
            vec![Reason::ZerosBetween],
            2,
        ),
        (
            "broken json next to a text",
            with(&[
                member("x.png", &png(2)),
                member("x.txt", b"w"),
                member("x.json", b"{"),
            ]),
            vec![Reason::SpareJsonBroken],
            3,
        ),
    ]
}

#[test]
fn every_kind_of_damage_is_counted_by_kind_and_costs_only_its_own_sample() {
    let folder = tempfile::tempdir().unwrap();
    let mut met = std::collections::BTreeSet::new();
    for (name, bytes, expected, sound) in damages() {
        let path = write(folder.path(), "x.tar", &bytes);
        // With a second, valid shard, since a data set without samples is refused.
        let other = write(folder.path(), "y.tar", &packed(&[sample("other", 5)]));
        let dataset = open(Path::new(&format!(
            "{},{}",
            path.display(),
            other.display()
        )));
        let mut broken = Vec::new();
        let checked = check::check(
            &dataset,
            2,
            &Comm::single(),
            |sample| {
                broken.push(sample.clone());
                Ok(())
            },
            |_| {},
        );
        let checked = checked.unwrap();
        for reason in &expected {
            assert!(
                checked.health.count(*reason) > 0,
                "{name}: {reason:?} in {:?}",
                checked.health
            );
            met.insert(*reason);
        }
        let damage = expected.iter().any(|reason| reason.is_damage());
        assert_eq!(
            checked.health.damages() > 0,
            damage,
            "{name}: {:?}",
            checked.health
        );
        assert_eq!(
            checked.samples - checked.broken,
            sound + 1,
            "{name}: {broken:?}"
        );
        for sample in broken {
            assert!(sample.name.contains("x.tar: "), "{name}: {}", sample.name);
            assert!(!sample.reason.is_empty());
        }
    }
    assert!(met.len() >= 30, "{}", met.len());
}

#[test]
fn an_empty_shard_is_damage_and_a_data_set_of_empty_shards_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let empty = write(folder.path(), "a.tar", b"");
    let spec = Spec::Shards(empty.display().to_string());
    let error = Dataset::open(&spec, Split::Train, 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("contains no samples"), "{error}");
    write(folder.path(), "b.tar", &packed(&[sample("x", 1)]));
    let dataset = open(&folder.path().join("*.tar"));
    let checked = check::check(&dataset, 1, &Comm::single(), |_| Ok(()), |_| {}).unwrap();
    assert_eq!(checked.health.count(Reason::EmptyShard), 1);
}

#[test]
fn training_replaces_and_names_damaged_samples() {
    let folder = tempfile::tempdir().unwrap();
    let mut members: Vec<_> = (0..50).map(|n| sample(&format!("{n:03}"), n)).collect();
    members[7] = [member("007.png", &png(7)), member("007.txt", b"\xff")].concat();
    members[9] = member("009.txt", b"no image");
    let dataset = Arc::new(open(&write(folder.path(), "a.tar", &packed(&members))));
    let mut outcomes = Vec::new();
    for (captions, count) in [(true, 2), (false, 1)] {
        let plan = Plan {
            broken_rate: Some(0.5),
            captions,
            ..plan(50, 0)
        };
        let mut loader = Loader::new(dataset.clone(), plan, 2).unwrap();
        while loader.next_batch().unwrap().is_some() {}
        let mut broken: Vec<_> = loader.broken().iter().map(|b| (b.sample, b.kind)).collect();
        broken.sort();
        assert_eq!(broken.len(), count);
        outcomes.push(broken);
    }
    assert_eq!(
        outcomes[0],
        [(7, Reason::CaptionNotUtf8), (9, Reason::MissingImage)]
    );
    assert_eq!(outcomes[1], [(9, Reason::MissingImage)]);
}

#[test]
fn no_flipped_bit_and_no_cut_makes_reading_panic() {
    let folder = tempfile::tempdir().unwrap();
    let long = "x".repeat(150);
    let sound = packed(&[
        sample("000", 0),
        typed("././@LongLink", long.as_bytes(), b'L', 150),
        member("y", b"1"),
        typed("pax", b"19 path=a/001.png\n\n", b'x', 19),
        member("z", &png(1)),
        sample("002", 2),
    ]);
    let other = write(folder.path(), "y.tar", &packed(&[sample("other", 5)]));
    let mut looked = 0;
    let mut look = |bytes: &[u8]| {
        let path = write(folder.path(), "x.tar", bytes);
        let dataset = open(Path::new(&format!(
            "{},{}",
            path.display(),
            other.display()
        )));
        assert!(dataset.len() < 20);
        for sample in 0..dataset.len() {
            let _ = dataset.read(sample, true);
            let _ = dataset.caption(sample);
            dataset.name_of(sample);
        }
        looked += 1;
    };
    for place in (0..sound.len()).step_by(3) {
        let mut damaged = sound.clone();
        damaged[place] ^= 1 << (place % 8);
        look(&damaged);
        // The same with a valid checksum, so that the header is trusted.
        let header = place / 512 * 512;
        if sound[header + 257..].starts_with(b"ustar") {
            seal(&mut damaged[header..]);
            look(&damaged);
        }
    }
    for length in (0..sound.len()).step_by(41) {
        look(&sound[..length]);
    }
    assert!(looked > 3000);
}

#[test]
fn saved_indexes_give_the_same_samples_and_stale_ones_are_detected() {
    let folder = tempfile::tempdir().unwrap();
    let pattern = write_shards(folder.path(), &[20, 30]);
    let scanned = Arc::new(open(Path::new(&pattern)));
    let output = command(&["data", "index", &pattern, "--json"])
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["shards"], &json["samples"], &json["written"]),
        (&2.into(), &50.into(), &2.into())
    );
    let indexed = Arc::new(open(Path::new(&pattern)));
    assert!(indexed.notices().is_empty());
    assert_eq!(indexed.fingerprint(), scanned.fingerprint());
    assert_eq!(
        run(&indexed, plan(100, 0), 2),
        run(&scanned, plan(100, 0), 2)
    );
    // The second time, nothing is written.
    let output = command(&["data", "index", &pattern, "--json"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"written\":0"));

    let first = folder.path().join("00000.tar");
    std::fs::write(&first, packed(&[sample("new", 1)])).unwrap();
    let dataset = open(Path::new(&pattern));
    assert_eq!(dataset.len(), 31);
    assert!(
        dataset.notices()[0].contains("00000.tar"),
        "{:?}",
        dataset.notices()
    );
    assert_ne!(dataset.fingerprint(), scanned.fingerprint());

    // The index also records the damage found in the tar.
    let odd = write(
        folder.path(),
        "odd.tar",
        &packed(&[
            sample("a", 1),
            member("a.cls", b"4"),
            member("README", b"x"),
            sample("b", 2),
        ]),
    );
    let found = |dataset: &Dataset| {
        check::check(dataset, 1, &Comm::single(), |_| Ok(()), |_| {})
            .unwrap()
            .health
    };
    let before = found(&open(&odd));
    assert_eq!(before.count(Reason::NoExtension), 1);
    assert_eq!(before.count(Reason::MissingLabel), 1);
    let (code, text) = advxl(&["data", "index", odd.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(found(&open(&odd)), before);

    // A damaged index is not used, wherever the damage is.
    let index = folder.path().join("00001.tar.index");
    let sound = std::fs::read(&index).unwrap();
    for place in 0..sound.len() {
        let mut damaged = sound.clone();
        damaged[place] ^= 4;
        std::fs::write(&index, &damaged).unwrap();
        let dataset = open(&folder.path().join("00001.tar"));
        assert_eq!(dataset.caption(3).unwrap().unwrap(), "number 23");
    }
    std::fs::write(&index, &sound[..50]).unwrap();
    assert_eq!(open(&folder.path().join("00001.tar")).len(), 30);
}

#[test]
fn check_counts_damage_by_kind_and_lists_the_samples() {
    let folder = tempfile::tempdir().unwrap();
    let members = [
        sample("0", 0),
        member("1.png", b"<html>"),
        member("1.txt", b"a page"),
        sample("2", 2),
    ];
    let path = write(folder.path(), "a.tar", &packed(&members));
    let spec = format!("shards:{}", path.display());
    let list = folder.path().join("quarantine.jsonl");
    let output = command(&["data", "check", &spec, "--out", list.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (table, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    for part in ["3 samples, 1 of them broken", "not_an_image", "a.tar: 1: "] {
        assert!(table.contains(part), "`{part}` is not in:\n{table}");
    }
    assert_eq!(table.matches("a.tar").count(), 1, "{table}");
    assert!(
        errors.contains("is damaged: 1 of 3 samples are unusable"),
        "{errors}"
    );
    let line: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&list).unwrap()).unwrap();
    assert_eq!(
        (&line["sample"], &line["reason"]),
        (&1.into(), &"not_an_image".into())
    );

    let sound = write(folder.path(), "b.tar", &packed(&[sample("0", 0)]));
    for spec in [format!("shards:{}", sound.display()), "synthetic:40".into()] {
        let output = command(&["data", "check", &spec, "--json"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&json["broken"], &json["damages"]), (&0.into(), &0.into()));
    }
}

/// As with `advxl data check ... | head -0`.
#[test]
fn a_closed_pipe_is_not_an_error() {
    let mut command = command(&["data", "check", "synthetic:10"]);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn bench_measures_any_source() {
    let folder = tempfile::tempdir().unwrap();
    let pattern = write_shards(folder.path(), &[10]);
    for spec in [format!("shards:{pattern}"), "synthetic:30".into()] {
        let arguments = [
            "data",
            "bench",
            &spec,
            "--image-size",
            "16",
            "--seconds",
            "0.1",
            "--json",
            "--threads",
            "1",
        ];
        let output = command(&arguments).output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(json["images_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(json["threads"], 1);
        assert!(json["milliseconds_per_image"]["decode"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn bench_measures_a_stage_of_a_recipe_for_several_numbers_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = support::write_recipe(folder.path());
    let mut arguments = vec!["data", "bench", "--recipe", recipe.to_str().unwrap()];
    arguments.extend([
        "--stage",
        "finetune",
        "--workers",
        "1,3",
        "--training-speed",
        "1e9",
    ]);
    arguments.extend(["--seconds", "0.1", "--json"]);
    let output = command(&arguments).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["image_size"], &json["data"]),
        (&32.into(), &"synthetic:200".into())
    );
    let runs = json["runs"].as_array().unwrap();
    assert_eq!(
        (&runs[0]["threads"], &runs[1]["threads"]),
        (&1.into(), &3.into())
    );
    for run in runs {
        assert!(run["data_wait"].as_f64().unwrap() > 0.99);
        assert!(run["cores_needed"].as_u64().unwrap() > 100);
    }
    arguments[5] = "fine";
    refuses(
        &arguments,
        &["unknown stage", "hint: use one of pretrain, finetune"],
    );
}

#[test]
fn pack_writes_the_pixels_that_an_evaluation_sees() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.tar",
        &packed(
            &(0..70)
                .map(|n| {
                    [
                        sample(&n.to_string(), n),
                        member(&format!("{n}.cls"), (n % 3).to_string().as_bytes()),
                    ]
                    .concat()
                })
                .collect::<Vec<_>>(),
        ),
    );
    let spec = format!("shards:{}", path.display());
    let out = folder.path().join("packed.safetensors");
    let (code, text) = advxl(&[
        "data",
        "pack",
        &spec,
        "--image-size",
        "5",
        "--out",
        out.to_str().unwrap(),
        "--count",
        "66",
        "--crop-fraction",
        "0.9",
        "--interpolation",
        "bilinear",
    ]);
    assert_eq!(code, 0, "{text}");
    let packed = Dataset::open(&Spec::Tensors(out), Split::Test, 0).unwrap();
    assert_eq!((packed.len(), packed.image_size()), (66, Some(5)));
    assert_eq!(packed.classes(), ["0", "1", "2"]);
    let preprocessing = Preprocessing {
        crop_fraction: 0.9,
        ..Preprocessing::new(5)
    };
    let dataset = open(&path);
    let subset = Subset::choose(&dataset, &Selection::Sample(66)).unwrap();
    for index in [0, 40, 65] {
        let place = subset.place(index);
        let expected = evaluation_batch(&dataset, &[place], &preprocessing).unwrap();
        assert_eq!(packed.picture(index).unwrap().to_planes(), expected);
        assert_eq!(packed.label(index).unwrap(), dataset.label(place).unwrap());
    }
}

/// Writes two shards of `count` photographs of several sizes as PNG, each with a caption and a class.
fn photographs(folder: &Path, count: usize) -> String {
    for shard in 0..2 {
        let members = (0..count).flat_map(|place| {
            let number = shard * count + place;
            let size = [(24, 17), (12, 30), (9, 9)][number % 3];
            let pixel = |x: u32, y: u32| {
                let value = x * 7 + y * 11 + number as u32 * 13;
                image::Rgb([value as u8, (value / 2) as u8, (x * y) as u8])
            };
            let picture = image::RgbImage::from_fn(size.0, size.1, pixel);
            let key = format!("{number:03}");
            [
                member(
                    &format!("{key}.png"),
                    &encoded(&picture.into(), ImageFormat::Png),
                ),
                member(&format!("{key}.txt"), format!("number {number}").as_bytes()),
                member(&format!("{key}.cls"), (number % 4).to_string().as_bytes()),
            ]
        });
        let members: Vec<_> = members.collect();
        write(folder, &format!("{shard:05}.tar"), &packed(&members));
    }
    format!("shards:{}/{{00000..00001}}.tar", folder.display())
}

/// Packs for training and opens the result.
fn pack(spec: &str, shorter_side: usize, out: &Path) -> Dataset {
    let side = shorter_side.to_string();
    let (code, text) = advxl(&[
        "data",
        "pack",
        spec,
        "--shorter-side",
        &side,
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{text}");
    open(out)
}

fn bytes_of(dataset: &Dataset, index: usize) -> (usize, usize, Vec<u8>) {
    let picture = dataset.picture(index).unwrap();
    (picture.width(), picture.height(), picture.to_bytes())
}

#[test]
fn packed_shards_hold_the_decoded_pixels_keys_captions_and_labels() {
    let folder = tempfile::tempdir().unwrap();
    let spec = photographs(folder.path(), 70);
    let source = Dataset::open(&spec.parse().unwrap(), Split::Train, 0).unwrap();
    let packed = pack(&spec, 12, &folder.path().join("packed"));
    assert_eq!(packed.len(), source.len());
    assert_eq!(
        packed.shards().unwrap().starts(),
        source.shards().unwrap().starts()
    );
    assert_ne!(packed.fingerprint(), source.fingerprint());
    for index in 0..source.len() {
        assert_eq!(packed.key_of(index).unwrap(), source.key_of(index).unwrap());
        assert_eq!(packed.label(index).unwrap(), source.label(index).unwrap());
        assert_eq!(
            packed.caption(index).unwrap(),
            source.caption(index).unwrap()
        );
        let (width, height, bytes) = bytes_of(&source, index);
        // 24 x 17 becomes 16 x 12; the shorter side of the others is not above 12.
        let expected = match width {
            24 => {
                let region = Region::whole(16, 12);
                let bytes = resize_bytes(&bytes, (24, 17), (16, 12), &region, Filter::Bicubic);
                (16, 12, bytes)
            }
            _ => (width, height, bytes),
        };
        assert_eq!(bytes_of(&packed, index), expected, "{index}");
        assert_eq!(packed.picture(index).unwrap().is_packed(), width == 24);
    }
}

#[test]
fn training_on_a_pack_without_resizing_gives_the_bits_of_training_on_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let spec = photographs(folder.path(), 40);
    let source = Dataset::open(&spec.parse().unwrap(), Split::Train, 0).unwrap();
    let packed = pack(&spec, 100, &folder.path().join("packed"));
    let batches = |dataset: Dataset, workers| {
        let plan = Plan {
            augmentation: Augmentation {
                random_resized_crop: Some(RandomResizedCrop {
                    area: [0.3, 1.0],
                    ratio: [0.75, 1.25],
                }),
                flip: true,
                ..Augmentation::default()
            },
            ..plan(120, 0)
        };
        let mut loader = Loader::new(Arc::new(dataset), plan, workers).unwrap();
        let mut batches = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            batches.push(batch);
        }
        batches
    };
    assert!(batches(source, 1) == batches(packed, 5));
}

#[test]
fn an_interrupted_pack_continues_and_other_data_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let spec = photographs(folder.path(), 10);
    let out = folder.path().join("packed");
    pack(&spec, 12, &out);
    let second = out.join("00001-12px.tar");
    let before = std::fs::read(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    let arguments = [
        "data",
        "pack",
        &spec,
        "--shorter-side",
        "12",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = command(&arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("1 of them from an earlier run; wrote 10 images"),
        "{text}"
    );
    assert_eq!(std::fs::read(&second).unwrap(), before);
    let other = tempfile::tempdir().unwrap();
    let other = photographs(other.path(), 11);
    let arguments = [
        "data",
        "pack",
        &other,
        "--shorter-side",
        "12",
        "--out",
        out.to_str().unwrap(),
    ];
    refuses(
        &arguments,
        &[
            "exists but does not belong to this pack",
            "another folder with --out",
        ],
    );
    let into = folder.path().to_str().unwrap();
    let arguments = ["data", "pack", &spec, "--shorter-side", "12", "--out", into];
    refuses(&arguments, &["contains the shards to pack"]);
}

#[test]
fn a_folder_is_packed_in_shuffled_shards_and_its_class_names_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for (class, count) in [("cat", 3), ("dog", 4)] {
        std::fs::create_dir(folder.path().join(class)).unwrap();
        for number in 0..count {
            write(
                folder.path(),
                &format!("{class}/a.{number}.png"),
                &png(number),
            );
        }
    }
    // Equal names except for the extension.
    write(folder.path(), "cat/a.0.jpg", &png(9));
    let out = tempfile::tempdir().unwrap();
    let packed = pack(folder.path().to_str().unwrap(), 8, out.path());
    assert_eq!((packed.len(), packed.classes().len()), (8, 2));
    let names = std::fs::read_to_string(out.path().join("classes.txt")).unwrap();
    assert_eq!(names, "cat\ndog\n");
    let mut keys: Vec<_> = (0..8)
        .map(|index| packed.key_of(index).unwrap().unwrap())
        .collect();
    assert!(keys.iter().any(|key| key.starts_with("cat/")));
    for (index, key) in keys.iter().enumerate() {
        let label = u32::from(key.starts_with("dog/"));
        assert_eq!(packed.label(index).unwrap(), label, "{key}");
    }
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 8);
}

#[test]
fn broken_samples_stop_a_pack_unless_they_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let members = [
        sample("000", 1),
        member("001.png", &png(2)[..40]),
        member("001.txt", b"cut short"),
        sample("002", 3),
    ];
    let path = write(folder.path(), "a.tar", &packed(&members));
    let spec = format!("shards:{}", path.display());
    let out = folder.path().join("packed");
    let arguments = [
        "data",
        "pack",
        &spec,
        "--shorter-side",
        "8",
        "--out",
        out.to_str().unwrap(),
    ];
    refuses(
        &arguments,
        &[
            "broken sample",
            "001",
            "hint: use --skip-broken to leave out broken samples",
        ],
    );
    let (code, text) = advxl(&[&arguments[..], &["--skip-broken"]].concat());
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("warning: skipped broken sample: "), "{text}");
    assert_eq!(open(&out).len(), 2);
}

#[test]
fn training_above_the_packed_size_is_refused_and_evaluations_refuse_all_packs_for_training() {
    let folder = tempfile::tempdir().unwrap();
    let spec = photographs(folder.path(), 10);
    let out = folder.path().join("packed");
    let dataset = Arc::new(pack(&spec, 12, &out));
    let numbers = "packed at 12 pixels on the shorter side, but training uses 16 pixels";
    let plan = Plan {
        image_size: 16,
        ..plan(40, 0)
    };
    let mut loader = Loader::new(dataset.clone(), plan, 2).unwrap();
    let error = loader.next_batch().unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains(numbers), "{error}");

    let packed = format!("shards:{}", out.display());
    refuses(
        &["data", "bench", &packed, "--image-size", "16"],
        &[numbers, "--shorter-side 16` or more"],
    );
    let recipe = support::write_recipe(folder.path());
    let run = folder.path().join("run");
    let train = |train: &str, test: &str| {
        let [train, test] =
            [("train", train), ("test", test)].map(|(key, spec)| format!("data.{key}=\"{spec}\""));
        let (recipe, run) = (recipe.to_str().unwrap(), run.to_str().unwrap());
        advxl(&[
            "train", recipe, "--out", run, "--set", &train, "--set", &test,
        ])
    };
    let (code, text) = train(&packed, &spec);
    assert_eq!(code, 2, "{text}");
    assert!(
        text.contains("stage `pretrain`") && text.contains(numbers),
        "{text}"
    );
    let (code, text) = train(&spec, &packed);
    assert_eq!(code, 2, "{text}");
    assert!(
        text.contains("set data.test to the original images"),
        "{text}"
    );

    let error = evaluation_batch(&dataset, &[0], &Preprocessing::new(8)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("resized by `advxl data pack` for training"),
        "{error}"
    );
}

#[test]
fn reduced_decoding_gives_the_same_bits_for_any_workers_and_does_not_affect_evaluations() {
    let golden = std::fs::read("tests/golden/jpeg_kinds.safetensors").unwrap();
    let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
    let files = golden.tensors().into_iter();
    let files = files.filter(|(name, _)| name.ends_with(" file"));
    let members = files.enumerate().map(|(number, (_, file))| {
        [
            member(&format!("{number:03}.jpg"), file.data()),
            member(&format!("{number:03}.txt"), b"a pattern"),
        ]
        .concat()
    });
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.tar",
        &packed(&members.collect::<Vec<_>>()),
    );
    let dataset = Arc::new(open(&path));
    let images = |reduced_decode, workers| {
        let plan = Plan {
            image_size: 6,
            reduced_decode,
            ..plan(66, 0)
        };
        let mut loader = Loader::new(dataset.clone(), plan, workers).unwrap();
        let mut images = Vec::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            images.extend(batch.pixels(6));
        }
        images
    };
    let (full, reduced) = (images(false, 2), images(true, 1));
    assert!(reduced == images(true, 3));
    assert!(full != reduced);
    let apart = full
        .iter()
        .zip(&reduced)
        .map(|(a, b)| f64::from((a - b).abs()));
    let mean = apart.sum::<f64>() / full.len() as f64;
    assert!(mean < 8.0 / 255.0, "{mean}");
}

/// Asserts that the program exits with code 2 and a message that contains all `parts`.
#[track_caller]
fn refuses(arguments: &[&str], parts: &[&str]) {
    let (code, text) = advxl(arguments);
    assert_eq!(code, 2, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

#[test]
fn user_errors_are_explained() {
    refuses(
        &["data", "check", "shards:"],
        &["must be followed by a pattern", "hint: use the path"],
    );
    refuses(
        &["data", "check", "shards:no/{000..002}.tar"],
        &[
            "3 of 3 shards are missing",
            "`no/000.tar`",
            "hint: shards are tar files",
        ],
    );
    refuses(
        &["data", "index", "no/*.tar"],
        &["no file matches `no/*.tar`"],
    );
    refuses(
        &[
            "data",
            "pack",
            "synthetic:3",
            "--image-size",
            "8",
            "--out",
            "x",
            "--crop-fraction",
            "1.5",
        ],
        &["--crop-fraction", "expected a number above 0 and at most 1"],
    );
    refuses(
        &[
            "data",
            "pack",
            "synthetic:3",
            "--image-size",
            "8",
            "--out",
            "x",
            "--n",
            "0",
        ],
        &["--n must be at least 1, got 0"],
    );
    refuses(
        &["data", "bench", "synthetic:3", "--seconds", "0"],
        &["above 0 and up to 86400"],
    );
    refuses(
        &["data", "bench", "synthetic:3", "--image-size", "0"],
        &["from 1 to 4096"],
    );
    refuses(
        &["data", "check", "synthetic:3", "--split", "val"],
        &["use train or test"],
    );
}

#[test]
fn shards_without_classes_cannot_train_a_classifier() {
    let folder = tempfile::tempdir().unwrap();
    let pattern = write_shards(folder.path(), &[10]);
    let recipe = support::write_recipe(folder.path());
    let set = format!("data.train=\"shards:{pattern}\"");
    let run = folder.path().join("run");
    refuses(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            run.to_str().unwrap(),
            "--set",
            &set,
        ],
        &[
            "have no labels",
            "hint: every sample needs a member such as `000.cls`",
        ],
    );
}

#[test]
fn a_loader_that_delivers_captions_requires_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.tar",
        &packed(&[member("0.png", &png(0)), member("0.cls", b"0")]),
    );
    let error = Loader::new(Arc::new(open(&path)), plan(1, 0), 1)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("no captions to train on"), "{error}");
}

/// The unpack cache of this process and its children.
static CACHE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    advxl::storage::cache::use_cache(folder.path());
    folder
});

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn health(dataset: &Dataset) -> advxl::image::Health {
    let checked = check::check(dataset, 1, &Comm::single(), |_| Ok(()), |_| {});
    checked.unwrap().health
}

fn error(pattern: &str) -> String {
    let spec = Spec::Shards(pattern.to_owned());
    let error = Dataset::open(&spec, Split::Train, 0).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn gzipped_shards_give_the_same_samples_as_plain_ones() {
    LazyLock::force(&CACHE);
    let folder = tempfile::tempdir().unwrap();
    let plain = packed(
        &(0..40)
            .map(|n| sample(&format!("{n:03}"), n))
            .collect::<Vec<_>>(),
    );
    let (first, second) = plain.split_at(plain.len() / 3);
    let two = [gzipped(first), gzipped(second), vec![0; 512]].concat();
    let expected = open(&write(folder.path(), "0.tar", &plain));
    let (order, captions) = run(
        &Arc::new(open(&folder.path().join("0.tar"))),
        plan(40, 0),
        2,
    );
    let other = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("0.tar.gz", gzipped(&plain)),
        ("0.tgz", two),
        ("0.tar", gzipped(&plain)),
    ] {
        let path = write(other.path(), name, &bytes);
        // The second time, the unpacked file is reused.
        for _ in 0..2 {
            let dataset = Arc::new(open(&path));
            assert_eq!(dataset.fingerprint(), expected.fingerprint(), "{name}");
            assert_eq!(
                run(&dataset, plan(40, 0), 2),
                (order.clone(), captions.clone())
            );
            assert_eq!(health(&dataset), health(&expected));
        }
        let (code, text) = advxl(&["data", "index", path.to_str().unwrap()]);
        assert_eq!(code, 0, "{text}");
        assert!(open(&path).notices().is_empty());
    }
    // The index next to a gzipped shard describes the unpacked shard.
    let path = other.path().join("0.tar.gz");
    assert!(other.path().join("0.tar.gz.index").is_file());
    assert_eq!(open(&path).caption(7).unwrap().unwrap(), "number 7");
    // Another shard under the same name is unpacked again, and the old one is removed.
    let files = || {
        std::fs::read_dir(CACHE.path().join("unpacked"))
            .unwrap()
            .count()
    };
    let before = files();
    write(
        other.path(),
        "0.tar.gz",
        &gzipped(&packed(&[sample("new", 1)])),
    );
    let dataset = open(&path);
    assert_eq!(
        (dataset.len(), dataset.caption(0).unwrap().unwrap().as_str()),
        (1, "number 1")
    );
    assert_eq!(files(), before);
}

#[test]
fn a_damaged_gzip_file_gives_the_samples_that_could_be_unpacked_and_is_named() {
    LazyLock::force(&CACHE);
    let folder = tempfile::tempdir().unwrap();
    let plain = packed(
        &(0..40)
            .map(|n| sample(&format!("{n:03}"), n))
            .collect::<Vec<_>>(),
    );
    let sound = gzipped(&plain);
    let mut checksum = sound.clone();
    checksum[sound.len() - 8] ^= 1;
    let cut = sound[..sound.len() * 2 / 3].to_vec();
    for (name, bytes, least) in [("cut.tar.gz", cut, 15), ("sum.tar.gz", checksum, 40)] {
        let path = write(folder.path(), name, &bytes);
        for _ in 0..2 {
            let dataset = open(&path);
            assert!(dataset.len() >= least, "{name}: {}", dataset.len());
            assert_eq!(dataset.caption(3).unwrap().unwrap(), "number 3");
            assert_eq!(health(&dataset).count(Reason::DamagedGzip), 1, "{name}");
            let notice = dataset.notices().concat();
            assert!(
                notice.contains("is damaged or truncated") && notice.contains(name),
                "{notice}"
            );
        }
    }
}

#[test]
fn files_that_are_not_tars_are_named_by_their_format() {
    LazyLock::force(&CACHE);
    let folder = tempfile::tempdir().unwrap();
    let pointer: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n";
    let page: &[u8] = b"<!DOCTYPE html><html><body>Sign in</body></html>";
    let cases: [(&[u8], [&str; 2]); 12] = [
        (pointer, ["a Git LFS pointer", "git lfs pull"]),
        (page, ["an HTML page", "download the file again"]),
        (b"", ["an empty file", "download it again"]),
        (b"PK\x03\x04and so on", ["a zip archive", "unzip "]),
        (b"7z\xbc\xaf\x27\x1c", ["a 7z archive", "7z x "]),
        (
            b"\x28\xb5\x2f\xfd1234",
            ["a Zstandard archive", "`zstd -d "],
        ),
        (b"\xfd7zXZ\0\0", ["an xz archive", "`xz -d "]),
        (b"BZh91AY&SY", ["a bzip2 archive", "`bzip2 -d "]),
        (&[0; 20_000], ["only zeros", "copy it again"]),
        (&png(1), ["an image", "without `shards:`"]),
        (b"PAR1....", ["a Parquet file", "WebDataset shards"]),
        (
            b"hello, this is a text",
            ["not a tar file", "download it again"],
        ),
    ];
    for (bytes, parts) in cases {
        let path = write(folder.path(), "x.tar", bytes);
        let text = error(path.to_str().unwrap());
        assert!(text.contains("contains no samples: `"), "{text}");
        for part in parts {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        assert!(!text.contains("FILE"), "{text}");
    }
    // Gzipped, but not a tar.
    let path = write(folder.path(), "x.tar.gz", &gzipped(page));
    assert!(error(path.to_str().unwrap()).contains("an HTML page"));
    // A tar without samples is reported differently.
    let path = write(
        folder.path(),
        "x.tar",
        &packed(&[member("README.md", b"hello")]),
    );
    let text = error(path.to_str().unwrap());
    assert!(
        text.contains("contains no samples\n") && text.contains("such as `000.jpg`"),
        "{text}"
    );
    // One such file among valid shards is damage.
    write(folder.path(), "x.tar", pointer);
    write(folder.path(), "y.tar", &packed(&[sample("y", 1)]));
    let dataset = open(&folder.path().join("?.tar"));
    assert_eq!(
        (dataset.len(), health(&dataset).count(Reason::NotATar)),
        (1, 1)
    );
    let notice = dataset.notices().concat();
    assert!(
        notice.contains("not a tar file") && notice.contains("Git LFS pointer"),
        "{notice}"
    );
}

#[test]
fn names_with_several_dots_are_explained_by_webdatasets_rule() {
    let folder = tempfile::tempdir().unwrap();
    let inputs: Vec<_> = (0..5)
        .map(|n| {
            [
                member(&format!("s{n}.input.jpg"), &png(n)),
                member(&format!("s{n}.cls"), b"1"),
            ]
            .concat()
        })
        .collect();
    let text = error(
        write(folder.path(), "a.tar", &packed(&inputs))
            .to_str()
            .unwrap(),
    );
    for part in [
        "none of the 5 samples",
        "a.tar: s0",
        "first dot",
        "WebDataset's key",
        "rename",
    ] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    // Two images with one key: neither is read.
    let dates = packed(&[
        member("22.05.0.jpg", &png(1)),
        member("22.05.1.jpg", &png(2)),
        sample("ok", 3),
    ]);
    let dataset = open(&write(folder.path(), "b.tar", &dates));
    assert_eq!(dataset.len(), 2);
    let fault = dataset.read(1, false).unwrap_err();
    assert_eq!(fault.reason, Reason::DottedKey);
    assert!(
        fault.error.to_string().contains("b.tar: 22"),
        "{}",
        fault.error
    );
    // A mask next to the image is only an unused member.
    let masks = packed(&[member("0.jpg", &png(1)), member("0.seg.png", &png(2))]);
    let dataset = open(&write(folder.path(), "c.tar", &masks));
    assert_eq!(dataset.len(), 1);
    assert!(dataset.read(0, false).is_ok());
    assert_eq!(health(&dataset).count(Reason::UnusedMember), 1);
}

/// Writes a shard of a hundred samples whose labels are their numbers modulo 5, except one.
fn labeled(folder: &Path, odd: Option<&[u8]>) -> Arc<Dataset> {
    let members: Vec<_> = (0..100)
        .map(|n| {
            let label = format!("{}", n % 5);
            let label = match n {
                17 => odd,
                _ => Some(label.as_bytes()),
            };
            let label = label.map_or(Vec::new(), |label| member(&format!("{n:03}.cls"), label));
            [sample(&format!("{n:03}"), n), label].concat()
        })
        .collect();
    Arc::new(open(&write(folder, "l.tar", &packed(&members))))
}

#[test]
fn one_bad_label_is_a_broken_sample_and_the_others_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let too_many = [b'1'; 80];
    for odd in [
        Some(&b"cat"[..]),
        Some(b"-1"),
        Some(b"1000000"),
        Some(b"99999999999999999999"),
        Some(b"1 2"),
        Some(b"2.0"),
        Some(b"\xff"),
        Some(b""),
        Some(&too_many),
        None,
    ] {
        let dataset = labeled(folder.path(), odd);
        assert_eq!(dataset.classes().len(), 5, "{odd:?}");
        let mut broken = Vec::new();
        let look = |sample: &advxl::data::Broken| {
            broken.push((sample.sample, sample.kind));
            Ok(())
        };
        check::check(&dataset, 2, &Comm::single(), look, |_| {}).unwrap();
        assert_eq!(broken, [(17, Reason::BadLabel)], "{odd:?}");
        let plan = Plan {
            broken_rate: Some(0.02),
            ..plan(100, 0)
        };
        let mut loader = Loader::new(dataset, plan, 2).unwrap();
        while loader.next_batch().unwrap().is_some() {}
        assert_eq!(loader.broken()[0].kind, Reason::BadLabel);
        assert!(loader.broken()[0].name.contains("l.tar: 017"));
    }
    // Python's `int` accepts white space, a sign and a byte order mark.
    for sound in [&b" 2\r\n"[..], b"+2", b"\xef\xbb\xbf2", b"002\n\n"] {
        let dataset = labeled(folder.path(), Some(sound));
        assert_eq!(
            (dataset.label(17).unwrap(), health(&dataset).damages()),
            (2, 0)
        );
    }
}

#[test]
fn many_samples_without_labels_are_a_data_set_without_classes() {
    let folder = tempfile::tempdir().unwrap();
    let members: Vec<_> = (0..100).map(|n| sample(&format!("{n:03}"), n)).collect();
    write(folder.path(), "m.tar", &packed(&members));
    labeled(folder.path(), None);
    let dataset = open(&folder.path().join("[lm].tar"));
    assert!(dataset.classes().is_empty());
    assert_eq!(dataset.shards().unwrap().unlabeled(), 101);
    let health = health(&dataset);
    assert_eq!(
        (health.count(Reason::MissingLabel), health.damages()),
        (101, 0)
    );
    // All labels are names.
    let names = [member("0.png", &png(1)), member("0.cls", b"cat")];
    let text = error(
        write(folder.path(), "n.tar", &packed(&names))
            .to_str()
            .unwrap(),
    );
    assert!(
        text.contains("none of the 1 samples") && text.contains("class number"),
        "{text}"
    );
}

#[test]
fn folders_sets_and_webdatasets_separator_name_shards() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap();
    for name in ["10.tar", "2.tar", "a.tar", ".hidden.tar", "notes.txt"] {
        write(
            folder.path(),
            name,
            &packed(&[sample(
                name.trim_start_matches('.')
                    .split('.')
                    .next()
                    .unwrap_or_default(),
                1,
            )]),
        );
    }
    let names = |pattern: &str| -> Vec<String> {
        let dataset = open(Path::new(pattern));
        let names = (0..dataset.len()).map(|sample| dataset.key_of(sample).unwrap().unwrap());
        names.collect()
    };
    assert_eq!(names(root), ["10", "2", "a"]);
    assert_eq!(names(&format!("{root}/")), ["10", "2", "a"]);
    assert_eq!(names(&format!("{root}/[0-9]*.tar")), ["10", "2"]);
    assert_eq!(names(&format!("{root}/[!0-9].tar")), ["a"]);
    assert_eq!(names(&format!("{root}/2.tar::{root}/a.tar")), ["2", "a"]);
    assert_eq!(names(&format!("{root}/{{2,a}}.tar")), ["2", "a"]);
    assert_eq!(names(&format!("file://{root}/a.tar")), ["a"]);
    let deep = folder.path().join("deep/deeper");
    std::fs::create_dir_all(&deep).unwrap();
    assert!(error(deep.to_str().unwrap()).contains("no `.tar` files in folder `"));
    write(&deep, "0.tar", b"");
    let text = error(folder.path().join("deep").to_str().unwrap());
    assert!(
        text.contains("did you mean `shards:") && text.contains("/deep/*/*.tar`"),
        "{text}"
    );
    assert!(error("pipe:cat x.tar").contains("`pipe:` commands are not supported"));
    // `~` is the user's home folder, also in recipes, where no shell expands it.
    let mut command = command(&["data", "check", "shards:~/[a-b].tar", "--json"]);
    let output = command.env("HOME", root).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["samples"], 1);
}

/// Returns the tensors recorded by `make_shards.py`.
fn recorded() -> Vec<(String, Vec<u8>)> {
    let recorded = include_bytes!("golden/shards.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(recorded).unwrap();
    let tensors = tensors.tensors().into_iter();
    tensors
        .map(|(name, tensor)| (name, tensor.data().to_vec()))
        .collect()
}

#[test]
fn tars_of_every_form_have_the_members_that_python_finds() {
    LazyLock::force(&CACHE);
    let folder = tempfile::tempdir().unwrap();
    let recorded = recorded();
    let mut seen = 0;
    for (name, packed) in recorded.iter().filter(|(name, _)| name.ends_with(" tar")) {
        let name = name.trim_end_matches(" tar");
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_end(&mut bytes)
            .unwrap();
        let path = write(folder.path(), "x.tar", &bytes);
        let objects = store::Object::find(vec![store::Location::File(path.clone())]);
        let reader = objects.unwrap()[0].reader().unwrap();
        let (mut found, mut sparse) = (Vec::new(), Vec::new());
        let text = |name: Vec<u8>| String::from_utf8(name).unwrap();
        tar::scan(&reader, |member| match member {
            tar::TarEntry::Member { name, at, length } => {
                let mut sum = flate2::Crc::new();
                sum.update(&reader.bytes(at, length).unwrap().unwrap());
                found.push((text(name), length, sum.sum()));
            }
            tar::TarEntry::Damage {
                reason: Reason::SparseMember,
                name,
                ..
            } => {
                sparse.push(text(name.unwrap()));
            }
            tar::TarEntry::Damage {
                reason: Reason::LinkMember,
                ..
            } => {}
            other => panic!("{name}: {other:?}"),
        })
        .unwrap();
        let members = recorded
            .iter()
            .find(|(found, _)| *found == format!("{name} members"));
        let members: Vec<(String, u64, u32)> = serde_json::from_slice(&members.unwrap().1).unwrap();
        // Sparse members are named and not read.
        let (holes, plain): (Vec<_>, Vec<_>) = members
            .into_iter()
            .partition(|(name, ..)| name == "holes.png");
        assert_eq!(found, plain, "{name}");
        assert_eq!(
            sparse,
            holes.into_iter().map(|(name, ..)| name).collect::<Vec<_>>(),
            "{name}"
        );
        seen += 1;
        if name.starts_with("sparse") {
            let dataset = open(&path);
            assert_eq!(dataset.len(), 2, "{name}: no phantom samples");
            assert_eq!(
                dataset.read(1, false).unwrap_err().reason,
                Reason::SparseMember
            );
        }
    }
    assert_eq!(seen, 9);
}

#[test]
fn json_has_the_values_that_python_reads() {
    let recorded = recorded();
    let (_, cases) = recorded.iter().find(|(name, _)| name == "json").unwrap();
    let cases: Vec<(String, Option<(serde_json::Value,)>)> = serde_json::from_slice(cases).unwrap();
    assert!(cases.len() > 50);
    for (hex, expected) in cases {
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let text: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let found = advxl::json::parse(&text).ok();
        let expected = expected.map(|(value,)| value);
        assert_eq!(found, expected, "{}", text.escape_ascii());
    }
}

#[test]
fn a_caption_is_read_from_json_as_python_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let json = [
        &br#"{"caption": "a cat", "pwatermark": NaN, "punsafe": Infinity}"#[..],
        b"\xef\xbb\xbf{\"caption\": \"a cat\"}",
        br#"{"caption": "a cat", "author": "\ud83d"}"#,
    ];
    let members: Vec<_> = (0..3)
        .map(|n| {
            [
                member(&format!("{n}.png"), &png(n)),
                member(&format!("{n}.json"), json[n]),
            ]
            .concat()
        })
        .collect();
    let dataset = open(&write(folder.path(), "a.tar", &packed(&members)));
    for n in 0..3 {
        assert_eq!(dataset.caption(n).unwrap().unwrap(), "a cat");
    }
    assert_eq!(health(&dataset).damages(), 0);
}

#[test]
fn duplicate_keys_are_refused_before_anything_is_embedded() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| write(folder.path(), name, text).display().to_string();
    let captions = file("captions.txt", b"one\ntwo\nthree\n");
    let keys = file("keys.txt", b"\xef\xbb\xbf./00\n01\n00\n");
    let out = folder.path().join("out.safetensors");
    let out = out.to_str().unwrap();
    refuses(
        &[
            "embed",
            "no-model",
            "--captions",
            &captions,
            "--keys",
            &keys,
            "--out",
            out,
        ],
        &["keys.txt`: lines 1 and 3 have the same key `00`"],
    );
}

#[test]
fn samples_of_two_shards_do_not_share_an_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let embeddings = folder.path().join("e.safetensors");
    let keys = ["./0", "./1", "./2", "./3"].map(str::to_owned);
    let layout = Layout {
        rows: 4,
        width: 8,
        half: false,
        token_ids: false,
        key_bytes: keys.iter().map(|key| key.len() as u64 + 1).sum(),
        made_by: MadeBy {
            text_model: "x".into(),
            context: 4,
        },
    };
    let mut writer = EmbeddingWriter::create(&embeddings, layout).unwrap();
    writer
        .push(
            &(0..32).map(|n| (n as f32).sin()).collect::<Vec<_>>(),
            &[],
            &keys,
        )
        .unwrap();
    writer.finish().unwrap();
    let train = |shards: [&[&str]; 2]| {
        for (name, keys) in ["a.tar", "b.tar"].iter().zip(shards) {
            let members: Vec<_> = (1..).zip(keys).map(|(n, key)| sample(key, n)).collect();
            write(folder.path(), name, &packed(&members));
        }
        let recipe = format!(
            r#"
seed = 1
precision = "f32"
model = {{ size = "vit_micro", width = 16, depth = 1, heads = 1, hidden = 16, pool = "average", class_token = false, position = "sincos2d" }}
data = {{ train = "shards:{root}/?.tar", test = "synthetic:8" }}
checkpoint = {{ every_samples = 4, keep = 2 }}
log = {{ every_samples = 4 }}
[[stage]]
name = "captions"
batch = 4
phases = [{{ image_size = 16, samples = 4 }}]
objective = {{ kind = "contrastive" }}
text = {{ embeddings = "{embeddings}" }}
optimizer = {{ kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }}
learning_rate = {{ peak = 1e-3, warmup_samples = 4, decay = "cosine" }}
augmentation = {{ flip = false }}
"#,
            root = folder.path().display(),
            embeddings = embeddings.display()
        );
        let path = write(folder.path(), "recipe.toml", recipe.as_bytes());
        let out = folder.path().join(shards.concat().concat());
        advxl(&[
            "train",
            path.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ])
    };
    let (code, text) = train([&["0", "1"], &["2", "3"]]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = train([&["0", "1"], &["1", "2"]]);
    assert_eq!(code, 2, "{text}");
    for part in [
        "2 samples have the same key `1`",
        "a.tar: 1`",
        "b.tar: 1`",
        "share one embedding",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    let (code, text) = train([&["0", "1"], &["2", "9"]]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("has no embedding for sample `9`"), "{text}");
}
