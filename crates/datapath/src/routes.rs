//! The routes of a node: remote pod CIDRs into the overlay, local pods to their devices. Desired against actual.
//!
//! In: desired routes. Out: kernel routes in the main table, marked as ours by [`PROTOCOL`]; others are never touched.
//!
//! [`plan`] is pure; it adds before it removes. A route that only changes its device or source is replaced in one step.

use std::{collections::BTreeSet, net::IpAddr};

use futures::TryStreamExt;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope},
    },
};

use crate::device::errno;

/// Number by which the kernel remembers that a route is ours (`rtm_protocol`; 0x49 is "I", free in rt_protos).
pub const PROTOCOL: u8 = 0x49;

/// A route in the main table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Route {
    /// Where to; bits after the prefix are zero.
    pub destination: IpAddr,
    /// Bits that count.
    pub prefix_len: u8,
    /// Through which device.
    pub ifindex: u32,
    /// From which address, if the sender did not choose.
    pub source: Option<IpAddr>,
}

/// What to do, in this order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RoutePlan {
    /// To add, or to put in place of one with the same destination.
    pub put: Vec<Route>,
    /// To remove.
    pub remove: Vec<Route>,
}

/// A route operation failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} {what}")]
pub struct RouteError {
    /// What was tried.
    pub call: &'static str,
    /// With which route.
    pub what: String,
    /// The kernel's answer.
    #[source]
    pub source: Box<rtnetlink::Error>,
}

/// What turns `actual` into `desired`.
pub fn plan(actual: &BTreeSet<Route>, desired: &BTreeSet<Route>) -> RoutePlan {
    let kept: BTreeSet<_> = desired
        .iter()
        .map(|route| (route.destination, route.prefix_len))
        .collect();
    RoutePlan {
        put: desired.difference(actual).copied().collect(),
        remove: actual
            .iter()
            .filter(|route| !kept.contains(&(route.destination, route.prefix_len)))
            .copied()
            .collect(),
    }
}

/// Our routes.
pub async fn dump(netlink: &Handle) -> Result<BTreeSet<Route>, RouteError> {
    let mut routes = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let mut messages = netlink.route().get(request).execute();
        while let Some(message) = messages.try_next().await.map_err(|source| RouteError {
            call: "listing",
            what: "routes".to_owned(),
            source: Box::new(source),
        })? {
            routes.extend(parse(&message));
        }
    }
    Ok(routes)
}

/// Carries out a plan. One failure stops nothing; returns all.
pub async fn apply(netlink: &Handle, plan: &RoutePlan) -> Vec<RouteError> {
    let mut errors = Vec::new();
    for route in &plan.put {
        if let Err(source) = netlink.route().add(message(route)).replace().execute().await {
            errors.push(error("adding route", route, source));
        }
    }
    for route in &plan.remove {
        match netlink.route().del(message(route)).execute().await {
            // The device went and took the route along.
            Err(source) if matches!(errno(&source), Some(libc::ESRCH | libc::ENODEV)) => {}
            Err(source) => errors.push(error("removing route", route, source)),
            Ok(()) => {}
        }
    }
    errors
}

fn error(call: &'static str, route: &Route, source: rtnetlink::Error) -> RouteError {
    let what = format!(
        "{}/{} dev #{}",
        route.destination, route.prefix_len, route.ifindex
    );
    RouteError {
        call,
        what,
        source: Box::new(source),
    }
}

fn message(route: &Route) -> RouteMessage {
    // Reached without a gateway: IPv4 calls that link scope, IPv6 has no scopes.
    match route.destination {
        IpAddr::V4(destination) => {
            let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(destination, route.prefix_len)
                .scope(RouteScope::Link)
                .output_interface(route.ifindex)
                .protocol(RouteProtocol::Other(PROTOCOL));
            match route.source {
                Some(IpAddr::V4(source)) => builder.pref_source(source).build(),
                _ => builder.build(),
            }
        }
        IpAddr::V6(destination) => {
            let builder = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(destination, route.prefix_len)
                .output_interface(route.ifindex)
                .protocol(RouteProtocol::Other(PROTOCOL));
            match route.source {
                Some(IpAddr::V6(source)) => builder.pref_source(source).build(),
                _ => builder.build(),
            }
        }
    }
}

/// A route of ours; nothing for others'.
fn parse(message: &RouteMessage) -> Option<Route> {
    if u8::from(message.header.protocol) != PROTOCOL || message.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut destination, mut ifindex, mut source) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    Some(Route {
        destination: destination?,
        prefix_len: message.header.destination_prefix_length,
        ifindex: ifindex?,
        source,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(third: u8, ifindex: u32) -> Route {
        Route {
            destination: [10, 2, third, 0].into(),
            prefix_len: 24,
            ifindex,
            source: Some([10, 1, 0, 1].into()),
        }
    }

    #[test]
    fn plan_adds_what_is_missing_and_removes_what_is_not_wanted() {
        let actual = BTreeSet::from([route(0, 5), route(1, 5)]);
        let desired = BTreeSet::from([route(1, 5), route(2, 5)]);
        assert_eq!(
            plan(&actual, &desired),
            RoutePlan {
                put: vec![route(2, 5)],
                remove: vec![route(0, 5)]
            }
        );
    }

    #[test]
    fn a_route_on_a_new_device_is_replaced_and_not_removed() {
        let (actual, desired) = (BTreeSet::from([route(0, 5)]), BTreeSet::from([route(0, 9)]));
        assert_eq!(
            plan(&actual, &desired),
            RoutePlan {
                put: vec![route(0, 9)],
                remove: vec![]
            }
        );
    }

    #[test]
    fn nothing_to_do_is_an_empty_plan() {
        let routes = BTreeSet::from([route(0, 5)]);
        assert_eq!(plan(&routes, &routes), RoutePlan::default());
    }

    #[test]
    fn what_is_written_reads_back() {
        for ours in [
            route(0, 5),
            Route {
                destination: [0xfd00_u16, 2, 0, 0, 0, 0, 0, 0].into(),
                prefix_len: 64,
                ifindex: 7,
                source: Some([0xfd00_u16, 1, 0, 0, 0, 0, 0, 1].into()),
            },
        ] {
            assert_eq!(parse(&message(&ours)), Some(ours));
        }
        let mut foreign = message(&route(0, 5));
        foreign.header.protocol = RouteProtocol::Static;
        assert_eq!(parse(&foreign), None);
    }
}
