//! A pod's status as the API shows it.
//!
//! Pure: from the pod's object, the lifecycle's state, what is known of each container, and the time of day.
//! A condition keeps its transition time while its status stays; a container that does not run is never ready.

use k8s_openapi::api::core::v1::{
    ContainerState as KubeState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time as KubeTime;
use k8s_openapi::jiff::Timestamp;

use super::lifecycle::{Network, Phase, PodState, PodView, Run};

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// When it had started.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
}

/// What is known of a container beside its lifecycle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerFacts {
    /// The container's name.
    pub name: String,
    /// What the pod names as its image.
    pub image: String,
    /// Identifies the current or last run.
    pub id: Option<String>,
    /// When the current run started.
    pub started_at: Option<Timestamp>,
    /// How the last run ended.
    pub last_exit: Option<Exit>,
    /// How often it was started again.
    pub restarts: i32,
    /// Whether its startup probe passed.
    pub started: bool,
    /// Whether it can serve, by its probes.
    pub ready: bool,
    /// Why it could not be started.
    pub refused: Option<String>,
}

/// What is known of a pod beside its lifecycle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its addresses.
    pub ips: Vec<String>,
    /// Its node's address.
    pub host_ip: String,
    /// When the node first saw it.
    pub started_at: Option<Timestamp>,
    /// Its containers, in the view's order.
    pub containers: Vec<ContainerFacts>,
    /// Why its network could not be made, the last time that was tried.
    pub network_error: Option<String>,
}

/// The status to show at `now`.
pub fn pod_status(
    pod: &Pod,
    view: &PodView,
    state: &PodState,
    facts: &PodFacts,
    now: Timestamp,
) -> PodStatus {
    let previous = pod.status.clone().unwrap_or_default();
    let phase = state.phase(view);
    let statuses = |init: bool| -> Vec<ContainerStatus> {
        (0..view.containers.len())
            .filter(|at| view.containers[*at].init == init)
            .map(|at| container_status(state, facts, at, init))
            .collect()
    };
    let (init, main) = (statuses(true), statuses(false));
    let mut conditions = previous.conditions.clone().unwrap_or_default();
    for (kind, holds, reason, message) in conditions_now(view, state, facts, &main) {
        set_condition(&mut conditions, kind, holds, reason, message, now);
    }
    PodStatus {
        phase: Some(format!("{phase:?}")),
        conditions: Some(conditions),
        host_ip: Some(facts.host_ip.clone()),
        host_ips: Some(vec![HostIP {
            ip: facts.host_ip.clone(),
        }]),
        pod_ip: facts.ips.first().cloned(),
        pod_ips: (!facts.ips.is_empty())
            .then(|| facts.ips.iter().map(|ip| PodIP { ip: ip.clone() }).collect()),
        start_time: facts.started_at.map(KubeTime).or(previous.start_time),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(main),
        qos_class: previous.qos_class.or_else(|| Some("BestEffort".into())),
        ..PodStatus::default()
    }
}

type ConditionNow = (&'static str, bool, Option<&'static str>, Option<String>);

fn conditions_now(
    view: &PodView,
    state: &PodState,
    facts: &PodFacts,
    main: &[ContainerStatus],
) -> [ConditionNow; 5] {
    let over = matches!(state.phase(view), Phase::Succeeded | Phase::Failed);
    let attached = matches!(state.network, Network::Up { .. });
    let unready: Vec<&str> = main
        .iter()
        .filter(|status| !status.ready)
        .map(|status| status.name.as_str())
        .collect();
    let ready = unready.is_empty() && !over;
    let (reason, message) = match (ready, over) {
        (true, _) => (None, None),
        (false, true) => (Some("PodCompleted"), None),
        (false, false) => (
            Some("ContainersNotReady"),
            Some(format!("containers with unready status: [{}]", unready.join(" "))),
        ),
    };
    let network_message = facts.network_error.clone().filter(|_| !attached);
    let network_reason = network_message.is_some().then_some("FailedCreatePodSandBox");
    let initialized = state.is_initialized(view);
    [
        ("PodScheduled", true, None, None),
        (
            "PodReadyToStartContainers",
            attached,
            network_reason,
            network_message,
        ),
        (
            "Initialized",
            initialized,
            (!initialized).then_some("ContainersNotInitialized"),
            None,
        ),
        ("ContainersReady", ready, reason, message.clone()),
        ("Ready", ready, reason, message),
    ]
}

/// Sets a condition; its transition time moves only with its status.
pub fn set_condition(
    conditions: &mut Vec<PodCondition>,
    kind: &str,
    holds: bool,
    reason: Option<&str>,
    message: Option<String>,
    now: Timestamp,
) {
    let status = if holds { "True" } else { "False" };
    let old = conditions.iter().find(|condition| condition.type_ == kind);
    let since = old
        .filter(|old| old.status == status)
        .and_then(|old| old.last_transition_time.clone())
        .unwrap_or(KubeTime(now));
    let fresh = PodCondition {
        type_: kind.into(),
        status: status.into(),
        reason: reason.map(str::to_owned),
        message,
        last_transition_time: Some(since),
        ..PodCondition::default()
    };
    match conditions.iter_mut().find(|condition| condition.type_ == kind) {
        Some(old) => *old = fresh,
        None => conditions.push(fresh),
    }
}

fn container_status(state: &PodState, facts: &PodFacts, at: usize, init: bool) -> ContainerStatus {
    let (run, known) = (&state.containers[at].run, &facts.containers[at]);
    let running = matches!(run, Run::Running { .. });
    let ended = known
        .last_exit
        .as_ref()
        .map(|exit| terminated(exit, known.id.clone()));
    let (now, last) = match run {
        Run::Running { .. } => {
            let started_at = known.started_at.map(KubeTime);
            (
                KubeState {
                    running: Some(ContainerStateRunning { started_at }),
                    ..KubeState::default()
                },
                ended,
            )
        }
        Run::Exited { .. } => (
            KubeState {
                terminated: ended,
                ..KubeState::default()
            },
            None,
        ),
        Run::Waiting { .. } => {
            let (reason, message) = match (&known.refused, &known.last_exit) {
                (Some(message), _) => ("CreateContainerConfigError", Some(message.clone())),
                (None, Some(_)) => (
                    "CrashLoopBackOff",
                    Some(format!(
                        "the container ended and is started again: {}",
                        known.name
                    )),
                ),
                (None, None) => ("ContainerCreating", facts.network_error.clone()),
            };
            let waiting = ContainerStateWaiting {
                reason: Some(reason.into()),
                message,
            };
            (
                KubeState {
                    waiting: Some(waiting),
                    ..KubeState::default()
                },
                ended,
            )
        }
    };
    ContainerStatus {
        name: known.name.clone(),
        image: known.image.clone(),
        container_id: known.id.clone(),
        ready: if init {
            *run == Run::Exited { success: true }
        } else {
            running && known.ready
        },
        started: Some(running && known.started),
        restart_count: known.restarts,
        state: Some(now),
        last_state: last.map(|exit| KubeState {
            terminated: Some(exit),
            ..KubeState::default()
        }),
        ..ContainerStatus::default()
    }
}

fn terminated(exit: &Exit, id: Option<String>) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: exit.code,
        signal: exit.signal,
        reason: Some(if exit.code == 0 { "Completed" } else { "Error" }.into()),
        started_at: Some(KubeTime(exit.started_at)),
        finished_at: Some(KubeTime(exit.finished_at)),
        container_id: id,
        ..ContainerStateTerminated::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::lifecycle::{Action, ContainerView, Event, RestartPolicy, Time};
    use super::*;

    fn view() -> PodView {
        PodView {
            containers: vec![ContainerView {
                init: false,
                pre_stop: false,
            }],
            restart: RestartPolicy::Always,
            grace: Duration::from_secs(30),
            deletion: None,
            network_ready: true,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn facts(ready: bool) -> PodFacts {
        let container = ContainerFacts {
            name: "c".into(),
            ready,
            started: true,
            ..ContainerFacts::default()
        };
        PodFacts {
            ips: vec!["10.1.1.5".into()],
            containers: vec![container],
            ..PodFacts::default()
        }
    }

    fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
        status
            .conditions
            .iter()
            .flatten()
            .find(|condition| condition.type_ == kind)
            .unwrap()
    }

    fn running() -> PodState {
        let mut state = PodState::new(&view());
        state.on(&view(), Event::NetworkUp, Time::ZERO);
        state.begin(Action::Start(0), Time::ZERO);
        state
    }

    #[test]
    fn a_ready_pod_is_ready_and_keeps_its_transition_times() {
        let mut pod = Pod::default();
        let status = pod_status(&pod, &view(), &running(), &facts(true), at(100));
        assert_eq!(status.phase.as_deref(), Some("Running"));
        assert_eq!(condition(&status, "Ready").status, "True");
        pod.status = Some(status);
        let later = pod_status(&pod, &view(), &running(), &facts(true), at(200));
        assert_eq!(
            condition(&later, "Ready").last_transition_time,
            Some(KubeTime(at(100)))
        );
        let lost = pod_status(&pod, &view(), &running(), &facts(false), at(300));
        assert_eq!(
            condition(&lost, "Ready").last_transition_time,
            Some(KubeTime(at(300)))
        );
        assert_eq!(
            condition(&lost, "Ready").reason.as_deref(),
            Some("ContainersNotReady")
        );
    }

    #[test]
    fn a_container_that_ended_is_unready_whatever_its_probes_said() {
        let mut state = running();
        state.on(
            &view(),
            Event::Exited {
                container: 0,
                success: false,
            },
            Time::ZERO,
        );
        let status = pod_status(&Pod::default(), &view(), &state, &facts(true), at(1));
        assert_eq!(condition(&status, "Ready").status, "False");
        assert!(!status.container_statuses.unwrap()[0].ready);
    }

    #[test]
    fn a_network_that_fails_is_seen_in_the_condition_and_the_container() {
        let mut facts = facts(false);
        facts.network_error = Some("no address left".into());
        let status = pod_status(&Pod::default(), &view(), &PodState::new(&view()), &facts, at(1));
        let shown = condition(&status, "PodReadyToStartContainers");
        assert_eq!(
            (shown.status.as_str(), shown.message.as_deref()),
            ("False", Some("no address left"))
        );
        assert_eq!(status.phase.as_deref(), Some("Pending"));
    }
}
