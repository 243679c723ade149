//! The API server between a real etcd and real clients. Needs etcd (Debian: etcd-server) on the PATH; each test makes its own
//! on loopback, and ends it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod both;
mod certificates;
mod clusters;
mod embedded;
mod etcdctl;
mod flood;
mod hostile;
mod lab;
mod leases;
mod mirror;
mod one_id;
mod raw;
mod reads;
mod requests;
mod restart;
mod rights;
mod rotation;
mod script;
mod shutdown;
mod slow;
mod survive;
mod transactions;
mod watches;
mod writer;
