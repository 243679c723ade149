//! Namespaces, cgroups and a BPF file system for one test; all gone when it ends, also after a panic.
//!
//! A test holds the process-wide lock through its [`Lab`]: it moves the whole process into its own cgroup, for the
//! socket hooks to see, and threads of other tests must not be there.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::{
    fs::{self, File},
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use isthmus_bpf_abi::{Address, ipv4_mapped};
use isthmus_datapath::{Datapath, DatapathConfig, preflight, teardown};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A place for one test.
pub struct Lab {
    id: String,
    namespaces: Vec<String>,
    bpf_roots: Vec<PathBuf>,
    cgroup: PathBuf,
    former_cgroup: PathBuf,
    /// Whether datapaths have the socket hooks.
    pub socket_lb: bool,
    _lock: MutexGuard<'static, ()>,
}

impl Lab {
    /// An empty place; the calling process is in its cgroup from now on.
    pub fn new() -> Self {
        let lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let id = format!(
            "isth{}n{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let cgroup_root = preflight::cgroup_root(None).expect("cgroup v2");
        let own = fs::read_to_string("/proc/self/cgroup").expect("own cgroup");
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .expect("cgroup v2 membership");
        let lab = Self {
            cgroup: cgroup_root.join(&id),
            former_cgroup: cgroup_root.join(own),
            id,
            namespaces: Vec::new(),
            bpf_roots: Vec::new(),
            socket_lb: true,
            _lock: lock,
        };
        fs::create_dir(&lab.cgroup).expect("creating a cgroup");
        enter_cgroup(&lab.cgroup);
        lab
    }

    /// A new network namespace with its loopback up.
    pub fn namespace(&mut self, name: &str) -> String {
        let name = format!("{}-{name}", self.id);
        run(&["ip", "netns", "add", &name]);
        self.namespaces.push(name.clone());
        run(&["ip", "-n", &name, "link", "set", "lo", "up"]);
        name
    }

    /// A new folder for a BPF file system, and the lab's cgroup.
    pub fn datapath_config(&mut self) -> DatapathConfig {
        let bpf_root = std::env::temp_dir().join(format!("{}-bpf{}", self.id, self.bpf_roots.len()));
        fs::create_dir(&bpf_root).expect("creating the bpf root");
        self.bpf_roots.push(bpf_root.clone());
        DatapathConfig {
            bpf_root,
            cgroup_root: Some(self.cgroup.clone()),
            socket_lb: self.socket_lb,
        }
    }

    /// The bpf root that was made as number `index`.
    pub fn bpf_root(&self, index: usize) -> PathBuf {
        self.bpf_roots[index].clone()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for bpf_root in &self.bpf_roots {
            for error in teardown::remove_bpf(bpf_root) {
                eprintln!("cleaning up: {error}");
            }
            let _ = umount2(bpf_root, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(bpf_root);
        }
        for name in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
        enter_cgroup(&self.former_cgroup);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn enter_cgroup(cgroup: &Path) {
    let entered = fs::OpenOptions::new()
        .write(true)
        .open(cgroup.join("cgroup.procs"))
        .and_then(|mut file| file.write_all(std::process::id().to_string().as_bytes()));
    if let Err(error) = entered {
        eprintln!("cannot enter {}: {error}", cgroup.display());
    }
}

/// Runs a command; panics with its output if it fails.
pub fn run(command: &[&str]) -> String {
    let output = Command::new(command[0])
        .args(&command[1..])
        .output()
        .expect(command[0]);
    assert!(
        output.status.success(),
        "{command:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `f` on a thread in a network namespace.
pub fn in_namespace<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let namespace = File::open(format!("/run/netns/{name}")).expect("namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
            f()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Runs netlink calls on the calling thread (and so in its namespace).
pub fn with_netlink<T, F: Future<Output = T>>(f: impl FnOnce(rtnetlink::Handle) -> F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
        let task = tokio::spawn(connection);
        let value = f(handle).await;
        task.abort();
        value
    })
}

/// Opens a datapath in a namespace.
pub fn open_in(namespace: &str, config: &DatapathConfig) -> Datapath {
    in_namespace(namespace, || Datapath::open(config)).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// An address in the maps' form.
pub fn address(text: &str) -> Address {
    match text.parse().expect("address") {
        IpAddr::V4(address) => ipv4_mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Waits until `condition` holds; panics after ten seconds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in 10 s");
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// Index of a device in a namespace.
pub fn ifindex(namespace: &str, device: &str) -> u32 {
    in_namespace(namespace, || {
        nix::net::if_::if_nametoindex(device).expect("device")
    })
}

/// MAC address of a device in a namespace.
pub fn mac(namespace: &str, device: &str) -> [u8; 6] {
    let text = run(&["ip", "-n", namespace, "-o", "link", "show", device]);
    let text = text
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .expect("a MAC address");
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    bytes.try_into().expect("six bytes")
}
