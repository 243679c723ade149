//! Counts between two exports, and the export of everything that is a number to the metrics registry.
//!
//! In: operations with their outcome, [`Facts`]. Out: metrics. Counters of others (refusals, packets) are cumulative where
//! they come from; what is exported is the difference to the last time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use isthmus_bpf_abi::maps;
use isthmus_datapath::Datapath;
use isthmus_mesh::MapOp;
use isthmus_runtime::CancellationToken;
use tokio::sync::{mpsc, oneshot};

use crate::{
    endpoints::keeper::Request,
    metrics::{AddressLabels, AgentMetrics, ClusterLabel, MapLabel, NodeLabels, PacketLabels, RefusedLabels},
    status::Facts,
};

/// See the module.
#[derive(Debug, Default)]
pub struct Counters {
    /// Heartbeats seen.
    pub heartbeats: u64,
    ops: BTreeMap<(&'static str, &'static str, &'static str), u64>,
    refused: BTreeMap<(String, &'static str), u64>,
    clusters: BTreeSet<String>,
    nodes: BTreeSet<(String, String)>,
}

/// The map that an operation writes.
pub fn map_of(op: &MapOp) -> &'static str {
    match op {
        MapOp::ServicePut(..) | MapOp::ServiceDelete(_) => maps::SERVICES_NAME,
        MapOp::BackendPut(..) | MapOp::BackendDelete(_) => maps::BACKENDS_NAME,
        MapOp::MaglevPut(..) | MapOp::MaglevDelete(_) => maps::MAGLEV_NAME,
        MapOp::SourceRangePut(_) | MapOp::SourceRangeDelete(_) => maps::SOURCE_RANGES_NAME,
        MapOp::IpcachePut(..) | MapOp::IpcacheDelete(_) => maps::IPCACHE_NAME,
        MapOp::EndpointPut(..) | MapOp::EndpointDelete(_) => maps::ENDPOINTS_NAME,
    }
}

impl Counters {
    /// Counts an operation.
    pub fn count(&mut self, op: &MapOp, outcome: &'static str) {
        let action = match op {
            MapOp::ServicePut(..)
            | MapOp::BackendPut(..)
            | MapOp::MaglevPut(..)
            | MapOp::SourceRangePut(_)
            | MapOp::IpcachePut(..)
            | MapOp::EndpointPut(..) => "put",
            MapOp::ServiceDelete(_)
            | MapOp::BackendDelete(_)
            | MapOp::MaglevDelete(_)
            | MapOp::SourceRangeDelete(_)
            | MapOp::IpcacheDelete(_)
            | MapOp::EndpointDelete(_) => "delete",
        };
        *self.ops.entry((map_of(op), action, outcome)).or_default() += 1;
    }

    /// Map, action, outcome and how many, since the last call.
    pub fn take_ops(&mut self) -> BTreeMap<(&'static str, &'static str, &'static str), u64> {
        std::mem::take(&mut self.ops)
    }

    /// Writes everything.
    pub fn export(&mut self, facts: &Facts, metrics: &AgentMetrics, now: Duration) {
        metrics.upstream_connected.set(facts.upstream.connected.into());
        if let Some(at) = facts.upstream.heartbeat_at {
            metrics
                .upstream_heartbeat_age_seconds
                .set(now.saturating_sub(at).as_secs_f64());
        }
        metrics.retries_waiting.set(to_gauge(facts.progress.held));
        for (cluster, reason, count) in facts.state.refusals().counts() {
            let before = self.refused.entry((cluster.to_string(), reason)).or_default();
            let labels = RefusedLabels {
                source_cluster: cluster.to_string(),
                reason,
            };
            metrics
                .refused_objects
                .get_or_create(&labels)
                .inc_by(count.saturating_sub(*before));
            *before = count;
        }
        self.export_tables(facts, metrics);
        self.export_clusters(facts, metrics);
        self.export_probes(facts, metrics);
    }

    fn export_tables(&self, facts: &Facts, metrics: &AgentMetrics) {
        let stats = facts.state.lb().stats();
        metrics.services.set(to_gauge(stats.services));
        metrics
            .global_services
            .set(to_gauge(facts.state.global_services()));
        metrics
            .endpoints
            .set(to_gauge(facts.state.local().endpoints().len()));
        let sizes = [
            (maps::SERVICES_NAME, stats.frontends),
            (maps::BACKENDS_NAME, stats.backends),
            (maps::IPCACHE_NAME, facts.state.ipcache().len()),
        ];
        for (map, size) in sizes {
            metrics
                .map_entries
                .get_or_create(&MapLabel { map })
                .set(to_gauge(size));
        }
    }

    fn export_clusters(&mut self, facts: &Facts, metrics: &AgentMetrics) {
        let remotes = facts.state.remotes();
        metrics.remote_clusters.set(to_gauge(remotes.len()));
        let mut seen = BTreeSet::new();
        for remote in &remotes {
            let label = ClusterLabel {
                target_cluster: remote.name.to_string(),
            };
            seen.insert(label.target_cluster.clone());
            metrics
                .remote_cluster_readiness
                .get_or_create(&label)
                .set(remote.is_ready().into());
            metrics
                .remote_cluster_nodes
                .get_or_create(&label)
                .set(to_gauge(remote.nodes));
            if let Some(status) = &remote.status {
                metrics
                    .remote_cluster_last_failure_ts
                    .get_or_create(&label)
                    .set((status.last_failure_ms / 1000).try_into().unwrap_or(i64::MAX));
                metrics
                    .remote_cluster_failures
                    .get_or_create(&label)
                    .set(status.num_failures.try_into().unwrap_or(i64::MAX));
                metrics
                    .remote_cluster_services
                    .get_or_create(&label)
                    .set(remote.services().try_into().unwrap_or(i64::MAX));
            }
        }
        for (cluster, judgement) in &facts.reach {
            let label = ClusterLabel {
                target_cluster: cluster.to_string(),
            };
            metrics
                .remote_cluster_reachability
                .get_or_create(&label)
                .set(judgement.verdict as i64);
        }
        for gone in self.clusters.difference(&seen) {
            let label = ClusterLabel {
                target_cluster: gone.clone(),
            };
            metrics.remote_cluster_readiness.remove(&label);
            metrics.remote_cluster_reachability.remove(&label);
            metrics.remote_cluster_nodes.remove(&label);
            metrics.remote_cluster_last_failure_ts.remove(&label);
            metrics.remote_cluster_failures.remove(&label);
            metrics.remote_cluster_services.remove(&label);
        }
        self.clusters = seen;
    }

    fn export_probes(&mut self, facts: &Facts, metrics: &AgentMetrics) {
        let mut seen = BTreeSet::new();
        for (key, verdict) in facts.probes.iter().flatten() {
            let labels = NodeLabels {
                target_cluster: key.cluster.to_string(),
                target_node: key.node.clone(),
            };
            seen.insert((labels.target_cluster.clone(), labels.target_node.clone()));
            let reachable = !verdict.is_unreachable() && verdict.last_success.is_some();
            metrics
                .node_connectivity_status
                .get_or_create(&labels)
                .set(reachable.into());
            if let Some(latency) = verdict.latency {
                metrics
                    .node_connectivity_latency_seconds
                    .get_or_create(&labels)
                    .set(latency.as_secs_f64());
            }
        }
        for (target_cluster, target_node) in self.nodes.difference(&seen) {
            let labels = NodeLabels {
                target_cluster: target_cluster.clone(),
                target_node: target_node.clone(),
            };
            metrics.node_connectivity_status.remove(&labels);
            metrics.node_connectivity_latency_seconds.remove(&labels);
        }
        self.nodes = seen;
    }
}

fn to_gauge(count: usize) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

/// Exports what only the kernel and the keeper know, every few seconds, until `shutdown`.
pub async fn packets(
    datapath: Arc<Datapath>,
    keeper: mpsc::Sender<Request>,
    metrics: AgentMetrics,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    let mut before: BTreeMap<(&'static str, &'static str), (u64, u64)> = BTreeMap::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            _ = every.tick() => {}
        }
        let tables = Arc::clone(&datapath);
        match tokio::task::spawn_blocking(move || tables.tables().counters()).await? {
            Err(error) => tracing::debug!(%error, "packet counters cannot be read"),
            Ok(counters) => {
                for counter in counters {
                    let (reason, direction) = (counter.reason.name(), counter.direction.name());
                    let known = before.entry((reason, direction)).or_default();
                    let labels = PacketLabels { reason, direction };
                    let (packets, bytes) = (counter.value.packets, counter.value.bytes);
                    metrics
                        .datapath_packets
                        .get_or_create(&labels)
                        .inc_by(packets.saturating_sub(known.0));
                    metrics
                        .datapath_bytes
                        .get_or_create(&labels)
                        .inc_by(bytes.saturating_sub(known.1));
                    *known = (packets, bytes);
                }
            }
        }
        let (reply, usage) = oneshot::channel();
        if keeper.send(Request::Usage(reply)).await.is_err() {
            continue;
        }
        let Ok(usage) = usage.await else { continue };
        for (family, used, free) in usage.pools {
            for (state, count) in [("used", used), ("free", free)] {
                let labels = AddressLabels { family, state };
                metrics.ipam_addresses.get_or_create(&labels).set(to_gauge(count));
            }
        }
    }
}
