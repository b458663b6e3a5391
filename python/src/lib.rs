//! The extension module `advxl._advxl`. The public Python API in `python/advxl/` calls it with whole batches.
//!
//! | file | content |
//! |---|---|
//! | [`dlpack`] | tensor exchange with Python; the only `unsafe` |
//! | [`tensor`] | tensors passed between Rust and Python, in host memory or on a GPU |
//! | [`errors`] | exceptions with message and hint; no panic crosses into Python |
//! | [`network`] | adapter from Python models to attacks |
//! | [`model`] | models loaded by advxl |
//! | [`attacks`] [`evaluation`] | attacks and evaluations |
#![deny(unsafe_code)]

mod attacks;
mod dlpack;
mod errors;
mod evaluation;
mod model;
mod network;
mod tensor;

use std::ffi::OsString;
use std::path::PathBuf;

use advxl::distributed::program::{Hosted, set_hosted};
use pyo3::prelude::*;

/// Runs the program `advxl` and returns its exit code. `arguments` includes the program name.
///
/// `command` is the command line that starts the program again, for runs with several processes. `binary` is the file
/// with its code.
#[pyfunction]
fn main(py: Python, arguments: Vec<OsString>, command: Vec<OsString>, binary: PathBuf) -> u8 {
    set_hosted(Hosted {
        command,
        arguments: arguments.iter().skip(1).cloned().collect(),
        binary,
    });
    py.detach(|| advxl::cli::run_with(&arguments))
}

/// Sets the number of threads of all computations. Call it once, before the first computation.
#[pyfunction]
fn set_threads(py: Python, count: Option<usize>) -> PyResult<()> {
    errors::guarded(py, || advxl::cli::start_threads(count))
}

#[pymodule]
fn _advxl(module: &Bound<PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("AdvxlError", py.get_type::<errors::AdvxlError>())?;
    module.add("InputError", errors::input_error(py)?)?;
    module.add("FailedError", py.get_type::<errors::FailedError>())?;
    module.add("TryAgainError", py.get_type::<errors::TryAgainError>())?;
    module.add("InternalError", py.get_type::<errors::InternalError>())?;
    module.add_class::<model::Model>()?;
    module.add_class::<model::Tape>()?;
    module.add_class::<tensor::CrossingTensor>()?;
    module.add_class::<evaluation::Stop>()?;
    module.add_function(wrap_pyfunction!(evaluation::evaluate, module)?)?;
    module.add_function(wrap_pyfunction!(evaluation::perturb, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)?;
    module.add_function(wrap_pyfunction!(set_threads, module)?)?;
    Ok(())
}
