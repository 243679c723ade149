//! The BPF file system: mounted when it is not, and a sandbox's directory in it removed.
//!
//! Unlinking a pinned object drops the file's reference: what nothing else holds (a map, a program, the link that
//! attaches it) is gone with it.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::cgroup::mount_of_type;

/// Where the BPF file system belongs.
pub const DEFAULT_MOUNT: &str = "/sys/fs/bpf";

/// The mount point of the BPF file system; mounts it at [`DEFAULT_MOUNT`] when there is none.
pub fn ensure_mounted() -> io::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    if let Some(at) = mount_of_type(&mounts, "bpf") {
        return Ok(at);
    }
    mount(
        Some("bpffs"),
        DEFAULT_MOUNT,
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )?;
    Ok(DEFAULT_MOUNT.into())
}

/// Removes `directory` and all pinned objects below it. One that is not there is fine.
pub fn remove(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
