//! Shows that memory does not grow with the number of samples. Writes shards with 100,000 tiny samples and loads them
//! all, once by scanning and once from saved indexes, printing the resident memory along the way.
//!
//!     cargo run --release --example shard_memory

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use advxl::data::{Augmentation, Dataset, Loader, Plan, Share, Spec, Split, shards};

const SHARDS: usize = 20;
const IN_EACH: usize = 5_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("shard_memory_{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let outcome = run(&folder);
    std::fs::remove_dir_all(&folder)?;
    outcome
}

fn run(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut png = std::io::Cursor::new(Vec::new());
    image::DynamicImage::new_rgb8(16, 16).write_to(&mut png, image::ImageFormat::Png)?;
    let png = png.into_inner();
    for shard in 0..SHARDS {
        let file = std::fs::File::create(folder.join(format!("{shard:05}.tar")))?;
        let mut file = std::io::BufWriter::new(file);
        for number in 0..IN_EACH {
            member(&mut file, &format!("{number:09}.png"), &png)?;
            member(&mut file, &format!("{number:09}.txt"), b"a black square")?;
        }
        file.write_all(&[0; 1024])?;
        file.flush()?;
    }
    let pattern = format!("{}/*.tar", folder.display());
    for indexed in [false, true] {
        if indexed {
            shards::save_indexes(&pattern, |_, _| {})?;
        }
        let begun = Instant::now();
        let dataset = Dataset::open(&Spec::Shards(pattern.clone()), Split::Train, 0)?;
        let opened = begun.elapsed();
        let samples = dataset.len() as u64;
        let plan = Plan {
            seed: 0,
            batch: 1000,
            image_size: 16,
            augmentation: Augmentation::default(),
            mixing: None,
            position: 0,
            samples,
            broken_rate: None,
            reduced_decode: false,
            captions: true,
            share: Share::default(),
        };
        let mut loader = Loader::new(Arc::new(dataset), plan, 2)?;
        println!(
            "indexed: {indexed}, opened in {:.1} ms",
            1e3 * opened.as_secs_f64()
        );
        let mut seen = 0;
        while let Some(batch) = loader.next_batch()? {
            seen += batch.captions.len();
            if seen % 20_000 == 0 {
                println!("{seen:>7} samples  {:>6.1} MiB", resident_mib());
            }
        }
    }
    Ok(())
}

fn member(file: &mut impl Write, name: &str, contents: &[u8]) -> std::io::Result<()> {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[124..136].copy_from_slice(format!("{:011o}\0", contents.len()).as_bytes());
    block[148..156].copy_from_slice(b"        ");
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    file.write_all(&block)?;
    file.write_all(contents)?;
    file.write_all(&vec![
        0;
        contents.len().next_multiple_of(512) - contents.len()
    ])
}

/// Returns the resident memory from `/proc`, or 0 if it is not available.
fn resident_mib() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0 / (1 << 20) as f64
}
