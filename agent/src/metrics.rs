//! The agent's metrics, all below `isthmus_agent_`.
//!
//! In: what happened. Out: counters, gauges and histograms in the registry that was handed in.

use isthmus_runtime::{
    Metrics,
    metrics::prometheus_client::{
        encoding::EncodeLabelSet,
        metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    },
};
use std::sync::atomic::AtomicU64;

/// Labels of a map operation.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct MapOpLabels {
    /// Map.
    pub map: &'static str,
    /// `put` or `delete`.
    pub action: &'static str,
    /// `ok`, `failed` or `withheld`.
    pub outcome: &'static str,
}

/// Label of a map.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct MapLabel {
    /// Map.
    pub map: &'static str,
}

/// Labels of a refused object.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct RefusedLabels {
    /// Cluster that it came from.
    pub source_cluster: String,
    /// Why.
    pub reason: &'static str,
}

/// Label of a remote cluster.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct ClusterLabel {
    /// Its name.
    pub target_cluster: String,
}

/// Labels of a probed node.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct NodeLabels {
    /// Its cluster.
    pub target_cluster: String,
    /// Its name.
    pub target_node: String,
}

/// Labels of packets.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct PacketLabels {
    /// What became of them.
    pub reason: &'static str,
    /// Where they were counted.
    pub direction: &'static str,
}

/// Labels of addresses.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct AddressLabels {
    /// `ipv4` or `ipv6`.
    pub family: &'static str,
    /// `used` or `free`.
    pub state: &'static str,
}

/// Label of a feed's kind.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct OutcomeLabel {
    /// `ok` or `failed`.
    pub outcome: &'static str,
}

/// Label of a protocol.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct ProtocolLabel {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
}

type FloatGauge = Gauge<f64, AtomicU64>;

/// Handles of all metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AgentMetrics {
    /// Map operations.
    pub map_ops: Family<MapOpLabels, Counter>,
    /// Seconds that one round's operations took.
    pub round_seconds: Histogram,
    /// Seconds from the first change of a round to the end of its application.
    pub propagation_seconds: Histogram,
    /// Operations that wait for another try.
    pub retries_waiting: Gauge,
    /// Entries that a full compare had to fix.
    pub compare_fixes: Family<MapLabel, Counter>,
    /// Full compares.
    pub compares: Family<OutcomeLabel, Counter>,
    /// Entries in each map, by what is desired.
    pub map_entries: Family<MapLabel, Gauge>,
    /// Refused objects.
    pub refused_objects: Family<RefusedLabels, Counter>,
    /// Whether the upstream answers.
    pub upstream_connected: Gauge,
    /// Seconds since the own cluster's heartbeat was last seen to change.
    pub upstream_heartbeat_age_seconds: FloatGauge,
    /// Connections to the upstream that failed or were lost.
    pub upstream_failures: Counter,
    /// Remote clusters.
    pub remote_clusters: Gauge,
    /// Whether each remote cluster is ready and applied here.
    pub remote_cluster_readiness: Family<ClusterLabel, Gauge>,
    /// 0 if a remote cluster can be reached, 1 if it is suspect, 2 if not: its backends are a last resort then.
    pub remote_cluster_reachability: Family<ClusterLabel, Gauge>,
    /// Unix seconds of each remote cluster's last failure.
    pub remote_cluster_last_failure_ts: Family<ClusterLabel, Gauge>,
    /// Failures of each remote cluster's connection.
    pub remote_cluster_failures: Family<ClusterLabel, Gauge>,
    /// Nodes of each remote cluster.
    pub remote_cluster_nodes: Family<ClusterLabel, Gauge>,
    /// Services of each remote cluster.
    pub remote_cluster_services: Family<ClusterLabel, Gauge>,
    /// Global services.
    pub global_services: Gauge,
    /// Services.
    pub services: Gauge,
    /// Local endpoints.
    pub endpoints: Gauge,
    /// Addresses of the pod CIDRs.
    pub ipam_addresses: Family<AddressLabels, Gauge>,
    /// Whether probes through the tunnel reach a node.
    pub node_connectivity_status: Family<NodeLabels, Gauge>,
    /// Round trip of the last answered probe.
    pub node_connectivity_latency_seconds: Family<NodeLabels, FloatGauge>,
    /// Packets and socket calls, from the BPF map.
    pub datapath_packets: Family<PacketLabels, Counter>,
    /// Bytes of them.
    pub datapath_bytes: Family<PacketLabels, Counter>,
    /// Entries of the conntrack table after its last sweep.
    pub conntrack_entries: Gauge,
    /// Entries that sweeps removed.
    pub conntrack_removed: Counter,
    /// Sweeps.
    pub conntrack_sweeps: Family<OutcomeLabel, Counter>,
    /// How long a sweep takes.
    pub conntrack_sweep_seconds: Histogram,
    /// Open flows of backends that left.
    pub sockets_ended: Family<ProtocolLabel, Counter>,
    /// Whether the kernel can end sockets.
    pub sockets_endable: Family<ProtocolLabel, Gauge>,
    /// Walks over the namespaces for such flows.
    pub socket_walks: Family<OutcomeLabel, Counter>,
    /// How long a walk takes.
    pub socket_walk_seconds: Histogram,
}

impl AgentMetrics {
    /// Registers everything.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            map_ops: metrics.register(
                "bpf_map_ops",
                "Operations on BPF maps, by outcome",
                Family::default(),
            ),
            round_seconds: metrics.register(
                "round_duration_seconds",
                "Time to apply one round of map operations",
                histogram(),
            ),
            propagation_seconds: metrics.register(
                "propagation_seconds",
                "Time from the first change that a round answers until its operations are applied",
                histogram(),
            ),
            retries_waiting: metrics.register(
                "map_ops_waiting",
                "Failed map operations that wait for another try",
                Gauge::default(),
            ),
            compare_fixes: metrics.register(
                "compare_fixes",
                "Map entries that a full compare had to fix; each is a bug or a foreign writer",
                Family::default(),
            ),
            compares: metrics.register(
                "compares",
                "Full compares of desired state and maps",
                Family::default(),
            ),
            map_entries: metrics.register("bpf_map_entries", "Entries by map", Family::default()),
            refused_objects: metrics.register(
                "refused_objects",
                "Objects of the kvstore that were not accepted",
                Family::default(),
            ),
            upstream_connected: metrics.register(
                "upstream_connected",
                "Whether the clustermesh-apiserver answers",
                Gauge::default(),
            ),
            upstream_heartbeat_age_seconds: metrics.register(
                "upstream_heartbeat_age_seconds",
                "Time since the own cluster's heartbeat was last seen to change",
                FloatGauge::default(),
            ),
            upstream_failures: metrics.register(
                "upstream_failures",
                "Connections to the clustermesh-apiserver that failed or were lost",
                Counter::default(),
            ),
            remote_clusters: metrics.register(
                "clustermesh_remote_clusters",
                "Remote clusters",
                Gauge::default(),
            ),
            remote_cluster_readiness: metrics.register(
                "clustermesh_remote_cluster_readiness_status",
                "Whether a remote cluster is connected, read in full and applied to this node's datapath",
                Family::default(),
            ),
            remote_cluster_reachability: metrics.register(
                "clustermesh_remote_cluster_reachability",
                "Verdict on a remote cluster: 0 reachable, 1 suspect, 2 unreachable (its backends are a last resort)",
                Family::default(),
            ),
            remote_cluster_last_failure_ts: metrics.register(
                "clustermesh_remote_cluster_last_failure_ts",
                "Unix time of the last failure of a remote cluster",
                Family::default(),
            ),
            remote_cluster_failures: metrics.register(
                "clustermesh_remote_cluster_failures",
                "Failures of the connection to a remote cluster",
                Family::default(),
            ),
            remote_cluster_nodes: metrics.register(
                "clustermesh_remote_cluster_nodes",
                "Nodes of a remote cluster",
                Family::default(),
            ),
            remote_cluster_services: metrics.register(
                "clustermesh_remote_cluster_services",
                "Services that a remote cluster shares",
                Family::default(),
            ),
            global_services: metrics.register(
                "clustermesh_global_services",
                "Global services of this cluster",
                Gauge::default(),
            ),
            services: metrics.register("services", "Services of this cluster", Gauge::default()),
            endpoints: metrics.register("endpoints", "Workloads of this node", Gauge::default()),
            ipam_addresses: metrics.register(
                "ipam_addresses",
                "Addresses of this node's pod CIDRs",
                Family::default(),
            ),
            node_connectivity_status: metrics.register(
                "node_connectivity_status",
                "Whether probes through the tunnel reach a node",
                Family::default(),
            ),
            node_connectivity_latency_seconds: metrics.register(
                "node_connectivity_latency_seconds",
                "Round trip of the last answered probe",
                Family::default(),
            ),
            datapath_packets: metrics.register(
                "datapath_packets",
                "Packets and socket calls, by what became of them",
                Family::default(),
            ),
            datapath_bytes: metrics.register("datapath_bytes", "Bytes of the packets", Family::default()),
            conntrack_entries: metrics.register(
                "conntrack_entries",
                "Entries of the conntrack table after its last sweep; a translated flow has two",
                Gauge::default(),
            ),
            conntrack_removed: metrics.register(
                "conntrack_removed_entries",
                "Entries of flows that are over, removed by sweeps",
                Counter::default(),
            ),
            conntrack_sweeps: metrics.register(
                "conntrack_sweeps",
                "Sweeps of the conntrack table",
                Family::default(),
            ),
            conntrack_sweep_seconds: metrics.register(
                "conntrack_sweep_duration_seconds",
                "Time that a sweep of the conntrack table takes",
                histogram(),
            ),
            sockets_ended: metrics.register(
                "datapath_sockets_ended",
                "Sockets that were ended because the backend of their flow left",
                Family::default(),
            ),
            sockets_endable: metrics.register(
                "datapath_sockets_endable",
                "Whether this kernel can end sockets, for each protocol for which that is wanted",
                Family::default(),
            ),
            socket_walks: metrics.register(
                "datapath_socket_walks",
                "Walks over network namespaces for sockets of backends that left",
                Family::default(),
            ),
            socket_walk_seconds: metrics.register(
                "datapath_socket_walk_duration_seconds",
                "Time from looking for sockets of backends that left until they are ended",
                histogram(),
            ),
        }
    }
}

/// From 0.1 ms to about 13 s, doubling.
fn histogram() -> Histogram {
    Histogram::new(std::iter::successors(Some(0.0001), |bound| Some(bound * 2.0)).take(18))
}
