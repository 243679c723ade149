//! A remote cluster's objects on their way into the store: each checked, each refusal counted, and no more of them than it may
//! have. And their second judgement, when what it may publish was changed.

use std::sync::Arc;

use bytes::Bytes;
use isthmus_kvstore::{Change, Feed, History, Past};
use isthmus_wire::{
    Refusal,
    keys::{self, Kind},
    refusal::KEY_LEN_MAX,
};

use super::{FeedChange, Mirrored, Remote, keys_max};
use crate::{
    ingest::{Ingest, Ingested, IngestedPast, past_before},
    mirror::{grants::Grants, translate::Border},
    store::{Relist, SourceChange, Store, SubId},
};

/// Lists begun for want of room are a minute apart at least.
const ROOM_INTERVAL_MS: u64 = 60_000;

/// So many revisions before a kind's first list are asked for, so that readers of the server before this one go on from where
/// they were.
const HISTORY_REVISIONS: i64 = 5_000;

impl Remote {
    /// Takes in changed objects.
    pub(super) fn on_objects(
        &mut self,
        store: &mut Store,
        feed: &Arc<str>,
        revision: i64,
        reported: Vec<Change>,
        now_ms: u64,
    ) {
        let mut bytes = self.bytes(store);
        let bytes_max = self.grants.bytes_max();
        let Some((kind, mirrored)) = self.kinds.get_mut(feed) else {
            return;
        };
        let (mut keys_received, mut bytes_received) = (0, 0);
        let mut ingested = Vec::with_capacity(reported.len());
        let mut refusals: Vec<(Bytes, Refusal)> = Vec::new();
        for change in reported {
            let (key, refusal) = match change {
                Change::Put {
                    key,
                    value,
                    create_revision,
                    mod_revision,
                    version,
                } => {
                    let len = (key.len() + value.len()) as u64;
                    keys_received += 1;
                    bytes_received += len;
                    let room = |to: String| {
                        // What it replaces, in the list that is under way or in the store.
                        let kept = || store.entry_len(&mirrored.sub, to.as_bytes()) as u64;
                        let before = match mirrored.ingest.listed_len(to.as_bytes()) {
                            Some(listed) => listed,
                            None if mirrored.ingest.listed().is_some_and(|listed| listed.full) => 0,
                            None => kept(),
                        };
                        let with = (bytes + len).saturating_sub(before);
                        if len > before && with > bytes_max {
                            let limit = bytes_max;
                            return Err(Refusal::TooManyBytes { bytes: with, limit });
                        }
                        Ok((to, with))
                    };
                    match mirrored.border.check(&key, &value).and_then(room) {
                        Ok((to, with)) => {
                            bytes = with;
                            self.logged.remove(&key);
                            ingested.push(Ingested::Change(SourceChange::Put {
                                key: to.into(),
                                value,
                                create_revision,
                                mod_revision,
                                version,
                            }));
                            continue;
                        }
                        Err(refusal) => (key, refusal),
                    }
                }
                Change::Delete { key, mod_revision } => {
                    self.logged.remove(&key);
                    // A key that does not translate was never taken.
                    if let Ok(to) = mirrored.border.translate(&key) {
                        let key = to.into();
                        ingested.push(Ingested::Change(SourceChange::Delete { key, mod_revision }));
                    }
                    continue;
                }
                Change::Refused {
                    key, surplus: true, ..
                } => {
                    mirrored.short_of = Some(mirrored.short_of.unwrap_or(0));
                    let (what, limit) = ("the prefix", mirrored.feed.keys_max);
                    let len = limit.saturating_add(1);
                    let too_many = Refusal::TooMany { what, len, limit };
                    // It is not followed, and so was never taken.
                    let refusal = mirrored.border.translate(&key).err().unwrap_or(too_many);
                    refusals.push((key, refusal));
                    continue;
                }
                Change::Refused { key, len, .. } => {
                    let limit = kind.value_len_max();
                    (key, Refusal::TooLarge { len, limit })
                }
            };
            if let Refusal::TooManyBytes { bytes: with, .. } = refusal {
                let needs = with.saturating_sub(bytes);
                mirrored.short_of = Some(mirrored.short_of.map_or(needs, |least| least.min(needs)));
            }
            let kept = mirrored.border.translate(&key).ok();
            ingested.extend(kept.map(|to| Ingested::Kept(to.into())));
            refusals.push((key, refusal));
        }
        self.progress
            .on_received(*kind, keys_received, bytes_received, now_ms);
        mirrored
            .ingest
            .on_changes(store, &mirrored.sub, revision, ingested);
        for (key, refusal) in refusals {
            self.on_refusal(key, &refusal);
        }
    }

    /// Takes in what happened before a kind's first list, checked as every object is.
    pub(super) fn on_history(&mut self, store: &mut Store, feed: &Arc<str>, history: History, now_ms: u64) {
        let Some((_, mirrored)) = self.kinds.get_mut(feed) else {
            return;
        };
        let (ingest, sub) = (&mut mirrored.ingest, &mirrored.sub);
        match history {
            History::Begins { from } => ingest.on_history_begins(store, sub, from, now_ms),
            History::Events(past) => {
                let past = past.into_iter();
                let past = past
                    .filter_map(|past| past_object(&mirrored.border, past))
                    .collect();
                ingest.on_past(store, sub, past);
            }
            History::Complete => ingest.on_history_complete(store, sub),
            History::Lost => ingest.on_history_lost(store, sub),
        }
    }

    /// Bytes of all its objects, those of lists that are under way included.
    pub(super) fn bytes(&self, store: &Store) -> u64 {
        let bytes = self.kinds.values().map(|(_, mirrored)| {
            let kept = store.status(&mirrored.sub).map_or(0, |sub| sub.bytes as u64);
            match mirrored.ingest.listed() {
                None => kept,
                Some(listed) if listed.full => listed.bytes,
                Some(listed) => kept + listed.bytes,
            }
        });
        bytes.sum()
    }

    /// The feed of `kind`, by a name that no feed had before: by an old one it would go on where that was.
    pub(super) fn make_feed(&mut self, kind: Kind, prefix: &str) -> Feed {
        self.feeds_made += 1;
        let keys_max = self.grants.entries_max(kind).unwrap_or(keys_max(kind));
        Feed {
            name: format!("{prefix}#{}", self.feeds_made).into(),
            ..Feed::prefix(prefix, kind.value_len_max())
                .with_keys_max(keys_max, KEY_LEN_MAX)
                .with_history(HISTORY_REVISIONS)
        }
    }

    /// Changes what the cluster may publish. What is not granted any more goes at once, whether it answers or not; what stays
    /// granted stays; what is newly granted comes with a list.
    pub fn set_grants(&mut self, store: &mut Store, grants: Grants, now_ms: u64) -> Vec<FeedChange> {
        if *self.grants == grants {
            return Vec::new();
        }
        let before = self.grants.fingerprint();
        self.grants = Arc::new(grants);
        // Judged anew, and told anew.
        self.logged.clear();
        let mut changes = Vec::new();
        for name in self.kinds.keys().cloned().collect::<Vec<_>>() {
            self.withdraw(store, &name, before);
            changes.extend(self.list_again(store, &name));
        }
        self.refresh(store, now_ms);
        self.write_status(store);
        changes
    }

    /// Takes out of the store what is not granted any more.
    fn withdraw(&mut self, store: &mut Store, name: &Arc<str>, fingerprint_before: u64) {
        let grants = self.grants.clone();
        let Some((_, mirrored)) = self.kinds.get_mut(name) else {
            return;
        };
        mirrored.border = mirrored.border.clone().with_grants(grants.clone());
        let (border, sub) = (&mirrored.border, mirrored.sub.clone());
        let (mut kept, mut refusals) = (std::collections::BTreeSet::new(), Vec::new());
        for (key, value) in store.entries(&sub) {
            let judged = border
                .source_key(key)
                .map(|source| match border.check(source.as_bytes(), value) {
                    Ok(_) => None,
                    Err(refusal) => Some((Bytes::from(source), refusal)),
                });
            match judged {
                Ok(Some(refused)) => refusals.push(refused),
                // Every key here was translated once.
                Ok(None) | Err(_) => {
                    kept.insert(Bytes::copy_from_slice(key));
                }
            }
        }
        let Some(status) = store.status(&sub).filter(|_| !refusals.is_empty()) else {
            return;
        };
        // What readers know of this history is not so any more: they list, compare, and drop what was withdrawn. This state is
        // between two of the source's, and has an ID of its own.
        let mixed = grants.fingerprint().rotate_left(16) ^ fingerprint_before.rotate_left(40);
        let between = mixed.max(1);
        let list = Relist {
            cluster_id: mirrored.source_id ^ between,
            revision: status.revision,
            new_history: true,
            changes: Vec::new(),
            present: Some(kept),
        };
        store.relist(&sub, list);
        for (key, refusal) in refusals {
            self.on_refusal(key, &refusal);
        }
    }

    /// Reads a kind from its beginning. Until that has ended, what is known stays.
    fn list_again(&mut self, store: &mut Store, name: &Arc<str>) -> Vec<FeedChange> {
        let Some((kind, mut mirrored)) = self.kinds.remove(name) else {
            return Vec::new();
        };
        self.live.remove(name);
        mirrored.feed = self.make_feed(kind, mirrored.border.prefix());
        // Nobody waits for what will not come.
        mirrored.ingest.on_history_lost(store, &mirrored.sub);
        mirrored.ingest = Ingest::default();
        mirrored.short_of = None;
        let add = FeedChange::Add(mirrored.feed.clone());
        self.kinds.insert(mirrored.feed.name.clone(), (kind, mirrored));
        vec![FeedChange::Remove(name.clone()), add]
    }

    /// Objects that there was no room for are read when there is some again.
    pub(super) fn use_room(&mut self, store: &mut Store, now_ms: u64) -> Vec<FeedChange> {
        // A clock that was set back is no reason to wait longer.
        let waits = (1..=ROOM_INTERVAL_MS).contains(&self.room_due_ms.saturating_sub(now_ms));
        if waits || !self.status.connected {
            return Vec::new();
        }
        let left = self.grants.bytes_max().saturating_sub(self.bytes(store));
        let names: Vec<Arc<str>> = self
            .kinds
            .iter()
            .filter(|(name, (_, mirrored))| {
                let keys = store.status(&mirrored.sub).map_or(0, |sub| sub.keys);
                // A tenth: one key more or less must not lead to a list each time.
                let few = mirrored.feed.keys_max.saturating_sub(keys) > mirrored.feed.keys_max / 10;
                let room = mirrored.short_of.is_some_and(|needs| needs <= left);
                room && few && self.live.contains(*name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        if !names.is_empty() {
            self.room_due_ms = now_ms + ROOM_INTERVAL_MS;
        }
        names
            .iter()
            .flat_map(|name| self.list_again(store, name))
            .collect()
    }

    /// Drops the kinds that `which` names.
    pub(super) fn drop_kinds(&mut self, store: &mut Store, which: impl Fn(Kind) -> bool) -> Vec<FeedChange> {
        let gone: Vec<(Arc<str>, (Kind, Mirrored))> =
            self.kinds.extract_if(.., |_, (kind, _)| which(*kind)).collect();
        let mut changes = Vec::new();
        for (name, (kind, mirrored)) in gone {
            store.remove_sub(&mirrored.sub);
            if let Some(canary) = keys::canary(&self.cluster, kind, keys::Scope::Cache) {
                store.delete_local(canary.as_bytes());
            }
            self.live.remove(&name);
            self.progress.forget(kind);
            changes.push(FeedChange::Remove(name));
        }
        changes
    }

    /// The sub-store of a kind.
    pub(super) fn sub(&self, kind: Kind) -> SubId {
        SubId::Remote(self.cluster.clone(), kind)
    }
}

/// A past change at the border: translated, and judged as it would be now. `None` for a key that is none of the kind.
fn past_object(border: &Border, past: Past) -> Option<IngestedPast> {
    let revision = past.change.mod_revision();
    let source = past.change.key().clone();
    let to = Bytes::from(border.translate(&source).ok()?);
    let admitted = |value: &[u8]| border.check(&source, value).is_ok();
    let before = past_before(&to, past.before, admitted);
    let change = match past.change {
        Change::Put {
            value,
            create_revision,
            mod_revision,
            version,
            ..
        } if admitted(&value) => Ingested::Change(SourceChange::Put {
            key: to,
            value,
            create_revision,
            mod_revision,
            version,
        }),
        Change::Delete { mod_revision, .. } => Ingested::Change(SourceChange::Delete {
            key: to,
            mod_revision,
        }),
        Change::Put { .. } | Change::Refused { .. } => Ingested::Kept(to),
    };
    Some(IngestedPast {
        revision,
        change,
        before,
    })
}
