//! Command line of the agent: parsed once, turned into checked values once.
//!
//! In: flags and `ISTHMUS_*` variables. Out: [`Command`]. Nothing below reads the environment.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use clap::Parser;
use isthmus_mesh::{MaglevConfig, maglev::TABLE_SIZES};
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::command_line::{FlagError, LogArgs};

mod outside;

pub use self::outside::Outside;
use self::outside::OutsideArgs;

/// The node daemon: one upstream, pure merge, BPF maps.
#[derive(Clone, Debug, Parser)]
#[command(name = "isthmus-agent", version)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Subcommand>,

    /// Name of this cluster: 1 to 32 of a-z, 0-9 and '-'.
    #[arg(long, env = "ISTHMUS_CLUSTER_NAME", value_name = "NAME")]
    cluster_name: Option<String>,
    /// ID of this cluster: 1 to the number given by --max-connected-clusters.
    #[arg(long, env = "ISTHMUS_CLUSTER_ID", value_name = "ID")]
    cluster_id: Option<u32>,
    /// How many clusters the mesh may have: 255 or 511, the same in every cluster.
    #[arg(
        long,
        env = "ISTHMUS_MAX_CONNECTED_CLUSTERS",
        value_name = "N",
        default_value = "255"
    )]
    max_connected_clusters: String,
    /// Kubernetes name of the node that the agent runs on.
    #[arg(long, env = "ISTHMUS_NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// YAML file that says how to reach this cluster's clustermesh-apiserver (endpoints, trusted-ca-file, cert-file, key-file).
    #[arg(long, env = "ISTHMUS_ETCD_CONFIG", value_name = "FILE")]
    etcd_config: Option<PathBuf>,
    /// Where the BPF file system is mounted; maps and links are pinned below it.
    #[arg(
        long,
        env = "ISTHMUS_BPF_ROOT",
        value_name = "DIR",
        default_value = "/sys/fs/bpf"
    )]
    bpf_root: PathBuf,
    /// cgroup v2 directory below which sockets are load balanced. Default: where cgroup v2 is mounted.
    #[arg(long, env = "ISTHMUS_CGROUP_ROOT", value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Directory for what must outlive a restart: the endpoints of this node.
    #[arg(
        long,
        env = "ISTHMUS_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/run/isthmus"
    )]
    state_dir: PathBuf,
    /// Unix socket that the CNI plugin and the CLI talk to.
    #[arg(
        long,
        env = "ISTHMUS_SOCKET_PATH",
        value_name = "PATH",
        default_value = "/var/run/isthmus/agent.sock"
    )]
    socket_path: PathBuf,
    /// UDP port of the VXLAN tunnels between nodes, the same on all nodes of the mesh.
    #[arg(
        long,
        env = "ISTHMUS_TUNNEL_PORT",
        value_name = "PORT",
        default_value_t = 8472
    )]
    tunnel_port: u16,
    /// MTU of pods' interfaces; 0 takes it from the device that carries the tunnels.
    #[arg(long, env = "ISTHMUS_MTU", value_name = "BYTES", default_value_t = 0)]
    mtu: u32,
    /// How a backend is chosen for services that do not say it: random or maglev.
    #[arg(
        long,
        env = "ISTHMUS_BPF_LB_ALGORITHM",
        value_name = "NAME",
        default_value = "random"
    )]
    bpf_lb_algorithm: String,
    /// Entries of a service's Maglev table, the same on all nodes: 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521 or 131071.
    #[arg(
        long,
        env = "ISTHMUS_BPF_LB_MAGLEV_TABLE_SIZE",
        value_name = "N",
        default_value_t = 16_381
    )]
    bpf_lb_maglev_table_size: u32,
    /// Seed of Maglev tables, the same on all nodes: 12 bytes in base64.
    #[arg(
        long,
        env = "ISTHMUS_BPF_LB_MAGLEV_HASH_SEED",
        value_name = "BASE64",
        default_value = "JLfvgnHc2kaSUFaI"
    )]
    bpf_lb_maglev_hash_seed: String,
    /// UDP port on which agents probe each other through the tunnels; 0 turns probes off.
    #[arg(
        long,
        env = "ISTHMUS_CLUSTER_HEALTH_PORT",
        value_name = "PORT",
        default_value_t = 4240
    )]
    cluster_health_port: u16,
    /// Translate connections to services at the socket, once each. With `false` packets of pods are translated one by one, and
    /// processes of the node itself do not reach services.
    #[arg(long, env = "ISTHMUS_BPF_LB_SOCK", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    bpf_lb_sock: bool,
    /// End the open flows of backends that leave also in pods, and not only those of processes of the node itself.
    #[arg(long, env = "ISTHMUS_BPF_LB_SOCK_TERMINATE_POD_CONNECTIONS", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    bpf_lb_sock_terminate_pod_connections: bool,
    /// End TCP connections to backends that leave, and not only connected UDP sockets.
    #[arg(long, env = "ISTHMUS_BPF_LB_SOCK_TERMINATE_ALL_PROTOS", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    bpf_lb_sock_terminate_all_protos: bool,
    /// What a packet to a service without backends meets: `reject` (a reset or ICMP unreachable at once) or `drop`.
    #[arg(
        long,
        env = "ISTHMUS_SERVICE_NO_BACKEND_RESPONSE",
        value_name = "RESPONSE",
        default_value = "reject"
    )]
    service_no_backend_response: String,
    /// Time between two sweeps that remove flows that are over from the conntrack table.
    #[arg(
        long,
        env = "ISTHMUS_CONNTRACK_GC_INTERVAL",
        value_name = "DURATION",
        default_value = "30s"
    )]
    conntrack_gc_interval: String,
    /// Time within which the backends of a remote cluster leave rotation when its nodes no longer answer; they stay as the last
    /// resort.
    #[arg(
        long,
        env = "ISTHMUS_CLUSTERMESH_UNREACHABLE_AFTER",
        value_name = "DURATION",
        default_value = "3s"
    )]
    clustermesh_unreachable_after: String,
    /// How long readiness waits for remote clusters that are connected and not synced yet.
    #[arg(
        long,
        env = "ISTHMUS_CLUSTERMESH_SYNC_TIMEOUT",
        value_name = "DURATION",
        default_value = "1m"
    )]
    clustermesh_sync_timeout: String,
    /// Address of the admin endpoint: /healthz, /readyz, /metrics.
    #[arg(
        long,
        env = "ISTHMUS_ADMIN_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:9879"
    )]
    admin_listen: SocketAddr,
    #[command(flatten)]
    outside: OutsideArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Subcommand {
    /// Run the daemon (the default).
    Run,
    /// Remove what the agent left on this node: BPF links, pinned maps, devices, routes, the endpoints file.
    Cleanup,
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Command {
    /// Run until a signal.
    Run(Box<Config>),
    /// Remove everything that an agent left.
    Cleanup(Places),
}

/// Where the agent keeps things on its node.
#[derive(Clone, Debug)]
pub struct Places {
    /// BPF file system.
    pub bpf_root: PathBuf,
    /// cgroup v2 directory, or `None` to look for the mount.
    pub cgroup_root: Option<PathBuf>,
    /// Directory of the endpoints file.
    pub state_dir: PathBuf,
    /// Socket of the local API.
    pub socket_path: PathBuf,
}

/// Checked configuration of the daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// This cluster.
    pub cluster: ClusterName,
    /// Its ID.
    pub cluster_id: ClusterId,
    /// Size of the mesh.
    pub max_clusters: MaxConnectedClusters,
    /// This node.
    pub node_name: String,
    /// How to reach the API server.
    pub etcd_config: PathBuf,
    /// Where things are kept.
    pub places: Places,
    /// UDP port of the tunnels.
    pub tunnel_port: u16,
    /// MTU of pods' interfaces; `None` takes it from the device.
    pub mtu: Option<u32>,
    /// How Maglev tables are made.
    pub maglev: MaglevConfig,
    /// UDP port of probes; `None` turns them off.
    pub health_port: Option<u16>,
    /// Translate at the socket.
    pub socket_lb: bool,
    /// End open flows of backends that leave in pods too.
    pub end_pod_flows: bool,
    /// End TCP connections of backends that leave.
    pub end_tcp_flows: bool,
    /// Answer packets to services without backends.
    pub no_backend_answer: bool,
    /// Devices to the outside, and what is done there.
    pub outside: Outside,
    /// Time between two sweeps of the conntrack table.
    pub conntrack_gc_interval: Duration,
    /// Time within which an unreachable cluster's backends leave rotation.
    pub unreachable_after: Duration,
    /// Bound on waiting for remote clusters before readiness.
    pub sync_timeout: Duration,
    /// Admin endpoint.
    pub admin_listen: SocketAddr,
}

impl Args {
    /// Log flags, needed before anything else is checked.
    pub fn log(&self) -> &LogArgs {
        &self.log
    }

    /// Checks every value.
    pub fn into_command(self) -> Result<Command, FlagError> {
        let places = Places {
            bpf_root: absolute("bpf-root", self.bpf_root)?,
            cgroup_root: self
                .cgroup_root
                .map(|dir| absolute("cgroup-root", dir))
                .transpose()?,
            state_dir: absolute("state-dir", self.state_dir)?,
            socket_path: absolute("socket-path", self.socket_path)?,
        };
        if let Some(Subcommand::Cleanup) = self.command {
            return Ok(Command::Cleanup(places));
        }
        let max_clusters = self
            .max_connected_clusters
            .parse::<MaxConnectedClusters>()
            .map_err(|error| FlagError::new("max-connected-clusters", &self.max_connected_clusters, error))?;
        let name = required("cluster-name", self.cluster_name)?;
        let cluster =
            ClusterName::new(&name).map_err(|error| FlagError::new("cluster-name", &name, error))?;
        let id = required("cluster-id", self.cluster_id)?;
        let cluster_id =
            ClusterId::new(id, max_clusters).map_err(|error| FlagError::new("cluster-id", id, error))?;
        let node_name = required("node-name", self.node_name)?;
        if node_name.is_empty() || node_name.len() > 253 || node_name.contains('/') {
            return Err(FlagError::new(
                "node-name",
                node_name,
                "it takes the node's Kubernetes name, 1 to 253 characters without '/'",
            ));
        }
        if self.mtu != 0 && !(1280..=65_535).contains(&self.mtu) {
            return Err(FlagError::new(
                "mtu",
                self.mtu,
                "it takes 0 (from the device) or 1280 to 65535",
            ));
        }
        if self.tunnel_port == 0 {
            return Err(FlagError::new("tunnel-port", 0, "it takes 1 to 65535"));
        }
        let no_backend_answer = match self.service_no_backend_response.as_str() {
            "reject" => true,
            "drop" => false,
            other => {
                return Err(FlagError::new(
                    "service-no-backend-response",
                    other,
                    "it takes `reject` or `drop`",
                ));
            }
        };
        let conntrack_gc_interval = parse_duration(&self.conntrack_gc_interval)
            .filter(|interval| (Duration::from_secs(1)..=Duration::from_secs(3600)).contains(interval))
            .ok_or_else(|| {
                FlagError::new(
                    "conntrack-gc-interval",
                    &self.conntrack_gc_interval,
                    "it takes 1s to 1h, a number with a unit",
                )
            })?;
        let maglev = MaglevConfig {
            table_size: self.bpf_lb_maglev_table_size,
            seed: BASE64
                .decode(&self.bpf_lb_maglev_hash_seed)
                .ok()
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(|| {
                    FlagError::new(
                        "bpf-lb-maglev-hash-seed",
                        &self.bpf_lb_maglev_hash_seed,
                        "it takes 12 bytes in base64, 16 characters",
                    )
                })?,
            by_default: match self.bpf_lb_algorithm.as_str() {
                "random" => false,
                "maglev" => true,
                other => {
                    return Err(FlagError::new(
                        "bpf-lb-algorithm",
                        other,
                        "it takes random or maglev",
                    ));
                }
            },
        };
        if !TABLE_SIZES.contains(&maglev.table_size) {
            return Err(FlagError::new(
                "bpf-lb-maglev-table-size",
                maglev.table_size,
                format!("it takes one of {TABLE_SIZES:?}"),
            ));
        }
        let unreachable_after = parse_duration(&self.clustermesh_unreachable_after)
            .filter(|time| (Duration::from_secs(1)..=Duration::from_secs(3600)).contains(time))
            .ok_or_else(|| {
                FlagError::new(
                    "clustermesh-unreachable-after",
                    &self.clustermesh_unreachable_after,
                    "it takes a time from 1s to 1h",
                )
            })?;
        let sync_timeout = parse_duration(&self.clustermesh_sync_timeout).ok_or_else(|| {
            FlagError::new(
                "clustermesh-sync-timeout",
                &self.clustermesh_sync_timeout,
                "it takes a number with a unit: 500ms, 30s, 1m or 1h",
            )
        })?;
        Ok(Command::Run(Box::new(Config {
            cluster,
            cluster_id,
            max_clusters,
            node_name,
            etcd_config: required("etcd-config", self.etcd_config)?,
            places,
            tunnel_port: self.tunnel_port,
            mtu: (self.mtu != 0).then_some(self.mtu),
            maglev,
            health_port: (self.cluster_health_port != 0).then_some(self.cluster_health_port),
            socket_lb: self.bpf_lb_sock,
            end_pod_flows: self.bpf_lb_sock_terminate_pod_connections,
            end_tcp_flows: self.bpf_lb_sock_terminate_all_protos,
            no_backend_answer,
            outside: self.outside.check()?,
            conntrack_gc_interval,
            unreachable_after,
            sync_timeout,
            admin_listen: self.admin_listen,
        })))
    }
}

fn required<T>(flag: &'static str, value: Option<T>) -> Result<T, FlagError> {
    value.ok_or_else(|| {
        let variable = flag.to_uppercase().replace('-', "_");
        FlagError::new(
            flag,
            "",
            format!("it is required, as a flag or as ISTHMUS_{variable}"),
        )
    })
}

fn absolute(flag: &'static str, path: PathBuf) -> Result<PathBuf, FlagError> {
    if path.is_absolute() && path.parent() != Some(Path::new("")) {
        Ok(path)
    } else {
        Err(FlagError::new(flag, path.display(), "it takes an absolute path"))
    }
}

/// Reads `500ms`, `30s`, `1m` or `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: [&str; 9] = [
        "isthmus-agent",
        "--cluster-name",
        "c1",
        "--cluster-id",
        "1",
        "--node-name",
        "n1",
        "--etcd-config",
        "/etc/isthmus/etcd.yaml",
    ];

    fn check(more: &[&str]) -> Result<Command, FlagError> {
        Args::parse_from(GOOD.iter().chain(more)).into_command()
    }

    #[test]
    fn good_flags_become_a_config() {
        let Ok(Command::Run(config)) = check(&["--clustermesh-sync-timeout", "90s", "--mtu", "1450"]) else {
            panic!("refused");
        };
        assert_eq!(config.sync_timeout, Duration::from_secs(90));
        assert_eq!(config.mtu, Some(1450));
        assert_eq!(config.maglev, MaglevConfig::default());
        assert_eq!(config.health_port, Some(4240));
        assert!(config.socket_lb && config.no_backend_answer);
        assert!(config.end_pod_flows && config.end_tcp_flows);
        let Ok(Command::Run(config)) =
            check(&["--bpf-lb-sock=false", "--service-no-backend-response", "drop"])
        else {
            panic!("refused");
        };
        assert!(!config.socket_lb && !config.no_backend_answer);
    }

    #[test]
    fn bad_values_name_their_flag() {
        for (flag, value) in [
            ("cluster-name", "C1"),
            ("cluster-id", "256"),
            ("max-connected-clusters", "12"),
            ("node-name", "a/b"),
            ("mtu", "100"),
            ("tunnel-port", "0"),
            ("clustermesh-unreachable-after", "500ms"),
            ("bpf-lb-algorithm", "rr"),
            ("bpf-lb-maglev-table-size", "16384"),
            ("bpf-lb-maglev-hash-seed", "c2hvcnQ="),
            ("clustermesh-sync-timeout", "soon"),
            ("service-no-backend-response", "sulk"),
            ("conntrack-gc-interval", "0s"),
            ("state-dir", "here"),
        ] {
            let args = Args::parse_from(
                GOOD.iter()
                    .copied()
                    .filter(|arg| *arg != format!("--{flag}"))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .filter(|arg| !["c1", "1", "n1"].contains(arg) || flag_of(arg) != flag)
                    .chain([format!("--{flag}").leak() as &str, value]),
            );
            assert_eq!(args.into_command().unwrap_err().flag, flag);
        }
    }

    fn flag_of(value: &str) -> &'static str {
        match value {
            "c1" => "cluster-name",
            "1" => "cluster-id",
            _ => "node-name",
        }
    }

    #[test]
    fn missing_flags_are_named_and_cleanup_needs_none() {
        let missing = Args::parse_from(["isthmus-agent"]).into_command().unwrap_err();
        assert_eq!(missing.flag, "cluster-name");
        let cleanup = Args::parse_from(["isthmus-agent", "--state-dir", "/tmp/x", "cleanup"]);
        assert!(matches!(cleanup.into_command(), Ok(Command::Cleanup(_))));
    }
}
