//! The node daemon: follows one upstream, merges, plans, and programs this node's BPF maps, devices and routes.
//!
//! In: the own cluster's clustermesh-apiserver (all clusters' state), the CNI plugin's calls, the kernel. Out: BPF maps and
//! programs, a VXLAN device, routes; a local gRPC API; health and metrics over HTTP.
//!
//! ```text
//!     kvstore::follow --updates-->  rounds (owns state)  --batches-->  datapath (BPF maps)
//!                                     ^      |   |  \----watch----->  prober   (UDP through the tunnels)
//!     CNI plugin --gRPC--> keeper ----+      |   +------ watch ---->  network  (device, routes)
//!                            |  \------------|----- endpoints ------>    "
//!     CLI ---gRPC---> api::local --questions-+------ departed ----->  open_flows (sockets)
//! ```
//!
//! One task each, beside `housekeeping` (counters) and `conntrack` (sweeps); every queue is bounded. Pure: [`state`], [`sources`], [`decode`], [`endpoints`], [`ipam`], [`node`],
//! [`probe`], [`status`], what is below [`open_flows`]; the others are shells.
//!
//! Invariants: the maps are written by `rounds` alone; a lost upstream, a stopped or restarted agent removes nothing;
//! [`cleanup`] does.

pub mod api;
mod config;
mod conntrack;
pub mod decode;
pub mod endpoints;
mod housekeeping;
pub mod ipam;
mod metrics;
pub mod network;
pub mod node;
pub mod open_flows;
pub mod probe;
mod prober;
mod rounds;
pub mod sources;
pub mod state;
pub mod status;

use std::{sync::Arc, time::Instant};

use anyhow::Context;
use isthmus_bpf_abi::feature;
use isthmus_datapath::{Datapath, DatapathConfig, sock_diag::Protocol, teardown};
use isthmus_kvstore::{EtcdConfig, Options, follow};
use isthmus_mesh::{Reach, reach::ReachConfig};
use isthmus_proto::agent::{cni_server::CniServer, local_server::LocalServer};
use isthmus_runtime::{CancellationToken, Health, Metrics, admin, command_line::FlagError};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnixListenerStream;

pub use config::{Args, Command, Config, Places};
use endpoints::{
    keeper::{self, Keeper, Network, Sinks},
    store::Store,
};
use rounds::Rounds;
use state::State;
use status::{Facts, Upstream};

/// Runs until `shutdown` is cancelled. Maps, programs and devices stay in place then.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let started = Instant::now();
    let etcd = EtcdConfig::from_file(&config.etcd_config).map_err(|error| {
        FlagError::new("etcd-config", config.etcd_config.display(), keeper::chain(&error))
    })?;
    // First the socket: who holds it is the agent of this node.
    let socket = api::listen(&config.places.socket_path)?;
    let datapath = open_datapath(&config.places, config.socket_lb).await?;
    let registry = Metrics::new("agent");
    let metrics = metrics::AgentMetrics::new(&registry);
    let health = Health::default();
    for part in [
        "kvstore",
        "clustermesh",
        "loadbalancer",
        "ipcache",
        "endpoints",
        "datapath",
    ] {
        health.set(
            part,
            isthmus_runtime::State::Starting("the agent starts".to_owned()),
        );
    }
    admin::serve(config.admin_listen, health.clone(), registry, shutdown.clone()).await?;
    let (connection, netlink, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let netlink_task = tokio::spawn(connection);

    let (node_in, node_out) = watch::channel(Err("the agent starts".to_owned()));
    let (cidrs_in, cidrs_out) = watch::channel(Arc::default());
    let (targets_in, targets_out) = watch::channel(Default::default());
    let (verdicts_in, verdicts_out) = watch::channel(Arc::from([]));
    let (clusters_in, clusters_out) = watch::channel(Arc::from([]));
    let (network_in, network_out) = watch::channel(Network::NotReady("the agent starts".to_owned()));
    let (pods_in, pods_out) = watch::channel(Err("the agent starts".to_owned()));
    let (calls_in, calls_out) = mpsc::channel(keeper::REQUESTS_MAX);
    let (to_rounds, endpoints_for_rounds) = mpsc::channel(16);
    let (to_network, endpoints_for_network) = mpsc::channel(16);
    let (handle, questions) = rounds::Handle::new();

    let store = Store::new(&config.places.state_dir)?;
    let sinks = Sinks(vec![to_rounds, to_network]);
    let (restored, dump) = {
        let datapath = Arc::clone(&datapath);
        let gates = keeper::Gates {
            network: network_out.clone(),
            pods: pods_out,
        };
        tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let keeper = Keeper::restore(store, Arc::clone(&datapath), gates, sinks)?;
            let dump = rounds::dump(&datapath).context("cannot read the maps of a former agent")?;
            Ok((keeper, dump))
        })
        .await??
    };
    tracing::info!(
        services = dump.lb.services.len(),
        backends = dump.lb.backends.len(),
        ipcache = dump.ipcache.len(),
        endpoints = restored.list().len(),
        programs_loaded = datapath.loaded_programs(),
        "datapath is taken over; nothing is removed before the upstream is read"
    );
    let local_endpoints = restored.list();
    let fresh = dump.lb.services.is_empty() && dump.ipcache.is_empty() && dump.endpoints.is_empty();
    pods_in.send_if_modified(|pods| {
        if !fresh {
            *pods = Ok(());
        }
        !fresh
    });
    let open_flows = probe_open_flows(&config, &metrics).await?;
    let mut state = State::new(
        state::Identity {
            cluster: config.cluster.clone(),
            cluster_id: config.cluster_id,
            max: config.max_clusters,
            node: config.node_name.clone(),
            maglev: config.maglev,
        },
        dump,
    );
    let _ = state.on(state::Event::Endpoints(Arc::clone(&local_endpoints)));
    let facts = Facts {
        state,
        upstream: Upstream::default(),
        progress: Default::default(),
        network: network_out.borrow().clone(),
        probes: config.health_port.map(|_| vec![]),
        sync_timeout: config.sync_timeout,
        remotes_passed: false,
        fresh,
        compare_error: None,
        reach: vec![],
        no_failover: open_flows.lacking,
    };

    let following = follow(etcd.clone(), Options::default(), [], shutdown.clone());
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        restored.run(calls_out).await;
        anyhow::Ok(())
    });
    tasks.spawn(network_task(
        &config,
        (netlink, Arc::clone(&datapath), local_endpoints),
        network::Inputs {
            node: node_out.clone(),
            cidrs: cidrs_out,
            endpoints: endpoints_for_network,
        },
        network::Outputs {
            network: network_in,
            keeper: calls_in.clone(),
        },
        shutdown.clone(),
    ));
    if let Some(port) = config.health_port {
        let inputs = prober::Inputs {
            node: node_out,
            network: network_out.clone(),
            targets: targets_out,
        };
        let settings = prober::Settings {
            port,
            own: config.cluster.clone(),
            leave_after: config.unreachable_after,
        };
        let outputs = prober::Outputs {
            verdicts: verdicts_in,
            clusters: clusters_in,
        };
        let (datapath, shutdown) = (Arc::clone(&datapath), shutdown.clone());
        tasks.spawn(async move {
            prober::run(datapath, settings, started, inputs, outputs, shutdown).await;
            Ok(())
        });
    } else {
        // The loop must not take the missing prober for its end.
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            shutdown.cancelled().await;
            drop((verdicts_in, clusters_in, targets_out));
            Ok(())
        });
    }
    tasks.spawn(housekeeping::packets(
        Arc::clone(&datapath),
        calls_in.clone(),
        metrics.clone(),
        shutdown.clone(),
    ));
    tasks.spawn(conntrack::run(
        Arc::clone(&datapath),
        config.conntrack_gc_interval,
        metrics.clone(),
        shutdown.clone(),
    ));
    let inbox = (!open_flows.protocols.is_empty()).then(open_flows::Inbox::default);
    if let Some(inbox) = &inbox {
        tasks.spawn(open_flows::run(
            Arc::clone(&datapath),
            open_flows::Settings {
                protocols: open_flows.protocols,
                pods: config.end_pod_flows,
            },
            inbox.clone(),
            handle.clone(),
            metrics.clone(),
            shutdown.clone(),
        ));
    }
    let server = tonic::transport::Server::builder()
        .add_service(CniServer::new(api::cni::CniService::new(calls_in)))
        .add_service(LocalServer::new(api::local::LocalService::new(handle, etcd)))
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(socket),
            shutdown.clone().cancelled_owned(),
        );
    tasks.spawn(async move { server.await.context("the local API failed") });
    let reach = Reach::new(
        ReachConfig {
            leave_after: config.unreachable_after,
            ..ReachConfig::default()
        },
        // Jitter that differs by node.
        std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), &config.node_name),
    );
    let rounds = Rounds::new(
        facts,
        datapath,
        rounds::Outputs {
            feeds: following.feeds,
            node: node_in,
            cidrs: cidrs_in,
            targets: targets_in,
            pods: pods_in,
            health,
            open_flows: inbox,
            metrics,
        },
        reach,
        started,
    );
    let inputs = rounds::Inputs {
        updates: following.updates,
        endpoints: endpoints_for_rounds,
        questions,
        network: network_out,
        verdicts: verdicts_out,
        clusters: clusters_out,
    };
    tasks.spawn(rounds.run(inputs, shutdown.clone()));
    let result = supervise(tasks, &shutdown).await;
    netlink_task.abort();
    // A socket file that nobody answers on is also replaced at the next start.
    let _ = std::fs::remove_file(&config.places.socket_path);
    result
}

/// What can be done about open flows of backends that leave, of what is wanted.
async fn probe_open_flows(
    config: &Config,
    metrics: &metrics::AgentMetrics,
) -> anyhow::Result<open_flows::Support> {
    let wanted: &[Protocol] = match (config.socket_lb, config.end_tcp_flows) {
        // Without hooks nothing is translated at sockets.
        (false, _) => &[],
        (true, false) => &[Protocol::Udp],
        (true, true) => &Protocol::ALL,
    };
    let metrics = metrics.clone();
    Ok(tokio::task::spawn_blocking(move || open_flows::probe(wanted, &metrics)).await?)
}

/// Waits for the end of all tasks. The first one that ends, or fails, without a shutdown ends the others.
async fn supervise(
    mut tasks: tokio::task::JoinSet<anyhow::Result<()>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = ended
            .context("a task of the agent panicked")
            .and_then(|ended| ended);
        let early = !shutdown.is_cancelled();
        shutdown.cancel();
        let ended = match ended {
            Ok(()) if early => Err(anyhow::anyhow!("a task of the agent ended without a reason")),
            ended => ended,
        };
        if result.is_ok() {
            result = ended;
        }
    }
    result
}

fn network_task(
    config: &Config,
    (netlink, datapath, endpoints): (rtnetlink::Handle, Arc<Datapath>, keeper::EndpointList),
    inputs: network::Inputs,
    outputs: network::Outputs,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + use<> {
    let settings = network::Settings {
        cluster_id: config.cluster_id,
        tunnel_port: config.tunnel_port,
        mtu: config.mtu,
        features: features(config),
        maglev_table_size: config.maglev.table_size,
        outside: config.outside.clone(),
    };
    async move {
        network::run(netlink, datapath, settings, endpoints, inputs, outputs, shutdown).await;
        Ok(())
    }
}

/// What the programs do for packets.
fn features(config: &Config) -> u32 {
    let silent = if config.no_backend_answer {
        0
    } else {
        feature::NO_BACKEND_DROP
    };
    feature::PACKET_LB | silent
}

async fn open_datapath(places: &Places, socket_lb: bool) -> anyhow::Result<Arc<Datapath>> {
    let config = DatapathConfig {
        bpf_root: places.bpf_root.clone(),
        cgroup_root: places.cgroup_root.clone(),
        socket_lb,
    };
    let datapath = tokio::task::spawn_blocking(move || Datapath::open(&config)).await??;
    Ok(Arc::new(datapath))
}

/// Removes what agents left on this node. Goes on after a failure; all failures are in the error.
pub async fn cleanup(places: &Places) -> anyhow::Result<()> {
    isthmus_datapath::preflight::check()?;
    // Held to the end, so that no agent starts meanwhile.
    let _socket = api::listen(&places.socket_path)
        .context("an agent seems to run on this node: stop it before its traces are removed")?;
    let (connection, netlink, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let netlink_task = tokio::spawn(connection);
    let mut failures: Vec<String> = teardown::remove_all(&netlink, &places.bpf_root)
        .await
        .iter()
        .map(|error| keeper::chain(error))
        .collect();
    let store = Store::new(&places.state_dir).and_then(|store| store.remove());
    failures.extend(store.err().map(|error| keeper::chain(&error)));
    failures.extend(
        std::fs::remove_file(&places.socket_path)
            .err()
            .map(|error| format!("cannot remove {}: {error}", places.socket_path.display())),
    );
    netlink_task.abort();
    if failures.is_empty() {
        Ok(())
    } else {
        anyhow::bail!("not everything could be removed: {}", failures.join("; "))
    }
}
