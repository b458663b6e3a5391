//! Tensors to and from Python by DLPack, the protocol that torch, numpy, jax and others share.
//!
//! Only contiguous f32: adapters on Python's side bring theirs to that form. What comes from Python is copied, one batch at a
//! time, which is a thousandth of a pass through a model; what goes there is not.
//!
//! The only file of this crate with `unsafe`. Source: dlpack.h, version 0.8 (`DLManagedTensor`).
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use advxl_cuda::{Gpu, Values};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::tensor::Crossing;

const NAME: &CStr = c"dltensor";
const USED: &CStr = c"used_dltensor";
/// `kDLCPU`.
const CPU: i32 = 1;
/// `kDLCUDA`.
const CUDA: i32 = 2;
/// `kDLFloat`.
const FLOAT: u8 = 2;

/// A device in DLPack's words.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) kind: i32,
    pub(crate) number: i32,
}

impl Place {
    /// The host's memory.
    pub(crate) const HOST: Self = Self {
        kind: CPU,
        number: 0,
    };

    /// An NVIDIA GPU.
    pub(crate) fn gpu(number: i32) -> Self {
        Self { kind: CUDA, number }
    }
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: Place,
    dimensions: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// What an exported tensor keeps alive; its address is that of `managed`.
#[repr(C)]
struct Exported {
    managed: Managed,
    values: Crossing,
    shape: Vec<i64>,
}

/// # Safety
///
/// `managed` is the first field of an [`Exported`] that a `Box` gave away, and is not used afterwards.
unsafe extern "C" fn delete(managed: *mut Managed) {
    drop(unsafe { Box::from_raw(managed.cast::<Exported>()) });
}

/// Deletes the tensor of a capsule that nobody took.
///
/// # Safety
///
/// Called by Python with a capsule that [`export`] made.
unsafe extern "C" fn drop_capsule(capsule: *mut pyo3::ffi::PyObject) {
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(pyo3::ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// A capsule with values of a shape, which its consumer owns.
pub(crate) fn export<'py>(
    py: Python<'py>,
    values: Crossing,
    shape: &[usize],
    device: Place,
) -> PyResult<Bound<'py, PyAny>> {
    let length = match &values {
        Crossing::Host(values) => values.len(),
        Crossing::Gpu(values) => values.len(),
    };
    assert_eq!(
        length,
        shape.iter().product::<usize>(),
        "values fill the shape"
    );
    let mut exported = Box::new(Exported {
        managed: Managed {
            tensor: DlTensor {
                data: std::ptr::null_mut(),
                device,
                dimensions: shape.len() as i32,
                dtype: DataType {
                    code: FLOAT,
                    bits: 32,
                    lanes: 1,
                },
                shape: std::ptr::null_mut(),
                // Null: row by row.
                strides: std::ptr::null_mut(),
                byte_offset: 0,
            },
            context: std::ptr::null_mut(),
            deleter: Some(delete),
        },
        values,
        shape: shape.iter().map(|length| *length as i64).collect(),
    });
    exported.managed.tensor.data = match &mut exported.values {
        Crossing::Host(values) => values.as_mut_ptr().cast(),
        Crossing::Gpu(values) => values.address() as *mut c_void,
    };
    exported.managed.tensor.shape = exported.shape.as_mut_ptr();
    let pointer: *mut Managed = Box::into_raw(exported).cast();
    // SAFETY: the pointer is not null and the capsule's destructor is for it.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(pointer.cast(), NAME.as_ptr(), Some(drop_capsule));
        if capsule.is_null() {
            delete(pointer);
        }
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// The values of a tensor of Python's, row by row, and its shape. A tensor on a GPU must be on the given one, and written.
///
/// Errors: an object without `__dlpack__`, or a tensor of another type, elsewhere, or not contiguous.
pub(crate) fn import(object: &Bound<PyAny>, gpu: Option<&Gpu>) -> PyResult<(Crossing, Vec<usize>)> {
    let capsule = object.call_method0("__dlpack__")?;
    let capsule = capsule
        .cast::<PyCapsule>()
        .map_err(|_| PyTypeError::new_err("`__dlpack__` did not give a capsule"))?;
    let pointer: NonNull<c_void> = capsule.pointer_checked(Some(NAME))?;
    // SAFETY: a capsule of this name holds a `DLManagedTensor`, which lives until its deleter is called.
    let managed = unsafe { pointer.cast::<Managed>().as_ref() };
    let copied = copy(&managed.tensor, gpu);
    // The protocol: whoever takes the tensor renames the capsule and calls the deleter once.
    // SAFETY: nothing of the tensor is used after this.
    unsafe {
        if pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), USED.as_ptr()) == 0
            && let Some(deleter) = managed.deleter
        {
            deleter(pointer.cast().as_ptr());
        }
    }
    copied.map_err(PyTypeError::new_err)
}

fn copy(tensor: &DlTensor, gpu: Option<&Gpu>) -> Result<(Crossing, Vec<usize>), String> {
    let DataType { code, bits, lanes } = tensor.dtype;
    if (code, bits, lanes) != (FLOAT, 32, 1) {
        return Err(format!(
            "expected float32 values, got type {code} of {bits} bits"
        ));
    }
    let dimensions = tensor.dimensions.max(0) as usize;
    // SAFETY: `shape` and, if not null, `strides` have one number for each dimension.
    let (shape, strides) = unsafe {
        let of = |pointer: *mut i64| match dimensions {
            0 => &[][..],
            _ => std::slice::from_raw_parts(pointer, dimensions),
        };
        let strides = (!tensor.strides.is_null()).then(|| of(tensor.strides));
        (of(tensor.shape), strides)
    };
    let mut expected = 1;
    for dimension in (0..dimensions).rev() {
        let stride = strides.map_or(expected, |strides| strides[dimension]);
        if shape[dimension] > 1 && stride != expected {
            return Err("expected a contiguous tensor".to_owned());
        }
        expected *= shape[dimension];
    }
    let shape: Vec<usize> = shape.iter().map(|length| *length as usize).collect();
    let count = shape.iter().product();
    let values = match (tensor.device.kind, gpu) {
        _ if count == 0 => Crossing::Host(Vec::new()),
        (CPU, _) => {
            // SAFETY: `count` contiguous f32 lie `byte_offset` bytes after `data`, aligned as their type is.
            let values = unsafe {
                let first = tensor.data.cast::<u8>().add(tensor.byte_offset as usize);
                std::slice::from_raw_parts(first.cast::<f32>(), count)
            };
            Crossing::Host(values.to_vec())
        }
        (CUDA, Some(gpu)) => {
            let address = tensor.data as u64 + tensor.byte_offset;
            // SAFETY: `count` contiguous f32 lie there; the caller's adapter waited for them, and this waits for the copy.
            let values = unsafe { Values::copy_of(gpu, address, count) };
            gpu.wait().unwrap_or_else(|error| advxl_cuda::fail(error));
            Crossing::Gpu(values)
        }
        (kind, _) => {
            return Err(format!(
                "expected a tensor in the host's memory, got one on device type {kind}"
            ));
        }
    };
    Ok((values, shape))
}
