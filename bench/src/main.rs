//! Benchmarks beside a peer, in one run: `cargo xtask bench NAME [--json]`.

mod cps;
mod embedded;
mod failover;
mod fanout;
mod figure;
mod hostile;
mod kubeproxy;
mod lab;
mod latency;
mod lists;
mod mapfill;
mod memory;
mod merge;
mod mirror;
mod process;
mod reader;
mod servers;
mod services;
mod update;
mod writer;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use figure::Figure;

#[derive(Parser)]
#[command(about = "Measures Isthmus beside a peer; one line a figure")]
struct Args {
    /// Which benchmark.
    name: Name,
    /// One JSON line a figure and nothing else on standard output.
    #[arg(long)]
    json: bool,
    /// Changes that `failover` measures.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Watchers of `fanout`.
    #[arg(long, default_value_t = 500)]
    watchers: usize,
    /// Remote clusters of `mirror`.
    #[arg(long, default_value_t = 250)]
    clusters: u32,
    /// Keys of `lists`.
    #[arg(long, default_value_t = 500_000)]
    keys: usize,
    /// Services of `cps` at most.
    #[arg(long, default_value_t = 50_000)]
    services: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// Readiness change in one cluster's Kubernetes API to the BPF map on a node of another (needs root).
    Failover,
    /// Merging 200 clusters: time and memory.
    Merge,
    /// 1,000,000 ipcache entries into the kernel (needs root).
    Mapfill,
    /// Watch events from the API server to 500 TLS watchers: CPU, memory, latency (needs etcd).
    Fanout,
    /// Latency of watch events while hostile clients do their worst, beside the same server without them (needs etcd).
    Hostile,
    /// Mirroring 250 clusters: time until they are there, memory, latency, and what a restart sends again.
    Mirror,
    /// Puts to the embedded store: rate, latency, disk and memory (needs etcd).
    Embedded,
    /// 50 clients list 500,000 keys in pages: throughput and the memory of what is listed (needs etcd).
    Lists,
    /// New TCP connections a second among 1 to 50,000 services, beside kube-proxy's rules (needs root, nft, iptables).
    Cps,
    /// Round trips through a service, on a node and over VXLAN, beside the pod's own address (needs root).
    Rr,
    /// Throughput of the same (needs root).
    Stream,
    /// Writing 50,000 services, and one backend of them, beside kube-proxy's rules (needs root, nft, iptables).
    Update,
    /// Kernel and agent memory of 10,000 services, beside kube-proxy's rules (needs root, nft, iptables).
    Memory,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == lab::load::ARGUMENT
    {
        return end(lab::load::main(rest));
    }
    let args = Args::parse();
    let figures = match args.name {
        Name::Failover => failover::run(args.changes),
        Name::Merge => merge::run(),
        Name::Mapfill => mapfill::run(),
        Name::Fanout => fanout::run(args.watchers),
        Name::Hostile => hostile::run(),
        Name::Mirror => mirror::run(args.clusters),
        Name::Lists => lists::run(args.keys),
        Name::Embedded => embedded::run(),
        Name::Cps => cps::run(args.services),
        Name::Rr => latency::rr(),
        Name::Stream => latency::stream(),
        Name::Update => update::run(),
        Name::Memory => memory::run(),
    };
    end(figures.map(|figures| figures.iter().for_each(|figure| print(figure, args.json))))
}

fn end(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(figure: &Figure, json: bool) {
    if json {
        // A figure has no map and no value that JSON cannot hold.
        println!("{}", serde_json::to_string(figure).unwrap_or_default());
        return;
    }
    let peer = match (figure.peer, figure.peer_name, figure.ratio) {
        (Some(peer), Some(name), Some(ratio)) => format!("; {name}: {peer} {}; ratio {ratio}", figure.unit),
        _ => String::new(),
    };
    println!(
        "{} {}: {} {}{peer}",
        figure.bench, figure.metric, figure.ours, figure.unit
    );
}
