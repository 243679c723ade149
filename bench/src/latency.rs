//! `rr` and `stream`: round trips and throughput through a service, beside the same pod's own address: on the same node and over VXLAN.
//!
//! In: nothing (needs root). Out: for the packet path (a pod whose sockets nobody translates) and the socket path (a pod with the
//! connect hooks) each: microseconds of a round trip of one byte, and round trips a second; or bits a second of one stream. Medians
//! of short rounds in which the contenders take turns, each round with a connection of its own.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Context, Result};

use crate::{
    figure::Figure,
    lab::{
        Lab,
        load::{Load, PORT_ECHO, PORT_SINK, Sample, median},
        nodes::IsthmusNode,
    },
    services::Services,
    writer::Writer,
};

const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(400);
const DIRECT: &str = "the pod's own address";

/// One place of the server, and the metrics there.
struct Place {
    /// Number of the service.
    service: u32,
    /// Packet path, then socket path.
    rr: [&'static str; 2],
    rr_us: [&'static str; 2],
    stream: [&'static str; 2],
}

const PLACES: [Place; 2] = [
    Place {
        service: 0,
        rr: ["rr_service_vs_direct", "socket_rr_service_vs_direct"],
        rr_us: ["rr_service_us", "socket_rr_service_us"],
        stream: ["stream_service_vs_direct", "socket_stream_service_vs_direct"],
    },
    Place {
        service: 1,
        rr: [
            "overlay_rr_service_vs_direct",
            "overlay_socket_rr_service_vs_direct",
        ],
        rr_us: ["overlay_rr_service_us", "overlay_socket_rr_service_us"],
        stream: [
            "overlay_stream_service_vs_direct",
            "overlay_socket_stream_service_vs_direct",
        ],
    },
];

/// Round trips.
pub fn rr() -> Result<Vec<Figure>> {
    let measured = measure(PORT_ECHO, Load::round_trips)?;
    let mut figures = vec![];
    for (place, [direct, paths @ ..]) in PLACES.iter().zip(&measured) {
        let rate = |samples: &[Sample]| median(samples.iter().map(Sample::rate).collect());
        let each = |samples: &[Sample]| median(samples.iter().map(Sample::each_us).collect());
        for (path, samples) in paths.iter().enumerate() {
            figures.push(Figure::beside(
                "rr",
                place.rr[path],
                "round trips/s",
                rate(samples),
                rate(direct),
                DIRECT,
            ));
            figures.push(Figure::beside(
                "rr",
                place.rr_us[path],
                "us",
                each(samples),
                each(direct),
                DIRECT,
            ));
        }
    }
    Ok(figures)
}

/// Throughput.
pub fn stream() -> Result<Vec<Figure>> {
    let measured = measure(PORT_SINK, Load::bytes)?;
    let mut figures = vec![];
    for (place, [direct, paths @ ..]) in PLACES.iter().zip(&measured) {
        let gbits =
            |samples: &[Sample]| median(samples.iter().map(|sample| sample.rate() * 8.0 / 1e9).collect());
        for (metric, samples) in place.stream.iter().zip(paths) {
            figures.push(Figure::beside(
                "stream",
                metric,
                "Gbit/s",
                gbits(samples),
                gbits(direct),
                DIRECT,
            ));
        }
    }
    Ok(figures)
}

/// Samples of the direct way, the packet path and the socket path, at both places.
fn measure(
    port: u16,
    how: fn(&mut Load, SocketAddrV4, Duration) -> Result<Sample>,
) -> Result<[[Vec<Sample>; 3]; 2]> {
    let lab = Lab::new(&[])?;
    let cgroup = lab.cgroup()?;
    let nodes = IsthmusNode::pair(&lab, &cgroup)?;
    let tables = nodes[0].datapath.tables();
    let client = &nodes[0].node.client;
    let mut writer = Writer::new()?;
    for (number, node) in (0..).zip(&nodes) {
        let services = Services {
            backends: 1,
            servers: node.node.server.addresses.clone(),
            target_port: port,
            real: [number].into(),
        };
        writer.learn(&services, number + 1)?;
    }
    writer.write(tables)?;
    let _servers = nodes
        .iter()
        .map(|node| Load::server(&node.node.server.namespace))
        .collect::<Result<Vec<_>>>()?;
    let mut plain = Load::client(&client.namespace, None, &client.addresses)?;
    let mut hooked = Load::client(&client.namespace, Some(&cgroup), &client.addresses)?;
    let mut measured: [[Vec<Sample>; 3]; 2] = Default::default();
    for round in 0..ROUNDS {
        for (at, place) in PLACES.iter().enumerate() {
            let direct = SocketAddrV4::new(nodes[at].node.server.addresses[0], port);
            let frontend = Services::frontend(place.service);
            for turn in 0..3 {
                let contender = (turn + round) % 3;
                let (load, to) = match contender {
                    0 => (&mut plain, direct),
                    1 => (&mut plain, frontend),
                    _ => (&mut hooked, frontend),
                };
                let sample =
                    how(load, to, ROUND).with_context(|| format!("contender {contender} to {to}"))?;
                measured[at][contender].push(sample);
            }
        }
    }
    Ok(measured)
}
