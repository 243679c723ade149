//! From what a followed source reports to the store: a list is gathered and goes in as one, so that nobody reads half of it;
//! changes go in as they come. Pure.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::store::{Relist, SourceChange, Store, SubId};

/// A reported change, after validation.
#[derive(Clone, Debug)]
pub enum Ingested {
    /// To be taken.
    Change(SourceChange),
    /// Refused: the key's previous value stays.
    Kept(Bytes),
}

impl Ingested {
    /// The key.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Change(SourceChange::Put { key, .. } | SourceChange::Delete { key, .. })
            | Self::Kept(key) => key,
        }
    }
}

/// One feed on its way into one sub-store.
#[derive(Debug, Default)]
pub struct Ingest {
    pending: Option<Pending>,
}

/// A list that is not at its end. What was reported by one that broke off stays: it is not reported again.
#[derive(Debug, Default)]
struct Pending {
    /// The present list names every key of the source.
    full: bool,
    changes: BTreeMap<Bytes, SourceChange>,
    /// Keys that the present list names.
    present: BTreeSet<Bytes>,
}

impl Ingest {
    /// A list begins. An untrusted one names every key.
    pub fn on_listing(&mut self, trusted: bool) {
        let pending = self.pending.get_or_insert_default();
        pending.full = !trusted;
        pending.present.clear();
    }

    /// Takes in changes, of the list or of the watch.
    pub fn on_changes(&mut self, store: &mut Store, sub: &SubId, revision: i64, changes: Vec<Ingested>) {
        let Some(pending) = &mut self.pending else {
            let changes = changes.into_iter().filter_map(|ingested| match ingested {
                Ingested::Change(change) => Some(change),
                Ingested::Kept(_) => None,
            });
            store.apply(sub, revision, changes.collect());
            return;
        };
        for ingested in changes {
            let key = ingested.key().clone();
            let deleted = matches!(ingested, Ingested::Change(SourceChange::Delete { .. }));
            if deleted {
                pending.present.remove(&key);
            } else {
                pending.present.insert(key.clone());
            }
            if let Ingested::Change(change) = ingested {
                pending.changes.insert(key, change);
            }
        }
    }

    /// The list is at its end.
    pub fn on_listed(
        &mut self,
        store: &mut Store,
        sub: &SubId,
        cluster_id: u64,
        revision: i64,
        new_history: bool,
    ) {
        let pending = self.pending.take().unwrap_or_default();
        store.relist(
            sub,
            Relist {
                cluster_id,
                revision,
                new_history,
                changes: pending.changes.into_values().collect(),
                present: pending.full.then_some(pending.present),
            },
        );
    }
}
