//! Every name, address and file of a sandbox, as data.
//!
//! In: a [`Request`] (name, clusters, nodes), the sandbox's index and where things live on this machine.
//! Out: a [`Plan`], which is all that the supervisor, the tear-down and the commands need; it is kept as JSON in the
//! state directory.
//!
//! Invariants: same input, same plan; no two sandboxes with different indexes, and no two clusters or nodes of one
//! sandbox, share an address, a namespace, a device, a cgroup or a file. Pod and service ranges are the same in two
//! sandboxes: they exist only inside network namespaces.
//!
//! Addresses. Sandbox `i` owns 172.31.i.0/24 (its underlay) and 127.31.i.0/24 (loopback addresses at which the
//! machine's own programs reach what runs inside). The last number is the same in both: 1 is the machine itself,
//! 10, 20, ... the control planes of the clusters, 11, 12, ... the nodes of the first one, and so on.

mod commands;
mod links;
mod request;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use commands::{ComponentPlan, Forward, Place, ReadyCheck, etcd_config_yaml};
pub use links::{NamespaceSetup, namespace_setups, root_batch};
pub use request::{ClusterRequest, MAX_CLUSTERS, MAX_NODES, Request, RequestError, StoreKind, is_label};

/// The port of the Kubernetes API emulator.
pub const KUBE_API_PORT: u16 = 6443;
/// The port at which a cluster's clustermesh-apiserver serves agents and remote clusters, with mutual TLS.
pub const APISERVER_PORT: u16 = 2379;
/// The port of a cluster's etcd, on the loopback address of the control plane's namespace.
pub const ETCD_PORT: u16 = 2379;
/// The port of the operator's health and metrics.
pub const OPERATOR_ADMIN_PORT: u16 = 9963;
/// The port of the API server's health and metrics.
pub const APISERVER_ADMIN_PORT: u16 = 9880;
/// The port of an agent's health and metrics.
pub const AGENT_ADMIN_PORT: u16 = 9879;

/// Where things live on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The directory of all sandboxes' state.
    pub state_root: PathBuf,
    /// The mount point of cgroup v2.
    pub cgroup_mount: PathBuf,
    /// The mount point of the BPF file system.
    pub bpffs_mount: PathBuf,
    /// The directory with Isthmus' binaries.
    pub bin_dir: PathBuf,
}

/// One sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The sandbox's name.
    pub name: String,
    /// Which of the machine's sandboxes this is: decides its addresses and the prefix of its namespaces.
    pub index: u8,
    /// Where things live.
    pub machine: Machine,
    /// Whether Isthmus' own components run (hidden option; off = etcd and the emulators only).
    pub components: bool,
    /// Where each cluster keeps its state.
    #[serde(default)]
    pub store: StoreKind,
    /// The clusters, in the order they were asked for.
    pub clusters: Vec<ClusterPlan>,
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPlan {
    /// The cluster name.
    pub name: String,
    /// The cluster ID.
    pub id: u16,
    /// The last number of the control plane's addresses.
    pub host: u8,
    /// The control plane's address on the underlay.
    pub address: Ipv4Addr,
    /// The control plane's loopback address on the machine.
    pub loopback: Ipv4Addr,
    /// The control plane's network namespace.
    pub netns: String,
    /// The ranges of cluster IPs, IPv4 first.
    pub service_cidrs: Vec<IpNet>,
    /// The nodes.
    pub nodes: Vec<NodePlan>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    /// The node's name, unique in the sandbox.
    pub name: String,
    /// Its cluster's name.
    pub cluster: String,
    /// The last number of the node's addresses.
    pub host: u8,
    /// The node's address on the underlay.
    pub address: Ipv4Addr,
    /// The node's loopback address on the machine.
    pub loopback: Ipv4Addr,
    /// The node's network namespace.
    pub netns: String,
    /// The ranges of pod IPs, IPv4 first.
    pub pod_cidrs: Vec<IpNet>,
    /// The node's zone (`topology.kubernetes.io/zone`).
    pub zone: String,
}

impl Plan {
    /// Lays out a sandbox. `request` must have been checked ([`Request::check`]).
    pub fn new(request: &Request, index: u8, machine: Machine) -> Self {
        let clusters = (1u8..)
            .zip(&request.clusters)
            .map(|(ordinal, cluster)| ClusterPlan::new(request, index, ordinal, cluster))
            .collect();
        Self {
            name: request.name.clone(),
            index,
            machine,
            components: request.components,
            store: request.store,
            clusters,
        }
    }

    /// The prefix of all network namespaces of the sandbox with this index.
    pub fn netns_prefix(index: u8) -> String {
        format!("isb{index}-")
    }

    /// The namespace with the bridges.
    pub fn underlay_netns(&self) -> String {
        format!("isb{}-underlay", self.index)
    }

    /// The veth in the machine's own namespace.
    pub fn root_device(index: u8) -> String {
        format!("isb{index}-root")
    }

    /// The network namespace of the pod with this UID.
    pub fn pod_netns(&self, uid: &str) -> String {
        let short: String = uid.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        format!("isb{}-p-{short}", self.index)
    }

    /// The cluster with this name.
    pub fn cluster(&self, name: &str) -> Option<&ClusterPlan> {
        self.clusters.iter().find(|cluster| cluster.name == name)
    }

    /// All nodes of all clusters.
    pub fn nodes(&self) -> impl Iterator<Item = &NodePlan> {
        self.clusters.iter().flat_map(|cluster| &cluster.nodes)
    }

    /// The state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.machine.state_root.join(&self.name)
    }

    /// The file that holds this plan.
    pub fn plan_file(state_dir: &Path) -> PathBuf {
        state_dir.join("plan.json")
    }

    /// The supervisor's socket.
    pub fn control_socket(&self) -> PathBuf {
        self.state_dir().join("control.sock")
    }

    /// The supervisor's log.
    pub fn supervisor_log(&self) -> PathBuf {
        self.log_dir().join("supervisor.log")
    }

    /// The directory of logs.
    pub fn log_dir(&self) -> PathBuf {
        self.state_dir().join("logs")
    }

    /// The kubeconfig with a context per cluster.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state_dir().join("kubeconfig")
    }

    /// The kubeconfig of one cluster.
    pub fn cluster_kubeconfig(&self, cluster: &str) -> PathBuf {
        self.cluster_dir(cluster).join("kubeconfig")
    }

    /// The directory of one cluster's files.
    pub fn cluster_dir(&self, cluster: &str) -> PathBuf {
        self.state_dir().join("clusters").join(cluster)
    }

    /// The directory of one node's files.
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.state_dir().join("nodes").join(node)
    }

    /// The socket of a node's agent.
    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("agent.sock")
    }

    /// The directory of one pod's files (logs).
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.state_dir().join("pods").join(uid)
    }

    /// The directory of certificates.
    pub fn pki_dir(&self) -> PathBuf {
        self.state_dir().join("pki")
    }

    /// The cgroup above all processes of the sandbox.
    pub fn cgroup(&self) -> PathBuf {
        sandbox_cgroup(&self.machine.cgroup_mount, &self.name)
    }

    /// A node's cgroup: the agent's programs are attached here, above the agent and the node's pods.
    pub fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup().join(node)
    }

    /// A pod's cgroup.
    pub fn pod_cgroup(&self, node: &str, uid: &str) -> PathBuf {
        self.node_cgroup(node).join("pods").join(uid)
    }

    /// A node's directory for pinned BPF objects.
    pub fn bpf_root(&self, node: &str) -> PathBuf {
        sandbox_bpf_dir(&self.machine.bpffs_mount, &self.name).join(node)
    }
}

/// The cgroup of the sandbox named `name`.
pub fn sandbox_cgroup(cgroup_mount: &Path, name: &str) -> PathBuf {
    cgroup_mount.join(format!("isthmus-sandbox-{name}"))
}

/// The BPF directory of the sandbox named `name`.
pub fn sandbox_bpf_dir(bpffs_mount: &Path, name: &str) -> PathBuf {
    bpffs_mount.join("isthmus-sandbox").join(name)
}

impl ClusterPlan {
    fn new(request: &Request, index: u8, ordinal: u8, cluster: &ClusterRequest) -> Self {
        let host = ordinal * 10;
        let id = cluster.id;
        let mut service_cidrs = vec![v4_range([10, 100 + id as u8, 0, 0], 16)];
        if request.ipv6 {
            service_cidrs.push(v6_range([0xfd00, 0x96, decimal_as_hex(id), 0], 112));
        }
        let nodes = (1..=request.nodes).map(|number| {
            let mut pod_cidrs = vec![v4_range([10, id as u8, number, 0], 24)];
            if request.ipv6 {
                pod_cidrs.push(v6_range(
                    [0xfd00, 0x10, decimal_as_hex(id), u16::from(number)],
                    64,
                ));
            }
            let name = format!("{}-{number}", cluster.name);
            NodePlan {
                netns: format!("isb{index}-{name}"),
                name,
                cluster: cluster.name.clone(),
                host: host + number,
                address: underlay(index, host + number),
                loopback: loopback(index, host + number),
                pod_cidrs,
                zone: format!("{}-{}", cluster.name, char::from(b'a' + (number - 1))),
            }
        });
        Self {
            name: cluster.name.clone(),
            id,
            host,
            address: underlay(index, host),
            loopback: loopback(index, host),
            netns: format!("isb{index}-{}-cp", cluster.name),
            service_cidrs,
            nodes: nodes.collect(),
        }
    }

    /// The Kubernetes API's address on the machine.
    pub fn kube_api(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.loopback), KUBE_API_PORT)
    }

    /// The address at which the machine's own programs reach this cluster's etcd.
    pub fn etcd(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.loopback), ETCD_PORT)
    }

    /// The address of the clustermesh-apiserver on the underlay.
    pub fn apiserver(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), APISERVER_PORT)
    }
}

/// The machine's own address on the underlay of sandbox `index`.
pub fn machine_address(index: u8) -> Ipv4Addr {
    underlay(index, 1)
}

fn underlay(index: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 31, index, host)
}

fn loopback(index: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 31, index, host)
}

/// 42 becomes 0x42: addresses that people can read.
fn decimal_as_hex(number: u16) -> u16 {
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

fn v4_range(address: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(address), prefix))
}

fn v6_range(groups: [u16; 4], prefix: u8) -> IpNet {
    let [a, b, c, d] = groups;
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), prefix))
}

#[cfg(test)]
mod tests;
