//! The API server between a real etcd and real clients. Needs etcd (Debian: etcd-server) on the PATH; each test makes its own
//! on loopback, and ends it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod certificates;
mod clusters;
mod embedded;
mod flood;
mod hostile;
mod lab;
mod mirror;
mod raw;
mod reads;
mod restart;
mod rights;
mod script;
mod shutdown;
mod slow;
mod survive;
mod writer;
