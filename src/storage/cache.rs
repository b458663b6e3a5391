//! The cache folder of this machine.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use crate::error::{Error, Result};

/// The folder that a program chose. Process-wide, since the environment that it replaces is so too.
static CHOSEN: RwLock<Option<PathBuf>> = RwLock::new(None);

/// Chooses the folder of the cache, in place of the environment.
pub fn use_cache(folder: &Path) {
    let mut chosen = CHOSEN.write().unwrap_or_else(PoisonError::into_inner);
    *chosen = Some(folder.to_owned());
}

/// The folder for indexes of shards in stores.
pub fn indexes() -> Result<PathBuf> {
    cache("indexes")
}

/// A folder in the one that was chosen, else in `ADVXL_CACHE`, `XDG_CACHE_HOME`, or the user's `.cache`.
pub fn cache(name: &str) -> Result<PathBuf> {
    let chosen = CHOSEN.read().unwrap_or_else(PoisonError::into_inner);
    match chosen.clone().or_else(from_environment) {
        Some(folder) => Ok(folder.join(name)),
        None => Err(
            Error::input(format!("there is no folder for a cache of shards ({name})"))
                .hint("set ADVXL_CACHE to a folder"),
        ),
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
