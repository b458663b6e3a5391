//! Converts errors of the library to Python exceptions with message and hint. No panic crosses into Python.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use advxl::error::{Error, Kind};
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyTypeInfo, create_exception};

create_exception!(
    advxl,
    AdvxlError,
    PyException,
    "Base class of advxl's exceptions. `message` describes the error, `hint` how to fix it, or is None."
);
create_exception!(
    advxl,
    FailedError,
    AdvxlError,
    "The operation failed, for example because a loss was not finite."
);
create_exception!(
    advxl,
    TryAgainError,
    AdvxlError,
    "The operation was stopped; the same call resumes it."
);
create_exception!(
    advxl,
    InternalError,
    AdvxlError,
    "A bug in advxl; please report it."
);

/// `InputError` also derives from ValueError, which Python code catches. Created at run time, since it has two bases.
static INPUT_ERROR: pyo3::sync::PyOnceLock<Py<PyAny>> = pyo3::sync::PyOnceLock::new();

/// Returns the class `InputError`.
pub(crate) fn input_error(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let make = || {
        let bases = (AdvxlError::type_object(py), PyValueError::type_object(py));
        let fields = pyo3::types::PyDict::new(py);
        fields.set_item("__module__", "advxl")?;
        fields.set_item("__doc__", "Invalid input; also a ValueError.")?;
        let class = py.get_type::<pyo3::types::PyType>();
        Ok::<_, PyErr>(class.call1(("InputError", bases, fields))?.unbind())
    };
    Ok(INPUT_ERROR.get_or_try_init(py, make)?.bind(py).clone())
}

/// Converts an error of the library to an exception.
pub(crate) fn raised(py: Python<'_>, error: Error) -> PyErr {
    let kind = error.kind();
    let (message, hint) = error.into_parts();
    let class = match kind {
        Kind::Input => input_error(py),
        Kind::Failed => Ok(FailedError::type_object(py).into_any()),
        Kind::TryAgain => Ok(TryAgainError::type_object(py).into_any()),
    };
    match class.and_then(|class| exception(&class, &message, hint.as_deref())) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// Creates an exception with `message` and `hint`, whose text shows both.
pub(crate) fn exception<'py>(
    class: &Bound<'py, PyAny>,
    message: &str,
    hint: Option<&str>,
) -> PyResult<Bound<'py, PyAny>> {
    let text = match hint {
        Some(hint) => format!("{message}\n  hint: {hint}"),
        None => message.to_owned(),
    };
    let exception = class.call1((text,))?;
    exception.setattr("message", message)?;
    exception.setattr("hint", hint)?;
    Ok(exception)
}

/// A Python exception that unwinds through Rust; the payload of [`throw`].
struct Thrown(PyErr);

/// Aborts the work in progress with an exception raised by a Python callback. Must run inside [`guarded`].
pub(crate) fn throw(error: PyErr) -> ! {
    // Skips the panic hook, since this is not a panic.
    resume_unwind(Box::new(Thrown(error)))
}

/// Runs work without the GIL. Python exceptions, errors, GPU failures and panics are raised as exceptions.
pub(crate) fn guarded<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    let done = py.detach(|| catch_unwind(AssertUnwindSafe(|| advxl_cuda::caught(work))));
    match done {
        Ok(Ok(done)) => done.map_err(|error| raised(py, error)),
        Ok(Err(error)) => Err(raised(py, Error::of_gpu(&error))),
        Err(panic) => Err(match panic.downcast::<Thrown>() {
            Ok(thrown) => thrown.0,
            Err(panic) => internal(py, &*panic),
        }),
    }
}

fn internal(py: Python<'_>, panic: &(dyn Any + Send)) -> PyErr {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    let message = text.unwrap_or_else(|| "unknown error".to_owned());
    let hint = "this is a bug in advxl: please report it with the call that caused it";
    let class = InternalError::type_object(py).into_any();
    match exception(&class, &message, Some(hint)) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}
