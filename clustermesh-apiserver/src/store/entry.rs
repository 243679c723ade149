//! A key's value, a changed key, and their bytes on the wire: written once, shared by everything that holds or sends them.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, key_len},
};

use super::{Encoded, Revisions, SubId};

/// Field of `events` in `WatchResponse`.
const EVENTS_FIELD: u32 = 11;
/// A key's present value. There may be a million of them.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) merged_create: i64,
    pub(super) merged_modified: i64,
    encoded: Encoded,
}

impl Entry {
    /// Shares the bytes of `encoded`.
    pub(super) fn new(encoded: Encoded, merged_create: i64, merged_modified: i64) -> Self {
        Self {
            merged_create,
            merged_modified,
            encoded,
        }
    }

    pub(super) fn key(&self) -> &[u8] {
        self.encoded.key()
    }

    /// Bytes that it keeps.
    pub(super) fn encoded_len(&self) -> usize {
        self.encoded.bytes().len()
    }

    pub(super) fn value(&self) -> &[u8] {
        self.encoded.value()
    }

    /// Whether it is the same value at the same revision.
    pub(super) fn holds(&self, encoded: &Encoded) -> bool {
        self.encoded == *encoded
    }

    /// Revisions in the source's history.
    pub(super) fn revisions(&self) -> Revisions {
        self.encoded.revisions()
    }

    /// 0 = none.
    pub(super) fn lease(&self) -> i64 {
        self.encoded.lease()
    }

    /// The key, sharing the entry's bytes.
    pub(super) fn shared_key(&self) -> Bytes {
        self.encoded.shared_key()
    }

    /// The message, in the source's revisions or the merged view's.
    pub(super) fn key_value(&self, merged: bool) -> KeyValue {
        let own = self.encoded.key_value();
        if !merged {
            return own;
        }
        KeyValue {
            create_revision: self.merged_create,
            mod_revision: self.merged_modified,
            ..own
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

/// What a key held before a change.
#[derive(Clone, Debug)]
pub(super) enum Prior {
    /// Nothing.
    Absent,
    /// This.
    Known(Arc<Entry>),
    /// It is not known; an entry of the same key, of which nothing else counts.
    Unknown(Arc<Entry>),
}

impl Prior {
    /// The entry, if it is known and there was one.
    pub(super) fn known(&self) -> Option<&Arc<Entry>> {
        match self {
            Self::Known(entry) => Some(entry),
            Self::Absent | Self::Unknown(_) => None,
        }
    }
}

impl From<Option<Arc<Entry>>> for Prior {
    fn from(before: Option<Arc<Entry>>) -> Self {
        before.map_or(Self::Absent, Self::Known)
    }
}

/// A changed key in a history.
#[derive(Debug)]
pub(super) struct Recorded {
    pub(super) after: Option<Arc<Entry>>,
    pub(super) before: Prior,
    /// The event of a DELETE; that of a PUT is its entry's.
    deletion: Bytes,
    /// Its event in the merged view's revisions; made when it is first asked for.
    merged_encoded: OnceLock<Bytes>,
}

impl Recorded {
    pub(super) fn key(&self) -> &[u8] {
        match (&self.after, &self.before) {
            (Some(entry), _) | (None, Prior::Known(entry) | Prior::Unknown(entry)) => entry.key(),
            (None, Prior::Absent) => &[],
        }
    }

    /// The event in the source's revisions.
    fn encoded(&self) -> &Bytes {
        self.after
            .as_ref()
            .map_or(&self.deletion, |entry| entry.encoded.bytes())
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
                .known()
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
        let changed = changed.into_iter().map(|(after, before)| (after, before.into()));
        Self::of(sub, revision, merged_revision, changed)
    }

    /// The same of what is known only in part.
    pub(super) fn of(
        sub: Option<SubId>,
        revision: i64,
        merged_revision: i64,
        changed: impl IntoIterator<Item = (Option<Arc<Entry>>, Prior)>,
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
            let before = event.before.known().map_or(0, |entry| entry.encoded_len());
            event.encoded().len() + before + size_of::<Recorded>()
        };
        self.events.iter().map(event).sum()
    }

    /// The event's bytes as a field of `WatchResponse`.
    pub(super) fn encoded(&self, event: &Recorded, merged: bool, prev_kv: bool) -> Bytes {
        if prev_kv && event.before.known().is_some() {
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
