//! The calls that are needed, on one connection, with limits and with errors told apart.
//!
//! Two clients share the connection, and with it its TLS, whose files are read again for each handshake:
//! - `etcd-client` works on the store that is our own, where a [`Writer`](crate::Writer) lists, compares and writes: plain
//!   calls to a real etcd, for which the ecosystem's client is the one to use. All writes take this way.
//! - `isthmus_proto`'s clients read what others serve, and carry every watch stream, also the writer's. A follower judges each
//!   message by its header, takes keys and values as slices of it, must survive event types that it does not know, and never
//!   waits to send a request. etcd-client copies each value out of the message and again out of its event, panics when asked
//!   for the type of an unknown event, and waits while its queue of requests is full.
//!
//! Whose store it is is said when connecting; limits, timeouts and errors are the same for both.

mod own;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::TryFutureExt;
use isthmus_proto::{
    COMPOSITE,
    etcdserverpb::{
        RangeRequest, RangeResponse, ResponseHeader, WatchRequest, WatchResponse, kv_client::KvClient,
        watch_client::WatchClient,
    },
};
use own::OwnStore;
use rand::seq::SliceRandom;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataValue, transport::Channel};

use crate::{
    config::{Endpoint, EtcdConfig},
    connect::{ConnectError, Options, connect, innermost},
    follower::Header,
    plan::Op,
};

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The revision that was asked for is compacted.
    #[error("the revision is compacted")]
    Compacted,
    /// The revision that was asked for does not exist yet.
    #[error("the revision lies in the future")]
    Future,
    /// The answer is larger than what is read.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The certificate's name does not allow it.
    #[error("permission denied: the client certificate's common name has no right to these keys")]
    Denied,
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The answer is none of etcd's.
    #[error("the answer has no header")]
    NoHeader,
    /// Anything else.
    #[error("{code:?}: {message}")]
    Other {
        /// gRPC's code.
        code: Code,
        /// The server's words, or the transport's innermost cause.
        message: String,
    },
}

impl CallError {
    /// Whether the same request would be refused again, however often and wherever it is sent.
    pub(crate) fn is_about_the_request(&self) -> bool {
        match self {
            Self::TooLarge(_) => true,
            // etcd's own limit, and gRPC's. A full database is not about the request.
            Self::Other {
                code: Code::InvalidArgument,
                ..
            } => true,
            Self::Other {
                code: Code::ResourceExhausted,
                message,
            } => message.contains("larger than max"),
            _ => false,
        }
    }

    pub(crate) fn of(status: Status, message_len_max: usize) -> Self {
        let text = status.message();
        match status.code() {
            Code::OutOfRange if text.contains("has been compacted") => Self::Compacted,
            Code::OutOfRange if text.contains("future revision") => Self::Future,
            Code::OutOfRange | Code::ResourceExhausted if text.contains("message length too large") => {
                Self::TooLarge(message_len_max)
            }
            Code::PermissionDenied => Self::Denied,
            code => Self::Other {
                code,
                message: match std::error::Error::source(&status) {
                    Some(source) => innermost(source),
                    None => text.chars().take(256).collect(),
                },
            },
        }
    }
}

/// Whose store a connection leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Owner {
    /// We write it.
    Ourselves,
    /// We only read it, or nothing is known about who answers.
    Others,
}

/// What is to be read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Read {
    /// First key.
    pub(crate) start: Bytes,
    /// First key that is not meant any more; empty: `start` alone.
    pub(crate) end: Bytes,
    /// Most keys to return; 0 for all.
    pub(crate) limit: i64,
    /// At this revision; 0 for the newest.
    pub(crate) revision: i64,
    /// Any member may answer from what it has.
    pub(crate) serializable: bool,
    pub(crate) part: Part,
}

/// Which part of the keys is returned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    All,
    /// Without their values.
    Keys,
    /// Only how many there are.
    Count,
}

impl From<&Read> for RangeRequest {
    fn from(read: &Read) -> Self {
        Self {
            key: read.start.clone(),
            range_end: read.end.clone(),
            limit: read.limit,
            revision: read.revision,
            serializable: read.serializable,
            keys_only: read.part == Part::Keys,
            count_only: read.part == Part::Count,
            ..Default::default()
        }
    }
}

/// One connection to one endpoint. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Client(Arc<Connection>);

struct Connection {
    endpoint: Endpoint,
    owner: Owner,
    own: OwnStore,
    kv: KvClient<Channel>,
    watch: WatchClient<Channel>,
    call_timeout: Duration,
    message_len_max: usize,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("endpoint", &self.0.endpoint)
            .finish()
    }
}

impl Client {
    /// Connects to the first endpoint that answers, in random order.
    pub async fn connect(config: &EtcdConfig, options: &Options) -> Result<Self, ConnectError> {
        Self::connect_to(Owner::Others, config, options).await
    }

    /// Connects to the first endpoint of `owner`'s store that answers, in random order.
    pub(crate) async fn connect_to(
        owner: Owner,
        config: &EtcdConfig,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        let mut endpoints = config.endpoints.clone();
        endpoints.shuffle(&mut rand::rng());
        let mut result = None;
        for endpoint in endpoints {
            match connect(&endpoint, config, options).await {
                Ok(channel) => return Self::on(owner, endpoint, channel, options).await,
                Err(error) => result = Some(error),
            }
        }
        Err(result.unwrap_or(ConnectError::Transport {
            endpoint: Endpoint {
                tls: false,
                host: String::new(),
                port: 0,
            },
            cause: "there is no endpoint".to_owned(),
        }))
    }

    async fn on(
        owner: Owner,
        endpoint: Endpoint,
        channel: Channel,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        let limit = options.message_len_max;
        let own = match OwnStore::on(channel.clone(), limit).await {
            Ok(own) => own,
            Err(error) => {
                return Err(ConnectError::Transport {
                    endpoint,
                    cause: error.to_string(),
                });
            }
        };
        Ok(Self(Arc::new(Connection {
            endpoint,
            owner,
            own,
            kv: KvClient::new(channel.clone()).max_decoding_message_size(limit),
            watch: WatchClient::new(channel).max_decoding_message_size(limit),
            call_timeout: options.call_timeout,
            message_len_max: limit,
        })))
    }

    /// Where it is connected to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    pub(crate) fn error(&self, status: Status) -> CallError {
        CallError::of(status, self.0.message_len_max)
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, CallError> {
        match tokio::time::timeout(self.0.call_timeout, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.error(status)),
            Err(_) => Err(CallError::Timeout(self.0.call_timeout)),
        }
    }

    /// Reads a range.
    pub async fn range(&self, request: RangeRequest) -> Result<(Header, RangeResponse), CallError> {
        let mut kv = self.0.kv.clone();
        let request = composite(Request::new(request));
        let response = self.call(kv.range(request).map_ok(Response::into_inner)).await?;
        let header = header(response.header.as_ref())?;
        Ok((header, response))
    }

    /// Reads a range with the client that fits whose store it is.
    pub(crate) async fn read(&self, read: &Read) -> Result<(Header, RangeResponse), CallError> {
        match self.0.owner {
            Owner::Others => self.range(read.into()).await,
            Owner::Ourselves => {
                let response = self.call(self.0.own.read(read)).await?;
                let header = header(response.header.as_ref())?;
                Ok((header, response))
            }
        }
    }

    /// Writes `ops` in one transaction and returns its revision.
    pub async fn write(&self, ops: &[Op]) -> Result<i64, CallError> {
        let revision = self.call(self.0.own.write(ops)).await?;
        revision.ok_or(CallError::NoHeader)
    }

    /// Opens a stream of watches.
    pub async fn watch(
        &self,
        requests: mpsc::Receiver<WatchRequest>,
    ) -> Result<Streaming<WatchResponse>, CallError> {
        let mut request = composite(Request::new(ReceiverStream::new(requests)));
        // A member that lost its leader ends the stream instead of staying silent.
        request
            .metadata_mut()
            .insert("hasleader", MetadataValue::from_static("true"));
        let mut watch = self.0.watch.clone();
        self.call(watch.watch(request).map_ok(Response::into_inner)).await
    }
}

/// Says that the sender tells sources apart by their cluster IDs: one of our API servers then shows those.
fn composite<T>(mut request: Request<T>) -> Request<T> {
    let metadata = request.metadata_mut();
    metadata.insert(COMPOSITE, MetadataValue::from_static("1"));
    request
}

pub(crate) fn header(header: Option<&ResponseHeader>) -> Result<Header, CallError> {
    header
        .map(|header| Header {
            cluster_id: header.cluster_id,
            revision: header.revision,
        })
        .ok_or(CallError::NoHeader)
}
