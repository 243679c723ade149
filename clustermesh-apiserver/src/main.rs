//! Parses arguments, runs, exits.

mod limit_args;
mod store_args;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Parser;
use isthmus_clustermesh_apiserver::{Config, bind, mirror::readiness::ReadyTimeouts, store::HistoryLimits};
use isthmus_kvstore::Options;
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::{
    command_line::{self, FlagError, LogArgs},
    shutdown, telemetry,
};

use limit_args::LimitArgs;
use store_args::StoreArgs;

/// Serves a cluster's state to other clusters and to its own agents, and mirrors other clusters' state.
#[derive(Debug, Parser)]
#[command(name = "isthmus-clustermesh-apiserver", version)]
struct Args {
    /// Name of this cluster: 1 to 32 of a-z, 0-9 and '-'.
    #[arg(long, env = "ISTHMUS_CLUSTER_NAME")]
    cluster_name: ClusterName,
    /// ID of this cluster, unique in the mesh: 1 to 255, or to 511 with --max-connected-clusters 511.
    #[arg(long, env = "ISTHMUS_CLUSTER_ID")]
    cluster_id: u32,
    /// Size of the mesh, 255 or 511; the same in every cluster.
    #[arg(long, env = "ISTHMUS_MAX_CONNECTED_CLUSTERS", default_value = "255")]
    max_connected_clusters: MaxConnectedClusters,
    #[command(flatten)]
    store: StoreArgs,
    /// Directory with a YAML file for each remote cluster, named like it. Without it nothing is mirrored.
    #[arg(long, env = "ISTHMUS_CLUSTERMESH_CONFIG", value_name = "DIR")]
    clustermesh_config: Option<PathBuf>,
    /// A remote cluster that was not connected within this time is not waited for by /readyz: 500ms, 5s, 1m.
    #[arg(
        long,
        env = "ISTHMUS_PER_CLUSTER_READY_TIMEOUT",
        value_name = "DURATION",
        default_value = "5s"
    )]
    per_cluster_ready_timeout: String,
    /// /readyz waits no longer than this for remote clusters that are connected and not read in full: 30s, 10m, 1h.
    #[arg(
        long,
        env = "ISTHMUS_GLOBAL_READY_TIMEOUT",
        value_name = "DURATION",
        default_value = "10m"
    )]
    global_ready_timeout: String,
    /// Changes older than this are forgotten, and who would go on from before them lists again: 30m, 1h, 12h; 0 = never for
    /// their age. Their number and bytes are bounded in any case.
    #[arg(
        long,
        env = "ISTHMUS_AUTO_COMPACTION_RETENTION",
        value_name = "DURATION",
        default_value = "1h"
    )]
    auto_compaction_retention: String,
    /// Address to serve etcd's API on.
    #[arg(long, env = "ISTHMUS_LISTEN", default_value = "0.0.0.0:2379")]
    listen: SocketAddr,
    /// Server certificate chain, PEM.
    #[arg(long, env = "ISTHMUS_TLS_CERT_FILE", value_name = "FILE")]
    tls_cert_file: PathBuf,
    /// Server key, PEM.
    #[arg(long, env = "ISTHMUS_TLS_KEY_FILE", value_name = "FILE")]
    tls_key_file: PathBuf,
    /// CA bundle that client certificates must chain to, PEM.
    #[arg(long, env = "ISTHMUS_TLS_CLIENT_CA_FILE", value_name = "FILE")]
    tls_client_ca_file: PathBuf,
    /// Address of the admin endpoint: /healthz, /readyz, /metrics.
    #[arg(long, env = "ISTHMUS_ADMIN_LISTEN", default_value = "127.0.0.1:9880")]
    admin_listen: SocketAddr,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    log: LogArgs,
}

fn main() -> ExitCode {
    command_line::exit_code(run(command_line::parse()))
}

fn run(args: Args) -> anyhow::Result<()> {
    let usage = |flag, got: &dyn std::fmt::Display, why: String| FlagError::new(flag, got, why);
    telemetry::init(args.log.log_format, &args.log.log_level)
        .map_err(|error| usage("log-level", &args.log.log_level, error.to_string()))?;
    let max = args.max_connected_clusters;
    let cluster_id = ClusterId::new(args.cluster_id, max)
        .map_err(|error| usage("cluster-id", &args.cluster_id, error.to_string()))?;
    let duration = |flag, text: &String| {
        let takes = "it takes a number with a unit: 500ms, 30s, 10m or 1h";
        parse_duration(text).ok_or_else(|| usage(flag, text, takes.to_owned()))
    };
    let ready = ReadyTimeouts {
        per_cluster: duration("per-cluster-ready-timeout", &args.per_cluster_ready_timeout)?,
        global: duration("global-ready-timeout", &args.global_ready_timeout)?,
    };
    let age = match args.auto_compaction_retention.as_str() {
        "0" => Duration::MAX,
        _ => duration("auto-compaction-retention", &args.auto_compaction_retention)?,
    };
    let config = Config {
        cluster: args.cluster_name,
        cluster_id,
        max,
        store: args.store.config(age)?,
        clustermesh_config: args.clustermesh_config,
        listen: args.listen,
        tls_cert_file: args.tls_cert_file,
        tls_key_file: args.tls_key_file,
        tls_client_ca_file: args.tls_client_ca_file,
        admin_listen: Some(args.admin_listen),
        connection: Options::default(),
        limits: args.limits.limits()?,
        history: HistoryLimits {
            age,
            ..HistoryLimits::default()
        },
        remote_history: HistoryLimits {
            age,
            ..Config::REMOTE_HISTORY
        },
        ready,
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let shutdown = shutdown::on_signals().context("cannot catch signals")?;
        let bound = bind(config).await?;
        tracing::info!(address = %bound.address()?, "serving");
        bound.run(shutdown).await
    })
}

/// Reads `500ms`, `30s`, `10m` or `1h`; at most a week.
fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let ms_per_unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let ms = number.parse::<u64>().ok()?.checked_mul(ms_per_unit)?;
    (ms <= 604_800_000).then(|| Duration::from_millis(ms))
}
