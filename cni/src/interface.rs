//! What a pod's interface must look like, and how what is there differs from it.
//!
//! In: the agent's allocation or an earlier result, and what netlink showed. Out: [`Interface`] (addresses, next hops,
//! names), and differences as sentences. Pure.
//!
//! A pod has one /32 and (or) one /128 and knows nothing else on its link: the next hop of each family is routed to the
//! interface and answered by a permanent neighbour entry, the MAC address of the node's end. No ARP, no discovery.

use std::net::IpAddr;

use isthmus_proto::agent::AllocateResponse;

use crate::{
    config::PrevResult,
    request::{Attachment, is_ifname},
};

/// Smallest MTU that IPv6 allows.
const MTU_MIN_IPV6: u32 = 1280;
/// Smallest MTU that IPv4 allows.
const MTU_MIN_IPV4: u32 = 68;
/// Largest MTU of a veth pair.
const MTU_MAX: u32 = 65_535;

/// A MAC address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address of the pod and the next hop for its family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Family {
    /// The pod's own; /32 or /128.
    pub address: IpAddr,
    /// Next hop.
    pub gateway: IpAddr,
}

impl Family {
    /// 32 or 128.
    pub fn host_prefix(self) -> u8 {
        host_prefix(self.address)
    }
}

/// Prefix length of one address of this family.
pub const fn host_prefix(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// A pod's interface as it must be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// Name inside the pod.
    pub ifname: String,
    /// Name of the node's end.
    pub host_ifname: String,
    /// MTU of both ends; none leaves it to the kernel.
    pub mtu: Option<u32>,
    /// IPv4 first; at least one.
    pub families: Vec<Family>,
}

/// The agent's answer cannot be right.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the agent's allocation has {field} {got:?}: {why}")]
pub struct AllocationError {
    field: &'static str,
    got: String,
    why: &'static str,
}

/// An earlier result is not one of ours.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("prevResult {0}; it must be the result of this plugin's ADD")]
pub struct PrevResultError(String);

impl Interface {
    /// The interface that the agent's answer describes.
    pub fn from_allocation(
        attachment: &Attachment,
        answer: &AllocateResponse,
    ) -> Result<Self, AllocationError> {
        let wrong = |field, got: &dyn std::fmt::Display, why| AllocationError {
            field,
            got: got.to_string(),
            why,
        };
        if !(1..=65_535).contains(&answer.endpoint_id) {
            return Err(wrong("endpoint_id", &answer.endpoint_id, "it must be 1 to 65535"));
        }
        if !is_ifname(&answer.host_ifname) {
            return Err(wrong(
                "host_ifname",
                &answer.host_ifname,
                "it is not an interface name",
            ));
        }
        let mut families = Vec::with_capacity(2);
        for (is_ipv4, names, address, gateway) in [
            (true, ["ipv4", "ipv4_gateway"], &answer.ipv4, &answer.ipv4_gateway),
            (
                false,
                ["ipv6", "ipv6_gateway"],
                &answer.ipv6,
                &answer.ipv6_gateway,
            ),
        ] {
            if address.is_empty() {
                continue;
            }
            let parse = |field, text: &String| match text.parse::<IpAddr>() {
                Ok(ip) if ip.is_ipv4() == is_ipv4 && !ip.is_unspecified() && !ip.is_multicast() => Ok(ip),
                _ => Err(wrong(field, text, "it is not a unicast address of that family")),
            };
            let family = Family {
                address: parse(names[0], address)?,
                gateway: parse(names[1], gateway)?,
            };
            if family.address == family.gateway {
                return Err(wrong(names[1], gateway, "it is the pod's own address"));
            }
            families.push(family);
        }
        if families.is_empty() {
            return Err(wrong("ipv4 and ipv6", &"", "it needs at least one address"));
        }
        let mtu_min = if answer.ipv6.is_empty() {
            MTU_MIN_IPV4
        } else {
            MTU_MIN_IPV6
        };
        let mtu = match answer.mtu {
            0 => None,
            mtu if (mtu_min..=MTU_MAX).contains(&mtu) => Some(mtu),
            mtu => return Err(wrong("mtu", &mtu, "it is too small or too large for a pod")),
        };
        Ok(Self {
            ifname: attachment.ifname.clone(),
            host_ifname: answer.host_ifname.clone(),
            mtu,
            families,
        })
    }

    /// The interface that an earlier result describes.
    pub fn from_result(attachment: &Attachment, result: &PrevResult) -> Result<Self, PrevResultError> {
        let pod = result
            .interfaces
            .iter()
            .any(|it| !it.sandbox.is_empty() && it.name == attachment.ifname);
        if !pod {
            return Err(PrevResultError(format!(
                "has no interface {} in a sandbox",
                attachment.ifname
            )));
        }
        let host = result
            .interfaces
            .iter()
            .find(|it| it.sandbox.is_empty() && is_ifname(&it.name));
        let host = host.ok_or_else(|| PrevResultError("has no interface of the node".into()))?;
        let family = |ip: &crate::config::PrevIp| {
            let (address, bits) = ip.address.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            (bits.parse() == Ok(host_prefix(address))).then_some(Family {
                address,
                gateway: ip.gateway?,
            })
        };
        let families: Option<Vec<_>> = result.ips.iter().map(family).collect();
        let families = families.filter(|families| !families.is_empty()).ok_or_else(|| {
            PrevResultError("has an address that is no /32 or /128 with a gateway, or no address".into())
        })?;
        Ok(Self {
            ifname: attachment.ifname.clone(),
            host_ifname: host.name.clone(),
            mtu: None,
            families,
        })
    }
}

/// A link as netlink shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Index in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MAC address; zero if it has none.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// One end of a veth pair.
    pub veth: bool,
    /// Index of the other end, in that end's namespace.
    pub peer: Option<u32>,
    /// Alias; empty if none.
    pub alias: String,
}

/// A unicast route in the main table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Route {
    /// Destination; none for a default route.
    pub destination: Option<(IpAddr, u8)>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Whether it is IPv4's.
    pub ipv4: bool,
}

/// A link and what hangs on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Observed {
    /// The link.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Routes over it.
    pub routes: Vec<Route>,
    /// Permanent neighbour entries.
    pub neighbours: Vec<(IpAddr, Mac)>,
}

/// How the two ends differ from `interface`, one sentence each; empty if they do not.
pub fn differences(interface: &Interface, pod: Option<&Observed>, host: Option<&Observed>) -> Vec<String> {
    let (ifname, host_ifname) = (&interface.ifname, &interface.host_ifname);
    let mut found = Vec::new();
    let Some(pod) = pod else {
        return vec![format!("the pod has no interface {ifname}")];
    };
    let Some(host) = host else {
        return vec![format!("the node has no interface {host_ifname}")];
    };
    if !pod.link.veth || pod.link.peer != Some(host.link.index) {
        return vec![format!(
            "{ifname} of the pod and {host_ifname} of the node are not one veth pair"
        )];
    }
    for end in [&pod.link, &host.link] {
        if !end.up {
            found.push(format!("{} is down", end.name));
        }
        if let Some(mtu) = interface.mtu.filter(|mtu| *mtu != end.mtu) {
            found.push(format!("{} has MTU {} and not {mtu}", end.name, end.mtu));
        }
    }
    for family in &interface.families {
        let (address, gateway, bits) = (family.address, family.gateway, family.host_prefix());
        if !pod.addresses.contains(&(address, bits)) {
            found.push(format!("{ifname} of the pod lacks the address {address}/{bits}"));
        }
        let ipv4 = address.is_ipv4();
        let to_gateway = Route {
            destination: Some((gateway, bits)),
            gateway: None,
            ipv4,
        };
        let default = Route {
            destination: None,
            gateway: Some(gateway),
            ipv4,
        };
        if !pod.routes.contains(&to_gateway) {
            found.push(format!("the pod lacks the route {gateway}/{bits} dev {ifname}"));
        }
        if !pod.routes.contains(&default) {
            found.push(format!(
                "the pod lacks the default route via {gateway} dev {ifname}"
            ));
        }
        if !pod.neighbours.contains(&(gateway, host.link.mac)) {
            found.push(format!(
                "the pod lacks the neighbour entry {gateway} lladdr {}",
                host.link.mac
            ));
        }
        let to_pod = Route {
            destination: Some((address, bits)),
            gateway: None,
            ipv4,
        };
        if !host.routes.contains(&to_pod) {
            found.push(format!(
                "the node lacks the route {address}/{bits} dev {host_ifname}"
            ));
        }
        if !host.neighbours.contains(&(address, pod.link.mac)) {
            found.push(format!(
                "the node lacks the neighbour entry {address} lladdr {}",
                pod.link.mac
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests;
