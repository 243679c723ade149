//! Which open flows end: the merge's verdict equals the naive one, and whoever waits for departures misses none.

use std::collections::BTreeSet;

use isthmus_bpf_abi::{Address, PROTO_TCP, PROTO_UDP};
use isthmus_mesh::{
    LoadBalancer,
    loadbalancer::{Flow, Verdict},
    to_address,
};
use isthmus_model::SliceEndpoint;
use proptest::{collection::vec, prelude::*};

use crate::{
    events::{Event, cluster, frame, new_merge, slice, some_event, some_events, some_frame, sync},
    maps::Maps,
    naive::{LOCAL, Tables, flow_verdict, ip},
    properties::drain,
};

/// Frontends and backends of the generated events, and some that are never there.
fn flows() -> Vec<Flow> {
    let frontends = [
        ("10.96.0.1", 80),
        ("10.96.0.2", 81),
        ("10.96.0.3", 80),
        ("10.96.0.1", 53),
        ("fd00:96::1", 80),
        ("203.0.113.1", 80),
        ("192.0.2.1", 30_000),
        ("198.51.100.1", 80),
    ];
    let mut flows = vec![];
    for (address, port) in frontends {
        for host in 1..9_u8 {
            for backend_port in [8080, 8081, 8082, 5353] {
                for v6 in [false, true] {
                    let backend: Address = if v6 {
                        to_address(format!("fd00::{host}").parse().unwrap())
                    } else {
                        to_address([10, 1, 0, host].into())
                    };
                    for proto in [PROTO_TCP, PROTO_UDP] {
                        flows.push(Flow {
                            frontend: (to_address(ip(address)), port),
                            backend: (backend, backend_port, proto),
                        });
                    }
                }
            }
        }
    }
    flows
}

/// Unless its backend's address is known to be there.
fn may_end(merge: &LoadBalancer, flow: &Flow) -> bool {
    merge.verdict(flow) != Verdict::GoesOn
}

fn ended(merge: &LoadBalancer, flows: &[Flow]) -> BTreeSet<Flow> {
    flows
        .iter()
        .filter(|flow| may_end(merge, flow))
        .copied()
        .collect()
}

/// Of the tables' events those that say nothing of frames: a frame that changes gives a frontend other backends, and what it
/// had goes with it.
fn some_changes() -> impl Strategy<Value = Vec<Event>> {
    let change = some_event().prop_filter("no frames", |event| {
        !matches!(event, Event::Frame(_) | Event::DeleteFrame(..))
    });
    vec(change, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_verdict_is_the_naive_one(events in some_events(30)) {
        let (mut merge, mut tables, mut maps) = (new_merge(), Tables::default(), Maps::default());
        for event in &events {
            event.act(&mut merge, &mut tables);
            if let Event::Drain = event {
                drain(&mut merge, &mut maps);
            }
        }
        drain(&mut merge, &mut maps);
        for flow in flows() {
            let (address, port, proto) = flow.backend;
            let want = flow_verdict(&tables, flow.frontend, proto, &(address, port));
            prop_assert_eq!(merge.verdict(&flow), want, "{:?}", flow);
        }
    }

    #[test]
    fn no_departure_is_missed(frames in vec(some_frame(), 0..8), changes in some_changes()) {
        let (mut merge, mut tables, mut maps) = (new_merge(), Tables::default(), Maps::default());
        for frame in frames {
            Event::Frame(frame).act(&mut merge, &mut tables);
        }
        let flows = flows();
        let mut before = BTreeSet::new();
        let mut known = false;
        for event in changes.into_iter().chain([Event::Drain]) {
            event.act(&mut merge, &mut tables);
            let Event::Drain = event else { continue };
            drain(&mut merge, &mut maps);
            let departed = merge.take_departed();
            let now = ended(&merge, &flows);
            // A node's address may be new: nothing ever went through it.
            let old = now.difference(&before).filter(|flow| !tables.node_addresses.iter().any(|node| to_address(*node) == flow.frontend.0));
            for flow in old.filter(|_| known) {
                prop_assert!(departed.contains(&flow.backend), "{:?} ended unseen", flow);
            }
            (before, known) = (now, true);
        }
    }
}

struct World {
    merge: LoadBalancer,
    maps: Maps,
}

impl World {
    /// A service with ready backends `10.1.0.1` and `10.1.0.2` here, and `10.1.0.3` in cluster 2.
    fn new() -> Self {
        let mut merge = new_merge();
        merge.upsert_frame(&frame(LOCAL));
        merge.upsert_frame(&frame(2));
        let mut world = Self {
            merge,
            maps: Maps::default(),
        };
        world.local(&[endpoint(1), endpoint(2)]);
        world.merge.upsert_slice(&slice(2, "e0", vec![endpoint(3)]));
        drain(&mut world.merge, &mut world.maps);
        world.merge.take_departed();
        world
    }

    fn local(&mut self, endpoints: &[SliceEndpoint]) {
        self.merge.upsert_slice(&slice(LOCAL, "e0", endpoints.to_vec()));
    }

    /// Hosts that departed in a drain, and hosts whose flows end.
    fn check(&mut self, departed: &[u8], ends: &[u8]) {
        drain(&mut self.merge, &mut self.maps);
        let left = self.merge.take_departed();
        let hosts =
            |of: &dyn Fn(&Flow) -> bool| -> Vec<u8> { (1..5).filter(|host| of(&flow(*host))).collect() };
        assert_eq!(hosts(&|flow| left.contains(&flow.backend)), departed, "departed");
        assert_eq!(hosts(&|flow| may_end(&self.merge, flow)), ends, "ends");
    }
}

/// A new pod may get the address of one that terminated.
#[test]
fn who_terminates_no_more_and_is_unready_departs() {
    let mut world = World::new();
    let mut changed = endpoint(1);
    (changed.ready, changed.serving, changed.terminating) = (false, false, true);
    world.local(&[changed.clone(), endpoint(2)]);
    world.check(&[1], &[4]);
    changed.terminating = false;
    world.local(&[changed, endpoint(2)]);
    world.check(&[1], &[1, 4]);
}

fn endpoint(host: u8) -> SliceEndpoint {
    SliceEndpoint::ready([10, 1, 0, host].into())
}

fn flow(host: u8) -> Flow {
    Flow {
        frontend: (to_address(ip("10.96.0.1")), 80),
        backend: (to_address([10, 1, 0, host].into()), 8080, PROTO_TCP),
    }
}

/// Host 4 is never there.
#[test]
fn a_backend_that_goes_or_is_unready_ends_its_flows() {
    let mut world = World::new();
    world.check(&[], &[4]);
    world.local(&[endpoint(2)]);
    world.check(&[1], &[1, 4]);
    let mut unready = endpoint(2);
    (unready.ready, unready.serving) = (false, false);
    world.local(&[unready]);
    world.check(&[2], &[1, 2, 4]);
    world.local(&[endpoint(1), endpoint(2)]);
    world.check(&[], &[4]);
    let mut maintained = endpoint(2);
    maintained.weight = 0;
    world.local(&[endpoint(1), maintained]);
    world.check(&[2], &[2, 4]);
}

#[test]
fn a_terminating_backend_keeps_its_flows_until_it_is_gone() {
    let mut world = World::new();
    let mut leaving = endpoint(1);
    (leaving.ready, leaving.terminating) = (false, true);
    world.local(&[leaving.clone(), endpoint(2)]);
    world.check(&[], &[4]);
    // Looked at, and left alone.
    leaving.serving = false;
    world.local(&[leaving, endpoint(2)]);
    world.check(&[1], &[4]);
    world.local(&[endpoint(2)]);
    world.check(&[1], &[1, 4]);
}

#[test]
fn flows_to_an_unreachable_cluster_end_where_there_are_others() {
    let mut world = World::new();
    world.merge.set_cluster_health(cluster(2), false);
    world.check(&[3], &[3, 4]);
    // The last resort.
    world.local(&[]);
    world.check(&[1, 2], &[1, 2, 4]);
    // Not any more.
    world.local(&[endpoint(1)]);
    world.check(&[3], &[2, 3, 4]);
    world.merge.set_cluster_health(cluster(2), true);
    world.check(&[], &[2, 4]);
}

#[test]
fn flows_of_a_service_that_goes_go_on() {
    let mut world = World::new();
    world
        .merge
        .delete_frame(cluster(LOCAL), &crate::events::service(0));
    world.check(&[], &[]);
}

#[test]
fn after_a_restart_flows_end_when_all_is_known_and_not_before() {
    let world = World::new();
    let mut again = World {
        merge: new_merge(),
        maps: world.maps.clone(),
    };
    again.merge.restore(&world.maps.dump());
    again.check(&[], &[]);
    again.merge.upsert_frame(&frame(LOCAL));
    again.local(&[endpoint(1)]);
    again.check(&[], &[4]);
    sync(&mut again.merge, LOCAL);
    again.check(&[2], &[2, 4]);
    again.merge.clusters_listed([cluster(2)]);
    again.check(&[], &[2, 4]);
    sync(&mut again.merge, 2);
    again.check(&[3], &[2, 3, 4]);
}
