//! A running sandbox, as commands, tests and the demo see it.
//!
//! Each call is one connection to the supervisor's socket, one request and its answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::control::{Action, LINE_LEN_MAX, Phase, PodHandle, Request, Response, StatusReport};
use crate::plan::Plan;
use crate::registry;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("the sandbox's supervisor does not answer at {}: see `isthmus sandbox status`, or remove the sandbox with `isthmus sandbox down`", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the sandbox's supervisor went away while it answered")]
    Broken(#[source] std::io::Error),
    /// The pod's cgroup could not be used.
    #[error("cannot make the cgroup {}: is this root?", cgroup.display())]
    Cgroup {
        /// The cgroup.
        cgroup: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The answer makes no sense.
    #[error("the sandbox's supervisor answered something else; is it of another version?")]
    Unexpected,
    /// The supervisor says no.
    #[error("{0}")]
    Refused(String),
}

/// A handle to a running sandbox.
#[derive(Clone, Debug)]
pub struct SandboxClient {
    plan: Plan,
}

impl SandboxClient {
    /// The sandbox named `name` below the default state root.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        Self::open_in(Path::new(registry::DEFAULT_STATE_ROOT), name)
    }

    /// The sandbox named `name` below `state_root`.
    pub fn open_in(state_root: &Path, name: &str) -> anyhow::Result<Self> {
        Ok(Self {
            plan: registry::load(state_root, name)?,
        })
    }

    /// The sandbox with this plan.
    pub fn of(plan: Plan) -> Self {
        Self { plan }
    }

    /// Names, addresses and files of the sandbox.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The whole state.
    pub async fn status(&self) -> Result<StatusReport, ClientError> {
        match self.call(&Request::Status).await? {
            Response::Status(report) => Ok(report),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Progress lines from number `since` on, and how far the sandbox is. Waits up to a second for news.
    pub async fn progress(&self, since: usize) -> Result<(Vec<String>, Phase), ClientError> {
        match self.call(&Request::Progress { since }).await? {
            Response::Progress { lines, phase } => Ok((lines, phase)),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Returns when every component that is not stopped on purpose is ready and every node's network is; the error
    /// names what is not.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<(), ClientError> {
        self.done(&Request::WaitReady {
            timeout_ms: timeout.as_millis() as u64,
        })
        .await
    }

    /// Ends a component with SIGTERM and keeps it down.
    pub async fn stop(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Stop).await
    }

    /// Starts a component that is down.
    pub async fn start(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Start).await
    }

    /// Stops and starts a component.
    pub async fn restart(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Restart).await
    }

    /// Ends a component with SIGKILL; the supervisor starts it again.
    pub async fn kill9(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Kill9).await
    }

    /// Freezes a component (SIGSTOP).
    pub async fn pause(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Pause).await
    }

    /// Lets a frozen component go on (SIGCONT).
    pub async fn resume(&self, component: &str) -> Result<(), ClientError> {
        self.component(component, Action::Resume).await
    }

    /// Takes the link of a node, or of a cluster to all others, down or up.
    pub async fn set_link(&self, target: &str, up: bool) -> Result<(), ClientError> {
        self.done(&Request::Link {
            target: target.into(),
            up,
        })
        .await
    }

    /// Where a pod runs.
    pub async fn pod(&self, cluster: &str, namespace: &str, name: &str) -> Result<PodHandle, ClientError> {
        let request = Request::Pod {
            cluster: cluster.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        match self.call(&request).await? {
            Response::Pod(handle) => Ok(handle),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// A command that runs in a pod, beside its containers: add the program and its arguments with `arg`.
    pub async fn exec(
        &self,
        cluster: &str,
        namespace: &str,
        name: &str,
    ) -> Result<tokio::process::Command, ClientError> {
        let handle = self.pod(cluster, namespace, name).await?;
        let failed = |source| ClientError::Cgroup {
            cgroup: handle.cgroup.clone(),
            source,
        };
        std::fs::create_dir_all(&handle.cgroup).map_err(failed)?;
        let mut command = crate::cgroup::enter(&handle.cgroup, Some(&handle.netns));
        command.envs(handle.env);
        Ok(command)
    }

    /// A command that runs on a node, in its network namespace and below its cgroup: add the program and its
    /// arguments with `arg`.
    pub fn node_command(&self, node: &str) -> anyhow::Result<tokio::process::Command> {
        let plan = self.plan.nodes().find(|plan| plan.name == node);
        let plan = plan.with_context(|| format!("there is no node `{node}`"))?;
        let group = self.plan.node_cgroup(node).join("exec");
        std::fs::create_dir_all(&group).with_context(|| format!("cannot make {}", group.display()))?;
        Ok(crate::cgroup::enter(
            &group,
            Some(&crate::netns::path(&plan.netns)),
        ))
    }

    /// A client of a cluster's Kubernetes API.
    pub fn kube(&self, cluster: &str) -> anyhow::Result<kube::Client> {
        let plan = self
            .plan
            .cluster(cluster)
            .with_context(|| format!("there is no cluster `{cluster}`"))?;
        let url = format!("http://{}", plan.kube_api())
            .parse()
            .context("the API's URL")?;
        Ok(kube::Client::try_from(kube::Config::new(url))?)
    }

    /// The log of a component (`east-1/agent`).
    pub fn log_path(&self, component: &str) -> Option<PathBuf> {
        self.plan
            .components()
            .into_iter()
            .find(|plan| plan.name == component)
            .map(|plan| plan.log)
    }

    async fn component(&self, name: &str, action: Action) -> Result<(), ClientError> {
        self.done(&Request::Component {
            name: name.into(),
            action,
        })
        .await
    }

    async fn done(&self, request: &Request) -> Result<(), ClientError> {
        match self.call(request).await? {
            Response::Done => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    async fn call(&self, request: &Request) -> Result<Response, ClientError> {
        let socket = self.plan.control_socket();
        let stream = UnixStream::connect(&socket)
            .await
            .map_err(|source| ClientError::Connect { socket, source })?;
        let (reader, mut writer) = stream.into_split();
        let mut line = serde_json::to_vec(request).map_err(|_| ClientError::Unexpected)?;
        line.push(b'\n');
        writer.write_all(&line).await.map_err(ClientError::Broken)?;
        let mut answer = String::new();
        let mut reader = BufReader::new(reader.take(LINE_LEN_MAX as u64));
        reader.read_line(&mut answer).await.map_err(ClientError::Broken)?;
        match serde_json::from_str(&answer) {
            Ok(Response::Refused { message }) => Err(ClientError::Refused(message)),
            Ok(response) => Ok(response),
            Err(_) if answer.is_empty() => Err(ClientError::Broken(std::io::Error::from(
                std::io::ErrorKind::UnexpectedEof,
            ))),
            Err(_) => Err(ClientError::Unexpected),
        }
    }
}
