//! Whether this machine can run the datapath: one clear message for each thing that is missing.
//!
//! In: the kernel, the process's rights, the mounts. Out: the cgroup root, or what to do.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Oldest kernel: `bpf_set_retval` in socket hooks is of 5.18, the tunnel key with a local address of 6.0, and 6.1
/// the oldest that we test with.
pub const KERNEL_MIN: (u32, u32) = (6, 1);
/// From here on links to devices (TCX) exist; before, the older `clsact` filters are used.
pub const KERNEL_TCX: (u32, u32) = (6, 6);

/// What is missing.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// Not root.
    #[error(
        "the datapath needs root (it loads BPF programs and configures devices), not user {uid}: run as root"
    )]
    NotRoot {
        /// Effective user.
        uid: u32,
    },
    /// Too old a kernel.
    #[error("Linux {major}.{minor} is too old: 6.1 or newer is needed")]
    Kernel {
        /// Running.
        major: u32,
        /// Running.
        minor: u32,
    },
    /// The version cannot be read.
    #[error("cannot read the kernel's version from /proc/sys/kernel/osrelease")]
    KernelVersion(#[source] io::Error),
    /// No cgroup v2 is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or name it with --cgroup-root"
    )]
    NoCgroup,
    /// The named folder is not one.
    #[error(
        "{path} is not in a cgroup v2 hierarchy: name one with --cgroup-root (see `grep cgroup2 /proc/mounts`)"
    )]
    NotCgroup2 {
        /// The folder.
        path: String,
    },
    /// The mounts cannot be read.
    #[error("cannot read /proc/self/mounts")]
    Mounts(#[source] io::Error),
}

/// Checks rights and kernel. Returns the kernel's version.
pub fn check() -> Result<(u32, u32), PreflightError> {
    let uid = nix::unistd::geteuid();
    if !uid.is_root() {
        return Err(PreflightError::NotRoot { uid: uid.as_raw() });
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(PreflightError::KernelVersion)?;
    let (major, minor) = parse_release(&release).unwrap_or_default();
    if (major, minor) < KERNEL_MIN {
        Err(PreflightError::Kernel { major, minor })
    } else {
        Ok((major, minor))
    }
}

/// The folder to attach the socket hooks to: the named one, or the first cgroup v2 mount.
pub fn cgroup_root(named: Option<&Path>) -> Result<PathBuf, PreflightError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => {
            let mounts = fs::read_to_string("/proc/self/mounts").map_err(PreflightError::Mounts)?;
            first_cgroup2(&mounts).ok_or(PreflightError::NoCgroup)?
        }
    };
    if statfs(&path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC) {
        Ok(path)
    } else {
        Err(PreflightError::NotCgroup2 {
            path: path.display().to_string(),
        })
    }
}

/// "6.1.0-18-amd64" to (6, 1).
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The first mount point of type cgroup2. Lines are: device, mount point (spaces as `\040`), type, options.
fn first_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| point.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_gives_major_and_minor() {
        assert_eq!(parse_release("6.18.44-fc-v669\n"), Some((6, 18)));
        assert_eq!(parse_release("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_release("six"), None);
    }

    #[test]
    fn cgroup2_is_found_beside_version_1() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /a\\040b cgroup2 rw 0 0\n";
        assert_eq!(first_cgroup2(mounts), Some("/a b".into()));
        assert_eq!(first_cgroup2("proc /proc proc rw 0 0\n"), None);
    }
}
