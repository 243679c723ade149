//! A pod's network: its namespace, and the CNI plugin that attaches it.
//!
//! The plugin is run as a container runtime runs it (CNI 1.1: environment, configuration on standard input, result on
//! standard output), in the node's network namespace. A failed ADD is followed by DEL and the namespace's removal, so
//! that the next attempt starts from nothing.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{cgroup, netns};

/// How long the plugin may take.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer that is read.
const ANSWER_LEN_MAX: usize = 64 * 1024;
const IFNAME: &str = "eth0";

/// The plugin of one node.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// The binary.
    pub binary: PathBuf,
    /// The node's network namespace.
    pub node_netns: PathBuf,
    /// The cgroup that the plugin runs in.
    pub cgroup: PathBuf,
    /// The agent's socket.
    pub agent_socket: PathBuf,
    /// The plugin's log.
    pub log_file: PathBuf,
}

/// The pod that is attached.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The name of the pod's network namespace.
    pub netns: String,
    /// Identifies the attachment: the pod's UID.
    pub container_id: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
}

/// Why a pod was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] netns::NetnsError),
    /// The plugin could not be run.
    #[error("cannot run the CNI plugin {}", binary.display())]
    Run {
        /// The binary.
        binary: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The plugin took too long.
    #[error("the CNI plugin did not answer {command} within {} s", PLUGIN_TIMEOUT.as_secs())]
    Timeout {
        /// The CNI command.
        command: &'static str,
    },
    /// The plugin refused.
    #[error("CNI {command}: {message}")]
    Refused {
        /// The CNI command.
        command: &'static str,
        /// What it said.
        message: String,
    },
    /// The plugin's result has no addresses.
    #[error("CNI ADD: the result has no usable address: {0}")]
    Result(String),
}

#[derive(Deserialize)]
struct AddResult {
    #[serde(default)]
    ips: Vec<AddressResult>,
}

#[derive(Deserialize)]
struct AddressResult {
    address: ipnet::IpNet,
}

#[derive(Deserialize)]
struct Refusal {
    msg: String,
    #[serde(default)]
    details: String,
}

impl Plugin {
    /// Makes the namespace and attaches it; returns the pod's addresses, IPv4 first.
    pub async fn add(&self, pod: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        let result = self.try_add(pod).await;
        if result.is_err() {
            // What could not be undone is undone by the next attempt or by the pod's removal.
            let _ = self.remove(pod).await;
        }
        result
    }

    async fn try_add(&self, pod: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        if netns::path(&pod.netns).exists() {
            self.remove(pod).await?;
        }
        netns::add(&pod.netns).await?;
        let answer = self.call("ADD", Some(pod)).await?;
        let said = || NetworkError::Result(String::from_utf8_lossy(&answer).into_owned());
        let result: AddResult = serde_json::from_slice(&answer).map_err(|_| said())?;
        let mut addresses: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        addresses.sort();
        if addresses.is_empty() {
            Err(said())
        } else {
            Ok(addresses)
        }
    }

    /// Detaches the pod and removes its namespace. Can be repeated.
    pub async fn remove(&self, pod: &Attachment) -> Result<(), NetworkError> {
        self.call("DEL", Some(pod)).await?;
        Ok(netns::remove(&pod.netns).await?)
    }

    /// Whether pods can be attached now.
    pub async fn status(&self) -> Result<(), NetworkError> {
        self.call("STATUS", None).await.map(drop)
    }

    async fn call(&self, command: &'static str, pod: Option<&Attachment>) -> Result<Vec<u8>, NetworkError> {
        tokio::time::timeout(PLUGIN_TIMEOUT, self.exchange(command, pod))
            .await
            .map_err(|_| NetworkError::Timeout { command })?
    }

    async fn exchange(
        &self,
        command: &'static str,
        pod: Option<&Attachment>,
    ) -> Result<Vec<u8>, NetworkError> {
        let failed = |source| NetworkError::Run {
            binary: self.binary.clone(),
            source,
        };
        std::fs::create_dir_all(&self.cgroup).map_err(failed)?;
        let mut process = cgroup::enter(&self.cgroup, Some(&self.node_netns));
        process
            .arg(&self.binary)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        process
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", self.binary.parent().unwrap_or(&self.binary));
        if let Some(pod) = pod {
            process
                .env("CNI_CONTAINERID", &pod.container_id)
                .env("CNI_IFNAME", IFNAME);
            process.env("CNI_NETNS", netns::path(&pod.netns));
            process.env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={id}",
                    pod.namespace,
                    pod.name,
                    id = pod.container_id
                ),
            );
        }
        process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = process.spawn().map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that does not read its configuration says so by its exit code.
            let _ = stdin.write_all(self.configuration().as_bytes()).await;
        }
        let output = child.wait_with_output().await.map_err(failed)?;
        if output.status.success() && output.stdout.len() <= ANSWER_LEN_MAX {
            return Ok(output.stdout);
        }
        Err(NetworkError::Refused {
            command,
            message: refusal(&output.stdout, &output.stderr),
        })
    }

    fn configuration(&self) -> String {
        json!({
            "cniVersion": "1.1.0",
            "name": "isthmus",
            "type": "isthmus-cni",
            "agentSocket": self.agent_socket,
            "logFile": self.log_file,
        })
        .to_string()
    }
}

/// What a plugin that failed said: the error object of the specification, or whatever it printed.
fn refusal(stdout: &[u8], stderr: &[u8]) -> String {
    match serde_json::from_slice::<Refusal>(stdout) {
        Ok(Refusal { msg, details }) if details.is_empty() => msg,
        Ok(Refusal { msg, details }) => format!("{msg}: {details}"),
        Err(_) => {
            let text = [stdout, stderr]
                .map(|part| String::from_utf8_lossy(part).trim().to_owned())
                .join(" ");
            text.trim().chars().take(1000).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_shown_as_the_plugin_said_it() {
        assert_eq!(
            refusal(
                br#"{"cniVersion":"1.1.0","code":11,"msg":"no agent","details":"/x.sock"}"#,
                b""
            ),
            "no agent: /x.sock"
        );
        assert_eq!(
            refusal(br#"{"code":11,"msg":"try again"}"#, b"noise"),
            "try again"
        );
        assert_eq!(refusal(b"", b"sh: not found\n"), "sh: not found");
    }
}
