//! Reads the agent's pinned maps; writes nothing.

use std::path::Path;

use anyhow::{Context, anyhow};
use isthmus_datapath::{MapError, Tables};

use crate::{
    args::{BpfArgs, BpfCommand, EndpointCommand, IpcacheCommand, LbCommand, MetricsCommand},
    view::{endpoint, ipcache, lb, metrics},
};

/// How often two maps are read again when they do not fit together.
const REREADS_MAX: usize = 3;

/// The text of a `bpf` command.
pub fn show(command: &BpfCommand) -> anyhow::Result<String> {
    Ok(match command {
        BpfCommand::Lb(LbCommand::List(BpfArgs { bpf_root, output })) => {
            let tables = open(bpf_root)?;
            let mut frontends = frontends(&tables)?;
            // A backend that came or went between the two reads is no fault: read again before calling it missing.
            for _ in 0..REREADS_MAX {
                if lb::is_whole(&frontends) {
                    break;
                }
                frontends = self::frontends(&tables)?;
            }
            lb::render(&frontends, *output)
        }
        BpfCommand::Ipcache(IpcacheCommand::List(BpfArgs { bpf_root, output })) => {
            ipcache::render(&ipcache::entries(open(bpf_root)?.ipcache.dump()?), *output)
        }
        BpfCommand::Endpoint(EndpointCommand::List(BpfArgs { bpf_root, output })) => {
            endpoint::render(&endpoint::entries(open(bpf_root)?.endpoints.dump()?), *output)
        }
        BpfCommand::Metrics(MetricsCommand::List(BpfArgs { bpf_root, output })) => {
            metrics::render(&open(bpf_root)?.counters()?, *output)
        }
    })
}

fn frontends(tables: &Tables) -> Result<Vec<lb::Frontend>, MapError> {
    let backends = tables.backends.dump()?;
    Ok(lb::resolve(tables.services.dump()?, backends))
}

fn open(bpf_root: &Path) -> anyhow::Result<Tables> {
    let opened = Tables::open_readonly(bpf_root);
    if opened.is_err() && !nix::unistd::geteuid().is_root() {
        return opened.context("reading BPF maps needs root: run this as root (sudo)");
    }
    opened.map_err(|error| {
        anyhow!(
            "cannot read the maps below {}: {:#}\nStart isthmus-agent on this node, or name the BPF file system of the \
             agent that you mean (its own --bpf-root) with --bpf-root PATH or ISTHMUS_BPF_ROOT",
            bpf_root.display(),
            anyhow::Error::new(error),
        )
    })
}
