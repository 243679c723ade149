//! A place for benchmarks of the datapath: network namespaces, BPF file systems and cgroups, named after this process.
//!
//! In: names. Out: kernel state that goes with the [`Lab`], also after a failed measurement, a panic, SIGINT or SIGTERM. What a
//! killed run left behind goes when the next one begins.

pub mod load;
pub mod nodes;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use isthmus_datapath::{DatapathConfig, preflight, teardown};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
    sys::signal::{SigSet, Signal},
};

/// Begins the name of everything; the process' number follows, then `x`.
const PREFIX: &str = "isthbench";
/// Exit code after SIGINT, as shells have it.
const EXIT_INTERRUPTED: i32 = 130;

/// What is to be removed.
static LEFT: Mutex<Left> = Mutex::new(Left {
    namespaces: BTreeSet::new(),
    bpf_roots: BTreeSet::new(),
    cgroups: BTreeSet::new(),
});

struct Left {
    namespaces: BTreeSet<String>,
    bpf_roots: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
}

impl Left {
    fn remove(&mut self) {
        for root in std::mem::take(&mut self.bpf_roots) {
            for error in teardown::remove_bpf(&root) {
                eprintln!("cleaning up: {error}");
            }
            // It may not be mounted.
            let _ = umount2(&root, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(root);
        }
        for name in std::mem::take(&mut self.namespaces) {
            // What is left then is in the output.
            let _ = Command::new("ip").args(["netns", "delete", &name]).status();
        }
        for cgroup in std::mem::take(&mut self.cgroups) {
            // Who makes load may be in it still. Version 1 has no such file, and nobody of ours in it.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let gone = Instant::now() + Duration::from_secs(2);
            while cgroup.exists() && fs::remove_dir(&cgroup).is_err() && Instant::now() < gone {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn left() -> std::sync::MutexGuard<'static, Left> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module. One at a time.
pub struct Lab {
    id: String,
}

impl Lab {
    /// An empty place. `tools` are programs that must be there.
    pub fn new(tools: &[&str]) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "this benchmark needs root");
        require(&["ip", "chrt"])?;
        require(tools)?;
        remove_stale();
        remove_at_signals()?;
        Ok(Self {
            id: format!("{PREFIX}{}x", std::process::id()),
        })
    }

    /// A new network namespace with its loopback up.
    pub fn namespace(&self, name: &str) -> Result<String> {
        let name = format!("{}{name}", self.id);
        left().namespaces.insert(name.clone());
        run(&["ip", "netns", "add", &name])?;
        run(&["ip", "-n", &name, "link", "set", "lo", "up"])?;
        Ok(name)
    }

    /// Where a node's datapath lives, with socket hooks for the processes of `cgroup`.
    pub fn datapath_config(&self, name: &str, cgroup: &Path) -> Result<DatapathConfig> {
        let bpf_root = std::env::temp_dir().join(format!("{}{name}", self.id));
        left().bpf_roots.insert(bpf_root.clone());
        fs::create_dir(&bpf_root).with_context(|| format!("creating {}", bpf_root.display()))?;
        Ok(DatapathConfig {
            bpf_root,
            cgroup_root: Some(cgroup.to_path_buf()),
            socket_lb: true,
        })
    }

    /// A new cgroup v2 for processes that have the socket hooks.
    pub fn cgroup(&self) -> Result<PathBuf> {
        self.cgroup_below(&preflight::cgroup_root(None)?, "hooks")
    }

    /// A new cgroup that counts kernel memory, and the file that says how much; nothing if the machine counts none.
    pub fn memory_cgroup(&self, name: &str) -> Result<Option<MemoryCgroup>> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        if v1.join("memory.kmem.usage_in_bytes").exists() {
            let dir = self.cgroup_below(v1, name)?;
            return Ok(Some(MemoryCgroup { dir, unified: false }));
        }
        let v2 = preflight::cgroup_root(None)?;
        let controllers = fs::read_to_string(v2.join("cgroup.subtree_control")).unwrap_or_default();
        if !controllers.split_whitespace().any(|name| name == "memory") {
            return Ok(None);
        }
        let dir = self.cgroup_below(&v2, name)?;
        Ok(Some(MemoryCgroup { dir, unified: true }))
    }

    fn cgroup_below(&self, root: &Path, name: &str) -> Result<PathBuf> {
        let dir = root.join(format!("{}{name}", self.id));
        left().cgroups.insert(dir.clone());
        fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        left().remove();
    }
}

/// Counts what the kernel keeps for its processes, also after they ended.
pub struct MemoryCgroup {
    dir: PathBuf,
    unified: bool,
}

impl MemoryCgroup {
    /// The file to which a process writes its number to be counted.
    pub fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Bytes of kernel memory.
    pub fn kernel_bytes(&self) -> Result<u64> {
        let (file, field) = match self.unified {
            true => ("memory.stat", Some("kernel")),
            false => ("memory.kmem.usage_in_bytes", None),
        };
        let text = fs::read_to_string(self.dir.join(file)).with_context(|| file.to_owned())?;
        let number = match field {
            None => text.trim(),
            Some(name) => text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
                .with_context(|| format!("{file} has no field {name}"))?,
        };
        number.parse().with_context(|| format!("{file}: {number}"))
    }
}

/// Fails, with what to do, if a program is missing.
pub fn require(tools: &[&str]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for tool in tools {
        let found = std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
        ensure!(
            found,
            "{tool} is not on the PATH: run scripts/setup, which installs it"
        );
    }
    Ok(())
}

/// Runs a command and returns its output.
pub fn run(command: &[&str]) -> Result<String> {
    run_with(command, None)
}

/// Runs a command that reads `input`.
pub fn feed(command: &[&str], input: &str) -> Result<String> {
    let mut file = tempfile::tempfile().context("a temporary file")?;
    file.write_all(input.as_bytes()).context("a temporary file")?;
    std::io::Seek::rewind(&mut file).context("a temporary file")?;
    run_with(command, Some(file))
}

fn run_with(command: &[&str], input: Option<File>) -> Result<String> {
    let output = Command::new(command[0])
        .args(&command[1..])
        .stdin(input.map_or_else(Stdio::null, Stdio::from))
        .output()
        .with_context(|| format!("cannot run {}", command[0]))?;
    if !output.status.success() {
        let mut complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        complaint.truncate(complaint.floor_char_boundary(600));
        bail!("{} failed: {}", command.join(" "), complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `ip` in a namespace, a command a line.
pub fn ip(namespace: &str, commands: &str) -> Result<()> {
    feed(&["ip", "-n", namespace, "-batch", "-"], commands).map(drop)
}

/// Runs `f` on a thread in a network namespace.
pub fn in_namespace<T: Send>(name: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = File::open(format!("/run/netns/{name}")).context("opening the namespace")?;
            setns(namespace, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
            f()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Writes settings below /proc/sys/net in a namespace.
pub fn sysctl(namespace: &str, settings: &[(&str, &str)]) -> Result<()> {
    in_namespace(namespace, || {
        for (key, value) in settings {
            fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("setting net/{key}"))?;
        }
        Ok(())
    })
}

/// Removes what processes that are gone have left.
fn remove_stale() {
    let mut stale = Left {
        namespaces: names(Path::new("/run/netns")),
        bpf_roots: below(&std::env::temp_dir()),
        cgroups: below(Path::new("/sys/fs/cgroup/memory")),
    };
    if let Ok(root) = preflight::cgroup_root(None) {
        stale.cgroups.extend(below(&root));
    }
    stale.remove();
}

fn below(dir: &Path) -> BTreeSet<PathBuf> {
    names(dir).into_iter().map(|name| dir.join(name)).collect()
}

/// Names in `dir` that a lab of a process that is gone has given.
fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_stale =
        |name: &String| owner(name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(is_stale)
        .collect()
}

/// Number of the process whose lab gave this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('x')?.0.parse().ok()
}

/// Has SIGINT and SIGTERM remove everything first. Threads that begin later inherit that these signals are blocked; programs
/// that are started do not.
fn remove_at_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("blocking signals")?;
    thread::spawn(move || {
        if signals.wait().is_ok() {
            // Held until the end, so that nobody adds anything.
            let mut left = left();
            left.remove();
            std::process::exit(EXIT_INTERRUPTED);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_whose_they_are() {
        assert_eq!(owner("isthbench42xnode1"), Some(42));
        assert_eq!(owner("isthbench42"), None);
        assert_eq!(owner("other"), None);
    }

    #[test]
    fn what_is_missing_is_named_with_its_cure() {
        let error = require(&["sh", "isthmus-no-such-tool"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "isthmus-no-such-tool is not on the PATH: run scripts/setup, which installs it"
        );
    }
}
