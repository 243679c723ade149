//! What a server that is not trusted may answer to a follower: any messages, in any order.
#![no_main]

#[path = "../bodies/follower.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
