//! A container's process: started in the pod's cgroup and namespace, signalled, awaited.
//!
//! The process joins its cgroup before it becomes the command, so that all it starts is in there too; when it ends,
//! what it left behind is killed with the cgroup. A task owns the process: signals go through it, and never to an ID
//! that the kernel may have given to somebody else.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use super::logs::{self, BoundedLog};
use crate::cgroup;

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its environment, beside PATH.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub directory: Option<PathBuf>,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// The container's cgroup.
    pub cgroup: PathBuf,
}

impl Launch {
    fn command(&self) -> io::Result<Command> {
        std::fs::create_dir_all(&self.cgroup)?;
        let mut command = cgroup::enter(&self.cgroup, Some(&self.netns));
        command
            .args(&self.argv)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command
            .env("HOME", "/root")
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.directory.as_deref().unwrap_or(std::path::Path::new("/")));
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Starts the process; `on_exit` is called once, when it has ended.
    pub fn start(
        &self,
        log: PathBuf,
        on_exit: impl FnOnce(io::Result<ExitStatus>) + Send + 'static,
    ) -> io::Result<Process> {
        let log = Arc::new(Mutex::new(BoundedLog::open(log)?));
        let mut child = self
            .command()?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(logs::pump(stdout, Arc::clone(&log)));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(logs::pump(stderr, log));
        }
        let (signals, inbox) = mpsc::channel(4);
        let group = self.cgroup.clone();
        tokio::spawn(async move {
            let status = attend(child, inbox).await;
            // Children that outlived it would keep its addresses busy.
            let _ = cgroup::kill(&group);
            on_exit(status);
        });
        Ok(Process {
            signals,
            cgroup: self.cgroup.clone(),
        })
    }

    /// Runs a command to its end: `Ok` says whether its exit code was 0. It is killed after `timeout`.
    pub async fn run(&self, timeout: Duration) -> io::Result<bool> {
        let mut command = self.command()?;
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        match tokio::time::timeout(timeout, child.wait()).await {
            Ok(status) => Ok(status?.success()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn attend(mut child: Child, mut inbox: mpsc::Receiver<Signal>) -> io::Result<ExitStatus> {
    loop {
        tokio::select! {
            status = child.wait() => return status,
            Some(signal) = inbox.recv() => {
                if let Some(pid) = child.id() {
                    // It may be ending right now: then there is nobody to tell.
                    let _ = kill(Pid::from_raw(pid as i32), signal);
                }
            }
        }
    }
}

/// A container's process that runs.
#[derive(Clone, Debug)]
pub struct Process {
    signals: mpsc::Sender<Signal>,
    cgroup: PathBuf,
}

impl Process {
    /// Tells the process to end.
    pub fn terminate(&self) {
        // A full queue means that it was told before.
        let _ = self.signals.try_send(Signal::SIGTERM);
    }

    /// Kills the process and all that it started.
    pub fn kill(&self) -> io::Result<()> {
        cgroup::kill(&self.cgroup)
    }
}

/// The exit code as Kubernetes shows it, and the signal.
pub fn exit_code(status: &io::Result<ExitStatus>) -> (i32, Option<i32>) {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => (code, None),
            (None, Some(signal)) => (128 + signal, Some(signal)),
            (None, None) => (255, None),
        },
        Err(_) => (255, None),
    }
}
