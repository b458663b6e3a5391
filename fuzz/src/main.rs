//! The libFuzzer program for the target named by `ADVXL_FUZZ_TARGET`; `scripts/fuzz` builds and starts it.
#![no_main]

use std::sync::LazyLock;

use advxl_fuzz::{Target, target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("ADVXL_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| panic!("ADVXL_FUZZ_TARGET: unknown target `{name}`"))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET.check(data));
