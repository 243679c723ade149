//! One node: its object and Lease in the API, its network's readiness, and a task for each of its pods.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event as KubeEvent, Node as KubeNode, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::network::Plugin;
use super::pods::{Pods, uid};
use super::worker::{self, Message};
use crate::netns;
use crate::plan::{NodePlan, Plan};

/// Kubelet's own interval.
const LEASE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the plugin is asked while it is not ready, and while it is.
const STATUS_INTERVALS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// What the tasks of a node share.
pub struct Node {
    /// The sandbox.
    pub sandbox: Arc<Plan>,
    /// This node.
    pub plan: NodePlan,
    /// A client of its cluster's API.
    pub client: Client,
    /// Its CNI plugin.
    pub plugin: Plugin,
    /// All pods of the sandbox.
    pub pods: Pods,
    network_ready: watch::Sender<bool>,
    pod_count: watch::Sender<usize>,
}

impl Node {
    /// A node of which nothing runs yet.
    pub fn new(sandbox: Arc<Plan>, plan: NodePlan, client: Client, pods: Pods) -> Arc<Self> {
        let node_dir = sandbox.node_dir(&plan.name);
        let plugin = Plugin {
            binary: sandbox.machine.bin_dir.join("isthmus-cni"),
            node_netns: netns::path(&plan.netns),
            cgroup: sandbox.node_cgroup(&plan.name).join("agent"),
            agent_socket: sandbox.agent_socket(&plan.name),
            log_file: node_dir.join("cni.log"),
        };
        let (network_ready, pod_count) = (watch::Sender::new(false), watch::Sender::new(0));
        Arc::new(Self {
            sandbox,
            plan,
            client,
            plugin,
            pods,
            network_ready,
            pod_count,
        })
    }

    /// Whether pods can be attached, by the plugin's last answer.
    pub fn network_ready(&self) -> watch::Receiver<bool> {
        self.network_ready.subscribe()
    }

    /// How many pods the node has.
    pub fn pod_count(&self) -> usize {
        *self.pod_count.borrow()
    }

    /// Writes a warning about a pod into the API; what cannot be written is in the log.
    pub fn event(&self, pod: &Pod, reason: &str, message: &str) {
        warn!(
            node = self.plan.name,
            pod = pod.metadata.name,
            reason,
            message,
            "pod"
        );
        let namespace = pod.metadata.namespace.clone().unwrap_or_else(|| "default".into());
        let name = pod.metadata.name.clone().unwrap_or_default();
        let event = json!({
            "metadata": {"generateName": format!("{name}."), "namespace": namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": uid(pod)},
            "reason": reason,
            "message": message.chars().take(1024).collect::<String>(),
            "type": "Warning",
            "count": 1,
            "source": {"component": "kubelet", "host": self.plan.name},
            "firstTimestamp": Timestamp::now().to_string(),
            "lastTimestamp": Timestamp::now().to_string(),
        });
        let api: Api<KubeEvent> = Api::namespaced(self.client.clone(), &namespace);
        tokio::spawn(async move {
            let Ok(event) = serde_json::from_value(event) else {
                return;
            };
            if let Err(error) = api.create(&PostParams::default(), &event).await {
                debug!(%error, "cannot write an event");
            }
        });
    }

    /// Makes the cgroups and the object, then starts the node's tasks. They end with the process.
    pub async fn start(self: &Arc<Self>) -> anyhow::Result<()> {
        let group = self.sandbox.node_cgroup(&self.plan.name);
        for child in ["agent", "pods"] {
            std::fs::create_dir_all(group.join(child))?;
        }
        self.register().await?;
        tokio::spawn(Arc::clone(self).watch_network());
        tokio::spawn(Arc::clone(self).keep_alive());
        tokio::spawn(Arc::clone(self).run_pods());
        Ok(())
    }

    async fn register(&self) -> anyhow::Result<()> {
        let cidrs: Vec<String> = self.plan.pod_cidrs.iter().map(ToString::to_string).collect();
        let node = serde_json::from_value(json!({
            "metadata": {
                "name": self.plan.name,
                "labels": {
                    "kubernetes.io/hostname": self.plan.name,
                    "kubernetes.io/os": "linux",
                    "topology.kubernetes.io/zone": self.plan.zone,
                    "topology.kubernetes.io/region": self.plan.cluster,
                },
            },
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs, "providerID": format!("sandbox://{}", self.plan.name)},
        }))?;
        let api: Api<KubeNode> = Api::all(self.client.clone());
        match api.create(&PostParams::default(), &node).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            result => drop(result?),
        }
        self.write_status(false).await?;
        Ok(())
    }

    /// Called when `ready` has changed: the transition is now.
    async fn write_status(&self, ready: bool) -> kube::Result<()> {
        let now = Timestamp::now().to_string();
        let (status, reason, message) = if ready {
            ("True", "KubeletReady", "pods can be attached")
        } else {
            (
                "False",
                "NetworkPluginNotReady",
                "the CNI plugin says that its agent is not ready",
            )
        };
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            json!({"type": kind, "status": status, "reason": reason, "message": message,
                   "lastHeartbeatTime": now, "lastTransitionTime": now})
        };
        let resources = json!({"cpu": "8", "memory": "16Gi", "pods": "110"});
        let patch = json!({"status": {
            "addresses": [
                {"type": "InternalIP", "address": self.plan.address.to_string()},
                {"type": "Hostname", "address": self.plan.name},
            ],
            "capacity": resources,
            "allocatable": resources,
            "conditions": [
                condition("Ready", status, reason, message),
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory", ""),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure", ""),
                condition("PIDPressure", "False", "KubeletHasSufficientPID", ""),
            ],
            "nodeInfo": {
                "architecture": std::env::consts::ARCH, "operatingSystem": "linux", "osImage": "sandbox",
                "bootID": "", "machineID": self.plan.name, "systemUUID": self.plan.name, "kernelVersion": "",
                "kubeletVersion": concat!("v1.33.0-isthmus-sandbox-", env!("CARGO_PKG_VERSION")),
                "kubeProxyVersion": "", "containerRuntimeVersion": "sandbox://1",
            },
        }});
        let api: Api<KubeNode> = Api::all(self.client.clone());
        api.patch_status(&self.plan.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
    }

    /// Asks the plugin whether pods can be attached, and shows changes in the node's Ready condition.
    async fn watch_network(self: Arc<Self>) {
        let mut shown = false;
        loop {
            let answer = self.plugin.status().await;
            let ready = answer.is_ok();
            if self
                .network_ready
                .send_if_modified(|known| std::mem::replace(known, ready) != ready)
            {
                match &answer {
                    Ok(()) => info!(node = self.plan.name, "pods can be attached"),
                    Err(error) => warn!(node = self.plan.name, "not ready: {}", worker::chain(error)),
                }
            }
            if shown != ready {
                match self.write_status(ready).await {
                    Ok(()) => shown = ready,
                    Err(error) => warn!(node = self.plan.name, %error, "cannot write the node's status"),
                }
            }
            let (soon, later) = STATUS_INTERVALS;
            tokio::time::sleep(if ready && shown { later } else { soon }).await;
        }
    }

    async fn keep_alive(self: Arc<Self>) {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEASE_NAMESPACE);
        let mut ticks = tokio::time::interval(LEASE_INTERVAL);
        loop {
            ticks.tick().await;
            if let Err(error) = self.renew(&api).await {
                warn!(node = self.plan.name, %error, "cannot renew the node's Lease");
            }
        }
    }

    async fn renew(&self, api: &Api<Lease>) -> kube::Result<()> {
        // MicroTime: the API refuses fewer or more than six digits.
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let spec = json!({"holderIdentity": self.plan.name, "leaseDurationSeconds": 40, "renewTime": now});
        let patch = Patch::Merge(json!({"spec": spec}));
        match api.patch(&self.plan.name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            result => return result.map(drop),
        }
        let lease = json!({"metadata": {"name": self.plan.name, "namespace": LEASE_NAMESPACE}, "spec": spec});
        let lease = serde_json::from_value(lease).map_err(kube::Error::SerdeError)?;
        api.create(&PostParams::default(), &lease).await.map(drop)
    }

    /// Follows the pods that are bound to the node; each has a task.
    async fn run_pods(self: Arc<Self>) {
        let api: Api<Pod> = Api::all(self.client.clone());
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.plan.name));
        let mut events = std::pin::pin!(watcher(api, config).default_backoff());
        let mut workers = Workers::default();
        let mut listed: Vec<String> = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(pod)) => {
                    listed.push(uid(&pod));
                    workers.on_pod(&self, pod).await;
                }
                Ok(watcher::Event::InitDone) => workers.on_listed(&listed).await,
                Ok(watcher::Event::Apply(pod)) => workers.on_pod(&self, pod).await,
                Ok(watcher::Event::Delete(pod)) => workers.on_gone(&uid(&pod)).await,
                Err(error) => warn!(node = self.plan.name, %error, "the watch of pods broke; trying again"),
            }
            self.pod_count.send_replace(workers.sweep());
        }
    }
}

/// The tasks of a node's pods, by UID.
#[derive(Default)]
struct Workers(BTreeMap<String, Handle>);

struct Handle {
    inbox: mpsc::Sender<Message>,
    /// The object is gone. Until then the entry stays, also when its task has ended, so that a late event about an
    /// object that is being deleted does not start the pod again.
    gone: bool,
}

impl Workers {
    async fn on_pod(&mut self, node: &Arc<Node>, pod: Pod) {
        if pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) != Some(&node.plan.name) {
            return;
        }
        let uid = uid(&pod);
        if let Some(worker) = self.0.get(&uid) {
            // A closed inbox is that of a pod that is over.
            let _ = worker.inbox.send(Message::Changed(Box::new(pod))).await;
            return;
        }
        // Workers read at once: the queue holds what comes in while one of them writes a status.
        let (sender, inbox) = mpsc::channel(16);
        tokio::spawn(worker::run(Arc::clone(node), pod, inbox));
        self.0.insert(
            uid,
            Handle {
                inbox: sender,
                gone: false,
            },
        );
    }

    async fn on_listed(&mut self, listed: &[String]) {
        let vanished: Vec<String> = self
            .0
            .keys()
            .filter(|uid| !listed.contains(uid))
            .cloned()
            .collect();
        for uid in vanished {
            self.on_gone(&uid).await;
        }
    }

    async fn on_gone(&mut self, uid: &str) {
        if let Some(worker) = self.0.get_mut(uid) {
            worker.gone = true;
            let _ = worker.inbox.send(Message::Gone).await;
        }
    }

    /// Drops entries that are of no more use; returns how many pods are left.
    fn sweep(&mut self) -> usize {
        self.0
            .retain(|_, worker| !(worker.gone && worker.inbox.is_closed()));
        self.0.values().filter(|worker| !worker.gone).count()
    }
}
