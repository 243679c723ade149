//! What a container runtime gives the CNI plugin: variables and a network configuration.
#![no_main]

#[path = "../bodies/cni_stdin.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
