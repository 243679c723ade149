//! One agent on one pretend node: a network namespace with an underlay device, a real etcd, real BPF. Needs root, etcd,
//! iproute2 and nsenter; fails where they are missing. Run with `cargo test -p isthmus-agent --test node`.

#![allow(clippy::unwrap_used, reason = "a test: a panic is the report")]

#[path = "node/lab.rs"]
mod lab;
#[path = "node/publish.rs"]
mod publish;

use isthmus_bpf_abi::IpcacheKey;
use isthmus_datapath::Tables;
use isthmus_proto::agent as proto;
use lab::{Lab, eventually};

const FRONTEND: &str = "10.96.1.1/80";

#[test]
fn an_agent_serves_restarts_and_goes_without_a_trace() {
    let lab = Lab::new();
    lab.serve("10.1.1.10", "one");
    lab.serve("10.1.1.11", "two");
    publish::cluster(&lab, "c1");
    publish::slice(&lab, "c1", &["10.1.1.10"]);
    let mut agent = lab.start_agent();
    lab.wait_ready();
    eventually("the frontend answers", || {
        lab.connect(FRONTEND).as_deref() == Some("one")
    });

    status_tells_the_truth(&lab);
    a_remote_cluster_joins_and_leaves(&lab);
    let host_ifname = a_pod_comes(&lab);

    // A changed slice reaches the map without a timer on the way.
    publish::slice(&lab, "c1", &["10.1.1.11"]);
    eventually("the frontend leads to the other backend", || {
        lab.connect(FRONTEND).as_deref() == Some("two")
    });

    // A stopped agent leaves the datapath at work, a restarted one takes it over.
    assert!(agent.stop(), "SIGTERM is a clean end");
    assert_eq!(lab.connect(FRONTEND).as_deref(), Some("two"));
    let again = lab.start_agent();
    lab.wait_ready();
    assert_eq!(lab.connect(FRONTEND).as_deref(), Some("two"));
    the_pod_is_still_there_and_goes(&lab, &host_ifname);

    // A lost upstream is told of and removes nothing.
    lab.stop_etcd();
    eventually("the lost upstream shows", || {
        lab.subsystem("kvstore")
            .is_some_and(|kvstore| kvstore.health() == proto::Health::Degraded)
    });
    assert_eq!(lab.connect(FRONTEND).as_deref(), Some("two"));
    assert_eq!(lab.readyz().0, 200);

    let mut again = again;
    assert!(again.stop());
    lab.cleanup();
    assert_eq!(lab.run("ip", &["-br", "link", "show", "type", "vxlan"]), "");
    assert!(!lab.bpf_root().join("isthmus").exists());
    assert_eq!(lab.connect(FRONTEND), None);
}

#[test]
fn a_pod_reaches_services_without_socket_hooks() {
    let lab = Lab::new();
    lab.serve("10.1.1.10", "one");
    publish::cluster(&lab, "c1");
    publish::slice(&lab, "c1", &["10.1.1.10"]);
    let agent = lab.start_agent_with(&["--bpf-lb-sock=false", "--conntrack-gc-interval=1s"]);
    lab.wait_ready();
    let host_ifname = a_pod_comes(&lab);
    let pod = lab.pod("pod0", &host_ifname, "10.1.1.2");
    eventually("the frontend answers the pod", || {
        pod.connect(FRONTEND).as_deref() == Some("one")
    });
    assert_eq!(
        lab.connect(FRONTEND),
        None,
        "a process of the node has no hook and no veth"
    );
    eventually("a sweep has counted the flow's entries", || {
        let metrics = lab.get("/metrics");
        metrics.lines().any(|line| {
            let entries = line.strip_prefix("isthmus_agent_conntrack_entries ");
            entries.is_some_and(|entries| entries.parse().is_ok_and(|entries: u32| entries >= 2))
        })
    });
    // The agent of tomorrow may want the hooks.
    drop(agent);
    let _again = lab.start_agent();
    lab.wait_ready();
    eventually("the frontend answers the node", || {
        lab.connect(FRONTEND).as_deref() == Some("one")
    });
    assert_eq!(pod.connect(FRONTEND).as_deref(), Some("one"));
}

#[test]
fn a_probe_through_the_tunnel_names_node_cluster_and_cause() {
    let one = Lab::new();
    let two = Lab::second(&one);
    publish::cluster(&one, "c1");
    publish::node(&one, "c1", 2);
    let _agents = (one.start_agent(), two.start_agent());
    one.wait_ready();
    two.wait_ready();
    for lab in [&one, &two] {
        eventually("the other node answers through the tunnel", || {
            let probe = lab.subsystem("probe").unwrap();
            probe.health() == proto::Health::Ok && probe.message.starts_with("1/1")
        });
    }
    // Somebody breaks the map behind the agent's back.
    let tables = Tables::open_or_create(&one.bpf_root()).unwrap();
    let router = IpcacheKey::ipv4([10, 1, 2, 1], 32);
    let mut entry = tables.ipcache.lookup(&router).unwrap().unwrap();
    entry.tunnel_endpoint = isthmus_bpf_abi::ipv4_mapped([172, 18, 0, 99]);
    tables.ipcache.put(&router, &entry).unwrap();
    eventually("status names node, cluster and cause", || {
        let probe = one.subsystem("probe").unwrap();
        ["node n2 of cluster c1", "to 172.18.0.99", "says 172.18.0.2"]
            .iter()
            .all(|words| probe.message.contains(words))
    });
}

fn status_tells_the_truth(lab: &Lab) {
    eventually("every subsystem is well", || {
        lab.status()
            .subsystems
            .iter()
            .all(|one| one.health() == proto::Health::Ok)
    });
    let error = lab.table("sandwiches").unwrap_err();
    assert!(error.contains("ipcache"), "{error}");
    for table in [
        "services",
        "backends",
        "slices",
        "nodes",
        "ipcache",
        "endpoints",
        "routes",
        "clusters",
    ] {
        let rows: serde_json::Value = serde_json::from_str(&lab.table(table).unwrap()).unwrap();
        assert!(rows.is_array(), "{table}");
    }
    let second = lab.agent_command(&[]).output().unwrap();
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("another agent"),
        "{second:?}"
    );
    let wrong = lab.agent_command(&["--tunnel-port=0"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(64));
}

fn a_remote_cluster_joins_and_leaves(lab: &Lab) {
    publish::cluster(lab, "c2");
    publish::slice(lab, "c2", &["10.2.1.10"]);
    eventually("the remote cluster is ready", || {
        lab.clusters()
            .iter()
            .any(|cluster| cluster.name == "c2" && cluster.ready)
    });
    eventually("its backend is used", || {
        let services = lab.services();
        let mut backends = services
            .iter()
            .flat_map(|s| &s.frontends)
            .flat_map(|f| &f.backends);
        backends.any(|backend| backend.cluster == "c2" && backend.used)
    });
    eventually("its pods are routed", || {
        lab.run("ip", &["route"])
            .contains("10.2.1.0/24 dev isthmus_vxlan")
    });
    // Nobody is there: the probe says so, and which.
    eventually("its node does not answer", || {
        let probe = lab.subsystem("probe");
        probe.is_some_and(|probe| probe.message.contains("node n1 of cluster c2 unreachable"))
    });
    lab.delete_prefix("cilium/cluster-config/c2");
    lab.delete_prefix("isthmus/status/v1/remotes/c2");
    eventually("the remote cluster is drained", || {
        let routes = lab.run("ip", &["route"]);
        lab.clusters().is_empty() && !routes.contains("10.2.1.0/24")
    });
}

fn attachment() -> proto::Attachment {
    proto::Attachment {
        container_id: "c0ffee".into(),
        ifname: "eth0".into(),
    }
}

fn allocate(lab: &Lab) -> proto::AllocateResponse {
    lab.allocate(proto::AllocateRequest {
        attachment: Some(attachment()),
        namespace: "default".into(),
        pod_name: "web".into(),
        pod_uid: "1".into(),
    })
}

fn a_pod_comes(lab: &Lab) -> String {
    let answer = allocate(lab);
    assert_eq!(answer, allocate(lab));
    assert_eq!((answer.ipv4.as_str(), answer.mtu), ("10.1.1.2", 1450));
    let name = &answer.host_ifname;
    lab.run(
        "ip",
        &["link", "add", name, "type", "veth", "peer", "name", "pod0"],
    );
    lab.run("ip", &["link", "set", name, "up"]);
    lab.create_endpoint(attachment(), name);
    assert!(
        lab.run("ip", &["route"])
            .contains(&format!("10.1.1.2 dev {name}"))
    );
    let endpoints = lab.table("endpoints").unwrap();
    assert!(endpoints.contains("10.1.1.2"), "{endpoints}");
    answer.host_ifname
}

fn the_pod_is_still_there_and_goes(lab: &Lab, host_ifname: &str) {
    assert_eq!(allocate(lab).ipv4, "10.1.1.2");
    assert!(lab.table("endpoints").unwrap().contains("10.1.1.2"));
    assert!(
        lab.run("ip", &["route"])
            .contains(&format!("10.1.1.2 dev {host_ifname}"))
    );
    assert!(lab.delete_endpoint(attachment()).existed);
    assert!(!lab.delete_endpoint(attachment()).existed);
    assert_eq!(lab.table("endpoints").unwrap(), "[]");
}
