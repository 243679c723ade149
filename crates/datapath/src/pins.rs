//! What lies where on the bpffs, and making the bpffs if need be.
//!
//! ```text
//! <bpf_root>/isthmus/abi                      array map with one number: ABI_VERSION of the maps beside it
//! <bpf_root>/isthmus/maps/<map name>
//! <bpf_root>/isthmus/programs/<object hash>/<program name>
//! <bpf_root>/isthmus/links/<hook>[_<ifindex>]
//! ```
//!
//! Invariant: nothing outside `<bpf_root>/isthmus` is ever touched, beside mounting a bpffs where none is.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use isthmus_bpf_abi::{
    ABI_VERSION,
    maps::{MapKind, MapSpec},
};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{
    map::{Map, MapError, MapOpenError},
    migrate::{self, MigrateError},
};

/// Everything of ours.
pub fn root_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join("isthmus")
}

/// Pinned maps.
pub fn maps_dir(bpf_root: &Path) -> PathBuf {
    root_dir(bpf_root).join("maps")
}

/// Pinned programs, a folder for each object.
pub fn programs_dir(bpf_root: &Path) -> PathBuf {
    root_dir(bpf_root).join("programs")
}

/// Pinned links.
pub fn links_dir(bpf_root: &Path) -> PathBuf {
    root_dir(bpf_root).join("links")
}

/// The bpffs cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// A folder cannot be made.
    #[error("cannot create {path}")]
    Create {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The lock on it.
    #[error("cannot lock {path}")]
    Lock {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No bpffs, and none can be mounted.
    #[error("cannot mount a BPF file system at {path}: mount it beforehand with `mount -t bpf bpf {path}`")]
    Mount {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The version's map.
    #[error("cannot open the pinned ABI version")]
    OpenVersion(#[source] MapOpenError),
    /// The version's map.
    #[error("cannot read or write the pinned ABI version")]
    Version(#[source] MapError),
    /// Maps of an older version cannot be carried over.
    #[error("the maps below {path} have ABI version {found} and cannot be carried over to {ABI_VERSION}")]
    Migrate {
        /// Where.
        path: String,
        /// Version there.
        found: u32,
        /// Why.
        #[source]
        source: Box<MigrateError>,
    },
    /// Maps of another version lie there.
    #[error(
        "the maps below {path} have ABI version {found}, this version needs {ABI_VERSION}: stop the agent, \
         remove that folder and start again (services of this node pause until the maps are filled)"
    )]
    VersionMismatch {
        /// Where.
        path: String,
        /// Version there.
        found: u32,
    },
}

const ABI_MAP: MapSpec = MapSpec {
    name: "isthmus_abi",
    kind: MapKind::Array,
    key_size: 4,
    value_size: 4,
    max_entries: 1,
    flags: 0,
};

/// Serializes agents that open the same datapath (a rolling update). Held until dropped.
#[derive(Debug)]
#[must_use]
pub struct Lock {
    _folder: Flock<File>,
}

fn lock(folder: &Path) -> Result<Lock, PinError> {
    let failed = |source| PinError::Lock {
        path: folder.display().to_string(),
        source,
    };
    let file = File::open(folder).map_err(failed)?;
    let locked = Flock::lock(file, FlockArg::LockExclusive);
    let _folder = locked.map_err(|(_, errno)| failed(errno.into()))?;
    Ok(Lock { _folder })
}

/// Makes the folders, on a bpffs, and compares the ABI version; maps of older versions are carried over ([`migrate`]). Nobody else
/// does so at the same time, or goes on from there, while the lock is held.
pub fn prepare(bpf_root: &Path) -> Result<Lock, PinError> {
    create_dir(bpf_root)?;
    if !is_bpffs(bpf_root) {
        mount(
            Some("bpf"),
            bpf_root,
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .map_err(|errno| PinError::Mount {
            path: bpf_root.display().to_string(),
            source: errno.into(),
        })?;
    }
    let root = root_dir(bpf_root);
    for dir in [
        &root,
        &maps_dir(bpf_root),
        &programs_dir(bpf_root),
        &links_dir(bpf_root),
    ] {
        create_dir(dir)?;
    }
    let lock = lock(&root)?;
    let version =
        Map::<u32, u32>::open_or_create(&ABI_MAP, &root.join("abi")).map_err(PinError::OpenVersion)?;
    match version.lookup(&0).map_err(PinError::Version)?.unwrap_or_default() {
        ABI_VERSION => Ok(lock),
        // Zero: just made, or its maker died before it wrote, and so before it made any other map.
        0 => {
            version.put(&0, &ABI_VERSION).map_err(PinError::Version)?;
            Ok(lock)
        }
        found if (migrate::VERSION_MIN..ABI_VERSION).contains(&found) => {
            migrate::begin(&maps_dir(bpf_root)).map_err(|source| PinError::Migrate {
                path: root.display().to_string(),
                found,
                source: Box::new(source),
            })?;
            tracing::info!(
                from = found,
                to = ABI_VERSION,
                "maps of an older version are carried over"
            );
            version.put(&0, &ABI_VERSION).map_err(PinError::Version)?;
            Ok(lock)
        }
        found => Err(PinError::VersionMismatch {
            path: root.display().to_string(),
            found,
        }),
    }
}

/// Whether `path` is on a bpffs.
pub fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

fn create_dir(path: &Path) -> Result<(), PinError> {
    match fs::create_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(PinError::Create {
            path: path.display().to_string(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Removes a pin; it may be absent.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Names in a folder, sorted; none if it is absent.
pub(crate) fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}
