//! `cps`: new TCP connections a second from a pod through a cluster IP, among 1 to 50,000 services, beside kube-proxy's rules.
//!
//! In: how many services at most. Every service has five backends; the one that is asked has five that answer, on the same node.
//! Contenders: our packet path (a pod whose sockets nobody translates), our socket path (a pod with the connect hooks), iptables and
//! nftables (the same pods and routes on nodes of their own, with kube-proxy's rules and conntrack), and the pod's own address, without
//! a service. Out: connections a second that one client thread makes, each ended by a reset: the median of short rounds in which the
//! contenders take turns.
//!
//! The service in the middle of the list is asked: what a service costs on average where rules are a list. `…_vs_iptables_last` asks
//! the last one there. For the others the place does not matter.

use std::{
    collections::BTreeSet,
    net::SocketAddrV4,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use isthmus_datapath::{
    Datapath,
    conntrack::{self, Sweep},
};

use crate::{
    figure::Figure,
    kubeproxy::{Iptables, Nftables, nftables},
    lab::{
        Lab,
        load::{Load, PORT_ACCEPT, median},
        nodes::{IsthmusNode, Node},
    },
    services::Services,
    writer::Writer,
};

const BENCH: &str = "cps";
const BACKENDS: usize = 5;
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_millis(400);
/// As long as the agent's default.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);
const DIRECT: &str = "the pod's own address";
const ONE: &str = "the same with 1 service";

/// What is measured at one number of services.
struct Size {
    services: u32,
    packet: [&'static str; 4],
    socket: [&'static str; 4],
}

macro_rules! size {
    ($services:literal, $text:literal) => {
        Size {
            services: $services,
            packet: [
                concat!("cps_", $text),
                concat!("cps_", $text, "_vs_nftables"),
                concat!("cps_", $text, "_vs_iptables"),
                concat!("cps_", $text, "_vs_iptables_last"),
            ],
            socket: [
                concat!("socket_cps_", $text),
                concat!("socket_cps_", $text, "_vs_nftables"),
                concat!("socket_cps_", $text, "_vs_iptables"),
                concat!("socket_cps_", $text, "_vs_iptables_last"),
            ],
        }
    };
}

const SIZES: [Size; 5] = [
    size!(1, "1"),
    size!(100, "100"),
    size!(1_000, "1000"),
    size!(10_000, "10000"),
    size!(50_000, "50000"),
];

impl Size {
    fn middle(&self) -> u32 {
        self.services / 2
    }

    fn last(&self) -> u32 {
        self.services - 1
    }
}

/// Connections a second of each contender.
#[derive(Clone, Copy, Debug)]
struct Measured {
    direct: f64,
    packet: f64,
    socket: f64,
    nftables: f64,
    iptables: f64,
    iptables_last: f64,
}

/// Measures at all sizes up to `most` services.
pub fn run(most: u32) -> Result<Vec<Figure>> {
    let sizes: Vec<&Size> = SIZES.iter().filter(|size| size.services <= most).collect();
    ensure!(!sizes.is_empty(), "--services is 0: it takes at least 1");
    let lab = Lab::new(&["nft"])?;
    let mut contest = Contest::new(&lab, &sizes)?;
    let mut measured = vec![];
    for size in &sizes {
        contest.grow(size.services)?;
        measured.push(contest.measure(size)?);
    }
    let name = contest.iptables.name;
    let mut figures = vec![];
    for (size, at) in sizes.iter().zip(&measured) {
        for (names, ours) in [(&size.packet, at.packet), (&size.socket, at.socket)] {
            let peers = [
                (at.direct, DIRECT),
                (at.nftables, nftables::NAME),
                (at.iptables, name),
                (at.iptables_last, name),
            ];
            for (metric, (peer, peer_name)) in names.iter().zip(peers) {
                figures.push(Figure::beside(
                    BENCH,
                    metric,
                    "connections/s",
                    ours,
                    peer,
                    peer_name,
                ));
            }
        }
    }
    if let ([one, .., most], true) = (&measured[..], sizes.len() == SIZES.len()) {
        let flat = |metric, of: fn(&Measured) -> f64| {
            Figure::beside(BENCH, metric, "connections/s", of(most), of(one), ONE)
        };
        figures.push(flat("cps_50000_vs_1", |at| at.packet));
        figures.push(flat("socket_cps_50000_vs_1", |at| at.socket));
    }
    Ok(figures)
}

/// All contenders, with as many services.
struct Contest {
    services: Services,
    writer: Writer,
    datapath: Arc<Datapath>,
    iptables: Iptables,
    nftables: Nftables,
    direct_client: Load,
    packet: Load,
    socket: Load,
    iptables_client: Load,
    nftables_client: Load,
    direct: SocketAddrV4,
    _servers: Vec<Load>,
    _sweeper: Sweeper,
}

impl Contest {
    fn new(lab: &Lab, sizes: &[&Size]) -> Result<Self> {
        let cgroup = lab.cgroup()?;
        let own = IsthmusNode::alone(lab, &cgroup)?;
        let [for_iptables, for_nftables] = [Node::plain(lab, "ipt", 1)?, Node::plain(lab, "nft", 1)?];
        let services = Services {
            backends: BACKENDS,
            servers: own.node.server.addresses.clone(),
            target_port: PORT_ACCEPT,
            real: sizes
                .iter()
                .flat_map(|size| [size.middle(), size.last()])
                .collect::<BTreeSet<_>>(),
        };
        let nodes = [&own.node, &for_iptables, &for_nftables];
        // No port comes again while a flow of it may be remembered, nor do two contenders on one node share an address.
        let client = |node: &Node, cgroup, own: std::ops::Range<usize>| {
            Load::client(&node.client.namespace, cgroup, &node.client.addresses[own])
        };
        let datapath = Arc::new(own.datapath);
        Ok(Self {
            writer: Writer::new()?,
            iptables: Iptables::new(&for_iptables.namespace)?,
            nftables: Nftables::new(&for_nftables.namespace)?,
            direct_client: client(&own.node, None, 0..16)?,
            packet: client(&own.node, None, 16..40)?,
            socket: client(&own.node, Some(&cgroup), 40..64)?,
            iptables_client: client(&for_iptables, None, 0..64)?,
            nftables_client: client(&for_nftables, None, 0..64)?,
            direct: SocketAddrV4::new(services.servers[0], PORT_ACCEPT),
            _servers: nodes
                .iter()
                .map(|node| Load::server(&node.server.namespace))
                .collect::<Result<_>>()?,
            _sweeper: Sweeper::start(Arc::clone(&datapath)),
            datapath,
            services,
        })
    }

    fn grow(&mut self, count: u32) -> Result<()> {
        self.writer.learn(&self.services, count)?;
        self.writer.write(self.datapath.tables())?;
        let time = self.iptables.write(&self.services, count)?;
        eprintln!(
            "cps: {count} services; {} took {time:.1?}",
            self.iptables.command()
        );
        let time = self.nftables.write(&self.services, count, false)?;
        eprintln!("cps: {count} services; nft took {time:.1?}");
        Ok(())
    }

    fn measure(&mut self, size: &Size) -> Result<Measured> {
        let (middle, last) = (Services::frontend(size.middle()), Services::frontend(size.last()));
        let mut samples: [Vec<f64>; 6] = Default::default();
        let mut lost = 0;
        for round in 0..ROUNDS {
            // Nobody is always after the same other.
            for turn in 0..samples.len() {
                let contender = (turn + round) % samples.len();
                let (load, to) = match contender {
                    0 => (&mut self.direct_client, self.direct),
                    1 => (&mut self.packet, middle),
                    2 => (&mut self.socket, middle),
                    3 => (&mut self.nftables_client, middle),
                    4 => (&mut self.iptables_client, middle),
                    _ => (&mut self.iptables_client, last),
                };
                let sample = load
                    .connections(to, ROUND)
                    .with_context(|| format!("contender {contender} at {} services", size.services))?;
                lost += sample.lost;
                samples[contender].push(sample.rate());
            }
        }
        if lost > 0 {
            eprintln!(
                "cps: {lost} connections lost a packet at {} services",
                size.services
            );
        }
        let [direct, packet, socket, nftables, iptables, iptables_last] = samples.map(median);
        let measured = Measured {
            direct,
            packet,
            socket,
            nftables,
            iptables,
            iptables_last,
        };
        eprintln!("cps: {} services: {measured:.0?}", size.services);
        Ok(measured)
    }
}

/// Removes flows that are over, as the agent does. Ends with its value.
struct Sweeper {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Sweeper {
    fn start(datapath: Arc<Datapath>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                thread::park_timeout(SWEEP_INTERVAL);
                if let Err(error) = sweep(&datapath, &stopped) {
                    eprintln!("cps: sweeping the flows: {error:#}");
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

fn sweep(datapath: &Datapath, stopped: &AtomicBool) -> Result<()> {
    let mut sweep = Sweep::default();
    while !sweep.is_over() && !stopped.load(Ordering::Relaxed) {
        sweep.step(datapath.tables(), conntrack::now()?)?;
    }
    Ok(())
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has said what went wrong.
            let _ = thread.join();
        }
    }
}
