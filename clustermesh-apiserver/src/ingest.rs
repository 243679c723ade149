//! From what a followed source reports to the store: a list is gathered and goes in as one, so that nobody reads half of it;
//! changes go in as they come. Pure.

mod past;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use past::Gathering;
pub use past::{HOLD_MS, IngestedPast, past_before};

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
    pub fn key(&self) -> &[u8] {
        match self {
            Self::Change(change) => change.key(),
            Self::Kept(key) => key,
        }
    }

    /// The same in bytes of its own, for what waits: a slice of a message would keep the whole message.
    fn on_its_own(self) -> Self {
        match self {
            Self::Change(change) => Self::Change(change.on_its_own()),
            Self::Kept(key) => Self::Kept(Bytes::copy_from_slice(&key)),
        }
    }

    fn shared_key(&self) -> Bytes {
        match self {
            Self::Change(SourceChange::Put { key, .. } | SourceChange::Delete { key, .. })
            | Self::Kept(key) => key.clone(),
            Self::Change(SourceChange::Shared(encoded)) => encoded.shared_key(),
        }
    }
}

/// One feed on its way into one sub-store.
#[derive(Debug, Default)]
pub struct Ingest {
    pending: Option<Pending>,
    history: Option<Gathering>,
}

/// A list that is not in the store yet. What was reported by one that broke off stays: it is not reported again.
#[derive(Debug, Default)]
struct Pending {
    /// `present` names every key of the source.
    full: bool,
    changes: BTreeMap<Bytes, SourceChange>,
    /// Bytes of their keys and values.
    bytes: u64,
    /// Keys that the source has, as far as the list told.
    present: BTreeSet<Bytes>,
    new_history: bool,
    /// Cluster ID and revision of a list that is at its end.
    ended: Option<(u64, i64)>,
}

/// Bytes of a value and its key; none of a key that is gone.
fn len(change: &SourceChange) -> u64 {
    match change {
        SourceChange::Put { key, value, .. } => (key.len() + value.len()) as u64,
        SourceChange::Shared(encoded) => (encoded.key().len() + encoded.value().len()) as u64,
        SourceChange::Delete { .. } => 0,
    }
}

impl Pending {
    fn take_out(&mut self, key: &[u8]) {
        if let Some(before) = self.changes.remove(key) {
            self.bytes -= len(&before);
        }
    }
}

/// What stands in a list that is not in the store yet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Listed {
    /// It names every key: what the store has now will be gone, or be these.
    pub full: bool,
    /// Bytes of keys and values.
    pub bytes: u64,
}

impl Ingest {
    /// A list begins. An untrusted one names every key.
    pub fn on_listing(&mut self, trusted: bool) {
        let pending = self.pending.get_or_insert_default();
        pending.ended = None;
        if !trusted {
            pending.full = true;
            pending.present.clear();
        }
    }

    /// The source's history from revision `from` up to the list that ends now is on its way; what was told of it before does not
    /// count.
    pub fn on_history_begins(&mut self, store: &mut Store, sub: &SubId, from: i64, now_ms: u64) {
        match &mut self.history {
            Some(history) => history.restart(store, sub, from),
            None => self.history = Some(Gathering::begin(from, now_ms)),
        }
    }

    /// Takes in past changes.
    pub fn on_past(&mut self, store: &Store, sub: &SubId, past: Vec<IngestedPast>) {
        if let Some(history) = &mut self.history {
            history.take(past, store.limits_of(sub));
        }
    }

    /// All past changes were told.
    pub fn on_history_complete(&mut self, store: &mut Store, sub: &SubId) {
        if let Some(history) = self.history.take() {
            history.complete(store, sub);
        }
    }

    /// They will not be told.
    pub fn on_history_lost(&mut self, store: &mut Store, sub: &SubId) {
        if self.history.take().is_some() {
            store.expect_nothing(sub);
        }
    }

    /// When [`on_tick`](Self::on_tick) is due at the latest, if at all.
    pub fn due_ms(&self) -> Option<u64> {
        self.history.as_ref()?.due_ms()
    }

    /// Lets readers that wait for history go when they have waited long enough. It may still come.
    pub fn on_tick(&mut self, store: &mut Store, sub: &SubId, now_ms: u64) {
        if let Some(history) = &mut self.history {
            history.on_tick(store, sub, now_ms);
        }
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
        if let Some((_, at)) = &mut pending.ended {
            *at = revision.max(*at);
        }
        for ingested in changes {
            let ingested = ingested.on_its_own();
            let key = ingested.shared_key();
            match ingested {
                Ingested::Kept(_) => {
                    pending.present.insert(key);
                }
                Ingested::Change(change @ SourceChange::Delete { .. }) => {
                    pending.present.remove(&key);
                    pending.take_out(&key);
                    // Of a list that names every key it is enough that this one is not named; what nobody has need not go.
                    if !pending.full && store.entry_len(sub, &key) > 0 {
                        pending.changes.insert(key, change);
                    }
                }
                Ingested::Change(change) => {
                    pending.present.insert(key.clone());
                    pending.take_out(&key);
                    pending.bytes += len(&change);
                    pending.changes.insert(key, change);
                }
            }
        }
    }

    /// The list is at its end. One of the known history goes into the store, as does the very first. One of a new history
    /// waits for [`release`](Self::release): a source that lost its data must not take down what it published before.
    pub fn on_listed(
        &mut self,
        store: &mut Store,
        sub: &SubId,
        cluster_id: u64,
        revision: i64,
        new_history: bool,
    ) {
        let pending = self.pending.get_or_insert_default();
        pending.ended = Some((cluster_id, revision));
        pending.new_history |= new_history;
        let first = !store.status(sub).is_some_and(|sub| sub.listed);
        if !pending.new_history || first {
            self.release(store, sub);
        }
    }

    /// If a list of a new history waits: the keys that the source has.
    pub fn waiting(&self) -> Option<&BTreeSet<Bytes>> {
        let pending = self.pending.as_ref()?;
        pending.ended.is_some().then_some(&pending.present)
    }

    /// What stands in the list that is under way or waits.
    pub fn listed(&self) -> Option<Listed> {
        let pending = self.pending.as_ref()?;
        Some(Listed {
            full: pending.full,
            bytes: pending.bytes,
        })
    }

    /// Bytes of a key and its value in the list that is under way or waits, if it has it.
    pub fn listed_len(&self, key: &[u8]) -> Option<u64> {
        self.pending.as_ref()?.changes.get(key).map(len)
    }

    /// Lets a list that is at its end into the store: its source has published everything again.
    pub fn release(&mut self, store: &mut Store, sub: &SubId) {
        let Some(pending) = self.pending.take_if(|pending| pending.ended.is_some()) else {
            return;
        };
        let Some((cluster_id, revision)) = pending.ended else {
            return;
        };
        store.relist(
            sub,
            Relist {
                cluster_id,
                revision,
                new_history: pending.new_history,
                changes: pending.changes.into_values().collect(),
                present: pending.full.then_some(pending.present),
            },
        );
        if self
            .history
            .take_if(|history| history.on_list(store, sub, revision))
            .is_some()
        {
            store.expect_nothing(sub);
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::ClusterName;

    use super::*;
    use crate::store::HistoryLimits;

    fn put(key: &'static str, revision: i64) -> Ingested {
        Ingested::Change(SourceChange::Put {
            key: Bytes::from_static(key.as_bytes()),
            value: Bytes::from_static(b"x"),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
        })
    }

    fn delete(key: &'static str, mod_revision: i64) -> Ingested {
        let key = Bytes::from_static(key.as_bytes());
        Ingested::Change(SourceChange::Delete { key, mod_revision })
    }

    struct World {
        store: Store,
        ingest: Ingest,
    }

    impl World {
        fn list(&mut self, cluster_id: u64, revision: i64, new_history: bool, changes: Vec<Ingested>) {
            self.ingest.on_listing(!new_history);
            self.changes(revision, changes);
            self.ingest
                .on_listed(&mut self.store, &SubId::Own, cluster_id, revision, new_history);
        }

        fn changes(&mut self, revision: i64, changes: Vec<Ingested>) {
            self.ingest
                .on_changes(&mut self.store, &SubId::Own, revision, changes);
        }

        fn state(&self) -> (usize, i64) {
            let status = self.store.status(&SubId::Own).unwrap();
            (status.keys, status.revision)
        }
    }

    fn world() -> World {
        let limits = HistoryLimits::default();
        World {
            store: Store::new(ClusterName::new("c1").unwrap(), 5, limits, limits),
            ingest: Ingest::default(),
        }
    }

    #[test]
    fn lists_go_in_whole_and_changes_at_once() {
        let mut world = world();
        world.ingest.on_listing(false);
        world.changes(10, vec![put("cilium/state/a", 1), put("cilium/state/b", 2)]);
        assert_eq!(world.state(), (0, 1), "half a list is not read");
        world.ingest.on_listed(&mut world.store, &SubId::Own, 7, 10, true);
        assert_eq!(world.state(), (2, 10), "the first list does not wait");
        world.changes(12, vec![delete("cilium/state/a", 11), put("cilium/state/c", 12)]);
        assert_eq!(world.state(), (2, 12));
        world.list(7, 20, false, vec![delete("cilium/state/b", 20)]);
        assert_eq!(world.state(), (1, 20));
    }

    #[test]
    fn a_new_history_waits_until_it_is_released_and_takes_changes_meanwhile() {
        let mut world = world();
        world.list(
            7,
            10,
            true,
            vec![put("cilium/state/a", 1), put("cilium/state/b", 2)],
        );
        world.list(7, 1, true, vec![]);
        assert_eq!(world.state(), (2, 10), "an emptied source takes nothing down");
        assert!(world.ingest.waiting().is_some_and(BTreeSet::is_empty));
        world.changes(2, vec![put("cilium/state/b", 2)]);
        // A compaction meanwhile: the difference only, since the history is now known.
        world.list(7, 5, false, vec![put("cilium/state/d", 4)]);
        world.changes(6, vec![put("cilium/state/c", 6), delete("cilium/state/d", 6)]);
        assert_eq!(world.state(), (2, 10));
        let waiting: Vec<&[u8]> = world
            .ingest
            .waiting()
            .unwrap()
            .iter()
            .map(|key| &key[..])
            .collect();
        assert_eq!(waiting, [b"cilium/state/b", b"cilium/state/c"]);
        world.ingest.release(&mut world.store, &SubId::Own);
        assert_eq!(world.state(), (2, 6), "b stays, a goes, c comes");
        assert!(world.ingest.waiting().is_none());
        world.changes(8, vec![delete("cilium/state/b", 7), put("cilium/state/e", 8)]);
        assert_eq!(world.state(), (2, 8));
    }

    #[test]
    fn what_waits_is_no_more_than_what_the_source_has() {
        let mut world = world();
        world.list(7, 10, true, vec![put("cilium/state/a", 1)]);
        world.list(8, 1, true, vec![]);
        let one = Some(Listed {
            full: true,
            bytes: 15,
        });
        for revision in 2..100 {
            world.changes(revision, vec![put("cilium/state/b", revision)]);
            assert_eq!(world.ingest.listed(), one);
            assert_eq!(world.ingest.listed_len(b"cilium/state/b"), Some(15));
        }
        world.changes(
            100,
            vec![delete("cilium/state/b", 100), delete("cilium/state/c", 100)],
        );
        let pending = world.ingest.pending.as_ref().unwrap();
        assert_eq!(
            (pending.bytes, pending.changes.len(), pending.present.len()),
            (0, 0, 0)
        );
        world.ingest.release(&mut world.store, &SubId::Own);
        assert_eq!(world.state(), (0, 100));
        // A list of differences: only what is there can go.
        world.changes(101, vec![put("cilium/state/a", 101)]);
        world.ingest.on_listing(true);
        world.changes(
            110,
            vec![delete("cilium/state/a", 110), delete("cilium/state/c", 110)],
        );
        assert_eq!(world.ingest.pending.as_ref().unwrap().changes.len(), 1);
        world
            .ingest
            .on_listed(&mut world.store, &SubId::Own, 8, 110, false);
        assert_eq!(world.state(), (0, 110));
    }

    #[test]
    fn a_list_that_breaks_off_loses_nothing() {
        let mut world = world();
        world.list(7, 10, true, vec![put("cilium/state/a", 1)]);
        world.ingest.on_listing(true);
        world.changes(20, vec![put("cilium/state/b", 15)]);
        // Compacted between pages: the next one does not name b again.
        world.list(7, 30, false, vec![put("cilium/state/c", 25)]);
        assert_eq!(world.state(), (3, 30));
        // A refused object of a full list keeps its previous value.
        let kept = Ingested::Kept(Bytes::from_static(b"cilium/state/a"));
        world.list(8, 40, true, vec![kept, put("cilium/state/b", 39)]);
        world.ingest.release(&mut world.store, &SubId::Own);
        assert_eq!(world.state(), (2, 40));
    }
}
