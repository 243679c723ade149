//! Requests of etcd's API as any client may send them: read, routed, checked and answered by the API server's pure parts.
#![no_main]

#[path = "../bodies/etcd_requests.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
