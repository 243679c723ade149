//! The unary calls of a session: pages of lists, and the check before a watch is resumed.

use std::sync::Arc;

use bytes::Bytes;
use isthmus_proto::etcdserverpb::RangeResponse;
use tonic::Code;

use crate::{
    client::{CallError, Client, Part, Read},
    follower::{Feed, Header},
};

/// Bytes of a page's keys and values that are aimed for. A page costs a server more than its keys, etcd a look at all keys of
/// the range; and a page that is larger holds up others.
const PAGE_BYTES: usize = 1024 * 1024;
/// Most keys in a page, however small they are.
const PAGE_LEN_MAX: i64 = 16 * 1024;

/// How many keys the next page is to have: twice as many after a page of `len` that was full and less than half as large as is
/// aimed for, half as many after one that was larger, and never less than `base` for that.
pub(super) fn next_page_len(len: i64, base: i64, keys: usize, bytes: usize) -> i64 {
    if bytes > PAGE_BYTES {
        (len / 2).max(base.min(len))
    } else if bytes <= PAGE_BYTES / 2 && i64::try_from(keys) == Ok(len) {
        len.saturating_mul(2).min(PAGE_LEN_MAX.max(len))
    } else {
        len
    }
}

/// A unary call that is under way.
pub(super) struct Asked {
    pub(super) feed: Arc<str>,
    /// Tells the feed from an earlier one of the same name.
    pub(super) token: u64,
    pub(super) call: Call,
}

/// What is asked.
#[derive(Clone)]
pub(super) enum Call {
    List {
        start: Bytes,
        revision: i64,
        page_len: i64,
    },
    /// The page of one key is too large: read the key alone.
    Key {
        start: Bytes,
        revision: i64,
    },
    Check {
        key: Bytes,
        revision: i64,
    },
}

/// What was answered.
pub(super) enum Answer {
    Page(Header, RangeResponse),
    Checked {
        header: Header,
        mod_revision: Option<i64>,
        count: i64,
    },
}

/// Errors that another connection would not cure.
pub(super) fn concerns_feed_only(error: &CallError) -> bool {
    match error {
        CallError::Denied | CallError::TooLarge(_) => true,
        CallError::Other { code, .. } => matches!(
            code,
            Code::ResourceExhausted
                | Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::Unimplemented
                | Code::Unauthenticated
                | Code::NotFound
                | Code::OutOfRange
        ),
        CallError::Compacted | CallError::Future | CallError::Timeout(_) | CallError::NoHeader => false,
    }
}

/// Makes the call.
pub(super) async fn answer(client: &Client, feed: &Feed, call: &Call) -> Result<Answer, CallError> {
    match call {
        Call::List {
            start,
            revision,
            page_len,
        } => {
            let read = Read {
                // A single key has no end, and one page.
                start: start.clone(),
                end: feed.range_end.clone(),
                limit: *page_len,
                revision: *revision,
                // Later pages read a pinned revision, which any member can serve.
                serializable: *revision != 0,
                part: Part::All,
            };
            let (header, page) = client.read(&read).await?;
            Ok(Answer::Page(header, page))
        }
        Call::Key { start, revision } => {
            let read = Read {
                start: start.clone(),
                end: feed.range_end.clone(),
                limit: 1,
                revision: *revision,
                serializable: false,
                part: Part::Keys,
            };
            let (header, page) = client.read(&read).await?;
            Ok(Answer::Page(header, page))
        }
        Call::Check { key, revision } => {
            let get = Read {
                start: key.clone(),
                end: Bytes::new(),
                limit: 0,
                revision: *revision,
                serializable: false,
                part: Part::Keys,
            };
            let count = Read {
                start: feed.key.clone(),
                end: feed.range_end.clone(),
                part: Part::Count,
                ..get.clone()
            };
            let ((header, found), (_, counted)) =
                futures::future::try_join(client.read(&get), client.read(&count)).await?;
            Ok(Answer::Checked {
                header,
                mod_revision: found.kvs.first().map(|kv| kv.mod_revision),
                count: counted.count,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_grow_to_what_is_aimed_for_and_not_beyond(base in 1i64..1000, entry in 1usize..3_000_000) {
            let mut len = base;
            for _ in 0..20 {
                let keys = usize::try_from(len).unwrap();
                let next = next_page_len(len, base, keys, keys * entry);
                prop_assert!(next >= base.min(len) && next <= PAGE_LEN_MAX.max(base));
                prop_assert!(next <= len || usize::try_from(next).unwrap() * entry <= PAGE_BYTES);
                len = next;
            }
            // It has come to rest, within half of it.
            let keys = usize::try_from(len).unwrap();
            prop_assert_eq!(next_page_len(len, base, keys, keys * entry), len);
            prop_assert!(len == base || len == PAGE_LEN_MAX || keys * entry > PAGE_BYTES / 2);
            // The last page of a list says nothing.
            prop_assert_eq!(next_page_len(len, base, keys - 1, 0), len);
        }
    }
}
