//! The overlay's device: one VXLAN device that takes tunnel data from the programs, with the node's router IPs.
//!
//! In: port, MTU, addresses. Out: the device's index. Calling again changes only what differs, so that traffic flows on
//! through an agent's restart; only another port makes a new device (the kernel cannot change it).

use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, LinkVxlan,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVxlan, LinkAttribute, LinkFlags,
            LinkInfo, LinkMessage,
        },
    },
};

/// Name of the VXLAN device.
pub const VXLAN_NAME: &str = "isthmus_vxlan";

/// Bytes that VXLAN adds over IPv4: IP 20, UDP 8, VXLAN 8, inner Ethernet 14.
pub const OVERHEAD_IPV4: u32 = 50;
/// The same over IPv6.
pub const OVERHEAD_IPV6: u32 = 70;
/// Least MTU of a device that carries IPv6.
const MTU_MIN: u32 = 1280;

/// The VXLAN device as it should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VxlanConfig {
    /// UDP port, of senders' destinations and our own.
    pub port: u16,
    /// MTU of the device, see [`overlay_mtu`].
    pub mtu: u32,
    /// Router IPs, each alone in its prefix.
    pub router_ips: Vec<IpAddr>,
}

/// A device operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// netlink refuses.
    #[error("{call} {device}")]
    Netlink {
        /// What was tried.
        call: &'static str,
        /// With which device.
        device: String,
        /// The kernel's answer.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// The kernel says that it made the device, but does not show it.
    #[error("device {device} is not there after its creation: is something else removing it?")]
    Vanished {
        /// Which.
        device: String,
    },
    /// Nobody has that address.
    #[error("no device has the node's address {address}: the overlay's MTU cannot be derived, set --mtu")]
    NoUnderlay {
        /// The node's address.
        address: IpAddr,
    },
    /// A kernel setting.
    #[error("cannot write {value} to {path}")]
    Sysctl {
        /// Which.
        path: String,
        /// What.
        value: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Makes the device as it should be; returns its index.
pub async fn ensure_vxlan(netlink: &Handle, config: &VxlanConfig) -> Result<u32, DeviceError> {
    let mut existing = find(netlink, VXLAN_NAME).await?;
    if let Some(link) = &existing
        && !is_wanted_vxlan(link, config.port)
    {
        delete(netlink, link.header.index).await?;
        existing = None;
    }
    let ifindex = match existing {
        Some(link) => link.header.index,
        None => create(netlink, config.port).await?,
    };
    let change = LinkUnspec::new_with_index(ifindex)
        .mtu(config.mtu)
        .arp(false)
        .multicast(false)
        .up()
        .build();
    netlink
        .link()
        .set(change)
        .execute()
        .await
        .map_err(failed("configuring", VXLAN_NAME))?;
    ensure_addresses(netlink, ifindex, &config.router_ips).await?;
    Ok(ifindex)
}

/// Removes the device; it may be absent.
pub async fn remove_vxlan(netlink: &Handle) -> Result<(), DeviceError> {
    match find(netlink, VXLAN_NAME).await? {
        Some(link) => delete(netlink, link.header.index).await,
        None => Ok(()),
    }
}

/// The overlay's MTU when nodes reach each other through the device that has `node_address`.
pub async fn overlay_mtu(netlink: &Handle, node_address: IpAddr) -> Result<u32, DeviceError> {
    let missing = || DeviceError::NoUnderlay {
        address: node_address,
    };
    let mut addresses = netlink.address().get().set_address_filter(node_address).execute();
    let found = addresses
        .try_next()
        .await
        .map_err(failed("finding the device of", &node_address.to_string()))?;
    let ifindex = found.ok_or_else(missing)?.header.index;
    let mut links = netlink.link().get().match_index(ifindex).execute();
    let link = links
        .try_next()
        .await
        .map_err(failed("reading the device of", &node_address.to_string()))?;
    let mtu = link.and_then(|link| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
    });
    Ok(mtu_over(mtu.ok_or_else(missing)?, node_address))
}

/// The overlay's MTU over an underlay with `underlay_mtu` and nodes' addresses like `node_address`.
pub fn mtu_over(underlay_mtu: u32, node_address: IpAddr) -> u32 {
    let overhead = if node_address.is_ipv4() {
        OVERHEAD_IPV4
    } else {
        OVERHEAD_IPV6
    };
    underlay_mtu.saturating_sub(overhead).max(MTU_MIN)
}

/// Lets the node's stack forward, and take packets from the overlay whatever its routes say of their sources: the
/// programs have checked those. Writes to the calling thread's network namespace.
pub fn enable_forwarding() -> Result<(), DeviceError> {
    // Without it the kernel's default counts.
    let all = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter").unwrap_or_default();
    let settings = [
        ("/proc/sys/net/ipv4/ip_forward".to_owned(), "1"),
        ("/proc/sys/net/ipv6/conf/all/forwarding".to_owned(), "1"),
        (
            format!("/proc/sys/net/ipv4/conf/{VXLAN_NAME}/rp_filter"),
            rp_filter(&all),
        ),
    ];
    for (path, value) in settings {
        // A kernel without IPv6 has no such file, and nothing to forward.
        if let Err(source) = std::fs::write(&path, value)
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(DeviceError::Sysctl { path, value, source });
        }
    }
    Ok(())
}

/// The device's value where `conf/all` is `all`. The kernel takes the larger of the two: 0 switches the check off only where
/// the node has it off; where it is strict (1), 2 makes it loose for this device: then any route to the source will do.
fn rp_filter(all: &str) -> &'static str {
    match all.trim() {
        "" | "0" => "0",
        _ => "2",
    }
}

async fn create(netlink: &Handle, port: u16) -> Result<u32, DeviceError> {
    let message = LinkVxlan::new(VXLAN_NAME, 0)
        .append_info_data(InfoVxlan::CollectMetadata(true))
        .learning(false)
        .port(port)
        .arp(false)
        // The overlay carries none, so the stack need not announce its groups there.
        .multicast(false)
        .build();
    netlink
        .link()
        .add(message)
        .execute()
        .await
        .map_err(failed("creating the VXLAN device", VXLAN_NAME))?;
    let link = find(netlink, VXLAN_NAME).await?;
    let ifindex = link.map(|link| link.header.index).ok_or(DeviceError::Vanished {
        device: VXLAN_NAME.to_owned(),
    })?;
    // No link-local address: it would send router solicitations into an overlay that has no router. The kernel takes
    // this only for a device that exists, and it must come before the device is up.
    let no_link_local =
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])]);
    let message = LinkUnspec::new_with_index(ifindex)
        .append_extra_attribute(no_link_local)
        .build();
    match netlink.link().set(message).execute().await {
        // A kernel without IPv6.
        Err(error) if errno(&error) == Some(libc::EAFNOSUPPORT) => {}
        result => result.map_err(failed("configuring", VXLAN_NAME))?,
    }
    Ok(ifindex)
}

async fn delete(netlink: &Handle, ifindex: u32) -> Result<(), DeviceError> {
    netlink
        .link()
        .del(ifindex)
        .execute()
        .await
        .map_err(failed("removing", VXLAN_NAME))
}

async fn find(netlink: &Handle, name: &str) -> Result<Option<LinkMessage>, DeviceError> {
    let mut links = netlink.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(link) => Ok(link),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(failed("finding", name)(error)),
    }
}

/// Whether the device is a VXLAN device that takes tunnel data from outside and listens on `port`.
fn is_wanted_vxlan(link: &LinkMessage, port: u16) -> bool {
    let infos = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let data: Vec<&InfoVxlan> = infos
        .flatten()
        .filter_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
            _ => None,
        })
        .flatten()
        .collect();
    data.iter()
        .any(|info| matches!(info, InfoVxlan::CollectMetadata(true)))
        && data
            .iter()
            .any(|info| matches!(info, InfoVxlan::Port(found) if *found == port))
        && link.header.flags.contains(LinkFlags::Noarp)
}

/// Adds the missing addresses, then removes the others.
async fn ensure_addresses(netlink: &Handle, ifindex: u32, wanted: &[IpAddr]) -> Result<(), DeviceError> {
    let on = |call| failed(call, VXLAN_NAME);
    let messages: Vec<_> = netlink
        .address()
        .get()
        .set_link_index_filter(ifindex)
        .execute()
        .try_collect()
        .await
        .map_err(on("reading the addresses of"))?;
    let address_of = |message: &rtnetlink::packet_route::address::AddressMessage| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    };
    for address in wanted {
        let host_bits = if address.is_ipv4() { 32 } else { 128 };
        let present = messages
            .iter()
            .any(|message| address_of(message) == Some(*address) && message.header.prefix_len == host_bits);
        if !present {
            let mut request = netlink.address().add(ifindex, *address, host_bits).replace();
            // Usable at once: the device has no neighbours to probe, and routes name this source right away.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            request.execute().await.map_err(on("adding a router IP to"))?;
        }
    }
    for message in messages {
        let keep = address_of(&message).is_some_and(|address| wanted.contains(&address));
        if !keep && matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
            netlink
                .address()
                .del(message)
                .execute()
                .await
                .map_err(on("removing an address from"))?;
        }
    }
    Ok(())
}

/// The errno in a netlink error.
pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

pub(crate) fn failed(call: &'static str, device: &str) -> impl Fn(rtnetlink::Error) -> DeviceError + use<> {
    let device = device.to_owned();
    move |source| DeviceError::Netlink {
        call,
        device: device.clone(),
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strict_node_does_not_make_the_overlay_strict() {
        let effective = |all: &str| {
            all.trim()
                .parse::<u8>()
                .unwrap()
                .max(rp_filter(all).parse().unwrap())
        };
        assert_eq!((effective("0\n"), effective("1\n"), effective("2\n")), (0, 2, 2));
        assert_eq!(rp_filter(""), "0");
    }

    #[test]
    fn mtu_leaves_room_for_the_outer_headers() {
        let ipv4 = IpAddr::from([192, 0, 2, 1]);
        let ipv6 = IpAddr::from([0x2001_u16, 0xdb8, 0, 0, 0, 0, 0, 1]);
        assert_eq!((mtu_over(1500, ipv4), mtu_over(1500, ipv6)), (1450, 1430));
        assert_eq!(mtu_over(9000, ipv4), 8950);
        assert_eq!(mtu_over(600, ipv4), MTU_MIN);
    }
}
