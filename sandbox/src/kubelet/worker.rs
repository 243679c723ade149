//! Carries out one pod's life: asks [`lifecycle`](super::lifecycle) what to do, does it, and shows the result.
//!
//! One task owns the pod's state. What takes time runs in tasks of its own and comes back as a [`Happening`]; each
//! carries the number of the container's run, so that what belongs to an earlier run is ignored. The status is written
//! before and after the actions that follow from a happening: a container that ended is unready at once, even if it
//! is started again right away.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::container::{Launch, Process, exit_code};
use super::lifecycle::{self, Action, Event, Network, PodState, PodView, Run, Time};
use super::network::Attachment;
use super::node::Node;
use super::probe::{Health, Kind};
use super::prober::{self, Origin};
use super::status::{ContainerFacts, Exit, PodFacts, pod_status};
use super::{env, logs, spec};
use crate::control::PodHandle;
use crate::{cgroup, netns};

/// How long a pod's leftover processes may take to end.
const CGROUP_PATIENCE: Duration = Duration::from_secs(10);
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

    async fn perform(&mut self, action: Action) {
        match action {
            Action::CreateNetwork => self.create_network(),
            Action::RemoveNetwork => self.remove_network(),
            Action::Start(at) => {
                if let Err(message) = self.start(at).await {
                    self.node.event(&self.pod, "Failed", &message);
                    self.facts.containers[at].refused = Some(message);
                    let event = Event::Exited {
                        container: at,
                        success: false,
                    };
                    self.state.on(&self.view, event, self.now());
                }
            }
            Action::PreStop(at) => self.pre_stop(at),
            Action::Terminate(at) => {
                if let Some(process) = &self.parts[at].process {
                    process.terminate();
                }
            }
            Action::Kill(at) => {
                if let Some(Err(error)) = self.parts[at].process.as_ref().map(Process::kill) {
                    warn!(pod = self.name(), %error, "cannot kill a container");
                }
            }
            Action::RemoveObject => self.remove_object(),
        }
    }

    fn attachment(&self) -> Attachment {
        Attachment {
            netns: self.node.sandbox.pod_netns(self.uid()),
            container_id: self.uid().into(),
            namespace: self.namespace().into(),
            name: self.name().into(),
        }
    }

    fn netns(&self) -> PathBuf {
        if spec::is_host_network(&self.pod) {
            netns::path(&self.node.plan.netns)
        } else {
            netns::path(&self.node.sandbox.pod_netns(self.uid()))
        }
    }

    fn cgroup(&self) -> PathBuf {
        self.node.sandbox.pod_cgroup(&self.node.plan.name, self.uid())
    }

    fn create_network(&self) {
        let tell = self.tell();
        if spec::is_host_network(&self.pod) {
            return tell(Happening::NetworkUp(vec![IpAddr::V4(self.node.plan.address)]));
        }
        let (plugin, attachment) = (self.node.plugin.clone(), self.attachment());
        tokio::spawn(async move {
            tell(match plugin.add(&attachment).await {
                Ok(ips) => Happening::NetworkUp(ips),
                Err(error) => Happening::NetworkFailed(chain(&error)),
            });
        });
    }

    fn remove_network(&self) {
        let (plugin, attachment, group) = (self.node.plugin.clone(), self.attachment(), self.cgroup());
        let host_network = spec::is_host_network(&self.pod);
        let tell = self.tell();
        tokio::spawn(async move {
            let result = async {
                // Processes that commands of people started in the pod go with it.
                cgroup::remove(&group, CGROUP_PATIENCE)
                    .await
                    .map_err(|error| error.to_string())?;
                if host_network {
                    return Ok(());
                }
                plugin.remove(&attachment).await.map_err(|error| chain(&error))
            };
            tell(
                result
                    .await
                    .map_or_else(Happening::RemoveFailed, |()| Happening::NetworkGone),
            );
        });
    }

    fn remove_object(&self) {
        let tell = self.tell();
        if self.gone {
            return tell(Happening::ObjectGone);
        }
        let (api, name) = (self.api(), self.name().to_owned());
        let uid = Some(self.uid().to_owned());
        tokio::spawn(async move {
            let preconditions = Some(Preconditions {
                uid,
                resource_version: None,
            });
            let params = DeleteParams {
                preconditions,
                ..DeleteParams::default().grace_period(0)
            };
            tell(match api.delete(&name, &params).await {
                Ok(_) => Happening::ObjectGone,
                // Gone already, or another pod has its name now.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                    Happening::ObjectGone
                }
                Err(error) => Happening::ObjectFailed(error.to_string()),
            });
        });
    }

    async fn start(&mut self, at: usize) -> Result<(), String> {
        let part = &mut self.parts[at];
        part.run += 1;
        let run = part.run;
        if run > 1 {
            self.facts.containers[at].restarts += 1;
        }
        let container = spec::containers(&self.pod)[at].0.clone();
        let launch = self.launch(&container).await?;
        let pod_dir = self.node.sandbox.pod_dir(self.uid());
        std::fs::create_dir_all(&pod_dir)
            .map_err(|error| format!("cannot make {}: {error}", pod_dir.display()))?;
        let tell = self.tell();
        let process = launch.start(logs::file(&pod_dir, &container.name), move |status| {
            let (code, signal) = exit_code(&status);
            tell(Happening::Exited {
                at,
                run,
                code,
                signal,
            });
        });
        let process =
            process.map_err(|error| format!("cannot start `{}`: {error}", launch.argv.join(" ")))?;
        let period = spec::probe_period(&self.pod);
        let probe = |probe: &Option<_>| probe.as_ref().map(|probe| prober::spec(probe, period));
        let health = Health::new(
            probe(&container.startup_probe),
            probe(&container.readiness_probe),
            probe(&container.liveness_probe),
            self.now(),
        );
        let known = &mut self.facts.containers[at];
        known.refused = None;
        known.started_at = Some(Timestamp::now());
        known.id = Some(format!("sandbox://{}-{run}", container.name));
        self.node
            .pods
            .set_running(&self.node.plan.cluster, &self.pod, &container.name, true);
        self.parts[at] = Part {
            run,
            process: Some(process),
            launch,
            health,
        };
        self.publish_handle();
        Ok(())
    }

    async fn launch(&self, container: &Container) -> Result<Launch, String> {
        let services: Api<Service> = Api::namespaced(self.node.client.clone(), self.namespace());
        let services = services.list(&ListParams::default()).await;
        let services = services
            .map_err(|error| format!("cannot list services: {error}"))?
            .items;
        let facts = env::Facts {
            pod: &self.pod,
            pod_ips: &self.facts.ips,
            host_ip: &self.facts.host_ip,
            services: &services,
        };
        let env = env::environment(facts, container)?;
        Ok(Launch {
            argv: env::command_line(container, &env)?,
            env,
            directory: container.working_dir.clone().map(PathBuf::from),
            netns: self.netns(),
            cgroup: self.cgroup().join(&container.name),
        })
    }

    fn publish_handle(&self) {
        let env = self.parts.iter().rev().find(|part| part.process.is_some());
        let handle = PodHandle {
            netns: self.netns(),
            cgroup: self.cgroup().join("exec"),
            env: env.map(|part| part.launch.env.clone()).unwrap_or_default(),
            ips: self.facts.ips.clone(),
        };
        self.node.pods.publish(&self.node.plan.cluster, &self.pod, handle);
    }

    fn origin(&self) -> Option<Origin> {
        let pod_ip = self.facts.ips.first()?.parse().ok()?;
        Some(Origin {
            node_netns: netns::path(&self.node.plan.netns),
            pod_ip,
        })
    }

    fn pre_stop(&self, at: usize) {
        let tell = self.tell();
        let run = self.parts[at].run;
        let container = spec::containers(&self.pod)[at].0;
        let hook = container
            .lifecycle
            .as_ref()
            .and_then(|hooks| hooks.pre_stop.as_ref());
        let (Some(hook), Some(origin)) = (hook, self.origin()) else {
            return tell(Happening::PreStopDone {
                at,
                run,
                result: Ok(()),
            });
        };
        let check = prober::of_handler(hook, container, &origin);
        let (launch, timeout) = (self.parts[at].launch.clone(), self.view.grace);
        tokio::spawn(async move {
            let result = prober::run(check, launch, timeout).await;
            tell(Happening::PreStopDone { at, run, result });
        });
    }

    /// Starts the probes that are due.
    fn probe(&mut self) {
        let (now, origin, tell) = (self.now(), self.origin(), Arc::new(self.tell()));
        let Some(origin) = origin else { return };
        let containers = spec::containers(&self.pod);
        for (at, part) in self
            .parts
            .iter_mut()
            .enumerate()
            .filter(|(_, part)| part.process.is_some())
        {
            for (kind, timeout) in part.health.begin_due(now) {
                let container = containers[at].0;
                let probe = match kind {
                    Kind::Startup => &container.startup_probe,
                    Kind::Readiness => &container.readiness_probe,
                    Kind::Liveness => &container.liveness_probe,
                };
                let Some(probe) = probe else { continue };
                let check = prober::of_probe(probe, container, &origin);
                let (launch, run, tell) = (part.launch.clone(), part.run, Arc::clone(&tell));
                tokio::spawn(async move {
                    let result = prober::run(check, launch, timeout).await;
                    tell(Happening::Probed {
                        at,
                        run,
                        kind,
                        result,
                    });
                });
            }
        }
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
