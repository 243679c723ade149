//! The merge of 200 clusters with 500 services and 20 backends each, and of one service with 10,000 backends.
//!
//! In: nothing. Out: time for the whole, for one changed backend, for one changed backend of the big service; process
//! memory for each remote endpoint, source tables and merged state together, and for each ipcache entry; time for a Maglev
//! table of the default size with 1,000 backends.
//!
//! Peers: where Cilium has published a number, that one (and the name says so); else a merge of the same input from
//! scratch with the standard library's maps, in the same run: of everything, or of just the service that changed.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use isthmus_bpf_abi::{Backend, PROTO_TCP, ServiceKey, ServiceValue};
use isthmus_mesh::{
    Ipcache, LoadBalancer, MaglevConfig, MapOp,
    maglev::{self, MaglevBackend},
    to_address,
};
use isthmus_model::{
    Affinity, ClusterId, ClusterName, IpEntry, MaxConnectedClusters, NumericIdentity, Protocol, ServiceFrame,
    ServiceName, ServicePort, ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
};

use crate::{figure::Figure, process::resident_bytes};

const CLUSTERS: u16 = 200;
const SERVICES: u16 = 500;
const BACKENDS: u16 = 20;
const BIG: usize = 10_000;
const ENDPOINTS: usize = CLUSTERS as usize * SERVICES as usize * BACKENDS as usize;
/// A backend and a slot for each, and the counts.
const OPERATIONS: usize = 2 * ENDPOINTS + SERVICES as usize;
const CHANGES: u32 = 1_000;
/// The best of so many counts: what disturbs a run only ever slows it down.
const ROUNDS: usize = 3;
const IPCACHE_ENTRIES: u32 = 1_000_000;

/// Cilium's mesh path for one changed backend of a 10,000-backend service, as published.
const CILIUM_DELTA_US: f64 = 78_800.0;
/// Cilium's agent memory for one remote endpoint, as published.
const CILIUM_BYTES: f64 = 5_400.0;

/// Merges, several ways.
pub fn run() -> Result<Vec<Figure>> {
    // Kept until the end, so that no other measurement finds memory that this one gave back.
    let (ipcache, ipcache_bytes) = ipcache()?;
    let (mut bytes, mut full, mut full_peer) = (0.0, Duration::MAX, Duration::MAX);
    let (mut one, mut one_peer) = (f64::INFINITY, f64::INFINITY);
    for round in 0..ROUNDS {
        let before = resident_bytes()?;
        let (mut merge, time) = whole()?;
        if round == 0 {
            bytes = resident_bytes()?.saturating_sub(before) as f64 / ENDPOINTS as f64;
        }
        full = full.min(time);
        let mut slices = (0..2)
            .map(|_| slice(100, 7, 0, 0..BACKENDS.into()))
            .collect::<Result<Vec<_>>>()?;
        slices[1].endpoints[3].ready = false;
        one = one.min(alternate(&mut merge, &slices)?);
        drop(merge);
        let (naive, time) = naive_whole()?;
        full_peer = full_peer.min(time);
        one_peer = one_peer.min(naive_one(naive, &slices)?);
    }
    drop(ipcache);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let figure = |metric, unit, ours, peer, name| Figure::beside("merge", metric, unit, ours, peer, name);
    let (maglev_us, maglev_peer_us) = maglev_table()?;
    Ok(vec![
        figure(
            "full_ms",
            "ms",
            ms(full),
            ms(full_peer),
            "from scratch with BTreeMap",
        ),
        figure(
            "one_change_us",
            "us",
            one,
            one_peer,
            "one service from scratch with BTreeMap",
        ),
        figure(
            "big_service_delta_us",
            "us",
            big_service()?,
            CILIUM_DELTA_US,
            "Cilium mesh path, published",
        ),
        figure(
            "bytes_per_remote_endpoint",
            "bytes",
            bytes,
            CILIUM_BYTES,
            "Cilium agent, published",
        ),
        figure(
            "maglev_1000_us",
            "us",
            maglev_us,
            maglev_peer_us,
            "whole permutations, as in the paper",
        ),
        figure(
            "bytes_per_ipcache_entry",
            "bytes",
            ipcache_bytes,
            CILIUM_BYTES,
            "Cilium agent, published",
        ),
    ])
}

/// The merge with everything in, drained; and how long that took.
fn whole() -> Result<(LoadBalancer, Duration)> {
    let mut merge = LoadBalancer::new(cluster(1)?);
    let mut time = Duration::ZERO;
    for id in 1..=CLUSTERS {
        // Made and dropped cluster by cluster: what remains in memory is the merge's own.
        let frames = (0..SERVICES)
            .map(|number| frame(id, number))
            .collect::<Result<Vec<_>>>()?;
        let slices = slices_of(id)?;
        let start = Instant::now();
        for (frame, slice) in frames.iter().zip(&slices) {
            merge.upsert_frame(frame);
            merge.upsert_slice(slice);
        }
        time += start.elapsed();
    }
    let start = Instant::now();
    let plan = merge.drain();
    time += start.elapsed();
    ensure!(plan.len() == OPERATIONS, "the plan has {} operations", plan.len());
    Ok((merge, time))
}

/// The same by the peer.
fn naive_whole() -> Result<(Naive, Duration)> {
    let mut naive = Naive::default();
    let mut time = Duration::ZERO;
    for id in 1..=CLUSTERS {
        let slices = slices_of(id)?;
        let start = Instant::now();
        slices.iter().for_each(|slice| naive.upsert(slice));
        time += start.elapsed();
    }
    let start = Instant::now();
    let plan = naive.plan();
    time += start.elapsed();
    ensure!(
        plan.len() == OPERATIONS,
        "the naive plan has {} operations",
        plan.len()
    );
    Ok((naive, time))
}

/// Microseconds of the peer for a slice that changed.
fn naive_one(mut naive: Naive, slices: &[Slice]) -> Result<f64> {
    let rounds = 20;
    let start = Instant::now();
    for round in 0..rounds {
        let slice = &slices[round % 2];
        naive.upsert(slice);
        let backends = naive.merge(&slice.service);
        ensure!(
            backends.len() + 1 >= usize::from(BACKENDS) * usize::from(CLUSTERS),
            "backends are missing"
        );
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / rounds as f64)
}

fn slices_of(id: u16) -> Result<Vec<Slice>> {
    (0..SERVICES)
        .map(|number| slice(id, number, 0, 0..BACKENDS.into()))
        .collect()
}

/// 10,000 backends in slices of 100, half of them of another cluster.
fn big_service() -> Result<f64> {
    let mut merge = LoadBalancer::new(cluster(1)?);
    for id in [1, 2] {
        merge.upsert_frame(&frame(id, 0)?);
        for part in 0..BIG / 2 / Slice::MAX_ENDPOINTS {
            let first = part * Slice::MAX_ENDPOINTS;
            merge.upsert_slice(&slice(id, 0, part, first..first + Slice::MAX_ENDPOINTS)?);
        }
    }
    ensure!(
        merge.drain().len() == 2 * BIG + 1,
        "the big service is incomplete"
    );
    let mut slices = (0..2)
        .map(|_| slice(2, 0, 3, 300..400))
        .collect::<Result<Vec<_>>>()?;
    slices[1].endpoints[50].ready = false;
    let rounds = (0..ROUNDS)
        .map(|_| alternate(&mut merge, &slices))
        .collect::<Result<Vec<_>>>()?;
    Ok(rounds.into_iter().fold(f64::INFINITY, f64::min))
}

/// Microseconds from a slice to its plan, on average, between two versions of it that differ in one backend.
fn alternate(merge: &mut LoadBalancer, slices: &[Slice]) -> Result<f64> {
    let start = Instant::now();
    for change in 0..CHANGES {
        merge.upsert_slice(&slices[(change as usize + 1) % 2]);
        let plan = merge.drain();
        ensure!(
            (3..=4).contains(&plan.len()),
            "one change made {} operations",
            plan.len()
        );
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(CHANGES))
}

/// Microseconds for a Maglev table with 1,000 backends: ours, and one that writes out all permutations first.
fn maglev_table() -> Result<(f64, f64)> {
    let config = MaglevConfig::default();
    let backends: Vec<MaglevBackend> = (0..1000u32)
        .map(|number| {
            let [_, _, a, b] = number.to_be_bytes();
            MaglevBackend {
                address: to_address([10, 1, a, b].into()),
                port: 8080,
                weight: 1,
                id: number + 1,
            }
        })
        .collect();
    let (mut ours, mut peer) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..10 {
        let start = Instant::now();
        let table = maglev::table(&config.seed, config.table_size, &backends);
        ours = ours.min(start.elapsed().as_secs_f64() * 1e6);
        ensure!(
            table.len() == config.table_size as usize,
            "the table is incomplete"
        );
    }
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let table = maglev_naive(config.table_size, &backends);
        peer = peer.min(start.elapsed().as_secs_f64() * 1e6);
        ensure!(!table.contains(&0), "the naive table is incomplete");
    }
    Ok((ours, peer))
}

fn maglev_naive(size: u32, backends: &[MaglevBackend]) -> Vec<u32> {
    let hash = |seed: u64, backend: &MaglevBackend| {
        let bytes = backend.address.iter().chain(&[0, 0]);
        bytes.fold(seed, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let permutations: Vec<Vec<u32>> = backends
        .iter()
        .map(|backend| {
            let offset = hash(0xcbf2_9ce4_8422_2325, backend) % u64::from(size);
            let skip = hash(0x9747_b28c, backend) % u64::from(size - 1) + 1;
            let entry = |turn: u64| ((offset + turn * skip) % u64::from(size)) as u32;
            (0..u64::from(size)).map(entry).collect()
        })
        .collect();
    let mut table = vec![0; size as usize];
    let mut next = vec![0usize; backends.len()];
    let mut left = size;
    for at in (0..backends.len()).cycle() {
        if left == 0 {
            break;
        }
        while table[permutations[at][next[at]] as usize] != 0 {
            next[at] += 1;
        }
        table[permutations[at][next[at]] as usize] = backends[at].id;
        left -= 1;
    }
    table
}

/// A merge with a million entries, and the bytes for each.
fn ipcache() -> Result<(Ipcache, f64)> {
    let mut merge = Ipcache::new(cluster(1)?, MaxConnectedClusters::C255, "n1");
    let before = resident_bytes()?;
    let remote = cluster(2)?;
    for number in 0..IPCACHE_ENTRIES {
        let [_, a, b, c] = number.to_be_bytes();
        merge.upsert_entry(
            remote,
            &IpEntry {
                prefix: IpAddr::from([10, a, b, c]).into(),
                host_ip: Some([192, 168, a, b].into()),
                identity: NumericIdentity((2 << 16) + number % 100),
                encryption_key: 0,
                namespace: String::new(),
                pod_name: String::new(),
                service_account: String::new(),
                named_ports: vec![],
            },
        );
    }
    ensure!(
        merge.drain().len() == IPCACHE_ENTRIES as usize,
        "the ipcache is incomplete"
    );
    let bytes = resident_bytes()?.saturating_sub(before) as f64 / f64::from(IPCACHE_ENTRIES);
    Ok((merge, bytes))
}

/// Slices by service, and backends by service: what one would write first.
#[derive(Default)]
struct Naive {
    slices: BTreeMap<ServiceName, BTreeMap<(ClusterId, Box<str>), Slice>>,
}

impl Naive {
    fn upsert(&mut self, slice: &Slice) {
        let of = self.slices.entry(slice.service.clone()).or_default();
        of.insert((slice.cluster_id, slice.slice.clone()), slice.clone());
    }

    fn merge(&self, name: &ServiceName) -> BTreeMap<(IpAddr, u16), ClusterId> {
        let mut backends = BTreeMap::new();
        for slice in self.slices.get(name).into_iter().flat_map(BTreeMap::values) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready) {
                for port in &slice.ports {
                    backends
                        .entry((endpoint.ip, port.port))
                        .or_insert(slice.cluster_id);
                }
            }
        }
        backends
    }

    /// Writes for empty maps.
    fn plan(&self) -> Vec<MapOp> {
        let (mut ops, mut later, mut id) = (Vec::new(), Vec::new(), 0);
        for (number, name) in (0u32..).zip(self.slices.keys()) {
            let frontend = ServiceKey::frontend(to_address([10, 96, 0, 0].into()), number as u16, PROTO_TCP);
            let mut slot = 0;
            for ((ip, port), cluster) in self.merge(name) {
                id += 1;
                slot += 1;
                let backend = Backend {
                    address: to_address(ip),
                    port: port.to_be_bytes(),
                    proto: PROTO_TCP,
                    state: 0,
                    cluster_id: cluster.get(),
                    zone: 0,
                    pad: 0,
                };
                ops.push(MapOp::BackendPut(id, backend));
                later.push(MapOp::ServicePut(
                    frontend.at_slot(slot),
                    ServiceValue::slot(number, id),
                ));
            }
            later.push(MapOp::ServicePut(
                frontend,
                ServiceValue::frontend(number, slot, 0),
            ));
        }
        ops.append(&mut later);
        ops
    }
}

fn cluster(id: u16) -> Result<ClusterId> {
    Ok(ClusterId::new(id.into(), MaxConnectedClusters::C255)?)
}

fn name(number: u16) -> Result<ServiceName> {
    Ok(ServiceName::new("shop", &format!("service-{number}"))?)
}

fn frame(id: u16, number: u16) -> Result<ServiceFrame> {
    let [high, low] = number.to_be_bytes();
    Ok(ServiceFrame {
        cluster: ClusterName::new(&format!("cluster-{id}"))?,
        cluster_id: cluster(id)?,
        name: name(number)?,
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![[10, 96, high, low].into()],
        external_ips: vec![],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        global: true,
        shared: true,
        affinity: Affinity::None,
        session_affinity: SessionAffinity::None,
        traffic: Default::default(),
        labels: BTreeMap::new(),
        selector: BTreeMap::new(),
    })
}

/// Endpoints are spread over 100 nodes and 3 zones.
fn slice(id: u16, number: u16, part: usize, endpoints: std::ops::Range<usize>) -> Result<Slice> {
    let endpoint = |at: usize| {
        let address = (u32::from(id) << 24) | ((u32::from(number) << 15) ^ at as u32);
        SliceEndpoint {
            node: format!("cluster-{id}-node-{}", (usize::from(number) + at) % 100).into(),
            zone: format!("zone-{}", at % 3).into(),
            ..SliceEndpoint::ready(IpAddr::from(address.to_be_bytes()))
        }
    };
    Ok(Slice {
        cluster: ClusterName::new(&format!("cluster-{id}"))?,
        cluster_id: cluster(id)?,
        service: name(number)?,
        slice: format!("service-{number}-{part}").into(),
        ports: vec![SlicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: endpoints.map(endpoint).collect(),
    })
}
