//! Finds and opens NVIDIA's libraries: the driver's libcuda, cuBLASLt, the compiler NVRTC, and NCCL where several ranks use
//! GPUs.
//!
//! libcuda comes with the driver and is on the loader's path. The others come with a CUDA toolkit, with PyTorch, or as
//! pip's `nvidia-*` wheels, whose folders no loader searches. cuBLASLt of a major version above the driver's does not
//! run, so the driver's own major version is preferred and lower ones are accepted.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use libloading::Library;

use crate::bindings::{BlasLt, Driver, Nccl, Nvrtc};
use crate::error::{Error, Result};

/// The oldest major version of CUDA whose libraries are accepted.
const OLDEST: i32 = 12;

/// The functions of libcuda, after `cuInit`, and the major version of CUDA that the driver supports.
pub(crate) fn driver() -> Result<(&'static Driver, i32)> {
    static FOUND: OnceLock<Result<(Driver, i32)>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let library = keep(Path::new("libcuda.so.1")).map_err(|why| {
            Error::missing(format!("no NVIDIA driver: cannot open `libcuda.so.1`: {why}"))
                .hint("install NVIDIA's driver; in a container, pass the GPUs through (docker run --gpus all)")
        })?;
        // SAFETY: libcuda.so.1 is NVIDIA's driver, and `keep` never unloads.
        let driver = unsafe { Driver::of(library) }.map_err(|name| symbol("libcuda.so.1", name))?;
        // SAFETY: `cuInit` takes no pointers; the version is written to a live integer.
        let (status, version) = unsafe {
            let mut version = 0;
            let status = (driver.cuInit)(0);
            (driver.cuDriverGetVersion)(&mut version);
            (status, version)
        };
        match status {
            0 => Ok((driver, version / 1000)),
            100 => {
                Err(Error::missing("NVIDIA's driver finds no GPU").hint("check `nvidia-smi` and CUDA_VISIBLE_DEVICES"))
            }
            _ => Err(Error::missing(format!("NVIDIA's driver does not start: cuInit returned {status}"))
                .hint("check `nvidia-smi`")),
        }
    });
    found.as_ref().map(|(driver, major)| (driver, *major)).map_err(Clone::clone)
}

/// Whether this machine has NVIDIA's driver, working or not.
pub fn has_driver() -> bool {
    crate::gpu::software().is_some() || keep(Path::new("libcuda.so.1")).is_ok()
}

/// The functions of cuBLASLt.
pub(crate) fn blas(major: i32) -> Result<&'static BlasLt> {
    static FOUND: OnceLock<Result<BlasLt>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let (library, path) = find("cublasLt", major)?;
        // SAFETY: the name says that it is NVIDIA's, and `keep` never unloads.
        unsafe { BlasLt::of(library) }.map_err(|name| symbol(&path.display().to_string(), name))
    });
    found.as_ref().map_err(Clone::clone)
}

/// The functions of NVRTC. `major` is the driver's version of CUDA: code made by a later NVRTC may not load.
pub(crate) fn nvrtc(major: i32) -> Result<&'static Nvrtc> {
    static FOUND: OnceLock<Result<Nvrtc>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let (library, path) = find("nvrtc", major)?;
        // SAFETY: as above.
        unsafe { Nvrtc::of(library) }.map_err(|name| symbol(&path.display().to_string(), name))
    });
    found.as_ref().map_err(Clone::clone)
}

/// The functions of NCCL, whose major version is not CUDA's.
pub(crate) fn nccl(driver_major: i32) -> Result<&'static Nccl> {
    static FOUND: OnceLock<Result<Nccl>> = OnceLock::new();
    let found = FOUND.get_or_init(|| open_nccl(&Places::of_this_process(), driver_major));
    found.as_ref().map_err(Clone::clone)
}

/// The same, from a folder.
pub(crate) fn nccl_in(folder: &Path) -> Result<Nccl> {
    open_nccl(&Places { first: vec![folder.to_owned()], ..Places::of_this_process() }, 13)
}

fn open_nccl(places: &Places, driver_major: i32) -> Result<Nccl> {
    let (library, path) = find_nccl(places, driver_major)?;
    // SAFETY: the name says that it is NVIDIA's, and `keep` never unloads.
    unsafe { Nccl::of(library) }.map_err(|name| {
        let message = format!("`{}` has no function `{name}`", path.display());
        Error::missing(message).hint(format!("{} (2.18 or later)", install(NCCL, driver_major)))
    })
}

fn symbol(library: &str, name: &str) -> Error {
    Error::missing(format!("`{library}` has no function `{name}`")).hint("install CUDA 12.0 or later")
}

/// Opens a library for the rest of the process.
fn keep(path: &Path) -> std::result::Result<&'static Library, String> {
    // SAFETY: opening runs the library's initializers. The paths are those of NVIDIA's libraries by name, from places
    // where the user or the system installed them, as for any program linked with them.
    let library = unsafe { Library::new(path) }.map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(library)))
}

/// Opens `lib{name}.so.{major}` for the highest major version up to the driver's that any place has.
fn find(name: &str, driver_major: i32) -> Result<(&'static Library, PathBuf)> {
    let places = Places::of_this_process();
    let mut broken = Vec::new();
    for major in (OLDEST..=driver_major).rev() {
        for path in places.candidates(&format!("lib{name}.so.{major}"), major) {
            // NVRTC has no path to its second part in the same folder, but finds it where it is open already.
            if let (true, Some(folder)) = (name == "nvrtc", path.parent().filter(|folder| folder.is_absolute())) {
                beginning_with(folder, "libnvrtc-builtins.so").iter().for_each(|path| drop(keep(path)));
            }
            match keep(&path) {
                Ok(library) => return Ok((library, path)),
                Err(why) if path.is_absolute() => broken.push(why),
                Err(_) => {}
            }
        }
    }
    let names = (OLDEST..=driver_major).rev().map(|major| format!("lib{name}.so.{major}"));
    Err(not_found(&names.collect::<Vec<_>>(), &["nvidia-cublas", "nvidia-cuda-nvrtc"], driver_major, &broken))
}

fn find_nccl(places: &Places, driver_major: i32) -> Result<(&'static Library, PathBuf)> {
    let mut broken = Vec::new();
    for path in places.candidates("libnccl.so.2", driver_major) {
        match keep(&path) {
            Ok(library) => return Ok((library, path)),
            Err(why) if path.is_absolute() => broken.push(why),
            Err(_) => {}
        }
    }
    Err(not_found(&["libnccl.so.2".into()], NCCL, driver_major, &broken))
}

/// The wheel of NCCL, which has a suffix for every major version of CUDA.
const NCCL: &[&str] = &["nvidia-nccl"];

/// The command that installs wheels for a driver.
fn install(wheels: &[&str], major: i32) -> String {
    let wheel = |name: &&str| match (*name, major) {
        (_, 12) => format!("{name}-cu12"),
        ("nvidia-nccl", _) => format!("{name}-cu13"), // The others' newest have no suffix.
        _ => (*name).to_owned(),
    };
    format!("pip install {}", wheels.iter().map(wheel).collect::<Vec<_>>().join(" "))
}

fn not_found(names: &[String], wheels: &[&str], major: i32, broken: &[String]) -> Error {
    let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    let mut message = format!(
        "cannot find NVIDIA's {}; looked in ADVXL_CUDA_LIBRARIES, the loader's path, CUDA_PATH, CUDA_HOME, VIRTUAL_ENV, \
         CONDA_PREFIX, the site-packages of `python3`, and /usr/local/cuda*",
        names.join(" or ")
    );
    for why in broken {
        message += &format!("; cannot open {why}");
    }
    let command = install(wheels, major);
    Error::missing(message).hint(format!("{command} (or set ADVXL_CUDA_LIBRARIES to the folder that has them)"))
}

/// Where to look, in order.
struct Places {
    /// Folders that hold libraries.
    first: Vec<PathBuf>,
    /// Roots of toolkits.
    toolkits: Vec<PathBuf>,
    /// Python environments.
    environments: Vec<PathBuf>,
    /// Folders of Python packages, asked for only when needed: it starts `python3`.
    packages: fn() -> Vec<PathBuf>,
    /// Where the system's toolkits are.
    local: PathBuf,
}

impl Places {
    fn of_this_process() -> Self {
        let folders = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let split = |value: Option<OsString>| value.iter().flat_map(env::split_paths).collect();
        Self {
            first: split(folders("ADVXL_CUDA_LIBRARIES")),
            toolkits: ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(folders).map(PathBuf::from).collect(),
            environments: ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(folders).map(PathBuf::from).collect(),
            packages: python_packages,
            local: PathBuf::from("/usr/local"),
        }
    }

    /// Paths worth opening for a library, best first. The bare name leaves the search to the loader.
    fn candidates<'a>(&'a self, library: &'a str, major: i32) -> impl Iterator<Item = PathBuf> + 'a {
        let existing = move |folder: PathBuf| Some(folder.join(library)).filter(|path| path.is_file());
        let toolkit = |root: &PathBuf| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|folder| root.join(folder));
        let environment = |root: &PathBuf| {
            let packages =
                beginning_with(&root.join("lib"), "python").into_iter().map(|python| python.join("site-packages"));
            [root.join("lib")].into_iter().chain(packages).collect::<Vec<_>>()
        };
        self.first
            .iter()
            .flat_map(move |folder| [folder.clone()].into_iter().chain(wheels(folder, major)))
            .filter_map(existing)
            .chain([PathBuf::from(library)])
            .chain(self.toolkits.iter().flat_map(toolkit).filter_map(existing))
            .chain(
                self.environments
                    .iter()
                    .flat_map(environment)
                    .flat_map(move |folder| [folder.clone()].into_iter().chain(wheels(&folder, major)))
                    .filter_map(existing),
            )
            // Chained lazily: `python3` starts only after all else.
            .chain(
                std::iter::once_with(|| (self.packages)())
                    .flatten()
                    .flat_map(move |folder| wheels(&folder, major))
                    .filter_map(existing),
            )
            .chain(
                beginning_with(&self.local, "cuda")
                    .into_iter()
                    .flat_map(move |root| toolkit(&root))
                    .filter_map(existing),
            )
    }
}

/// Where pip's wheels of a major version put libraries, below a folder of packages.
fn wheels(packages: &Path, major: i32) -> [PathBuf; 4] {
    let nvidia = packages.join("nvidia");
    let folders = [format!("cu{major}"), "cublas".into(), "cuda_nvrtc".into(), "nccl".into()];
    folders.map(|folder| nvidia.join(folder).join("lib"))
}

/// The entries of a folder whose names begin so, in descending order: the latest version first.
fn beginning_with(folder: &Path, name: &str) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let fits = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(name));
    fits.map(|entry| entry.path()).collect::<BTreeSet<_>>().into_iter().rev().collect()
}

/// The folders that the `python3` on the PATH imports from.
fn python_packages() -> Vec<PathBuf> {
    static FOUND: OnceLock<Vec<PathBuf>> = OnceLock::new();
    let ask = || {
        let output = Command::new("python3")
            .args(["-c", "import sys; print('\\n'.join(sys.path))"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().map(PathBuf::from).filter(|path| path.is_absolute() && path.is_dir()).collect()
    };
    FOUND.get_or_init(ask).clone()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A folder that vanishes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = env::temp_dir().join(format!("advxl-cuda-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, path: &str) -> PathBuf {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_users_folder_comes_first_and_the_systems_toolkit_last() {
        let folder = Folder::new("places");
        let own = folder.file("own/libcublasLt.so.13");
        let toolkit = folder.file("toolkit/lib64/libcublasLt.so.13");
        let wheel = folder.file("venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13");
        let conda = folder.file("conda/lib/libcublasLt.so.13");
        let system = folder.file("local/cuda-13.0/lib64/libcublasLt.so.13");
        folder.file("venv/lib/python3.12/site-packages/nvidia/cublas/lib/libcublasLt.so.12");
        let places = Places {
            first: vec![folder.0.join("own")],
            toolkits: vec![folder.0.join("toolkit"), folder.0.join("nowhere")],
            environments: vec![folder.0.join("venv"), folder.0.join("conda")],
            packages: Vec::new,
            local: folder.0.join("local"),
        };
        let found: Vec<_> = places.candidates("libcublasLt.so.13", 13).collect();
        assert_eq!(found, [own, PathBuf::from("libcublasLt.so.13"), toolkit, wheel, conda, system]);
        let older: Vec<_> = places.candidates("libcublasLt.so.12", 12).collect();
        assert_eq!(older.len(), 2, "the loader's and the wheel's: {older:?}");
    }

    #[test]
    fn a_missing_library_names_the_places_and_the_command_that_installs_it() {
        let blas = ["nvidia-cublas", "nvidia-cuda-nvrtc"];
        let names = ["libcublasLt.so.13".to_owned(), "libcublasLt.so.12".to_owned()];
        let text = not_found(&names, &blas, 13, &[]).to_string();
        for part in
            ["libcublasLt.so.13", "libcublasLt.so.12", "VIRTUAL_ENV", "pip install nvidia-cublas nvidia-cuda-nvrtc"]
        {
            assert!(text.contains(part), "{text}");
        }
        let text =
            not_found(&["libnvrtc.so.12".into()], &blas, 12, &["libnvrtc.so.12: file too short".into()]).to_string();
        for part in ["pip install nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12", "file too short"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("so.13"), "{text}");
    }

    #[test]
    fn a_missing_nccl_names_the_wheel_for_the_driver() {
        let folder = Folder::new("no-nccl");
        folder.file("own/libnccl.so.2");
        let places = Places {
            first: vec![folder.0.join("own")],
            toolkits: Vec::new(),
            environments: Vec::new(),
            packages: Vec::new,
            local: folder.0.clone(),
        };
        // An installed NCCL would be found on the loader's path.
        let Err(error) = find_nccl(&places, 13) else { return };
        for part in ["`libnccl.so.2`", "ADVXL_CUDA_LIBRARIES", "file too short", "pip install nvidia-nccl-cu13 "] {
            assert!(error.to_string().contains(part), "{error}");
        }
        let error = find_nccl(&places, 12).expect_err("as above");
        assert!(error.to_string().contains("pip install nvidia-nccl-cu12 "), "{error}");
    }

    #[test]
    fn nccl_is_found_where_its_wheel_puts_it() {
        let folder = Folder::new("nccl");
        let wheel = folder.file("venv/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2");
        let places = Places {
            first: Vec::new(),
            toolkits: Vec::new(),
            environments: vec![folder.0.join("venv")],
            packages: Vec::new,
            local: folder.0.join("local"),
        };
        let found: Vec<_> = places.candidates("libnccl.so.2", 13).collect();
        assert_eq!(found, [PathBuf::from("libnccl.so.2"), wheel]);
    }
}
