//! The cache folder of this machine.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, Result};

pub(crate) static CACHE: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Chooses the folder of the cache in place of the environment, unless one was used already.
pub fn use_cache(folder: &Path) {
    let _ = CACHE.set(Some(folder.to_owned()));
}

/// The folder for indexes of shards in stores.
pub fn indexes() -> Result<PathBuf> {
    cache("indexes")
}

/// A folder in `ADVXL_CACHE`, else in `XDG_CACHE_HOME`, else in the user's `.cache`.
pub fn cache(name: &str) -> Result<PathBuf> {
    let folder = CACHE.get_or_init(|| {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(folder) = set("ADVXL_CACHE") {
            return Some(folder.into());
        }
        let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        caches.map(|caches| caches.join("advxl"))
    });
    match folder {
        Some(folder) => Ok(folder.join(name)),
        None => Err(
            Error::input(format!("there is no folder for a cache of shards ({name})"))
                .hint("set ADVXL_CACHE to a folder"),
        ),
    }
}
