//! The incremental merge equals the naive one, in whatever order things happen, and every step of every plan is safe.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_bpf_abi::{Address, Backend, MAGLEV_CHUNK, ServiceKey};
use isthmus_mesh::LoadBalancer;
use isthmus_model::{Traffic, TrafficPolicy};
use proptest::prelude::*;

use crate::{
    events::{Event, new_merge, service, some_events},
    maps::{Lookup, Maps, TABLE_SIZE},
    naive::{Expected, LOCAL, Tables, Target, expected},
};

/// A frontend of the maps, without numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    flags: u16,
    affinity_seconds: u32,
    /// Slots of each target.
    slots: BTreeMap<Target, usize>,
    /// Entries of each target in the Maglev table.
    entries: Option<BTreeMap<Target, usize>>,
    allowed: Option<BTreeSet<(u32, Address)>>,
}

/// The maps without numbers and zones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    frontends: BTreeMap<ServiceKey, Frontend>,
    backends: Vec<Backend>,
}

pub fn contents(maps: &Maps) -> Contents {
    let count = |key: &ServiceKey, lookup: Lookup| -> BTreeMap<Target, usize> {
        let mut counts = BTreeMap::new();
        for target in lookup {
            let Some((address, port)) = target else {
                panic!("{key:?} names none")
            };
            *counts.entry((address, u16::from_be_bytes(port))).or_default() += 1;
        }
        counts
    };
    let mut result = Contents::default();
    let (mut chunks, mut ranges) = (0, 0);
    for (key, lookup) in maps.lookups() {
        let value = maps.services[&key];
        let frontend = Frontend {
            flags: value.flags,
            affinity_seconds: value.affinity_seconds(),
            slots: count(&key, lookup),
            entries: maps.table(&key).map(|table| count(&key, table)),
            allowed: maps.allowed(&key),
        };
        chunks += frontend
            .entries
            .as_ref()
            .map_or(0, |_| TABLE_SIZE.div_ceil(MAGLEV_CHUNK) as usize);
        ranges += frontend.allowed.as_ref().map_or(0, BTreeSet::len);
        result.frontends.insert(key, frontend);
    }
    result.backends = maps
        .backends
        .values()
        .map(|backend| Backend { zone: 0, ..*backend })
        .collect();
    result.backends.sort();
    let frontends = maps.services.iter().filter(|(key, _)| key.slot == 0);
    let slots: usize = frontends.map(|(_, value)| usize::from(value.count) + 1).sum();
    assert_eq!(maps.services.len(), slots, "slots past the count are left");
    assert_eq!(maps.maglev.len(), chunks, "chunks of tables are left");
    assert_eq!(maps.ranges.len(), ranges, "source ranges are left");
    result
}

/// Whether the maps hold what they must; shares as close as the number of slots allows.
pub fn assert_matches(maps: &Maps, expected: &Expected) {
    let actual = contents(maps);
    assert_eq!(actual.backends, expected.backends);
    let keys = |keys: Vec<&ServiceKey>| keys.into_iter().copied().collect::<Vec<_>>();
    assert_eq!(
        keys(actual.frontends.keys().collect()),
        keys(expected.frontends.keys().collect())
    );
    for (key, got) in &actual.frontends {
        let want = &expected.frontends[key];
        assert_eq!(
            (got.flags, got.affinity_seconds, &got.allowed),
            (want.flags, want.affinity_seconds, &want.allowed),
            "{key:?}"
        );
        check_shares(key, &got.slots, &want.shares, 0.01);
        if let Some(entries) = &got.entries {
            check_shares(key, entries, &want.shares, 0.02);
        }
    }
}

fn check_shares(key: &ServiceKey, got: &BTreeMap<Target, usize>, want: &BTreeMap<Target, f64>, close: f64) {
    let total: usize = got.values().sum();
    assert_eq!(total == 0, want.is_empty(), "{key:?}: {got:?}, not {want:?}");
    for (target, count) in got {
        assert!(
            want.contains_key(target) && *count > 0,
            "{key:?}: {got:?}, not {want:?}"
        );
    }
    let even = want
        .values()
        .all(|share| (share - 1.0 / want.len() as f64).abs() < 1e-9);
    for (target, share) in want {
        let count = got.get(target).copied().unwrap_or(0);
        let part = count as f64 / total as f64;
        assert!(
            (part - share).abs() <= close + share * 0.1,
            "{key:?}: {target:?} has {count} of {total}, not {share}"
        );
        assert!(!even || count > 0, "{key:?}: {got:?}, not {want:?}");
    }
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
        let mut merge = new_merge();
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        for event in events.iter().chain([&Event::Drain]) {
            event.act(&mut merge, &mut tables);
            if let Event::Drain = event {
                drain(&mut merge, &mut maps);
                assert_matches(&maps, &expected(&tables));
                prop_assert_eq!(Maps::of(&merge.desired()), maps.clone());
                prop_assert!(merge.audit(&maps.dump()).is_empty());
            }
        }
        prop_assert!(merge.drain().is_empty(), "nothing changed since");
    }

    #[test]
    fn arrival_order_does_not_matter(events in some_events(30), seed in any::<u64>()) {
        let mut merge = new_merge();
        let mut tables = Tables::default();
        events.iter().for_each(|event| event.act(&mut merge, &mut tables));
        let mut maps = Maps::default();
        drain(&mut merge, &mut maps);

        // The same tables, in another order.
        let mut again: Vec<Event> = tables.frames.values().cloned().map(Event::Frame)
            .chain(tables.slices.values().cloned().map(Event::Slice))
            .chain(tables.unhealthy.iter().map(|of| Event::Health(*of, false)))
            .chain([Event::Node(tables.node_addresses.clone(), tables.zone.clone())])
            .collect();
        let mut state = seed | 1;
        for place in (1..again.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            again.swap(place, (state >> 33) as usize % (place + 1));
        }
        let mut other = new_merge();
        let (mut other_tables, mut other_maps) = (Tables::default(), Maps::default());
        for event in &again {
            event.act(&mut other, &mut other_tables);
            drain(&mut other, &mut other_maps);
        }
        prop_assert_eq!(contents(&maps), contents(&other_maps));
    }

    #[test]
    fn a_usable_backend_is_always_used(events in some_events(30)) {
        let mut merge = new_merge();
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        events.iter().for_each(|event| event.act(&mut merge, &mut tables));
        drain(&mut merge, &mut maps);
        for service in merge.services() {
            let frames = &tables.frames;
            for frontend in service.frontends.iter().filter(|frontend| frontend.owned) {
                let usable = service.backends.iter().any(|backend| {
                    let joins = backend.cluster_id == LOCAL
                        || service.global && tables.frames.get(&(backend.cluster_id, service.name.clone()))
                            .is_some_and(|frame| frame.global && frame.shared);
                    let owned = backend.unused != Some(isthmus_mesh::loadbalancer::Unused::OwnedElsewhere);
                    // Of node ports and the like, whose policy is Local, another test tells.
                    let cluster_ip = frames.get(&(LOCAL, service.name.clone())).is_some_and(|frame| {
                        frame.cluster_ips.contains(&frontend.address) && frame.traffic.internal_policy == TrafficPolicy::Cluster
                    });
                    cluster_ip && joins && owned && backend.ready && !backend.terminating && backend.weight > 0
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
        let mut merge = new_merge();
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        for mut event in events {
            // A frontend that changes hands gets another group's slots: one service, and no two ports with one number.
            if let Event::Frame(frame) = &mut event {
                frame.name = service(0);
                frame.ports.retain(|port| *port.name != *"alt");
                frame.external_ips.clear();
                frame.traffic = Traffic::default();
            }
            // Nor does weight matter here: all have one slot.
            if let Event::Slice(slice) = &mut event {
                slice.endpoints.iter_mut().for_each(|endpoint| endpoint.weight = endpoint.weight.min(1));
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
