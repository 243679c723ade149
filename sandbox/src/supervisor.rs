//! The one process that owns a running sandbox.
//!
//! In: the plan. It makes namespaces, links and certificates, serves a Kubernetes API per cluster, runs the components
//! and the nodes' kubelets, and answers on the control socket. It never removes a sandbox: that is
//! [`teardown`](crate::teardown)'s work, which ends this process like all others.

mod component;
mod files;
mod forward;
mod progress;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use futures::future::join_all;
use ipnet::IpNet;
use isthmus_sandbox_kube::{KubeApi, Options};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::error;

use self::component::Component;
use self::progress::Progress;
use crate::control::{ClusterStatus, NodeStatus, Phase, Request, Response, StatusReport};
use crate::kubelet::node::Node;
use crate::kubelet::pods::{PodLogs, Pods};
use crate::plan::{ClusterPlan, Plan, StoreKind};
use crate::{cgroup, netns, pki, registry};

/// How long each step of the start may take before it counts as failed.
const STEP_PATIENCE: Duration = Duration::from_secs(60);
/// A component that ended so often while the sandbox is being built is not going to run.
const START_RESTARTS_MAX: u32 = 6;
/// How much of a component's log is shown when it does not become ready.
const LOG_LINES: usize = 15;
/// How often readiness is looked at while somebody waits for it.
const READY_INTERVAL: Duration = Duration::from_millis(50);

/// A running sandbox.
pub struct Supervisor {
    plan: Arc<Plan>,
    progress: Progress,
    running: Mutex<Running>,
    pods: Pods,
}

/// What has been started so far.
#[derive(Default)]
struct Running {
    components: BTreeMap<String, Component>,
    nodes: Vec<Arc<Node>>,
    links_down: BTreeSet<String>,
}

/// Runs the sandbox named `name` until the process is ended. Returns only with an error, and only after whoever waits
/// has had time to read it.
pub async fn run(state_root: &Path, name: &str) -> anyhow::Result<()> {
    let plan = Arc::new(registry::load(state_root, name)?);
    let group = plan.cgroup().join("supervisor");
    cgroup::join(&group).with_context(|| format!("cannot join the cgroup {}", group.display()))?;
    // A process whose parent is not its session's leader: signals of the terminal do not reach it. It fails only where
    // this is the leader already, which is as good.
    let _ = nix::unistd::setsid();
    let supervisor = Arc::new(Supervisor {
        plan,
        progress: Progress::default(),
        running: Mutex::default(),
        pods: Pods::default(),
    });
    server::start(Arc::clone(&supervisor))?;
    match supervisor.build().await {
        Ok(()) => supervisor.progress.enter(Phase::Ready),
        Err(failure) => {
            error!("{failure:#}");
            // What runs is left for people to look at until `down`.
            supervisor.progress.enter(Phase::Failed {
                message: format!("{failure:#}"),
            });
        }
    }
    std::future::pending().await
}

impl Supervisor {
    async fn build(&self) -> anyhow::Result<()> {
        let plan = &self.plan;
        let say = |line: String| self.progress.say(line);
        files::write_all(plan)?;
        pki::write_all(plan)?;
        say(format!("certificates for {} cluster(s)", plan.clusters.len()));
        netns::build(plan).await?;
        say(format!(
            "network 172.31.{}.0/24 with {} node(s)",
            plan.index,
            plan.nodes().count()
        ));
        for cluster in &plan.clusters {
            self.serve_kube(cluster).await?;
            say(format!(
                "{}: Kubernetes API at http://{}",
                cluster.name,
                cluster.kube_api()
            ));
        }
        for forward in plan.forwards() {
            let listen = forward.listen;
            forward::start(forward)
                .await
                .with_context(|| format!("cannot listen at {listen}"))?;
        }
        self.start_components()?;
        self.start_nodes().await?;
        for cluster in &plan.clusters {
            for part in self.parts_of(cluster) {
                self.wait_for(&part).await?;
            }
        }
        if plan.components {
            self.wait_for_nodes().await?;
        }
        Ok(())
    }

    async fn serve_kube(&self, cluster: &ClusterPlan) -> anyhow::Result<()> {
        let v4 = cluster.service_cidrs.iter().find_map(|cidr| match cidr {
            IpNet::V4(range) => Some(*range),
            IpNet::V6(_) => None,
        });
        let v6 = cluster.service_cidrs.iter().find_map(|cidr| match cidr {
            IpNet::V6(range) => Some(*range),
            IpNet::V4(_) => None,
        });
        let api = KubeApi::new(Options {
            service_network_v4: v4,
            service_network_v6: v6,
            ..Options::default()
        });
        api.set_runtime(Arc::new(PodLogs {
            sandbox: Arc::clone(&self.plan),
            cluster: cluster.name.clone(),
            pods: self.pods.clone(),
        }));
        let address = cluster.kube_api();
        let listener = netns::listen(None, address).await;
        let listener = listener.with_context(|| format!("cannot serve the Kubernetes API at {address}"))?;
        let name = cluster.name.clone();
        tokio::spawn(async move {
            // It is never asked to end: it ends with the process.
            if let Err(failure) = api.serve(listener, CancellationToken::new()).await {
                error!(cluster = name, "the Kubernetes API ended: {failure}");
            }
        });
        Ok(())
    }

    fn start_components(&self) -> anyhow::Result<()> {
        for plan in self.plan.components() {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running
                .components
                .insert(plan.name.clone(), Component::spawn(plan));
        }
        Ok(())
    }

    async fn start_nodes(&self) -> anyhow::Result<()> {
        for cluster in &self.plan.clusters {
            let url = format!("http://{}", cluster.kube_api())
                .parse()
                .context("the API's URL")?;
            let client = kube::Client::try_from(kube::Config::new(url))?;
            for plan in &cluster.nodes {
                let node = Node::new(
                    Arc::clone(&self.plan),
                    plan.clone(),
                    client.clone(),
                    self.pods.clone(),
                );
                let context = || format!("cannot register the node {}", plan.name);
                node.start().await.with_context(context)?;
                self.running
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .nodes
                    .push(node);
            }
        }
        Ok(())
    }

    /// The cluster's components in the order in which they become ready.
    fn parts_of(&self, cluster: &ClusterPlan) -> Vec<Component> {
        let of_cluster = |name: &str| {
            let owner = name.split('/').next().unwrap_or_default();
            owner == cluster.name || cluster.nodes.iter().any(|node| node.name == owner)
        };
        let plans = self
            .plan
            .components()
            .into_iter()
            .filter(|plan| of_cluster(&plan.name));
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        plans
            .filter_map(|plan| running.components.get(&plan.name).cloned())
            .collect()
    }

    async fn wait_for(&self, component: &Component) -> anyhow::Result<()> {
        let (start, name) = (Instant::now(), &component.plan().name);
        while !component.is_ready().await {
            let log = || log_end(&component.plan().log);
            if start.elapsed() > STEP_PATIENCE {
                bail!(
                    "{name} is not ready after {} s; its log ends with:\n{}",
                    STEP_PATIENCE.as_secs(),
                    log()
                );
            }
            if component.restarts() >= START_RESTARTS_MAX {
                bail!(
                    "{name} has ended {} times; its log ends with:\n{}",
                    component.restarts(),
                    log()
                );
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
        self.progress.say(format!("{name} is ready"));
        Ok(())
    }

    async fn wait_for_nodes(&self) -> anyhow::Result<()> {
        for node in self.nodes() {
            let mut ready = node.network_ready();
            let waited = tokio::time::timeout(STEP_PATIENCE, ready.wait_for(|ready| *ready)).await;
            waited.with_context(|| {
                let seconds = STEP_PATIENCE.as_secs();
                format!(
                    "{}: the CNI plugin does not become ready within {seconds} s",
                    node.plan.name
                )
            })??;
        }
        self.progress.say("all nodes are ready");
        Ok(())
    }

    fn nodes(&self) -> Vec<Arc<Node>> {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .nodes
            .clone()
    }

    fn components(&self) -> Vec<Component> {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .components
            .values()
            .cloned()
            .collect()
    }

    /// Answers a request from the control socket.
    async fn answer(&self, request: Request) -> Response {
        let result = match request {
            Request::Progress { since } => {
                let (lines, phase) = self.progress.since(since).await;
                return Response::Progress { lines, phase };
            }
            Request::Status => return Response::Status(self.status().await),
            Request::Pod {
                cluster,
                namespace,
                name,
            } => {
                let missing = || {
                    anyhow::anyhow!(
                        "there is no pod `{namespace}/{name}` with a network in the cluster `{cluster}`"
                    )
                };
                self.pods
                    .find(&cluster, &namespace, &name)
                    .map(Response::Pod)
                    .ok_or_else(missing)
            }
            Request::WaitReady { timeout_ms } => self
                .wait_all_ready(Duration::from_millis(timeout_ms))
                .await
                .map(|()| Response::Done),
            Request::Component { name, action } => self.act(&name, action).await.map(|()| Response::Done),
            Request::Link { target, up } => self.set_link(&target, up).await.map(|()| Response::Done),
        };
        result.unwrap_or_else(|error| Response::Refused {
            message: format!("{error:#}"),
        })
    }

    async fn act(&self, name: &str, action: crate::control::Action) -> anyhow::Result<()> {
        let component = self
            .components()
            .into_iter()
            .find(|component| component.plan().name == name);
        let component = component.with_context(|| {
            let names: Vec<String> = self.plan.components().into_iter().map(|plan| plan.name).collect();
            format!("there is no component `{name}`; there are {}", names.join(", "))
        })?;
        component.act(action).await
    }

    async fn set_link(&self, target: &str, up: bool) -> anyhow::Result<()> {
        let cluster = self
            .plan
            .cluster(target)
            .map(|cluster| Plan::trunk_device(cluster.host));
        let node = self
            .plan
            .nodes()
            .find(|node| node.name == target)
            .map(|node| Plan::port_device(node.host));
        let device = cluster
            .or(node)
            .with_context(|| format!("there is no cluster or node `{target}`"))?;
        netns::set_link(&self.plan.underlay_netns(), &device, up).await?;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if up {
            running.links_down.remove(target);
        } else {
            running.links_down.insert(target.to_owned());
        }
        Ok(())
    }

    async fn wait_all_ready(&self, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let missing = self.not_ready().await;
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!(
                    "not ready after {} s: {}",
                    timeout.as_secs_f32(),
                    missing.join(", ")
                );
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
    }

    /// What was not stopped on purpose and is not ready.
    async fn not_ready(&self) -> Vec<String> {
        let mut missing = Vec::new();
        match self.progress.phase() {
            Phase::Failed { message } => missing.push(message),
            Phase::Starting => missing.push("the sandbox is still being built".into()),
            Phase::Ready => {}
        }
        let components = self.components();
        let ready = join_all(components.iter().map(Component::is_ready)).await;
        let unready = components
            .iter()
            .zip(ready)
            .filter(|(component, ready)| !ready && !component.is_stopped());
        missing.extend(unready.map(|(component, _)| component.plan().name.clone()));
        if self.plan.components {
            let down = |node: &Node| {
                let agent = format!("{}/agent", node.plan.name);
                components
                    .iter()
                    .any(|component| component.plan().name == agent && component.is_stopped())
            };
            let nodes = self.nodes();
            let unready = nodes
                .iter()
                .filter(|node| !*node.network_ready().borrow() && !down(node));
            missing.extend(unready.map(|node| format!("the network of {}", node.plan.name)));
        }
        missing
    }

    async fn status(&self) -> StatusReport {
        let components = join_all(self.components().iter().map(Component::status)).await;
        let nodes = self.nodes();
        let links_down = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .links_down
            .clone();
        let node_status = |plan: &crate::plan::NodePlan| {
            let running = nodes.iter().find(|node| node.plan.name == plan.name);
            NodeStatus {
                name: plan.name.clone(),
                address: plan.address.to_string(),
                netns: plan.netns.clone(),
                pod_cidrs: plan.pod_cidrs.iter().map(ToString::to_string).collect(),
                agent_socket: self.plan.agent_socket(&plan.name),
                network_ready: running.is_some_and(|node| *node.network_ready().borrow()),
                link_up: !links_down.contains(&plan.name),
                pods: running.map_or(0, |node| node.pod_count()),
            }
        };
        let clusters = self.plan.clusters.iter().map(|cluster| ClusterStatus {
            name: cluster.name.clone(),
            id: cluster.id,
            kube_api: format!("http://{}", cluster.kube_api()),
            etcd: match self.plan.store {
                StoreKind::Etcd => format!("http://{}", cluster.etcd()),
                StoreKind::Embedded => format!("https://{}", cluster.apiserver()),
            },
            apiserver: format!("https://{}", cluster.apiserver()),
            link_up: !links_down.contains(&cluster.name),
            nodes: cluster.nodes.iter().map(node_status).collect(),
        });
        StatusReport {
            name: self.plan.name.clone(),
            index: self.plan.index,
            phase: self.progress.phase(),
            kubeconfig: self.plan.kubeconfig(),
            clusters: clusters.collect(),
            components,
        }
    }
}

/// The last lines of a log, indented.
fn log_end(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
    end.iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
