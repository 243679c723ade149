//! Attaching programs so that they outlive the agent, and replacing them without a gap.
//!
//! In: programs, a cgroup, device indexes. Out: pinned links.
//!
//! Invariants: a link that runs the wanted program on the wanted target is left alone; one that runs an older program
//! there is updated in place (BPF_LINK_UPDATE: each packet and call sees the old or the new program); only a link to
//! another or vanished target is replaced, the new one attached before the old one goes.
//!
//! Kernels before 6.6 have no links to devices; there a `clsact` filter of fixed priority and handle stands in,
//! replaced by netlink in one step, and the pin of its program marks it.

use std::{
    fs::File,
    io, mem,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};

use crate::{
    pins,
    programs::{PacketHook, Programs, SOCKET_HOOKS},
    sys::{self, LinkTarget},
};

const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

/// Priority and handle of our `clsact` filters.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x15);
/// What the pin of a filter's program is called instead of the link's.
const FILTER_MARK: &str = "filter_";

/// Attaching or detaching failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A step of it.
    #[error("attaching {hook} to {target}: {call}")]
    Call {
        /// Which program.
        hook: &'static str,
        /// To what.
        target: String,
        /// Which step.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A `clsact` filter.
    #[error("attaching {hook} to device {ifindex} with a clsact filter")]
    Filter {
        /// Which program.
        hook: &'static str,
        /// To what.
        ifindex: u32,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A link's pin.
    #[error("removing the link {path}")]
    Detach {
        /// Its pin.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What attaching came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Attached {
    /// Nothing was there.
    New,
    /// Another program was.
    Updated,
    /// This program was.
    Unchanged,
}

/// Attaches all socket hooks to a cgroup.
pub fn attach_socket_hooks(
    programs: &Programs,
    bpf_root: &Path,
    cgroup_root: &Path,
) -> Result<(), AttachError> {
    let failed = |call| {
        move |source| AttachError::Call {
            hook: "the socket hooks",
            target: cgroup_root.display().to_string(),
            call,
            source,
        }
    };
    let cgroup = File::open(cgroup_root).map_err(failed("opening the cgroup"))?;
    let id = sys::cgroup_id(&cgroup).map_err(failed("reading the cgroup's ID"))?;
    for hook in SOCKET_HOOKS {
        let wanted = Wanted {
            hook: hook.name,
            pin: pins::links_dir(bpf_root).join(hook.name),
            program: programs.fd(hook.name),
            target: LinkTarget::Cgroup(id),
        };
        wanted.attach(|program| sys::link_create_cgroup(program, cgroup.as_fd(), hook.attach_type))?;
    }
    Ok(())
}

/// Detaches all socket hooks; they may be absent.
pub fn detach_socket_hooks(bpf_root: &Path) -> Result<(), AttachError> {
    for hook in SOCKET_HOOKS {
        detach_link(&pins::links_dir(bpf_root).join(hook.name))?;
    }
    Ok(())
}

/// Attaches a packet hook to a device of the calling thread's network namespace. `tcx` says whether the kernel has
/// links to devices.
pub fn attach_packet_hook(
    programs: &Programs,
    bpf_root: &Path,
    hook: PacketHook,
    ifindex: u32,
    tcx: bool,
) -> Result<Attached, AttachError> {
    if !tcx {
        return attach_filter(programs, bpf_root, hook, ifindex);
    }
    let attach_type = if hook.is_egress() { TCX_EGRESS } else { TCX_INGRESS };
    let wanted = Wanted {
        hook: hook.name(),
        pin: pins::links_dir(bpf_root).join(link_name(hook, ifindex)),
        program: programs.fd(hook.name()),
        target: LinkTarget::Device(ifindex),
    };
    wanted.attach(|program| sys::link_create_tcx(program, ifindex, attach_type))
}

/// Detaches a packet hook from a device, which may be gone already.
pub fn detach_packet_hook(bpf_root: &Path, hook: PacketHook, ifindex: u32) -> Result<(), AttachError> {
    let dir = pins::links_dir(bpf_root);
    let name = link_name(hook, ifindex);
    let filter = dir.join(format!("{FILTER_MARK}{name}"));
    if filter.exists() {
        remove_filter(hook, ifindex);
    }
    detach_link(&dir.join(name))?;
    pins::remove(&filter).map_err(|source| AttachError::Detach {
        path: filter.display().to_string(),
        source,
    })
}

/// Detaches a pinned link and removes its pin; it may be absent.
pub(crate) fn detach_link(pin: &Path) -> Result<(), AttachError> {
    sys::obj_get(pin, false)
        .and_then(|link| link.map_or(Ok(()), |link| sys::link_detach(link.as_fd())))
        .and_then(|()| pins::remove(pin))
        .map_err(|source| AttachError::Detach {
            path: pin.display().to_string(),
            source,
        })
}

/// Indexes of the devices that a packet hook is attached to, by the pins. Some may be gone.
pub fn attached_devices(bpf_root: &Path, hook: PacketHook) -> io::Result<Vec<u32>> {
    let mut devices: Vec<u32> = pins::names(&pins::links_dir(bpf_root))?
        .iter()
        .filter_map(|name| {
            let name = name.strip_prefix(FILTER_MARK).unwrap_or(name);
            name.strip_prefix(hook.name())?.strip_prefix('_')?.parse().ok()
        })
        .collect();
    devices.sort_unstable();
    devices.dedup();
    Ok(devices)
}

fn link_name(hook: PacketHook, ifindex: u32) -> String {
    format!("{}_{ifindex}", hook.name())
}

/// A link as it should be.
struct Wanted<'a> {
    hook: &'static str,
    pin: PathBuf,
    program: BorrowedFd<'a>,
    target: LinkTarget,
}

impl Wanted<'_> {
    fn attach(
        &self,
        create: impl FnOnce(BorrowedFd<'_>) -> io::Result<std::os::fd::OwnedFd>,
    ) -> Result<Attached, AttachError> {
        let existing = sys::obj_get(&self.pin, false).map_err(self.failed("opening the pinned link"))?;
        if let Some(link) = &existing {
            let (program, target) = sys::link_info(link.as_fd()).map_err(self.failed("reading the link"))?;
            if target == self.target {
                if program == sys::prog_id(self.program).map_err(self.failed("reading the program"))? {
                    return Ok(Attached::Unchanged);
                }
                sys::link_update(link.as_fd(), self.program).map_err(self.failed("BPF_LINK_UPDATE"))?;
                return Ok(Attached::Updated);
            }
        }
        let link = create(self.program).map_err(self.failed("BPF_LINK_CREATE"))?;
        detach_link(&self.pin)?;
        sys::obj_pin(link.as_fd(), &self.pin).map_err(self.failed("pinning the link"))?;
        Ok(Attached::New)
    }

    fn failed(&self, call: &'static str) -> impl Fn(io::Error) -> AttachError {
        let (hook, target) = (self.hook, format!("{:?}", self.target));
        move |source| AttachError::Call {
            hook,
            target: target.clone(),
            call,
            source,
        }
    }
}

fn attach_filter(
    programs: &Programs,
    bpf_root: &Path,
    hook: PacketHook,
    ifindex: u32,
) -> Result<Attached, AttachError> {
    let failed = |source: ProgramError| AttachError::Filter {
        hook: hook.name(),
        ifindex,
        source: Box::new(source),
    };
    let name = device_name(ifindex).map_err(|error| failed(error.into()))?;
    match aya::programs::tc::qdisc_add_clsact(&name) {
        Err(error) if !is_exists(&error) => return Err(failed(error.into())),
        _ => {}
    }
    let mut program = SchedClassifier::from_pin(programs.pin(hook.name())).map_err(failed)?;
    let old = SchedClassifierLink::attached(&name, attach_type(hook), FILTER_PRIORITY, FILTER_HANDLE, None)
        .map_err(|error| failed(error.into()))?;
    // Replacing fails where there is nothing to replace.
    let (id, attached) = match program.attach_to_link(old) {
        Ok(id) => (id, Attached::Updated),
        Err(_) => {
            let options = NlOptions {
                priority: FILTER_PRIORITY,
                handle: FILTER_HANDLE,
                classid: None,
            };
            let id = program.attach_with_options(&name, attach_type(hook), TcAttachOptions::Netlink(options));
            (id.map_err(failed)?, Attached::New)
        }
    };
    // Dropping the link would detach; the filter lives on its own.
    mem::forget(program.take_link(id).map_err(failed)?);
    let mark = pins::links_dir(bpf_root).join(format!("{FILTER_MARK}{}", link_name(hook, ifindex)));
    let call = |call| {
        move |source| AttachError::Call {
            hook: hook.name(),
            target: format!("device {ifindex}"),
            call,
            source,
        }
    };
    pins::remove(&mark).map_err(call("removing the old filter's mark"))?;
    sys::obj_pin(programs.fd(hook.name()), &mark).map_err(call("pinning the filter's mark"))?;
    Ok(attached)
}

fn remove_filter(hook: PacketHook, ifindex: u32) {
    let Ok(name) = device_name(ifindex) else { return };
    if let Ok(link) =
        SchedClassifierLink::attached(&name, attach_type(hook), FILTER_PRIORITY, FILTER_HANDLE, None)
    {
        // Dropping detaches.
        drop(link);
    }
}

fn attach_type(hook: PacketHook) -> TcAttachType {
    if hook.is_egress() {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    }
}

fn device_name(ifindex: u32) -> Result<String, aya::programs::tc::TcError> {
    nix::net::if_::if_indextoname(ifindex)
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|errno| aya::programs::tc::TcError::IoError(errno.into()))
}

fn is_exists(error: &impl std::error::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(error) = cause {
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
        {
            return true;
        }
        cause = error.source();
    }
    false
}
