//! Calls to the node's agent, over its unix socket.
//!
//! In: the socket's path. Out: the agent's messages, or an error that says what to do next.

use std::{io, path::Path, time::Duration};

use hyper_util::rt::TokioIo;
use isthmus_proto::agent::{self as api, local_client::LocalClient};
use tokio::net::UnixStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

/// Longest wait for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest message: a list of services of a large mesh.
const MESSAGE_LEN_MAX: usize = 256 << 20;
/// Longest table.
const TABLE_LEN_MAX: usize = 1 << 30;

/// The agent cannot be asked, or refuses.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No socket there.
    #[error(
        "no agent listens at {socket}: there is no such socket.\n\
         Start isthmus-agent on this node, or name the socket of the agent that you mean (its own --socket-path) with \
         --socket-path PATH or ISTHMUS_SOCKET_PATH.\n\
         What the kernel does can be seen without an agent: isthmus bpf lb list"
    )]
    Absent {
        /// Its path.
        socket: String,
    },
    /// A socket that nobody serves.
    #[error(
        "no agent listens at {socket}: the socket is left from one that ended.\n\
         Start isthmus-agent on this node; its log says why it ended."
    )]
    Dead {
        /// Its path.
        socket: String,
    },
    /// Not allowed.
    #[error("not allowed to use the agent's socket {socket}.\nOnly root may: run this as root (sudo)")]
    Denied {
        /// Its path.
        socket: String,
    },
    /// Something else.
    #[error("cannot connect to the agent at {socket}")]
    Connect {
        /// Its path.
        socket: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The answer is an error.
    #[error("the agent at {socket} {}", said(.status))]
    Refused {
        /// Its path.
        socket: String,
        /// The answer.
        status: Box<Status>,
    },
    /// A table without end.
    #[error("table {table} is longer than {TABLE_LEN_MAX} bytes")]
    TooLong {
        /// Which one.
        table: String,
    },
}

fn said(status: &Status) -> String {
    match status.code() {
        Code::InvalidArgument | Code::NotFound => format!("says: {}", status.message()),
        Code::Unimplemented => {
            "does not know this command; it may be of another version: isthmus version".to_owned()
        }
        Code::DeadlineExceeded | Code::Cancelled => {
            format!("did not answer within {} seconds", CALL_TIMEOUT.as_secs())
        }
        Code::Unavailable => format!("went away or is not ready: {}", status.message()),
        code => format!("failed ({code:?}): {}", status.message()),
    }
}

/// A connected client.
#[derive(Clone, Debug)]
pub struct Agent {
    client: LocalClient<Channel>,
    socket: String,
}

impl Agent {
    /// Connects to the agent at `socket`.
    pub async fn connect(socket: &Path) -> Result<Self, AgentError> {
        // Once by hand, for the kernel's own words; tonic's errors hide them.
        UnixStream::connect(socket).await.map_err(|source| {
            let socket = socket.display().to_string();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => AgentError::Absent { socket },
                io::ErrorKind::ConnectionRefused => AgentError::Dead { socket },
                io::ErrorKind::PermissionDenied => AgentError::Denied { socket },
                _ => AgentError::Connect { socket, source },
            }
        })?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is a placeholder that the connector ignores.
        let channel = Endpoint::from_static("http://agent.invalid").timeout(CALL_TIMEOUT);
        let client = LocalClient::new(channel.connect_with_connector_lazy(connector))
            .max_decoding_message_size(MESSAGE_LEN_MAX);
        Ok(Self {
            client,
            socket: socket.display().to_string(),
        })
    }

    fn refused(&self) -> impl Fn(Status) -> AgentError {
        move |status| AgentError::Refused {
            socket: self.socket.clone(),
            status: Box::new(status),
        }
    }

    /// The agent's state.
    pub async fn status(&self) -> Result<api::StatusResponse, AgentError> {
        let response = self.client.clone().status(api::StatusRequest {}).await;
        Ok(response.map_err(self.refused())?.into_inner())
    }

    /// All services.
    pub async fn services(&self, all_backends: bool) -> Result<Vec<api::Service>, AgentError> {
        let response = self
            .client
            .clone()
            .list_services(api::ListServicesRequest { all_backends })
            .await;
        Ok(response.map_err(self.refused())?.into_inner().services)
    }

    /// The remote clusters, and if asked for, the replicas of the own cluster's API server.
    pub async fn cluster_mesh_status(
        &self,
        replicas: bool,
    ) -> Result<api::ClusterMeshStatusResponse, AgentError> {
        let response = self
            .client
            .clone()
            .cluster_mesh_status(api::ClusterMeshStatusRequest { replicas })
            .await;
        Ok(response.map_err(self.refused())?.into_inner())
    }

    /// A table's JSON text.
    pub async fn table(&self, table: &str) -> Result<String, AgentError> {
        let request = api::ShowTableRequest {
            table: table.to_owned(),
        };
        let response = self.client.clone().show_table(request).await;
        let mut parts = response.map_err(self.refused())?.into_inner();
        let mut text = String::new();
        while let Some(part) = parts.message().await.map_err(self.refused())? {
            if text.len() + part.json.len() > TABLE_LEN_MAX {
                return Err(AgentError::TooLong {
                    table: table.to_owned(),
                });
            }
            text.push_str(&part.json);
        }
        Ok(text)
    }
}
