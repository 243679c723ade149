//! The kubelet emulator: runs the pods of one node as processes of this machine.
//!
//! In: pods bound to the node (list and watch), the node's network readiness (the CNI plugin's STATUS).
//! Out: processes in namespaces and cgroups, the pods' status, the node's object and its Lease.
//!
//! Pure: [`lifecycle`] (what to do next), [`probe`] (what probes mean), [`mod@env`] (environments and command lines), [`spec`] (what a pod asks for),
//! [`status`] (what the API shows). Shell: [`node`], [`worker`], [`container`], [`network`], [`prober`], [`logs`], [`pods`].
//!
//! What differs from a kubelet, on purpose: images are ignored, a container's command runs from the machine's own file
//! system (a container without a command is refused); no volumes, ConfigMaps, Secrets or cluster DNS; restart delays
//! start at a second, so that people and tests do not wait; gRPC probes are refused.

pub mod container;
pub mod env;
pub mod lifecycle;
pub mod logs;
pub mod network;
pub mod node;
pub mod pods;
pub mod probe;
pub mod prober;
pub mod spec;
pub mod status;
pub mod worker;
