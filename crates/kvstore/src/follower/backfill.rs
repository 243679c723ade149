//! Backfill: what happened before a list, so that who passes it on can lead readers on from before it.
//!
//! The watch that follows the list begins at an older revision than the list. What it says up to the list's revision is
//! history only: the content came with the list. What it says after that are changes, as always.
//!
//! History that lacks an event is worse than none: a reader that is led on by it is wrong for ever. So it counts only once it is
//! proven that nothing up to the list's revision is still to come. What proves it follows from what a server may say on a watch:
//! - an event after the list: a watch is in order;
//! - a message without events that names this watch, at the list's revision or later: etcd sends one only to watches that have
//!   seen everything, and so do we, at once when asked. (Asked for progress, etcd answers for all watches of the stream under no
//!   watch's name. Before 3.4.25 and 3.5.8 it did so also when some had not seen everything, etcd issue 15220: such an answer
//!   proves nothing here.)
//! - a message of fewer than [`BATCH_REVISIONS`] revisions whose header is at the list's revision or later. etcd lets a watch
//!   that is behind catch up in messages of up to so many revisions, each with the store's revision at that time in its header,
//!   and ends a message early only when there is nothing more up to that revision (`watchBatchMaxRevs` and `syncWatchers` in its
//!   mvcc package, 3.0 and later). Our own servers put the last event's revision there.
//!
//! An etcd has such a message to send if there is an event to be told. So the watch begins no later than at the newest listed
//! value, once the server turned out to be one that does not answer for a single watch.
//!
//! A watch that is to tell what happened from some revision on begins one revision earlier. etcd, up to 3.5 at least, lets a watch
//! begin at the compacted revision itself, though it has forgotten the deletions of that revision.

use isthmus_proto::mvccpb::{Event, event::EventType};

use super::{Before, Change, Effect, Follower, Header, History, Past};

/// etcd's most revisions in one message to a watch that catches up.
pub const BATCH_REVISIONS: usize = 1000;
/// How many revisions further back than asked for a watch may begin, for an event that is certain to come: etcd reads all of
/// them.
const FURTHER_MAX: i64 = 50_000;
/// How often a watch begins anew because history was compacted meanwhile.
const COMPACTIONS_MAX: u32 = 3;

/// Up to which revision a message proves that everything was delivered on its watch. `revision` is its header's, and the events
/// are in revision order or, if a server had to list meanwhile, all of the header's revision.
pub fn delivered_up_to(revision: i64, events: &[Event]) -> i64 {
    let mut revisions: Vec<i64> = events
        .iter()
        .filter_map(|event| event.kv.as_ref())
        .map(|kv| kv.mod_revision)
        .collect();
    let last = revisions.iter().max().copied().unwrap_or(0);
    revisions.sort_unstable();
    revisions.dedup();
    if revisions.len() < BATCH_REVISIONS {
        last.max(revision)
    } else {
        last
    }
}

/// History that is on its way.
#[derive(Clone, Debug)]
pub(super) struct Backfill {
    /// Revision of the list.
    upto: i64,
    /// Revision at which the watch begins. What it tells of that revision does not count.
    start: i64,
    /// Up to here everything was received.
    received: i64,
    /// Revision of the newest value that was listed; 0 = none was.
    newest: i64,
    /// Begun anew this often because of compaction,
    compactions: u32,
    /// and further back for an event that is certain to come.
    further: bool,
}

impl Backfill {
    /// Where a watch for what is not received yet begins.
    pub(super) fn watch_at(&self) -> i64 {
        self.received
    }

    fn restart(&mut self, start: i64) -> Effect {
        self.start = start;
        self.received = start;
        Effect::History(History::Begins { from: start + 1 })
    }
}

impl Follower {
    /// Whether history is on its way.
    pub fn awaits_history(&self) -> bool {
        self.backfill.is_some()
    }

    /// A list is at its end, at `list`.
    pub(super) fn begin_backfill(&mut self, list: Header) -> Option<Effect> {
        if self.feed.history <= 0 || list.revision <= 0 {
            return None;
        }
        let newest = self.known.values().map(|known| known.mod_revision).max();
        let start = list.revision.saturating_sub(self.feed.history).max(1);
        let backfill = self.backfill.insert(Backfill {
            upto: list.revision,
            start,
            received: start,
            newest: newest.unwrap_or(0),
            compactions: 0,
            further: false,
        });
        Some(backfill.restart(start))
    }

    pub(super) fn lose_backfill(&mut self) -> Option<Effect> {
        self.backfill.take().map(|_| Effect::History(History::Lost))
    }

    /// The watch for history ended. What it was for is asked for once more from where there is history, or not at all.
    pub(super) fn on_backfill_canceled(&mut self, compacted: i64) -> Vec<Effect> {
        let mut effects = Vec::new();
        match &mut self.backfill {
            Some(backfill)
                if (backfill.received + 1..backfill.upto).contains(&compacted)
                    && backfill.compactions < COMPACTIONS_MAX =>
            {
                backfill.compactions += 1;
                effects.push(backfill.restart(compacted));
            }
            _ => effects.extend(self.lose_backfill()),
        }
        effects.extend(self.resume());
        effects
    }

    /// The server does not answer for a single watch.
    pub(super) fn on_no_proof(&mut self) -> Vec<Effect> {
        let Some(backfill) = &mut self.backfill else {
            return Vec::new();
        };
        if backfill.newest >= backfill.received {
            return Vec::new();
        }
        let reachable = backfill.newest > 0 && backfill.start - backfill.newest <= FURTHER_MAX;
        let mut effects = vec![Effect::Unwatch];
        if reachable && backfill.compactions == 0 && !std::mem::replace(&mut backfill.further, true) {
            let start = backfill.start.min(backfill.newest);
            effects.push(backfill.restart(start));
        } else {
            effects.extend(self.lose_backfill());
        }
        effects.extend(self.resume());
        effects
    }

    /// Takes the history out of what the watch said. True if it was the last of it.
    pub(super) fn on_past(&mut self, revision: i64, events: &[Event], effects: &mut Vec<Effect>) -> bool {
        let Some(mut backfill) = self.backfill.take() else {
            return false;
        };
        let mut past = Vec::new();
        for event in events {
            let Some(kv) = &event.kv else { continue };
            let new = (backfill.received + 1..=backfill.upto).contains(&kv.mod_revision);
            if !new || !self.feed.contains(&kv.key) {
                continue;
            }
            past.push(self.past(event.r#type(), kv.clone(), event.prev_kv.clone()));
        }
        let last = past.iter().map(|past| past.change.mod_revision()).max();
        backfill.received = last.map_or(backfill.received, |last| backfill.received.max(last));
        if !past.is_empty() {
            effects.push(Effect::History(History::Events(past)));
        }
        let complete = delivered_up_to(revision, events) >= backfill.upto;
        if complete {
            effects.push(Effect::History(History::Complete));
        } else {
            self.backfill = Some(backfill);
        }
        complete
    }

    fn past(
        &self,
        kind: EventType,
        kv: isthmus_proto::mvccpb::KeyValue,
        prev_kv: Option<isthmus_proto::mvccpb::KeyValue>,
    ) -> Past {
        let put = kind == EventType::Put;
        let before = match prev_kv {
            Some(before) if before.value.len() <= self.feed.value_len_max => Before::Value {
                value: before.value,
                create_revision: before.create_revision,
                mod_revision: before.mod_revision,
                version: before.version,
            },
            None if put && kv.create_revision == kv.mod_revision => Before::Nothing,
            _ => Before::Unknown,
        };
        let change = if put {
            self.put(kv)
        } else {
            Change::Delete {
                key: kv.key,
                mod_revision: kv.mod_revision,
            }
        };
        Past { change, before }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_proto::mvccpb::KeyValue;
    use proptest::prelude::*;

    use super::*;

    fn event(mod_revision: i64) -> Event {
        Event {
            kv: Some(KeyValue {
                mod_revision,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_full_batch_proves_no_more_than_its_last_event() {
        let batch = |len: i64| (1..=len).map(event).collect::<Vec<_>>();
        assert_eq!(delivered_up_to(5000, &batch(999)), 5000);
        assert_eq!(delivered_up_to(5000, &batch(1000)), 1000);
        assert_eq!(delivered_up_to(5000, &[]), 5000);
        // A transaction of many keys is one revision.
        let txn: Vec<Event> = std::iter::repeat_n(7, 1200).map(event).collect();
        assert_eq!(delivered_up_to(5000, &txn), 5000);
        assert_eq!(delivered_up_to(3, &batch(4)), 4);
    }

    proptest! {
        /// As etcd catches a watch up: at most so many revisions a message, the store's revision in the header.
        #[test]
        fn what_is_proven_was_delivered(
            gaps in proptest::collection::vec(1i64..4, 0..2500),
            beyond in 0i64..3,
        ) {
            let mut revision = 0;
            let revisions: Vec<i64> = gaps.iter().map(|gap| { revision += gap; revision }).collect();
            let current = revision + beyond;
            let mut sent = 0;
            for batch in revisions.chunks(BATCH_REVISIONS) {
                let events: Vec<Event> = batch.iter().copied().map(event).collect();
                let proven = delivered_up_to(current, &events);
                sent += batch.len();
                let rest = &revisions[sent..];
                prop_assert!(rest.iter().all(|left| *left > proven), "{proven} is not delivered: {rest:?}");
                // And all is proven as soon as it can be told.
                prop_assert!(batch.len() == BATCH_REVISIONS || proven == current);
            }
        }
    }
}
