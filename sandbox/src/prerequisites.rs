//! What a sandbox needs of the machine, checked before anything is made.
//!
//! Each missing thing is one sentence that says what to do; all of them are reported at once.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::plan::{Machine, StoreKind};
use crate::{bpffs, cgroup};

/// Isthmus' own binaries that a sandbox runs.
pub const BINARIES: [&str; 4] = [
    "isthmus-agent",
    "isthmus-operator",
    "isthmus-clustermesh-apiserver",
    "isthmus-cni",
];

/// The tools of the machine that a sandbox runs, and where Debian has them.
const TOOLS: [(&str, &str); 3] = [("ip", "iproute2"), ("nsenter", "util-linux"), ("sh", "dash")];

/// What a sandbox runs besides, unless its stores are embedded.
const ETCD: (&str, &str) = ("etcd", "etcd-server");

/// Looks for everything and mounts the BPF file system when it is not mounted.
/// `components` is off when Isthmus' own programs are not going to run.
pub fn check(
    state_root: &Path,
    bin_dir: &Path,
    components: bool,
    store: StoreKind,
) -> Result<Machine, Vec<String>> {
    if !nix::unistd::geteuid().is_root() {
        return Err(vec![
            "a sandbox makes network namespaces and loads BPF programs: run it as root (sudo)".into(),
        ]);
    }
    let mut missing = missing_tools(store);
    if components {
        missing.extend(missing_binaries(bin_dir));
    }
    missing.extend(missing_link_kinds());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let cgroup_mount = cgroup::cgroup2_mount(&mounts);
    match &cgroup_mount {
        None => missing.push(
            "no cgroup v2 file system is mounted: mount one, for example \
             `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`"
                .into(),
        ),
        // cgroup.kill came with Linux 5.14; the root cgroup has no such file, so a child is looked at below.
        Some(mount) => missing.extend(missing_cgroup_kill(mount)),
    }
    let bpffs_mount = bpffs::ensure_mounted()
        .map_err(|error| {
            missing.push(format!(
                "the BPF file system cannot be mounted at {}: {error}",
                bpffs::DEFAULT_MOUNT
            ))
        })
        .ok();
    match (cgroup_mount, bpffs_mount) {
        (Some(cgroup_mount), Some(bpffs_mount)) if missing.is_empty() => Ok(Machine {
            state_root: state_root.into(),
            cgroup_mount,
            bpffs_mount,
            bin_dir: bin_dir.into(),
        }),
        _ => Err(missing),
    }
}

/// The directory of the program that runs now: where its siblings are.
pub fn default_bin_dir() -> PathBuf {
    let current = std::env::current_exe().unwrap_or_default();
    current.parent().unwrap_or(Path::new("/usr/bin")).into()
}

fn missing_tools(store: StoreKind) -> Vec<String> {
    let etcd = (store == StoreKind::Etcd).then_some(&ETCD);
    TOOLS
        .iter()
        .chain(etcd)
        .filter(|(tool, _)| !is_in_path(tool))
        .map(|(tool, package)| format!("`{tool}` is not in PATH: install it (Debian's package is {package})"))
        .collect()
}

fn is_in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

fn missing_binaries(bin_dir: &Path) -> Vec<String> {
    BINARIES
        .iter()
        .filter(|binary| !bin_dir.join(binary).is_file())
        .map(|binary| {
            format!(
                "`{binary}` is not in {}: build it (`make`), or name its directory with --bin-dir",
                bin_dir.display()
            )
        })
        .collect()
}

/// Makes one device of each kind in a namespace of its own, which then goes with all of them.
fn missing_link_kinds() -> Vec<String> {
    let netns = format!("isb-probe-{}", std::process::id());
    if let Err(error) = ip(&["netns", "add", &netns]) {
        return vec![format!(
            "network namespaces do not work here (`ip netns add`): {error}"
        )];
    }
    let kinds: [(&str, &[&str]); 3] = [
        ("veth", &["type", "veth", "peer", "name", "probe-peer"]),
        ("bridge", &["type", "bridge"]),
        ("vxlan", &["type", "vxlan", "external", "dstport", "8472"]),
    ];
    let mut missing = Vec::new();
    for (kind, rest) in kinds {
        let device = format!("probe-{kind}");
        let args = [&["-n", &netns, "link", "add", &device], rest].concat();
        if let Err(error) = ip(&args) {
            missing.push(format!(
                "the kernel cannot make a {kind} device: load its module (`modprobe {kind}`): {error}"
            ));
        }
    }
    if let Err(error) = ip(&["netns", "delete", &netns]) {
        missing.push(format!(
            "the network namespace {netns} cannot be removed: {error}"
        ));
    }
    missing
}

fn missing_cgroup_kill(mount: &Path) -> Option<String> {
    let probe = mount.join(format!("isthmus-sandbox.probe-{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(&probe) {
        return Some(format!("no cgroup can be made in {}: {error}", mount.display()));
    }
    let has_kill = probe.join("cgroup.kill").exists();
    let removed = std::fs::remove_dir(&probe);
    match (has_kill, removed) {
        (false, _) => Some("the kernel has no cgroup.kill: Linux 5.14 or newer is needed".into()),
        (true, Err(error)) => Some(format!(
            "the cgroup {} cannot be removed: {error}",
            probe.display()
        )),
        (true, Ok(())) => None,
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}
