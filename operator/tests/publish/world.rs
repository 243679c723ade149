//! One cluster: a Kubernetes API with a few objects, an etcd, and operators.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use isthmus_k8s::{Cluster, LabelFilter};
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_operator::{
    Config, Operator,
    allocator::Retention,
    config::LEASE_NAME,
    election::{Timing, lease::LeaseConfig},
    state::{Settings, prefixes::canaries},
};
use isthmus_runtime::{CancellationToken, Health, State};
use isthmus_sandbox_kube::{Client, DeleteOptions, KubeApi, Options, Part, kubeconfig_yaml};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinHandle,
};

use crate::{etcd::Etcd, eventually};

pub const SERVICES: &str = "services";
pub const SLICES: &str = "endpointslices.discovery.k8s.io";
pub const LEASES: &str = "leases.coordination.k8s.io";

pub const LOCAL_SLICE: &str = "isthmus/local/slices/v1/c1/shop/cart/cart-1";
pub const SLICE: &str = "isthmus/state/slices/v1/c1/shop/cart/cart-1";
pub const CILIUM_SERVICE: &str = "cilium/state/services/v1/c1/shop/cart";
pub const POD_IP: &str = "cilium/state/ip/v1/default/10.1.0.21";
pub const NODE: &str = "cilium/state/nodes/v1/c1/n1";
pub const IDENTITIES: &str = "cilium/state/identities/v1/id/";

pub struct World {
    pub etcd: Etcd,
    pub kube: Client,
    address: SocketAddr,
    dir: tempfile::TempDir,
    serving: Option<(CancellationToken, JoinHandle<()>)>,
}

impl World {
    /// A cluster with a node, a global service of one endpoint and the pod behind it.
    pub async fn start() -> Self {
        let api = KubeApi::new(Options {
            controllers: false,
            ..Options::default()
        });
        let mut world = Self {
            etcd: Etcd::start().await,
            kube: api.client(),
            address: "127.0.0.1:0".parse().unwrap(),
            dir: tempfile::tempdir().unwrap(),
            serving: None,
        };
        world.serve().await;
        let kubeconfig = kubeconfig_yaml("c1", &format!("http://{}", world.address));
        std::fs::write(world.kubeconfig(), kubeconfig).unwrap();
        world.fill();
        world
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Lets the Kubernetes API answer (again).
    pub async fn serve(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let (api, stop) = (self.kube.api().clone(), CancellationToken::new());
        let token = stop.clone();
        let task = tokio::spawn(async move { api.serve(listener, token).await.unwrap() });
        self.serving = Some((stop, task));
    }

    /// The Kubernetes API is gone.
    pub async fn stop_serving(&mut self) {
        let (stop, task) = self.serving.take().expect("it is served");
        stop.cancel();
        // Idle connections are closed late; what counts is that nothing answers.
        task.abort();
        let _ = task.await;
    }

    fn fill(&self) {
        let kube = &self.kube;
        kube.create("namespaces", "", json!({"metadata": {"name": "shop"}}))
            .unwrap();
        kube.create_whole(
            "nodes",
            "",
            json!({
                "metadata": {"name": "n1"},
                "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.3"}]},
            }),
        )
        .unwrap();
        kube.create(
            SERVICES,
            "shop",
            json!({
                "metadata": {"name": "cart", "annotations": {"service.cilium.io/global": "true"}},
                "spec": {"selector": {"app": "cart"}, "ports": [{"name": "http", "port": 80}]},
            }),
        )
        .unwrap();
        kube.create(SLICES, "shop", slice(&["10.1.0.21"])).unwrap();
        self.put_pod("cart-0", "cart", "10.1.0.21");
    }

    pub fn put_pod(&self, name: &str, app: &str, ip: &str) {
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": app}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
            "status": {
                "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "172.18.0.3",
            },
        });
        self.kube.create_whole("pods", "shop", pod).unwrap();
    }

    pub fn put_endpoints(&self, ips: &[&str]) {
        let endpoints = slice(ips)["endpoints"].clone();
        self.change(SLICES, "cart-1", |object| object["endpoints"] = endpoints);
    }

    pub fn change(&self, resource: &str, name: &str, change: impl FnOnce(&mut Value)) {
        self.kube
            .modify(resource, "shop", name, Part::Whole, change)
            .unwrap();
    }

    pub fn delete(&self, resource: &str, name: &str) {
        let now = DeleteOptions {
            grace_period_seconds: Some(0),
            ..DeleteOptions::default()
        };
        self.kube.delete(resource, "shop", name, &now).unwrap();
    }

    /// Who holds the Lease.
    pub fn holder(&self) -> Option<String> {
        let lease = self.kube.find(LEASES, "kube-system", LEASE_NAME)?;
        Some(lease.value()["spec"]["holderIdentity"].as_str()?.to_owned())
    }

    pub async fn operator(&self, identity: &str) -> Running {
        let max_clusters = MaxConnectedClusters::C255;
        let config = Config {
            settings: Settings {
                cluster: Cluster {
                    name: ClusterName::new("c1").unwrap(),
                    id: ClusterId::new(1, max_clusters).unwrap(),
                },
                max_clusters,
                filter: LabelFilter::new("").unwrap(),
                cilium_services: true,
                retention: Retention::default(),
            },
            etcd: self.etcd.config(),
            kubeconfig: Some(self.kubeconfig()),
            lease: Some(LeaseConfig {
                namespace: "kube-system".into(),
                name: LEASE_NAME.into(),
                identity: identity.into(),
                timing: Timing {
                    lease_duration: Duration::from_secs(3),
                    renew_deadline: Duration::from_secs(2),
                    retry_period: Duration::from_millis(200),
                },
            }),
            admin_listen: "127.0.0.1:0".parse().unwrap(),
        };
        let shutdown = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (built, ready) = tokio::sync::oneshot::channel();
        let token = shutdown.clone();
        let task = runtime.spawn(async move {
            let operator = Operator::build(config, token).await.unwrap();
            let _ = built.send((operator.health().clone(), operator.admin_address()));
            operator.run().await;
        });
        let (health, admin) = ready.await.unwrap();
        Running {
            shutdown,
            health,
            admin,
            task: Some(task),
            runtime: Some(runtime),
        }
    }

    /// An operator that has published everything.
    pub async fn live_operator(&self, identity: &str) -> Running {
        let operator = self.operator(identity).await;
        operator.is_live().await;
        operator
    }

    pub async fn keys(&self) -> Vec<String> {
        self.etcd.content().await.into_keys().collect()
    }

    pub async fn value(&self, key: &str) -> Option<String> {
        let entry = self.etcd.content().await.remove(key)?;
        Some(String::from_utf8_lossy(&entry.value).into_owned())
    }

    /// Keys that a cluster with the objects of the start has, without the identity.
    pub fn expected_keys() -> Vec<String> {
        let mut keys: Vec<String> = canaries(&ClusterName::new("c1").unwrap()).collect();
        let frames = [
            "isthmus/state/services/v1/c1/shop/cart",
            "isthmus/local/services/v1/c1/shop/cart",
        ];
        keys.extend([NODE, POD_IP, CILIUM_SERVICE, SLICE, LOCAL_SLICE].map(str::to_owned));
        keys.extend(frames.map(str::to_owned));
        keys.push("cilium/cluster-config/c1".to_owned());
        keys.sort();
        keys
    }
}

/// The EndpointSlice with these endpoints.
pub fn slice(ips: &[&str]) -> Value {
    let endpoint = |ip: &&str| json!({"addresses": [ip], "conditions": {"ready": true}, "nodeName": "n1"});
    json!({
        "metadata": {"name": "cart-1", "labels": {"kubernetes.io/service-name": "cart"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": ips.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

/// A running operator on threads of its own. Dropping it is like SIGKILL.
pub struct Running {
    shutdown: CancellationToken,
    pub health: Health,
    admin: SocketAddr,
    task: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
}

impl Running {
    /// Stops as on SIGTERM, and waits until it has.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        self.task.take().unwrap().await.unwrap();
    }

    pub async fn is_live(&self) {
        self.publishing("leading, everything is published").await;
    }

    /// Waits until its health says this of publishing.
    pub async fn publishing(&self, words: &str) {
        let health = &self.health;
        eventually(words, async || match health.snapshot().get("publishing") {
            Some(State::Starting(text) | State::Ok(text) | State::Degraded(text) | State::Failed(text)) => {
                text.contains(words)
            }
            None => false,
        })
        .await;
    }

    /// A metric's value, by its name with labels.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").await;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.parse().ok()
    }

    pub async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
