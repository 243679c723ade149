//! The agent's tables as JSON arrays, for people and tests. Pure.

use std::{collections::BTreeMap, time::Duration};

use isthmus_mesh::loadbalancer::BackendView;
use serde_json::{Value, json};

use crate::status::Facts;

/// A table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Table {
    /// Services of this cluster and of others.
    Services,
    /// Every known backend of each service.
    Backends,
    /// Slices, by service and cluster.
    Slices,
    /// Nodes of all clusters.
    Nodes,
    /// Prefixes.
    Ipcache,
    /// Identities with their labels.
    Identities,
    /// Endpoints of this node.
    Endpoints,
    /// Routes into the overlay.
    Routes,
    /// Clusters of the mesh.
    Clusters,
}

impl Table {
    /// All tables.
    pub const ALL: [Self; 9] = [
        Self::Services,
        Self::Backends,
        Self::Slices,
        Self::Nodes,
        Self::Ipcache,
        Self::Identities,
        Self::Endpoints,
        Self::Routes,
        Self::Clusters,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Backends => "backends",
            Self::Slices => "slices",
            Self::Nodes => "nodes",
            Self::Ipcache => "ipcache",
            Self::Identities => "identities",
            Self::Endpoints => "endpoints",
            Self::Routes => "routes",
            Self::Clusters => "clusters",
        }
    }
}

/// A backend's state in one word.
pub fn backend_state(view: &BackendView) -> &'static str {
    match (view.terminating, view.ready, view.serving) {
        (true, _, true) => "terminating",
        (false, true, _) => "active",
        _ => "unready",
    }
}

/// A table's text. `now` is the time since the agent's start.
pub fn json(table: Table, facts: &Facts, now: Duration) -> String {
    Value::Array(match table {
        Table::Services => services(facts),
        Table::Backends => backends(facts),
        Table::Slices => slices(facts),
        Table::Nodes => nodes(facts, now),
        Table::Ipcache => ipcache(facts),
        Table::Identities => identities(facts),
        Table::Endpoints => endpoints(facts),
        Table::Routes => routes(facts),
        Table::Clusters => clusters(facts),
    })
    .to_string()
}

fn services(facts: &Facts) -> Vec<Value> {
    let views = facts.state.lb().services();
    views
        .map(|view| {
            let frontends: Vec<Value> = view
                .frontends
                .iter()
                .map(|frontend| {
                    json!({
                        "address": frontend.address, "port": frontend.port,
                        "protocol": frontend.protocol.as_str(), "port_name": frontend.port_name,
                        "service_id": frontend.service_id, "backends": frontend.backends, "owned": frontend.owned,
                    })
                })
                .collect();
            let used = view.backends.iter().filter(|backend| backend.unused.is_none()).count();
            json!({
                "namespace": view.name.namespace, "name": view.name.name, "local": view.local,
                "global": view.global, "shared": view.shared, "affinity": view.affinity.as_str(),
                "frontends": frontends, "backends_known": view.backends.len(), "backends_used": used,
            })
        })
        .collect()
}

fn backends(facts: &Facts) -> Vec<Value> {
    let views = facts.state.lb().services();
    views
        .flat_map(|view| {
            let name = view.name;
            view.backends.into_iter().map(move |backend| {
                json!({
                    "namespace": name.namespace, "service": name.name,
                    "cluster": backend.cluster, "cluster_id": backend.cluster_id, "slice": backend.slice,
                    "address": backend.address, "port": backend.port,
                    "protocol": backend.protocol.as_str(), "port_name": backend.port_name,
                    "node": backend.node, "zone": backend.zone, "weight": backend.weight,
                    "state": backend_state(&backend), "backend_id": backend.backend_id,
                    "used": backend.unused.is_none(),
                    "reason": backend.unused.map(|unused| unused.as_str()),
                })
            })
        })
        .collect()
}

fn slices(facts: &Facts) -> Vec<Value> {
    let mut slices: BTreeMap<(String, String, String), (usize, usize)> = BTreeMap::new();
    for view in facts.state.lb().services() {
        for backend in view.backends {
            let ready = backend.ready && !backend.terminating;
            let key = (view.name.to_string(), backend.cluster, backend.slice);
            let counts = slices.entry(key).or_default();
            counts.0 += 1;
            counts.1 += usize::from(ready);
        }
    }
    slices
        .into_iter()
        .map(|((service, cluster, slice), (backends, ready))| {
            json!({
                "service": service, "cluster": cluster, "slice": slice, "backends": backends, "ready": ready,
            })
        })
        .collect()
}

fn nodes(facts: &Facts, now: Duration) -> Vec<Value> {
    let probes: BTreeMap<_, _> = facts
        .probes
        .iter()
        .flatten()
        .map(|(key, verdict)| (key, verdict))
        .collect();
    let view = |view: crate::state::NodeView<'_>| {
        let node = view.node;
        let key = crate::probe::NodeKey {
            cluster: node.cluster.clone(),
            node: node.name.clone(),
        };
        let probe = probes.get(&key).map(|verdict| {
            json!({
                "reachable": !verdict.is_unreachable() && verdict.last_success.is_some(),
                "latency_us": verdict.latency.map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX)),
                "last_success_age_ms": verdict
                    .last_success
                    .map(|at| u64::try_from(now.saturating_sub(at).as_millis()).unwrap_or(u64::MAX)),
                "misses": verdict.misses,
                "cause": verdict.cause,
            })
        });
        json!({
            "cluster": node.cluster.as_str(), "cluster_id": node.cluster_id.get(), "name": node.name,
            "own": view.own, "internal_ips": node.internal_ips, "external_ips": node.external_ips,
            "router_ips": node.router_ips, "tunnel_endpoint": node.tunnel_endpoint(),
            "ipv4_cidr": node.ipv4_alloc_cidr.map(|cidr| cidr.to_string()),
            "ipv6_cidr": node.ipv6_alloc_cidr.map(|cidr| cidr.to_string()),
            "encryption_key": node.encryption_key, "probe": probe,
        })
    };
    facts.state.nodes().map(view).collect()
}

fn ipcache(facts: &Facts) -> Vec<Value> {
    let entries = facts.state.ipcache().entries();
    entries
        .into_iter()
        .map(|entry| {
            json!({
                "prefix": entry.prefix.to_string(), "identity": entry.identity, "tunnel_endpoint": entry.tunnel_endpoint,
                "cluster_id": entry.cluster_id, "conflict": entry.conflict,
            })
        })
        .collect()
}

fn identities(facts: &Facts) -> Vec<Value> {
    let all = facts.state.identities().iter();
    all.map(|(number, labels)| {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, label)| format!("{}:{key}={}", label.source, label.value))
            .collect();
        json!({ "identity": number.0, "labels": labels })
    })
    .collect()
}

fn endpoints(facts: &Facts) -> Vec<Value> {
    let local = facts.state.local();
    let view = |endpoint: &crate::endpoints::Endpoint| {
        json!({
            "id": endpoint.id, "container_id": endpoint.attachment.container_id,
            "ifname": endpoint.attachment.ifname, "namespace": endpoint.pod.namespace, "pod": endpoint.pod.name,
            "pod_uid": endpoint.pod.uid, "ipv4": endpoint.ipv4, "ipv6": endpoint.ipv6,
            "host_ifname": endpoint.host_ifname,
            "host_ifindex": endpoint.device.as_ref().map(|device| device.host_ifindex),
            "identity": local.identity_of(endpoint).0,
        })
    };
    local.endpoints().iter().map(view).collect()
}

fn routes(facts: &Facts) -> Vec<Value> {
    let all = facts.state.routes().routes();
    all.map(|route| {
        json!({ "destination": route.destination.to_string(), "cluster_id": route.cluster_id, "node": route.node })
    })
    .collect()
}

fn clusters(facts: &Facts) -> Vec<Value> {
    let own = facts.state.own().map(|own| {
        json!({
            "name": own.name.as_str(), "cluster_id": own.id.get(), "own": true, "slices": own.slices,
            "synced": own.synced, "applied": own.applied, "ready": own.synced && own.applied,
        })
    });
    let remotes = facts.state.remotes().into_iter().map(|remote| {
        json!({
            "name": remote.name.as_str(),
            "cluster_id": remote.cluster.as_ref().map(|cluster| cluster.id.get()),
            "own": false,
            "slices": remote.cluster.as_ref().map(|cluster| cluster.slices),
            "synced": remote.cluster.as_ref().is_some_and(|cluster| cluster.synced),
            "applied": remote.is_applied(), "ready": remote.is_ready(),
            "connected": remote.is_connected(), "status": remote.summary(), "nodes": remote.nodes,
        })
    });
    own.into_iter().chain(remotes).collect()
}
