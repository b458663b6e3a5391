//! Exchanges tensors with Python through DLPack, the protocol shared by torch, numpy, jax and others.
//!
//! Only contiguous f32 is supported; the adapters in Python convert to it. Imported tensors are copied, one batch at a
//! time, which takes about a thousandth of a model's forward pass. Exported tensors are not copied.
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

/// A device, as DLPack identifies it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) kind: i32,
    pub(crate) number: i32,
}

impl Place {
    /// Host memory.
    pub(crate) const HOST: Self = Self {
        kind: CPU,
        number: 0,
    };

    /// Returns an NVIDIA GPU.
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

/// The data that an exported tensor keeps alive. `managed` must be the first field.
#[repr(C)]
struct Exported {
    managed: Managed,
    values: Crossing,
    shape: Vec<i64>,
}

/// # Safety
///
/// `managed` must be the first field of an [`Exported`] released by a `Box`, and must not be used afterwards.
unsafe extern "C" fn delete(managed: *mut Managed) {
    drop(unsafe { Box::from_raw(managed.cast::<Exported>()) });
}

/// Deletes the tensor of a capsule that was never consumed.
///
/// # Safety
///
/// Must be called by Python with a capsule created by [`export`].
unsafe extern "C" fn drop_capsule(capsule: *mut pyo3::ffi::PyObject) {
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(pyo3::ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// Returns a capsule with values of the given shape, owned by its consumer.
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
                // Null means row-major.
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
    // SAFETY: the pointer is not null and the capsule's destructor matches it.
    unsafe {
        let capsule = pyo3::ffi::PyCapsule_New(pointer.cast(), NAME.as_ptr(), Some(drop_capsule));
        if capsule.is_null() {
            delete(pointer);
        }
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// Returns the values of a Python tensor in row-major order, and its shape. A GPU tensor must be on the given GPU, with
/// all writes complete.
///
/// Errors: the object has no `__dlpack__`, or the tensor has another dtype, is on another device, or is not contiguous.
pub(crate) fn import(object: &Bound<PyAny>, gpu: Option<&Gpu>) -> PyResult<(Crossing, Vec<usize>)> {
    let capsule = object.call_method0("__dlpack__")?;
    let capsule = capsule
        .cast::<PyCapsule>()
        .map_err(|_| PyTypeError::new_err("`__dlpack__` did not return a capsule"))?;
    let pointer: NonNull<c_void> = capsule.pointer_checked(Some(NAME))?;
    // SAFETY: a capsule of this name holds a `DLManagedTensor`, which lives until its deleter is called.
    let managed = unsafe { pointer.cast::<Managed>().as_ref() };
    let copied = copy(&managed.tensor, gpu);
    // By the protocol, the consumer renames the capsule and calls the deleter once.
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
            "expected float32 values, got DLPack type {code} with {bits} bits"
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
            // SAFETY: `count` contiguous, aligned f32 start `byte_offset` bytes after `data`.
            let values = unsafe {
                let first = tensor.data.cast::<u8>().add(tensor.byte_offset as usize);
                std::slice::from_raw_parts(first.cast::<f32>(), count)
            };
            Crossing::Host(values.to_vec())
        }
        (CUDA, Some(gpu)) => {
            let address = tensor.data as u64 + tensor.byte_offset;
            // SAFETY: `count` contiguous f32 start there; the caller's adapter waited for them, and this waits for the
            // copy.
            let values = unsafe { Values::copy_of(gpu, address, count) };
            gpu.wait().unwrap_or_else(|error| advxl_cuda::fail(error));
            Crossing::Gpu(values)
        }
        (kind, _) => {
            return Err(format!(
                "expected a tensor in host memory, got DLPack device type {kind}"
            ));
        }
    };
    Ok((values, shape))
}
