//! Netlink calls on the network namespace that the socket was opened in. Decides nothing.
//!
//! In: typed values. Out: typed values, and errors that say what was being done.

use std::{io, net::IpAddr, os::fd::AsRawFd};

use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkGetRequest, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags},
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType},
    },
};

use crate::{
    interface::{Link, Mac, Observed, Route, host_prefix},
    netns::Netns,
};

/// A netlink call failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct NetlinkError {
    doing: String,
    #[source]
    source: NetlinkCause,
}

/// Why a netlink call failed.
#[derive(Debug, thiserror::Error)]
enum NetlinkCause {
    /// The kernel's answer, or no socket.
    #[error(transparent)]
    Kernel(#[from] io::Error),
    /// An answer that cannot be read.
    #[error(transparent)]
    Protocol(rtnetlink::Error),
}

impl From<rtnetlink::Error> for NetlinkCause {
    fn from(error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::NetlinkError(message) => Self::Kernel(message.to_io()),
            other => Self::Protocol(other),
        }
    }
}

fn doing<E: Into<NetlinkCause>>(what: impl Into<String>) -> impl FnOnce(E) -> NetlinkError {
    move |source| NetlinkError {
        doing: what.into(),
        source: source.into(),
    }
}

impl NetlinkError {
    /// An error of a call beside netlink that belongs to the same work, such as a sysctl.
    pub fn new(doing: String, source: io::Error) -> Self {
        Self {
            doing,
            source: source.into(),
        }
    }

    /// Whether the kernel has no such thing.
    fn is_absent(&self) -> bool {
        let NetlinkCause::Kernel(error) = &self.source else {
            return false;
        };
        matches!(
            error.raw_os_error(),
            Some(nix::libc::ENODEV | nix::libc::ENOENT | nix::libc::ESRCH)
        )
    }
}

/// A socket in one network namespace.
#[derive(Clone, Debug)]
pub struct Netlink(Handle);

impl Netlink {
    /// Opens a socket in the calling thread's network namespace; needs a tokio runtime, where it is driven.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(doing("open a netlink socket"))?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// The link with this name.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        first_link(
            self.0.link().get().match_name(name),
            format!("read the link {name}"),
        )
        .await
    }

    /// The link with this index.
    pub async fn link_at(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        first_link(
            self.0.link().get().match_index(index),
            format!("read the link with index {index}"),
        )
        .await
    }

    /// Makes a veth pair: `name` here, `peer` in `netns`. Both ends are down.
    pub async fn add_veth(
        &self,
        name: &str,
        peer: &str,
        netns: &Netns,
        mtu: Option<u32>,
    ) -> Result<(), NetlinkError> {
        let mut inner = LinkUnspec::new_with_name(peer).setns_by_fd(netns.file().as_raw_fd());
        let mut outer = LinkVeth::new(name, peer);
        if let Some(mtu) = mtu {
            inner = inner.mtu(mtu);
            outer = outer.mtu(mtu);
        }
        let message = outer
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inner.build())))
            .build();
        let what = format!(
            "make the veth pair {name} and {peer} in {}",
            netns.path().display()
        );
        self.0.link().add(message).execute().await.map_err(doing(what))
    }

    /// Sets a link up, with an alias if one is given.
    pub async fn set_up(&self, link: &Link, alias: Option<&str>) -> Result<(), NetlinkError> {
        let mut message = LinkUnspec::new_with_index(link.index).up();
        if let Some(alias) = alias {
            message = message.alias(alias);
        }
        let what = format!("set {} up", link.name);
        self.0
            .link()
            .change(message.build())
            .execute()
            .await
            .map_err(doing(what))
    }

    /// Removes a link; it may be gone.
    pub async fn delete_link(&self, link: &Link) -> Result<(), NetlinkError> {
        match self
            .0
            .link()
            .del(link.index)
            .execute()
            .await
            .map_err(doing(format!("remove the link {}", link.name)))
        {
            Err(error) if !error.is_absent() => Err(error),
            _ => Ok(()),
        }
    }

    /// Adds a host address, at once usable (no duplicate address detection).
    pub async fn add_address(&self, link: &Link, address: IpAddr) -> Result<(), NetlinkError> {
        let bits = host_prefix(address);
        let mut request = self.0.address().add(link.index, address, bits).replace();
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(doing(format!(
            "add the address {address}/{bits} to {}",
            link.name
        )))
    }

    /// Adds or replaces the route to one address, directly over `link`.
    pub async fn add_host_route(&self, link: &Link, destination: IpAddr) -> Result<(), NetlinkError> {
        let bits = host_prefix(destination);
        let route = route_to(destination, bits)
            .output_interface(link.index)
            .scope(RouteScope::Link)
            .build();
        let what = format!("add the route {destination}/{bits} dev {}", link.name);
        self.0
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .map_err(doing(what))
    }

    /// Adds or replaces the default route of the gateway's family.
    pub async fn add_default_route(&self, link: &Link, gateway: IpAddr) -> Result<(), NetlinkError> {
        let mut builder = route_to(gateway, 0).output_interface(link.index);
        let message = builder.get_mut();
        message
            .attributes
            .retain(|attribute| !matches!(attribute, RouteAttribute::Destination(_)));
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        let what = format!("add the default route via {gateway} dev {}", link.name);
        self.0
            .route()
            .add(builder.build())
            .replace()
            .execute()
            .await
            .map_err(doing(what))
    }

    /// Adds or replaces a permanent neighbour entry.
    pub async fn add_neighbour(&self, link: &Link, address: IpAddr, mac: Mac) -> Result<(), NetlinkError> {
        let what = format!("add the neighbour entry {address} lladdr {mac} dev {}", link.name);
        let request = self
            .0
            .neighbours()
            .add(link.index, address)
            .state(NeighbourState::Permanent);
        request
            .link_layer_address(&mac.0)
            .replace()
            .execute()
            .await
            .map_err(doing(what))
    }

    /// The link with this name and what hangs on it.
    pub async fn observe(&self, name: &str) -> Result<Option<Observed>, NetlinkError> {
        let Some(link) = self.link(name).await? else {
            return Ok(None);
        };
        let mut observed = Observed {
            link,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
        };
        let index = observed.link.index;
        let failed = || doing(format!("read addresses, routes and neighbours of {name}"));

        let mut addresses = self.0.address().get().set_link_index_filter(index).execute();
        while let Some(message) = addresses.try_next().await.map_err(failed())? {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            observed
                .addresses
                .extend(local.or(any).map(|ip| (ip, message.header.prefix_len)));
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut query = RouteMessage::default();
            query.header.address_family = family;
            let mut routes = self.0.route().get(query).execute();
            while let Some(message) = routes.try_next().await.map_err(failed())? {
                observed
                    .routes
                    .extend(route_of(&message, index, family == AddressFamily::Inet));
            }
            let mut neighbours = self.0.neighbours().get().set_address_family(family).execute();
            while let Some(message) = neighbours.try_next().await.map_err(failed())? {
                if message.header.ifindex == index && message.header.state == NeighbourState::Permanent {
                    observed.neighbours.extend(neighbour_of(&message.attributes));
                }
            }
        }
        Ok(Some(observed))
    }
}

async fn first_link(request: LinkGetRequest, what: String) -> Result<Option<Link>, NetlinkError> {
    let mut links = Box::pin(request.execute());
    match links.try_next().await.map_err(doing(what)) {
        Ok(message) => Ok(message.as_ref().map(link_of)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A unicast route in the main table, of the destination's family.
fn route_to(destination: IpAddr, bits: u8) -> RouteMessageBuilder<IpAddr> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new();
    let message = builder.get_mut();
    message.header.address_family = match destination {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = bits;
    message
        .attributes
        .push(RouteAttribute::Destination(destination.into()));
    builder
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Mac([0; 6]),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        veth: false,
        peer: None,
        alias: String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().map_or(link.mac, Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            LinkAttribute::LinkInfo(infos) => {
                link.veth = infos
                    .iter()
                    .any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
            }
            _ => {}
        }
    }
    link
}

fn route_of(message: &RouteMessage, index: u32, ipv4: bool) -> Option<Route> {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let mut route = Route {
        destination: None,
        gateway: None,
        ipv4,
    };
    let mut here = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => here = *oif == index,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::Destination(address) => {
                route.destination = ip(address).map(|ip| (ip, message.header.destination_prefix_length));
            }
            _ => {}
        }
    }
    let main =
        message.header.table == RouteHeader::RT_TABLE_MAIN && message.header.kind == RouteType::Unicast;
    (here && main).then_some(route)
}

fn neighbour_of(attributes: &[NeighbourAttribute]) -> Option<(IpAddr, Mac)> {
    let address = attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let mac = attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })?;
    Some((address, mac))
}
