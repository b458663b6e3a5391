//! Runs every file of the corpus with the toolchain that builds the program: seeds, and inputs that once violated a
//! property.

use std::fs;
use std::path::Path;

use advxl_fuzz::TARGETS;

/// One test for all targets, since they measure the memory of the whole process.
#[test]
fn every_target_keeps_its_promises_on_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in TARGETS {
        let folder = fs::read_dir(corpus.join(target.name)).unwrap();
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{} has no corpus", target.name);
        for file in files {
            // Shown if the target panics or aborts.
            println!("{}", file.display());
            target.check(&fs::read(&file).unwrap());
        }
    }
}
