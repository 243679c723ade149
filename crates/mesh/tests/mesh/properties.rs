//! The incremental merge equals the naive one, in whatever order things happen, and every step of every plan is safe.

use std::collections::BTreeSet;

use isthmus_bpf_abi::{Backend, ServiceKey};
use isthmus_mesh::LoadBalancer;
use proptest::prelude::*;

use crate::{
    events::{Event, cluster, service, some_events},
    maps::Maps,
    naive::{Expected, LOCAL, Tables, expected},
};

/// The maps without numbers and zones.
pub fn contents(maps: &Maps) -> Expected {
    let mut result = Expected::default();
    for (key, lookup) in maps.lookups() {
        let targets: BTreeSet<_> = lookup
            .iter()
            .flatten()
            .map(|(address, port)| (*address, u16::from_be_bytes(*port)))
            .collect();
        assert_eq!(
            targets.len(),
            lookup.len(),
            "{key:?} names a backend twice, or none"
        );
        result.frontends.insert(key, (maps.services[&key].flags, targets));
    }
    result.backends = maps
        .backends
        .values()
        .map(|backend| Backend { zone: 0, ..*backend })
        .collect();
    result.backends.sort();
    let slots: usize = result
        .frontends
        .values()
        .map(|(_, targets)| targets.len() + 1)
        .sum();
    assert_eq!(maps.services.len(), slots, "slots past the count are left");
    result
}

pub fn drain(merge: &mut LoadBalancer, maps: &mut Maps) {
    let plan = merge.drain();
    maps.apply_checked(&plan);
    assert!(!merge.has_changes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn incremental_equals_from_scratch(events in some_events(40)) {
        let mut merge = LoadBalancer::new(cluster(LOCAL));
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        for event in events.iter().chain([&Event::Drain]) {
            event.act(&mut merge, &mut tables);
            if let Event::Drain = event {
                drain(&mut merge, &mut maps);
                prop_assert_eq!(contents(&maps), expected(&tables));
                prop_assert_eq!(Maps::of(&merge.desired()), maps.clone());
                prop_assert!(merge.audit(&maps.dump()).is_empty());
            }
        }
        prop_assert!(merge.drain().is_empty(), "nothing changed since");
    }

    #[test]
    fn arrival_order_does_not_matter(events in some_events(30), seed in any::<u64>()) {
        let mut merge = LoadBalancer::new(cluster(LOCAL));
        let mut tables = Tables::default();
        events.iter().for_each(|event| event.act(&mut merge, &mut tables));
        let mut maps = Maps::default();
        drain(&mut merge, &mut maps);

        // The same tables, in another order.
        let mut again: Vec<Event> = tables.frames.values().cloned().map(Event::Frame)
            .chain(tables.slices.values().cloned().map(Event::Slice))
            .chain(tables.unhealthy.iter().map(|of| Event::Health(*of, false)))
            .collect();
        let mut state = seed | 1;
        for place in (1..again.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            again.swap(place, (state >> 33) as usize % (place + 1));
        }
        let mut other = LoadBalancer::new(cluster(LOCAL));
        let (mut other_tables, mut other_maps) = (Tables::default(), Maps::default());
        for event in &again {
            event.act(&mut other, &mut other_tables);
            drain(&mut other, &mut other_maps);
        }
        prop_assert_eq!(contents(&maps), contents(&other_maps));
    }

    #[test]
    fn a_usable_backend_is_always_used(events in some_events(30)) {
        let mut merge = LoadBalancer::new(cluster(LOCAL));
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        events.iter().for_each(|event| event.act(&mut merge, &mut tables));
        drain(&mut merge, &mut maps);
        for service in merge.services() {
            for frontend in service.frontends.iter().filter(|frontend| frontend.owned) {
                let usable = service.backends.iter().any(|backend| {
                    let joins = backend.cluster_id == LOCAL
                        || service.global && tables.frames.get(&(backend.cluster_id, service.name.clone()))
                            .is_some_and(|frame| frame.global && frame.shared);
                    let owned = backend.unused != Some(isthmus_mesh::loadbalancer::Unused::OwnedElsewhere);
                    joins && owned && backend.ready && !backend.terminating && backend.weight > 0
                        && backend.port_name == frontend.port_name && backend.protocol == frontend.protocol
                        && backend.address.is_ipv4() == frontend.address.is_ipv4()
                });
                prop_assert!(!usable || frontend.backends > 0, "{service:?}");
            }
            // Each backend either is in a slot, or there is a reason.
            for backend in service.backends.iter().filter(|backend| backend.unused.is_none()) {
                let slots = |key: &ServiceKey| maps.services.get(key).map(|value| value.backend_id);
                let used = maps.services.keys().any(|key| key.slot > 0 && slots(key) == backend.backend_id);
                prop_assert!(used, "{backend:?}");
            }
        }
    }

    #[test]
    fn slots_move_only_for_holes(events in some_events(30)) {
        let mut merge = LoadBalancer::new(cluster(LOCAL));
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        for mut event in events {
            // A frontend that changes hands gets another group's slots: one service, and no two ports with one number.
            if let Event::Frame(frame) = &mut event {
                frame.name = service(0);
                frame.ports.retain(|port| *port.name != *"alt");
            }
            event.act(&mut merge, &mut tables);
            let before = maps.lookups();
            drain(&mut merge, &mut maps);
            for (key, after) in maps.lookups() {
                let Some(before) = before.get(&key) else { continue };
                let (old, new): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), after.iter().collect());
                let left = old.difference(&new).count();
                let stayed: Vec<_> = old.intersection(&new).collect();
                let moved = stayed.iter().filter(|target| {
                    let place = |list: &[_]| list.iter().position(|other| other == **target.to_owned());
                    place(before) != place(&after)
                }).count();
                prop_assert!(moved <= left, "{key:?}: {left} left and {moved} moved");
            }
        }
    }
}
