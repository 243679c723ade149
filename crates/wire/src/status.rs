//! Status of a mirrored remote cluster: JSON under `isthmus/status/v1/remotes/<c>`, from an API server to its agents.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::refusal::{Refusal, VALUE_LEN_MAX};

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
