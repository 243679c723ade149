//! Which devices of the node lead to the outside, which of their addresses pods get there, and which ports may stand for others.
//!
//! In: the node's links, addresses and routes ([`survey`]), the devices that were named, if any. Out: [`OutsideDevice`]s, to
//! attach hooks to. What is found is plain data; the choice is pure.
//!
//! Without names these are the devices with a default route and those that have one of the node's addresses. Devices without
//! Ethernet headers are never taken: the programs read those.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
};

use futures::TryStreamExt;
use isthmus_bpf_abi::Device;
use isthmus_mesh::to_address;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkLayerType},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use crate::device::{DeviceError, VXLAN_NAME, failed};

/// Ports that Kubernetes gives to services on nodes; they never stand for others.
pub const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// The least port that stands for others.
const PORT_MIN: u16 = 1_024;

/// Names of devices: a name, or the beginning of one and `+`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DevicePattern(String);

impl DevicePattern {
    /// Longest name of a device.
    const LEN_MAX: usize = 15;

    /// Reads one; nothing if no device can have such a name.
    pub fn new(text: &str) -> Option<Self> {
        let start = text.strip_suffix('+').unwrap_or(text);
        let fits = text.len() <= Self::LEN_MAX
            && !text.is_empty()
            && start != "."
            && start != ".."
            && start
                .chars()
                .all(|c| c.is_ascii_graphic() && !['/', ':', '+', ','].contains(&c));
        fits.then(|| Self(text.to_owned()))
    }

    /// Whether it names this device.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('+') {
            Some(start) => name.starts_with(start),
            None => self.0 == name,
        }
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A device of the node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FoundDevice {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Its frames have Ethernet headers, and it is no loopback.
    pub ethernet: bool,
    /// A default route leads there.
    pub has_default_route: bool,
    /// Its addresses that others may know: those that may be used as a source first.
    pub addresses: Vec<IpAddr>,
}

/// A device to the outside.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OutsideDevice {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// What pods' packets that leave there have as their source, IPv4.
    pub ipv4: Option<IpAddr>,
    /// The same, IPv6.
    pub ipv6: Option<IpAddr>,
}

impl OutsideDevice {
    /// Its entry in the devices' map.
    pub fn entry(&self) -> (u32, Device) {
        let device = Device {
            ipv4: self.ipv4.map(to_address).unwrap_or_default(),
            ipv6: self.ipv6.map(to_address).unwrap_or_default(),
        };
        (self.ifindex, device)
    }
}

/// Chooses among `found` those that `patterns` name, or, without patterns, those that lead outside by their routes or have one
/// of the node's addresses. Returns also the patterns that name none.
pub fn choose<'a>(
    found: &[FoundDevice],
    patterns: &'a [DevicePattern],
    node_addresses: &[IpAddr],
) -> (Vec<OutsideDevice>, Vec<&'a DevicePattern>) {
    let usable = || {
        found
            .iter()
            .filter(|device| device.ethernet && device.name != VXLAN_NAME)
    };
    let wanted = |device: &&FoundDevice| {
        if patterns.is_empty() {
            device.has_default_route || device.addresses.iter().any(|ip| node_addresses.contains(ip))
        } else {
            patterns.iter().any(|pattern| pattern.matches(&device.name))
        }
    };
    let unmatched = patterns
        .iter()
        .filter(|pattern| !usable().any(|device| pattern.matches(&device.name)))
        .collect();
    let chosen = usable()
        .filter(wanted)
        .map(|device| {
            let address = |ipv4: bool| {
                let of = |list: &[IpAddr], known: bool| {
                    let mut list = list.iter().filter(|ip| ip.is_ipv4() == ipv4);
                    list.find(|ip| !known || node_addresses.contains(ip)).copied()
                };
                // The address by which others know the node, if the device has it; else the device's own; without one, the node's.
                of(&device.addresses, true)
                    .or_else(|| of(&device.addresses, false))
                    .or_else(|| of(node_addresses, false))
            };
            OutsideDevice {
                ifindex: device.ifindex,
                name: device.name.clone(),
                ipv4: address(true),
                ipv6: address(false),
            }
        })
        .collect();
    (chosen, unmatched)
}

/// The node's devices, in the network namespace of `netlink`.
pub async fn survey(netlink: &Handle) -> Result<Vec<FoundDevice>, DeviceError> {
    let mut devices: BTreeMap<u32, FoundDevice> = BTreeMap::new();
    let mut links = netlink.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(failed("listing", "devices"))? {
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let header = &link.header;
        let device = FoundDevice {
            ifindex: header.index,
            name: name.unwrap_or_default(),
            ethernet: header.link_layer_type == LinkLayerType::Ether
                && !header.flags.contains(LinkFlags::Loopback),
            ..FoundDevice::default()
        };
        devices.insert(header.index, device);
    }
    let mut addresses = netlink.address().get().execute();
    let mut spare: Vec<(u32, IpAddr)> = Vec::new();
    while let Some(message) = addresses
        .try_next()
        .await
        .map_err(failed("listing", "addresses"))?
    {
        // Where the two differ (point-to-point links) `Local` is ours.
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        let Some(ip) = find(true).or_else(|| find(false)) else {
            continue;
        };
        if matches!(
            message.header.scope,
            AddressScope::Link | AddressScope::Host | AddressScope::Nowhere
        ) {
            continue;
        }
        let flags = message.header.flags;
        if flags.intersects(AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Tentative) {
            continue;
        }
        if flags.intersects(AddressHeaderFlags::Secondary | AddressHeaderFlags::Deprecated) {
            // Temporary ones too, for IPv6.
            spare.push((message.header.index, ip));
        } else if let Some(device) = devices.get_mut(&message.header.index) {
            device.addresses.push(ip);
        }
    }
    for (ifindex, ip) in spare {
        if let Some(device) = devices.get_mut(&ifindex) {
            device.addresses.push(ip);
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let mut routes = netlink.route().get(request).execute();
        while let Some(route) = routes.try_next().await.map_err(failed("listing", "routes"))? {
            for ifindex in default_route(&route) {
                if let Some(device) = devices.get_mut(&ifindex) {
                    device.has_default_route = true;
                }
            }
        }
    }
    Ok(devices.into_values().collect())
}

/// The devices of a default route of the main table; none of another route.
fn default_route(route: &RouteMessage) -> BTreeSet<u32> {
    let header = &route.header;
    if header.destination_prefix_length != 0
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
    {
        return BTreeSet::new();
    }
    let mut devices = BTreeSet::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => {
                devices.insert(*ifindex);
            }
            RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    devices
}

/// Ports that may stand for others, where the node's own sockets take theirs from `local`: the largest gap between the two kinds of
/// ports in use. If there is none to speak of, all above; then the node's own connections may meet those of others.
pub fn snat_ports(local: &RangeInclusive<u16>) -> (RangeInclusive<u16>, bool) {
    /// Fewer are none.
    const ENOUGH: u16 = 2_048;
    let mut taken = [local.clone(), NODE_PORTS];
    taken.sort_by_key(|range| *range.start());
    let mut best = PORT_MIN..=PORT_MIN;
    let mut next = u32::from(PORT_MIN);
    let end = 0x1_0000..=0x1_0000_u32;
    for range in taken
        .map(|range| u32::from(*range.start())..=u32::from(*range.end()))
        .into_iter()
        .chain([end])
    {
        let gap = range.start().saturating_sub(next);
        if gap > u32::from(best.end() - best.start()) + 1 {
            // Both are below 0x1_0000: a gap ends before its range, and is not empty.
            best = next as u16..=(range.start() - 1) as u16;
        }
        next = next.max(range.end() + 1);
    }
    if best.end() - best.start() + 1 >= ENOUGH {
        (best, true)
    } else {
        (NODE_PORTS.end() + 1..=u16::MAX, false)
    }
}

/// Ports from which the node's own sockets take theirs; of the calling thread's network namespace.
pub fn local_ports() -> std::io::Result<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    parse_local_ports(&text).ok_or_else(|| {
        std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("two port numbers expected, found {text:?}"),
        )
    })
}

fn parse_local_ports(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(min)), Some(Ok(max)), None) if min <= max => Some(min..=max),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(ifindex: u32, name: &str, default: bool, addresses: &[&str]) -> FoundDevice {
        FoundDevice {
            ifindex,
            name: name.into(),
            ethernet: true,
            has_default_route: default,
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn patterns(names: &[&str]) -> Vec<DevicePattern> {
        names
            .iter()
            .map(|name| DevicePattern::new(name).unwrap())
            .collect()
    }

    fn names(devices: &[OutsideDevice]) -> Vec<&str> {
        devices.iter().map(|device| device.name.as_str()).collect()
    }

    #[test]
    fn routes_and_the_nodes_addresses_lead_outside() {
        let loopback = FoundDevice {
            ethernet: false,
            ..device(1, "lo", true, &["192.0.2.1"])
        };
        let found = [
            loopback,
            device(2, "eth0", true, &["198.51.100.1"]),
            device(3, "eth1", false, &["10.9.0.1", "192.0.2.1", "2001:db8::1"]),
            device(4, "eth2", false, &["10.8.0.1"]),
            device(5, VXLAN_NAME, true, &["192.0.2.1"]),
            device(6, "lxc1", false, &[]),
        ];
        let node = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let (chosen, unmatched) = choose(&found, &[], &node);
        assert_eq!((names(&chosen), unmatched.len()), (vec!["eth0", "eth1"], 0));
        // eth0 has no IPv6 of its own; eth1 has an address by which the node is known.
        let addresses = |device: &OutsideDevice| (device.ipv4.unwrap(), device.ipv6.unwrap());
        assert_eq!(addresses(&chosen[0]), ("198.51.100.1".parse().unwrap(), node[1]));
        assert_eq!(addresses(&chosen[1]), (node[0], node[1]));
        assert_eq!(choose(&found, &[], &[]).0.len(), 1);
    }

    #[test]
    fn names_and_beginnings_of_names_choose() {
        let found = [
            device(2, "eth0", true, &["192.0.2.1"]),
            device(3, "eth1", false, &[]),
            device(4, "bond0", false, &["10.8.0.1"]),
            device(5, VXLAN_NAME, false, &[]),
        ];
        let node = ["192.0.2.1".parse().unwrap()];
        let names_of = |text: &[&str]| {
            let patterns = patterns(text);
            let (chosen, unmatched) = choose(&found, &patterns, &node);
            let unmatched: Vec<_> = unmatched.iter().map(|p| p.as_str().to_owned()).collect();
            (
                chosen.iter().map(|d| d.name.clone()).collect::<Vec<_>>(),
                unmatched,
            )
        };
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(names_of(&["bond0"]), (strings(&["bond0"]), vec![]));
        assert_eq!(
            names_of(&["eth+", "ens1"]),
            (strings(&["eth0", "eth1"]), strings(&["ens1"]))
        );
        assert_eq!(names_of(&["eth", VXLAN_NAME]).0, strings(&[]));
        assert_eq!(names_of(&["+"]).0, strings(&["eth0", "eth1", "bond0"]));
        assert_eq!(
            choose(&found, &patterns(&["eth1"]), &node).0[0].ipv4,
            Some(node[0])
        );
        for bad in ["", "a/b", "eth 0", "a+b", "a123456789012345", "..", "a,b"] {
            assert_eq!(DevicePattern::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn ports_of_the_node_and_of_services_are_spared() {
        let rows = [
            (32_768..=60_999, 1_024..=29_999, true),
            (10_000..=65_535, 1_024..=9_999, true),
            (1_024..=32_767, 32_768..=65_535, true),
            (1_024..=60_000, 60_001..=65_535, true),
            // Nothing to speak of.
            (1_024..=65_535, 32_768..=65_535, false),
            (1_024..=64_999, 32_768..=65_535, false),
            // Just enough, and one too few.
            (1_024..=63_487, 63_488..=65_535, true),
            (3_072..=65_535, 1_024..=3_071, true),
            (1_024..=63_488, 32_768..=65_535, false),
            (3_071..=65_535, 32_768..=65_535, false),
        ];
        for (local, ports, apart) in rows {
            assert_eq!(snat_ports(&local), (ports, apart), "{local:?}");
        }
        assert_eq!(parse_local_ports("32768\t60999\n"), Some(32_768..=60_999));
        for bad in ["", "5", "9 5", "1 2 3", "a b"] {
            assert_eq!(parse_local_ports(bad), None, "{bad}");
        }
    }
}
