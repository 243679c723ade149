//! Tiers, spill-over, weights, slow start, traffic policies and where a service can be asked, case by case.

use std::{collections::BTreeMap, time::Duration};

use isthmus_bpf_abi::{SCOPE_EXTERNAL, SCOPE_INTERNAL, ServiceKey, service_flag};
use isthmus_mesh::{LoadBalancer, loadbalancer::Unused, to_address, to_ip};
use isthmus_model::{
    Algorithm, MinHealthy, Preference, ServiceFrame, SessionAffinity, SliceEndpoint, TrafficPolicy,
};

use crate::{
    events::{NODE, cluster, frame, new_merge, service, slice},
    maps::Maps,
    naive::ip,
    properties::drain,
};

struct World {
    merge: LoadBalancer,
    maps: Maps,
}

/// Slots by cluster, of the frontend 10.96.0.1:80.
type Slots = BTreeMap<u8, usize>;

impl World {
    fn new(change: impl FnOnce(&mut ServiceFrame)) -> Self {
        let mut local = frame(1);
        change(&mut local);
        let mut merge = new_merge();
        merge.upsert_frame(&local);
        (2..=3).for_each(|of| merge.upsert_frame(&frame(of)));
        Self {
            merge,
            maps: Maps::default(),
        }
    }

    fn tiers(tiers: &str, min_healthy: MinHealthy) -> Self {
        Self::new(|frame| {
            frame.traffic.preference = Preference {
                tiers: tiers.parse().unwrap(),
                min_healthy,
                ..Preference::default()
            };
        })
    }

    /// So many endpoints of a cluster, the first ones ready.
    fn set(&mut self, of: u8, ready: u8, all: u8) {
        let endpoints = (1..=all).map(|host| SliceEndpoint {
            ready: host <= ready,
            ..SliceEndpoint::ready([10, of, 0, host].into())
        });
        self.merge
            .upsert_slice(&slice(of.into(), "e0", endpoints.collect()));
    }

    fn lookup(&mut self, key: ServiceKey) -> Vec<String> {
        drain(&mut self.merge, &mut self.maps);
        let lookups = self.maps.lookups();
        let mut targets: Vec<_> = lookups[&key]
            .iter()
            .flatten()
            .map(|(address, _)| to_ip(address).to_string())
            .collect();
        targets.sort();
        targets
    }

    fn slots(&mut self) -> Slots {
        let mut slots = Slots::new();
        for target in self.lookup(at("10.96.0.1", 80)) {
            let of = target.split('.').nth(1).unwrap().parse().unwrap();
            *slots.entry(of).or_default() += 1;
        }
        slots
    }
}

fn at(address: &str, port: u16) -> ServiceKey {
    ServiceKey::frontend(to_address(ip(address)), port, 6)
}

#[test]
fn tiers_are_asked_in_their_order() {
    let mut world = World::tiers("c3, local, *", MinHealthy::Count(1));
    (1..=3).for_each(|of| world.set(of, 2, 2));
    assert_eq!(world.slots(), [(3, 2)].into());
    let view = world.merge.service(&service(0)).unwrap();
    let reasons: Vec<_> = view.backends.iter().map(|backend| backend.unused).collect();
    assert_eq!(reasons[..4], [Some(Unused::LaterTier); 4]);
    world.set(3, 0, 2);
    assert_eq!(world.slots(), [(1, 2)].into());
    world.set(1, 0, 2);
    assert_eq!(world.slots(), [(2, 2)].into());
    world.merge.set_cluster_health(cluster(2), false);
    assert_eq!(world.slots(), [(2, 2)].into(), "the last resort");
    world.set(1, 1, 2);
    assert_eq!(world.slots(), [(1, 1)].into());
}

#[test]
fn one_of_thirty_local_pods_keeps_its_capacity_share() {
    let mut world = World::tiers("local, *", MinHealthy::Percent(50));
    world.set(1, 1, 30);
    world.set(2, 30, 30);
    let slots = world.slots();
    let (local, all) = (slots[&1], slots.values().sum::<usize>());
    assert!(local >= 1 && local * 30 <= all, "{slots:?}");
    // Half of them are the minimum.
    world.set(1, 15, 30);
    assert_eq!(world.slots(), [(1, 15)].into());
    world.set(1, 14, 30);
    let slots = world.slots();
    let share = slots[&1] as f64 / slots.values().sum::<usize>() as f64;
    assert!((0.42..=14.0 / 30.0).contains(&share), "{share}");
    // With nobody to spill to, all is carried.
    world.set(2, 0, 30);
    assert_eq!(world.slots(), [(1, 14)].into());
}

#[test]
fn a_lost_cluster_still_counts_as_capacity_of_its_tier() {
    let mut world = World::tiers("c2|c3, local", MinHealthy::Percent(80));
    (1..=3).for_each(|of| world.set(of, 4, 4));
    assert_eq!(world.slots(), [(2, 4), (3, 4)].into());
    world.merge.set_cluster_health(cluster(3), false);
    let slots = world.slots();
    assert_eq!(
        slots[&1], slots[&2],
        "half is lost, and half is spilled: {slots:?}"
    );
    assert!(!slots.contains_key(&3));
}

#[test]
fn names_of_clusters_count_once_they_are_known() {
    // A frame that comes before anything is known of c2.
    let mut merge = new_merge();
    let mut local = frame(1);
    local.traffic.preference.tiers = "c2, local".parse().unwrap();
    merge.upsert_frame(&local);
    let mut world = World {
        merge,
        maps: Maps::default(),
    };
    world.set(1, 1, 1);
    assert_eq!(world.slots(), [(1, 1)].into());
    world.merge.upsert_frame(&frame(2));
    world.set(2, 1, 1);
    assert_eq!(world.slots(), [(2, 1)].into());
}

#[test]
fn a_backend_that_became_ready_starts_slowly() {
    let mut world = World::new(|frame| frame.traffic.preference.slow_start_seconds = 30);
    world.merge.advance(Duration::from_secs(100));
    world.set(1, 3, 4);
    assert_eq!(
        world.slots(),
        [(1, 3)].into(),
        "those that were there first start at once"
    );
    world.set(1, 4, 4);
    let share = |world: &mut World| {
        let targets = world.lookup(at("10.96.0.1", 80));
        let new = targets.iter().filter(|target| *target == "10.1.0.4").count();
        new as f64 / targets.len() as f64
    };
    let mut shares = vec![share(&mut world)];
    for second in 1..=31 {
        world.merge.advance(Duration::from_secs(100 + second));
        shares.push(share(&mut world));
    }
    assert!(shares[0] > 0.0 && shares[0] < 0.05, "{shares:?}");
    assert!(shares.is_sorted(), "{shares:?}");
    assert!(
        (shares[31] - 0.25).abs() < 1e-9 && shares[29] < 0.25,
        "{shares:?}"
    );
    // Each backend has one slot again, and time alone changes nothing more.
    assert_eq!(world.slots(), [(1, 4)].into());
    world.merge.advance(Duration::from_secs(500));
    assert!(!world.merge.has_changes());
}

#[test]
fn policy_local_keeps_outside_traffic_on_this_node_and_inside_traffic_free() {
    let mut world = World::new(|frame| {
        frame.external_ips = vec![ip("203.0.113.1")];
        frame.ports[0].node_port = 30_080;
        frame.traffic.external_policy = TrafficPolicy::Local;
    });
    world.merge.set_node_addresses([ip("192.0.2.1")]);
    let endpoints = ["n2", NODE].map(|node| SliceEndpoint {
        node: node.into(),
        ..SliceEndpoint::ready([10, 1, 0, node.as_bytes()[1] - b'0'].into())
    });
    world.merge.upsert_slice(&slice(1, "e0", endpoints.to_vec()));
    let both = ["10.1.0.2", "10.1.0.3"];
    assert_eq!(world.lookup(at("10.96.0.1", 80)), both);
    for (address, port) in [("203.0.113.1", 80), ("192.0.2.1", 30_080)] {
        let (outside, inside) = (
            at(address, port),
            ServiceKey {
                scope: SCOPE_INTERNAL,
                ..at(address, port)
            },
        );
        assert_eq!(outside.scope, SCOPE_EXTERNAL);
        assert_eq!(world.lookup(outside), ["10.1.0.3"]);
        assert_eq!(world.lookup(inside), both);
        assert!(world.maps.services[&outside].flags & service_flag::EXTERNAL_LOCAL != 0);
    }
    // No backend here: nobody answers, rather than one elsewhere.
    world.set(1, 1, 1);
    assert_eq!(world.lookup(at("203.0.113.1", 80)), Vec::<String>::new());
}

#[test]
fn nobody_takes_a_cluster_ip_by_naming_it() {
    let mut world = World::new(|frame| frame.name = service(1));
    let mut thief = frame(1);
    thief.cluster_ips = vec![ip("10.96.0.9")];
    thief.external_ips = vec![ip("10.96.0.1")];
    assert!(thief.name < service(1));
    let mut own = slice(1, "e0", vec![SliceEndpoint::ready(ip("10.1.0.1"))]);
    own.service = service(1);
    world.merge.upsert_slice(&own);
    world
        .merge
        .upsert_slice(&slice(1, "e0", vec![SliceEndpoint::ready(ip("10.6.6.6"))]));
    world.merge.upsert_frame(&thief);
    assert_eq!(world.lookup(at("10.96.0.1", 80)), ["10.1.0.1"]);
    assert_eq!(world.lookup(at("10.96.0.9", 80)), ["10.6.6.6"]);
}

#[test]
fn hints_keep_traffic_in_this_zone_while_they_can() {
    let mut world = World::new(|_| {});
    world.merge.set_zone("a");
    let hinted = |zones: [&str; 2]| {
        let endpoints = (1u8..).zip(zones).map(|(host, zone)| SliceEndpoint {
            zone_hints: if zone.is_empty() {
                vec![]
            } else {
                vec![zone.into()]
            },
            ..SliceEndpoint::ready([10, 1, 0, host].into())
        });
        slice(1, "e0", endpoints.collect())
    };
    world.merge.upsert_slice(&hinted(["a", "b"]));
    assert_eq!(world.lookup(at("10.96.0.1", 80)), ["10.1.0.1"]);
    let view = world.merge.service(&service(0)).unwrap();
    assert_eq!(view.backends[1].unused, Some(Unused::OtherZone));
    world.merge.upsert_slice(&hinted(["a", ""]));
    assert_eq!(world.lookup(at("10.96.0.1", 80)).len(), 2, "one has no hint");
    world.merge.upsert_slice(&hinted(["b", "b"]));
    assert_eq!(world.lookup(at("10.96.0.1", 80)).len(), 2, "none is for here");
    world.merge.upsert_slice(&hinted(["a", "b"]));
    world.merge.set_zone("b");
    assert_eq!(world.lookup(at("10.96.0.1", 80)), ["10.1.0.2"]);
    world.merge.set_zone("");
    assert_eq!(
        world.lookup(at("10.96.0.1", 80)).len(),
        2,
        "this node's zone is not known"
    );
}

#[test]
fn slot_0_says_affinity_and_maglev() {
    let mut world = World::new(|frame| {
        frame.session_affinity = SessionAffinity::ClientIp { timeout_seconds: 600 };
        frame.traffic.algorithm = Algorithm::Maglev;
    });
    let key = at("10.96.0.1", 80);
    world.lookup(key);
    assert!(world.maps.table(&key).is_none(), "no backends, no table");
    world.set(1, 3, 3);
    world.lookup(key);
    let value = world.maps.services[&key];
    assert_eq!(value.affinity_seconds(), 600);
    let before = world.maps.table(&key).unwrap();
    world.set(1, 2, 3);
    world.lookup(key);
    let after = world.maps.table(&key).unwrap();
    let gone = before
        .iter()
        .flatten()
        .filter(|(address, _)| to_ip(address) == ip("10.1.0.3"));
    let gone = gone.count();
    let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert!(gone > 60 && moved - gone < 25, "{gone} gone, {moved} moved");
}
