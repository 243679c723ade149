//! From what is on disk back to the state, and to what readers are to be shown. Pure.
//!
//! Invariant: what was written by [`State::apply`] comes back as the equal state; a log that no state writes is refused.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_proto::mvccpb::{Event, event::EventType};

use super::{Lease, Place, Record, State, deletion_len};
use crate::store::{Encoded, Revisions, SourceChange};

/// A state as it was stored, and how readers get there.
#[derive(Debug)]
pub struct Loaded {
    /// The state.
    pub state: State,
    /// Content at the compacted revision.
    pub base: Vec<SourceChange>,
    /// Changes after it, in order.
    pub later: Vec<SourceChange>,
}

/// A log that no store wrote.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the change {place:?} in its log is not valid")]
pub struct InvalidLog {
    /// The change.
    pub place: Place,
}

/// A state that is being read from a disk: a change at a time, oldest first.
#[derive(Debug)]
pub struct Loading {
    state: State,
    /// Once the log has passed the compacted revision.
    base: Option<Vec<SourceChange>>,
    later: Vec<SourceChange>,
}

impl Loading {
    /// Begins with the compacted revision, and leases with their TTLs in seconds.
    pub fn new(compacted: i64, leases: BTreeMap<i64, i64>) -> Self {
        let mut state = State {
            revision: compacted.max(1),
            compacted,
            ..State::default()
        };
        for (id, ttl) in leases {
            let keys = BTreeSet::new();
            state.leases.insert(id, Lease { ttl, keys });
        }
        Self {
            state,
            base: None,
            later: Vec::new(),
        }
    }

    /// The next change.
    pub fn push(&mut self, place: Place, event: Event) -> Result<(), InvalidLog> {
        if place.0 > self.state.compacted && self.base.is_none() {
            self.base = Some(self.content());
        }
        let change = self.replay(place, event)?;
        if self.base.is_some() {
            self.later.push(change);
        }
        Ok(())
    }

    /// There are no more.
    pub fn end(mut self) -> Loaded {
        let base = self.base.take().unwrap_or_else(|| self.content());
        let Self { mut state, later, .. } = self;
        let State { content, leases, .. } = &mut state;
        for record in content.iter() {
            if let Some(lease) = leases.get_mut(&record.encoded.lease()) {
                lease.keys.insert(record.encoded.shared_key());
            }
        }
        Loaded { state, base, later }
    }

    fn content(&self) -> Vec<SourceChange> {
        let records = self.state.content.iter();
        records
            .map(|record| SourceChange::Shared(record.encoded.clone()))
            .collect()
    }

    fn replay(&mut self, place: Place, event: Event) -> Result<SourceChange, InvalidLog> {
        let invalid = InvalidLog { place };
        let kind = EventType::try_from(event.r#type).map_err(|_| invalid)?;
        let kv = event.kv.ok_or(invalid)?;
        let in_order = place.0 >= 1 && place.0 == kv.mod_revision;
        if kv.key.is_empty() || !in_order {
            return Err(invalid);
        }
        let state = &mut self.state;
        state.revision = state.revision.max(place.0);
        if let Some(old) = state.content.take(&kv.key) {
            state.discard(place.0, old.place(), old.len());
        }
        Ok(match kind {
            EventType::Put => {
                if kv.create_revision < 1 || kv.create_revision > place.0 || kv.version < 1 {
                    return Err(invalid);
                }
                let revisions = Revisions {
                    create: kv.create_revision,
                    modified: kv.mod_revision,
                    version: kv.version,
                };
                let encoded = Encoded::new(&kv.key, &kv.value, revisions, kv.lease);
                state.content.insert(Record {
                    encoded: encoded.clone(),
                    index: place.1,
                });
                SourceChange::Shared(encoded)
            }
            EventType::Delete => {
                state.discard(place.0, place, deletion_len(&kv.key));
                SourceChange::Delete {
                    key: kv.key,
                    mod_revision: place.0,
                }
            }
        })
    }
}
