//! Open flows of clients in a pod when backends leave: an agent, a real etcd, real sockets, from a change in etcd to the error
//! that a waiting client gets. Needs what `node.rs` needs. Run with `cargo test -p isthmus-agent --test open_flows`.

#![allow(clippy::unwrap_used, reason = "a test: a panic is the report")]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "node/lab.rs"]
mod lab;
#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "node/publish.rs"]
mod publish;

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use isthmus_model::{
    Affinity, Protocol, ServiceFrame, ServiceName, ServicePort, ServiceType, SessionAffinity, Slice,
    SliceEndpoint, SlicePort,
};
use isthmus_proto::agent as proto;
use isthmus_wire::{keys::Kind, slice};
use lab::{Lab, Pod, eventually};

const VIP: &str = "10.96.1.9:80";
const DEADLINE: Duration = Duration::from_secs(60);

/// The calling process is in the lab's cgroup, whose sockets are translated, until this is dropped.
struct InCgroup {
    former: PathBuf,
}

impl InCgroup {
    fn enter(cgroup: &Path) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        let former = cgroup.parent().unwrap().join(own);
        move_to(cgroup);
        Self { former }
    }
}

impl Drop for InCgroup {
    fn drop(&mut self) {
        move_to(&self.former);
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// A backend on port 8080 that answers everything with its name, for as long as it is asked.
fn serve(lab: &Lab, ip: &str, name: &'static str) {
    lab.run("ip", &["address", "add", &format!("{ip}/32"), "dev", "lo"]);
    let (tcp, udp) = lab.on_node(|| {
        (
            TcpListener::bind((ip, 8080)).unwrap(),
            UdpSocket::bind((ip, 8080)).unwrap(),
        )
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut byte = [0];
                while let Ok(1) = stream.read(&mut byte) {
                    if stream.write_all(name.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(name.as_bytes(), from);
        }
    });
}

/// Does something on a thread that is in the pod.
fn in_pod<T: Send>(pod: &Pod, work: impl FnOnce() -> T + Send) -> T {
    let netns = fs::File::open(Path::new("/run/netns").join(&pod.name)).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// An open connection and a connected socket of one client.
struct Client {
    tcp: TcpStream,
    udp: UdpSocket,
}

impl Client {
    /// Both lead to the backend of that name, or to nobody.
    fn open(to: &str, name: &str) -> Option<Self> {
        let tcp = TcpStream::connect(to).ok()?;
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        udp.set_read_timeout(Some(DEADLINE)).unwrap();
        udp.connect(to).ok()?;
        let mut client = Self { tcp, udp };
        (client.ask().ok()? == [name, name]).then_some(client)
    }

    /// Who answers over TCP.
    fn ask_tcp(&mut self) -> std::io::Result<String> {
        self.tcp.write_all(b"?")?;
        let mut buffer = [0; 16];
        let length = self.tcp.read(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Who answers over TCP, and over UDP.
    fn ask(&mut self) -> std::io::Result<[String; 2]> {
        let tcp = self.ask_tcp()?;
        self.udp.send(b"?")?;
        let mut buffer = [0; 16];
        let length = self.udp.recv(&mut buffer)?;
        Ok([tcp, String::from_utf8_lossy(&buffer[..length]).into_owned()])
    }

    /// Waits for the end of both; when it came to each.
    fn ends(mut self) -> [Instant; 2] {
        let udp = std::thread::spawn(move || {
            let error = self.udp.recv(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "UDP");
            Instant::now()
        });
        let error = self.tcp.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "TCP");
        [Instant::now(), udp.join().unwrap()]
    }
}

/// The service default/dual: TCP and UDP at one address.
fn publish_frame(lab: &Lab) {
    let port = |name: &str, protocol| ServicePort {
        name: name.into(),
        protocol,
        port: 80,
        node_port: 0,
    };
    let frame = ServiceFrame {
        cluster: publish::name("c1"),
        cluster_id: publish::id("c1"),
        name: ServiceName::new("default", "dual").unwrap(),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![[10, 96, 1, 9].into()],
        external_ips: vec![],
        ports: vec![port("t", Protocol::Tcp), port("u", Protocol::Udp)],
        global: false,
        shared: false,
        affinity: Affinity::None,
        session_affinity: SessionAffinity::None,
        traffic: Default::default(),
        labels: Default::default(),
        selector: Default::default(),
    };
    publish::put(
        lab,
        "c1",
        Kind::Frames,
        "default/dual",
        &slice::encode_frame(&frame),
    );
}

fn publish_slice(lab: &Lab, endpoints: &[SliceEndpoint]) {
    let port = |name: &str, protocol| SlicePort {
        name: name.into(),
        protocol,
        port: 8080,
    };
    let object = Slice {
        cluster: publish::name("c1"),
        cluster_id: publish::id("c1"),
        service: ServiceName::new("default", "dual").unwrap(),
        slice: "s".into(),
        ports: vec![port("t", Protocol::Tcp), port("u", Protocol::Udp)],
        endpoints: endpoints.to_vec(),
    };
    publish::put(
        lab,
        "c1",
        Kind::Slices,
        "default/dual/s",
        &slice::encode_slice(&object),
    );
}

/// Backend `10.1.1.<10 + number>`.
fn backend(number: u8) -> SliceEndpoint {
    SliceEndpoint::ready([10, 1, 1, 10 + number].into())
}

fn attach_pod(lab: &Lab) -> Pod {
    let attachment = proto::Attachment {
        container_id: "p".into(),
        ifname: "eth0".into(),
    };
    let answer = lab.allocate(proto::AllocateRequest {
        attachment: Some(attachment.clone()),
        ..Default::default()
    });
    let name = &answer.host_ifname;
    lab.run(
        "ip",
        &["link", "add", name, "type", "veth", "peer", "name", "pod0"],
    );
    lab.run("ip", &["link", "set", name, "up"]);
    lab.create_endpoint(attachment, name);
    lab.pod("pod0", name, &answer.ipv4)
}

fn metric(lab: &Lab, line: &str) -> Option<u64> {
    let text = lab.get("/metrics");
    text.lines()
        .find_map(|found| found.strip_prefix(line)?.trim().parse().ok())
}

/// A client of that backend: others' are tried until it is chosen.
fn client_of(name: &str) -> Client {
    let mut found = None;
    eventually("a client of the backend", || {
        found = Client::open(VIP, name);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn clients_in_a_pod_fail_over() {
    let lab = Lab::new();
    let _cgroup = InCgroup::enter(&lab.cgroup);
    for (number, name) in [(1, "one"), (2, "two"), (3, "three")] {
        serve(&lab, &backend(number).ip.to_string(), name);
    }
    publish::cluster(&lab, "c1");
    publish_frame(&lab);
    publish_slice(&lab, &[backend(1)]);
    let mut agent = lab.start_agent();
    lab.wait_ready();
    let pod = attach_pod(&lab);

    let (client, mut direct) = in_pod(&pod, || {
        let client = client_of("one");
        (client, Client::open("10.1.1.11:8080", "one").unwrap())
    });
    let on_node = lab.on_node(|| client_of("one"));
    let waiting = [client, on_node].map(|client| std::thread::spawn(move || client.ends()));
    let began = Instant::now();
    publish_slice(&lab, &[backend(2)]);
    let published = Instant::now();
    for ended in waiting {
        let ended = ended.join().unwrap();
        let after = ended.map(|at| at.saturating_duration_since(began));
        println!(
            "TCP and UDP ended {after:?} after the change was begun, which took {:?}",
            published - began
        );
    }
    assert_eq!(direct.ask().unwrap(), ["one", "one"]);
    in_pod(&pod, || {
        assert!(
            Client::open(VIP, "two").is_some(),
            "who connects anew reaches the other"
        );
    });
    eventually("the numbers show it", || {
        ["tcp", "udp"].iter().all(|protocol| {
            let ended = format!("isthmus_agent_datapath_sockets_ended_total{{protocol=\"{protocol}\"}}");
            let can = format!("isthmus_agent_datapath_sockets_endable{{protocol=\"{protocol}\"}}");
            metric(&lab, &ended) == Some(2) && metric(&lab, &can) == Some(1)
        })
    });

    terminating_backends_keep_their_flows(&lab, &pod);

    assert!(agent.stop());
    let _agent = lab.start_agent_with(&["--bpf-lb-sock-terminate-all-protos=false"]);
    lab.wait_ready();
    tcp_is_left_alone(&lab, &pod);
    assert_eq!(direct.ask().unwrap(), ["one", "one"]);
}

fn terminating_backends_keep_their_flows(lab: &Lab, pod: &Pod) {
    publish_slice(lab, &[backend(2), backend(3)]);
    let (mut of_two, of_three) = in_pod(pod, || (client_of("two"), client_of("three")));
    let mut leaving = backend(2);
    (leaving.ready, leaving.serving, leaving.terminating) = (false, false, true);
    publish_slice(lab, &[backend(1), leaving]);
    // One change, one walk: what it does to the one it does not do to the other.
    of_three.ends();
    assert_eq!(of_two.ask().unwrap(), ["two", "two"]);
    publish_slice(lab, &[backend(1)]);
    of_two.ends();
}

fn tcp_is_left_alone(lab: &Lab, pod: &Pod) {
    let mut client = in_pod(pod, || client_of("one"));
    publish_slice(lab, &[backend(2)]);
    let error = client.udp.recv(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    assert_eq!(client.ask_tcp().unwrap(), "one");
}
