//! Carries out one pod's life: asks [`super::lifecycle`] what to do, does it, and shows the result.
//!
//! One task owns the pod's state. What takes time runs in tasks of its own and comes back as a `Happening`; each
//! carries the number of the container's run, so that what belongs to an earlier run is ignored. The status is written
//! before and after the actions that follow from a happening: a container that ended is unready at once, even if it
//! is started again right away.

mod actions;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::container::{Launch, Process};
use super::lifecycle::{self, Event, Network, PodState, PodView, Run, Time};
use super::node::Node;
use super::probe::{Health, Kind};
use super::spec;
use super::status::{ContainerFacts, Exit, PodFacts, pod_status};

/// A status that could not be written is tried again after this time.
const STATUS_RETRY: Duration = Duration::from_millis(500);

/// What the node's watch says about the pod.
#[derive(Debug)]
pub enum Message {
    /// The object is there or has changed.
    Changed(Box<Pod>),
    /// The object is gone.
    Gone,
}

/// What comes back from tasks.
#[derive(Debug)]
enum Happening {
    NetworkUp(Vec<IpAddr>),
    NetworkFailed(String),
    NetworkGone,
    RemoveFailed(String),
    Exited {
        at: usize,
        run: u64,
        code: i32,
        signal: Option<i32>,
    },
    PreStopDone {
        at: usize,
        run: u64,
        result: Result<(), String>,
    },
    Probed {
        at: usize,
        run: u64,
        kind: Kind,
        result: Result<(), String>,
    },
    ObjectGone,
    ObjectFailed(String),
}

/// What belongs to one container beside its lifecycle.
#[derive(Debug, Default)]
struct Part {
    run: u64,
    process: Option<Process>,
    launch: Launch,
    health: Health,
}

struct Worker {
    node: Arc<Node>,
    pod: Pod,
    gone: bool,
    view: PodView,
    state: PodState,
    facts: PodFacts,
    parts: Vec<Part>,
    epoch: Instant,
    happenings: mpsc::UnboundedSender<Happening>,
    written: Option<PodStatus>,
    write_again: Option<Time>,
}

/// Runs the pod until nothing of it is left.
pub async fn run(node: Arc<Node>, pod: Pod, mut inbox: mpsc::Receiver<Message>) {
    // Bounded by what runs: each task of the pod sends one happening.
    let (happenings, mut news) = mpsc::unbounded_channel();
    let mut network_ready = node.network_ready();
    let mut worker = Worker::new(node, pod, happenings);
    loop {
        worker.view = spec::view(&worker.pod, worker.gone, *network_ready.borrow_and_update());
        worker.state.observe(&worker.view, worker.now());
        worker.write_status().await;
        worker.act().await;
        worker.write_status().await;
        if worker.state.is_over() {
            return worker.forget();
        }
        let wake = worker.epoch + worker.next_look().unwrap_or(Duration::from_secs(3600));
        tokio::select! {
            message = inbox.recv() => match message {
                Some(Message::Changed(pod)) => worker.pod = *pod,
                Some(Message::Gone) => worker.gone = true,
                // The supervisor is ending, and the sandbox with it.
                None => return,
            },
            Some(happening) = news.recv() => worker.on(happening).await,
            _ = network_ready.changed() => {}
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

impl Worker {
    fn new(node: Arc<Node>, pod: Pod, happenings: mpsc::UnboundedSender<Happening>) -> Self {
        let view = spec::view(&pod, false, false);
        let facts = |(container, _): (&Container, bool)| ContainerFacts {
            name: container.name.clone(),
            image: container.image.clone().unwrap_or_default(),
            ..ContainerFacts::default()
        };
        let containers: Vec<ContainerFacts> = spec::containers(&pod).into_iter().map(facts).collect();
        Self {
            state: PodState::new(&view),
            view,
            gone: false,
            parts: containers.iter().map(|_| Part::default()).collect(),
            facts: PodFacts {
                host_ip: node.plan.address.to_string(),
                started_at: Some(Timestamp::now()),
                containers,
                ..PodFacts::default()
            },
            node,
            pod,
            epoch: Instant::now(),
            happenings,
            written: None,
            write_again: None,
        }
    }

    fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.node.client.clone(), self.namespace())
    }

    fn next_look(&mut self) -> Option<Time> {
        let now = self.now();
        let probes = self
            .parts
            .iter_mut()
            .filter(|part| part.process.is_some())
            .map(|part| part.health.next_at());
        let probe = probes.flatten().min();
        [lifecycle::next_look(&self.state, now), probe, self.write_again]
            .into_iter()
            .flatten()
            .min()
    }

    fn tell(&self) -> impl Fn(Happening) + Send + 'static {
        let happenings = self.happenings.clone();
        // Nobody listens any more only when the pod is over.
        move |happening| drop(happenings.send(happening))
    }

    /// Does all there is to do now.
    async fn act(&mut self) {
        loop {
            let actions = lifecycle::step(&self.view, &self.state, self.now());
            if actions.is_empty() {
                break;
            }
            for action in actions {
                debug!(pod = self.name(), ?action, "doing");
                self.state.begin(action, self.now());
                self.perform(action).await;
            }
        }
        self.probe();
    }

    async fn on(&mut self, happening: Happening) {
        let event = match happening {
            Happening::NetworkUp(ips) => {
                self.facts.ips = ips.iter().map(IpAddr::to_string).collect();
                self.facts.network_error = None;
                self.publish_handle();
                Event::NetworkUp
            }
            Happening::NetworkFailed(message) => {
                self.node.event(&self.pod, "FailedCreatePodSandBox", &message);
                self.facts.network_error = Some(message);
                Event::NetworkFailed
            }
            Happening::NetworkGone => Event::NetworkGone,
            Happening::RemoveFailed(message) => {
                self.node.event(&self.pod, "FailedKillPod", &message);
                Event::RemoveFailed
            }
            Happening::Exited {
                at,
                run,
                code,
                signal,
            } => {
                if run != self.parts[at].run {
                    return;
                }
                self.on_exit(at, code, signal);
                Event::Exited {
                    container: at,
                    success: code == 0,
                }
            }
            Happening::PreStopDone { at, run, result } => {
                if let Err(message) = result {
                    self.node.event(&self.pod, "FailedPreStopHook", &message);
                }
                if run != self.parts[at].run {
                    return;
                }
                Event::PreStopDone(at)
            }
            Happening::Probed {
                at,
                run,
                kind,
                result,
            } => {
                if run != self.parts[at].run || self.parts[at].process.is_none() {
                    return;
                }
                match self.on_probe(at, kind, result) {
                    Some(event) => event,
                    None => return,
                }
            }
            Happening::ObjectGone => Event::ObjectGone,
            Happening::ObjectFailed(message) => {
                warn!(pod = self.name(), message, "cannot delete the pod's object");
                Event::ObjectFailed
            }
        };
        self.state.on(&self.view, event, self.now());
    }

    fn on_exit(&mut self, at: usize, code: i32, signal: Option<i32>) {
        self.parts[at].process = None;
        let name = &self.facts.containers[at].name;
        self.node
            .pods
            .set_running(&self.node.plan.cluster, &self.pod, name, false);
        let known = &mut self.facts.containers[at];
        let started_at = known.started_at.take().unwrap_or_else(Timestamp::now);
        known.last_exit = Some(Exit {
            code,
            signal,
            started_at,
            finished_at: Timestamp::now(),
        });
    }

    fn on_probe(&mut self, at: usize, kind: Kind, result: Result<(), String>) -> Option<Event> {
        let first_failure = self.parts[at].health.on_result(kind, result.is_ok());
        if let (Err(message), true) = (result, first_failure) {
            self.node.event(
                &self.pod,
                "Unhealthy",
                &format!("{kind:?} probe failed: {message}"),
            );
        }
        self.parts[at]
            .health
            .is_unhealthy()
            .then_some(Event::Unhealthy(at))
    }

    /// Writes the status when it differs from the one that was written last.
    async fn write_status(&mut self) {
        if self.gone || self.state.is_over() {
            return;
        }
        for (at, part) in self.parts.iter().enumerate() {
            let running = matches!(self.state.containers[at].run, Run::Running { .. });
            self.facts.containers[at].started = running && part.health.is_started();
            self.facts.containers[at].ready = running && part.health.is_ready();
        }
        let base = Pod {
            status: self.written.clone().or_else(|| self.pod.status.clone()),
            ..self.pod.clone()
        };
        let status = pod_status(&base, &self.view, &self.state, &self.facts, Timestamp::now());
        if self.written.as_ref() == Some(&status) {
            return;
        }
        let patch = json!({"metadata": {"uid": self.uid()}, "status": status});
        match self
            .api()
            .patch_status(self.name(), &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Ok(_) => {
                self.written = Some(status);
                self.write_again = None;
            }
            // Deleted meanwhile: the watch says so as well.
            Err(kube::Error::Api(response)) if response.code == 404 || response.code == 409 => {
                debug!(
                    pod = self.name(),
                    code = response.code,
                    "the status was not taken"
                );
                self.written = Some(status);
                self.write_again = None;
            }
            Err(error) => {
                warn!(pod = self.name(), %error, "cannot write the status");
                self.write_again = Some(self.now() + STATUS_RETRY);
            }
        }
    }

    /// The pod is over: nothing of it stays.
    fn forget(&self) {
        debug_assert!(!matches!(self.state.network, Network::Up { .. }));
        self.node.pods.forget(&self.node.plan.cluster, &self.pod);
        // Its cgroup was never made, or went with the network; what cannot be removed goes with the sandbox.
        let _ = std::fs::remove_dir_all(self.node.sandbox.pod_dir(self.uid()));
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
