//! Access to shards by name: local files, gzipped files, and objects in cloud storage and on web servers. Archives, and
//! the local cache of what is unpacked.
//!
//! | file        | what                                                          |
//! |-------------|---------------------------------------------------------------|
//! | [`store`]   | one interface to files and objects; read-ahead                |
//! | [`cloud`]   | S3, Google Cloud Storage, HTTP (feature `cloud`)              |
//! | [`pattern`] | shard patterns: braces, globs, lists                          |
//! | [`archive`] | the directory of a zip archive                                |
//! | [`unpack`]  | gzipped shards and zip entries, unpacked into a cache         |

pub mod archive;
pub mod cache;
#[cfg_attr(not(feature = "cloud"), path = "cloud_absent.rs")]
pub mod cloud;
pub mod glob;
// All tests run with the feature `cloud`, so the messages of a build without it are tested there too.
#[cfg(all(test, feature = "cloud"))]
#[allow(dead_code)]
mod cloud_absent;
pub mod pattern;
pub mod store;
pub mod unpack;
