//! Loads a weights file and prints the memory that it took.
//!
//!     cargo run --release --example load_weights -- advxl_vit_h14.pth vit_huge_patch14_224
//!
//! `VmHWM` is the peak resident memory of the process, as reported by Linux.

use std::path::Path;
use std::time::Instant;

use advxl::ops::Device;
use advxl::weights::import as weights;

fn main() -> advxl::error::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, architecture] = &arguments[..] else {
        eprintln!("usage: load_weights FILE ARCHITECTURE");
        std::process::exit(2);
    };
    let start = Instant::now();
    let loaded = weights::load_file(Path::new(path), architecture, &Device::cpu())?;
    let parameters = loaded.model.parameters();
    let count: usize = parameters
        .iter()
        .map(|parameter| parameter.shape.iter().product::<usize>())
        .sum();
    println!(
        "{count} weights in {} tensors, {} classes, images of {} pixels, in {:.1} s",
        parameters.len(),
        loaded.model.classes(),
        loaded.image_size,
        start.elapsed().as_secs_f64()
    );
    let file = advxl::files::size(Path::new(path));
    println!("file {:.3} GB", file as f64 / 1e9);
    let status = advxl::files::read_text(Path::new("/proc/self/status"))?;
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let most = most.and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    if let Some(kibibytes) = most {
        let bytes = kibibytes * 1024.0;
        println!(
            "VmHWM {:.3} GB, {:.3} of the file",
            bytes / 1e9,
            bytes / file as f64
        );
    }
    Ok(())
}
