//! An agent that restarts: what is pinned is taken over, and no connection notices.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{
    fs, io,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use aya::programs::{SchedClassifier, TcAttachType};
use isthmus_datapath::{
    Attached, Datapath, DatapathConfig, PacketHook, links, pins, programs::Programs, teardown,
};

#[path = "support/lab.rs"]
mod lab;
#[path = "support/services.rs"]
mod services;

use lab::{Lab, chain, ifindex, in_namespace, open_in, run, wait_for};
use services::{connect, echo, put_service, serve};

const VIP: &str = "10.96.0.10:80";

fn node(lab: &mut Lab) -> (String, DatapathConfig) {
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
    run(&[
        "ip", "-n", &namespace, "link", "add", "pod1", "type", "veth", "peer", "name", "peer1",
    ]);
    (namespace, lab.datapath_config())
}

/// Forgets the pinned programs, so that the next agent loads new ones, as another build would.
fn forget_programs(config: &DatapathConfig) {
    let programs = pins::programs_dir(&config.bpf_root);
    for object in fs::read_dir(&programs).unwrap() {
        let object = object.unwrap().path();
        let as_of_another_build = object.with_file_name("of_another_build");
        fs::rename(object, as_of_another_build).unwrap();
    }
}

/// Kernel's numbers of the programs on a device's ingress.
fn link_programs(namespace: &str, device: &str) -> Vec<u32> {
    let (_, programs) = in_namespace(namespace, || {
        SchedClassifier::query_tcx(device, TcAttachType::Ingress)
    })
    .unwrap();
    programs.iter().map(|program| program.id()).collect()
}

#[test]
fn the_same_build_loads_nothing_and_changes_no_link() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    let pod = ifindex(&namespace, "pod1");
    let first = open_in(&namespace, &config);
    assert!(first.loaded_programs());
    assert_eq!(
        in_namespace(&namespace, || first.attach_endpoint(pod)).unwrap(),
        Attached::New
    );
    let before = link_programs(&namespace, "pod1");
    drop(first);
    let second = open_in(&namespace, &config);
    assert!(!second.loaded_programs());
    assert_eq!(
        in_namespace(&namespace, || second.attach_endpoint(pod)).unwrap(),
        Attached::Unchanged
    );
    assert_eq!(link_programs(&namespace, "pod1"), before);
}

#[test]
fn another_build_updates_links_in_place() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    let pod = ifindex(&namespace, "pod1");
    let first = open_in(&namespace, &config);
    in_namespace(&namespace, || first.attach_endpoint(pod)).unwrap();
    let before = link_programs(&namespace, "pod1");
    drop(first);
    forget_programs(&config);
    let second = open_in(&namespace, &config);
    assert!(second.loaded_programs());
    // `open` itself has updated the device's link.
    let after = link_programs(&namespace, "pod1");
    assert_eq!((before.len(), after.len()), (1, 1));
    assert_ne!(after, before);
    assert_eq!(
        in_namespace(&namespace, || second.attach_endpoint(pod)).unwrap(),
        Attached::Unchanged
    );
    let objects = fs::read_dir(pins::programs_dir(&config.bpf_root))
        .unwrap()
        .count();
    assert_eq!(objects, 1, "the other build's programs are gone");
}

#[test]
fn connections_old_and_new_survive_restart_and_upgrade() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    let datapath = open_in(&namespace, &config);
    put_service(&datapath, 1, VIP, &[(1, "192.0.2.1:8080")]);
    drop(datapath);
    in_namespace(&namespace, || {
        serve("192.0.2.1:8080", "one");
        let (mut old, _) = connect(VIP).unwrap();
        let (stop, connections) = (AtomicBool::new(false), AtomicU32::new(0));
        thread::scope(|scope| {
            let client = scope.spawn(|| -> io::Result<()> {
                while !stop.load(Ordering::Relaxed) {
                    connect(VIP)?;
                    connections.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            for round in 0..6 {
                if round % 2 == 1 {
                    forget_programs(&config);
                }
                let seen = connections.load(Ordering::Relaxed);
                let datapath = Datapath::open(&config).unwrap();
                assert_eq!(datapath.loaded_programs(), round % 2 == 1);
                echo(&mut old).unwrap();
                assert_eq!(old.peer_addr().unwrap(), VIP.parse().unwrap());
                drop(datapath);
                wait_for("a new connection", || {
                    client.is_finished() || connections.load(Ordering::Relaxed) > seen + 20
                });
            }
            stop.store(true, Ordering::Relaxed);
            client.join().unwrap().expect("every connection was made");
        });
    });
}

#[test]
fn hooks_of_vanished_devices_go() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    run(&[
        "ip", "-n", &namespace, "link", "add", "pod2", "type", "veth", "peer", "name", "peer2",
    ]);
    let (pod1, pod2) = (ifindex(&namespace, "pod1"), ifindex(&namespace, "pod2"));
    let datapath = open_in(&namespace, &config);
    let attached = || links::attached_devices(&config.bpf_root, PacketHook::FromContainer).unwrap();
    in_namespace(&namespace, || {
        datapath.attach_endpoint(pod1).unwrap();
        datapath.attach_endpoint(pod2).unwrap();
    });
    assert_eq!(attached(), [pod1, pod2]);
    run(&["ip", "-n", &namespace, "link", "delete", "pod2"]);
    drop(datapath);
    let datapath = open_in(&namespace, &config);
    assert_eq!(
        attached(),
        [pod1],
        "opening drops the hook of the vanished device"
    );
    datapath.retain_endpoints(&[]).unwrap();
    assert_eq!(attached(), []);
    assert_eq!(link_programs(&namespace, "pod1"), []);
    datapath.detach_endpoint(pod1).unwrap();
}

#[test]
fn kernels_without_device_links_get_one_filter_that_is_replaced() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    let pod = ifindex(&namespace, "pod1");
    let filters = || {
        let shown = run(&["tc", "-n", &namespace, "filter", "show", "dev", "pod1", "ingress"]);
        shown.matches("direct-action").count()
    };
    let attach = || {
        in_namespace(&namespace, || {
            let programs = Programs::open_or_load(&config.bpf_root).unwrap();
            let hook = PacketHook::FromContainer;
            links::attach_packet_hook(&programs, &config.bpf_root, hook, pod, false)
        })
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
    };
    drop(open_in(&namespace, &config));
    assert_eq!(attach(), Attached::New);
    assert_eq!(filters(), 1);
    forget_programs(&config);
    assert_eq!(attach(), Attached::Updated);
    assert_eq!(filters(), 1);
    assert_eq!(
        links::attached_devices(&config.bpf_root, PacketHook::FromContainer).unwrap(),
        [pod]
    );
    in_namespace(&namespace, || {
        links::detach_packet_hook(&config.bpf_root, PacketHook::FromContainer, pod)
    })
    .unwrap();
    assert_eq!(filters(), 0);
    assert_eq!(
        links::attached_devices(&config.bpf_root, PacketHook::FromContainer).unwrap(),
        []
    );
}

#[test]
fn another_cgroup_takes_the_hooks_along() {
    let mut lab = Lab::new();
    let (namespace, mut config) = node(&mut lab);
    let datapath = open_in(&namespace, &config);
    put_service(&datapath, 1, VIP, &[(1, "192.0.2.1:8080")]);
    let own = config.cgroup_root.clone().unwrap();
    let elsewhere = own.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    in_namespace(&namespace, || {
        serve("192.0.2.1:8080", "one");
        connect(VIP).unwrap();
        config.cgroup_root = Some(elsewhere.clone());
        Datapath::open(&config).unwrap();
        assert!(
            connect(VIP).is_err(),
            "this process is not below the other cgroup"
        );
        config.cgroup_root = Some(own);
        Datapath::open(&config).unwrap();
        connect(VIP).unwrap();
    });
    fs::remove_dir(&elsewhere).unwrap();
}

#[test]
fn a_folder_outside_cgroup_v2_is_refused() {
    let mut lab = Lab::new();
    let (namespace, mut config) = node(&mut lab);
    config.cgroup_root = Some("/proc".into());
    let error = in_namespace(&namespace, || Datapath::open(&config))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/proc") && error.contains("--cgroup-root"),
        "{error}"
    );
}

#[test]
fn teardown_leaves_nothing() {
    let mut lab = Lab::new();
    let (namespace, config) = node(&mut lab);
    let datapath = open_in(&namespace, &config);
    put_service(&datapath, 1, VIP, &[(1, "192.0.2.1:8080")]);
    in_namespace(&namespace, || {
        datapath.attach_endpoint(ifindex(&namespace, "pod1"))
    })
    .unwrap();
    drop(datapath);
    for _ in 0..2 {
        let errors = in_namespace(&namespace, || teardown::remove_bpf(&config.bpf_root));
        assert!(errors.is_empty(), "{errors:?}");
        assert!(!pins::root_dir(&config.bpf_root).exists());
    }
    in_namespace(&namespace, || {
        serve("192.0.2.1:8080", "one");
        assert!(connect(VIP).is_err());
    });
    assert_eq!(link_programs(&namespace, "pod1"), []);
}
