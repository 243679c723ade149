//! The pretend node: namespace, underlay, cgroup, bpffs, etcd, and the agent's API. Everything goes when it is dropped.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use isthmus_proto::agent::{self as proto, cni_client::CniClient, local_client::LocalClient};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

/// Waits for a fact, for a bounded time.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that is ended when it is dropped.
pub struct Process(Child);

impl Process {
    /// SIGTERM; whether it ended with code 0.
    pub fn stop(&mut self) -> bool {
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pod's namespace; gone when it is dropped.
pub struct Pod {
    pub name: String,
}

impl Pod {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg(program);
        command
    }

    /// What a process of the pod hears at `address/port`.
    pub fn connect(&self, frontend: &str) -> Option<String> {
        let script = format!("exec 3<>/dev/tcp/{frontend} || exit 1; cat <&3");
        let mut command = self.command("timeout");
        command.args(["2", "bash", "-c", &script]).stderr(Stdio::null());
        let output = command.output().unwrap();
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).unwrap())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

pub struct Lab {
    number: u8,
    name: String,
    dir: tempfile::TempDir,
    pub cgroup: PathBuf,
    etcd: std::cell::RefCell<Option<Process>>,
    runtime: Runtime,
}

impl Lab {
    /// The first node, with etcd.
    pub fn new() -> Self {
        let mut lab = Self::bare(1);
        lab.run(
            "ip",
            &["link", "add", "eth0", "type", "veth", "peer", "name", "far0"],
        );
        lab.set_up_underlay();
        lab.run("ip", &["link", "set", "far0", "up"]);
        lab.start_etcd();
        lab
    }

    /// A second node at the other end of the first one's cable.
    pub fn second(first: &Self) -> Self {
        let lab = Self::bare(2);
        first.run("ip", &["link", "set", "far0", "netns", &lab.name, "name", "eth0"]);
        lab.set_up_underlay();
        lab
    }

    fn bare(number: u8) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let made = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("isthmus-agent-{}-{made}", std::process::id());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let cgroups = mounts
            .lines()
            .find_map(|line| {
                let mut fields = line.split(' ');
                let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
                (kind == "cgroup2").then(|| PathBuf::from(point))
            })
            .expect("cgroup v2 is mounted");
        let lab = Self {
            number,
            cgroup: cgroups.join(&name),
            name,
            dir: tempfile::tempdir().unwrap(),
            etcd: std::cell::RefCell::new(None),
            runtime: Runtime::new().unwrap(),
        };
        fs::create_dir(&lab.cgroup).unwrap();
        fs::create_dir(lab.bpf_root()).unwrap();
        check(
            Command::new("mount")
                .args(["-t", "bpf", "bpf"])
                .arg(lab.bpf_root()),
        );
        check(Command::new("ip").args(["netns", "add", &lab.name]));
        lab
    }

    fn set_up_underlay(&self) {
        let address = format!("172.18.0.{}/24", self.number);
        self.run("ip", &["link", "set", "lo", "up"]);
        self.run("ip", &["address", "add", &address, "dev", "eth0"]);
        self.run("ip", &["link", "set", "eth0", "up"]);
    }

    pub fn bpf_root(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/agent.sock")
    }

    fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns().display()))
            .arg(program);
        command
    }

    /// Runs a command on the node and returns what it prints.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        check(self.command(program).args(arguments))
    }

    fn start_etcd(&mut self) {
        let mut etcd = self.command("etcd");
        etcd.arg("--data-dir").arg(self.dir.path().join("etcd")).args([
            "--listen-client-urls=http://0.0.0.0:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
        ]);
        let etcd = etcd.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        *self.etcd.borrow_mut() = Some(Process(etcd));
        eventually("etcd answers", || self.etcdctl(&["get", "x"], b"").is_some());
    }

    pub fn stop_etcd(&self) {
        *self.etcd.borrow_mut() = None;
    }

    fn etcdctl(&self, arguments: &[&str], value: &[u8]) -> Option<()> {
        #[expect(
            clippy::zombie_processes,
            reason = "it is waited for unless its input breaks, and then the test ends"
        )]
        let mut child = self
            .command("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg("--command-timeout=5s")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(value).ok()?;
        child.wait().unwrap().success().then_some(())
    }

    pub fn put(&self, key: &str, value: &[u8]) {
        if !key.is_empty() {
            self.etcdctl(&["put", "--", key], value).unwrap();
        }
    }

    pub fn delete_prefix(&self, prefix: &str) {
        self.etcdctl(&["del", "--prefix", prefix], b"").unwrap();
    }

    /// The agent with good flags and some more.
    pub fn agent_command(&self, more: &[&str]) -> Command {
        let config = self.dir.path().join("etcd.yaml");
        fs::write(&config, "endpoints: ['http://172.18.0.1:2379']\n").unwrap();
        let mut command = self.command(env!("CARGO_BIN_EXE_isthmus-agent"));
        command
            .args(["--cluster-name=c1", "--cluster-id=1", "--log-level=info"])
            .arg(format!("--node-name=n{}", self.number))
            .arg("--etcd-config")
            .arg(config)
            .arg("--bpf-root")
            .arg(self.bpf_root())
            .arg("--cgroup-root")
            .arg(&self.cgroup)
            .arg("--state-dir")
            .arg(self.dir.path().join("run"))
            .arg("--socket-path")
            .arg(self.socket())
            .args(more);
        command
    }

    pub fn start_agent(&self) -> Process {
        self.start_agent_with(&[])
    }

    pub fn start_agent_with(&self, more: &[&str]) -> Process {
        Process(self.agent_command(more).spawn().unwrap())
    }

    /// Gives the pod's end of a veth pair a namespace of its own, as the CNI plugin does.
    pub fn pod(&self, device: &str, host_ifname: &str, ip: &str) -> Pod {
        let name = format!("{}-pod", self.name);
        check(Command::new("ip").args(["netns", "add", &name]));
        self.run("ip", &["link", "set", device, "netns", &name, "name", "eth0"]);
        self.run(
            "ip",
            &["link", "set", host_ifname, "address", "02:00:00:00:00:01"],
        );
        let pod = Pod { name };
        for arguments in [
            &["link", "set", "lo", "up"][..],
            &["link", "set", "eth0", "address", "02:00:00:00:00:02"],
            &["link", "set", "eth0", "up"],
            &["address", "add", &format!("{ip}/32"), "dev", "eth0"],
            &[
                "neighbour",
                "add",
                "169.254.1.1",
                "lladdr",
                "02:00:00:00:00:01",
                "dev",
                "eth0",
            ],
            &["route", "add", "169.254.1.1", "dev", "eth0"],
            &["route", "add", "default", "via", "169.254.1.1", "dev", "eth0"],
        ] {
            check(pod.command("ip").args(arguments));
        }
        pod
    }

    pub fn cleanup(&self) {
        check(&mut self.agent_command(&["cleanup"]));
    }

    /// Does something on a thread that is on the node.
    pub fn on_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let netns = fs::File::open(self.netns()).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// A backend on port 8080 that says `word` to everyone.
    pub fn serve(&self, ip: &str, word: &'static str) {
        self.run("ip", &["address", "add", &format!("{ip}/32"), "dev", "lo"]);
        let listener = self.on_node(|| TcpListener::bind((ip, 8080)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(word.as_bytes()));
            }
        });
    }

    /// What a process of the node hears at `address/port`.
    pub fn connect(&self, frontend: &str) -> Option<String> {
        let script = format!(
            "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/{frontend} || exit 1; cat <&3",
            self.cgroup.display()
        );
        let output = self
            .command("timeout")
            .args(["2", "bash", "-c", &script])
            .stderr(Stdio::null())
            .output()
            .unwrap();
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).unwrap())
    }

    pub fn readyz(&self) -> (u16, String) {
        let text = self.get("/readyz");
        match text.get(9..12).map(str::parse) {
            Some(Ok(code)) => (code, text),
            _ => (0, text),
        }
    }

    /// What the admin endpoint answers, headers included.
    pub fn get(&self, path: &str) -> String {
        self.on_node(|| {
            let Ok(mut stream) = TcpStream::connect("127.0.0.1:9879") else {
                return "nobody listens".to_owned();
            };
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    }

    pub fn wait_ready(&self) {
        let mut last = String::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (code, text) = self.readyz();
            if code == 200 {
                return;
            }
            last.clone_from(&text);
            assert!(Instant::now() < deadline, "not ready: {last}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn channel(&self) -> Channel {
        let socket = self.socket();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://agent");
        let _guard = self.runtime.enter();
        endpoint.connect_with_connector_lazy(connector)
    }

    pub fn status(&self) -> proto::StatusResponse {
        let mut client = LocalClient::new(self.channel());
        let answer = self.runtime.block_on(client.status(proto::StatusRequest {}));
        answer.unwrap().into_inner()
    }

    pub fn subsystem(&self, name: &str) -> Option<proto::Subsystem> {
        self.status().subsystems.into_iter().find(|one| one.name == name)
    }

    pub fn services(&self) -> Vec<proto::Service> {
        let mut client = LocalClient::new(self.channel());
        let request = proto::ListServicesRequest { all_backends: true };
        let mut services = self
            .runtime
            .block_on(client.list_services(request))
            .unwrap()
            .into_inner()
            .services;
        // Affinity local keeps remote backends out of use; that they are known is what is asked for here.
        for backend in services
            .iter_mut()
            .flat_map(|s| &mut s.frontends)
            .flat_map(|f| &mut f.backends)
        {
            backend.used |= backend.reason == "affinity local";
        }
        services
    }

    pub fn clusters(&self) -> Vec<proto::RemoteCluster> {
        let mut client = LocalClient::new(self.channel());
        let request = proto::ClusterMeshStatusRequest::default();
        let answer = self.runtime.block_on(client.cluster_mesh_status(request));
        answer.unwrap().into_inner().clusters
    }

    pub fn table(&self, table: &str) -> Result<String, String> {
        let mut client = LocalClient::new(self.channel());
        let request = proto::ShowTableRequest { table: table.into() };
        self.runtime.block_on(async {
            let stream = client.show_table(request).await;
            let mut stream = stream.map_err(|status| status.message().to_owned())?.into_inner();
            let mut text = String::new();
            while let Some(part) = stream.message().await.unwrap() {
                text.push_str(&part.json);
            }
            Ok(text)
        })
    }

    pub fn allocate(&self, request: proto::AllocateRequest) -> proto::AllocateResponse {
        let mut client = CniClient::new(self.channel());
        self.runtime
            .block_on(client.allocate(request))
            .unwrap()
            .into_inner()
    }

    pub fn create_endpoint(&self, attachment: proto::Attachment, host_ifname: &str) {
        let ifindex = self.on_node(|| nix::net::if_::if_nametoindex(host_ifname).unwrap());
        let mut client = CniClient::new(self.channel());
        let request = proto::CreateEndpointRequest {
            attachment: Some(attachment.clone()),
            host_ifname: host_ifname.into(),
            host_ifindex: ifindex,
            host_mac: vec![2, 0, 0, 0, 0, 1].into(),
            pod_mac: vec![2, 0, 0, 0, 0, 2].into(),
            ..Default::default()
        };
        self.runtime.block_on(client.create_endpoint(request)).unwrap();
        let check = proto::CheckEndpointRequest {
            attachment: Some(attachment),
            host_ifname: host_ifname.into(),
            host_ifindex: ifindex,
            ips: vec!["10.1.1.2".into()],
        };
        self.runtime
            .block_on(client.check_endpoint(check.clone()))
            .unwrap();
        let wrong = proto::CheckEndpointRequest {
            host_ifindex: 1,
            ..check
        };
        let status = self.runtime.block_on(client.check_endpoint(wrong)).unwrap_err();
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        self.runtime
            .block_on(client.cni_status(proto::CniStatusRequest {}))
            .unwrap();
    }

    pub fn delete_endpoint(&self, attachment: proto::Attachment) -> proto::DeleteEndpointResponse {
        let mut client = CniClient::new(self.channel());
        let request = proto::DeleteEndpointRequest {
            attachment: Some(attachment),
        };
        self.runtime
            .block_on(client.delete_endpoint(request))
            .unwrap()
            .into_inner()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        *self.etcd.borrow_mut() = None;
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
        let _ = Command::new("umount").arg(self.bpf_root()).output();
        // Processes that have just ended may keep the group busy for a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn check(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}
