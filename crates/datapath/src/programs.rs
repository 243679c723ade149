//! The BPF programs: loaded once for each object, then found again by their pins.
//!
//! In: the embedded object, the pinned maps. Out: a descriptor for each program.
//!
//! Invariants: a folder `programs/<hash>` with all programs is complete (it gets its name last); a restarted agent
//! of the same build loads nothing; links hold their programs, so folders of other objects can go once all links are
//! updated.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{EbpfError, EbpfLoader, include_bytes_aligned, programs::ProgramError};

use crate::{pins, sys};

/// The programs' object, built by `build.rs`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/isthmus.o"));

/// A socket hook: its program, and what the kernel calls the place.
#[derive(Clone, Copy, Debug)]
pub struct SocketHook {
    /// Program and link.
    pub name: &'static str,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
}

/// All socket hooks.
pub const SOCKET_HOOKS: [SocketHook; 8] = [
    SocketHook {
        name: "isthmus_connect4",
        attach_type: 10,
    },
    SocketHook {
        name: "isthmus_connect6",
        attach_type: 11,
    },
    SocketHook {
        name: "isthmus_sendmsg4",
        attach_type: 14,
    },
    SocketHook {
        name: "isthmus_sendmsg6",
        attach_type: 15,
    },
    SocketHook {
        name: "isthmus_recvmsg4",
        attach_type: 19,
    },
    SocketHook {
        name: "isthmus_recvmsg6",
        attach_type: 20,
    },
    SocketHook {
        name: "isthmus_getpeername4",
        attach_type: 29,
    },
    SocketHook {
        name: "isthmus_getpeername6",
        attach_type: 30,
    },
];

/// A packet hook on a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PacketHook {
    /// Ingress of the host's side of a pod's veth pair.
    FromContainer,
    /// Ingress of the VXLAN device.
    FromOverlay,
    /// Egress of the VXLAN device.
    ToOverlay,
    /// Egress of the host's side of a pod's veth pair.
    ToContainer,
    /// Ingress of a device to the outside.
    FromHostDevice,
    /// Egress of a device to the outside.
    ToHostDevice,
}

impl PacketHook {
    /// All packet hooks.
    pub const ALL: [Self; 6] = [
        Self::FromContainer,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::ToContainer,
        Self::FromHostDevice,
        Self::ToHostDevice,
    ];
    /// Those of a pod's device. In this order they are attached: first what translates answers back.
    pub const OF_ENDPOINT: [Self; 2] = [Self::ToContainer, Self::FromContainer];

    /// Those of a device to the outside. In this order they are attached: first what translates answers back.
    pub const OF_OUTSIDE: [Self; 2] = [Self::FromHostDevice, Self::ToHostDevice];

    /// Program, and first part of the link's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromContainer => "isthmus_from_container",
            Self::FromOverlay => "isthmus_from_overlay",
            Self::ToOverlay => "isthmus_to_overlay",
            Self::ToContainer => "isthmus_to_container",
            Self::FromHostDevice => "isthmus_from_host_device",
            Self::ToHostDevice => "isthmus_to_host_device",
        }
    }

    /// Whether it sees packets that leave through the device.
    pub const fn is_egress(self) -> bool {
        matches!(self, Self::ToOverlay | Self::ToContainer | Self::ToHostDevice)
    }
}

/// The programs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The object does not load.
    #[error("the kernel does not take the BPF object")]
    Object(#[source] Box<EbpfError>),
    /// The verifier refuses a program.
    #[error("the kernel does not take BPF program {program}")]
    Program {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object lacks a program: a broken build.
    #[error("the BPF object has no program {program}: build again")]
    Missing {
        /// Which.
        program: &'static str,
    },
    /// A pin cannot be made, opened or moved.
    #[error("{call} {path}")]
    Pin {
        /// What was tried.
        call: &'static str,
        /// With what.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The loaded programs.
#[derive(Debug)]
pub struct Programs {
    programs: Vec<(&'static str, OwnedFd)>,
    dir: PathBuf,
    /// Whether they were loaded now, not found.
    pub loaded: bool,
}

impl Programs {
    /// Opens the programs of this build's object below `bpf_root`, or loads and pins them.
    pub fn open_or_load(bpf_root: &Path) -> Result<Self, LoadError> {
        let dir = pins::programs_dir(bpf_root).join(object_hash());
        if let Some(programs) = open(&dir)? {
            return Ok(Self {
                programs,
                dir,
                loaded: false,
            });
        }
        let programs = load(&pins::maps_dir(bpf_root))?;
        pin(&programs, &dir)?;
        Ok(Self {
            programs,
            dir,
            loaded: true,
        })
    }

    /// A program by name.
    ///
    /// # Panics
    /// If there is none of that name; names come from [`SOCKET_HOOKS`] and [`PacketHook::name`], all of which are loaded.
    pub fn fd(&self, name: &str) -> BorrowedFd<'_> {
        let found = self.programs.iter().find(|(program, _)| *program == name);
        let (_, fd) = found.unwrap_or_else(|| panic!("no program is named {name}"));
        fd.as_fd()
    }

    /// The pin of a program.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Removes the folders of other objects. Call when every link runs this object's programs.
    pub fn remove_others(&self, bpf_root: &Path) -> io::Result<()> {
        let all = pins::programs_dir(bpf_root);
        for name in pins::names(&all)? {
            let dir = all.join(name);
            if dir != self.dir {
                remove_folder(&dir)?;
            }
        }
        Ok(())
    }
}

/// Names of all programs.
fn names() -> impl Iterator<Item = &'static str> {
    SOCKET_HOOKS
        .iter()
        .map(|hook| hook.name)
        .chain(PacketHook::ALL.into_iter().map(PacketHook::name))
}

/// FNV-1a of the object: tells builds apart, needs no more.
fn object_hash() -> String {
    let hash = OBJECT.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn open(dir: &Path) -> Result<Option<Vec<(&'static str, OwnedFd)>>, LoadError> {
    let mut programs = Vec::new();
    for name in names() {
        let path = dir.join(name);
        match sys::obj_get(&path, false).map_err(pin_error("BPF_OBJ_GET", &path))? {
            Some(fd) => programs.push((name, fd)),
            None => return Ok(None),
        }
    }
    Ok(Some(programs))
}

fn load(maps: &Path) -> Result<Vec<(&'static str, OwnedFd)>, LoadError> {
    let mut object = EbpfLoader::new()
        .default_map_pin_directory(maps)
        .load(OBJECT)
        .map_err(|error| LoadError::Object(Box::new(error)))?;
    let mut programs = Vec::new();
    for name in names() {
        let program = object
            .program_mut(name)
            .ok_or(LoadError::Missing { program: name })?;
        let refused = |source| LoadError::Program {
            program: name,
            source: Box::new(source),
        };
        match program {
            aya::programs::Program::CgroupSockAddr(hook) => hook.load(),
            aya::programs::Program::SchedClassifier(hook) => hook.load(),
            _ => return Err(LoadError::Missing { program: name }),
        }
        .map_err(refused)?;
        let fd = program.fd().map_err(refused)?;
        let fd = fd.as_fd().try_clone_to_owned().map_err(|source| LoadError::Pin {
            call: "duplicating the descriptor of",
            path: name.to_owned(),
            source,
        })?;
        programs.push((name, fd));
    }
    Ok(programs)
}

/// Pins into a folder beside `dir` and renames it: whoever finds `dir` finds all programs.
fn pin(programs: &[(&'static str, OwnedFd)], dir: &Path) -> Result<(), LoadError> {
    // No dot: bpffs reserves those.
    let mut unfinished = dir.as_os_str().to_owned();
    unfinished.push("_unfinished");
    let unfinished = PathBuf::from(unfinished);
    for stale in [&unfinished, &dir.to_owned()] {
        remove_folder(stale).map_err(pin_error("removing", stale))?;
    }
    fs::create_dir(&unfinished).map_err(pin_error("creating", &unfinished))?;
    for (name, fd) in programs {
        let path = unfinished.join(name);
        sys::obj_pin(fd.as_fd(), &path).map_err(pin_error("BPF_OBJ_PIN", &path))?;
    }
    fs::rename(&unfinished, dir).map_err(pin_error("renaming to", dir))
}

fn pin_error(call: &'static str, path: &Path) -> impl Fn(io::Error) -> LoadError {
    let path = path.display().to_string();
    move |source| LoadError::Pin {
        call,
        path: path.clone(),
        source,
    }
}

/// Removes a folder of pins; it may be absent.
pub(crate) fn remove_folder(dir: &Path) -> io::Result<()> {
    for name in pins::names(dir)? {
        pins::remove(&dir.join(name))?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
