//! A Kubernetes API emulator with the controllers that a small cluster needs.
//!
//! [`KubeApi`] holds the state and its verbs; [`KubeApi::serve`] answers kubectl and kube-rs over HTTP on a listener;
//! [`KubeApi::client`] gives the same verbs in this process. What it does to objects is in pure modules: [`store`],
//! [`rules`], [`patch`], [`selector`], [`kind`]. Controllers ([`controllers`]) use the same verbs as everyone else.
//!
//! Invariant: it emulates Kubernetes and knows nothing of what runs on it. There is no authentication: serve it on
//! loopback only.

pub mod api;
pub mod controllers;
pub mod error;
pub mod http;
pub mod kind;
pub mod kubeconfig;
pub mod meta;
pub mod patch;
pub mod rules;
pub mod runtime;
pub mod selector;
pub mod store;

pub use api::{
    Batch, Client, Deleted, Feed, KubeApi, ListOptions, Options, Page, WatchEvent, WatchOptions, Watcher,
    WriteOptions, Written,
};
pub use error::ApiError;
pub use kubeconfig::kubeconfig_yaml;
pub use patch::Patch;
pub use rules::{DeleteOptions, Part, Propagation};
pub use runtime::{LogRequest, LogStream, PodRuntime, RuntimeRefusal};
pub use store::{Event, EventKind, Key, Object, ResourceId};
