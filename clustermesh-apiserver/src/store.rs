//! The composite store: a compact MVCC view of the own cluster's etcd and of each mirrored cluster, in memory. Pure: no I/O,
//! no clock, no locks.
//!
//! In: lists and changes of the sources, each in its own order. Out: answers to Range, and what a watch has to say next.
//!
//! Invariants:
//! - Each source is a sub-store in its own revision space, with its etcd's cluster ID: a key keeps the revisions that its own
//!   cluster gave it, in every replica. A request that stays inside one sub-store sees those.
//! - Everything else (several sub-stores at once, and keys that this server writes itself) is the *merged* view, with this
//!   process' own counter and cluster ID.
//! - Equal cluster ID and revision mean equal content. When a source's history is another one, the sub-store's watches end.
//! - An event is encoded once; watches share its bytes and are cursors into a bounded history, never queues.

mod age;
mod content;
mod encoded;
mod entry;
mod history;
mod past;
mod range;
mod route;
mod sub;
mod watch;

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use bytes::Bytes;
use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::ResponseHeader;

pub use encoded::{Encoded, Revisions};
pub use history::HistoryLimits;
pub use past::{PastBefore, PastChange};
pub use range::{Budget, RangeError, View};
pub use route::{Route, SubId};
pub use sub::{Relist, SourceChange};
pub use watch::{Cursor, Next, WatchStart};

pub(crate) use age::Ages;

use content::Content;
use entry::{Batch, Entry};
use history::History;
use sub::SubStore;

/// The whole store.
#[derive(Debug)]
pub struct Store {
    own: ClusterName,
    /// Cluster ID of the merged view and of sub-stores that were not listed yet: random, new with each process.
    server_id: u64,
    /// Revision of the merged view: counts batches of any sub-store.
    merged_revision: i64,
    merged: History,
    subs: BTreeMap<SubId, SubStore>,
    /// Keys that this server writes itself; their revisions are those of the merged view.
    local: Content,
    limits: HistoryLimits,
    remote_limits: HistoryLimits,
    /// Cluster IDs for histories whose source used one for two of them.
    spare_id: u64,
}

/// What is known about a sub-store, for metrics.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SubStatus {
    /// It was listed once.
    pub listed: bool,
    /// Its revision.
    pub revision: i64,
    /// Its keys.
    pub keys: usize,
    /// Bytes of its keys and values, as they are kept.
    pub bytes: usize,
    /// Batches in its history.
    pub history_len: usize,
    /// Bytes in its history.
    pub history_bytes: usize,
}

impl Store {
    /// An empty store of cluster `own`. `server_id` is random and not 0.
    pub fn new(
        own: ClusterName,
        server_id: u64,
        limits: HistoryLimits,
        remote_limits: HistoryLimits,
    ) -> Self {
        let mut store = Self {
            own,
            server_id,
            merged_revision: 1,
            merged: History::new(1),
            subs: BTreeMap::new(),
            local: Content::default(),
            limits,
            remote_limits,
            spare_id: server_id,
        };
        store.add_sub(SubId::Own);
        store
    }

    /// The same empty store, whose merged view begins at `revision`.
    pub fn counting_from(mut self, revision: i64) -> Self {
        self.merged_revision = revision;
        self.merged = History::new(revision);
        self
    }

    /// Makes room for a source. It serves as empty, under this server's ID, until it is listed.
    pub fn add_sub(&mut self, id: SubId) {
        let (server_id, epoch) = (self.server_id, self.merged_revision);
        self.subs
            .entry(id)
            .or_insert_with(|| SubStore::new(server_id, epoch));
    }

    /// Removes a source and all its keys.
    pub fn remove_sub(&mut self, id: &SubId) {
        let Some(sub) = self.subs.remove(id) else { return };
        let events = sub.content.iter().map(|entry| (None, Some(entry.clone())));
        let events = events.collect();
        // Its watches find their sub-store gone, and end.
        self.record(id.clone(), sub.revision, events, None);
    }

    /// The sub-store's state.
    pub fn status(&self, id: &SubId) -> Option<SubStatus> {
        self.subs.get(id).map(|sub| SubStatus {
            listed: sub.listed,
            revision: sub.revision,
            keys: sub.content.len(),
            bytes: sub.content.bytes(),
            history_len: sub.history.len(),
            history_bytes: sub.history.bytes(),
        })
    }

    /// The sub-store's present keys and values, in key order.
    pub fn entries(&self, id: &SubId) -> impl Iterator<Item = (&[u8], &[u8])> {
        let content = self.subs.get(id).map(|sub| &sub.content);
        let entries = content.into_iter().flat_map(Content::iter);
        entries.map(|entry| (entry.key(), entry.value()))
    }

    /// Length in bytes of a key's entry as it is kept, 0 if there is none.
    pub fn entry_len(&self, id: &SubId, key: &[u8]) -> usize {
        let entry = self.subs.get(id).and_then(|sub| sub.content.get(key));
        entry.map_or(0, |entry| entry.encoded_len())
    }

    /// All sub-stores.
    pub fn sub_ids(&self) -> impl Iterator<Item = &SubId> {
        self.subs.keys()
    }

    /// Revision of the merged view; moves with every change of anything.
    pub fn merged_revision(&self) -> i64 {
        self.merged_revision
    }

    /// Which view serves `range`.
    pub fn route(&self, range: &isthmus_tls::rights::KeyRange) -> Route {
        route::route(range, &self.own, |id| self.subs.contains_key(id))
    }

    /// Whether `key` belongs to the own cluster's etcd. Others that are found there are somebody else's affair.
    pub fn is_own(&self, key: &[u8]) -> bool {
        route::sub_of(key, &self.own) == Some(SubId::Own)
    }

    /// Canaries of the own cluster.
    pub fn own_canaries(&self) -> Vec<Bytes> {
        let prefix = format!("{}{}/", isthmus_wire::keys::SYNCED, self.own);
        let from = (Bound::Included(prefix.as_bytes()), Bound::Unbounded);
        let content = self.subs.get(&SubId::Own).map(|sub| &sub.content);
        let entries = content.into_iter().flat_map(|content| content.range(&from).0);
        entries
            .take_while(|entry| entry.key().starts_with(prefix.as_bytes()))
            .map(|entry| entry.shared_key())
            .collect()
    }

    /// The header that an answer of this view carries.
    pub fn header(&self, route: &Route) -> ResponseHeader {
        let (cluster_id, revision) = match route {
            Route::Sub(id) => match self.subs.get(id) {
                Some(sub) => (sub.cluster_id, sub.revision),
                None => (self.server_id, 1),
            },
            Route::Merged => (self.server_id, self.merged_revision),
        };
        self.header_at(cluster_id, revision)
    }

    fn header_at(&self, cluster_id: u64, revision: i64) -> ResponseHeader {
        ResponseHeader {
            cluster_id,
            member_id: self.server_id,
            revision,
            raft_term: 1,
        }
    }

    /// Whether the view has content to serve. The own cluster's has once its etcd was listed.
    pub fn is_served(&self, route: &Route) -> bool {
        match route {
            Route::Sub(SubId::Own) | Route::Merged => {
                self.subs.get(&SubId::Own).is_some_and(|sub| sub.listed)
            }
            Route::Sub(_) => true,
        }
    }

    /// Whether `range` asks for one kind of a configured remote cluster that was not read in full yet. Its content is not
    /// known then, which is another thing than empty: a reader that knew more before must not take it for gone.
    pub fn is_incomplete(&self, range: &isthmus_tls::rights::KeyRange) -> bool {
        let Some(id) = route::remote_of(range, &self.own) else {
            return false;
        };
        let SubId::Remote(cluster, _) = &id else {
            return false;
        };
        let configured = format!("{}{cluster}", isthmus_wire::keys::REMOTE_STATUS);
        let listed = self.subs.get(&id).is_some_and(|sub| sub.listed);
        !listed && self.local.get(configured.as_bytes()).is_some()
    }

    // Changes of sources.

    /// Takes in changes of a source, in revision order; `revision` says that everything up to it is in.
    pub fn apply(&mut self, id: &SubId, revision: i64, changes: Vec<SourceChange>) {
        let mut changes = changes.into_iter().peekable();
        while let Some(first) = changes.next() {
            let at = first.mod_revision();
            let mut batch = vec![first];
            while let Some(change) = changes.next_if(|change| change.mod_revision() == at) {
                batch.push(change);
            }
            self.apply_batch(id, at, batch);
        }
        if let Some(sub) = self.subs.get_mut(id) {
            sub.revision = sub.revision.max(revision);
        }
    }

    fn apply_batch(&mut self, id: &SubId, revision: i64, changes: Vec<SourceChange>) {
        let merged_revision = self.merged_revision + 1;
        let Some(sub) = self.subs.get_mut(id) else { return };
        let events = sub.replace(changes, merged_revision);
        if events.is_empty() {
            return;
        }
        sub.revision = sub.revision.max(revision);
        self.record(id.clone(), revision, events, Some(id.clone()));
    }

    /// Takes in a list of a source: the difference to what it held before, and where that stands.
    pub fn relist(&mut self, id: &SubId, list: Relist) {
        let merged_revision = self.merged_revision + 1;
        let Some(sub) = self.subs.get_mut(id) else { return };
        let same_source = sub.listed && !list.new_history && sub.source_id == list.cluster_id;
        let mut changes = list.changes;
        if let Some(present) = &list.present {
            let gone = sub.content.iter().filter(|entry| !present.contains(entry.key()));
            changes.extend(gone.map(|entry| SourceChange::Delete {
                key: entry.shared_key(),
                mod_revision: list.revision,
            }));
        }
        let events = sub.replace(changes, merged_revision);
        // At an unchanged revision there is nothing to change; if there was, watches would have passed it.
        let same_history = same_source
            && (sub.revision < list.revision || (sub.revision == list.revision && events.is_empty()));
        if same_history && sub.revision < list.revision {
            // What happened between is lost. The difference would lead on who is where this sub-store was, but not who comes
            // from another replica and saw a key come that went again since. Nor could who passes it on tell it from history.
            sub.history = History::new(list.revision);
        } else if !same_history {
            // Knuth's MMIX generator: other values than the random one it starts from are all that is needed.
            self.spare_id = self
                .spare_id
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            sub.begin_history(
                list.cluster_id,
                list.revision,
                self.spare_id.max(1),
                merged_revision,
            );
        }
        sub.listed = true;
        sub.revision = list.revision;
        if !events.is_empty() || !same_history {
            self.record(id.clone(), list.revision, events, None);
        }
    }

    /// Writes a key of this server itself; an equal value is not written.
    pub fn put_local(&mut self, key: Bytes, value: Bytes) {
        let before = self.local.get(&key).cloned();
        if before.as_ref().is_some_and(|entry| entry.value() == value) {
            return;
        }
        let revision = self.merged_revision + 1;
        let revisions = Revisions {
            create: before.as_ref().map_or(revision, |entry| entry.revisions().create),
            modified: revision,
            version: before.as_ref().map_or(1, |entry| entry.revisions().version + 1),
        };
        let merged_create = before.as_ref().map_or(revision, |entry| entry.merged_create);
        let encoded = Encoded::new(&key, &value, revisions, 0);
        let entry = Arc::new(Entry::new(encoded, merged_create, revision));
        self.local.insert(entry.clone());
        self.record_local(vec![(Some(entry), before)]);
    }

    /// Values of this server's own keys that begin with `prefix`.
    pub fn local_values(&self, prefix: &str) -> Vec<&[u8]> {
        let from = (Bound::Included(prefix.as_bytes()), Bound::Unbounded);
        let entries = self.local.range(&from).0;
        entries
            .take_while(|entry| entry.key().starts_with(prefix.as_bytes()))
            .map(|entry| entry.value())
            .collect()
    }

    /// Deletes a key of this server itself.
    pub fn delete_local(&mut self, key: &[u8]) {
        if let Some(before) = self.local.remove(key) {
            self.record_local(vec![(None, Some(before))]);
        }
    }

    /// Deletes all keys of this server itself that begin with `prefix`.
    pub fn delete_local_prefix(&mut self, prefix: &str) {
        let keys: Vec<Bytes> = self
            .local
            .iter()
            .filter(|entry| entry.key().starts_with(prefix.as_bytes()))
            .map(|entry| entry.shared_key())
            .collect();
        keys.iter().for_each(|key| self.delete_local(key));
    }

    fn record_local(&mut self, events: Vec<entry::Changed>) {
        let revision = self.merged_revision + 1;
        let batch = Arc::new(Batch::new(None, revision, revision, events));
        self.merged_revision = revision;
        self.merged.push(revision, batch, self.limits);
    }

    /// How much history is kept of a source.
    pub fn limits_of(&self, id: &SubId) -> HistoryLimits {
        if *id == SubId::Own {
            self.limits
        } else {
            self.remote_limits
        }
    }

    /// Notes a batch in the merged history, and in the sub-store's own if `history` names it.
    fn record(&mut self, id: SubId, revision: i64, events: Vec<entry::Changed>, history: Option<SubId>) {
        let limits = self.limits_of(&id);
        self.merged_revision += 1;
        let batch = Arc::new(Batch::new(Some(id), revision, self.merged_revision, events));
        if let Some(sub) = history.and_then(|id| self.subs.get_mut(&id)) {
            sub.history.push(revision, batch.clone(), limits);
        }
        self.merged.push(self.merged_revision, batch, self.limits);
    }
}

#[cfg(test)]
mod tests;
