//! From slices to contributions: what changed between two versions of a slice, and what several slices say together.

use isthmus_bpf_abi::Address;

use super::{
    candidate::{Context, View},
    group::{Change, Group},
    record::{EndpointRecord, GroupPort, Pools, Service, SliceRecord},
    select::Class,
};
use crate::Family;

/// Walks an old and a new version of a slice side by side and hands each difference to the group.
pub(super) fn contribute(
    context: &Context,
    pools: &Pools,
    service: &Service,
    group: &mut Group,
    cluster: u16,
    old: Option<&SliceRecord>,
    new: Option<&SliceRecord>,
) {
    let group_port = group.port;
    let port_of =
        |slice: Option<&SliceRecord>| slice.and_then(|slice| group.port.number_in(pools.ports(slice.ports)));
    let (old_port, new_port) = (port_of(old), port_of(new));
    let empty: &[EndpointRecord] = &[];
    let old_list = old
        .filter(|_| old_port.is_some())
        .map_or(empty, |slice| &slice.endpoints);
    let new_list = new
        .filter(|_| new_port.is_some())
        .map_or(empty, |slice| &slice.endpoints);
    let (old_port, new_port) = (old_port.unwrap_or(0), new_port.unwrap_or(0));
    let family = group.port.family;
    let view = |endpoint: &EndpointRecord| endpoint.view(cluster);
    let reached = |endpoint: &&EndpointRecord| group_port.reaches(context, cluster, endpoint);
    let mut apply = |key: (Address, u16), change: Change| {
        if Family::of(&key.0) == family {
            let port = group.port;
            group.apply(context, key, change, || {
                best_view(context, pools, service, port, key)
            });
        }
    };
    let mut left = old_list.iter().filter(reached).peekable();
    let mut right = new_list.iter().filter(reached).peekable();
    loop {
        match (left.peek(), right.peek()) {
            (Some(before), Some(after)) if before.address == after.address => {
                if old_port != new_port {
                    apply((before.address, old_port), Change::Removed);
                    apply((after.address, new_port), Change::Added(view(after)));
                } else if view(before) != view(after) || before.terminating() != after.terminating() {
                    apply((after.address, new_port), Change::Changed(view(after)));
                }
                left.next();
                right.next();
            }
            (Some(before), after) if after.is_none_or(|after| before.address < after.address) => {
                apply((before.address, old_port), Change::Removed);
                left.next();
            }
            (_, Some(after)) => {
                apply((after.address, new_port), Change::Added(view(after)));
                right.next();
            }
            (_, None) => return,
        }
    }
}

/// What all eligible slices together say about a backend: the owner's word, the best of it if it says several things.
fn best_view(
    context: &Context,
    pools: &Pools,
    service: &Service,
    port: GroupPort,
    key: (Address, u16),
) -> Option<View> {
    let mut best: Option<View> = None;
    let mut conflict = false;
    for part in service
        .parts
        .iter()
        .filter(|part| service.eligible(part, context.local))
    {
        for slice in &part.slices {
            if port.number_in(pools.ports(slice.ports)) != Some(key.1) {
                continue;
            }
            let Some(endpoint) = slice
                .endpoint(&key.0)
                .filter(|endpoint| port.reaches(context, part.cluster, endpoint))
            else {
                continue;
            };
            let rank = |cluster: u16, class: Class| (cluster != context.local, cluster, class);
            let view = endpoint.view(part.cluster);
            conflict |= best.is_some_and(|best| best.cluster != part.cluster);
            if best.is_none_or(|best| rank(view.cluster, view.class) < rank(best.cluster, best.class)) {
                best = Some(view);
            }
        }
    }
    best.map(|best| View { conflict, ..best })
}
