//! etcd as a stream of typed updates ([`follow()`]) and a batched, idempotent [`writer`].
//!
//! In: an etcd (or a clustermesh-apiserver, which speaks its read API) named by an [`EtcdConfig`]. Out: [`Update`]s over a
//! bounded channel; transactions that bring the store to the desired content and nothing more.
//!
//! The etcd that we write is called through `etcd-client`; watch streams, and what others serve, are read with
//! `isthmus_proto`'s clients. [`client`] says why. Both share one connection and its TLS.
//!
//! Invariants: what is known is never flushed because an upstream went away or began a new history, it is listed again and
//! compared; a page's revision is pinned for all pages of a list, and the watch begins right after it; an unchanged key is
//! never written. The decisions ([`follower`], [`plan`]) are pure; the shells around them move bytes.

pub mod client;
pub mod config;
mod connect;
pub mod follow;
pub mod follower;
pub mod pace;
pub mod plan;
pub mod replicas;
pub mod rfc3339;
pub mod troubleshoot;
pub mod writer;

pub use client::{CallError, Client};
pub use config::{ConfigError, EtcdConfig};
pub use connect::{ConnectError, Options};
pub use follow::{Feeds, Follow, Update, follow};
pub use follower::{Before, Change, Feed, History, Past};
pub use pace::Pace;
pub use replicas::{Replica, ask_replicas};
pub use troubleshoot::{Finding, troubleshoot};
pub use writer::{Writer, WriterOptions, WriterStatus};
