//! What a follower takes in and gives out.

use std::sync::Arc;

use bytes::Bytes;
use isthmus_proto::mvccpb::{Event, KeyValue};
use isthmus_wire::keys::range_end;

/// A range of keys to follow.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Feed {
    /// The key or prefix as text; names the feed.
    pub name: Arc<str>,
    /// First key.
    pub key: Bytes,
    /// Exclusive end as etcd takes it; empty = just the key.
    pub range_end: Bytes,
    /// Larger values are refused, in bytes.
    pub value_len_max: usize,
    /// Keys beyond so many are refused, and not remembered: what they take of memory here is not up to the upstream.
    pub keys_max: usize,
    /// Longer keys are refused like those beyond `keys_max`, in bytes.
    pub key_len_max: usize,
    /// With a list also what happened in so many revisions before it is asked for; 0 = not.
    pub history: i64,
}

impl Feed {
    /// All keys that begin with `prefix`. End it in `/` unless longer names are meant too.
    pub fn prefix(prefix: &str, value_len_max: usize) -> Self {
        Self {
            name: prefix.into(),
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: range_end(prefix.as_bytes()).into(),
            value_len_max,
            keys_max: usize::MAX,
            key_len_max: usize::MAX,
            history: 0,
        }
    }

    /// One key.
    pub fn key(key: &str, value_len_max: usize) -> Self {
        Self {
            name: key.into(),
            key: Bytes::copy_from_slice(key.as_bytes()),
            range_end: Bytes::new(),
            value_len_max,
            keys_max: usize::MAX,
            key_len_max: usize::MAX,
            history: 0,
        }
    }

    /// All keys from `first` up to and without `end`.
    pub fn range(first: &str, end: &str, value_len_max: usize) -> Self {
        Self {
            name: first.into(),
            key: Bytes::copy_from_slice(first.as_bytes()),
            range_end: Bytes::copy_from_slice(end.as_bytes()),
            value_len_max,
            keys_max: usize::MAX,
            key_len_max: usize::MAX,
            history: 0,
        }
    }

    /// The same with a bound on the number of keys.
    pub fn with_keys_max(self, keys_max: usize, key_len_max: usize) -> Self {
        Self {
            keys_max,
            key_len_max,
            ..self
        }
    }

    /// The same with what happened in so many revisions before a list.
    pub fn with_history(self, history: i64) -> Self {
        Self { history, ..self }
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        match &self.range_end[..] {
            [] => key == self.key,
            [0] => key >= &self.key[..],
            end => key >= &self.key[..] && key < end,
        }
    }
}

/// A changed key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// The key has this value. In a list also keys that did not change since they were last reported may be named.
    Put {
        /// Key. Shares memory with the message it came in, as does the value: copy what is kept for long.
        key: Bytes,
        /// Value, not larger than the feed's limit.
        value: Bytes,
        /// Revision of its creation.
        create_revision: i64,
        /// Revision of this value.
        mod_revision: i64,
        /// How often it was written since its creation.
        version: i64,
    },
    /// The key is gone.
    Delete {
        /// Key.
        key: Bytes,
        /// Revision of the deletion; in a list the revision of the list.
        mod_revision: i64,
    },
    /// The key has a value that is larger than the feed's limit, or is one key too many.
    Refused {
        /// Key.
        key: Bytes,
        /// Revision of the value.
        mod_revision: i64,
        /// Length in bytes, 0 if unknown.
        len: usize,
        /// It is a key beyond the feed's limits of keys. It is not followed: no deletion of it is told, and it is read again when the
        /// feed is listed again.
        surplus: bool,
    },
}

impl Change {
    /// The key.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } | Self::Refused { key, .. } => key,
        }
    }

    /// Its revision.
    pub fn mod_revision(&self) -> i64 {
        match self {
            Self::Put { mod_revision, .. }
            | Self::Delete { mod_revision, .. }
            | Self::Refused { mod_revision, .. } => *mod_revision,
        }
    }
}

/// What a key held before a past change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Before {
    /// It was not there.
    Nothing,
    /// This value.
    Value {
        /// Value, not larger than the feed's limit. Shares memory with its message.
        value: Bytes,
        /// Revision of the key's creation.
        create_revision: i64,
        /// Revision of the value.
        mod_revision: i64,
        /// How often it was written since its creation.
        version: i64,
    },
    /// It is not known.
    Unknown,
}

/// A change that happened before a list, which holds what came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Past {
    /// The change.
    pub change: Change,
    /// What it replaced.
    pub before: Before,
}

/// What happened before a list ([`Feed::history`]).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum History {
    /// Every change from revision `from` up to that of the list is on its way. Comes before [`Effect::Listed`]; if it comes once
    /// more, what was told before it does not count.
    Begins {
        /// First revision.
        from: i64,
    },
    /// Changes of whole revisions, in revision order.
    Events(Vec<Past>),
    /// All were told.
    Complete,
    /// They will not be told.
    Lost,
}

/// What every answer of a server begins with.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Header {
    /// Changes with the history.
    pub cluster_id: u64,
    /// Revision of the store.
    pub revision: i64,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A new connection stands.
    Connected,
    /// The connection is gone, and with it everything that was asked.
    Disconnected,
    /// Answer to [`Effect::List`]: a page.
    Page {
        /// Header of the answer.
        header: Header,
        /// Keys, ascending.
        kvs: Vec<KeyValue>,
        /// There are keys after these.
        more: bool,
        /// The keys stand without their values, which are too large to be read.
        unreadable: bool,
    },
    /// Answer to [`Effect::List`]: the revision is compacted.
    PageCompacted,
    /// Answer to [`Effect::Check`].
    Checked {
        /// Header of the answer.
        header: Header,
        /// Revision of the key's value then; `None` = absent.
        mod_revision: Option<i64>,
        /// Number of keys in the feed's range then.
        count: i64,
    },
    /// Answer to [`Effect::Check`]: that revision is compacted or in the future.
    CheckFailed,
    /// Answer to [`Effect::Watch`].
    Created {
        /// Header of the answer.
        header: Header,
    },
    /// The watch said something; without events, that everything up to the header's revision was delivered.
    Events {
        /// Header of the answer.
        header: Header,
        /// In revision order, no revision split over two inputs.
        events: Vec<Event>,
    },
    /// The server ended the watch: compaction, no leader, permission.
    Canceled {
        /// What is compacted, if it is that; else 0.
        compacted: i64,
    },
    /// Asked how far its watches are, the server answered for all at once: an etcd. It proves nothing.
    NoProof,
}

/// What to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Read the keys of the feed from `start` on, linearizable.
    List {
        /// First key.
        start: Bytes,
        /// 0 = the current one.
        revision: i64,
    },
    /// Read `key`'s revision, and the number of keys of the feed, both as of `revision`.
    Check {
        /// Key.
        key: Bytes,
        /// Revision to read at.
        revision: i64,
    },
    /// Watch the feed from this revision on.
    Watch {
        /// First revision to be delivered.
        start_revision: i64,
        /// Events carry what they replace.
        prev_kv: bool,
    },
    /// Ask how far the watches are.
    AskProgress,
    /// Cancel the watch, and let nothing that it still says reach this machine.
    Unwatch,
    /// A list begins. Changes up to [`Effect::Listed`] are the difference to what was reported before.
    Listing {
        /// Header of the first page.
        header: Header,
        /// The history is certainly the one that was followed before.
        trusted: bool,
    },
    /// The list is at its end.
    Listed {
        /// Header of the first page.
        header: Header,
        /// Revisions that were reported before the list do not compare with those of the list and after it.
        new_history: bool,
    },
    /// What happened before a list.
    History(History),
    /// Changes, and the revision up to which all are delivered (in a list: that of the list).
    Changes {
        /// Revision.
        revision: i64,
        /// May be empty.
        changes: Vec<Change>,
    },
    /// The view equals the store's content at this revision, and changes follow as they happen.
    Synced {
        /// Cluster ID and revision.
        header: Header,
    },
}
