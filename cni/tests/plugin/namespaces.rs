//! Network namespaces that processes of the test hold: they are gone when the test is, however it ends.

use std::{
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;

/// A command of the runtime.
pub struct Plugin {
    pub command: String,
    pub container: String,
    pub netns: Option<PathBuf>,
    pub config: Value,
}

/// A network namespace (and, without root, a user namespace around it).
pub struct Namespace {
    /// Waits on standard input, which closes with this process.
    holder: Child,
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

impl Namespace {
    /// A node's.
    pub fn new() -> Self {
        Self::inside(None)
    }

    /// A pod's, if made by a process of the node.
    pub fn inside(node: Option<&Namespace>) -> Self {
        let mut command = match node {
            Some(node) => {
                let mut command = node.enter();
                command.arg("unshare");
                command
            }
            None => Command::new("unshare"),
        };
        if node.is_none() && !is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args([
            "--net",
            "sh",
            "-c",
            "ip link set lo up && echo ready && exec cat >/dev/null",
        ]);
        let mut holder = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare and nsenter are needed: install util-linux");
        let mut line = String::new();
        let stdout = holder.stdout.as_mut().expect("piped");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("read from the holder");
        assert_eq!(
            line.trim(),
            "ready",
            "cannot make a network namespace: run as root, allow user namespaces, or install iproute2"
        );
        Self { holder }
    }

    /// Its path.
    pub fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net"]);
        if !is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--");
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.enter().args(arguments).output().expect("run nsenter")
    }

    /// Runs `ip`, which must work; its output.
    pub fn ip(&self, arguments: &str) -> String {
        let arguments: Vec<_> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
        let output = self.output(&arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("ip writes UTF-8")
    }

    /// Runs `ip -j`.
    pub fn ip_json(&self, arguments: &str) -> Value {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() {
            Value::Array(vec![])
        } else {
            serde_json::from_str(&text).expect("ip -j writes JSON")
        }
    }

    /// All links.
    pub fn links(&self) -> Value {
        self.ip_json("link show")
    }

    /// Whether `address` answers: a refusal of a port nobody listens on is an answer.
    pub fn reaches(&self, address: &str) -> bool {
        let connect = format!("exec 3<>/dev/tcp/{address}/9");
        let output = self.output(&["timeout", "5", "bash", "-c", &connect]);
        String::from_utf8_lossy(&output.stderr).contains("refused")
    }

    /// Runs the plugin here; whether it worked, and its output.
    pub fn run_plugin(&self, plugin: &Plugin) -> (bool, Value) {
        let mut command = self.enter();
        command.arg(env!("CARGO_BIN_EXE_isthmus-cni"));
        command
            .env("CNI_COMMAND", &plugin.command)
            .env("CNI_IFNAME", "eth0");
        command.env(
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=1-2",
        );
        command
            .env("CNI_CONTAINERID", &plugin.container)
            .env_remove("CNI_NETNS");
        if let Some(netns) = &plugin.netns {
            command.env("CNI_NETNS", netns);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run the plugin");
        // Dropping the handle closes the pipe.
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(plugin.config.to_string().as_bytes())
            .expect("write");
        let output = child.wait_with_output().expect("wait for the plugin");
        let text = String::from_utf8(output.stdout).expect("the plugin writes UTF-8");
        let value = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
        };
        (output.status.success(), value)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It ends by itself when its input closes; killing it makes waiting short.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
