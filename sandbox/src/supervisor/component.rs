//! One supervised process: started, watched, started again when it ends, and moved by hand for tests and the demo.
//!
//! A task owns the process; commands come through a channel and are answered when they are done. A process that ends
//! by itself is started again with backoff; one that was stopped on purpose stays down.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::control::{Action, ComponentState, ComponentStatus};
use crate::http_get;
use crate::plan::ComponentPlan;
use crate::{cgroup, netns};

/// How long a process has between SIGTERM and SIGKILL.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long a readiness check may take.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// What the task tells about the process.
#[derive(Clone, Copy, Debug)]
struct Seen {
    state: ComponentState,
    pid: Option<u32>,
    restarts: u32,
}

struct Order {
    action: Action,
    reply: oneshot::Sender<anyhow::Result<()>>,
}

/// A handle to a supervised process.
#[derive(Clone, Debug)]
pub struct Component {
    plan: ComponentPlan,
    orders: mpsc::Sender<Order>,
    seen: watch::Receiver<Seen>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.action.fmt(f)
    }
}

impl Component {
    /// Starts the task that owns the process, and the process.
    pub fn spawn(plan: ComponentPlan) -> Self {
        let (orders, inbox) = mpsc::channel(8);
        let (tell, seen) = watch::channel(Seen {
            state: ComponentState::Stopped,
            pid: None,
            restarts: 0,
        });
        tokio::spawn(
            Keeper {
                plan: plan.clone(),
                tell,
                backoff: Backoff::component(),
                restarts: 0,
            }
            .run(inbox),
        );
        Self { plan, orders, seen }
    }

    /// What is run.
    pub fn plan(&self) -> &ComponentPlan {
        &self.plan
    }

    /// Whether it was stopped on purpose.
    pub fn is_stopped(&self) -> bool {
        self.seen.borrow().state == ComponentState::Stopped
    }

    /// How often it was started again after it had ended by itself.
    pub fn restarts(&self) -> u32 {
        self.seen.borrow().restarts
    }

    /// Does `action` and returns when it is done.
    pub async fn act(&self, action: Action) -> anyhow::Result<()> {
        let (reply, answer) = oneshot::channel();
        self.orders
            .send(Order { action, reply })
            .await
            .context("the supervisor is ending")?;
        answer.await.context("the supervisor is ending")?
    }

    /// Asks the readiness endpoint.
    pub async fn is_ready(&self) -> bool {
        if self.seen.borrow().state != ComponentState::Running {
            return false;
        }
        let get = http_get::Get {
            netns: Some(netns::path(&self.plan.place.netns)),
            address: self.plan.ready.address,
            path: self.plan.ready.path.into(),
            headers: Vec::new(),
        };
        matches!(http_get::status(get, READY_TIMEOUT).await, Ok(200))
    }

    /// The state, with the readiness of this moment.
    pub async fn status(&self) -> ComponentStatus {
        let ready = self.is_ready().await;
        let Seen { state, pid, restarts } = *self.seen.borrow();
        ComponentStatus {
            name: self.plan.name.clone(),
            state,
            pid,
            restarts,
            ready,
            log: self.plan.log.clone(),
        }
    }
}

/// Owns the process.
struct Keeper {
    plan: ComponentPlan,
    tell: watch::Sender<Seen>,
    backoff: Backoff,
    restarts: u32,
}

/// What follows when a process is no longer awaited.
enum Next {
    StartAt(Instant),
    StayDown,
    End,
}

impl Keeper {
    async fn run(mut self, mut inbox: mpsc::Receiver<Order>) {
        let mut next = Next::StartAt(Instant::now());
        loop {
            next = match next {
                Next::End => return,
                Next::StayDown => self.stay_down(&mut inbox).await,
                Next::StartAt(at) => match self.wait_until(at, &mut inbox).await {
                    Some(other) => other,
                    None => self.run_once(&mut inbox).await,
                },
            };
        }
    }

    fn tell(&self, state: ComponentState, pid: Option<u32>) {
        self.tell.send_replace(Seen {
            state,
            pid,
            restarts: self.restarts,
        });
    }

    async fn stay_down(&self, inbox: &mut mpsc::Receiver<Order>) -> Next {
        self.tell(ComponentState::Stopped, None);
        loop {
            let Some(Order { action, reply }) = inbox.recv().await else {
                return Next::End;
            };
            let (result, next) = match action {
                Action::Start | Action::Restart => (Ok(()), Some(Next::StartAt(Instant::now()))),
                Action::Stop => (Ok(()), None),
                _ => (
                    Err(anyhow::anyhow!("{} is stopped: start it first", self.plan.name)),
                    None,
                ),
            };
            let _ = reply.send(result);
            if let Some(next) = next {
                return next;
            }
        }
    }

    /// `None` when the time has come.
    async fn wait_until(&self, at: Instant, inbox: &mut mpsc::Receiver<Order>) -> Option<Next> {
        self.tell(ComponentState::Waiting, None);
        loop {
            let order = tokio::select! {
                () = sleep_until(at) => return None,
                order = inbox.recv() => order,
            };
            let Some(Order { action, reply }) = order else {
                return Some(Next::End);
            };
            let (result, next) = match action {
                Action::Start | Action::Restart => (Ok(()), Some(Next::StartAt(Instant::now()))),
                Action::Stop => (Ok(()), Some(Next::StayDown)),
                Action::Kill9 => (Ok(()), None),
                Action::Pause | Action::Resume => (
                    Err(anyhow::anyhow!(
                        "{} is not running: it is about to be started",
                        self.plan.name
                    )),
                    None,
                ),
            };
            let _ = reply.send(result);
            if next.is_some() {
                return next;
            }
        }
    }

    async fn run_once(&mut self, inbox: &mut mpsc::Receiver<Order>) -> Next {
        let started = Instant::now();
        let mut child = match start(&self.plan) {
            Ok(child) => child,
            Err(error) => {
                warn!(component = %self.plan.name, "cannot start: {error:#}");
                return self.again(started);
            }
        };
        let pid = child.id();
        info!(component = %self.plan.name, pid, "started");
        self.tell(ComponentState::Running, pid);
        loop {
            let order = tokio::select! {
                ended = child.wait() => {
                    warn!(component = %self.plan.name, pid, status = %describe(&ended), "ended");
                    return self.again(started);
                }
                order = inbox.recv() => order,
            };
            let Some(Order { action, reply }) = order else {
                return Next::End;
            };
            let (result, next) = self.on_order(action, &mut child, started).await;
            let _ = reply.send(result);
            if let Some(next) = next {
                return next;
            }
        }
    }

    async fn on_order(
        &mut self,
        action: Action,
        child: &mut Child,
        started: Instant,
    ) -> (anyhow::Result<()>, Option<Next>) {
        let pid = child.id();
        match action {
            Action::Start => (Ok(()), None),
            Action::Stop | Action::Restart => {
                let result = stop(child)
                    .await
                    .with_context(|| format!("cannot stop {}", self.plan.name));
                info!(component = %self.plan.name, pid, "stopped on purpose");
                let next = match action {
                    Action::Stop => Next::StayDown,
                    _ => Next::StartAt(Instant::now()),
                };
                // Whoever asked sees the new state at once.
                self.tell(ComponentState::Stopped, None);
                (result, Some(next))
            }
            Action::Kill9 => {
                let result = signal(child, Signal::SIGKILL);
                let _ = child.wait().await;
                info!(component = %self.plan.name, pid, "killed on purpose");
                let next = self.again(started);
                self.tell(ComponentState::Waiting, None);
                (result, Some(next))
            }
            Action::Pause => {
                self.tell(ComponentState::Paused, pid);
                (signal(child, Signal::SIGSTOP), None)
            }
            Action::Resume => {
                self.tell(ComponentState::Running, pid);
                (signal(child, Signal::SIGCONT), None)
            }
        }
    }

    fn again(&mut self, started: Instant) -> Next {
        self.restarts = self.restarts.saturating_add(1);
        Next::StartAt(Instant::now() + self.backoff.after_run(started.elapsed()))
    }
}

/// Starts the process in its cgroup and namespace; its output is added to its log.
fn start(plan: &ComponentPlan) -> anyhow::Result<Child> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&plan.log)
        .with_context(|| format!("cannot open {}", plan.log.display()))?;
    std::fs::create_dir_all(&plan.place.cgroup)
        .with_context(|| format!("cannot make the cgroup {}", plan.place.cgroup.display()))?;
    let mut command: Command = cgroup::enter(&plan.place.cgroup, Some(&netns::path(&plan.place.netns)));
    command.arg(&plan.program).args(&plan.args);
    // The components take their settings from the environment too: they get only what is meant for them.
    command.env_clear();
    for name in [
        "PATH",
        "HOME",
        "RUST_BACKTRACE",
        "ISTHMUS_LOG_LEVEL",
        "ISTHMUS_LOG_FORMAT",
    ] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let errors = log.try_clone().context("cannot share the log")?;
    command.stdin(Stdio::null()).stdout(log).stderr(errors);
    command
        .spawn()
        .with_context(|| format!("cannot run {}", plan.program.display()))
}

async fn stop(child: &mut Child) -> anyhow::Result<()> {
    signal(child, Signal::SIGTERM)?;
    // A frozen process sees SIGTERM only when it goes on.
    signal(child, Signal::SIGCONT)?;
    if tokio::time::timeout(STOP_PATIENCE, child.wait()).await.is_err() {
        signal(child, Signal::SIGKILL)?;
        child.wait().await?;
    }
    Ok(())
}

fn signal(child: &Child, signal: Signal) -> anyhow::Result<()> {
    // No ID: it has ended and was waited for, and there is nobody to tell.
    let Some(pid) = child.id() else { return Ok(()) };
    match kill(Pid::from_raw(pid as i32), signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => bail!("cannot send {signal}: {error}"),
    }
}

fn describe(ended: &std::io::Result<ExitStatus>) -> String {
    match ended {
        Ok(status) => status.to_string(),
        Err(error) => format!("unknown: {error}"),
    }
}
