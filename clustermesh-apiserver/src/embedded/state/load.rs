//! From what is on disk back to the state, and to what readers are to be shown. Pure.
//!
//! Invariant: what was written by [`State::apply`] comes back as the equal state; a log that no state writes is refused.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};

use super::{Lease, Place, Record, State, size};
use crate::store::SourceChange;

/// What a disk holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// Compacted revision; 0 = none.
    pub compacted: i64,
    /// Leases and their TTLs in seconds.
    pub leases: BTreeMap<i64, i64>,
    /// Changes, oldest first.
    pub log: Vec<(Place, Event)>,
}

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

impl State {
    /// The state that was stored.
    pub fn load(stored: Stored) -> Result<Loaded, InvalidLog> {
        let mut state = Self {
            revision: stored.compacted.max(1),
            compacted: stored.compacted,
            ..Self::default()
        };
        for (id, ttl) in stored.leases {
            let keys = BTreeSet::new();
            state.leases.insert(id, Lease { ttl, keys });
        }
        let mut log = stored.log.into_iter().peekable();
        while let Some((place, event)) = log.next_if(|(place, _)| place.0 <= stored.compacted) {
            state.replay(place, event)?;
        }
        let base = state.content.values().map(|record| put_change(&record.kv));
        let base = base.collect();
        let mut later = Vec::new();
        for (place, event) in log {
            later.push(state.replay(place, event)?);
        }
        for record in state.content.values() {
            if let Some(lease) = state.leases.get_mut(&record.kv.lease) {
                lease.keys.insert(record.kv.key.clone());
            }
        }
        Ok(Loaded { state, base, later })
    }

    fn replay(&mut self, place: Place, event: Event) -> Result<SourceChange, InvalidLog> {
        let invalid = InvalidLog { place };
        let kind = EventType::try_from(event.r#type).map_err(|_| invalid)?;
        let kv = event.kv.ok_or(invalid)?;
        let in_order = place.0 >= 1 && place.0 == kv.mod_revision;
        if kv.key.is_empty() || !in_order {
            return Err(invalid);
        }
        self.revision = self.revision.max(place.0);
        if let Some(old) = self.content.remove(&kv.key) {
            self.discard(place.0, old.place, size(&old.kv));
        }
        Ok(match kind {
            EventType::Put => {
                if kv.create_revision < 1 || kv.create_revision > place.0 || kv.version < 1 {
                    return Err(invalid);
                }
                let change = put_change(&kv);
                self.content.insert(kv.key.clone(), Record { kv, place });
                change
            }
            EventType::Delete => {
                self.discard(place.0, place, kv.key.len());
                SourceChange::Delete {
                    key: kv.key,
                    mod_revision: place.0,
                }
            }
        })
    }
}

fn put_change(kv: &KeyValue) -> SourceChange {
    SourceChange::Put {
        key: kv.key.clone(),
        value: kv.value.clone(),
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
    }
}
