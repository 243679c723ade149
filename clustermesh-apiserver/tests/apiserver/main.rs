//! The API server between a real etcd and real clients. Needs etcd (Debian: etcd-server) on the PATH; each test makes its own
//! on loopback, and ends it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod clusters;
mod embedded;
mod hostile;
mod lab;
mod mirror;
mod reads;
mod restart;
mod rights;
mod script;
mod survive;
mod writer;
