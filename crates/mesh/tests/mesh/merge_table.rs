//! Every row of the table of global services, one by one.

use isthmus_mesh::{LoadBalancer, loadbalancer::Unused, to_ip};
use isthmus_model::{Affinity, Protocol, ServiceFrame, ServiceType, SliceEndpoint};

use crate::{
    events::{cluster, frame, service, service_port, slice, slice_port},
    maps::Maps,
    naive::{LOCAL, ip},
    properties::drain,
};

struct World {
    merge: LoadBalancer,
    maps: Maps,
}

impl World {
    fn new(frames: &[ServiceFrame]) -> Self {
        let mut merge = LoadBalancer::new(cluster(LOCAL));
        frames.iter().for_each(|frame| merge.upsert_frame(frame));
        Self {
            merge,
            maps: Maps::default(),
        }
    }

    /// `10.<cluster>.0.<n>` for each state: `r`eady, `t`erminating and serving, `u`nready, weight `0`.
    fn endpoints(mut self, of: u16, states: &str) -> Self {
        let endpoints = states.chars().zip(1u8..).map(|(state, host)| {
            let mut endpoint = SliceEndpoint::ready([10, of as u8, 0, host].into());
            match state {
                't' => (endpoint.ready, endpoint.terminating) = (false, true),
                'u' => (endpoint.ready, endpoint.serving) = (false, false),
                '0' => endpoint.weight = 0,
                _ => {}
            }
            endpoint
        });
        self.merge.upsert_slice(&slice(of, "e0", endpoints.collect()));
        self
    }

    fn unhealthy(mut self, of: u16) -> Self {
        self.merge.set_cluster_health(cluster(of), false);
        self
    }

    /// Backends of the only frontend, as `cluster.host`.
    fn check(&mut self, want: &[&str]) {
        drain(&mut self.merge, &mut self.maps);
        let lookups = self.maps.lookups();
        assert!(lookups.len() <= 1, "{lookups:?}");
        let mut got: Vec<String> = lookups
            .values()
            .flatten()
            .flatten()
            .map(|(address, _)| {
                let text = to_ip(address).to_string();
                let parts: Vec<_> = text.split('.').collect();
                format!("{}.{}", parts[1], parts[3])
            })
            .collect();
        got.sort();
        assert_eq!(got, want);
    }

    fn reasons(&self) -> Vec<Option<Unused>> {
        let service = self.merge.service(&service(0)).unwrap();
        service.backends.iter().map(|backend| backend.unused).collect()
    }
}

fn with(of: u16, change: impl FnOnce(&mut ServiceFrame)) -> ServiceFrame {
    let mut frame = frame(of);
    change(&mut frame);
    frame
}

fn plain(of: u16) -> ServiceFrame {
    with(of, |frame| (frame.global, frame.shared) = (false, false))
}

fn affinity(affinity: Affinity) -> ServiceFrame {
    with(1, |frame| frame.affinity = affinity)
}

#[test]
fn absent_here_means_no_frontend() {
    let mut world = World::new(&[frame(2)]).endpoints(2, "r");
    world.check(&[]);
    assert!(world.maps.services.is_empty());
    assert_eq!(world.reasons(), [Some(Unused::NoLocalService)]);
}

#[test]
fn not_global_here_uses_local_only() {
    let mut world = World::new(&[plain(1), frame(2)])
        .endpoints(1, "r")
        .endpoints(2, "r");
    world.check(&["1.1"]);
    assert_eq!(world.reasons(), [None, Some(Unused::NotGlobal)]);
}

#[test]
fn absent_or_not_global_there_uses_local_only() {
    let mut world = World::new(&[frame(1)]).endpoints(1, "r").endpoints(2, "r");
    world.check(&["1.1"]);
    let mut world = World::new(&[frame(1), plain(2)])
        .endpoints(1, "r")
        .endpoints(2, "r");
    world.check(&["1.1"]);
    assert_eq!(world.reasons(), [None, Some(Unused::RemoteNotGlobal)]);
}

#[test]
fn not_shared_there_uses_local_only() {
    let unshared = with(2, |frame| frame.shared = false);
    let mut world = World::new(&[frame(1), unshared])
        .endpoints(1, "r")
        .endpoints(2, "r");
    world.check(&["1.1"]);
    assert_eq!(world.reasons(), [None, Some(Unused::NotShared)]);
}

#[test]
fn not_shared_here_still_uses_remote_ones() {
    let unshared = with(1, |frame| frame.shared = false);
    World::new(&[unshared, frame(2)])
        .endpoints(1, "r")
        .endpoints(2, "r")
        .check(&["1.1", "2.1"]);
}

#[test]
fn global_everywhere_uses_all() {
    let frames = [frame(1), frame(2), frame(3)];
    World::new(&frames)
        .endpoints(1, "r")
        .endpoints(2, "rr")
        .endpoints(3, "r")
        .check(&["1.1", "2.1", "2.2", "3.1"]);
}

#[test]
fn affinity_local_keeps_to_active_local_ones() {
    let frames = [affinity(Affinity::Local), frame(2)];
    let mut world = World::new(&frames).endpoints(1, "rt").endpoints(2, "r");
    world.check(&["1.1"]);
    assert_eq!(
        world.reasons(),
        [None, Some(Unused::Terminating), Some(Unused::AffinityLocal)]
    );
    // Terminating local ones do not keep remote ones out.
    world = world.endpoints(1, "t");
    world.check(&["2.1"]);
    world = world.endpoints(1, "u");
    world.check(&["2.1"]);
    world = world.endpoints(2, "u").endpoints(1, "t");
    world.check(&["1.1"]);
}

#[test]
fn affinity_remote_keeps_to_healthy_remote_ones() {
    let frames = [affinity(Affinity::Remote), frame(2)];
    let mut world = World::new(&frames).endpoints(1, "r").endpoints(2, "r");
    world.check(&["2.1"]);
    assert_eq!(world.reasons(), [Some(Unused::AffinityRemote), None]);
    // Terminating remote ones still count as remote.
    world = world.endpoints(2, "t");
    world.check(&["2.1"]);
    world = world.endpoints(2, "u");
    world.check(&["1.1"]);
}

#[test]
fn affinity_is_the_local_clusters_own() {
    let remote = with(2, |frame| frame.affinity = Affinity::Local);
    World::new(&[frame(1), remote])
        .endpoints(1, "r")
        .endpoints(2, "r")
        .check(&["1.1", "2.1"]);
}

#[test]
fn terminating_ones_serve_only_when_nothing_else_does() {
    let mut world = World::new(&[frame(1), frame(2)])
        .endpoints(1, "tu0")
        .endpoints(2, "r");
    world.check(&["2.1"]);
    assert_eq!(
        world.reasons(),
        [
            Some(Unused::Terminating),
            Some(Unused::Unready),
            Some(Unused::WeightZero),
            None
        ]
    );
    world = world.endpoints(2, "u");
    world.check(&["1.1"]);
    world = world.endpoints(1, "u0");
    world.check(&[]);
    assert_eq!(world.maps.services.len(), 1, "the frontend stays, and refuses");
}

#[test]
fn a_cluster_that_does_not_answer_is_the_last_resort() {
    let mut world = World::new(&[frame(1), frame(2)])
        .endpoints(1, "r")
        .endpoints(2, "r")
        .unhealthy(2);
    world.check(&["1.1"]);
    assert_eq!(world.reasons(), [None, Some(Unused::ClusterUnhealthy)]);
    world = world.endpoints(1, "t");
    world.check(&["1.1"]);
    world = world.endpoints(1, "u");
    world.check(&["2.1"]);
    world.merge.set_cluster_health(cluster(2), true);
    world = world.endpoints(1, "r");
    world.check(&["1.1", "2.1"]);
}

#[test]
fn a_withdrawn_service_takes_exactly_its_own_backends() {
    let frames = [frame(1), frame(2), frame(3)];
    let mut world = World::new(&frames)
        .endpoints(1, "r")
        .endpoints(2, "r")
        .endpoints(3, "r");
    world.check(&["1.1", "2.1", "3.1"]);
    world.merge.delete_frame(cluster(2), &service(0));
    world.check(&["1.1", "3.1"]);
    world.merge.upsert_frame(&frame(2));
    world.check(&["1.1", "2.1", "3.1"]);
    world.merge.cluster_removed(cluster(3));
    world.check(&["1.1", "2.1"]);
    world.merge.delete_slice(cluster(2), &service(0), "e0");
    world.check(&["1.1"]);
}

#[test]
fn one_address_of_two_slices_is_one_backend() {
    let mut world = World::new(&[frame(1)]).endpoints(1, "r");
    let mut unready = SliceEndpoint::ready(ip("10.1.0.1"));
    unready.ready = false;
    world.merge.upsert_slice(&slice(1, "e1", vec![unready]));
    world.check(&["1.1"]);
    assert_eq!(world.maps.backends.len(), 1);
    assert_eq!(world.merge.stats().backend_conflicts, 0);
}

#[test]
fn of_two_clusters_with_one_address_the_local_one_owns_it() {
    let mut world = World::new(&[frame(1), frame(2), frame(3)]);
    let same = |of| slice(of, "e0", vec![SliceEndpoint::ready(ip("10.9.0.1"))]);
    for of in [3, 2] {
        world.merge.upsert_slice(&same(of));
    }
    world.check(&["9.1"]);
    let owner = |world: &World| world.maps.backends.values().next().unwrap().cluster_id;
    assert_eq!(owner(&world), 2);
    world.merge.upsert_slice(&same(1));
    world.check(&["9.1"]);
    assert_eq!((owner(&world), world.maps.backends.len()), (1, 1));
    assert_eq!(world.merge.stats().backend_conflicts, 1);
    assert_eq!(
        world.reasons(),
        [None, Some(Unused::OwnedElsewhere), Some(Unused::OwnedElsewhere)]
    );
}

#[test]
fn ports_match_by_name_and_protocol() {
    let local = with(1, |frame| {
        frame.ports = vec![
            service_port("dns", Protocol::Udp, 53),
            service_port("", Protocol::Tcp, 80),
            service_port("sctp", Protocol::Sctp, 99),
        ];
    });
    let mut world = World::new(&[local]);
    let mut endpoints = slice(1, "e0", vec![SliceEndpoint::ready(ip("10.1.0.1"))]);
    endpoints.ports = vec![
        slice_port("dns", Protocol::Tcp, 1),
        slice_port("dns", Protocol::Udp, 2),
        slice_port("http", Protocol::Tcp, 3),
        slice_port("sctp", Protocol::Sctp, 4),
    ];
    world.merge.upsert_slice(&endpoints);
    drain(&mut world.merge, &mut world.maps);
    let counts: Vec<_> = world
        .maps
        .lookups()
        .iter()
        .map(|(key, slots)| (key.proto, slots.len()))
        .collect();
    assert_eq!(counts, [(17, 1), (6, 0)], "keys sort by port: 53 before 80");
    assert_eq!(
        world.maps.backends.values().next().unwrap().port,
        2u16.to_be_bytes()
    );
}

#[test]
fn families_stay_apart() {
    let local = with(1, |frame| frame.cluster_ips.push(ip("fd00:96::1")));
    let mut world = World::new(&[local]);
    let both = [ip("10.1.0.1"), ip("fd00::1"), ip("fd00::2")].map(SliceEndpoint::ready);
    world.merge.upsert_slice(&slice(1, "e0", both.to_vec()));
    drain(&mut world.merge, &mut world.maps);
    let counts: Vec<_> = world.maps.lookups().values().map(Vec::len).collect();
    assert_eq!(counts, [1, 2]);
}

#[test]
fn headless_services_have_no_frontends() {
    let headless = with(1, |frame| frame.service_type = ServiceType::Headless);
    let mut world = World::new(&[headless]).endpoints(1, "r");
    world.check(&[]);
    assert!(world.maps.services.is_empty() && world.maps.backends.is_empty());
}

#[test]
fn a_frontend_of_two_services_goes_to_the_lower_name_and_back() {
    let second = with(1, |frame| frame.name = service(1));
    let mut world = World::new(&[second]);
    let mut others = slice(1, "e0", vec![SliceEndpoint::ready(ip("10.7.0.7"))]);
    others.service = service(1);
    world.merge.upsert_slice(&others);
    world.check(&["7.7"]);
    world.merge.upsert_frame(&frame(1));
    world = world.endpoints(1, "r");
    world.check(&["1.1"]);
    assert_eq!(world.merge.stats().frontend_conflicts, 1);
    world.merge.delete_frame(cluster(1), &service(0));
    world.check(&["7.7"]);
}

#[test]
fn one_changed_backend_is_a_handful_of_writes() {
    let mut world = World::new(&[frame(1), frame(2)])
        .endpoints(1, &"r".repeat(50))
        .endpoints(2, &"r".repeat(50));
    let first = world.merge.drain();
    assert_eq!(first.len(), 100 + 100 + 1);
    let mut states = "r".repeat(50);
    states.replace_range(10..11, "u");
    world = world.endpoints(2, &states);
    // One slot takes the last one's backend; count; last slot; the backend.
    assert_eq!(world.merge.drain().len(), 4);
}
