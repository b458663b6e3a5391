//! The functions of NVIDIA's libraries that the engine calls, looked up when a GPU is opened.
//!
//! Some forty functions with stable signatures, so they are declared here. Their addresses are in tables of our own
//! because two versions of cuBLASLt may be installed and the driver decides which one can run.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libloading::Library;

pub(crate) type Status = c_int;
pub(crate) type Handle = *mut c_void;
/// An address in device memory.
pub(crate) type Address = u64;

/// cuBLASLt's description of an algorithm. Opaque; the same library version accepts it again later.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Algorithm {
    pub(crate) data: [u64; 8],
}

/// An algorithm that cuBLASLt proposes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Proposal {
    pub(crate) algorithm: Algorithm,
    pub(crate) workspace: usize,
    pub(crate) state: Status,
    pub(crate) waves: f32,
    pub(crate) reserved: [c_int; 4],
}

macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($function:ident($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)] // The names are NVIDIA's.
        #[derive(Clone, Copy)]
        pub(crate) struct $table {
            $(pub(crate) $function: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $table {
            /// Looks up all functions; the error is the name of the first that is missing.
            ///
            /// # Safety
            ///
            /// `library` is NVIDIA's, whose functions have these signatures, and is never unloaded.
            pub(crate) unsafe fn of(library: &'static Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($function: {
                        let name = stringify!($function);
                        // SAFETY: the signature is that of NVIDIA's header, by the caller's promise.
                        unsafe { *library.get(name.as_bytes()).map_err(|_| name)? }
                    },)*
                })
            }
        }
    };
}

functions! {
    /// libcuda, which comes with the driver.
    Driver {
        cuInit(c_uint) -> Status;
        cuDriverGetVersion(*mut c_int) -> Status;
        cuDeviceGetCount(*mut c_int) -> Status;
        cuDeviceGet(*mut c_int, c_int) -> Status;
        cuDeviceGetName(*mut c_char, c_int, c_int) -> Status;
        cuDeviceGetPCIBusId(*mut c_char, c_int, c_int) -> Status;
        cuDeviceGetAttribute(*mut c_int, c_int, c_int) -> Status;
        cuDevicePrimaryCtxRetain(*mut Handle, c_int) -> Status;
        cuCtxSetCurrent(Handle) -> Status;
        cuMemGetInfo_v2(*mut usize, *mut usize) -> Status;
        cuMemAlloc_v2(*mut Address, usize) -> Status;
        cuMemFree_v2(Address) -> Status;
        cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Handle) -> Status;
        cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Handle) -> Status;
        cuMemcpyDtoDAsync_v2(Address, Address, usize, Handle) -> Status;
        cuMemsetD8Async(Address, u8, usize, Handle) -> Status;
        cuStreamCreate(*mut Handle, c_uint) -> Status;
        cuStreamSynchronize(Handle) -> Status;
        cuEventCreate(*mut Handle, c_uint) -> Status;
        cuEventRecord(Handle, Handle) -> Status;
        cuEventDestroy_v2(Handle) -> Status;
        cuEventSynchronize(Handle) -> Status;
        cuEventElapsedTime(*mut f32, Handle, Handle) -> Status;
        cuEventQuery(Handle) -> Status;
        cuStreamWaitEvent(Handle, Handle, c_uint) -> Status;
        cuModuleLoadData(*mut Handle, *const c_void) -> Status;
        cuModuleGetFunction(*mut Handle, Handle, *const c_char) -> Status;
        cuFuncSetAttribute(Handle, c_int, c_int) -> Status;
        cuLaunchKernel(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void) -> Status;
        cuGetErrorString(Status, *mut *const c_char) -> Status;
    }
}

/// `CUstream_flags::CU_STREAM_NON_BLOCKING`
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`
pub(crate) const MULTIPROCESSORS: c_int = 16;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`
pub(crate) const CAPABILITY: [c_int; 2] = [75, 76];
/// `CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`
pub(crate) const SHARED_MEMORY: c_int = 97;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
pub(crate) const FUNCTION_SHARED: c_int = 8;
/// `CUDA_ERROR_OUT_OF_MEMORY`
pub(crate) const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NOT_READY`
pub(crate) const NOT_READY: Status = 600;
/// `CU_EVENT_DISABLE_TIMING`
pub(crate) const EVENT_WITHOUT_TIME: c_uint = 2;

functions! {
    /// NVRTC, the compiler.
    Nvrtc {
        nvrtcCreateProgram(*mut Handle, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Status;
        nvrtcCompileProgram(Handle, c_int, *const *const c_char) -> Status;
        nvrtcGetCUBINSize(Handle, *mut usize) -> Status;
        nvrtcGetCUBIN(Handle, *mut c_char) -> Status;
        nvrtcGetProgramLogSize(Handle, *mut usize) -> Status;
        nvrtcGetProgramLog(Handle, *mut c_char) -> Status;
        nvrtcDestroyProgram(*mut Handle) -> Status;
    }
}

functions! {
    /// cuBLASLt, the matrix products.
    BlasLt {
        cublasLtGetVersion() -> usize;
        cublasLtCreate(*mut Handle) -> Status;
        cublasLtMatmulDescCreate(*mut Handle, c_int, c_int) -> Status;
        cublasLtMatmulDescSetAttribute(Handle, c_int, *const c_void, usize) -> Status;
        cublasLtMatrixLayoutCreate(*mut Handle, c_int, u64, u64, i64) -> Status;
        cublasLtMatmulPreferenceCreate(*mut Handle) -> Status;
        cublasLtMatmulPreferenceSetAttribute(Handle, c_int, *const c_void, usize) -> Status;
        cublasLtMatmulPreferenceDestroy(Handle) -> Status;
        cublasLtMatmulAlgoGetHeuristic(Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Proposal, *mut c_int) -> Status;
        cublasLtMatmul(Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void, Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle) -> Status;
    }
}

/// `CUDA_R_32F` and `CUDA_R_16BF`
pub(crate) const R_32F: c_int = 0;
pub(crate) const R_16BF: c_int = 14;
/// `CUDA_R_8F_E4M3`
pub(crate) const R_8F_E4M3: c_int = 28;
/// `CUBLAS_COMPUTE_32F` and `CUBLAS_COMPUTE_32F_FAST_TF32`
pub(crate) const COMPUTE_32F: c_int = 68;
pub(crate) const COMPUTE_TF32: c_int = 77;
/// `CUBLASLT_MATMUL_DESC_*`
pub(crate) const DESC_TRANSPOSE_A: c_int = 3;
pub(crate) const DESC_TRANSPOSE_B: c_int = 4;
pub(crate) const DESC_EPILOGUE: c_int = 7;
pub(crate) const DESC_BIAS: c_int = 8;
pub(crate) const DESC_AUX: c_int = 11;
pub(crate) const DESC_AUX_STRIDE: c_int = 12;
pub(crate) const DESC_SCALE_A: c_int = 17;
pub(crate) const DESC_SCALE_B: c_int = 18;
pub(crate) const DESC_FAST_SUMS: c_int = 25;
pub(crate) const DESC_BIAS_FORMAT: c_int = 26;
pub(crate) const DESC_SCALES_A: c_int = 31;
pub(crate) const DESC_SCALES_B: c_int = 32;
/// `CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F`
pub(crate) const SCALES_BY_ROW: c_int = 3;
/// `CUBLASLT_EPILOGUE_*`
pub(crate) const EPILOGUE_BIAS: u32 = 4;
pub(crate) const EPILOGUE_GELU_BIAS: u32 = 36;
pub(crate) const EPILOGUE_GELU_AUX_BIAS: u32 = 164;
pub(crate) const EPILOGUE_DGELU: u32 = 192;
pub(crate) const EPILOGUE_DEFAULT: u32 = 1;
/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`
pub(crate) const PREFERENCE_WORKSPACE: c_int = 1;

/// Bytes of `ncclUniqueId` (`NCCL_UNIQUE_ID_BYTES`).
pub(crate) const UNIQUE_ID: usize = 128;

/// NCCL's `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId {
    pub(crate) internal: [u8; UNIQUE_ID],
}

/// The first fields of `ncclConfig_t`, those of 2.14: NCCL takes as many bytes as `size` says, and its defaults for the
/// fields of versions after `version`.
#[repr(C)]
pub(crate) struct NcclConfig {
    pub(crate) size: usize,
    pub(crate) magic: c_uint,
    pub(crate) version: c_uint,
    pub(crate) blocking: c_int,
    /// Padding here, another field since 2.17.
    pub(crate) unset: c_int,
}

impl NcclConfig {
    /// Calls return at once: what they began is done by NCCL's threads and can be aborted at any time.
    pub(crate) const NON_BLOCKING: Self = Self {
        size: size_of::<Self>(),
        magic: 0xcafe_beef, // `NCCL_API_MAGIC`
        version: 21_400,
        blocking: 0,
        unset: c_int::MIN, // `NCCL_CONFIG_UNDEF_INT`
    };
}

functions! {
    /// NCCL, the exchanges between GPUs. Signatures and constants are those of `nccl.h` 2.32.3; none of them changed since
    /// 2.14.
    Nccl {
        ncclGetVersion(*mut c_int) -> Status;
        ncclGetErrorString(Status) -> *const c_char;
        ncclGetLastError(Handle) -> *const c_char;
        ncclGetUniqueId(*mut UniqueId) -> Status;
        ncclCommInitRankConfig(*mut Handle, c_int, UniqueId, c_int, *mut NcclConfig) -> Status;
        ncclCommFinalize(Handle) -> Status;
        ncclCommDestroy(Handle) -> Status;
        ncclCommAbort(Handle) -> Status;
        ncclCommGetAsyncError(Handle, *mut Status) -> Status;
        ncclGroupStart() -> Status;
        ncclGroupEnd() -> Status;
        ncclSend(*const c_void, usize, c_int, c_int, Handle, Handle) -> Status;
        ncclRecv(*mut c_void, usize, c_int, c_int, Handle, Handle) -> Status;
        ncclAllGather(*const c_void, *mut c_void, usize, c_int, Handle, Handle) -> Status;
        ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> Status;
        ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> Status;
    }
}

/// `ncclInProgress`
pub(crate) const NCCL_IN_PROGRESS: Status = 7;
/// `ncclFloat32`
pub(crate) const NCCL_FLOAT32: c_int = 7;
/// `ncclSum`
pub(crate) const NCCL_SUM: c_int = 0;
