//! The unary calls of a session: pages of lists, and the check before a watch is resumed.

use std::sync::Arc;

use bytes::Bytes;
use isthmus_proto::etcdserverpb::RangeResponse;
use tonic::Code;

use crate::{
    client::{CallError, Client, Part, Read},
    follower::{Feed, Header},
};

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
