//! The datapath of a node: BPF programs and maps, the overlay's device, routes.
//!
//! In: a [`DatapathConfig`], then desired changes: [`MapOp`]s, endpoints, devices, routes. Out: kernel state, and dumps
//! of it for those who compare or show it. This crate moves bytes and errors; what should be in a map is decided elsewhere.
//!
//! Invariants:
//! - All of a node's BPF state hangs below `<bpf_root>/isthmus` ([`pins`]), and lives on when the process ends.
//! - Opening again takes over what is there: maps keep their entries, links get new programs in one step each.
//! - Device indexes mean the network namespace of the thread that calls.
//! - `unsafe` is in [`sys`](self) alone: the system call itself.

pub mod apply;
pub mod conntrack;
pub mod device;
pub mod links;
pub mod map;
pub mod migrate;
pub mod outside;
pub mod pins;
pub mod preflight;
pub mod programs;
pub mod routes;
pub mod sock_diag;
#[allow(unsafe_code, reason = "the bpf system call")]
mod sys;
pub mod tables;
pub mod teardown;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use crate::{
    apply::{ApplyReport, OpError},
    links::{AttachError, Attached},
    map::{Map, MapError, MapOpenError},
    preflight::PreflightError,
    programs::{LoadError, PacketHook},
    tables::{Counter, Tables},
};
/// The planner's operations, which [`Datapath::apply`] carries out.
pub use isthmus_mesh::MapOp;

/// Where the datapath of one node lives.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// A bpffs, or an empty folder to mount one on.
    pub bpf_root: PathBuf,
    /// Processes below this cgroup reach services; nothing: the first cgroup v2 mount.
    pub cgroup_root: Option<PathBuf>,
    /// Translate at the socket (once for each connection) what processes below that cgroup send to services. Without,
    /// packets of pods are translated one by one, and processes of the node itself do not reach services.
    pub socket_lb: bool,
}

/// The datapath cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine lacks something.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The bpffs.
    #[error(transparent)]
    Pins(#[from] pins::PinError),
    /// A map.
    #[error(transparent)]
    Map(#[from] MapOpenError),
    /// The programs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The socket hooks.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// The datapath of this node.
#[derive(Debug)]
pub struct Datapath {
    bpf_root: PathBuf,
    tables: Tables,
    programs: programs::Programs,
    tcx: bool,
}

impl Datapath {
    /// Checks the machine, makes or takes over maps and programs, and attaches the socket hooks if they are wanted. Links to devices that
    /// are there already get this build's programs too; the caller then names the devices that should have them
    /// ([`Self::attach_overlay`], [`Self::attach_endpoint`], [`Self::retain_endpoints`]).
    pub fn open(config: &DatapathConfig) -> Result<Self, OpenError> {
        let kernel = preflight::check()?;
        let cgroup_root = match config.socket_lb {
            true => Some(preflight::cgroup_root(config.cgroup_root.as_deref())?),
            false => None,
        };
        let _lock = pins::prepare(&config.bpf_root)?;
        let tables = Tables::open_or_create(&config.bpf_root)?;
        let programs = programs::Programs::open_or_load(&config.bpf_root)?;
        let datapath = Self {
            bpf_root: config.bpf_root.clone(),
            tables,
            programs,
            tcx: kernel >= preflight::KERNEL_TCX,
        };
        match cgroup_root {
            Some(cgroup) => links::attach_socket_hooks(&datapath.programs, &datapath.bpf_root, &cgroup)?,
            None => links::detach_socket_hooks(&datapath.bpf_root)?,
        }
        datapath.update_device_links()?;
        let flows = migrate::finish(&pins::maps_dir(&datapath.bpf_root), &datapath.tables.ct);
        if let Err(error) = flows {
            // Their next packets begin them anew, with the same backends; what is left is tried at the next start.
            tracing::warn!(%error, "the newest flows of an older version are not carried over");
        }
        if let Err(error) = datapath.programs.remove_others(&datapath.bpf_root) {
            tracing::warn!(%error, "programs of an older version stay pinned");
        }
        Ok(datapath)
    }

    /// Where everything is pinned.
    pub fn bpf_root(&self) -> &Path {
        &self.bpf_root
    }

    /// The maps.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Whether this call of [`Self::open`] loaded programs, rather than finding this build's own.
    pub fn loaded_programs(&self) -> bool {
        self.programs.loaded
    }

    /// Applies operations in order, in batches; see [`apply`].
    pub fn apply(&self, ops: &[MapOp]) -> ApplyReport {
        apply::apply(&self.tables, ops)
    }

    /// Attaches the overlay's hooks to the VXLAN device; links to a former one go.
    pub fn attach_overlay(&self, vxlan_ifindex: u32) -> Result<(), AttachError> {
        for hook in [PacketHook::FromOverlay, PacketHook::ToOverlay] {
            self.attach(hook, vxlan_ifindex)?;
            self.retain(hook, &[vxlan_ifindex])?;
        }
        Ok(())
    }

    /// Attaches the endpoint's hooks to the host's side of its veth pair. Returns what that came to for packets of the pod.
    pub fn attach_endpoint(&self, ifindex: u32) -> Result<Attached, AttachError> {
        let mut attached = Attached::Unchanged;
        for hook in PacketHook::OF_ENDPOINT {
            attached = self.attach(hook, ifindex)?;
        }
        Ok(attached)
    }

    /// Detaches them; the device may be gone.
    pub fn detach_endpoint(&self, ifindex: u32) -> Result<(), AttachError> {
        for hook in PacketHook::OF_ENDPOINT {
            links::detach_packet_hook(&self.bpf_root, hook, ifindex)?;
        }
        Ok(())
    }

    /// Detaches the hooks of all endpoints but these: what a former agent left behind.
    pub fn retain_endpoints(&self, ifindexes: &[u32]) -> Result<(), AttachError> {
        for hook in PacketHook::OF_ENDPOINT {
            self.retain(hook, ifindexes)?;
        }
        Ok(())
    }

    /// Attaches the hooks of the outside to these devices, and detaches them from all others. A device that fails stops nothing;
    /// returns the failures.
    pub fn attach_outside(&self, ifindexes: &[u32]) -> Vec<AttachError> {
        let mut errors = Vec::new();
        for hook in PacketHook::OF_OUTSIDE {
            let attached = ifindexes.iter().map(|ifindex| self.attach(hook, *ifindex));
            errors.extend(attached.filter_map(Result::err));
            errors.extend(self.retain(hook, ifindexes).err());
        }
        errors
    }

    /// Runs a packet program on `packet` (an Ethernet frame) as if it came through device `ifindex` of the calling
    /// thread's namespace. Returns the verdict (TC_ACT_*: 0 pass, 2 drop, 7 redirect) and the frame after it.
    pub fn simulate(&self, hook: PacketHook, packet: &[u8], ifindex: u32) -> io::Result<(u32, Vec<u8>)> {
        // The start of `struct __sk_buff`: `ifindex` is its eleventh number.
        let mut context = [0_u8; 192];
        context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
        sys::prog_test_run(self.programs.fd(hook.name()), packet, &context)
    }

    fn attach(&self, hook: PacketHook, ifindex: u32) -> Result<Attached, AttachError> {
        links::attach_packet_hook(&self.programs, &self.bpf_root, hook, ifindex, self.tcx)
    }

    fn retain(&self, hook: PacketHook, ifindexes: &[u32]) -> Result<(), AttachError> {
        for ifindex in self.attached(hook)? {
            if !ifindexes.contains(&ifindex) {
                links::detach_packet_hook(&self.bpf_root, hook, ifindex)?;
            }
        }
        Ok(())
    }

    fn attached(&self, hook: PacketHook) -> Result<Vec<u32>, AttachError> {
        links::attached_devices(&self.bpf_root, hook).map_err(|source| AttachError::Call {
            hook: hook.name(),
            target: "its devices".to_owned(),
            call: "listing the pinned links",
            source,
        })
    }

    /// Puts this build's programs on every device that has one of ours. A device that went meanwhile loses its pin.
    fn update_device_links(&self) -> Result<(), AttachError> {
        for hook in PacketHook::ALL {
            for ifindex in self.attached(hook)? {
                if let Err(error) = self.attach(hook, ifindex) {
                    tracing::info!(%error, ifindex, hook = hook.name(), "the hook's device is gone");
                    links::detach_packet_hook(&self.bpf_root, hook, ifindex)?;
                }
            }
        }
        Ok(())
    }
}
