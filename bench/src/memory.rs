//! `memory`: what 10,000 services with 100,000 backends take in the kernel and in the agent.
//!
//! In: nothing (needs root). Out: bytes of the kernel's maps (the service and backend maps; all maps, with those that hold their whole
//! room from the start: flows, sockets, affinity, fragments) as the kernel tells them, and bytes of the process for the merged state.
//!
//! Peer: kernel memory charged to the processes that wrote kube-proxy's rules for the same services, from a memory cgroup. Where the
//! machine has none that counts kernel memory, there is no peer.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use isthmus_datapath::Tables;

use crate::{
    figure::Figure,
    kubeproxy::{Iptables, iptables, nftables},
    lab::{self, Lab, MemoryCgroup},
    process,
    services::Services,
    writer::Writer,
};

const BENCH: &str = "memory";
const SERVICES: u32 = 10_000;
const BACKENDS: usize = 10;
const MIB: f64 = (1 << 20) as f64;

/// Measures.
pub fn run() -> Result<Vec<Figure>> {
    let lab = Lab::new(&["nft"])?;
    let services = Services::absent(BACKENDS);
    let backends = f64::from(SERVICES) * BACKENDS as f64;
    let tables = Tables::create().context("creating the maps (this benchmark needs root)")?;
    let empty = maps(&tables)?;
    let before = process::resident_bytes()?;
    let mut writer = Writer::new()?;
    writer.learn(&services, SERVICES)?;
    writer.write(&tables)?;
    let resident = process::resident_bytes()?.saturating_sub(before) as f64;
    let full = maps(&tables)?;
    let total = |maps: &[(&'static str, u64)]| maps.iter().map(|(_, bytes)| *bytes as f64).sum::<f64>();
    let mut list = String::new();
    for (name, bytes) in &full {
        // Writing to a string does not fail.
        let _ = write!(list, " {name} {:.1}", *bytes as f64 / MIB);
    }
    eprintln!("memory: MiB of each map:{list}");
    let filled = total(&full) - total(&empty);
    let rules = rules(&lab, &services)?;
    let figure = |metric, unit, ours, peer: Option<f64>, name| match peer {
        Some(peer) => Figure::beside(BENCH, metric, unit, ours, peer, name),
        None => Figure::alone(BENCH, metric, unit, ours),
    };
    let per_backend = |bytes: f64| bytes / backends;
    Ok(vec![
        figure(
            "services_kernel_mib",
            "MiB",
            filled / MIB,
            rules.nftables.map(|bytes| bytes / MIB),
            nftables::NAME,
        ),
        figure(
            "services_kernel_vs_iptables_mib",
            "MiB",
            filled / MIB,
            rules.iptables.map(|bytes| bytes / MIB),
            rules.iptables_name,
        ),
        figure(
            "kernel_bytes_per_backend",
            "bytes",
            per_backend(filled),
            rules.nftables.map(per_backend),
            nftables::NAME,
        ),
        Figure::alone(BENCH, "all_maps_kernel_mib", "MiB", total(&full) / MIB),
        Figure::alone(BENCH, "all_maps_empty_kernel_mib", "MiB", total(&empty) / MIB),
        Figure::alone(BENCH, "agent_state_mib", "MiB", resident / MIB),
        Figure::alone(BENCH, "agent_bytes_per_backend", "bytes", per_backend(resident)),
    ])
}

/// Bytes of each map.
fn maps(tables: &Tables) -> Result<Vec<(&'static str, u64)>> {
    let maps = [
        (tables.services.name(), tables.services.memory_bytes()),
        (tables.backends.name(), tables.backends.memory_bytes()),
        (tables.reverse_sk.name(), tables.reverse_sk.memory_bytes()),
        (tables.ipcache.name(), tables.ipcache.memory_bytes()),
        (tables.endpoints.name(), tables.endpoints.memory_bytes()),
        (tables.ct.name(), tables.ct.memory_bytes()),
        (tables.fragments.name(), tables.fragments.memory_bytes()),
        (tables.maglev.name(), tables.maglev.memory_bytes()),
        (tables.affinity.name(), tables.affinity.memory_bytes()),
        (tables.source_ranges.name(), tables.source_ranges.memory_bytes()),
        (tables.metrics.name(), tables.metrics.memory_bytes()),
        (tables.config.name(), tables.config.memory_bytes()),
        (tables.devices.name(), tables.devices.memory_bytes()),
        (tables.no_masquerade.name(), tables.no_masquerade.memory_bytes()),
    ];
    maps.into_iter()
        .map(|(name, bytes)| Ok((name, bytes.with_context(|| name)?)))
        .collect()
}

struct Rules {
    nftables: Option<f64>,
    iptables: Option<f64>,
    iptables_name: &'static str,
}

fn rules(lab: &Lab, services: &Services) -> Result<Rules> {
    let namespaces = [lab.namespace("nft")?, lab.namespace("ipt")?];
    let iptables = Iptables::new(&namespaces[1])?;
    let mut rules = Rules {
        nftables: None,
        iptables: None,
        iptables_name: iptables.name,
    };
    let (Some(for_nft), Some(for_iptables)) = (lab.memory_cgroup("nft")?, lab.memory_cgroup("ipt")?) else {
        eprintln!("memory: no memory cgroup counts kernel memory here, so there are no figures of rules");
        return Ok(rules);
    };
    let inputs = nftables::inputs(services, SERVICES);
    rules.nftables = Some(charged(&for_nft, &namespaces[0], "nft -f -", &inputs)?);
    let inputs = [iptables::rules(services, SERVICES, 0..SERVICES)];
    let command = format!("{} --noflush -w 60", iptables.command());
    rules.iptables = Some(charged(&for_iptables, &namespaces[1], &command, &inputs)?);
    Ok(rules)
}

/// Bytes that the kernel keeps after `command` was fed all inputs.
fn charged(cgroup: &MemoryCgroup, namespace: &str, command: &str, inputs: &[String]) -> Result<f64> {
    let before = cgroup.kernel_bytes()?;
    let script = format!(
        "echo $$ > {} && exec ip netns exec {namespace} {command}",
        cgroup.procs().display()
    );
    for input in inputs {
        lab::feed(&["sh", "-c", &script], input)?;
    }
    Ok(cgroup.kernel_bytes()?.saturating_sub(before) as f64)
}
