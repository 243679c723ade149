//! The watch stream of a session, from its opening on.

use futures::future::BoxFuture;
use isthmus_proto::etcdserverpb::WatchResponse;
use tonic::{Status, Streaming};

use crate::client::CallError;

type Opening = BoxFuture<'static, Result<Streaming<WatchResponse>, CallError>>;

/// How far it is.
pub(super) enum Stream {
    /// Nothing was watched yet. (etcd answers the stream's opening with its first message only.)
    None,
    Opening(Opening),
    Open(Box<Streaming<WatchResponse>>),
}

impl Stream {
    pub(super) async fn next(&mut self) -> StreamEvent {
        match self {
            Self::None => std::future::pending().await,
            Self::Opening(opening) => StreamEvent::Opened(opening.await),
            Self::Open(stream) => StreamEvent::Message(stream.message().await),
        }
    }
}

/// What came.
pub(super) enum StreamEvent {
    Opened(Result<Streaming<WatchResponse>, CallError>),
    Message(Result<Option<WatchResponse>, Status>),
}
