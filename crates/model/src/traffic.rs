//! How traffic to a service is spread and who may send it: what only the service's own cluster reads of its frame.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::Preference;

/// Kubernetes' traffic policy: which backends a frontend may use.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum TrafficPolicy {
    /// All.
    #[default]
    Cluster,
    /// Those on the node that is asked.
    Local,
}

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Algorithm {
    /// As the agent is configured.
    #[default]
    Unspecified,
    /// Any of them.
    Random,
    /// By a Maglev table: the same flow to the same backend, from every node.
    Maglev,
}

/// See the module.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    /// Order of clusters, minimum, spill-over and slow start.
    pub preference: Preference,
    /// For cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// For node ports, external IPs and load balancers' addresses, as seen from outside.
    pub external_policy: TrafficPolicy,
    /// How a backend is chosen.
    pub algorithm: Algorithm,
    /// Those of [`crate::ServiceFrame::external_ips`] that are load balancers' addresses.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may ask at load balancers' addresses; everybody if there are none.
    pub source_ranges: Vec<IpNet>,
}
