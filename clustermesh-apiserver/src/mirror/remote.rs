//! One remote cluster: what its upstream reports, step by step into the store and into its status. Pure: time is an argument.
//!
//! Order: its config, admitted or not; then, kind by kind, as soon as the remote says that it has published everything of
//! it (its canary), the objects; then our own canary, which tells local agents the same.

mod objects;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use isthmus_kvstore::{Change, Feed, Update};
use isthmus_model::{ClusterName, MaxConnectedClusters};
use isthmus_wire::{
    keys::{self, CLUSTER_CONFIG, HEARTBEAT, Kind, REMOTE_STATUS, SYNCED, Scope},
    refusal::{KEY_LEN_MAX, VALUE_LEN_MAX},
    status::RemoteStatus,
};

use super::{
    admission::{Admitted, ClusterIds, admit},
    grants::Grants,
    progress::Progress,
    translate::Border,
};
use crate::{
    ingest::Ingest,
    store::{Store, SubId},
};

/// Canaries that are remembered; a remote has a handful.
const CANARIES_MAX: usize = 64;

/// Name of a kind in statuses and metrics.
pub const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Nodes => "nodes",
        Kind::Ip => "ip",
        Kind::Identities => "identities",
        Kind::Services => "services",
        Kind::Frames => "frames",
        Kind::Slices => "slices",
    }
}

/// Most keys of a kind that are mirrored of one remote cluster, a few times what Kubernetes' and our limits allow: a remote
/// cluster that goes wild must not take this one's memory.
pub const fn keys_max(kind: Kind) -> usize {
    match kind {
        Kind::Nodes => 20_000,
        Kind::Ip => 1_000_000,
        // As many numbers as a cluster has.
        Kind::Identities => 65_536,
        Kind::Services | Kind::Frames => 100_000,
        Kind::Slices => 250_000,
    }
}

/// A change of what is followed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FeedChange {
    /// Follow this too.
    Add(Feed),
    /// No more.
    Remove(Arc<str>),
}

struct Mirrored {
    feed: Feed,
    border: Border,
    sub: SubId,
    ingest: Ingest,
    synced: bool,
    /// The source's cluster ID, once it was listed.
    source_id: u64,
    /// The list that is under way.
    /// Objects were refused for want of room: what the smallest of them needs, in bytes.
    short_of: Option<u64>,
}

/// A configured remote cluster.
pub struct Remote {
    cluster: ClusterName,
    max: MaxConnectedClusters,
    grants: Arc<Grants>,
    config: Option<Bytes>,
    admitted: Option<Admitted>,
    /// Those that the remote has now.
    canaries: BTreeSet<String>,
    /// Feeds that are in step with the remote on this connection.
    live: BTreeSet<Arc<str>>,
    /// Numbers feeds: one that is dropped and begun again by the same name would go on where it was, and not be listed.
    feeds_made: u64,
    /// By the name of the feed.
    kinds: BTreeMap<Arc<str>, (Kind, Mirrored)>,
    heartbeat: Option<Bytes>,
    /// Since when the next one is waited for, Unix milliseconds; `None` before the first connection.
    heartbeat_due_ms: Option<u64>,
    logged: BTreeSet<Bytes>,
    progress: Progress,
    /// When a list for want of room may begin, Unix milliseconds.
    room_due_ms: u64,
    /// Its file was missed at the last look.
    leaving: bool,
    /// Why it is not admitted, or what fails; the connection's error comes first.
    problem: String,
    connection_error: String,
    /// What is wrong with its file.
    complaint: String,
    status: RemoteStatus,
    written: Option<RemoteStatus>,
    /// When the connection was lost, Unix milliseconds; 0 if it was not.
    lost_ms: u64,
    was_connected: bool,
    /// Counters that were not exported yet.
    new_reconnects: u64,
    new_failures: u64,
    new_refusals: BTreeMap<&'static str, u64>,
}

impl Remote {
    /// A remote cluster that nothing is known about.
    pub fn new(cluster: ClusterName, max: MaxConnectedClusters, grants: Grants) -> Self {
        Self {
            status: RemoteStatus {
                name: cluster.to_string(),
                ..Default::default()
            },
            cluster,
            max,
            grants: Arc::new(grants),
            config: None,
            admitted: None,
            canaries: BTreeSet::new(),
            live: BTreeSet::new(),
            feeds_made: 0,
            kinds: BTreeMap::new(),
            heartbeat: None,
            heartbeat_due_ms: None,
            logged: BTreeSet::new(),
            progress: Progress::default(),
            room_due_ms: 0,
            leaving: false,
            problem: String::new(),
            connection_error: "connecting".to_owned(),
            complaint: String::new(),
            written: None,
            lost_ms: 0,
            was_connected: false,
            new_reconnects: 0,
            new_failures: 0,
            new_refusals: BTreeMap::new(),
        }
    }

    /// What is to be followed now.
    pub fn feeds(&self) -> Vec<Feed> {
        let mut feeds = vec![
            Feed::key(&keys::cluster_config(&self.cluster), VALUE_LEN_MAX),
            Feed::prefix(HEARTBEAT, VALUE_LEN_MAX).with_keys_max(CANARIES_MAX, KEY_LEN_MAX),
            Feed::prefix(&self.synced_prefix(), VALUE_LEN_MAX).with_keys_max(CANARIES_MAX, KEY_LEN_MAX),
        ];
        feeds.extend(self.kinds.values().map(|(_, mirrored)| mirrored.feed.clone()));
        feeds
    }

    fn synced_prefix(&self) -> String {
        format!("{SYNCED}{}/", self.cluster)
    }

    /// Writes the first status.
    pub fn start(&mut self, store: &mut Store, _: &mut ClusterIds) {
        self.write_status(store);
    }

    /// Takes in what the upstream told; `now_ms` is Unix time.
    pub fn on(
        &mut self,
        store: &mut Store,
        ids: &mut ClusterIds,
        update: Update,
        now_ms: u64,
    ) -> Vec<FeedChange> {
        let mut changes = Vec::new();
        match update {
            Update::Connected { .. } => self.on_connected(now_ms),
            Update::Disconnected { error, retry_in } => {
                self.live.clear();
                self.on_disconnected(error, retry_in, now_ms);
            }
            Update::Failed { feed, error } => self.on_failure(format!("{feed}: {error}"), now_ms),
            Update::Listing {
                feed,
                trusted,
                expected,
                ..
            } => {
                if let Some((kind, mirrored)) = self.kinds.get_mut(&feed) {
                    mirrored.ingest.on_listing(trusted);
                    // More than are followed do not come.
                    let expected = expected.min(mirrored.feed.keys_max as u64);
                    self.progress.on_listing(*kind, expected, now_ms);
                }
            }
            Update::Changes {
                feed,
                revision,
                changes: reported,
            } => {
                if &*feed == HEARTBEAT {
                    self.on_heartbeat(reported, now_ms);
                } else if feed.starts_with(CLUSTER_CONFIG) {
                    self.on_config(reported);
                    changes = self.judge(store, ids);
                } else if feed.starts_with(SYNCED) {
                    self.on_canaries(reported);
                    changes = self.start_kinds(store);
                } else {
                    self.on_objects(store, &feed, revision, reported, now_ms);
                }
            }
            Update::History { feed, history } => self.on_history(store, &feed, history, now_ms),
            Update::Listed {
                feed,
                cluster_id,
                revision,
                new_history,
            } => {
                if let Some((kind, mirrored)) = self.kinds.get_mut(&feed) {
                    self.progress.on_listed(*kind);
                    mirrored.source_id = cluster_id;
                    let shown_id = cluster_id ^ self.grants.fingerprint();
                    mirrored
                        .ingest
                        .on_listed(store, &mirrored.sub, shown_id, revision, new_history);
                } else if feed.starts_with(CLUSTER_CONFIG) {
                    changes = self.judge(store, ids);
                }
            }
            Update::Synced { feed, .. } => {
                self.connection_error.clear();
                if &*feed == HEARTBEAT && self.heartbeat_due_ms.is_none() {
                    self.heartbeat_due_ms = Some(now_ms);
                }
                self.live.insert(feed);
            }
        }
        self.settle(store);
        self.refresh(store, now_ms);
        let urgent = |status: &RemoteStatus| {
            (
                status.connected,
                status.ready,
                status.stale,
                status.status.clone(),
                status.cluster_id,
                status.phase,
            )
        };
        if self.written.as_ref().map(urgent) != Some(urgent(&self.status)) {
            self.write_status(store);
        }
        changes
    }

    /// What is wrong with its file, or an empty text.
    pub fn on_complaint(&mut self, store: &mut Store, complaint: String, now_ms: u64) {
        self.complaint = complaint;
        self.refresh(store, now_ms);
        self.write_status(store);
    }

    /// Its file was missed at the last look, or is there again.
    pub fn on_leaving(&mut self, store: &mut Store, leaving: bool, now_ms: u64) {
        self.leaving = leaving;
        self.refresh(store, now_ms);
        self.write_status(store);
    }

    /// It is connected to anew, maybe elsewhere; what is known stays.
    pub fn on_reconfigured(&mut self, store: &mut Store, now_ms: u64) {
        self.live.clear();
        self.on_moved(now_ms);
        self.refresh(store, now_ms);
        self.write_status(store);
    }

    /// What is known about it.
    pub fn status(&self) -> &RemoteStatus {
        &self.status
    }

    /// To be called about once a second: writes the status if it changed, and asks again for what is not admitted.
    pub fn on_tick(&mut self, store: &mut Store, ids: &mut ClusterIds, now_ms: u64) -> Vec<FeedChange> {
        let refused = self.admitted.is_none() || !self.problem.is_empty();
        let mut changes = if self.config.is_some() && refused {
            self.judge(store, ids)
        } else {
            Vec::new()
        };
        changes.extend(self.use_room(store, now_ms));
        for (_, mirrored) in self.kinds.values_mut() {
            mirrored.ingest.on_tick(store, &mirrored.sub, now_ms);
        }
        self.refresh(store, now_ms);
        self.write_status(store);
        changes
    }

    /// The cluster is no longer configured: removes everything that came from it.
    pub fn drain(&mut self, store: &mut Store, ids: &mut ClusterIds) {
        self.drain_objects(store);
        ids.release(&self.cluster);
        store.delete_local(format!("{REMOTE_STATUS}{}", self.cluster).as_bytes());
    }

    /// Config first, so that readers know that the rest goes on purpose.
    fn drain_objects(&mut self, store: &mut Store) -> Vec<FeedChange> {
        store.delete_local(keys::cluster_config(&self.cluster).as_bytes());
        store.delete_local_prefix(&self.synced_prefix());
        self.admitted = None;
        self.drop_kinds(store, |_| true)
    }

    fn on_heartbeat(&mut self, reported: Vec<Change>, now_ms: u64) {
        for change in reported {
            if let Change::Put { key, value, .. } = change
                && key == HEARTBEAT.as_bytes()
                && self.heartbeat.as_ref() != Some(&value)
            {
                // A copy: the value is a slice of its message.
                self.heartbeat = Some(Bytes::copy_from_slice(&value));
                self.heartbeat_due_ms = Some(now_ms);
                self.status.heartbeat_seen_ms = now_ms;
            }
        }
    }

    // Config.

    fn on_config(&mut self, reported: Vec<Change>) {
        for change in reported {
            match change {
                Change::Put { value, .. } => self.config = Some(Bytes::copy_from_slice(&value)),
                Change::Delete { .. } => self.config = None,
                // Judged as what it is: no valid config.
                Change::Refused { .. } => self.config = Some(Bytes::new()),
            }
        }
    }

    /// Judges the config. A cluster that was admitted keeps its objects when its config turns bad.
    fn judge(&mut self, store: &mut Store, ids: &mut ClusterIds) -> Vec<FeedChange> {
        let before = self.admitted.clone();
        // It may change its ID: what it has must not stand in its way, and stays its own if it is refused.
        match admit(&self.cluster, self.config.as_deref(), self.max, ids) {
            Err(error) => {
                let problem = error.to_string();
                if self.problem != problem {
                    tracing::warn!(cluster = %self.cluster, problem, "remote cluster is not admitted");
                }
                self.problem = problem;
                Vec::new()
            }
            Ok(admitted) => {
                self.problem.clear();
                if before.as_ref() == Some(&admitted) {
                    return Vec::new();
                }
                let mut changes = Vec::new();
                let moved = |before: &Admitted| before.id != admitted.id || before.scope != admitted.scope;
                if before.as_ref().is_some_and(moved) {
                    tracing::warn!(cluster = %self.cluster, id = %admitted.id, "remote cluster changed its ID or its place; starting over");
                    changes = self.drain_objects(store);
                    ids.release(&self.cluster);
                    // Its new ID was free a moment ago, and nobody else was asked since.
                    let _ = admit(&self.cluster, self.config.as_deref(), self.max, ids);
                }
                if !admitted.slices {
                    let slices = |kind| matches!(kind, Kind::Frames | Kind::Slices);
                    changes.extend(self.drop_kinds(store, slices));
                }
                let config = admitted.mirrored.encode();
                store.put_local(keys::cluster_config(&self.cluster).into(), config.into());
                self.admitted = Some(admitted);
                changes.extend(self.start_kinds(store));
                changes
            }
        }
    }

    // Kinds.

    fn on_canaries(&mut self, reported: Vec<Change>) {
        let prefix = self.synced_prefix();
        for change in reported {
            let (key, there) = match &change {
                Change::Put { key, .. } | Change::Refused { key, .. } => (key, true),
                Change::Delete { key, .. } => (key, false),
            };
            let Ok(base) = keys::suffix(key, &prefix) else {
                continue;
            };
            if !there {
                // What was complete stays so; only a new history has to show it again.
                self.canaries.remove(base);
            } else if self.canaries.len() < CANARIES_MAX {
                self.canaries.insert(base.to_owned());
            }
        }
    }

    /// Begins to follow the kinds that are complete at the source.
    fn start_kinds(&mut self, store: &mut Store) -> Vec<FeedChange> {
        let Some(admitted) = self.admitted.clone() else {
            return Vec::new();
        };
        let mut changes = Vec::new();
        for kind in wanted(&admitted) {
            let Some(base) = kind.base_prefix(admitted.scope) else {
                continue;
            };
            if admitted.canaries && !self.canaries.contains(base) {
                continue;
            }
            let Some(border) = Border::new(kind, admitted.scope, &self.cluster, admitted.id, self.max) else {
                continue;
            };
            if self.kinds.values().any(|(known, _)| *known == kind) {
                continue;
            }
            let feed = self.make_feed(kind, border.prefix());
            let sub = self.sub(kind);
            store.add_sub(sub.clone());
            let mirrored = Mirrored {
                feed: feed.clone(),
                border: border.with_grants(self.grants.clone()),
                sub,
                ingest: Ingest::default(),
                synced: false,
                source_id: 0,
                short_of: None,
            };
            self.kinds.insert(feed.name.clone(), (kind, mirrored));
            changes.push(FeedChange::Add(feed));
        }
        changes
    }

    /// Lets lists into the store that may go there, and says so to local agents. A remote that lost its data and begins anew
    /// must have its config, and if it has canaries, that of the kind: until then the old state stays.
    fn settle(&mut self, store: &mut Store) {
        let config_feed = keys::cluster_config(&self.cluster);
        let published = self.config.is_some() && self.live.contains(config_feed.as_str());
        let canaries_live = self.live.contains(self.synced_prefix().as_str());
        let Some(admitted) = &self.admitted else {
            return;
        };
        for (name, (kind, mirrored)) in &mut self.kinds {
            let base = kind.base_prefix(admitted.scope).unwrap_or_default();
            let complete = !admitted.canaries || (canaries_live && self.canaries.contains(base));
            if published && complete {
                mirrored.ingest.release(store, &mirrored.sub);
            }
            if self.live.contains(name)
                && mirrored.ingest.waiting().is_none()
                && !std::mem::replace(&mut mirrored.synced, true)
                && let Some(canary) = keys::canary(&self.cluster, *kind, Scope::Cache)
            {
                // Readers look at the key only.
                store.put_local(canary.into(), Bytes::from_static(b"true"));
            }
        }
    }
}

/// The kinds that a remote cluster publishes.
fn wanted(admitted: &Admitted) -> Vec<Kind> {
    let slices = admitted.slices;
    Kind::ALL
        .into_iter()
        .filter(|kind| slices || !matches!(kind, Kind::Frames | Kind::Slices))
        .collect()
}

#[cfg(test)]
mod lies;
#[cfg(test)]
mod tests;
