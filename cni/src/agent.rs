//! The node's agent, over its unix socket.
//!
//! In: typed requests. Out: the agent's answers. All its calls are idempotent, so a call that could not be delivered is
//! repeated, with backoff, until the caller's patience ends: an agent that restarts for an upgrade fails no pod.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use isthmus_proto::agent::{self as api, cni_client::CniClient};
use isthmus_runtime::{Backoff, backoff::random};
use tokio::net::UnixStream;
use tonic::{
    Code as GrpcCode, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    failure::{CniError, Code},
    request::{Attachment, Pod},
};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for one answer; attaching programs takes milliseconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_BASE: Duration = Duration::from_millis(50);
const RETRY_CAP: Duration = Duration::from_millis(500);

/// The agent does not answer, or refuses.
#[derive(Debug, thiserror::Error)]
#[error("agent at {socket}: {}", .status.message())]
pub struct AgentError {
    socket: String,
    /// The agent's or the connection's answer.
    status: Status,
}

impl AgentError {
    /// Whether repeating later may help.
    pub fn is_transient(&self) -> bool {
        is_transient(self.status.code())
    }

    /// The error object's form. `otherwise` is the code when the agent refuses for good.
    pub fn into_cni(self, otherwise: Code) -> CniError {
        let code = match self.status.code() {
            code if is_transient(code) => Code::TryAgainLater,
            GrpcCode::NotFound => Code::UnknownContainer,
            GrpcCode::InvalidArgument => Code::InvalidConfig,
            _ => otherwise,
        };
        let error = CniError::new(code, self.to_string());
        // What a connection failed with: tonic keeps it as the status's source.
        let causes = std::iter::successors(std::error::Error::source(&self.status), |&cause| cause.source());
        match causes.map(ToString::to_string).last() {
            Some(cause) => error.also(&format!(
                "{cause}: is isthmus-agent running, with --socket-path {}?",
                self.socket
            )),
            None => error,
        }
    }
}

const fn is_transient(code: GrpcCode) -> bool {
    matches!(
        code,
        GrpcCode::Unavailable
            | GrpcCode::DeadlineExceeded
            | GrpcCode::Aborted
            | GrpcCode::Cancelled
            | GrpcCode::ResourceExhausted
    )
}

/// A client.
#[derive(Clone, Debug)]
pub struct Agent {
    client: CniClient<Channel>,
    socket: PathBuf,
    patience: Duration,
}

impl Agent {
    /// A client of the agent at `socket`; connects at the first call. A call that cannot be delivered is repeated for
    /// at most `patience`.
    pub fn at(socket: &Path, patience: Duration) -> Self {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is a placeholder that the connector ignores.
        let channel = Endpoint::from_static("http://agent.invalid")
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .connect_with_connector_lazy(connector);
        Self {
            client: CniClient::new(channel),
            socket: socket.to_owned(),
            patience,
        }
    }

    async fn call<T>(
        &self,
        call: impl AsyncFn(CniClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, AgentError> {
        let begun = Instant::now();
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            let status = match call(self.client.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let delay = backoff.next(random());
            if status.code() != GrpcCode::Unavailable || begun.elapsed() + delay > self.patience {
                return Err(AgentError {
                    socket: self.socket.display().to_string(),
                    status,
                });
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// Reserves addresses.
    pub async fn allocate(
        &self,
        attachment: &Attachment,
        pod: &Pod,
    ) -> Result<api::AllocateResponse, AgentError> {
        let request = api::AllocateRequest {
            attachment: Some(to_api(attachment)),
            namespace: pod.namespace.clone(),
            pod_name: pod.name.clone(),
            pod_uid: pod.uid.clone(),
        };
        self.call(async |mut client| client.allocate(request.clone()).await)
            .await
    }

    /// Tells that the interface exists.
    pub async fn create_endpoint(&self, request: &api::CreateEndpointRequest) -> Result<(), AgentError> {
        self.call(async |mut client| client.create_endpoint(request.clone()).await)
            .await
            .map(drop)
    }

    /// Removes an endpoint and releases its addresses.
    pub async fn delete_endpoint(
        &self,
        attachment: &Attachment,
    ) -> Result<api::DeleteEndpointResponse, AgentError> {
        let request = api::DeleteEndpointRequest {
            attachment: Some(to_api(attachment)),
        };
        self.call(async |mut client| client.delete_endpoint(request.clone()).await)
            .await
    }

    /// Compares with what the agent has.
    pub async fn check_endpoint(&self, request: &api::CheckEndpointRequest) -> Result<(), AgentError> {
        self.call(async |mut client| client.check_endpoint(request.clone()).await)
            .await
            .map(drop)
    }

    /// Whether ADD would work.
    pub async fn status(&self) -> Result<(), AgentError> {
        self.call(async |mut client| client.cni_status(api::CniStatusRequest {}).await)
            .await
            .map(drop)
    }

    /// Removes every endpoint that is not in `valid`.
    pub async fn collect_garbage(
        &self,
        valid: Vec<api::Attachment>,
    ) -> Result<api::GarbageCollectResponse, AgentError> {
        let request = api::GarbageCollectRequest { valid };
        self.call(async |mut client| client.garbage_collect(request.clone()).await)
            .await
    }
}

/// The API's form of an attachment.
pub fn to_api(attachment: &Attachment) -> api::Attachment {
    api::Attachment {
        container_id: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
    }
}
