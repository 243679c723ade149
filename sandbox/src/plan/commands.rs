//! The components of a sandbox: what runs, where, with which command line, and how its readiness is seen.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::{
    AGENT_ADMIN_PORT, APISERVER_ADMIN_PORT, ClusterPlan, ETCD_PORT, KUBE_API_PORT, NodePlan,
    OPERATOR_ADMIN_PORT, Plan, StoreKind,
};

/// One supervised process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentPlan {
    /// `east/etcd`, `east/operator`, `east/apiserver`, `east-1/agent`.
    pub name: String,
    /// Its namespace and cgroup.
    pub place: Place,
    /// The program: a path, or a name to look for in PATH.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// How to see that it is ready.
    pub ready: ReadyCheck,
}

/// Where a process runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The network namespace's name.
    pub netns: String,
    /// The cgroup.
    pub cgroup: PathBuf,
}

/// A component is ready when `GET path` at `address`, seen from its namespace, answers 200.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyCheck {
    /// Where it listens.
    pub address: SocketAddr,
    /// What to ask for.
    pub path: &'static str,
}

/// TCP connections carried from one namespace into another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The namespace that listens; `None` is the machine's own.
    pub listen_netns: Option<String>,
    /// The address that listens.
    pub listen: SocketAddr,
    /// The namespace that is connected to.
    pub target_netns: Option<String>,
    /// The address that is connected to.
    pub target: SocketAddr,
}

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl Plan {
    /// All components, in the order in which they are started.
    pub fn components(&self) -> Vec<ComponentPlan> {
        let mut all: Vec<ComponentPlan> = match self.store {
            StoreKind::Etcd => self.clusters.iter().map(|cluster| self.etcd(cluster)).collect(),
            StoreKind::Embedded => Vec::new(),
        };
        if self.components {
            for cluster in &self.clusters {
                all.push(self.operator(cluster));
                all.push(self.clustermesh_apiserver(cluster));
            }
            for cluster in &self.clusters {
                all.extend(cluster.nodes.iter().map(|node| self.agent(cluster, node)));
            }
        }
        all
    }

    /// The connections carried between the machine and the namespaces: the machine's programs reach etcd, health and
    /// metrics at loopback addresses, also while a cluster is cut off; the operator reaches the Kubernetes API, which
    /// the supervisor serves on the machine.
    pub fn forwards(&self) -> Vec<Forward> {
        let mut all = Vec::new();
        for cluster in &self.clusters {
            let inward = |port| Forward {
                listen_netns: None,
                listen: SocketAddr::new(IpAddr::V4(cluster.loopback), port),
                target_netns: Some(cluster.netns.clone()),
                target: SocketAddr::new(LOCALHOST, port),
            };
            // An embedded store is reached where the API server listens.
            all.extend((self.store == StoreKind::Etcd).then(|| inward(ETCD_PORT)));
            all.extend([OPERATOR_ADMIN_PORT, APISERVER_ADMIN_PORT].map(inward));
            all.push(Forward {
                listen_netns: Some(cluster.netns.clone()),
                listen: SocketAddr::new(LOCALHOST, KUBE_API_PORT),
                target_netns: None,
                target: cluster.kube_api(),
            });
            all.extend(cluster.nodes.iter().map(|node| Forward {
                listen_netns: None,
                listen: SocketAddr::new(IpAddr::V4(node.loopback), AGENT_ADMIN_PORT),
                target_netns: Some(node.netns.clone()),
                target: SocketAddr::new(LOCALHOST, AGENT_ADMIN_PORT),
            }));
        }
        all
    }

    /// The kubeconfig with which the operator reaches the API from its namespace.
    pub fn operator_kubeconfig(&self, cluster: &str) -> PathBuf {
        self.cluster_dir(cluster).join("operator-kubeconfig")
    }

    /// The etcd configuration of the operator, and of the API server where it is not the store itself.
    pub fn own_etcd_config(&self, cluster: &str) -> PathBuf {
        self.cluster_dir(cluster).join("etcd.yaml")
    }

    /// The etcd configuration of the agents: their own cluster's API server.
    pub fn agent_etcd_config(&self, cluster: &str) -> PathBuf {
        self.cluster_dir(cluster).join("agent-etcd.yaml")
    }

    /// The directory with a file per remote cluster.
    pub fn clustermesh_dir(&self, cluster: &str) -> PathBuf {
        self.cluster_dir(cluster).join("clustermesh")
    }

    fn control_place(&self, cluster: &ClusterPlan) -> Place {
        Place {
            netns: cluster.netns.clone(),
            cgroup: self.cgroup().join("control").join(&cluster.name),
        }
    }

    fn log_file(&self, component: &str) -> PathBuf {
        self.log_dir()
            .join(format!("{}.log", component.replace('/', "_")))
    }

    fn etcd(&self, cluster: &ClusterPlan) -> ComponentPlan {
        let name = format!("{}/etcd", cluster.name);
        let client = format!("http://127.0.0.1:{ETCD_PORT}");
        let peer = "http://127.0.0.1:2380";
        let args = [
            ("--name", cluster.name.clone()),
            (
                "--data-dir",
                self.cluster_dir(&cluster.name).join("etcd").display().to_string(),
            ),
            ("--listen-client-urls", client.clone()),
            ("--advertise-client-urls", client),
            ("--listen-peer-urls", peer.into()),
            ("--initial-advertise-peer-urls", peer.into()),
            ("--initial-cluster", format!("{}={peer}", cluster.name)),
            ("--auto-compaction-mode", "periodic".into()),
            ("--auto-compaction-retention", "1h".into()),
            ("--logger", "zap".into()),
            ("--log-level", "warn".into()),
        ];
        ComponentPlan {
            log: self.log_file(&name),
            name,
            place: self.control_place(cluster),
            program: "etcd".into(),
            args: flags(args),
            ready: ReadyCheck {
                address: SocketAddr::new(LOCALHOST, ETCD_PORT),
                path: "/health",
            },
        }
    }

    fn operator(&self, cluster: &ClusterPlan) -> ComponentPlan {
        let name = format!("{}/operator", cluster.name);
        let admin = SocketAddr::new(LOCALHOST, OPERATOR_ADMIN_PORT);
        let args = [
            ("--cluster-name", cluster.name.clone()),
            ("--cluster-id", cluster.id.to_string()),
            (
                "--k8s-kubeconfig-path",
                self.operator_kubeconfig(&cluster.name).display().to_string(),
            ),
            (
                "--etcd-config",
                self.own_etcd_config(&cluster.name).display().to_string(),
            ),
            ("--admin-listen", admin.to_string()),
        ];
        ComponentPlan {
            log: self.log_file(&name),
            name,
            place: self.control_place(cluster),
            program: self.machine.bin_dir.join("isthmus-operator"),
            args: flags(args),
            ready: ReadyCheck {
                address: admin,
                path: "/readyz",
            },
        }
    }

    fn clustermesh_apiserver(&self, cluster: &ClusterPlan) -> ComponentPlan {
        let name = format!("{}/apiserver", cluster.name);
        let admin = SocketAddr::new(LOCALHOST, APISERVER_ADMIN_PORT);
        let pki = self.pki_dir();
        let store = match self.store {
            StoreKind::Etcd => flags([(
                "--etcd-config",
                self.own_etcd_config(&cluster.name).display().to_string(),
            )]),
            StoreKind::Embedded => flags([
                ("--store", "embedded".into()),
                (
                    "--data-dir",
                    self.cluster_dir(&cluster.name)
                        .join("store")
                        .display()
                        .to_string(),
                ),
            ]),
        };
        let args = [
            ("--cluster-name", cluster.name.clone()),
            ("--cluster-id", cluster.id.to_string()),
            (
                "--clustermesh-config",
                self.clustermesh_dir(&cluster.name).display().to_string(),
            ),
            ("--listen", cluster.apiserver().to_string()),
            (
                "--tls-cert-file",
                pki.join(format!("server-{}.crt", cluster.name))
                    .display()
                    .to_string(),
            ),
            (
                "--tls-key-file",
                pki.join(format!("server-{}.key", cluster.name))
                    .display()
                    .to_string(),
            ),
            ("--tls-client-ca-file", pki.join("ca.crt").display().to_string()),
            ("--admin-listen", admin.to_string()),
        ];
        ComponentPlan {
            log: self.log_file(&name),
            name,
            place: self.control_place(cluster),
            program: self.machine.bin_dir.join("isthmus-clustermesh-apiserver"),
            args: [flags(args), store].concat(),
            ready: ReadyCheck {
                address: admin,
                path: "/readyz",
            },
        }
    }

    fn agent(&self, cluster: &ClusterPlan, node: &NodePlan) -> ComponentPlan {
        let name = format!("{}/agent", node.name);
        let admin = SocketAddr::new(LOCALHOST, AGENT_ADMIN_PORT);
        let args = [
            ("--cluster-name", cluster.name.clone()),
            ("--cluster-id", cluster.id.to_string()),
            ("--node-name", node.name.clone()),
            (
                "--etcd-config",
                self.agent_etcd_config(&cluster.name).display().to_string(),
            ),
            ("--bpf-root", self.bpf_root(&node.name).display().to_string()),
            (
                "--cgroup-root",
                self.node_cgroup(&node.name).display().to_string(),
            ),
            (
                "--state-dir",
                self.node_dir(&node.name).join("state").display().to_string(),
            ),
            (
                "--socket-path",
                self.agent_socket(&node.name).display().to_string(),
            ),
            ("--admin-listen", admin.to_string()),
        ];
        ComponentPlan {
            log: self.log_file(&name),
            name,
            place: Place {
                netns: node.netns.clone(),
                cgroup: self.node_cgroup(&node.name).join("agent"),
            },
            program: self.machine.bin_dir.join("isthmus-agent"),
            args: flags(args),
            ready: ReadyCheck {
                address: admin,
                path: "/readyz",
            },
        }
    }
}

/// A cluster file as Cilium's etcd client reads it. `pair` is the CA, the client's certificate and its key.
pub fn etcd_config_yaml(endpoint: &str, pair: Option<(PathBuf, PathBuf, PathBuf)>) -> String {
    let mut yaml = format!("endpoints:\n- {endpoint}\n");
    if let Some((ca, cert, key)) = pair {
        yaml += &format!("trusted-ca-file: {}\n", ca.display());
        yaml += &format!("cert-file: {}\n", cert.display());
        yaml += &format!("key-file: {}\n", key.display());
    }
    yaml
}

fn flags<const N: usize>(pairs: [(&str, String); N]) -> Vec<String> {
    pairs
        .into_iter()
        .map(|(flag, value)| format!("{flag}={value}"))
        .collect()
}
