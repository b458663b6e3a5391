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
    /// Of a report, for tests.
    #[cfg_attr(not(test), allow(dead_code))]
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
    let failed =
        |what: &str, status: c_int| Error::failed(format!("kernels `{name}`: NVRTC's {what} returned {status}"));
    // SAFETY: all pointers are to live memory of the sizes that NVRTC names, and the program is destroyed once.
    unsafe {
        let mut handle = ptr::null_mut();
        let status =
            (nvrtc.nvrtcCreateProgram)(&mut handle, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null());
        if status != 0 {
            return Err(failed("nvrtcCreateProgram", status));
        }
        let status = (nvrtc.nvrtcCompileProgram)(handle, pointers.len() as c_int, pointers.as_ptr());
        let log =
            bytes(|size| (nvrtc.nvrtcGetProgramLogSize)(handle, size), |to| (nvrtc.nvrtcGetProgramLog)(handle, to));
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
        let kept = path.as_ref().and_then(|path| fs::read(path).ok());
        // The driver reads beyond code that is cut off, and crashes: what is damaged must not reach it.
        if let Some(found) = kept.as_deref().and_then(unsealed).and_then(|code| loads(code).ok()) {
            return Ok(found);
        }
        let compiled = compile(libraries::nvrtc(self.driver_major)?, program, &self.architecture, false)?;
        if let Some(path) = path {
            keep(&path, &sealed(&compiled.code));
        }
        loads(&compiled.code)
    }
}

/// Bytes with their fingerprint before them.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    [&fingerprint(bytes).to_le_bytes(), bytes].concat()
}

/// The bytes, if they are those of the fingerprint.
fn unsealed(sealed: &[u8]) -> Option<&[u8]> {
    let (seal, bytes) = sealed.split_first_chunk()?;
    (fingerprint(bytes) == u64::from_le_bytes(*seal)).then_some(bytes)
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
pub fn cache_folder() -> Option<PathBuf> {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::thread;

    use super::*;

    /// The programs of the models in the recipes, and the most registers that their kernels may take.
    const PROGRAMS: &[Program] = &[
        Program::Norm,
        Program::NormAny,
        Program::Rows,
        Program::Images,
        Program::Loss,
        Program::Contrastive,
        Program::Distance,
        Program::Text,
        Program::Attack,
        Program::L1,
        Program::Optimizer,
        Program::Vectors,
        Program::Conv,
        Program::Depthwise { kernel: 7, columns: 8 },
        Program::Depthwise { kernel: 3, columns: 8 },
        Program::Evaluation,
        Program::Fab,
        Program::Square,
        Program::Mixing,
        Program::Fp8,
        Program::Messages,
        Program::Attention { tiles: 4, head: 64 },
        Program::Attention { tiles: 3, head: 80 },
        Program::Attention { tiles: 5, head: 64 },
        Program::AttentionLong { head: 64 },
        Program::AttentionLong { head: 80 },
        Program::AttentionLong { head: 104 },
        Program::AttentionLongGradient { head: 64, tiles: 1 },
        Program::AttentionLongGradient { head: 64, tiles: 3 },
        Program::AttentionLongGradient { head: 80, tiles: 1 },
        Program::AttentionLongGradient { head: 80, tiles: 3 },
        Program::AttentionLongTwice { head: 64 },
        Program::AttentionLongTwice { head: 80 },
        Program::AttentionLongTwice { head: 104 },
        Program::AttentionAny { bf16: false, head: 64, tile: 64 },
        Program::AttentionAny { bf16: false, head: 80, tile: 64 },
        Program::AttentionAny { bf16: false, head: 104, tile: 32 },
    ];

    /// Registers and bytes of spilled ones of every kernel, from ptxas' report.
    fn usage(log: &str) -> BTreeMap<String, (u32, u32)> {
        let (mut found, mut kernel) = (BTreeMap::new(), String::new());
        let number = |text: &str, before: &str| -> Option<u32> {
            text.split(before).next()?.trim_end().rsplit([' ', ',']).next()?.parse().ok()
        };
        for line in log.lines() {
            if let Some(rest) = line.split("Compiling entry function '").nth(1) {
                kernel = rest.split('\'').next().expect("a name").to_owned();
            }
            let entry: &mut (u32, u32) = found.entry(kernel.clone()).or_default();
            if line.contains("bytes spill stores") {
                entry.1 += number(line, "bytes spill stores").expect("a number")
                    + number(line, "bytes spill loads").expect("a number");
            }
            if line.contains("Used ") && line.contains(" registers") {
                entry.0 = number(line, "registers").expect("a number");
            }
        }
        found.remove("");
        found
    }

    #[test]
    fn code_that_was_cut_off_or_changed_on_disk_is_not_used() {
        let code: Vec<u8> = (0..=255).collect();
        let whole = sealed(&code);
        assert_eq!(unsealed(&whole), Some(&code[..]));
        let mut changed = whole.clone();
        changed[100] ^= 1;
        for damaged in [&changed[..], &whole[..200], &whole[..8], &whole[..3], &code] {
            assert_eq!(unsealed(damaged), None);
        }
    }

    #[test]
    fn a_report_is_read_as_ptxas_writes_it() {
        let log = "ptxas info    : Compiling entry function 'norm' for 'sm_90'\n\
                   ptxas info    : Function properties for norm\n    \
                   .     464 bytes stack frame, 964 bytes spill stores, 996 bytes spill loads\n\
                   ptxas info    : Used 32 registers, used 1 barriers, 464 bytes cumulative stack size";
        assert_eq!(usage(log), BTreeMap::from([("norm".to_owned(), (32, 1960))]));
    }

    /// Every kernel compiles for A100, H100 and B200 within the registers that its speed was measured with, wherever NVRTC is: `pip install
    /// nvidia-cuda-nvrtc`. `scripts/test cuda` installs it.
    #[test]
    fn every_kernel_compiles_for_every_gpu_and_hardly_spills() {
        let Ok(nvrtc) = libraries::nvrtc(13) else {
            eprintln!("skipped: NVRTC is missing; pip install nvidia-cuda-nvrtc");
            return;
        };
        let work: Vec<_> =
            PROGRAMS.iter().flat_map(|program| ["sm_80", "sm_90", "sm_100"].map(|gpu| (*program, gpu))).collect();
        let half = work.len() / 2;
        let check = |work: &[(Program, &str)]| {
            for (program, gpu) in work {
                let compiled = compile(nvrtc, *program, gpu, true).unwrap_or_else(|error| panic!("{error}"));
                assert!(!compiled.code.is_empty());
                let found = usage(&compiled.log);
                assert!(!found.is_empty(), "no kernels in {program:?}: {}", compiled.log);
                for (kernel, (registers, spilled)) in found {
                    // Gradients of long attention hold up to six tiles at once: what they spill costs less than fewer
                    // warps would. Of the others `attention_5_64` alone spills two registers.
                    let allowed = match program {
                        Program::AttentionLongGradient { tiles: 1, .. } => 176,
                        Program::AttentionLongGradient { .. } => 48,
                        Program::AttentionLong { .. } | Program::AttentionLongTwice { .. } => 256,
                        _ => 16,
                    };
                    assert!(spilled <= allowed, "{kernel} for {gpu} spills {spilled} bytes");
                    let most = match program {
                        Program::AttentionLong { head: 97.. } | Program::AttentionLongTwice { head: 97.. } => 255,
                        Program::AttentionLong { .. } | Program::AttentionLongTwice { .. } => 168,
                        Program::AttentionLongGradient { tiles: 1, .. } => 128,
                        Program::AttentionLongGradient { .. } => 255,
                        _ => 160,
                    };
                    assert!((8..=most).contains(&registers), "{kernel} for {gpu} takes {registers} registers");
                }
            }
        };
        thread::scope(|scope| {
            let other = scope.spawn(|| check(&work[half..]));
            check(&work[..half]);
            other.join().expect("the other half passes");
        });
    }
}
