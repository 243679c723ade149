//! Whole clusters on one machine: `isthmus sandbox`.
//!
//! A sandbox is a set of Kubernetes-shaped clusters that share one machine: per cluster a Kubernetes API emulator,
//! a real etcd, the real operator and API server; per node a network namespace with the real agent and its BPF
//! programs; pods are processes in namespaces of their own, attached by the real CNI plugin.
//! It emulates Kubernetes, never Isthmus.
//!
//! The parts, from pure to thin:
//! - [`plan`]: every name, address, file and command line of a sandbox as data, from a few numbers.
//! - [`kubelet`]: the life of a pod as pure decisions, and the shell that carries them out.
//! - [`netns`], [`cgroup`], [`bpffs`], [`pki`]: what is made on the machine.
//! - [`supervisor`]: the one process that owns a running sandbox; [`control`] and [`client`] talk to it.
//! - [`teardown`]: removes a sandbox, in whatever state it is.
//! - [`cli`]: the commands.
//!
//! Invariants: everything a sandbox makes is found again by its name and index alone, so that it can be removed after
//! any crash; the root network namespace gets one veth and no route to pods or services; two sandboxes share nothing.

pub mod backoff;
pub mod bpffs;
pub mod cgroup;
pub mod cli;
pub mod client;
pub mod control;
pub mod demo;
pub mod http_get;
pub mod kubectl;
pub mod kubelet;
pub mod load;
pub mod netns;
pub mod pki;
pub mod plan;
pub mod prerequisites;
pub mod registry;
pub mod supervisor;
pub mod teardown;
pub mod workload;

pub use client::SandboxClient;
