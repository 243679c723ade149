//! What a source did before its first list, gathered until all of it is there. Pure: time is an argument.
//!
//! In: past changes after validation, each with what it replaced as far as that is known. Out: what readers of this server would
//! have been told of them, in one go, into the store.
//!
//! Invariants: a refused change changes nothing here either, so that what follows it replaced what was before it; what the
//! history leads to is what was listed; memory is bounded, and the oldest goes first.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use isthmus_kvstore::Before;

use super::Ingested;
use crate::store::{Encoded, HistoryLimits, PastBefore, PastChange, Revisions, SourceChange, Store, SubId};

/// How long readers that need history wait for it before they are told to list, in milliseconds.
pub const HOLD_MS: u64 = 5_000;

/// A past change, after validation.
#[derive(Clone, Debug)]
pub struct IngestedPast {
    /// Revision of the change.
    pub revision: i64,
    /// The change, or its refusal.
    pub change: Ingested,
    /// What the key held before. Refused values are not known.
    pub before: PastBefore,
}

/// What the key `key` held, as a source tells it; `admitted` says whether its value is one that would have been taken.
pub fn past_before(key: &[u8], before: Before, admitted: impl FnOnce(&[u8]) -> bool) -> PastBefore {
    match before {
        Before::Nothing => PastBefore::Absent,
        Before::Value {
            value,
            create_revision,
            mod_revision,
            version,
        } if admitted(&value) => {
            let revisions = Revisions {
                create: create_revision,
                modified: mod_revision,
                version,
            };
            PastBefore::Known(Encoded::new(key, &value, revisions, 0))
        }
        Before::Value { .. } | Before::Unknown => PastBefore::Unknown,
    }
}

/// What became of a key.
#[derive(Debug)]
enum Became {
    Put(Encoded),
    Deleted(Bytes),
    /// A refused value: what was there stays.
    Kept(Bytes),
}

#[derive(Debug)]
struct Event {
    revision: i64,
    became: Became,
    before: PastBefore,
}

impl Event {
    fn of(past: IngestedPast) -> Self {
        let became = match past.change {
            Ingested::Kept(key) => Became::Kept(Bytes::copy_from_slice(&key)),
            Ingested::Change(SourceChange::Delete { key, .. }) => {
                Became::Deleted(Bytes::copy_from_slice(&key))
            }
            Ingested::Change(SourceChange::Shared(encoded)) => Became::Put(encoded),
            Ingested::Change(SourceChange::Put {
                key,
                value,
                create_revision,
                mod_revision,
                version,
            }) => {
                let revisions = Revisions {
                    create: create_revision,
                    modified: mod_revision,
                    version,
                };
                Became::Put(Encoded::new(&key, &value, revisions, 0))
            }
        };
        Self {
            revision: past.revision,
            became,
            before: past.before,
        }
    }

    fn key(&self) -> Bytes {
        match &self.became {
            Became::Put(encoded) => encoded.shared_key(),
            Became::Deleted(key) | Became::Kept(key) => key.clone(),
        }
    }

    fn bytes(&self) -> usize {
        let became = match &self.became {
            Became::Put(encoded) => encoded.bytes().len(),
            Became::Deleted(key) | Became::Kept(key) => key.len(),
        };
        let before = match &self.before {
            PastBefore::Known(before) => before.bytes().len(),
            PastBefore::Absent | PastBefore::Unknown => 0,
        };
        became + before + size_of::<Self>()
    }
}

/// History that is on its way.
#[derive(Debug)]
pub(super) struct Gathering {
    /// First revision that will be known.
    from: i64,
    /// Of the list, once that is in the store.
    list: Option<i64>,
    events: VecDeque<Event>,
    bytes: usize,
    /// Until when readers wait; `None` = they do not any more.
    hold_until_ms: Option<u64>,
}

impl Gathering {
    pub(super) fn begin(from: i64, now_ms: u64) -> Self {
        Self {
            from,
            list: None,
            events: VecDeque::new(),
            bytes: 0,
            hold_until_ms: Some(now_ms.saturating_add(HOLD_MS)),
        }
    }

    /// It begins anew, from another revision.
    pub(super) fn restart(&mut self, store: &mut Store, sub: &SubId, from: i64) {
        self.from = from;
        self.events.clear();
        self.bytes = 0;
        if self.list.is_some() && self.hold_until_ms.is_some() {
            store.expect_history(sub, from);
        }
    }

    /// A list is in the store. True if the history is no longer of use: it leads to an earlier list.
    pub(super) fn on_list(&mut self, store: &mut Store, sub: &SubId, revision: i64) -> bool {
        if self.list.is_some() {
            return true;
        }
        self.list = Some(revision);
        if self.hold_until_ms.is_some() {
            store.expect_history(sub, self.from);
        }
        false
    }

    pub(super) fn due_ms(&self) -> Option<u64> {
        self.hold_until_ms
    }

    pub(super) fn on_tick(&mut self, store: &mut Store, sub: &SubId, now_ms: u64) {
        // A clock that was set back is no reason to wait longer.
        let waits = |until: u64| (1..=HOLD_MS).contains(&until.saturating_sub(now_ms));
        if self.hold_until_ms.take_if(|until| !waits(*until)).is_some() && self.list.is_some() {
            store.expect_nothing(sub);
        }
    }

    pub(super) fn take(&mut self, past: Vec<IngestedPast>, limits: HistoryLimits) {
        for past in past {
            let event = Event::of(past);
            self.bytes += event.bytes();
            self.events.push_back(event);
        }
        while (self.bytes > limits.bytes || self.events.len() > limits.len)
            && let Some(first) = self.events.front()
        {
            let oldest = first.revision;
            while let Some(event) = self.events.pop_front_if(|event| event.revision == oldest) {
                self.bytes -= event.bytes();
            }
            self.from = self.from.max(oldest + 1);
        }
    }

    /// All is there.
    pub(super) fn complete(self, store: &mut Store, sub: &SubId) {
        let Some(list) = self.list else { return };
        let past = fold(self.events.into(), |key| store.mod_revision(sub, key));
        store.backfill(sub, self.from, list, past);
    }
}

/// What readers would have been told. `listed` gives the revision of the value that a key was listed with.
fn fold(events: Vec<Event>, listed: impl Fn(&[u8]) -> Option<i64>) -> Vec<PastChange> {
    let last: BTreeMap<Bytes, usize> = events
        .iter()
        .enumerate()
        .map(|(index, event)| (event.key(), index))
        .collect();
    let mut now: BTreeMap<Bytes, PastBefore> = BTreeMap::new();
    let mut past = Vec::with_capacity(events.len());
    for (index, event) in events.into_iter().enumerate() {
        let key = event.key();
        let before = now.remove(&key).unwrap_or(event.before);
        let revision = event.revision;
        let after = match event.became {
            // Refused when it was listed: for want of room, which is another one now than it was then.
            Became::Put(_) if last.get(&key) == Some(&index) && listed(&key) != Some(revision) => before,
            Became::Put(entry) => {
                past.push(PastChange {
                    revision,
                    entry: entry.clone(),
                    deleted: false,
                    before,
                });
                PastBefore::Known(entry)
            }
            Became::Deleted(_) if before == PastBefore::Absent => before,
            Became::Deleted(_) => {
                past.push(PastChange {
                    revision,
                    entry: Encoded::new(&key, &[], Revisions::default(), 0),
                    deleted: true,
                    before,
                });
                PastBefore::Absent
            }
            Became::Kept(_) => before,
        };
        now.insert(key, after);
    }
    past
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"cilium/state/a";

    fn value(revision: i64) -> Encoded {
        let revisions = Revisions {
            create: 1,
            modified: revision,
            version: 2,
        };
        Encoded::new(KEY, b"v", revisions, 0)
    }

    fn event(revision: i64, became: Became, before: PastBefore) -> Event {
        Event {
            revision,
            became,
            before,
        }
    }

    fn key() -> Bytes {
        Bytes::from_static(KEY)
    }

    fn told(events: Vec<Event>, listed: Option<i64>) -> Vec<(i64, bool, PastBefore)> {
        fold(events, |_| listed)
            .into_iter()
            .map(|past| (past.revision, past.deleted, past.before))
            .collect()
    }

    #[test]
    fn a_refused_change_leaves_what_was_before_it() {
        let known = |revision| PastBefore::Known(value(revision));
        let events = vec![
            event(3, Became::Put(value(3)), known(2)),
            event(4, Became::Kept(key()), known(3)),
            // The source replaced the refused value, readers replace what they have.
            event(5, Became::Put(value(5)), PastBefore::Unknown),
            event(6, Became::Deleted(key()), known(5)),
            // Refused, and so gone without a trace.
            event(7, Became::Kept(key()), PastBefore::Absent),
            event(8, Became::Deleted(key()), PastBefore::Unknown),
        ];
        let want = vec![(3, false, known(2)), (5, false, known(3)), (6, true, known(5))];
        assert_eq!(told(events, None), want);
    }

    #[test]
    fn what_the_list_does_not_have_was_refused() {
        let events = || {
            vec![
                event(3, Became::Put(value(3)), PastBefore::Unknown),
                event(4, Became::Put(value(4)), PastBefore::Unknown),
            ]
        };
        assert_eq!(told(events(), Some(4)).len(), 2);
        assert_eq!(told(events(), Some(3)), [(3, false, PastBefore::Unknown)]);
    }

    #[test]
    fn the_oldest_makes_room_and_revisions_stay_whole() {
        let put = |revision| IngestedPast {
            revision,
            change: Ingested::Change(SourceChange::Shared(value(revision))),
            before: PastBefore::Unknown,
        };
        let limits = HistoryLimits {
            len: 3,
            ..HistoryLimits::default()
        };
        let mut gathering = Gathering::begin(1, 0);
        gathering.take(vec![put(2), put(2)], limits);
        assert_eq!((gathering.from, gathering.events.len()), (1, 2));
        gathering.take(vec![put(3), put(4)], limits);
        assert_eq!((gathering.from, gathering.events.len()), (3, 2));
        assert_eq!(
            gathering.bytes,
            gathering.events.iter().map(Event::bytes).sum::<usize>()
        );
    }
}
