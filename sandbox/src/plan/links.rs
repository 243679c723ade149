//! The links of a sandbox, as text for `ip -batch` and as kernel settings.
//!
//! One Ethernet segment per cluster (a bridge), all joined to a core bridge by a trunk each, everything in the
//! underlay's own namespace so that the machine's firewall and bridge filters do not touch it. Taking a node's
//! port down cuts off the node; taking a cluster's trunk down cuts the cluster off from the others while it goes on
//! working inside: a partition as the real world makes it.

use super::{NodePlan, Plan, machine_address};

/// What to do inside one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSetup {
    /// The namespace.
    pub netns: String,
    /// Lines for `ip -batch`.
    pub batch: String,
    /// Files below /proc/sys and what to write there, in order.
    pub sysctls: Vec<(&'static str, &'static str)>,
}

/// Device names in the underlay's namespace, by the last number of an address.
impl Plan {
    /// The port of a node or control plane on its cluster's bridge.
    pub fn port_device(host: u8) -> String {
        format!("n{host}")
    }

    /// The core's end of a cluster's trunk: taken down to cut the cluster off.
    pub fn trunk_device(cluster_host: u8) -> String {
        format!("t{cluster_host}")
    }
}

/// The lines for `ip -batch` in the machine's own namespace: namespaces and veths.
pub fn root_batch(plan: &Plan) -> String {
    let underlay = plan.underlay_netns();
    let root = Plan::root_device(plan.index);
    let mut lines = vec![format!("netns add {underlay}")];
    for (netns, _) in hosts(plan) {
        lines.push(format!("netns add {netns}"));
    }
    lines.push(format!(
        "link add {root} type veth peer name machine netns {underlay}"
    ));
    lines.push(format!(
        "address add {}/24 dev {root}",
        machine_address(plan.index)
    ));
    lines.push(format!("link set {root} up"));
    for (netns, host) in hosts(plan) {
        let port = Plan::port_device(host);
        lines.push(format!(
            "link add {port} netns {underlay} type veth peer name eth0 netns {netns}"
        ));
    }
    joined(lines)
}

/// What to do inside each namespace, the underlay's first.
pub fn namespace_setups(plan: &Plan) -> Vec<NamespaceSetup> {
    let mut setups = vec![underlay_setup(plan)];
    for cluster in &plan.clusters {
        setups.push(NamespaceSetup {
            netns: cluster.netns.clone(),
            batch: host_batch(cluster.address.to_string()),
            sysctls: vec![("net/ipv6/conf/eth0/disable_ipv6", "1")],
        });
        setups.extend(cluster.nodes.iter().map(node_setup));
    }
    setups
}

/// Control planes and nodes: (namespace, last number of the address).
fn hosts(plan: &Plan) -> impl Iterator<Item = (&str, u8)> {
    plan.clusters.iter().flat_map(|cluster| {
        let nodes = cluster.nodes.iter().map(|node| (node.netns.as_str(), node.host));
        std::iter::once((cluster.netns.as_str(), cluster.host)).chain(nodes)
    })
}

fn underlay_setup(plan: &Plan) -> NamespaceSetup {
    let mut lines = vec![
        "link add core type bridge".to_owned(),
        "link set core up".to_owned(),
        "link set machine master core".to_owned(),
        "link set machine up".to_owned(),
    ];
    for cluster in &plan.clusters {
        let (bridge, trunk) = (format!("c{}", cluster.host), Plan::trunk_device(cluster.host));
        lines.push(format!("link add {bridge} type bridge"));
        lines.push(format!("link set {bridge} up"));
        lines.push(format!("link add {trunk} type veth peer name u{}", cluster.host));
        lines.push(format!("link set {trunk} master core"));
        lines.push(format!("link set u{} master {bridge}", cluster.host));
        lines.push(format!("link set {trunk} up"));
        lines.push(format!("link set u{} up", cluster.host));
        for host in std::iter::once(cluster.host).chain(cluster.nodes.iter().map(|node| node.host)) {
            let port = Plan::port_device(host);
            lines.push(format!("link set {port} master {bridge}"));
            lines.push(format!("link set {port} up"));
        }
    }
    NamespaceSetup {
        netns: plan.underlay_netns(),
        batch: joined(lines),
        sysctls: Vec::new(),
    }
}

fn node_setup(node: &NodePlan) -> NamespaceSetup {
    NamespaceSetup {
        netns: node.netns.clone(),
        batch: host_batch(node.address.to_string()),
        sysctls: vec![
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/eth0/rp_filter", "0"),
        ],
    }
}

fn host_batch(address: String) -> String {
    joined(vec![
        "link set lo up".to_owned(),
        format!("address add {address}/24 dev eth0"),
        "link set eth0 up".to_owned(),
    ])
}

fn joined(lines: Vec<String>) -> String {
    lines.into_iter().map(|line| line + "\n").collect()
}
