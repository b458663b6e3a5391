//! Shards on a web server: the same samples as from files, failures of servers, and the requests sent.
//!
//! The server is implemented here so that it can fail on purpose. Stores with signatures (S3, Google) are tested
//! manually, see docs/guides/data.md.
#![cfg(feature = "cloud")]

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use advxl::data::{
    Augmentation, Dataset, Loader, Plan, Share, Spec, Split, evaluation_batch, shards,
};
use advxl::error::{Error, Result};
use advxl::image::{Preprocessing, resize};
use support::command;

/// How the server answers a request.
#[derive(Clone, Copy)]
enum Answer {
    Right,
    Status(u16),
    /// Sends half of the body, then closes the connection.
    BreaksOff,
    Slow(Duration),
    /// Sends the whole object, ignoring the range.
    NoRange,
    /// As `Right`, with this ETag.
    Tag(&'static str),
}

/// A request: its method, path and range.
#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    range: Option<(usize, usize)>,
}

type Decide = dyn Fn(&Request) -> Answer + Send + Sync;

/// A web server for files in memory, with a log of requests.
struct Server {
    root: String,
    log: Arc<Mutex<Vec<Request>>>,
    decide: Arc<Mutex<Arc<Decide>>>,
}

/// Contents and modification time (in seconds) of files by name.
type Files = HashMap<String, (Vec<u8>, u64)>;

impl Server {
    /// Serves the files of a folder.
    fn of(folder: &Path) -> Self {
        let mut files = Files::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let changed = path.metadata().unwrap().modified().unwrap();
            let seconds = changed
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs();
            files.insert(
                format!("/data/{name}"),
                (std::fs::read(path).unwrap(), seconds),
            );
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            root: format!("http://{}/data", listener.local_addr().unwrap()),
            log: Arc::default(),
            decide: Arc::new(Mutex::new(Arc::new(|_: &Request| Answer::Right))),
        };
        let (files, log, decide) = (Arc::new(files), server.log.clone(), server.decide.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log, decide) = (files.clone(), log.clone(), decide.clone());
                std::thread::spawn(
                    move || while serve(&stream, &files, &log, &decide).is_some() {},
                );
            }
        });
        server
    }

    fn answers(&self, decide: impl Fn(&Request) -> Answer + Send + Sync + 'static) {
        *self.decide.lock().unwrap() = Arc::new(decide);
    }

    /// Returns the requests since the last call.
    fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn pattern(&self, shards: usize) -> String {
        format!("{}/{{00000..{:05}}}.tar", self.root, shards - 1)
    }
}

/// Reads one request and answers it. Returns `None` at the end of the connection.
fn serve(
    stream: &TcpStream,
    files: &Files,
    log: &Mutex<Vec<Request>>,
    decide: &Mutex<Arc<Decide>>,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut range = None;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let header = header.trim().to_ascii_lowercase();
        if let Some(printed) = header.strip_prefix("range: bytes=") {
            let (from, to) = printed.split_once('-')?;
            range = Some((from.parse().ok()?, to.parse::<usize>().ok()? + 1));
        }
    }
    let request = Request {
        method,
        path,
        range,
    };
    log.lock().unwrap().push(request.clone());
    let decide = decide.lock().unwrap().clone();
    let answer = decide(&request);
    if let Answer::Slow(time) = answer {
        std::thread::sleep(time);
    }
    let mut out = stream;
    let found = files.get(&request.path);
    let (bytes, seconds) = match (answer, found) {
        (Answer::Status(status), _) => {
            let head = format!("HTTP/1.1 {status} No\r\ncontent-length: 2\r\n\r\n");
            let body = if request.method == "HEAD" { "" } else { "no" };
            return out.write_all((head + body).as_bytes()).ok();
        }
        (_, None) => {
            let head = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
            return out.write_all(head.as_bytes()).ok();
        }
        (_, Some((bytes, seconds))) => (bytes, *seconds),
    };
    let range = request.range.filter(|_| !matches!(answer, Answer::NoRange));
    let (from, to) = range.unwrap_or((0, bytes.len()));
    let to = to.min(bytes.len());
    let (status, content_range) = match range {
        None => ("200 OK", String::new()),
        Some(_) => (
            "206 Partial Content",
            format!("content-range: bytes {from}-{}/{}\r\n", to - 1, bytes.len()),
        ),
    };
    let tag = match answer {
        Answer::Tag(tag) => tag,
        _ => "one",
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: \"{tag}\"\r\nlast-modified: {}\r\n{content_range}\r\n",
        to - from,
        date(seconds)
    );
    out.write_all(head.as_bytes()).ok()?;
    if request.method == "HEAD" {
        return Some(());
    }
    if matches!(answer, Answer::BreaksOff) {
        let _ = out.write_all(&bytes[from..from + (to - from) / 2]);
        let _ = stream.shutdown(std::net::Shutdown::Both);
        return None;
    }
    out.write_all(&bytes[from..to]).ok()
}

/// Formats seconds since 1970 as an HTTP date. Source: days of civil dates by H. Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms".
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][(days % 7) as usize];
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    let names = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let name = &names[3 * (month as usize - 1)..3 * month as usize];
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{weekday}, {day:02} {name} {year} {hour:02}:{minute:02}:{second:02} GMT")
}

#[test]
fn the_test_server_formats_dates() {
    assert_eq!(date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    assert_eq!(date(1_709_210_096), "Thu, 29 Feb 2024 12:34:56 GMT");
}

/// Returns a member's ustar header and padded contents.
fn member(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[124..136].copy_from_slice(format!("{:011o}\0", contents.len()).as_bytes());
    block[148..156].copy_from_slice(b"        ");
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.extend(contents);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

/// Returns an image of 32 x 32 pixels whose colors encode its number.
fn png(number: usize) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(32, 32, |x, y| {
        image::Rgb([(number % 256) as u8, (number / 256) as u8, (x * y) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// Writes shards `00000.tar`, ... with the given numbers of samples, numbered consecutively, with captions and classes.
fn write_shards(folder: &Path, counts: &[usize]) -> String {
    let mut number = 0;
    for (shard, count) in counts.iter().enumerate() {
        let mut tar = Vec::new();
        for _ in 0..*count {
            tar.extend(member(&format!("{number:09}.png"), &png(number)));
            tar.extend(member(
                &format!("{number:09}.txt"),
                format!("number {number}").as_bytes(),
            ));
            tar.extend(member(
                &format!("{number:09}.cls"),
                (number % 4).to_string().as_bytes(),
            ));
            number += 1;
        }
        tar.extend([0; 1024]);
        std::fs::write(folder.join(format!("{shard:05}.tar")), tar).unwrap();
    }
    format!(
        "{}/{{00000..{:05}}}.tar",
        folder.display(),
        counts.len() - 1
    )
}

const COUNTS: [usize; 5] = [17, 1, 40, 22, 31];

/// Returns the cache folder, shared by all tests, since each server has a different address.
fn cache() -> PathBuf {
    static CACHE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = CACHE.get_or_init(|| tempfile::tempdir().unwrap()).path();
    advxl::storage::cache::use_cache(folder);
    folder.to_owned()
}

fn open(pattern: &str) -> Result<Dataset> {
    cache();
    Dataset::open(&Spec::Shards(pattern.to_owned()), Split::Train, 0)
}

fn failed(pattern: &str) -> Error {
    open(pattern).expect_err("it must not open")
}

fn plan(samples: u64, position: u64) -> Plan {
    Plan {
        seed: 3,
        batch: 24,
        image_size: 16,
        augmentation: Augmentation {
            flip: true,
            ..Augmentation::default()
        },
        mixing: None,
        position,
        samples,
        broken_rate: Some(1.0),
        reduced_decode: false,
        captions: true,
        share: Share::default(),
    }
}

/// Samples, pixels and captions of a run.
type Run = (Vec<u64>, Vec<f32>, Vec<String>);

fn run(dataset: &Arc<Dataset>, plan: Plan, threads: usize) -> Result<Run> {
    let mut loader = Loader::new(dataset.clone(), plan, threads)?;
    let (mut samples, mut pixels, mut captions) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(batch) = loader.next_batch()? {
        samples.extend(batch.samples);
        pixels.extend(batch.images.into_floats());
        captions.extend(batch.captions);
    }
    assert!(loader.broken().is_empty(), "{:?}", loader.broken());
    Ok((samples, pixels, captions))
}

/// Runs the program with short timeouts and the tests' cache. Returns the exit code and all output.
fn program(arguments: &[&str]) -> (i32, String) {
    let mut command = command(arguments);
    command
        .env("ADVXL_STORE_PATIENCE", "1")
        .env("ADVXL_CACHE", cache());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn samples_equal_those_of_files_for_any_number_of_threads_and_from_any_position() {
    let folder = tempfile::tempdir().unwrap();
    let local = write_shards(folder.path(), &COUNTS);
    let server = Server::of(folder.path());
    let files = Arc::new(open(&local).unwrap());
    let objects = Arc::new(open(&server.pattern(5)).unwrap());
    assert_eq!(objects.fingerprint(), files.fingerprint());
    assert_eq!(objects.classes(), ["0", "1", "2", "3"]);
    let whole = run(&files, plan(250, 0), 1).unwrap();
    for threads in [1, 2, 3] {
        assert!(
            run(&objects, plan(250, 0), threads).unwrap() == whole,
            "{threads} threads"
        );
    }
    for position in [1_u64, 48, 110, 112, 201] {
        let fresh = Arc::new(open(&server.pattern(5)).unwrap());
        let rest = run(&fresh, plan(250 - position, position), 2).unwrap();
        assert_eq!(rest.0, whole.0[position as usize..], "from {position}");
        assert!(
            rest.1 == whole.1[position as usize * 3 * 256..],
            "from {position}"
        );
    }
    // Files and objects in one data set, and one sample at a time.
    let mixed = format!(
        "{}/00000.tar,{}/{{00001..00004}}.tar",
        folder.path().display(),
        server.root
    );
    let mixed = open(&mixed).unwrap();
    let preprocessing = Preprocessing {
        interpolation: resize::Filter::Bicubic,
        ..Preprocessing::new(24)
    };
    let all: Vec<usize> = (0..111).collect();
    let images = |dataset: &Dataset| evaluation_batch(dataset, &all, &preprocessing).unwrap();
    assert!(images(&mixed) == images(&files));
    for sample in [0, 16, 17, 110] {
        assert_eq!(
            mixed.caption(sample).unwrap(),
            files.caption(sample).unwrap()
        );
        assert_eq!(mixed.label(sample).unwrap(), files.label(sample).unwrap());
        assert_eq!(mixed.key_of(sample).unwrap(), files.key_of(sample).unwrap());
    }
}

#[test]
fn shards_are_scanned_once_and_then_each_sample_takes_one_request() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &COUNTS);
    let server = Server::of(folder.path());
    let of = |asked: &[Request], what: &str| {
        let kind = |request: &&Request| {
            let kind = match request.method.as_str() {
                "HEAD" => "head",
                _ if request.path.ends_with(".index") => "index",
                _ => "bytes",
            };
            kind == what
        };
        asked.iter().filter(kind).count()
    };
    let first = open(&server.pattern(5)).unwrap();
    let asked = server.asked();
    // Each is smaller than a block.
    assert_eq!(
        ["head", "index", "bytes"].map(|what| of(&asked, what)),
        [5, 5, 5]
    );
    let notice = first.notices().join("\n");
    assert!(
        notice.contains("5 shards were read once to index them"),
        "{notice}"
    );
    assert!(notice.contains(&cache().display().to_string()), "{notice}");

    let again = Arc::new(open(&server.pattern(5)).unwrap());
    assert!(again.notices().is_empty());
    let asked = server.asked();
    assert_eq!(
        ["head", "index", "bytes"].map(|what| of(&asked, what)),
        [5, 0, 0]
    );
    run(&again, plan(111, 0), 2).unwrap();
    let asked = server.asked();
    assert_eq!(
        ["head", "index", "bytes"].map(|what| of(&asked, what)),
        [0, 0, 111]
    );
    // An image and its caption, with the header between them.
    let longest = asked.iter().filter_map(|request| request.range);
    assert!(longest.map(|(from, to)| to - from).max().unwrap() < 6000);
}

#[test]
fn an_index_next_to_a_shard_in_the_store_is_used_only_if_it_matches() {
    let folder = tempfile::tempdir().unwrap();
    let local = write_shards(folder.path(), &COUNTS);
    shards::save_indexes(&local, |_, _| {}).unwrap();
    let server = Server::of(folder.path());
    // The server sends the modification time of the file, which the index records.
    let dataset = open(&server.pattern(5)).unwrap();
    assert!(dataset.notices().is_empty(), "{:?}", dataset.notices());
    assert!(
        server
            .asked()
            .iter()
            .all(|request| request.range == Some((0, 64)) || request.method == "HEAD")
    );
    assert_eq!(dataset.caption(110).unwrap().unwrap(), "number 110");

    // Another shard under the same name.
    let other = tempfile::tempdir().unwrap();
    write_shards(other.path(), &[17, 1, 40, 22, 30]);
    std::fs::copy(
        other.path().join("00004.tar"),
        folder.path().join("00004.tar"),
    )
    .unwrap();
    let server = Server::of(folder.path());
    let dataset = open(&server.pattern(5)).unwrap();
    assert_eq!(dataset.len(), 110);
    let notice = dataset.notices().join("\n");
    assert!(
        notice.contains("1 saved indexes do not match their shards"),
        "{notice}"
    );

    let (code, text) = program(&["data", "index", &server.pattern(5)]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("5 shards with 110 samples, 0 indexes written"),
        "{text}"
    );
}

#[test]
fn temporary_failures_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let local = write_shards(folder.path(), &COUNTS);
    let files = Arc::new(open(&local).unwrap());
    let right = run(&files, plan(111, 0), 1).unwrap();
    for kind in 0..4 {
        let server = Server::of(folder.path());
        let count = AtomicUsize::new(0);
        server.answers(
            move |_| match (count.fetch_add(1, Ordering::Relaxed) % 5, kind) {
                (2, 0) => Answer::Status(503),
                (2, 1) => Answer::BreaksOff,
                (2, 2) => Answer::Slow(Duration::from_millis(200)),
                (2, _) => Answer::Status(429),
                _ => Answer::Right,
            },
        );
        let objects = Arc::new(open(&server.pattern(5)).unwrap());
        assert!(
            run(&objects, plan(111, 0), 2).unwrap() == right,
            "kind {kind}"
        );
    }
}

#[test]
fn missing_or_refused_objects_are_reported_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &[3, 3]);
    let server = Server::of(folder.path());
    let error = failed(&server.pattern(4));
    let text = error.to_string();
    assert!(
        text.contains("2 of 4 shards do not exist: the store returned 404 for"),
        "{text}"
    );
    assert!(
        text.contains(&format!("`{}/00002.tar`", server.root)),
        "{text}"
    );
    assert_eq!(error.exit_code(), 2);

    for (status, printed) in [
        (403, "the server returned 403"),
        (401, "the server returned 401"),
        (400, "the server returned 400"),
    ] {
        server.answers(move |_| Answer::Status(status));
        let error = failed(&server.pattern(2));
        let text = error.to_string();
        assert!(
            text.contains(printed)
                && text.contains("cannot read `")
                && text.contains("/00000.tar`: "),
            "{text}"
        );
        assert!(text.contains("hint: "), "{text}");
        assert_eq!(error.exit_code(), 2, "{text}");
    }

    server.answers(|_| Answer::NoRange);
    let text = failed(&server.pattern(2)).to_string();
    assert!(
        text.contains("did not return the requested byte range"),
        "{text}"
    );

    let text = failed(&format!("{}/*.tar", server.root)).to_string();
    assert!(
        text.contains("globs and `?` queries are not supported for web servers"),
        "{text}"
    );
    let text = failed("s3://bucket").to_string();
    assert!(text.contains("missing bucket, host or path"), "{text}");
    let text = failed("az://bucket/{0..1}.tar").to_string();
    assert!(text.contains("unsupported URL scheme `az`"), "{text}");
    let text = "s3://bucket/0.tar".parse::<Spec>().unwrap_err().to_string();
    assert!(
        text.contains("did you mean `shards:s3://bucket/0.tar`?"),
        "{text}"
    );
}

#[test]
fn an_object_that_is_not_a_tar_is_named_with_the_command_that_helps() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &[3]);
    let plain = std::fs::read(folder.path().join("00000.tar")).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &plain).unwrap();
    std::fs::write(folder.path().join("1.tar.gz"), encoder.finish().unwrap()).unwrap();
    std::fs::write(folder.path().join("2.tar"), "<html>Not found</html>").unwrap();
    let server = Server::of(folder.path());
    let error = failed(&format!("{}/1.tar.gz", server.root));
    let text = error.to_string();
    let command = format!("`curl -L {}/1.tar.gz | gunzip > 1.tar`", server.root);
    assert!(
        text.contains("is gzipped") && text.contains(&command),
        "{text}"
    );
    assert_eq!(error.exit_code(), 2);
    let text = failed(&format!("{}/2.tar", server.root)).to_string();
    assert!(text.contains("2.tar` is an HTML page"), "{text}");
}

#[test]
fn a_shard_that_changed_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &COUNTS);
    let server = Server::of(folder.path());
    let objects = Arc::new(open(&server.pattern(5)).unwrap());
    server.answers(|request| match request.path.ends_with("2.tar") {
        true => Answer::Tag("two"),
        false => Answer::Right,
    });
    // Regardless of the number of broken samples allowed.
    let error = run(&objects, plan(111, 0), 2).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(
            "00002.tar` has changed since it was opened: its ETag was \"one\" and is now \"two\""
        ),
        "{text}"
    );
    assert_eq!(error.exit_code(), 2);
    // After a restart, the old index is not used.
    server.asked();
    let dataset = open(&server.pattern(5)).unwrap();
    assert!(
        dataset.notices()[0].contains("1 shards were read once to index them"),
        "{:?}",
        dataset.notices()
    );

    server.answers(|request| match request.path.ends_with("2.tar") {
        true => Answer::Status(404),
        false => Answer::Right,
    });
    let text = run(&objects, plan(111, 0), 2).unwrap_err().to_string();
    assert!(text.contains("it no longer exists"), "{text}");
}

/// Writes a recipe of one short stage with the images at `place`.
fn recipe(folder: &Path, place: &str) -> PathBuf {
    let images = format!(
        "data = {{ train = \"shards:{place}\", test = \"shards:{place}\", broken_rate = 0.9, test_on_train = true }}"
    );
    let text = support::RECIPE.replace(
        "data = { train = \"synthetic:200\", test = \"synthetic:64\" }",
        &images,
    );
    assert!(text.contains(&images));
    let path = folder.join("recipe.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Returns the bytes of a run's weights, by name.
fn weights(run: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(run.join("model/model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, tensor)| (name, tensor.data().to_vec()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_run_whose_store_fails_exits_with_75_and_resumes_to_the_weights_of_a_run_on_files() {
    let folder = tempfile::tempdir().unwrap();
    let (data, far, near) = ["data", "far", "near"]
        .map(|name| {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        })
        .into();
    let local = write_shards(&data, &COUNTS);
    let server = Server::of(&data);
    let train = |folder: &Path, place: &str| {
        let (recipe, out) = (recipe(folder, place), folder.join("run"));
        program(&[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ])
    };
    let (code, text) = train(&near, &local);
    assert_eq!(code, 0, "{text}");

    let count = AtomicUsize::new(0);
    server.answers(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        ..300 => Answer::Right,
        _ => Answer::Status(500),
    });
    let (code, text) = train(&far, &server.pattern(5));
    assert_eq!(code, 75, "{text}");
    assert!(
        text.contains("the server returned 500") && text.contains("run the same command again"),
        "{text}"
    );
    assert!(!far.join("run/quarantine.jsonl").exists(), "{text}");

    server.answers(|_| Answer::Right);
    let (code, text) = train(&far, &server.pattern(5));
    assert_eq!(code, 0, "{text}");
    assert!(!far.join("run/quarantine.jsonl").exists(), "{text}");
    assert!(weights(&far.join("run")) == weights(&near.join("run")));
}

#[test]
fn data_commands_read_stores_and_do_not_count_an_outage_as_damage() {
    let folder = tempfile::tempdir().unwrap();
    let local = write_shards(folder.path(), &COUNTS);
    let server = Server::of(folder.path());
    let spec = format!("shards:{}", server.pattern(5));
    let (code, text) = program(&["data", "index", &spec]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("5 shards with 111 samples, 5 indexes written"),
        "{text}"
    );
    assert!(text.contains("nothing was written to a store"), "{text}");
    assert!(!folder.path().join("00000.tar.index").exists());

    let (code, text) = program(&["data", "check", &spec]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("111 samples, 0 of them broken"), "{text}");
    let (code, text) = program(&[
        "data",
        "bench",
        &spec,
        "--image-size",
        "16",
        "--seconds",
        "0.1",
    ]);
    assert_eq!(code, 0, "{text}");

    let packed = ["far", "near"].map(|name| folder.path().join(name));
    for (path, spec) in packed.iter().zip([&spec, &format!("shards:{local}")]) {
        let out = path.to_str().unwrap();
        let (code, text) = program(&["data", "pack", spec, "--image-size", "16", "--out", out]);
        assert_eq!(code, 0, "{text}");
    }
    assert!(std::fs::read(&packed[0]).unwrap() == std::fs::read(&packed[1]).unwrap());

    server.answers(|request| match request.method.as_str() {
        "HEAD" => Answer::Right,
        _ => Answer::Status(500),
    });
    let list = folder.path().join("broken.jsonl");
    let (code, text) = program(&["data", "check", &spec, "--out", list.to_str().unwrap()]);
    assert_eq!(code, 75, "{text}");
    assert!(text.contains("the server returned 500"), "{text}");
    assert_eq!(std::fs::read(&list).unwrap(), b"");
    let mut hasty = command(&["data", "check", &spec]);
    let output = hasty.env("ADVXL_STORE_PATIENCE", "soon").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("invalid ADVXL_STORE_PATIENCE = `soon`: expected a whole number"),
        "{text}"
    );
    // No server is listening.
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (code, text) = program(&["data", "check", &format!("shards:http://{gone}/0.tar")]);
    assert_eq!(code, 75, "{text}");
    assert!(text.to_lowercase().contains("connection refused"), "{text}");
}
