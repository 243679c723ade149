//! `update`: how long the agent takes to write 50,000 services into empty maps, and one changed backend among them.
//!
//! In: nothing (needs root). Out: milliseconds from what sources said to the last map entry, through merge, plan, retry bookkeeping
//! and map writer; for one backend that becomes ready or not, also the CPU time, among 100 and among 50,000 services.
//!
//! Beside kube-proxy's rules: `iptables-restore` and `nft -f` of the same services, into a namespace of their own, and of the change
//! as kube-proxy syncs it. nft is asked for 10,000 services at most: for 50,000 it takes a quarter of an hour, even in transactions of 500.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use isthmus_datapath::Tables;
use nix::time::{ClockId, clock_gettime};

use crate::{
    figure::Figure,
    kubeproxy::{Iptables, Nftables, nftables},
    lab::{Lab, load::median},
    services::Services,
    writer::Writer,
};

const BENCH: &str = "update";
const BACKENDS: usize = 5;
const FEW: u32 = 100;
const MEDIUM: u32 = 10_000;
const MANY: u32 = 50_000;
/// The median of so many installations counts. The peers install once: it takes them up to a minute.
const ROUNDS: usize = 3;
const CHANGES: usize = 2_000;
const PEER_CHANGES: usize = 3;

/// Measures.
pub fn run() -> Result<Vec<Figure>> {
    let lab = Lab::new(&["nft"])?;
    let services = Services::absent(BACKENDS);
    let few = installed(&services, FEW)?;
    let medium = installed(&services, MEDIUM)?;
    let many = installed(&services, MANY)?;
    for (count, ours) in [(FEW, &few), (MEDIUM, &medium), (MANY, &many)] {
        eprintln!("update: {count} services: {ours:.3?}");
    }
    let namespace = lab.namespace("ipt")?;
    let iptables = Iptables::new(&namespace)?;
    let iptables_medium = iptables.write(&services, MEDIUM)?;
    let iptables_change = change_of(|services| iptables.change(services, MEDIUM, MEDIUM / 2))?;
    // Each into tables without services.
    let namespace = lab.namespace("ipm")?;
    let many_iptables = Iptables::new(&namespace)?;
    let iptables_many = many_iptables.write(&services, MANY)?;
    let iptables_change_many = change_of(|services| many_iptables.change(services, MANY, MANY / 2))?;
    eprintln!(
        "update: iptables: {iptables_medium:.1?}, {iptables_many:.1?}, changes {iptables_change:.1?}, {iptables_change_many:.1?}"
    );
    let namespace = lab.namespace("nft")?;
    let mut nftables = Nftables::new(&namespace)?;
    let nftables_medium = nftables.write(&services, MEDIUM, true)?;
    let nftables_change = change_of(|services| nftables.change(services, MEDIUM / 2))?;
    eprintln!("update: nft: {nftables_medium:.1?}, change {nftables_change:.1?}");

    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let beside = |metric, unit, ours, peer, name| Figure::beside(BENCH, metric, unit, ours, peer, name);
    Ok(vec![
        beside(
            "install_50000_ms",
            "ms",
            ms(many.install),
            ms(iptables_many),
            iptables.name,
        ),
        beside(
            "install_10000_ms",
            "ms",
            ms(medium.install),
            ms(nftables_medium),
            nftables::NAME,
        ),
        beside(
            "install_10000_vs_iptables_ms",
            "ms",
            ms(medium.install),
            ms(iptables_medium),
            iptables.name,
        ),
        beside(
            "one_backend_change_ms",
            "ms",
            many.change_ms,
            ms(iptables_change_many),
            iptables.name,
        ),
        beside(
            "one_backend_change_10000_ms",
            "ms",
            medium.change_ms,
            ms(nftables_change),
            nftables::NAME,
        ),
        beside(
            "one_backend_change_10000_vs_iptables_ms",
            "ms",
            medium.change_ms,
            ms(iptables_change),
            iptables.name,
        ),
        beside(
            "one_backend_change_50000_vs_100_ms",
            "ms",
            many.change_ms,
            few.change_ms,
            "the same among 100 services",
        ),
        Figure::alone(BENCH, "one_backend_change_p99_ms", "ms", many.change_p99_ms),
        beside(
            "one_backend_change_cpu_us",
            "us",
            many.change_cpu_us,
            few.change_cpu_us,
            "the same among 100 services",
        ),
    ])
}

/// What was measured of ours.
#[derive(Debug)]
struct Ours {
    install: Duration,
    change_ms: f64,
    change_p99_ms: f64,
    change_cpu_us: f64,
}

fn installed(services: &Services, count: u32) -> Result<Ours> {
    let mut times = vec![];
    let mut last = None;
    for _ in 0..ROUNDS {
        drop(last.take());
        let tables = Tables::create().context("creating the maps (this benchmark needs root)")?;
        let inputs = (0..count)
            .map(|number| Ok((Services::frame(number)?, services.slice(number)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut writer = Writer::new()?;
        let begun = Instant::now();
        for (frame, slice) in &inputs {
            writer.merge().upsert_frame(frame);
            writer.merge().upsert_slice(slice);
        }
        let operations = writer.write(&tables)?;
        times.push(begun.elapsed().as_secs_f64());
        let expected = count as usize * (2 * services.backends + 1);
        ensure!(operations == expected, "{operations} operations, not {expected}");
        last = Some((writer, tables));
    }
    let (mut writer, tables) = last.context("no round")?;
    let install = Duration::from_secs_f64(median(times));
    changes(services, &mut writer, &tables, count, install)
}

/// One backend of one service goes and comes; each time of another service.
fn changes(
    services: &Services,
    writer: &mut Writer,
    tables: &Tables,
    count: u32,
    install: Duration,
) -> Result<Ours> {
    let mut times = Vec::with_capacity(CHANGES);
    let mut cpu = Duration::ZERO;
    for change in 0..CHANGES {
        // Every second change takes the one before back. A prime number away: all over the table.
        let number = (change as u32 / 2).wrapping_mul(7_919) % count;
        let mut slice = services.slice(number)?;
        slice.endpoints[2].ready = change % 2 == 1;
        slice.endpoints[2].serving = slice.endpoints[2].ready;
        let (begun, cpu_begun) = (Instant::now(), thread_cpu()?);
        writer.merge().upsert_slice(&slice);
        let operations = writer.write(tables)?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        cpu += thread_cpu()?.saturating_sub(cpu_begun);
        ensure!(
            (1..=5).contains(&operations),
            "one change took {operations} operations"
        );
    }
    times.sort_by(f64::total_cmp);
    Ok(Ours {
        install,
        change_p99_ms: times[times.len() * 99 / 100],
        change_ms: median(times),
        change_cpu_us: cpu.as_secs_f64() * 1e6 / CHANGES as f64,
    })
}

fn thread_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// The median of a few changes between five backends and four of one service.
fn change_of(mut write: impl FnMut(&Services) -> Result<Duration>) -> Result<Duration> {
    let mut times = vec![];
    for change in 0..PEER_CHANGES {
        let services = Services::absent(BACKENDS - usize::from(change % 2 == 0));
        times.push(write(&services)?.as_secs_f64());
    }
    Ok(Duration::from_secs_f64(median(times)))
}
