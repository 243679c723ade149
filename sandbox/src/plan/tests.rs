//! Plans as facts: what is where, and that nothing collides.

use std::collections::BTreeSet;

use super::*;

fn machine() -> Machine {
    Machine {
        state_root: "/run/isthmus-sandbox".into(),
        cgroup_mount: "/sys/fs/cgroup".into(),
        bpffs_mount: "/sys/fs/bpf".into(),
        bin_dir: "/usr/bin".into(),
    }
}

fn request(clusters: usize, nodes: u8) -> Request {
    Request {
        name: "default".into(),
        clusters: ClusterRequest::defaults(clusters),
        nodes,
        ipv6: true,
        components: true,
        store: StoreKind::Etcd,
    }
}

#[test]
fn the_default_sandbox_has_the_documented_addresses() {
    let plan = Plan::new(&request(2, 2), 3, machine());
    let west = plan.cluster("west").unwrap();
    assert_eq!((west.id, west.host, west.netns.as_str()), (2, 20, "isb3-west-cp"));
    assert_eq!(west.apiserver().to_string(), "172.31.3.20:2379");
    assert_eq!(west.kube_api().to_string(), "127.31.3.20:6443");
    assert_eq!(
        west.service_cidrs,
        [
            "10.102.0.0/16".parse().unwrap(),
            "fd00:96:2::/112".parse::<IpNet>().unwrap()
        ]
    );
    let node = &west.nodes[1];
    assert_eq!(
        (node.name.as_str(), node.netns.as_str()),
        ("west-2", "isb3-west-2")
    );
    assert_eq!(node.address.to_string(), "172.31.3.22");
    assert_eq!(
        node.pod_cidrs,
        [
            "10.2.2.0/24".parse().unwrap(),
            "fd00:10:2:2::/64".parse::<IpNet>().unwrap()
        ]
    );
    assert_eq!(node.zone, "west-b");
}

#[test]
fn nothing_collides_in_the_largest_sandbox() {
    let plan = Plan::new(
        &request(request::MAX_CLUSTERS, request::MAX_NODES),
        255,
        machine(),
    );
    let (mut addresses, mut names, mut ranges) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    addresses.insert(machine_address(255));
    for cluster in &plan.clusters {
        assert!(addresses.insert(cluster.address) && names.insert(cluster.netns.clone()));
        ranges.extend(cluster.service_cidrs.clone());
        for node in &cluster.nodes {
            assert!(addresses.insert(node.address) && names.insert(node.netns.clone()));
            ranges.extend(node.pod_cidrs.clone());
        }
    }
    for (at, range) in ranges.iter().enumerate() {
        let overlaps = |other: &IpNet| range.contains(other) || other.contains(range);
        assert_eq!(
            ranges[at + 1..].iter().find(|other| overlaps(other)),
            None,
            "{range}"
        );
    }
}

#[test]
fn device_names_fit_the_kernels_limit() {
    let plan = Plan::new(
        &request(request::MAX_CLUSTERS, request::MAX_NODES),
        255,
        machine(),
    );
    let mut batches = root_batch(&plan);
    for setup in namespace_setups(&plan) {
        batches += &setup.batch;
    }
    for line in batches.lines().filter(|line| line.starts_with("link add")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(name.len() <= 15, "{line}");
    }
}

#[test]
fn every_component_has_its_own_name_log_and_readiness() {
    let plan = Plan::new(&request(2, 2), 0, machine());
    let components = plan.components();
    let names: Vec<&str> = components
        .iter()
        .map(|component| component.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "east/etcd",
            "west/etcd",
            "east/operator",
            "east/apiserver",
            "west/operator",
            "west/apiserver",
            "east-1/agent",
            "east-2/agent",
            "west-1/agent",
            "west-2/agent"
        ]
    );
    let logs: BTreeSet<_> = components.iter().map(|component| &component.log).collect();
    let checks: BTreeSet<_> = components
        .iter()
        .map(|component| (&component.place.netns, component.ready.address))
        .collect();
    assert_eq!((logs.len(), checks.len()), (10, 10));
}

#[test]
fn an_embedded_store_takes_the_place_of_etcd() {
    let embedded = Request {
        store: StoreKind::Embedded,
        ..request(2, 1)
    };
    let plan = Plan::new(&embedded, 0, machine());
    let components = plan.components();
    let names: Vec<&str> = components
        .iter()
        .map(|component| component.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "east/operator",
            "east/apiserver",
            "west/operator",
            "west/apiserver",
            "east-1/agent",
            "west-1/agent"
        ]
    );
    let args = &components[1].args;
    for want in [
        "--store=embedded",
        "--data-dir=/run/isthmus-sandbox/default/clusters/east/store",
    ] {
        assert!(args.iter().any(|arg| arg == want), "{want} is not in {args:?}");
    }
    assert!(!args.iter().any(|arg| arg.starts_with("--etcd-config")));
    let etcd_port = |forward: &Forward| forward.listen.port() == ETCD_PORT;
    let inward = plan.forwards().into_iter().filter(etcd_port).count();
    assert_eq!(inward, 0);
}

#[test]
fn the_agent_gets_its_own_roots() {
    let plan = Plan::new(&request(1, 1), 0, machine());
    let agent = plan.components().pop().unwrap();
    for want in [
        "--cluster-name=east",
        "--cluster-id=1",
        "--node-name=east-1",
        "--bpf-root=/sys/fs/bpf/isthmus-sandbox/default/east-1",
        "--cgroup-root=/sys/fs/cgroup/isthmus-sandbox-default/east-1",
        "--socket-path=/run/isthmus-sandbox/default/nodes/east-1/agent.sock",
    ] {
        assert!(
            agent.args.iter().any(|arg| arg == want),
            "{want} is not in {:?}",
            agent.args
        );
    }
}

#[test]
fn requests_are_refused_with_the_flags_name() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut Request), want: &str) {
        let mut request = request(2, 2);
        change(&mut request);
        let message = request.check().unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
    request(2, 2).check().unwrap();
    check(|r| r.name = "A".into(), "--name: got `A`");
    check(|r| r.name = "a".repeat(21), "--name");
    check(|r| r.clusters.clear(), "--clusters: got 0");
    check(|r| r.nodes = 10, "--nodes: got 10");
    check(|r| r.clusters[1].id = 1, "the ID 1 is used twice");
    check(
        |r| r.clusters[1].name = "east".into(),
        "the name `east` is used twice",
    );
    check(|r| r.clusters[1].id = 100, "1 to 99");
    check(|r| r.clusters[1].name = "-x".into(), "got the name `-x`");
}

#[test]
fn cluster_flags_are_parsed() {
    assert_eq!(
        ClusterRequest::parse("eu=7"),
        Ok(ClusterRequest {
            name: "eu".into(),
            id: 7
        })
    );
    for bad in ["eu", "eu=", "eu=x", "eu=70000"] {
        assert_eq!(
            ClusterRequest::parse(bad),
            Err(RequestError::ClusterSyntax(bad.into()))
        );
    }
}

#[test]
fn a_plan_survives_its_file() {
    let plan = Plan::new(&request(2, 2), 1, machine());
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

#[test]
fn pod_namespaces_are_short_and_stable() {
    let plan = Plan::new(&request(1, 1), 7, machine());
    assert_eq!(
        plan.pod_netns("0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"),
        "isb7-p-0a1b2c3d4e5f"
    );
}
