//! Restart over whatever an earlier agent left: exact convergence, and nothing goes before it is known to be stale.

use isthmus_bpf_abi::{Backend, ServiceKey, ServiceValue};
use isthmus_mesh::{LoadBalancer, to_address};
use isthmus_model::SliceEndpoint;
use proptest::{collection::vec, prelude::*};

use crate::{
    events::{Event, cluster, frame, new_merge, service, slice, some_events, sync},
    maps::Maps,
    naive::{Tables, expected, ip},
    properties::{assert_matches, contents, drain},
};

/// Maps as an agent left them, for the tables that `events` make.
fn left_behind(events: &[Event]) -> (Maps, Tables) {
    let mut merge = new_merge();
    let (mut tables, mut maps) = (Tables::default(), Maps::default());
    for event in events {
        event.act(&mut merge, &mut tables);
        if let Event::Drain = event {
            drain(&mut merge, &mut maps);
        }
    }
    drain(&mut merge, &mut maps);
    (maps, tables)
}

fn as_events(tables: &Tables) -> impl Iterator<Item = Event> + '_ {
    let health = tables.unhealthy.iter().map(|of| Event::Health(*of, false));
    let frames = tables.frames.values().cloned().map(Event::Frame);
    let node = Event::Node(tables.node_addresses.clone(), tables.zone.clone());
    health
        .chain([node])
        .chain(frames)
        .chain(tables.slices.values().cloned().map(Event::Slice))
}

type Entries<K, V> = Vec<(K, V)>;

fn some_debris() -> impl Strategy<Value = (Entries<ServiceKey, ServiceValue>, Entries<u32, Backend>)> {
    let key = (
        1u8..4,
        80u16..82,
        0u16..5,
        prop_oneof![9 => Just(6u8), 1 => Just(17), 1 => Just(99)],
    )
        .prop_map(|(host, port, slot, proto)| {
            ServiceKey::frontend(to_address([10, 96, 0, host].into()), port, proto).at_slot(slot)
        });
    let value = (0u32..12, 0u32..4, 0u16..4).prop_map(|(backend_id, service_id, count)| ServiceValue {
        backend_id,
        service_id,
        count,
        flags: 2,
    });
    let backend = (1u8..8, 8080u16..8082, 1u16..4, 0u8..3, any::<bool>()).prop_map(
        |(host, port, cluster_id, state, tcp)| Backend {
            address: to_address([10, 1, 0, host].into()),
            port: port.to_be_bytes(),
            proto: if tcp { 6 } else { 17 },
            state,
            cluster_id,
            zone: 0,
            pad: 0,
        },
    );
    (
        vec((key, value), 0..20),
        vec((prop_oneof![20 => 0u32..12, 1 => Just(u32::MAX)], backend), 0..10),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn resync_after_restart_converges(old in some_events(25), new in some_events(25), drain_each in any::<bool>()) {
        let (mut maps, _) = left_behind(&old);
        let (_, wanted) = left_behind(&new);
        let mut merge = new_merge();
        let mut tables = Tables::default();
        merge.restore(&maps.dump());
        drain(&mut merge, &mut maps);
        for event in as_events(&wanted) {
            event.act(&mut merge, &mut tables);
            if drain_each {
                drain(&mut merge, &mut maps);
            }
        }
        for of in 1..=3 {
            sync(&mut merge, of);
            drain(&mut merge, &mut maps);
        }
        merge.clusters_listed((1..=3).map(cluster));
        drain(&mut merge, &mut maps);
        prop_assert!(merge.prune_ready());
        assert_matches(&maps, &expected(&wanted));
        prop_assert!(merge.audit(&maps.dump()).is_empty());
        prop_assert_eq!((merge.stats().restored_backends, merge.stats().restored_frontends), (0, 0));
    }

    #[test]
    fn the_same_tables_after_a_restart_change_nothing(mut events in some_events(30)) {
        for event in &mut events {
            // A service that claims another one's cluster IP may come first, and have it for a moment.
            if let Event::Frame(frame) = event {
                frame.external_ips.retain(|address| *address != ip("10.96.0.1"));
            }
        }
        let (mut maps, tables) = left_behind(&events);
        let before = maps.clone();
        let mut merge = new_merge();
        merge.restore(&maps.dump());
        for event in as_events(&tables) {
            event.act(&mut merge, &mut Tables::default());
        }
        (1..=3).for_each(|of| sync(&mut merge, of));
        merge.clusters_listed((1..=3).map(cluster));
        drain(&mut merge, &mut maps);
        // Numbers of zones are the process' own, and of equal backends of two services either number will do.
        prop_assert_eq!(contents(&maps), contents(&before));
        prop_assert_eq!(maps.lookups(), before.lookups(), "slots stay in place");
    }

    #[test]
    fn any_debris_is_cleaned_up((services, backends) in some_debris(), new in some_events(25), late in any::<bool>()) {
        let mut maps = Maps { services: services.into_iter().collect(), backends: backends.into_iter().collect(), ..Maps::default() };
        let (_, wanted) = left_behind(&new);
        let mut merge = new_merge();
        merge.restore(&maps.dump());
        if late {
            drain(&mut merge, &mut maps);
        }
        for event in as_events(&wanted) {
            event.act(&mut merge, &mut Tables::default());
        }
        drain(&mut merge, &mut maps);
        (1..=3).for_each(|of| sync(&mut merge, of));
        merge.clusters_listed((1..=3).map(cluster));
        drain(&mut merge, &mut maps);
        assert_matches(&maps, &expected(&wanted));
    }

    #[test]
    fn nothing_restored_goes_before_its_sources_are_listed(old in some_events(25)) {
        let (mut maps, _) = left_behind(&old);
        let before = maps.clone();
        let mut merge = new_merge();
        merge.restore(&maps.dump());
        prop_assert!(merge.drain().is_empty(), "maps that we wrote need nothing");
        sync(&mut merge, 2);
        sync(&mut merge, 3);
        merge.clusters_listed((2..=3).map(cluster));
        drain(&mut merge, &mut maps);
        prop_assert_eq!(&maps, &before, "only the local cluster's frames say which frontends there are");
        sync(&mut merge, 1);
        drain(&mut merge, &mut maps);
        prop_assert_eq!(maps, Maps::default());
    }
}

/// One global service with a backend in each of two clusters, restored by a new agent.
fn restarted() -> (LoadBalancer, Maps) {
    let ready = |text| vec![SliceEndpoint::ready(ip(text))];
    let (mut maps, _) = left_behind(&[
        Event::Frame(frame(1)),
        Event::Frame(frame(2)),
        Event::Slice(slice(1, "e0", ready("10.1.0.1"))),
        Event::Slice(slice(2, "e0", ready("10.2.0.1"))),
    ]);
    let mut merge = new_merge();
    merge.restore(&maps.dump());
    drain(&mut merge, &mut maps);
    (merge, maps)
}

fn targets(maps: &Maps) -> Vec<String> {
    let lookups = maps.lookups();
    let all = lookups.values().flatten().flatten();
    let mut list: Vec<_> = all
        .map(|(address, _)| isthmus_mesh::to_ip(address).to_string())
        .collect();
    list.sort();
    list
}

#[test]
fn backends_of_a_silent_cluster_stay_while_local_ones_change() {
    let (mut merge, mut maps) = restarted();
    merge.upsert_frame(&frame(1));
    merge.upsert_slice(&slice(1, "e0", vec![SliceEndpoint::ready(ip("10.1.0.2"))]));
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.1.0.1", "10.1.0.2", "10.2.0.1"]);
    sync(&mut merge, 1);
    drain(&mut merge, &mut maps);
    assert_eq!(
        targets(&maps),
        ["10.1.0.2", "10.2.0.1"],
        "cluster 2 has not been heard of"
    );
    merge.clusters_listed([cluster(1)]);
    drain(&mut merge, &mut maps);
    assert_eq!(
        targets(&maps),
        ["10.1.0.2"],
        "cluster 2 is not in the mesh any more"
    );
}

#[test]
fn a_restored_backend_that_is_named_follows_its_source() {
    let (mut merge, mut maps) = restarted();
    merge.upsert_frame(&frame(1));
    merge.upsert_frame(&frame(2));
    let mut unready = SliceEndpoint::ready(ip("10.2.0.1"));
    unready.ready = false;
    merge.upsert_slice(&slice(2, "e0", vec![unready]));
    drain(&mut merge, &mut maps);
    assert_eq!(
        targets(&maps),
        ["10.1.0.1"],
        "its own source says that it is not ready"
    );
}

#[test]
fn a_restored_backend_that_is_unready_stays_until_a_better_one_can_be_known() {
    // Affinity local: the backend of cluster 2 is known to the maps and has no slot.
    let near = |of| {
        let mut frame = frame(of);
        frame.affinity = isthmus_model::Affinity::Local;
        frame
    };
    let ready = |text| vec![SliceEndpoint::ready(ip(text))];
    let mut unready = SliceEndpoint::ready(ip("10.1.0.1"));
    unready.ready = false;
    let (before, _) = left_behind(&[
        Event::Frame(near(1)),
        Event::Frame(near(2)),
        Event::Slice(slice(1, "e0", ready("10.1.0.1"))),
        Event::Slice(slice(2, "e0", ready("10.2.0.1"))),
    ]);
    let restart = || {
        let mut maps = before.clone();
        let mut merge = new_merge();
        merge.restore(&maps.dump());
        merge.upsert_frame(&near(1));
        merge.upsert_slice(&slice(1, "e0", vec![unready.clone()]));
        sync(&mut merge, 1);
        drain(&mut merge, &mut maps);
        assert_eq!(targets(&maps), ["10.1.0.1"], "better than none");
        (merge, maps)
    };
    // The other cluster is heard of.
    let (mut merge, mut maps) = restart();
    merge.upsert_frame(&near(2));
    merge.upsert_slice(&slice(2, "e0", ready("10.2.0.1")));
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.2.0.1"]);
    // It has left the mesh: nobody names a better one.
    let (mut merge, mut maps) = restart();
    merge.clusters_listed([cluster(1)]);
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), Vec::<String>::new());
    // The pod is gone: that is no doubtful backend.
    let (mut merge, mut maps) = restart();
    merge.upsert_slice(&slice(1, "e0", vec![]));
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), Vec::<String>::new());
    // A later slice of the same cluster names the pod that took its place.
    let (mut merge, mut maps) = restart();
    merge.upsert_slice(&slice(1, "e1", ready("10.1.0.2")));
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.1.0.2"]);
    merge.upsert_slice(&slice(1, "e1", vec![]));
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.1.0.1"]);
    merge.upsert_slice(&slice(1, "e0", ready("10.1.0.1")));
    merge.upsert_slice(&slice(1, "e0", vec![unready.clone()]));
    drain(&mut merge, &mut maps);
    assert_eq!(
        targets(&maps),
        Vec::<String>::new(),
        "it was ready meanwhile: its source is believed"
    );
}

#[test]
fn a_silent_cluster_does_not_keep_the_numbers_of_others() {
    let near = |of| {
        let mut frame = frame(of);
        frame.affinity = isthmus_model::Affinity::Local;
        frame
    };
    let ready = |text| vec![SliceEndpoint::ready(ip(text))];
    let (mut maps, _) = left_behind(&[
        Event::Frame(near(1)),
        Event::Frame(near(2)),
        Event::Frame(near(3)),
        Event::Slice(slice(1, "e0", ready("10.1.0.1"))),
        Event::Slice(slice(2, "e0", ready("10.2.0.1"))),
        Event::Slice(slice(3, "e0", ready("10.3.0.1"))),
    ]);
    assert_eq!(maps.backends.len(), 3);
    let mut merge = new_merge();
    merge.restore(&maps.dump());
    merge.upsert_frame(&near(1));
    merge.upsert_slice(&slice(1, "e0", ready("10.1.0.1")));
    sync(&mut merge, 1);
    // Cluster 2 has no such backend any more, cluster 3 is not heard of.
    sync(&mut merge, 2);
    drain(&mut merge, &mut maps);
    let left: Vec<u16> = maps.backends.values().map(|backend| backend.cluster_id).collect();
    assert_eq!(left.len(), 2);
    assert!(!left.contains(&2), "{left:?}");
    assert!(merge.audit(&maps.dump()).is_empty());
}

#[test]
fn a_service_that_is_no_longer_global_drops_restored_remote_backends() {
    let (mut merge, mut maps) = restarted();
    let mut local = frame(1);
    (local.global, local.shared) = (false, false);
    merge.upsert_frame(&local);
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.1.0.1"]);
}

#[test]
fn frontends_of_two_earlier_services_may_join_one() {
    // Found by the properties: the first frontend was left without backends, so the second one's slots were thought to
    // be in place for both.
    let at = |number, addresses: &[&str]| {
        let mut frame = frame(1);
        frame.name = service(number);
        frame.cluster_ips = addresses.iter().map(|text| ip(text)).collect();
        Event::Frame(frame)
    };
    let backends = Event::Slice(slice(1, "e0", vec![SliceEndpoint::ready(ip("10.1.0.1"))]));
    let (mut maps, _) = left_behind(&[at(1, &["10.96.0.1"]), at(0, &["10.96.0.3"]), backends]);
    let mut merge = new_merge();
    merge.restore(&maps.dump());
    at(0, &["10.96.0.1", "10.96.0.3"]).act(&mut merge, &mut Tables::default());
    drain(&mut merge, &mut maps);
    assert_eq!(targets(&maps), ["10.1.0.1", "10.1.0.1"]);
}
