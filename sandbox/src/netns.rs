//! Network namespaces: made and removed with `ip`, entered with setns.
//!
//! `ip netns exec` is never used: it mounts a new /sys, in which the cgroup and BPF file systems are missing.
//! [`within`] runs code of our own in another namespace on a thread that ends afterwards, so that no thread of the
//! runtime ever changes its namespace; a socket made there stays in that namespace and is then used from anywhere.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::plan::{self, NamespaceSetup, Plan};

/// Where `ip netns` keeps its names.
pub const NETNS_DIR: &str = "/run/netns";

/// What went wrong with namespaces and links.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A command could not be started.
    #[error("cannot run `{command}`")]
    Spawn {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command failed.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// What it said.
        output: String,
    },
    /// A kernel setting could not be written.
    #[error("cannot set {setting} in network namespace {netns}")]
    Sysctl {
        /// The namespace.
        netns: String,
        /// The file below /proc/sys.
        setting: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file that stands for the namespace.
pub fn path(netns: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns)
}

/// Runs `work` on a thread of its own inside the namespace at `netns`.
pub fn within<T: Send + 'static>(
    netns: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let file = File::open(netns)?;
    let thread = std::thread::Builder::new().name("netns".into()).spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        work()
    })?;
    thread
        .join()
        .map_err(|_| io::Error::other("the thread in the network namespace panicked"))?
}

/// Connects to `address` as seen from `netns` (`None` is the machine's own namespace).
pub async fn connect(
    netns: Option<PathBuf>,
    address: SocketAddr,
    timeout: Duration,
) -> io::Result<tokio::net::TcpStream> {
    let dial = move || TcpStream::connect_timeout(&address, timeout);
    let stream = blocking(move || match netns {
        Some(netns) => within(&netns, dial),
        None => dial(),
    })
    .await?;
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream)
}

/// Listens at `address` in `netns` (`None` is the machine's own namespace).
pub async fn listen(netns: Option<PathBuf>, address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let bind = move || TcpListener::bind(address);
    let listener = blocking(move || match netns {
        Some(netns) => within(&netns, bind),
        None => bind(),
    })
    .await?;
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// Makes all namespaces and links of a sandbox.
pub async fn build(plan: &Plan) -> Result<(), NetnsError> {
    run_batch(&["ip", "-batch", "-"], &plan::root_batch(plan)).await?;
    for setup in plan::namespace_setups(plan) {
        apply(setup).await?;
    }
    Ok(())
}

async fn apply(setup: NamespaceSetup) -> Result<(), NetnsError> {
    let NamespaceSetup {
        netns,
        batch,
        sysctls,
    } = setup;
    run_batch(&["ip", "-n", &netns, "-batch", "-"], &batch).await?;
    for (setting, value) in sysctls {
        write_sysctl(&netns, setting, value).await?;
    }
    Ok(())
}

async fn write_sysctl(netns: &str, setting: &'static str, value: &'static str) -> Result<(), NetnsError> {
    let file = Path::new("/proc/sys").join(setting);
    // A kernel without IPv6 has no such file, and nothing to set.
    if setting.starts_with("net/ipv6") && !Path::new("/proc/sys/net/ipv6").exists() {
        return Ok(());
    }
    let at = path(netns);
    // /proc/sys/net shows the namespace of the thread that looks.
    blocking(move || within(&at, move || std::fs::write(file, value)))
        .await
        .map_err(|source| NetnsError::Sysctl {
            netns: netns.into(),
            setting: setting.into(),
            source,
        })
}

/// Makes a pod's namespace, with its loopback device up.
pub async fn add(netns: &str) -> Result<(), NetnsError> {
    run_batch(&["ip", "-batch", "-"], &format!("netns add {netns}\n")).await?;
    run_batch(&["ip", "-n", netns, "-batch", "-"], "link set lo up\n").await
}

/// Removes a namespace; one that is not there is fine.
pub async fn remove(netns: &str) -> Result<(), NetnsError> {
    if !path(netns).exists() {
        return Ok(());
    }
    run_batch(&["ip", "-batch", "-"], &format!("netns delete {netns}\n")).await
}

/// Takes a device up or down.
pub async fn set_link(netns: &str, device: &str, up: bool) -> Result<(), NetnsError> {
    let state = if up { "up" } else { "down" };
    run_batch(
        &["ip", "-n", netns, "-batch", "-"],
        &format!("link set {device} {state}\n"),
    )
    .await
}

/// Removes a device of the machine's own namespace; one that is not there is fine.
pub async fn remove_root_device(device: &str) -> Result<(), NetnsError> {
    if !Path::new("/sys/class/net").join(device).exists() {
        return Ok(());
    }
    run_batch(&["ip", "-batch", "-"], &format!("link delete {device}\n")).await
}

/// The names of namespaces that begin with `prefix`.
pub fn names_with_prefix(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// Runs `command` with `input`; its output is in the error.
async fn run_batch(command: &[&str], input: &str) -> Result<(), NetnsError> {
    let line = command.join(" ");
    let spawn_error = |source| NetnsError::Spawn {
        command: line.clone(),
        source,
    };
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(spawn_error)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that stops reading has failed and says so below.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(spawn_error)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetnsError::Failed {
        command: format!("{line}` of `{}", input.trim()),
        output: said,
    })
}
