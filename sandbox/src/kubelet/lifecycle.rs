//! The life of a pod as decisions.
//!
//! In: what the pod's object asks for ([`PodView`]), what is so ([`PodState`]), the time since the pod was first seen.
//! Out: what to do now ([`step`]) and when to look again ([`next_look`]). The shell calls [`PodState::begin`] for each
//! action that it takes up and [`PodState::on`] for each thing that happened.
//!
//! Invariants: nothing is started once the pod is to end; the network goes only when no container runs; the object
//! goes last; a container ends within its grace period whatever its hooks do.

use std::time::Duration;

use crate::backoff::Backoff;

/// Time since the pod was first seen.
pub type Time = Duration;

/// When ended containers are started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Always.
    Always,
    /// When they failed.
    OnFailure,
    /// Never.
    Never,
}

/// What a pod's object asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Init containers in order, then the others.
    pub containers: Vec<ContainerView>,
    /// When ended containers are started again.
    pub restart: RestartPolicy,
    /// The time that containers have to end.
    pub grace: Duration,
    /// The pod is to end, within this time from when that was first seen.
    pub deletion: Option<Duration>,
    /// Whether pods can be attached to the node's network now.
    pub network_ready: bool,
}

/// What is asked for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerView {
    /// It runs to its end before the next one starts.
    pub init: bool,
    /// It has something to do before it is told to end.
    pub pre_stop: bool,
}

/// The pod's network namespace and its attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Nothing is there; not tried again before this time.
    Absent {
        /// When it may be tried.
        not_before: Time,
    },
    /// It is being made.
    Creating,
    /// It is there; not removed before this time (after a removal that failed).
    Up {
        /// When it may be removed.
        not_before: Time,
    },
    /// It is being removed.
    Removing,
    /// It is gone for good.
    Removed,
}

/// A container's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// To be started, not before this time.
    Waiting {
        /// When it may be started.
        not_before: Time,
    },
    /// It runs.
    Running {
        /// Since when.
        since: Time,
    },
    /// It ended and stays so.
    Exited {
        /// Whether its exit code was 0.
        success: bool,
    },
}

/// How far the ending of a running container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Running,
    PreStop,
    PreStopDone,
    Terminated,
    Killed,
}

/// The state of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerState {
    /// Its process.
    pub run: Run,
    backoff: Backoff,
    /// It is to end by then.
    stop_by: Option<Time>,
    stage: Stage,
}

/// The state of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodState {
    /// Its network.
    pub network: Network,
    /// Its containers, in the view's order.
    pub containers: Vec<ContainerState>,
    network_backoff: Backoff,
    /// The pod is to end by then.
    end_by: Option<Time>,
    object: Object,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Object {
    Present { not_before: Time },
    Removing,
    Removed,
}

/// What to do. Containers are named by their place in the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make the namespace and attach it.
    CreateNetwork,
    /// Detach and remove the namespace.
    RemoveNetwork,
    /// Start the container's process.
    Start(usize),
    /// Run the container's preStop hook.
    PreStop(usize),
    /// Tell the container to end (SIGTERM).
    Terminate(usize),
    /// Kill the container and all that it started.
    Kill(usize),
    /// Delete the pod's object.
    RemoveObject,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The network is there.
    NetworkUp,
    /// The network could not be made; nothing of it is left.
    NetworkFailed,
    /// The network is gone.
    NetworkGone,
    /// The network could not be removed.
    RemoveFailed,
    /// A container's process ended, or could not be started.
    Exited {
        /// Which.
        container: usize,
        /// Whether with code 0.
        success: bool,
    },
    /// A container's preStop hook is done, well or not.
    PreStopDone(usize),
    /// A container's liveness or startup probe gave up.
    Unhealthy(usize),
    /// The object is gone.
    ObjectGone,
    /// The object could not be deleted.
    ObjectFailed,
}

/// The pod's phase, as Kubernetes names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not all containers have been started.
    Pending,
    /// At least one container runs or is started again.
    Running,
    /// All containers ended with code 0.
    Succeeded,
    /// All containers ended, at least one not with code 0.
    Failed,
}

/// How long to wait before an object that could not be deleted is tried again.
const OBJECT_RETRY: Duration = Duration::from_millis(500);

impl PodState {
    /// A pod of which nothing is there.
    pub fn new(view: &PodView) -> Self {
        let container = ContainerState {
            run: Run::Waiting {
                not_before: Time::ZERO,
            },
            backoff: Backoff::container(),
            stop_by: None,
            stage: Stage::Running,
        };
        Self {
            network: Network::Absent {
                not_before: Time::ZERO,
            },
            containers: vec![container; view.containers.len()],
            network_backoff: Backoff::network(),
            end_by: None,
            object: Object::Present {
                not_before: Time::ZERO,
            },
        }
    }

    /// Takes note of a changed object: the pod may be to end now, or sooner than before.
    pub fn observe(&mut self, view: &PodView, now: Time) {
        let Some(grace) = view.deletion else { return };
        let end_by = self.end_by.map_or(now + grace, |before| before.min(now + grace));
        self.end_by = Some(end_by);
        for container in &mut self.containers {
            container.stop_by = Some(container.stop_by.map_or(end_by, |before| before.min(end_by)));
        }
    }

    /// Whether nothing is left to do, ever.
    pub fn is_over(&self) -> bool {
        self.object == Object::Removed
    }

    /// Whether the pod is ending.
    pub fn is_ending(&self) -> bool {
        self.end_by.is_some()
    }

    /// Records that `action` is being done.
    pub fn begin(&mut self, action: Action, now: Time) {
        match action {
            Action::CreateNetwork => self.network = Network::Creating,
            Action::RemoveNetwork => self.network = Network::Removing,
            Action::RemoveObject => self.object = Object::Removing,
            Action::Start(at) => {
                let container = &mut self.containers[at];
                container.run = Run::Running { since: now };
                container.stage = Stage::Running;
            }
            Action::PreStop(at) => self.containers[at].stage = Stage::PreStop,
            Action::Terminate(at) => self.containers[at].stage = Stage::Terminated,
            Action::Kill(at) => self.containers[at].stage = Stage::Killed,
        }
    }

    /// Records what happened.
    pub fn on(&mut self, view: &PodView, event: Event, now: Time) {
        match event {
            Event::NetworkUp => {
                self.network = Network::Up {
                    not_before: Time::ZERO,
                }
            }
            Event::NetworkFailed => {
                self.network = Network::Absent {
                    not_before: now + self.network_backoff.after_run(Duration::ZERO),
                };
            }
            Event::NetworkGone => self.network = Network::Removed,
            Event::RemoveFailed => {
                self.network = Network::Up {
                    not_before: now + self.network_backoff.after_run(Duration::ZERO),
                };
            }
            Event::Exited { container, success } => self.on_exit(view, container, success, now),
            Event::PreStopDone(at) => {
                if self.containers[at].stage == Stage::PreStop {
                    self.containers[at].stage = Stage::PreStopDone;
                }
            }
            Event::Unhealthy(at) => {
                let container = &mut self.containers[at];
                if matches!(container.run, Run::Running { .. }) && container.stop_by.is_none() {
                    container.stop_by = Some(now + view.grace);
                }
            }
            Event::ObjectGone => self.object = Object::Removed,
            Event::ObjectFailed => {
                self.object = Object::Present {
                    not_before: now + OBJECT_RETRY,
                }
            }
        }
    }

    fn on_exit(&mut self, view: &PodView, at: usize, success: bool, now: Time) {
        let ending = self.end_by.is_some();
        let container = &mut self.containers[at];
        let ran_for = match container.run {
            Run::Running { since } => now.saturating_sub(since),
            _ => Duration::ZERO,
        };
        container.stage = Stage::Running;
        container.stop_by = self.end_by;
        let again = match (view.restart, view.containers[at].init) {
            (RestartPolicy::Never, _) => false,
            (RestartPolicy::Always, false) => true,
            (_, _) => !success,
        };
        container.run = if again && !ending {
            Run::Waiting {
                not_before: now + container.backoff.after_run(ran_for),
            }
        } else {
            Run::Exited { success }
        };
    }

    fn is_running(&self) -> bool {
        self.containers
            .iter()
            .any(|container| matches!(container.run, Run::Running { .. }))
    }

    /// The phase that the API shows.
    pub fn phase(&self, view: &PodView) -> Phase {
        let runs = || view.containers.iter().zip(&self.containers);
        let failed = |state: &ContainerState| state.run == Run::Exited { success: false };
        if runs().any(|(view, state)| view.init && failed(state)) {
            return Phase::Failed;
        }
        let mut main = runs()
            .filter(|(view, _)| !view.init)
            .map(|(_, state)| state)
            .peekable();
        if main.peek().is_some() && main.clone().all(|state| matches!(state.run, Run::Exited { .. })) {
            return if main.any(failed) {
                Phase::Failed
            } else {
                Phase::Succeeded
            };
        }
        // A container that waits to be started for the first time has not used its backoff.
        let unborn = |state: &ContainerState| {
            matches!(state.run, Run::Waiting { .. }) && state.backoff == Backoff::container()
        };
        if main.any(unborn) {
            Phase::Pending
        } else {
            Phase::Running
        }
    }

    /// Whether all init containers are done.
    pub fn is_initialized(&self, view: &PodView) -> bool {
        let mut init = view
            .containers
            .iter()
            .zip(&self.containers)
            .filter(|(view, _)| view.init);
        init.all(|(_, state)| state.run == Run::Exited { success: true })
    }
}

/// What to do now.
pub fn step(view: &PodView, state: &PodState, now: Time) -> Vec<Action> {
    if state.end_by.is_some() {
        return end(view, state, now);
    }
    let over = matches!(state.phase(view), Phase::Succeeded | Phase::Failed) && !state.is_running();
    match state.network {
        // A pod that is over gives its addresses back; its object stays until somebody deletes it.
        Network::Up { not_before } if over && now >= not_before => vec![Action::RemoveNetwork],
        Network::Absent { not_before } if view.network_ready && now >= not_before => {
            vec![Action::CreateNetwork]
        }
        Network::Up { .. } if !over => run(view, state, now),
        _ => Vec::new(),
    }
}

fn run(view: &PodView, state: &PodState, now: Time) -> Vec<Action> {
    let mut actions = stops(view, state, now);
    let due = |at: usize| match state.containers[at].run {
        Run::Waiting { not_before } if now >= not_before => Some(Action::Start(at)),
        _ => None,
    };
    let (init, main): (Vec<usize>, Vec<usize>) =
        (0..view.containers.len()).partition(|at| view.containers[*at].init);
    match init
        .into_iter()
        .find(|at| state.containers[*at].run != Run::Exited { success: true })
    {
        Some(current) => actions.extend(due(current)),
        None => actions.extend(main.into_iter().filter_map(due)),
    }
    actions
}

fn end(view: &PodView, state: &PodState, now: Time) -> Vec<Action> {
    if state.is_running() {
        return stops(view, state, now);
    }
    match (&state.network, &state.object) {
        (Network::Up { not_before }, _) if now >= *not_before => vec![Action::RemoveNetwork],
        (Network::Absent { .. } | Network::Removed, Object::Present { not_before }) if now >= *not_before => {
            vec![Action::RemoveObject]
        }
        _ => Vec::new(),
    }
}

/// The next step for each container that runs and is to end.
fn stops(view: &PodView, state: &PodState, now: Time) -> Vec<Action> {
    let next = |(at, container): (usize, &ContainerState)| {
        let (Run::Running { .. }, Some(by)) = (&container.run, container.stop_by) else {
            return None;
        };
        match container.stage {
            Stage::Killed => None,
            _ if now >= by => Some(Action::Kill(at)),
            Stage::Running if view.containers[at].pre_stop => Some(Action::PreStop(at)),
            Stage::Running | Stage::PreStopDone => Some(Action::Terminate(at)),
            Stage::PreStop | Stage::Terminated => None,
        }
    };
    state.containers.iter().enumerate().filter_map(next).collect()
}

/// When [`step`] may have something new to do although nothing happens; `None` is never.
pub fn next_look(state: &PodState, now: Time) -> Option<Time> {
    let network = match state.network {
        Network::Absent { not_before } | Network::Up { not_before } => Some(not_before),
        _ => None,
    };
    let object = match state.object {
        Object::Present { not_before } => Some(not_before),
        _ => None,
    };
    let containers = state.containers.iter().flat_map(|container| {
        let start = match container.run {
            Run::Waiting { not_before } => Some(not_before),
            _ => None,
        };
        [start, container.stop_by]
    });
    [network, object]
        .into_iter()
        .chain(containers)
        .flatten()
        .filter(|at| *at > now)
        .min()
}

#[cfg(test)]
mod tests;
