//! What a source did before it was listed here, for readers that go on from before the list: a server that begins anew shows the
//! history that the one before it had.
//!
//! Invariants: history counts only as a whole, up to the list's revision; until it is there, or known not to come, who would
//! have to be told of it waits. It changes no content.

use std::sync::Arc;

use super::{Batch, Encoded, Entry, Route, Store, SubId, entry::Prior};

/// What a key held before a past change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PastBefore {
    /// Nothing.
    Absent,
    /// This.
    Known(Encoded),
    /// It is not known.
    Unknown,
}

/// A past change of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PastChange {
    /// Its revision.
    pub revision: i64,
    /// The key and what it held from then on; for a deletion only the key counts.
    pub entry: Encoded,
    /// It is a deletion.
    pub deleted: bool,
    /// What it replaced.
    pub before: PastBefore,
}

impl Store {
    /// Says that a source's history from revision `from` up to its list is on its way. Watches and reads that need it wait for
    /// [`backfill`](Self::backfill) or [`expect_nothing`](Self::expect_nothing), for which the caller has to care in time.
    pub fn expect_history(&mut self, id: &SubId, from: i64) {
        if let Some(sub) = self.subs.get_mut(id) {
            sub.history.set_expected(Some(from));
        }
        self.wake(id);
    }

    /// Whether a read of `route` at `revision` should wait: what it needs is on its way.
    pub fn is_arriving(&self, route: &Route, revision: i64) -> bool {
        match route {
            // The content then is what is left when every later change is undone.
            Route::Sub(id) if revision > 0 => self
                .subs
                .get(id)
                .is_some_and(|sub| sub.history.is_expected(revision + 1)),
            _ => false,
        }
    }

    /// Revision of a key's present value.
    pub fn mod_revision(&self, id: &SubId, key: &[u8]) -> Option<i64> {
        let entry = self.subs.get(id)?.content.get(key)?;
        Some(entry.revisions().modified)
    }

    /// Nobody waits for history any longer. Those who did are told that it is compacted.
    pub fn expect_nothing(&mut self, id: &SubId) {
        if let Some(sub) = self.subs.get_mut(id) {
            sub.history.set_expected(None);
        }
        self.wake(id);
    }

    /// Takes in all that happened from revision `from` up to the list of the source at revision `list`, in revision order.
    /// Nothing if the history has begun anew, or has been shortened, since then.
    pub fn backfill(&mut self, id: &SubId, from: i64, list: i64, past: Vec<PastChange>) {
        let limits = self.limits_of(id);
        let Some(sub) = self.subs.get_mut(id) else { return };
        sub.history.set_expected(None);
        if sub.history.floor() == list {
            let mut content_floor = from - 1;
            let mut batches: Vec<(i64, Vec<_>)> = Vec::new();
            for change in past {
                let PastChange {
                    revision,
                    entry,
                    deleted,
                    before,
                } = change;
                // What is still so is kept once.
                let present = sub
                    .content
                    .get(entry.key())
                    .filter(|present| present.holds(&entry));
                let entry = present
                    .cloned()
                    .unwrap_or_else(|| Arc::new(Entry::new(entry, 0, 0)));
                let before = match before {
                    PastBefore::Absent => Prior::Absent,
                    PastBefore::Known(before) => Prior::Known(Arc::new(Entry::new(before, 0, 0))),
                    PastBefore::Unknown => {
                        content_floor = revision;
                        Prior::Unknown(entry.clone())
                    }
                };
                let event = ((!deleted).then_some(entry), before);
                match batches.last_mut() {
                    Some((at, events)) if *at == revision => events.push(event),
                    _ => batches.push((revision, vec![event])),
                }
            }
            let batches = batches.into_iter().map(|(revision, events)| {
                let batch = Batch::of(Some(id.clone()), revision, 0, events);
                (revision, Arc::new(batch))
            });
            sub.history.prepend(batches, from - 1, content_floor, limits);
        }
        self.wake(id);
    }

    /// Lets the readers of a sub-store look again, though nothing changed.
    fn wake(&mut self, id: &SubId) {
        let Some(sub) = self.subs.get(id) else { return };
        self.record(id.clone(), sub.revision, Vec::new(), None);
    }
}
