//! The calls that are needed, on one connection, with limits and with errors told apart.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, ResponseHeader, TxnRequest,
    WatchRequest, WatchResponse, kv_client::KvClient, request_op::Request as TxnOp,
    watch_client::WatchClient,
};
use rand::seq::SliceRandom;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};

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
    fn of(status: Status, message_len_max: usize) -> Self {
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

/// One connection to one endpoint. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Client(Arc<Connection>);

struct Connection {
    endpoint: Endpoint,
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
        let mut endpoints = config.endpoints.clone();
        endpoints.shuffle(&mut rand::rng());
        let mut result = None;
        for endpoint in endpoints {
            match connect(&endpoint, config, options).await {
                Ok(channel) => return Ok(Self::on(endpoint, channel, options)),
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

    fn on(endpoint: Endpoint, channel: Channel, options: &Options) -> Self {
        let limit = options.message_len_max;
        Self(Arc::new(Connection {
            endpoint,
            kv: KvClient::new(channel.clone()).max_decoding_message_size(limit),
            watch: WatchClient::new(channel).max_decoding_message_size(limit),
            call_timeout: options.call_timeout,
            message_len_max: limit,
        }))
    }

    /// Where it is connected to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    pub(crate) fn error(&self, status: Status) -> CallError {
        CallError::of(status, self.0.message_len_max)
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.0.call_timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.error(status)),
            Err(_) => Err(CallError::Timeout(self.0.call_timeout)),
        }
    }

    /// Reads a range.
    pub async fn range(&self, request: RangeRequest) -> Result<(Header, RangeResponse), CallError> {
        let mut kv = self.0.kv.clone();
        let response = self.call(kv.range(request)).await?;
        let header = header(response.header.as_ref())?;
        Ok((header, response))
    }

    /// Writes `ops` in one transaction and returns its revision.
    pub async fn write(&self, ops: &[Op]) -> Result<i64, CallError> {
        let request = |op: &Op| match op {
            Op::Put { key, value } => TxnOp::RequestPut(PutRequest {
                key: key.clone(),
                value: value.clone(),
                ..Default::default()
            }),
            Op::Delete { key } => TxnOp::RequestDeleteRange(DeleteRangeRequest {
                key: key.clone(),
                range_end: Bytes::new(),
                prev_kv: false,
            }),
        };
        let request = TxnRequest {
            success: ops
                .iter()
                .map(|op| RequestOp {
                    request: Some(request(op)),
                })
                .collect(),
            ..Default::default()
        };
        let mut kv = self.0.kv.clone();
        let response = self.call(kv.txn(request)).await?;
        Ok(header(response.header.as_ref())?.revision)
    }

    /// Opens a stream of watches.
    pub async fn watch(
        &self,
        requests: mpsc::Receiver<WatchRequest>,
    ) -> Result<Streaming<WatchResponse>, CallError> {
        let mut request = Request::new(ReceiverStream::new(requests));
        // A member that lost its leader ends the stream instead of staying silent.
        request
            .metadata_mut()
            .insert("hasleader", MetadataValue::from_static("true"));
        let mut watch = self.0.watch.clone();
        self.call(watch.watch(request)).await
    }
}

pub(crate) fn header(header: Option<&ResponseHeader>) -> Result<Header, CallError> {
    header
        .map(|header| Header {
            cluster_id: header.cluster_id,
            revision: header.revision,
        })
        .ok_or(CallError::NoHeader)
}
