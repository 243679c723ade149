//! What the server asks of whoever runs the pods.

use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// Which log of which pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct LogRequest {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container; the pod's only one when the client named none.
    pub container: String,
    /// Go on with new lines until the container ends.
    pub follow: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// The log of the container's run before this one.
    pub previous: bool,
    /// A time before every line.
    pub timestamps: bool,
}

/// A log, in pieces of any size.
pub type LogStream = BoxStream<'static, io::Result<Bytes>>;

/// Why a runtime cannot do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct RuntimeRefusal(pub String);

/// The runtime of the pods, for subresources that the store cannot answer.
pub trait PodRuntime: Send + Sync + 'static {
    /// The log of a container.
    fn logs(&self, request: LogRequest) -> BoxFuture<'static, Result<LogStream, RuntimeRefusal>>;
}
