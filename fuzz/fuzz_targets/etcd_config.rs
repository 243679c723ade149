//! The etcd client's YAML file, as a mesh configuration mounts it for each cluster.
#![no_main]

#[path = "../bodies/etcd_config.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
