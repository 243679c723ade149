//! The merge of 200 clusters with 500 services and 20 backends each, and of one service with 10,000 backends.
//!
//! In: nothing. Out: time for the whole, for one changed backend, for one changed backend of the big service; process
//! memory for each remote endpoint, source tables and merged state together, and for each ipcache entry.
//!
//! Peers: where Cilium has published a number, that one (and the name says so); else a merge of the same input from
//! scratch with the standard library's maps, in the same run: of everything, or of just the service that changed.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use isthmus_mesh::{Ipcache, LoadBalancer};
use isthmus_model::{
    Affinity, ClusterId, ClusterName, IpEntry, MaxConnectedClusters, NumericIdentity, Protocol, ServiceFrame,
    ServiceName, ServicePort, ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
};

use crate::figure::Figure;

const CLUSTERS: u16 = 200;
const SERVICES: u16 = 500;
const BACKENDS: u16 = 20;
const BIG: usize = 10_000;
const CHANGES: u32 = 1_000;
const IPCACHE_ENTRIES: u32 = 1_000_000;

/// Cilium's mesh path for one changed backend of a 10,000-backend service, as published.
const CILIUM_DELTA_US: f64 = 78_800.0;
/// Cilium's agent memory for one remote endpoint, as published.
const CILIUM_BYTES: f64 = 5_400.0;

/// Merges, several ways.
pub fn run() -> Result<Vec<Figure>> {
    let mut figures = whole()?;
    figures.extend(big_service()?);
    figures.push(ipcache()?);
    Ok(figures)
}

fn whole() -> Result<Vec<Figure>> {
    let mut merge = LoadBalancer::new(cluster(1)?);
    let before = resident_bytes()?;
    let mut ours = Duration::ZERO;
    for id in 1..=CLUSTERS {
        // Made and dropped cluster by cluster: what remains in memory is the merge's own.
        let frames = (0..SERVICES)
            .map(|number| frame(id, number))
            .collect::<Result<Vec<_>>>()?;
        let slices = (0..SERVICES)
            .map(|number| slice(id, number, 0, 0..BACKENDS.into()))
            .collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        for (frame, slice) in frames.iter().zip(&slices) {
            merge.upsert_frame(frame);
            merge.upsert_slice(slice);
        }
        ours += start.elapsed();
    }
    let start = Instant::now();
    let plan = merge.drain();
    ours += start.elapsed();
    let endpoints = usize::from(CLUSTERS) * usize::from(SERVICES) * usize::from(BACKENDS);
    ensure!(
        plan.len() == 2 * endpoints + usize::from(SERVICES),
        "the plan has {} operations",
        plan.len()
    );
    drop(plan);
    let bytes = resident_bytes()?.saturating_sub(before) as f64 / endpoints as f64;

    let mut slices = (0..2)
        .map(|_| slice(100, 7, 0, 0..BACKENDS.into()))
        .collect::<Result<Vec<_>>>()?;
    slices[1].endpoints[3].ready = false;
    let one_us = alternate(&mut merge, &slices)?;
    drop(merge);

    let mut tables = Naive::default();
    let mut peer = Duration::ZERO;
    for id in 1..=CLUSTERS {
        let slices = (0..SERVICES)
            .map(|number| slice(id, number, 0, 0..BACKENDS.into()))
            .collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        slices.into_iter().for_each(|slice| tables.upsert(slice));
        peer += start.elapsed();
    }
    let start = Instant::now();
    let merged = tables.merge_all();
    peer += start.elapsed();
    ensure!(
        merged.values().map(BTreeMap::len).sum::<usize>() == endpoints,
        "the naive merge is wrong"
    );
    let name = slices[0].service.clone();
    let start = Instant::now();
    let rounds = 20u32;
    for round in 0..rounds {
        tables.upsert(slices[round as usize % 2].clone());
        ensure!(!tables.merge_one(&name).is_empty(), "the naive merge is empty");
    }
    let peer_one_us = start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);

    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(vec![
        Figure::beside(
            "merge",
            "full_ms",
            "ms",
            ms(ours),
            ms(peer),
            "from scratch with BTreeMap",
        ),
        Figure::beside(
            "merge",
            "one_change_us",
            "us",
            one_us,
            peer_one_us,
            "one service from scratch with BTreeMap",
        ),
        Figure::beside(
            "merge",
            "bytes_per_remote_endpoint",
            "bytes",
            bytes,
            CILIUM_BYTES,
            "Cilium agent, published",
        ),
    ])
}

/// 10,000 backends in slices of 100, half of them of another cluster.
fn big_service() -> Result<Vec<Figure>> {
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
    let us = alternate(&mut merge, &slices)?;
    Ok(vec![Figure::beside(
        "merge",
        "big_service_delta_us",
        "us",
        us,
        CILIUM_DELTA_US,
        "Cilium mesh path, published",
    )])
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

fn ipcache() -> Result<Figure> {
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
    drop(merge);
    Ok(Figure::beside(
        "merge",
        "bytes_per_ipcache_entry",
        "bytes",
        bytes,
        CILIUM_BYTES,
        "Cilium agent, published",
    ))
}

/// Slices by service, and backends by service: what one would write first.
#[derive(Default)]
struct Naive {
    slices: BTreeMap<ServiceName, BTreeMap<(ClusterId, Box<str>), Slice>>,
}

impl Naive {
    fn upsert(&mut self, slice: Slice) {
        let of = self.slices.entry(slice.service.clone()).or_default();
        of.insert((slice.cluster_id, slice.slice.clone()), slice);
    }

    fn merge_one(&self, name: &ServiceName) -> BTreeMap<(IpAddr, u16), ClusterId> {
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

    fn merge_all(&self) -> BTreeMap<&ServiceName, BTreeMap<(IpAddr, u16), ClusterId>> {
        self.slices
            .keys()
            .map(|name| (name, self.merge_one(name)))
            .collect()
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

/// Resident memory of this process. What the allocator keeps of freed memory counts: it is memory all the same.
fn resident_bytes() -> Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").context("/proc/self/statm")?;
    let pages = statm
        .split(' ')
        .nth(1)
        .context("/proc/self/statm has no second field")?;
    Ok(pages.parse::<usize>().context("/proc/self/statm")? * page_bytes()?)
}

fn page_bytes() -> Result<usize> {
    let auxv = std::fs::read("/proc/self/auxv").context("/proc/self/auxv")?;
    let word = |bytes: &[u8]| bytes.try_into().map(usize::from_ne_bytes).unwrap_or(0);
    const AT_PAGESZ: usize = 6;
    auxv.chunks_exact(2 * size_of::<usize>())
        .map(|entry| entry.split_at(size_of::<usize>()))
        .find(|(key, _)| word(key) == AT_PAGESZ)
        .map(|(_, value)| word(value))
        .context("the kernel does not say how large a page is")
}
