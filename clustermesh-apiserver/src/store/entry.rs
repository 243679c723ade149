//! A key's value, a changed key, and their bytes on the wire: written once, shared by everything that holds or sends them.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};
use prost::{
    Message,
    encoding::{WireType, decode_varint, encode_key, encode_varint, key_len},
};

use super::SubId;

/// Field of `events` in `WatchResponse`.
const EVENTS_FIELD: u32 = 11;
/// Fields of `KeyValue`.
const CREATE_REVISION_FIELD: u8 = 2;
const MOD_REVISION_FIELD: u8 = 3;
const VERSION_FIELD: u8 = 4;

/// Revisions of a value in its source's history.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Revisions {
    pub(super) create: i64,
    pub(super) modified: i64,
    pub(super) version: i64,
}

/// A key's present value. There may be a million of them: key, revisions and value are read from the event's bytes.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) merged_create: i64,
    pub(super) merged_modified: i64,
    /// The PUT event as a field of `WatchResponse`: tag, length, message.
    encoded: Bytes,
    /// Where in it the key begins and ends, and the value begins, which ends the message. (A message has less than 4 GiB.)
    key_at: u32,
    key_end: u32,
    value_at: u32,
}

impl Entry {
    /// Copies key and value into one buffer that is also their event.
    pub(super) fn new(
        key: &[u8],
        value: &[u8],
        revisions: Revisions,
        merged_create: i64,
        merged_modified: i64,
    ) -> Self {
        let event = Event {
            r#type: EventType::Put as i32,
            kv: Some(KeyValue {
                key: Bytes::copy_from_slice(key),
                create_revision: revisions.create,
                mod_revision: revisions.modified,
                version: revisions.version,
                // Last, so that it can be found from the end. (Lease 0 is not written.)
                value: Bytes::copy_from_slice(value),
                lease: 0,
            }),
            prev_kv: None,
        };
        let encoded = encode_event(&event);
        // The key begins right after the tag and length that precede it.
        let key_at = find_key(&encoded, key);
        Self {
            key_at: key_at as u32,
            key_end: (key_at + key.len()) as u32,
            value_at: (encoded.len() - value.len()) as u32,
            merged_create,
            merged_modified,
            encoded,
        }
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.encoded[self.key_at as usize..self.key_end as usize]
    }

    /// Bytes that it keeps.
    pub(super) fn encoded_len(&self) -> usize {
        self.encoded.len()
    }

    pub(super) fn value(&self) -> &[u8] {
        &self.encoded[self.value_at as usize..]
    }

    /// Revisions in the source's history.
    pub(super) fn revisions(&self) -> Revisions {
        let mut revisions = Revisions {
            create: 0,
            modified: 0,
            version: 0,
        };
        // They stand between key and value. Each is a tag of one byte and a varint; 0 is not written.
        let mut rest = &self.encoded[self.key_end as usize..self.value_at as usize];
        while let Some((tag, after)) = rest.split_first() {
            let field = match tag >> 3 {
                CREATE_REVISION_FIELD => &mut revisions.create,
                MOD_REVISION_FIELD => &mut revisions.modified,
                VERSION_FIELD => &mut revisions.version,
                _ => break,
            };
            rest = after;
            // This message was encoded here.
            *field = decode_varint(&mut rest).unwrap_or_default() as i64;
        }
        revisions
    }

    /// The key, sharing the entry's bytes.
    pub(super) fn shared_key(&self) -> Bytes {
        self.encoded.slice(self.key_at as usize..self.key_end as usize)
    }

    /// The message, in the source's revisions or the merged view's.
    pub(super) fn key_value(&self, merged: bool) -> KeyValue {
        let own = self.revisions();
        KeyValue {
            key: self.shared_key(),
            create_revision: if merged { self.merged_create } else { own.create },
            mod_revision: if merged {
                self.merged_modified
            } else {
                own.modified
            },
            version: own.version,
            value: self.encoded.slice(self.value_at as usize..),
            lease: 0,
        }
    }

    pub(super) fn create(&self, merged: bool) -> i64 {
        if merged {
            self.merged_create
        } else {
            self.revisions().create
        }
    }

    pub(super) fn modified(&self, merged: bool) -> i64 {
        if merged {
            self.merged_modified
        } else {
            self.revisions().modified
        }
    }
}

/// Where the key's bytes begin: after event tag and length, `kv` tag and length, `key` tag and length. An empty key has none
/// of its own.
fn find_key(encoded: &[u8], key: &[u8]) -> usize {
    let mut rest = encoded;
    for _ in 0..if key.is_empty() { 2 } else { 3 } {
        // Tags of fields below 16 are one byte; lengths are varints.
        rest = rest.get(1..).unwrap_or_default();
        while rest.first().is_some_and(|byte| byte & 0x80 != 0) {
            rest = &rest[1..];
        }
        rest = rest.get(1..).unwrap_or_default();
    }
    encoded.len() - rest.len()
}

fn encode_event(event: &Event) -> Bytes {
    let len = event.encoded_len();
    let mut buffer = BytesMut::with_capacity(key_len(EVENTS_FIELD) + prost::length_delimiter_len(len) + len);
    encode_key(EVENTS_FIELD, WireType::LengthDelimited, &mut buffer);
    encode_varint(len as u64, &mut buffer);
    buffer.put(event.encode_to_vec().as_slice());
    buffer.freeze()
}

/// A key's entry after a change (`None` = deleted) and before it. One of them there is.
pub(super) type Changed = (Option<Arc<Entry>>, Option<Arc<Entry>>);

/// A changed key in a history.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) after: Option<Arc<Entry>>,
    pub(super) before: Option<Arc<Entry>>,
    /// The event of a DELETE; that of a PUT is its entry's.
    deletion: Bytes,
    /// Its event in the merged view's revisions; made when it is first asked for.
    merged_encoded: OnceLock<Bytes>,
}

impl Recorded {
    pub(super) fn key(&self) -> &[u8] {
        let entry = self.after.as_ref().or(self.before.as_ref());
        entry.map_or(&[], |entry| entry.key())
    }

    /// The event in the source's revisions.
    fn encoded(&self) -> &Bytes {
        self.after.as_ref().map_or(&self.deletion, |entry| &entry.encoded)
    }

    /// Whether it is a PUT.
    pub(super) fn is_put(&self) -> bool {
        self.after.is_some()
    }

    fn message(&self, merged: bool, revision: i64, prev_kv: bool) -> Event {
        let kv = match &self.after {
            Some(entry) => entry.key_value(merged),
            None => KeyValue {
                key: Bytes::copy_from_slice(self.key()),
                mod_revision: revision,
                ..Default::default()
            },
        };
        let kind = if self.is_put() {
            EventType::Put
        } else {
            EventType::Delete
        };
        Event {
            r#type: kind as i32,
            kv: Some(kv),
            prev_kv: self
                .before
                .as_ref()
                .filter(|_| prev_kv)
                .map(|entry| entry.key_value(merged)),
        }
    }
}

/// What changed at one revision.
#[derive(Debug)]
pub(super) struct Batch {
    /// Where; `None` = this server's own keys.
    pub(super) sub: Option<SubId>,
    /// In the source's history.
    pub(super) revision: i64,
    pub(super) merged_revision: i64,
    pub(super) events: Vec<Recorded>,
}

impl Batch {
    pub(super) fn new(
        sub: Option<SubId>,
        revision: i64,
        merged_revision: i64,
        changed: Vec<Changed>,
    ) -> Self {
        let events = changed.into_iter().map(|(after, before)| {
            let mut recorded = Recorded {
                after,
                before,
                deletion: Bytes::new(),
                merged_encoded: OnceLock::new(),
            };
            if !recorded.is_put() {
                recorded.deletion = encode_event(&recorded.message(false, revision, false));
            }
            recorded
        });
        Self {
            sub,
            revision,
            merged_revision,
            events: events.collect(),
        }
    }

    /// Bytes that it keeps alive beside the present content: about what trimming it gives back.
    pub(super) fn bytes(&self) -> usize {
        let event = |event: &Recorded| {
            let before = event.before.as_ref().map_or(0, |entry| entry.encoded.len());
            event.encoded().len() + before + size_of::<Recorded>()
        };
        self.events.iter().map(event).sum()
    }

    /// The event's bytes as a field of `WatchResponse`.
    pub(super) fn encoded(&self, event: &Recorded, merged: bool, prev_kv: bool) -> Bytes {
        if prev_kv && event.before.is_some() {
            let revision = if merged {
                self.merged_revision
            } else {
                self.revision
            };
            return encode_event(&event.message(merged, revision, true));
        }
        if merged {
            let encode = || encode_event(&event.message(true, self.merged_revision, false));
            return event.merged_encoded.get_or_init(encode).clone();
        }
        event.encoded().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_proto::etcdserverpb::WatchResponse;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_entry_is_its_own_event(key in proptest::collection::vec(any::<u8>(), 0..300), value in proptest::collection::vec(any::<u8>(), 0..20_000), create in 1i64.., modified in 1i64..) {
            let revisions = Revisions { create, modified, version: 3 };
            let entry = Entry::new(&key, &value, revisions, 5, 6);
            prop_assert_eq!(entry.key(), &key[..]);
            prop_assert_eq!(entry.revisions(), revisions);
            prop_assert_eq!(entry.value(), &value[..]);
            let response = WatchResponse::decode(entry.encoded.clone()).unwrap();
            prop_assert_eq!(response.events[0].kv.clone().unwrap(), entry.key_value(false));
            prop_assert_eq!(entry.key_value(true).mod_revision, 6);
        }
    }
}
