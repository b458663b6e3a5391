//! From CUDA sources to machine code, by NVRTC, for the very GPU; kept on disk for the next start.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::PathBuf;
use std::ptr;

use crate::bindings::Nvrtc;
use crate::error::{Error, Result};
use crate::libraries;
use crate::programs::Program;

/// Machine code, and what the compiler said about it.
pub(crate) struct Compiled {
    pub(crate) code: Vec<u8>,
    pub(crate) log: String,
}

/// Compiles a program. `report` asks for the registers and spills of every kernel in the log.
pub(crate) fn compile(nvrtc: &Nvrtc, program: Program, architecture: &str, report: bool) -> Result<Compiled> {
    let name = program.name();
    let source = CString::new(program.source()).expect("sources have no zeros");
    let file = CString::new(format!("{name}.cu")).expect("no zeros");
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(program.options().iter().map(ToString::to_string));
    if report {
        options.push("--ptxas-options=-v".into());
    }
    let options: Vec<CString> = options.into_iter().map(|option| CString::new(option).expect("no zeros")).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let failed = |what: &str, status: c_int| Error::failed(format!("kernels `{name}`: NVRTC's {what} returned {status}"));
    // SAFETY: all pointers are to live memory of the sizes that NVRTC names, and the program is destroyed once.
    unsafe {
        let mut handle = ptr::null_mut();
        let status = (nvrtc.nvrtcCreateProgram)(&mut handle, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null());
        if status != 0 {
            return Err(failed("nvrtcCreateProgram", status));
        }
        let status = (nvrtc.nvrtcCompileProgram)(handle, pointers.len() as c_int, pointers.as_ptr());
        let log = bytes(|size| (nvrtc.nvrtcGetProgramLogSize)(handle, size), |to| (nvrtc.nvrtcGetProgramLog)(handle, to));
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        let code = match status {
            0 => bytes(|size| (nvrtc.nvrtcGetCUBINSize)(handle, size), |to| (nvrtc.nvrtcGetCUBIN)(handle, to)),
            _ => Vec::new(),
        };
        (nvrtc.nvrtcDestroyProgram)(&mut handle);
        if code.is_empty() {
            return Err(Error::failed(format!("kernels `{name}` do not compile for {architecture}: {status}\n{log}")));
        }
        Ok(Compiled { code, log })
    }
}

/// What one of NVRTC's pairs of functions returns.
fn bytes(size: impl FnOnce(*mut usize) -> c_int, get: impl FnOnce(*mut c_char) -> c_int) -> Vec<u8> {
    let mut count = 0;
    if size(&mut count) != 0 {
        return Vec::new();
    }
    let mut found = vec![0; count];
    match get(found.as_mut_ptr().cast()) {
        0 => found,
        _ => Vec::new(),
    }
}

/// Compiles programs for one GPU, through the cache.
pub(crate) struct Compiler {
    driver_major: i32,
    architecture: String,
    folder: Option<PathBuf>,
}

impl Compiler {
    pub(crate) fn new(driver_major: i32, capability: (i32, i32)) -> Self {
        let architecture = format!("sm_{}{}", capability.0, capability.1);
        Self { driver_major, architecture, folder: cache_folder() }
    }

    /// The machine code of a program. `loads` tries it: what is damaged on disk is compiled again.
    pub(crate) fn code<T>(&self, program: Program, loads: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
        // Of the source and of all else that decides the code. A later NVRTC does not replace what an earlier one made.
        let key = format!("{} {} {:?} {}", self.driver_major, self.architecture, program.options(), program.source());
        let path = self.folder.as_ref().map(|folder| {
            folder.join(format!("{}-{}-{:016x}.cubin", program.name(), self.architecture, fingerprint(key.as_bytes())))
        });
        if let Some(found) = path.as_ref().and_then(|path| fs::read(path).ok()).and_then(|code| loads(&code).ok()) {
            return Ok(found);
        }
        let compiled = compile(libraries::nvrtc(self.driver_major)?, program, &self.architecture, false)?;
        if let Some(path) = path {
            keep(&path, &compiled.code);
        }
        loads(&compiled.code)
    }
}

/// Writes a file of the cache, at once or not at all. The cache is a convenience: failing to write is none.
pub(crate) fn keep(path: &std::path::Path, bytes: &[u8]) {
    let part = path.with_extension(format!("part{}", std::process::id()));
    let write = || {
        fs::create_dir_all(path.parent().expect("the cache is a folder"))?;
        fs::write(&part, bytes)?;
        fs::rename(&part, path)
    };
    if write().is_err() {
        let _ = fs::remove_file(&part);
    }
}

/// `cuda` in ADVXL_CACHE, else below the user's folder for caches.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let folder = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
    folder("ADVXL_CACHE").or_else(|| user().map(|user| user.join("advxl"))).map(|folder| folder.join("cuda"))
}

/// FNV-1a: a key that is the same in every version of Rust.
pub(crate) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// The text behind a C string of a library.
///
/// # Safety
///
/// `text` is null or ends with a zero.
pub(crate) unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown".into();
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
