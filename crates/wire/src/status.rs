//! Statuses: of a mirrored remote cluster, as JSON under `isthmus/status/v1/remotes/<c>`, from an API server to its agents;
//! and of an API server itself, beside its answer to etcd's Maintenance.Status.
//!
//! Fields are only ever added. Readers ignore those that they do not know, and take absent ones for zero or empty.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::refusal::{Refusal, VALUE_LEN_MAX};

/// What a mirror does with a remote cluster.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// There was no connection yet.
    Connecting,
    /// Connected; not all is read, or read again.
    Listing,
    /// What is mirrored equals the remote cluster's state, and changes follow as they happen.
    Synced,
    /// What is known stays and may be old: the connection is lost, or the remote cluster's heartbeat has stopped.
    Stale,
    /// Its config does not fit this cluster's, for example by its ID; `status` says how.
    Refused,
    /// Its file is gone; what is known of it goes next.
    Draining,
    /// A newer server said something else, or an older one nothing.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Phase {
    /// Its name in JSON, metrics and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Connecting => "connecting",
            Self::Listing => "listing",
            Self::Synced => "synced",
            Self::Stale => "stale",
            Self::Refused => "refused",
            Self::Draining => "draining",
        }
    }
}

/// How far the reading of a remote cluster is. All are 0 before the first list.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ListProgress {
    /// Entries that were received of the lists, those of finished ones included.
    pub received: u64,
    /// Entries that the lists have; what the remote cluster said when each began. Grows while lists begin.
    pub expected: u64,
    /// Bytes of keys and values received.
    pub bytes: u64,
    /// Entries a second lately; 0 when nothing is listed.
    pub keys_per_second: u64,
    /// Bytes a second lately; 0 when nothing is listed.
    pub bytes_per_second: u64,
    /// Milliseconds until everything is received at that rate; absent if that is not known, 0 if it is done.
    pub left_ms: Option<u64>,
}

/// What an API server knows about one configured remote cluster.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RemoteStatus {
    /// Remote cluster's name, as its file is named.
    pub name: String,
    /// Connection stands and answers.
    pub connected: bool,
    /// Config accepted and every prefix listed once since the start of the mirror.
    pub ready: bool,
    /// It answers, but its heartbeat has stopped: what it says may be old.
    pub stale: bool,
    /// Why it is refused or failing; empty when all is well. For people.
    pub status: String,
    /// ID from the remote's cluster config, 0 if unknown.
    pub cluster_id: u32,
    /// The remote publishes Isthmus' frames and slices.
    pub slices: bool,
    /// How many connections failed or were lost so far.
    pub num_failures: u64,
    /// Unix milliseconds of the last failure, 0 if none.
    pub last_failure_ms: u64,
    /// Unix milliseconds when the remote's heartbeat was last seen to change, 0 if never. Readers compute the age.
    pub heartbeat_seen_ms: u64,
    /// Objects now mirrored, by kind: nodes, ip, identities, services, frames, slices.
    pub objects: BTreeMap<String, u64>,
    /// Which kinds were fully listed once.
    pub synced: BTreeMap<String, bool>,
    /// Objects refused since the start, by reason (see [`Refusal::reason`]).
    pub refused: BTreeMap<String, u64>,
    /// The last few refusals as `key: why`, newest last, at most 10.
    pub last_refusals: Vec<String>,
    /// What the mirror does.
    pub phase: Phase,
    /// How far it is.
    pub progress: ListProgress,
    /// Unix milliseconds since when what is known may be old: when the connection was lost, or the last heartbeat was seen. 0
    /// unless the phase is stale.
    pub stale_since_ms: u64,
    /// Unix milliseconds when the connection was made, 0 if there is none.
    pub connected_since_ms: u64,
    /// The last failure, also after it has passed. For people.
    pub last_error: String,
    /// Connections that failed or were lost in a row; 0 while one stands.
    pub retries: u64,
    /// Unix milliseconds of the next try, 0 while a connection stands.
    pub next_retry_ms: u64,
    /// Bytes that are mirrored, to the next 64 KiB.
    pub bytes: u64,
    /// What it may publish is restricted by `isthmus-accept` in its file.
    pub restricted: bool,
}

/// What an API server says about itself to its own cluster, in the binary metadata [`ReplicaStatus::METADATA`] of its answer
/// to Maintenance.Status.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ReplicaStatus {
    /// Program version.
    pub version: String,
    /// Its cluster.
    pub cluster: String,
    /// Unix milliseconds of its start.
    pub started_ms: u64,
    /// The own cluster's state was read.
    pub synced: bool,
    /// Revision of the own cluster's store that it has read.
    pub revision: i64,
    /// Configured remote clusters.
    pub remotes: u64,
    /// Those that are connected.
    pub remotes_connected: u64,
    /// Those that are mirrored in full.
    pub remotes_ready: u64,
    /// Open watches.
    pub watches: u64,
    /// Open watch streams.
    pub streams: u64,
    /// Keys that it serves, of all clusters.
    pub keys: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl ReplicaStatus {
    /// Name of the gRPC metadata that carries it.
    pub const METADATA: &'static str = "isthmus-replica-bin";

    /// Reads a status.
    pub fn decode(value: &[u8]) -> Result<Self, Refusal> {
        Refusal::check_len(value, VALUE_LEN_MAX)?;
        serde_json::from_slice(value).map_err(Refusal::Json)
    }

    /// Writes a status.
    pub fn encode(&self) -> Vec<u8> {
        crate::json(self)
    }
}

impl RemoteStatus {
    /// Reads a status.
    pub fn decode(value: &[u8]) -> Result<Self, Refusal> {
        Refusal::check_len(value, VALUE_LEN_MAX)?;
        serde_json::from_slice(value).map_err(Refusal::Json)
    }

    /// Writes a status.
    pub fn encode(&self) -> Vec<u8> {
        crate::json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_and_newer_statuses_are_read() {
        let old = RemoteStatus::decode(br#"{"name":"c2","connected":true}"#).unwrap();
        assert_eq!(
            (old.phase, old.progress.left_ms, old.connected),
            (Phase::Unknown, None, true)
        );
        let new =
            RemoteStatus::decode(br#"{"phase":"dancing","progress":{"received":3,"x":1},"y":{}}"#).unwrap();
        assert_eq!((new.phase, new.progress.received), (Phase::Unknown, 3));
        let status = RemoteStatus {
            phase: Phase::Listing,
            ..Default::default()
        };
        assert_eq!(RemoteStatus::decode(&status.encode()).unwrap(), status);
        for phase in [
            Phase::Unknown,
            Phase::Connecting,
            Phase::Listing,
            Phase::Synced,
            Phase::Stale,
            Phase::Refused,
            Phase::Draining,
        ] {
            assert_eq!(crate::json(&phase), format!("{:?}", phase.as_str()).into_bytes());
        }
        assert!(RemoteStatus::decode(b"{").is_err() && ReplicaStatus::decode(b"[").is_err());
        let replica = ReplicaStatus::decode(br#"{"watches":3,"new":1}"#).unwrap();
        assert_eq!(ReplicaStatus::decode(&replica.encode()).unwrap().watches, 3);
    }
}
