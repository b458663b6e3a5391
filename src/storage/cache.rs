//! The local cache folder.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use crate::error::{Error, Result};

/// The folder set by the program. Process-wide, like the environment variables that it overrides.
static CHOSEN: RwLock<Option<PathBuf>> = RwLock::new(None);

/// Sets the cache folder, which overrides the environment.
pub fn use_cache(folder: &Path) {
    let mut chosen = CHOSEN.write().unwrap_or_else(PoisonError::into_inner);
    *chosen = Some(folder.to_owned());
}

/// Returns the folder for indexes of remote shards.
pub fn indexes() -> Result<PathBuf> {
    cache("indexes")
}

/// Returns a subfolder of the cache folder: the one set with [`use_cache`], else `ADVXL_CACHE`, else `advxl` in
/// `XDG_CACHE_HOME` or in the user's `.cache`.
pub fn cache(name: &str) -> Result<PathBuf> {
    let chosen = CHOSEN.read().unwrap_or_else(PoisonError::into_inner);
    match chosen.clone().or_else(from_environment) {
        Some(folder) => Ok(folder.join(name)),
        None => Err(Error::input(format!("no cache folder for shards ({name})"))
            .hint("set ADVXL_CACHE to a folder")),
    }
}

fn from_environment() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = set("ADVXL_CACHE") {
        return Some(folder.into());
    }
    let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    caches.map(|caches| caches.join("advxl"))
}
