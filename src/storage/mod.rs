//! Files and objects by name: local files, gzipped files, objects in cloud stores and on web servers.
//!
//! | file        | what                                                          |
//! |-------------|---------------------------------------------------------------|
//! | [`store`]   | one interface to files and objects, requests ahead of time    |
//! | [`cloud`]   | S3, Google Cloud Storage, HTTP (feature `cloud`)              |
//! | [`pattern`] | shard patterns: braces, globs, lists                          |
//! | [`unpack`]  | gzipped shards, unpacked into a cache                         |

pub mod cache;
#[cfg_attr(not(feature = "cloud"), path = "cloud_absent.rs")]
pub mod cloud;
pub mod glob;
// What a program without the feature says is tested where all tests run, with it.
#[cfg(all(test, feature = "cloud"))]
#[allow(dead_code)]
mod cloud_absent;
pub mod pattern;
pub mod store;
pub mod unpack;
