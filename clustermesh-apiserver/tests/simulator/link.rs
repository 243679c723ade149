//! A connection as the network has it: calls and their answers in any order, a stream in order.

use std::collections::VecDeque;

use bytes::Bytes;
use isthmus_clustermesh_apiserver::store::Cursor;
use isthmus_kvstore::follower::Header;
use isthmus_proto::mvccpb::{Event, KeyValue};

use super::etcd::EtcdWatch;

/// A call.
#[derive(Clone, Debug)]
pub enum Call {
    List { start: Bytes, revision: i64 },
    Check { key: Bytes, revision: i64 },
}

/// Its answer.
#[derive(Clone, Debug)]
pub enum Answer {
    Page {
        header: Header,
        kvs: Vec<KeyValue>,
        more: bool,
    },
    Checked {
        header: Header,
        mod_revision: Option<i64>,
        count: i64,
    },
    /// Compacted, or in the future.
    OutOfRange { check: bool },
}

/// What a client sends on the stream. A watch has a number that the client chooses.
#[derive(Clone, Debug)]
pub enum Ask {
    Watch { number: u32, start: i64, prev_kv: bool },
    Cancel { number: u32 },
    Progress,
}

/// What a server sends on it.
#[derive(Clone, Debug)]
pub enum Say {
    Created {
        number: u32,
        header: Header,
    },
    Events {
        number: u32,
        header: Header,
        events: Vec<Event>,
    },
    Canceled {
        number: u32,
        header: Header,
        compacted: i64,
    },
    /// For all watches.
    Progress {
        header: Header,
    },
}

/// A server's side of a watch.
#[derive(Clone, Debug)]
pub enum Watching {
    Etcd(EtcdWatch),
    Store(Box<Cursor>),
}

#[derive(Default)]
pub struct Link {
    pub calls: Vec<Call>,
    pub answers: Vec<Answer>,
    pub asks: VecDeque<Ask>,
    pub says: VecDeque<Say>,
    pub watch: Option<(u32, Watching)>,
}
