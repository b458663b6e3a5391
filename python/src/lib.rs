//! The extension module `advxl._advxl`. What users call is in `python/advxl/`; it calls this on whole batches.
//!
//! | file | what |
//! |---|---|
//! | [`dlpack`] | tensors to and from Python; the only `unsafe` |
//! | [`tensor`] | tensors that cross, in the host's memory or on a GPU |
//! | [`errors`] | exceptions with message and hint; nothing panics into Python |
//! | [`network`] | a model that Python computes, as attacks see it |
//! | [`model`] | models that the program loads |
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

/// Runs the program `advxl` with arguments, which begin with its name; the exit code.
///
/// `command` starts it again, for runs of several processes; `binary` is the file with its code.
#[pyfunction]
fn main(py: Python, arguments: Vec<OsString>, command: Vec<OsString>, binary: PathBuf) -> u8 {
    set_hosted(Hosted {
        command,
        arguments: arguments.iter().skip(1).cloned().collect(),
        binary,
    });
    py.detach(|| advxl::cli::run_with(&arguments))
}

/// The number of threads of all computations; once, before the first.
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
