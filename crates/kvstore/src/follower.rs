//! Follows one range of keys of an etcd: list, watch, resume, list again. A pure state machine; [`crate::follow()`] drives it.
//!
//! In: what the connection, the list pages and the watch said. Out: what to ask next, and changes for the consumer.
//!
//! Invariants:
//! - Whatever happened, once listed or resumed the consumer's view equals the store at the revision that is reported.
//! - A key that was and is in the store is never deleted on the way: a list is compared, and only what it lacks is deleted,
//!   at its end.
//! - All pages of a list are read at the first page's revision, and the watch begins right after it. (etcd answers a
//!   historical read with its current revision in the header, so later headers say nothing.)
//! - A watch is resumed only after the store has shown that it still has the history that is known: an etcd that lost its
//!   data and started again keeps its cluster ID, and would accept a start in the future and stay silent. So before a watch
//!   is resumed, one key and the number of keys are read at the last known revision and compared.

mod backfill;
mod messages;

use std::collections::BTreeMap;

use bytes::Bytes;
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};

use backfill::Backfill;
pub use backfill::{BATCH_REVISIONS, delivered_up_to};
pub use messages::{Before, Change, Effect, Feed, Header, History, Input, Past};

#[derive(Clone, Copy, Debug)]
struct Known {
    mod_revision: i64,
    /// Number of the list in which it was last seen.
    list: u32,
}

/// A page of a list.
struct Page {
    kvs: Vec<KeyValue>,
    more: bool,
    unreadable: bool,
}

#[derive(Clone, Debug)]
enum State {
    Idle,
    Checking {
        mod_revision: Option<i64>,
    },
    Listing {
        /// Of the first page; `None` until it came.
        first: Option<Header>,
        start: Bytes,
    },
    Creating,
    Live,
}

/// Follows one feed.
#[derive(Debug)]
pub struct Follower {
    feed: Feed,
    state: State,
    /// Every key that the consumer was told about and that was not deleted since. Keys are copies: a slice of a message would
    /// keep the whole message.
    known: BTreeMap<Box<[u8]>, Known>,
    /// What the consumer's view equals; `None` before the first list and during each.
    position: Option<Header>,
    /// The last position, also during a list.
    last: Option<Header>,
    /// Equal revisions mean equal values: the history is certainly the one that `known` is from.
    trusted: bool,
    list: u32,
    /// Listed keys that are older than the last position and are known with the same revision, which speaks for the history
    /// being the same,
    matches: usize,
    /// and whether one was not, which rules it out. Kept until a list has come to its end.
    mismatch: bool,
    /// Keys of this list were refused because there was no room.
    surplus: bool,
    /// What happened before a list, while it is on its way.
    backfill: Option<Backfill>,
}

impl Follower {
    /// Starts idle.
    pub fn new(feed: Feed) -> Self {
        Self {
            feed,
            state: State::Idle,
            known: BTreeMap::new(),
            position: None,
            last: None,
            trusted: false,
            list: 0,
            matches: 0,
            mismatch: false,
            surplus: false,
            backfill: None,
        }
    }

    /// What it follows.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// The consumer's view equals the store, and changes arrive.
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Live)
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether no key is known.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Takes in what happened. An input that the present state does not expect is late and changes nothing.
    pub fn on(&mut self, input: Input) -> Vec<Effect> {
        match (self.state.clone(), input) {
            (_, Input::Disconnected) => {
                self.state = State::Idle;
                self.trusted = false;
                Vec::new()
            }
            (_, Input::Connected) => self.on_connected(),
            (
                State::Checking { mod_revision },
                Input::Checked {
                    header,
                    mod_revision: found,
                    count,
                },
            ) => {
                let same = self
                    .position
                    .is_some_and(|position| position.cluster_id == header.cluster_id)
                    && found == mod_revision
                    && usize::try_from(count) == Ok(self.known.len());
                if same {
                    self.resume()
                } else {
                    self.start_list(false)
                }
            }
            (State::Checking { .. }, Input::CheckFailed) => self.start_list(false),
            (
                State::Listing { first, start },
                Input::Page {
                    header,
                    kvs,
                    more,
                    unreadable,
                },
            ) => {
                let page = Page {
                    kvs,
                    more,
                    unreadable,
                };
                self.on_page(first, start, header, page)
            }
            (State::Listing { .. }, Input::PageCompacted) => self.start_list(self.trusted),
            (State::Creating, Input::Created { header }) => self.on_created(header),
            (State::Creating | State::Live, Input::Events { header, events }) => {
                self.on_events(header, events)
            }
            (State::Creating | State::Live, Input::Canceled { compacted }) => {
                if self.backfill.is_some() {
                    self.on_backfill_canceled(compacted)
                } else {
                    self.start_list(true)
                }
            }
            (State::Live, Input::NoProof) => self.on_no_proof(),
            _ => Vec::new(),
        }
    }

    fn on_connected(&mut self) -> Vec<Effect> {
        let Some(position) = self.position else {
            return self.start_list(false);
        };
        // The newest key is the one that another history most likely does not have. Of an empty view it is enough to know
        // that the range was empty at that revision: what came after it will be told.
        let newest = self.known.iter().max_by_key(|(_, known)| known.mod_revision);
        let key = newest.map_or(self.feed.key.clone(), |(key, _)| Bytes::copy_from_slice(key));
        self.state = State::Checking {
            mod_revision: newest.map(|(_, known)| known.mod_revision),
        };
        vec![Effect::Check {
            key,
            revision: position.revision,
        }]
    }

    fn resume(&mut self) -> Vec<Effect> {
        self.trusted = true;
        self.state = State::Creating;
        let after = self.position.map_or(0, |position| position.revision) + 1;
        vec![Effect::Watch {
            start_revision: self.backfill.as_ref().map_or(after, Backfill::watch_at),
            prev_kv: self.backfill.is_some(),
        }]
    }

    fn start_list(&mut self, trusted: bool) -> Vec<Effect> {
        self.trusted = trusted;
        self.position = None;
        self.list = self.list.wrapping_add(1);
        self.matches = 0;
        self.surplus = false;
        self.state = State::Listing {
            first: None,
            start: self.feed.key.clone(),
        };
        let mut effects: Vec<Effect> = self.lose_backfill().into_iter().collect();
        effects.push(Effect::List {
            start: self.feed.key.clone(),
            revision: 0,
        });
        effects
    }

    fn on_page(&mut self, first: Option<Header>, start: Bytes, header: Header, page: Page) -> Vec<Effect> {
        let mut effects = Vec::new();
        let first = match first {
            Some(first) if first.cluster_id != header.cluster_id => return self.start_list(false),
            Some(first) => first,
            None => {
                let same =
                    |last: Header| last.cluster_id == header.cluster_id && last.revision <= header.revision;
                if !self.last.is_some_and(same) {
                    self.trusted = false;
                    self.mismatch = true;
                }
                effects.push(Effect::Listing {
                    header,
                    trusted: self.trusted,
                });
                header
            }
        };
        let Page {
            kvs,
            more,
            unreadable,
        } = page;
        let last_key = kvs.last().map(|kv| kv.key.clone());
        let mut changes = Vec::new();
        for kv in kvs {
            // Keys that were not asked for would never be deleted again.
            if self.feed.contains(&kv.key) && kv.mod_revision <= first.revision {
                changes.extend(self.on_listed(kv, unreadable));
            }
        }
        effects.push(Effect::Changes {
            revision: first.revision,
            changes,
        });
        match last_key {
            // A server that does not get on would keep us here for ever.
            Some(key) if more && key >= start => {
                let mut next = key.to_vec();
                next.push(0);
                let next = Bytes::from(next);
                self.state = State::Listing {
                    first: Some(first),
                    start: next.clone(),
                };
                effects.push(Effect::List {
                    start: next,
                    revision: first.revision,
                });
            }
            _ => self.on_list_end(first, &mut effects),
        }
        effects
    }

    /// Notes a listed key; `None` if the consumer has it already.
    fn on_listed(&mut self, kv: KeyValue, unreadable: bool) -> Option<Change> {
        let seen = Known {
            mod_revision: kv.mod_revision,
            list: self.list,
        };
        let full = self.known.len() >= self.feed.keys_max;
        let before = match self.known.get_mut(&kv.key[..]) {
            // No room would help it.
            _ if kv.key.len() > self.feed.key_len_max => return Some(surplus(kv)),
            Some(known) => Some(std::mem::replace(known, seen)),
            None if full => {
                self.surplus = true;
                return Some(surplus(kv));
            }
            None => self.known.insert(Box::from(&kv.key[..]), seen),
        };
        if self.last.is_some_and(|last| kv.mod_revision <= last.revision) {
            // In the same history each key that old is known already.
            match before {
                Some(known) if known.mod_revision == kv.mod_revision => self.matches += 1,
                _ => self.mismatch = true,
            }
        }
        let unchanged = self.trusted && before.is_some_and(|known| known.mod_revision == kv.mod_revision);
        (!unchanged).then(|| if unreadable { refused(kv, 0) } else { self.put(kv) })
    }

    fn on_list_end(&mut self, first: Header, effects: &mut Vec<Effect>) {
        let list = self.list;
        let mut changes = Vec::new();
        self.known.retain(|key, known| {
            let seen = known.list == list;
            if !seen {
                changes.push(Change::Delete {
                    key: Bytes::copy_from_slice(key),
                    mod_revision: first.revision,
                });
            }
            seen
        });
        if !changes.is_empty() {
            effects.push(Effect::Changes {
                revision: first.revision,
                changes,
            });
            if self.surplus {
                // Keys that are gone stood in the way of others. Nothing is deleted at the end of the next list.
                effects.extend(self.start_list(self.trusted));
                return;
            }
        }
        effects.extend(self.begin_backfill(first));
        effects.push(Effect::Listed {
            header: first,
            new_history: !self.trusted && (self.mismatch || self.matches == 0),
        });
        self.position = Some(first);
        self.last = Some(first);
        self.mismatch = false;
        effects.push(Effect::Synced { header: first });
        effects.extend(self.resume());
    }

    fn on_created(&mut self, header: Header) -> Vec<Effect> {
        let Some(position) = self.position else {
            return Vec::new();
        };
        if header.cluster_id != position.cluster_id || header.revision < position.revision {
            return self.rewatch();
        }
        self.state = State::Live;
        let mut effects = vec![Effect::Synced { header: position }];
        if self.backfill.is_some() {
            effects.push(Effect::AskProgress);
        }
        effects
    }

    /// The history is another one: drop the watch and list.
    fn rewatch(&mut self) -> Vec<Effect> {
        let mut effects = vec![Effect::Unwatch];
        effects.extend(self.start_list(false));
        effects
    }

    fn on_events(&mut self, header: Header, events: Vec<Event>) -> Vec<Effect> {
        let Some(position) = self.position else {
            return Vec::new();
        };
        if header.cluster_id != position.cluster_id {
            return self.rewatch();
        }
        let mut effects = Vec::new();
        let backfilled = self.on_past(header.revision, &events, &mut effects);
        let mut revision = position.revision;
        if events.is_empty() {
            revision = revision.max(header.revision);
        }
        let mut changes = Vec::with_capacity(events.len());
        for event in events {
            let kind = event.r#type();
            let Some(kv) = event.kv else { continue };
            // Older ones were seen; foreign ones nobody asked for.
            if kv.mod_revision <= position.revision || !self.feed.contains(&kv.key) {
                continue;
            }
            revision = revision.max(kv.mod_revision);
            match kind {
                EventType::Put => {
                    let known = Known {
                        mod_revision: kv.mod_revision,
                        list: self.list,
                    };
                    let full = self.known.len() >= self.feed.keys_max || kv.key.len() > self.feed.key_len_max;
                    match self.known.get_mut(&kv.key[..]) {
                        Some(entry) => *entry = known,
                        None if full => {
                            changes.push(surplus(kv));
                            continue;
                        }
                        None => {
                            self.known.insert(Box::from(&kv.key[..]), known);
                        }
                    }
                    changes.push(self.put(kv));
                }
                EventType::Delete => {
                    if self.known.remove(&kv.key[..]).is_some() {
                        changes.push(Change::Delete {
                            key: kv.key,
                            mod_revision: kv.mod_revision,
                        });
                    }
                }
            }
        }
        let moved = revision > position.revision;
        self.position = Some(Header { revision, ..position });
        self.last = self.position;
        if moved {
            effects.push(Effect::Changes { revision, changes });
        }
        if backfilled {
            // From here on nobody needs what is replaced.
            effects.push(Effect::Unwatch);
            effects.extend(self.resume());
        }
        effects
    }

    fn put(&self, kv: KeyValue) -> Change {
        if kv.value.len() > self.feed.value_len_max {
            let len = kv.value.len();
            return refused(kv, len);
        }
        Change::Put {
            key: kv.key,
            value: kv.value,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
        }
    }
}

fn refused(kv: KeyValue, len: usize) -> Change {
    Change::Refused {
        key: kv.key,
        mod_revision: kv.mod_revision,
        len,
        surplus: false,
    }
}

fn surplus(kv: KeyValue) -> Change {
    Change::Refused {
        key: kv.key,
        mod_revision: kv.mod_revision,
        len: kv.value.len(),
        surplus: true,
    }
}
