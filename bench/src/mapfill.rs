//! A million ipcache entries into the kernel: the agent's path beside a bare BPF_MAP_UPDATE_BATCH.
//!
//! In: nothing (needs root). Out: entries a second. Both sides start with what they need in memory and an empty map of
//! the same kind and size; ours with the planner's operations, which it has to sort into batches, with a result for
//! each; the bare one with keys and values already side by side. They take turns, and the best of each counts: what
//! disturbs a run only ever slows it down.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use isthmus_bpf_abi::{IpcacheKey, IpcacheValue, ipcache_flag, ipv4_mapped, maps};
use isthmus_datapath::{Map, MapOp, Tables, apply};

use crate::figure::Figure;

const ENTRIES: u32 = 1_000_000;
const ROUNDS: usize = 3;

/// Fills maps, several times.
pub fn run() -> Result<Vec<Figure>> {
    let (mut ours_s, mut bare_s) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        bare_s = bare_s.min(fill_bare()?);
        ours_s = ours_s.min(fill_by_operations()?);
    }
    let per_second = |seconds: f64| f64::from(ENTRIES) / seconds;
    Ok(vec![Figure::beside(
        "mapfill",
        "entries_per_s",
        "entries/s",
        per_second(ours_s),
        per_second(bare_s),
        "bare BPF_MAP_UPDATE_BATCH",
    )])
}

/// Seconds that the agent's path takes.
fn fill_by_operations() -> Result<f64> {
    let tables = Tables::create().context("creating the maps (this benchmark needs root)")?;
    let operations: Vec<_> = (0..ENTRIES)
        .map(|number| MapOp::IpcachePut(key(number), value(number)))
        .collect();
    let started = Instant::now();
    let report = apply::apply(&tables, &operations);
    let seconds = started.elapsed().as_secs_f64();
    ensure!(
        report.is_complete(),
        "{} of {ENTRIES} operations failed",
        report.failed.len()
    );
    Ok(seconds)
}

/// Seconds that the kernel alone takes.
fn fill_bare() -> Result<f64> {
    let map = Map::create(&maps::IPCACHE).context("creating the map (this benchmark needs root)")?;
    let (keys, values): (Vec<_>, Vec<_>) = (0..ENTRIES).map(|number| (key(number), value(number))).unzip();
    let started = Instant::now();
    map.put_whole(&keys, &values).context("filling the map")?;
    Ok(started.elapsed().as_secs_f64())
}

/// Addresses as 16 clusters have them: a /12 each, filled from its start.
fn key(number: u32) -> IpcacheKey {
    let (cluster, host) = (number % 16, number / 16);
    let [a, b, c, d] = (0x0a00_0000 | (cluster << 20) | host).to_be_bytes();
    IpcacheKey::ipv4([a, b, c, d], 32)
}

/// An identity for each hundred addresses, a node for each hundred.
fn value(number: u32) -> IpcacheValue {
    let (cluster, host) = (number % 16, number / 16);
    let [_, _, c, d] = (host / 100).to_be_bytes();
    let node = ipv4_mapped([172, 16 + cluster as u8, c, d]);
    IpcacheValue::tunnel(
        ((cluster + 1) << 16) | (host / 100),
        node,
        0,
        ipcache_flag::REMOTE_CLUSTER,
    )
}
