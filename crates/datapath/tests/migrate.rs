//! An agent that meets the maps of an older ABI version: they are carried over, and no connection notices.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use isthmus_bpf_abi::{
    ABI_VERSION, CtKey, CtValue, DropReason, MetricsValue, NodeConfig, PROTO_TCP, ct_flag, ct_state,
    maps::{self, MapKind, MapSpec},
};
use isthmus_datapath::{DatapathConfig, Map, pins};
use nix::fcntl::{Flock, FlockArg};

#[path = "support/lab.rs"]
mod lab;
#[path = "support/services.rs"]
mod services;

use lab::{Lab, address, in_namespace, open_in, run};
use services::{connect, echo, put_service, serve};

const VIP: &str = "10.96.0.10:80";
const CONFIG_1: MapSpec = MapSpec {
    value_size: 80,
    ..maps::CONFIG
};
const METRICS_1: MapSpec = MapSpec {
    max_entries: 256,
    ..maps::METRICS
};

const CONFIG_2: MapSpec = MapSpec {
    value_size: 88,
    ..maps::CONFIG
};
const CT_2: MapSpec = MapSpec {
    value_size: 32,
    ..maps::CT
};

fn version(config: &DatapathConfig) -> Map<u32, u32> {
    let spec = MapSpec {
        name: "isthmus_abi",
        kind: MapKind::Array,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
    };
    Map::open_or_create(&spec, &pins::root_dir(&config.bpf_root).join("abi")).unwrap()
}

fn repin(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::remove_file(&path).unwrap();
    path
}

/// Makes the pins look as version 1 left them; what they held is `node`.
fn as_version_1(config: &DatapathConfig, node: &[u8; 80]) {
    let dir = pins::maps_dir(&config.bpf_root);
    let map = Map::<u32, [u8; 80]>::open_or_create(&CONFIG_1, &repin(&dir, CONFIG_1.name)).unwrap();
    map.put(&0, node).unwrap();
    let path = repin(&dir, METRICS_1.name);
    Map::<u32, MetricsValue>::open_or_create(&METRICS_1, &path).unwrap();
    for new in [
        maps::CT,
        maps::FRAGMENTS,
        maps::MAGLEV,
        maps::AFFINITY,
        maps::SOURCE_RANGES,
        maps::DEVICES,
        maps::NO_MASQUERADE,
    ] {
        fs::remove_file(dir.join(new.name)).unwrap();
    }
    as_of_another_build(config);
    version(config).put(&0, &1).unwrap();
}

fn as_of_another_build(config: &DatapathConfig) {
    let programs = pins::programs_dir(&config.bpf_root);
    for object in fs::read_dir(&programs).unwrap() {
        let object = object.unwrap().path();
        let as_of_another_build = object.with_file_name("of_another_build");
        fs::rename(object, as_of_another_build).unwrap();
    }
}

#[test]
fn maps_of_version_1_are_carried_over_under_an_open_connection() {
    let mut lab = Lab::new();
    let namespace = lab.namespace("node");
    run(&[
        "ip",
        "-n",
        &namespace,
        "address",
        "add",
        "192.0.2.1/32",
        "dev",
        "lo",
    ]);
    let config = lab.datapath_config();
    let first = open_in(&namespace, &config);
    put_service(&first, 1, VIP, &[(1, "192.0.2.1:8080")]);
    let mut stream = in_namespace(&namespace, || {
        serve("192.0.2.1:8080", "one");
        connect(VIP).unwrap().0
    });
    drop(first);
    let mut bytes = [0; 80];
    bytes[32..48].copy_from_slice(&address("10.1.0.1"));
    bytes[64..68].copy_from_slice(&7_u32.to_ne_bytes());
    as_version_1(&config, &bytes);
    // Who died in the middle of it left this behind.
    let left_over = pins::maps_dir(&config.bpf_root).join(format!("{}_new", maps::CONFIG_NAME));
    Map::<u32, [u8; 80]>::open_or_create(&CONFIG_1, &left_over).unwrap();

    let second = open_in(&namespace, &config);
    assert!(!left_over.exists());
    assert_eq!(version(&config).lookup(&0).unwrap(), Some(ABI_VERSION));
    let expected = NodeConfig {
        router_ipv4: address("10.1.0.1"),
        vxlan_ifindex: 7,
        ..NodeConfig::default()
    };
    assert_eq!(second.tables().node_config().unwrap(), expected);
    assert_eq!(second.tables().services.dump().unwrap().len(), 4);
    echo(&mut stream).unwrap();
    in_namespace(&namespace, || connect(VIP).unwrap());
    let counters = second.tables().counters().unwrap();
    assert_eq!(counters.len(), 1, "counters began anew: {counters:?}");
    assert_eq!(counters[0].reason, DropReason::Translated);
    drop(second);
    // Nothing is left to carry over.
    let third = open_in(&namespace, &config);
    assert_eq!(third.tables().node_config().unwrap(), expected);
    assert_eq!(third.tables().counters().unwrap(), counters);
}

fn flow(source_port: u16) -> (CtKey, CtValue) {
    let key = CtKey {
        source: address("10.1.0.5"),
        destination: address("10.96.0.10"),
        source_port: source_port.to_be_bytes(),
        destination_port: 80_u16.to_be_bytes(),
        proto: PROTO_TCP,
        pad: [0; 3],
    };
    let value = CtValue {
        nat_address: address("10.1.0.6"),
        nat_port: 8080_u16.to_be_bytes(),
        state: ct_state::ESTABLISHED,
        flags: ct_flag::FIN_FORWARD,
        last_seen: 77,
        backend_id: 11,
        service_id: 1,
        peer_address: [0; 16],
        peer_port: [0; 2],
        pad: [0; 2],
        ifindex: 0,
    };
    (key, value)
}

/// A flow as version 2 has it.
fn short(value: &CtValue) -> [u8; 32] {
    zerocopy::IntoBytes::as_bytes(value)[..32].try_into().unwrap()
}

/// Makes the pins look as version 2 left them, with 5,000 flows.
fn as_version_2(config: &DatapathConfig) {
    let dir = pins::maps_dir(&config.bpf_root);
    let map = Map::<u32, [u8; 88]>::open_or_create(&CONFIG_2, &repin(&dir, CONFIG_2.name)).unwrap();
    let mut bytes = [0; 88];
    bytes[80..84].copy_from_slice(&16_381_u32.to_ne_bytes());
    map.put(&0, &bytes).unwrap();
    let old = Map::<CtKey, [u8; 32]>::open_or_create(&CT_2, &repin(&dir, CT_2.name)).unwrap();
    for port in 1..=5_000 {
        let (key, value) = flow(port);
        old.put(&key, &short(&value)).unwrap();
    }
    for new in [maps::DEVICES, maps::NO_MASQUERADE] {
        fs::remove_file(dir.join(new.name)).unwrap();
    }
    as_of_another_build(config);
    version(config).put(&0, &2).unwrap();
}

#[test]
fn flows_and_configuration_of_version_2_are_carried_over() {
    let mut lab = Lab::new();
    let namespace = lab.namespace("node");
    let config = lab.datapath_config();
    drop(open_in(&namespace, &config));
    as_version_2(&config);
    let second = open_in(&namespace, &config);
    assert_eq!(version(&config).lookup(&0).unwrap(), Some(ABI_VERSION));
    assert_eq!(second.tables().node_config().unwrap().maglev_table_size, 16_381);
    for port in [1, 2_500, 5_000] {
        let (key, value) = flow(port);
        assert_eq!(second.tables().ct.lookup(&key).unwrap(), Some(value));
    }
    assert_eq!(second.tables().ct.dump().unwrap().len(), 5_000);
    assert!(!pins::maps_dir(&config.bpf_root).join("isthmus_ct_2").exists());
}

/// Of two agents that start together the second waits before it touches anything, and then finds the first one's work.
#[test]
fn agents_that_start_together_carry_over_once() {
    let mut lab = Lab::new();
    let namespace = lab.namespace("node");
    let config = lab.datapath_config();
    drop(open_in(&namespace, &config));
    as_version_2(&config);
    let old = fs::metadata(pins::maps_dir(&config.bpf_root).join(maps::CT_NAME)).unwrap();
    let folder = fs::File::open(pins::root_dir(&config.bpf_root)).unwrap();
    let lock = Flock::lock(folder, FlockArg::LockExclusive).unwrap();
    let waiter = format!(" {} ", std::process::id());
    std::thread::scope(|scope| {
        let agents = [(); 2].map(|()| scope.spawn(|| open_in(&namespace, &config)));
        let waiting = || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let ours = locks
                .lines()
                .filter(|line| line.contains("-> FLOCK") && line.contains(&waiter));
            ours.count() == 2
        };
        lab::wait_for("waiting for the lock", waiting);
        assert_eq!(version(&config).lookup(&0).unwrap(), Some(2));
        let now = fs::metadata(pins::maps_dir(&config.bpf_root).join(maps::CT_NAME)).unwrap();
        assert_eq!(now.ino(), old.ino());
        drop(lock);
        for agent in agents {
            let datapath = agent.join().unwrap();
            assert_eq!(datapath.tables().ct.dump().unwrap().len(), 5_000);
        }
    });
    assert_eq!(version(&config).lookup(&0).unwrap(), Some(ABI_VERSION));
}

/// The old programs begin a flow after the copy, or the agent dies before its end: the next one adds what is missing, and
/// leaves what the new programs have written.
#[test]
fn flows_that_old_programs_began_late_are_added() {
    let mut lab = Lab::new();
    let namespace = lab.namespace("node");
    let config = lab.datapath_config();
    let first = open_in(&namespace, &config);
    let (known, mut newer) = flow(1);
    newer.last_seen = 99;
    first.tables().ct.put(&known, &newer).unwrap();
    let kept = pins::maps_dir(&config.bpf_root).join("isthmus_ct_2");
    let old = Map::<CtKey, [u8; 32]>::open_or_create(&CT_2, &kept).unwrap();
    for port in [1, 2] {
        let (key, value) = flow(port);
        old.put(&key, &short(&value)).unwrap();
    }
    drop(first);
    let second = open_in(&namespace, &config);
    let ct = &second.tables().ct;
    assert_eq!(ct.lookup(&known).unwrap(), Some(newer));
    assert_eq!(ct.lookup(&flow(2).0).unwrap(), Some(flow(2).1));
    assert_eq!(ct.dump().unwrap().len(), 2);
    assert!(!kept.exists());
}
