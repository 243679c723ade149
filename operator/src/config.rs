//! Flags, and the checked configuration that they become.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Parser};
use isthmus_k8s::{Cluster, LabelFilter};
use isthmus_kvstore::EtcdConfig;
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::command_line::{FlagError, LogArgs};

use crate::{
    allocator::Retention,
    election::{Timing, lease::LeaseConfig},
    state::Settings,
};

/// Publishes one cluster's networking state to its etcd: nodes, identities, addresses, services and their endpoints.
#[derive(Clone, Debug, Parser)]
#[command(name = "isthmus-operator", version)]
pub struct Args {
    /// Name of this cluster in the mesh: 1 to 32 of a-z, 0-9 and '-'.
    #[arg(long, env = "ISTHMUS_CLUSTER_NAME")]
    pub cluster_name: ClusterName,
    /// Number of this cluster in the mesh: 1 to 255, or to 511 (see --max-connected-clusters).
    #[arg(long, env = "ISTHMUS_CLUSTER_ID")]
    pub cluster_id: u32,
    /// Size of the mesh: 255 or 511, the same in all clusters.
    #[arg(long, env = "ISTHMUS_MAX_CONNECTED_CLUSTERS", default_value = "255")]
    pub max_connected_clusters: MaxConnectedClusters,
    /// Kubeconfig file of this cluster's Kubernetes API; the pod's service account if absent.
    #[arg(long, env = "ISTHMUS_K8S_KUBECONFIG_PATH", value_name = "FILE")]
    pub k8s_kubeconfig_path: Option<PathBuf>,
    /// YAML file with endpoints and certificates of this cluster's etcd.
    #[arg(long, env = "ISTHMUS_ETCD_CONFIG", value_name = "FILE")]
    pub etcd_config: PathBuf,
    /// Whether only one of several operators publishes: the one that holds a Lease. Switch off only if there is just one.
    #[arg(
        long, env = "ISTHMUS_LEADER_ELECT", action = ArgAction::Set, default_value_t = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL"
    )]
    pub leader_elect: bool,
    /// Namespace of the Lease.
    #[arg(
        long,
        env = "ISTHMUS_LEADER_ELECT_NAMESPACE",
        default_value = "kube-system",
        value_name = "NAMESPACE"
    )]
    pub leader_elect_namespace: String,
    /// Whether global services are also published in Cilium's form, for clusters that run Cilium.
    #[arg(
        long, env = "ISTHMUS_CILIUM_SERVICES", action = ArgAction::Set, default_value_t = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL"
    )]
    pub cilium_services: bool,
    /// Rules that decide which labels of pods and namespaces count for identities, as Cilium's option `labels` has them:
    /// `[source:][!]regex`, separated by spaces, beside Cilium's default rules.
    #[arg(
        long,
        env = "ISTHMUS_LABELS",
        default_value = "",
        hide_default_value = true,
        value_name = "RULES"
    )]
    pub labels: String,
    /// An identity that no pod has is removed after so many seconds.
    #[arg(
        long, env = "ISTHMUS_IDENTITY_GRACE_SECONDS", default_value_t = 900, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(60..=86_400)
    )]
    pub identity_grace_seconds: u64,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(
        long,
        env = "ISTHMUS_ADMIN_LISTEN",
        default_value = "127.0.0.1:9963",
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is published.
    pub settings: Settings,
    /// This cluster's etcd.
    pub etcd: EtcdConfig,
    /// Kubeconfig file; the service account if absent.
    pub kubeconfig: Option<PathBuf>,
    /// Election; absent if this is the only operator.
    pub lease: Option<LeaseConfig>,
    /// Address of the admin endpoint.
    pub admin_listen: SocketAddr,
}

/// Name of the Lease.
pub const LEASE_NAME: &str = "isthmus-operator";

impl Config {
    /// Checks what clap could not.
    pub fn from_args(args: Args) -> Result<Self, FlagError> {
        let max_clusters = args.max_connected_clusters;
        let id = ClusterId::new(args.cluster_id, max_clusters)
            .map_err(|error| FlagError::new("cluster-id", args.cluster_id, error))?;
        let etcd = EtcdConfig::from_file(&args.etcd_config)
            .map_err(|error| FlagError::new("etcd-config", args.etcd_config.display(), chain(&error)))?;
        let filter = LabelFilter::new(&args.labels)
            .map_err(|error| FlagError::new("labels", &args.labels, chain(&error)))?;
        if let Some(path) = &args.k8s_kubeconfig_path {
            std::fs::File::open(path)
                .map_err(|error| FlagError::new("k8s-kubeconfig-path", path.display(), error))?;
        }
        let lease = args.leader_elect.then(|| LeaseConfig {
            namespace: args.leader_elect_namespace,
            name: LEASE_NAME.to_owned(),
            identity: instance_name(),
            timing: Timing::default(),
        });
        Ok(Self {
            settings: Settings {
                cluster: Cluster {
                    name: args.cluster_name,
                    id,
                },
                max_clusters,
                filter,
                cilium_services: args.cilium_services,
                retention: Retention {
                    grace: Duration::from_secs(args.identity_grace_seconds),
                    ..Retention::default()
                },
            },
            etcd,
            kubeconfig: args.k8s_kubeconfig_path,
            lease,
            admin_listen: args.admin_listen,
        })
    }
}

/// Unique among all candidates: the host's name (a pod's name in Kubernetes), and a random part for two on one host.
fn instance_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{:016x}", host.trim(), rand::random::<u64>())
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some layers repeat their cause in their own text.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn check(more: &[&str]) -> Result<Config, String> {
        let mut etcd = tempfile::NamedTempFile::new().unwrap();
        writeln!(etcd, "endpoints: ['http://127.0.0.1:2379']").unwrap();
        let path = etcd.path().to_str().unwrap();
        let mut flags = vec!["isthmus-operator", "--cluster-name", "c1", "--etcd-config", path];
        flags.extend(more);
        let args = Args::try_parse_from(flags).map_err(|error| error.to_string())?;
        Config::from_args(args).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_elect_a_leader_and_publish_for_cilium() {
        let config = check(&["--cluster-id", "1"]).unwrap();
        let lease = config.lease.unwrap();
        assert_eq!(
            (lease.namespace.as_str(), lease.name.as_str()),
            ("kube-system", "isthmus-operator")
        );
        assert!(config.settings.cilium_services);
        assert_eq!(config.admin_listen.port(), 9963);
        let config = check(&[
            "--cluster-id",
            "1",
            "--leader-elect=false",
            "--cilium-services=false",
        ])
        .unwrap();
        assert!(config.lease.is_none() && !config.settings.cilium_services);
        assert!(
            check(&["--cluster-id", "1", "--leader-elect"])
                .unwrap()
                .lease
                .is_some()
        );
    }

    #[test]
    fn mistakes_name_the_flag_and_what_it_takes() {
        for (flags, words) in [
            (&["--cluster-id", "256"][..], &["--cluster-id", "256", "255"][..]),
            (&["--cluster-id", "0"], &["--cluster-id", "1 to"]),
            (&["--cluster-id", "one"], &["--cluster-id", "one"]),
            (
                &["--cluster-id", "1", "--max-connected-clusters", "300"],
                &["--max-connected-clusters", "255 or 511"],
            ),
            (
                &["--cluster-id", "1", "--labels", "("],
                &["--labels", "regular expression"],
            ),
            (
                &["--cluster-id", "1", "--k8s-kubeconfig-path", "/nowhere"],
                &["--k8s-kubeconfig-path", "/nowhere"],
            ),
            (
                &["--cluster-id", "1", "--identity-grace-seconds", "5"],
                &["--identity-grace-seconds", "60"],
            ),
            (
                &["--cluster-id", "1", "--admin-listen", "9963"],
                &["--admin-listen", "9963"],
            ),
        ] {
            let message = check(flags).unwrap_err();
            for word in words {
                assert!(message.contains(word), "{flags:?}: {message}");
            }
        }
    }
}
