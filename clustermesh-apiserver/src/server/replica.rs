//! What this replica says about itself to its own cluster, beside its answer to Maintenance.Status: etcd's message has no
//! place for it. It is made when it is asked for; a key in the store would wake readers every second.

use std::time::{SystemTime, UNIX_EPOCH};

use isthmus_tls::rights::KeyRange;
use isthmus_wire::{
    keys::{REMOTE_STATUS, range_end},
    status::{RemoteStatus, ReplicaStatus},
};
use tonic::metadata::{MetadataMap, MetadataValue};

use super::Context;
use crate::store::SubId;

/// Who may read this may read what is said here.
pub(super) fn range() -> KeyRange {
    KeyRange::from_etcd(REMOTE_STATUS.as_bytes(), &range_end(REMOTE_STATUS.as_bytes()))
}

/// Puts the status into `metadata`.
pub(super) fn describe(context: &Context, metadata: &mut MetadataMap) {
    let value = MetadataValue::from_bytes(&status(context).encode());
    metadata.insert_bin(ReplicaStatus::METADATA, value);
}

fn status(context: &Context) -> ReplicaStatus {
    let begun = SystemTime::now()
        .checked_sub(context.now())
        .and_then(|begun| begun.duration_since(UNIX_EPOCH).ok())
        .unwrap_or_default();
    let count = |gauge: i64| u64::try_from(gauge).unwrap_or(0);
    let mut status = ReplicaStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: context.cluster.to_string(),
        started_ms: u64::try_from(begun.as_millis()).unwrap_or(u64::MAX),
        watches: count(context.metrics.watches.get()),
        streams: count(context.metrics.streams.get()),
        ..Default::default()
    };
    context.shared.read(|store| {
        if let Some(own) = store.status(&SubId::Own) {
            status.synced = own.listed;
            status.revision = own.revision;
        }
        for sub in store.sub_ids().filter_map(|id| store.status(id)) {
            status.keys += sub.keys as u64;
            status.bytes += sub.bytes as u64;
        }
        for value in store.local_values(REMOTE_STATUS) {
            status.remotes += 1;
            if let Ok(remote) = RemoteStatus::decode(value) {
                status.remotes_connected += u64::from(remote.connected);
                status.remotes_ready += u64::from(remote.connected && remote.ready);
            }
        }
    });
    status
}
