//! What is said on the supervisor's socket: one JSON object a line, a response for each request.
//!
//! The types are the whole contract between a running sandbox and the commands, tests and the demo.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The longest line that is read.
pub const LINE_LEN_MAX: usize = 1024 * 1024;

/// What can be asked of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Progress lines from number `since` on; answered when there are some, when the phase changes, or after a second.
    Progress {
        /// How many lines are known already.
        since: usize,
    },
    /// The whole state.
    Status,
    /// Answered when every component is ready (`Done`), or with what is not after `timeout_ms` (`Refused`).
    WaitReady {
        /// How long to wait.
        timeout_ms: u64,
    },
    /// Does something to a component.
    Component {
        /// Its name, for example `east-1/agent`.
        name: String,
        /// What to do.
        action: Action,
    },
    /// Takes the link of a node or of a whole cluster up or down.
    Link {
        /// The name of a node or a cluster.
        target: String,
        /// Up or down.
        up: bool,
    },
    /// Where a pod runs.
    Pod {
        /// The cluster.
        cluster: String,
        /// The namespace.
        namespace: String,
        /// The pod's name.
        name: String,
    },
}

/// What can be done to a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// SIGTERM (SIGKILL after ten seconds), and it stays down.
    Stop,
    /// Starts it when it is down.
    Start,
    /// Stop, then start.
    Restart,
    /// SIGKILL; the supervisor starts it again, as after any crash.
    Kill9,
    /// SIGSTOP.
    Pause,
    /// SIGCONT.
    Resume,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Response {
    /// New progress lines.
    Progress {
        /// The lines from the asked number on.
        lines: Vec<String>,
        /// How far the sandbox is.
        phase: Phase,
    },
    /// The whole state.
    Status(StatusReport),
    /// It is done.
    Done,
    /// Where a pod runs.
    Pod(PodHandle),
    /// It cannot be done, and why.
    Refused {
        /// One sentence for people.
        message: String,
    },
}

/// How far a sandbox is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Phase {
    /// It is being built.
    Starting,
    /// Everything was ready once. What is ready now is in the status.
    Ready,
    /// It could not be built.
    Failed {
        /// Why.
        message: String,
    },
}

/// The state of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u8,
    /// How far it is.
    #[serde(flatten)]
    pub phase: Phase,
    /// The kubeconfig with a context per cluster.
    pub kubeconfig: PathBuf,
    /// The clusters.
    pub clusters: Vec<ClusterStatus>,
    /// The components.
    pub components: Vec<ComponentStatus>,
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its name.
    pub name: String,
    /// Its ID.
    pub id: u16,
    /// The URL of its Kubernetes API.
    pub kube_api: String,
    /// The URL of its etcd, for programs of the machine; with an embedded store the API server's, for its certificates.
    pub etcd: String,
    /// The URL of its clustermesh-apiserver, inside the sandbox.
    pub apiserver: String,
    /// Whether its link to the other clusters is up.
    pub link_up: bool,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its address on the underlay.
    pub address: String,
    /// Its network namespace.
    pub netns: String,
    /// The ranges of pod IPs.
    pub pod_cidrs: Vec<String>,
    /// The agent's socket.
    pub agent_socket: PathBuf,
    /// Whether the CNI plugin says that pods can be attached.
    pub network_ready: bool,
    /// Whether its link is up.
    pub link_up: bool,
    /// Pods that the node knows.
    pub pods: usize,
}

/// One component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentStatus {
    /// Its name.
    pub name: String,
    /// What it does now.
    pub state: ComponentState,
    /// Its process, when there is one.
    pub pid: Option<u32>,
    /// How often it was started again after it had ended by itself.
    pub restarts: u32,
    /// Whether its readiness endpoint answers now.
    pub ready: bool,
    /// Its log.
    pub log: PathBuf,
}

/// What a component does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComponentState {
    /// It was stopped on purpose, or not started yet.
    Stopped,
    /// Its process runs.
    Running,
    /// Its process is stopped by SIGSTOP.
    Paused,
    /// It ended and is started again shortly.
    Waiting,
}

impl std::fmt::Display for ComponentState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Waiting => "waiting",
        })
    }
}

/// Where a pod runs: what a command needs to run beside its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodHandle {
    /// The network namespace's file.
    pub netns: PathBuf,
    /// The cgroup for processes that run beside the pod's containers: the child `exec` of the pod's own.
    pub cgroup: PathBuf,
    /// The environment of its first container.
    pub env: Vec<(String, String)>,
    /// Its addresses.
    pub ips: Vec<String>,
}

impl PodHandle {
    /// The cgroup of the whole pod: killing it is what a crash of every container looks like.
    pub fn pod_cgroup(&self) -> PathBuf {
        self.cgroup
            .parent()
            .map_or_else(|| self.cgroup.clone(), PathBuf::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        let text = r#"{"op":"component","name":"east-1/agent","action":"kill9"}"#;
        let want = Request::Component {
            name: "east-1/agent".into(),
            action: Action::Kill9,
        };
        assert_eq!(serde_json::from_str::<Request>(text).unwrap(), want);
        assert_eq!(serde_json::to_string(&want).unwrap(), text);
    }

    #[test]
    fn the_status_says_its_phase_in_one_field() {
        let report = StatusReport {
            name: "default".into(),
            index: 0,
            phase: Phase::Failed {
                message: "no etcd".into(),
            },
            kubeconfig: "/k".into(),
            clusters: Vec::new(),
            components: Vec::new(),
        };
        let json = serde_json::to_value(Response::Status(report.clone())).unwrap();
        assert_eq!(
            (json["phase"].as_str(), json["message"].as_str()),
            (Some("failed"), Some("no etcd"))
        );
        assert_eq!(
            serde_json::from_value::<Response>(json).unwrap(),
            Response::Status(report)
        );
    }
}
