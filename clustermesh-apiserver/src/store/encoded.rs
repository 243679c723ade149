//! A key's value as what it is sent as: its PUT event, encoded once. Key, value and revisions are read from these bytes, which
//! everything that holds or sends them shares: readers' histories, and the embedded store.

use bytes::{BufMut, Bytes};
use isthmus_proto::mvccpb::KeyValue;
use prost::encoding::{decode_varint, encode_varint, encoded_len_varint};

/// Tags, each of one byte: number and kind of a field.
const EVENTS: u8 = 11 << 3 | 2;
const EVENT_KV: u8 = 2 << 3 | 2;
const KEY: u8 = 1 << 3 | 2;
const CREATE_REVISION: u8 = 2 << 3;
const MOD_REVISION: u8 = 3 << 3;
const VERSION: u8 = 4 << 3;
const VALUE: u8 = 5 << 3 | 2;
const LEASE: u8 = 6 << 3;

/// Revisions of a value in its source's history.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Revisions {
    /// Of the key's creation.
    pub create: i64,
    /// Of this value.
    pub modified: i64,
    /// Writes since the creation.
    pub version: i64,
}

/// A PUT event as a field of `WatchResponse`: tag, length, message. Cheap to clone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Encoded {
    bytes: Bytes,
    /// Where in it the key begins and ends, and the value begins, which ends the message. (A message has less than 4 GiB.)
    key_at: u32,
    key_end: u32,
    value_at: u32,
}

impl Encoded {
    /// Copies key and value into one buffer. `lease` 0 = none.
    pub fn new(key: &[u8], value: &[u8], revisions: Revisions, lease: i64) -> Self {
        // The value last, so that it can be found from the end. Fields may come in any order, and those that are 0 do not come.
        let numbers = [
            (CREATE_REVISION, revisions.create),
            (MOD_REVISION, revisions.modified),
            (VERSION, revisions.version),
            (LEASE, lease),
        ];
        let numbers = numbers.into_iter().filter(|(_, number)| *number != 0);
        let bytes_len = |bytes: &[u8]| match bytes.len() {
            0 => 0,
            len => 1 + encoded_len_varint(len as u64) + len,
        };
        let numbers_len: usize = numbers
            .clone()
            .map(|(_, number)| 1 + encoded_len_varint(number as u64))
            .sum();
        let kv_len = bytes_len(key) + numbers_len + bytes_len(value);
        let event_len = 1 + encoded_len_varint(kv_len as u64) + kv_len;
        let mut buffer = Vec::with_capacity(1 + encoded_len_varint(event_len as u64) + event_len);
        let mut put = |tag: u8, number: u64, bytes: &[u8]| {
            buffer.put_u8(tag);
            encode_varint(number, &mut buffer);
            buffer.put_slice(bytes);
            buffer.len() as u32
        };
        put(EVENTS, event_len as u64, &[]);
        let mut key_end = put(EVENT_KV, kv_len as u64, &[]);
        if !key.is_empty() {
            key_end = put(KEY, key.len() as u64, key);
        }
        for (tag, number) in numbers {
            put(tag, number as u64, &[]);
        }
        if !value.is_empty() {
            put(VALUE, value.len() as u64, value);
        }
        Self {
            key_at: key_end - key.len() as u32,
            key_end,
            value_at: (buffer.len() - value.len()) as u32,
            bytes: buffer.into(),
        }
    }

    /// The key.
    pub fn key(&self) -> &[u8] {
        &self.bytes[self.key_at as usize..self.key_end as usize]
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        &self.bytes[self.value_at as usize..]
    }

    /// The key, sharing the bytes.
    pub fn shared_key(&self) -> Bytes {
        self.bytes.slice(self.key_at as usize..self.key_end as usize)
    }

    /// The field of `WatchResponse`.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The message `mvccpb.Event` that the field holds.
    pub fn message(&self) -> &[u8] {
        // A tag, and a varint of the message's length.
        let len = self.bytes[1..]
            .iter()
            .take_while(|byte| **byte & 0x80 != 0)
            .count();
        &self.bytes[len + 2..]
    }

    /// Revisions in the source's history.
    pub fn revisions(&self) -> Revisions {
        self.numbers().0
    }

    /// The lease; 0 = none.
    pub fn lease(&self) -> i64 {
        self.numbers().1
    }

    fn numbers(&self) -> (Revisions, i64) {
        let (mut revisions, mut lease) = (Revisions::default(), 0);
        // They stand between key and value.
        let mut rest = &self.bytes[self.key_end as usize..self.value_at as usize];
        while let Some((tag, after)) = rest.split_first() {
            let field = match *tag {
                CREATE_REVISION => &mut revisions.create,
                MOD_REVISION => &mut revisions.modified,
                VERSION => &mut revisions.version,
                LEASE => &mut lease,
                _ => break,
            };
            rest = after;
            // This message was encoded here.
            *field = decode_varint(&mut rest).unwrap_or_default() as i64;
        }
        (revisions, lease)
    }

    /// What etcd tells of the key, sharing the bytes.
    pub fn key_value(&self) -> KeyValue {
        let (revisions, lease) = self.numbers();
        KeyValue {
            key: self.shared_key(),
            create_revision: revisions.create,
            mod_revision: revisions.modified,
            version: revisions.version,
            value: self.bytes.slice(self.value_at as usize..),
            lease,
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_proto::{etcdserverpb::WatchResponse, mvccpb::Event};
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    proptest! {
        #[test]
        fn it_is_its_own_event(key in proptest::collection::vec(any::<u8>(), 0..300), value in proptest::collection::vec(any::<u8>(), 0..20_000), create in 1i64.., modified in 1i64.., version in 0i64..3, lease in prop_oneof![Just(0i64), any::<i64>()]) {
            let revisions = Revisions { create, modified, version };
            let encoded = Encoded::new(&key, &value, revisions, lease);
            prop_assert_eq!(encoded.key(), &key[..]);
            prop_assert_eq!(encoded.value(), &value[..]);
            prop_assert_eq!((encoded.revisions(), encoded.lease()), (revisions, lease));
            let want = KeyValue { key: key.into(), value: value.into(), create_revision: create, mod_revision: modified, version, lease };
            prop_assert_eq!(encoded.key_value(), want.clone());
            let want = Event { r#type: 0, kv: Some(want), prev_kv: None };
            let response = WatchResponse::decode(encoded.bytes().clone()).unwrap();
            prop_assert_eq!(&response.events, std::slice::from_ref(&want));
            prop_assert_eq!(Event::decode(encoded.message()).unwrap(), want);
        }
    }
}
