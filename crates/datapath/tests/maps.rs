//! Maps: batches, results for each operation, dumps, reading from outside.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    Backend, BackendKey, Endpoint, EndpointKey, IpcacheKey, IpcacheValue, ServiceKey, ServiceValue,
    ipv4_mapped,
    maps::{self, MapSpec},
};
use isthmus_datapath::{Map, MapOp, OpError, Tables, apply, pins};

#[path = "support/lab.rs"]
mod lab;

use lab::{Lab, address, chain};

fn backend(port: u16) -> Backend {
    Backend {
        address: ipv4_mapped([192, 0, 2, 1]),
        port: port.to_be_bytes(),
        proto: 6,
        state: 0,
        cluster_id: 1,
        zone: 0,
        pad: 0,
    }
}

fn check(test: impl FnOnce(&Tables, &std::path::Path)) {
    let mut lab = Lab::new();
    let config = lab.datapath_config();
    let _lock = pins::prepare(&config.bpf_root).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let tables = Tables::open_or_create(&config.bpf_root).unwrap_or_else(|error| panic!("{}", chain(&error)));
    test(&tables, &config.bpf_root);
}

#[test]
fn every_kind_of_operation_is_applied_in_order() {
    check(|tables, _| {
        let frontend = ServiceKey::frontend(ipv4_mapped([10, 96, 0, 1]), 80, 6);
        let pod = EndpointKey {
            address: address("10.1.0.5"),
        };
        let prefix = IpcacheKey::ipv4([10, 2, 0, 0], 24);
        let ops = [
            MapOp::BackendPut(1, backend(1)),
            MapOp::BackendPut(2, backend(2)),
            MapOp::ServicePut(frontend.at_slot(1), ServiceValue::slot(1, 1)),
            MapOp::ServicePut(frontend, ServiceValue::frontend(1, 1, 0)),
            MapOp::IpcachePut(prefix, IpcacheValue::direct(2, 0)),
            MapOp::EndpointPut(pod, Endpoint::host(1)),
            MapOp::BackendDelete(2),
            MapOp::EndpointDelete(pod),
            MapOp::EndpointDelete(pod),
            MapOp::ServicePut(frontend, ServiceValue::frontend(1, 0, 0)),
            MapOp::ServiceDelete(frontend.at_slot(1)),
            MapOp::IpcachePut(prefix, IpcacheValue::direct(3, 0)),
        ];
        let report = apply::apply(tables, &ops);
        assert!(report.is_complete(), "{:?}", report.failed);
        assert_eq!(report.total, ops.len());
        assert_eq!(
            tables.backends.dump().unwrap(),
            [(BackendKey { id: 1 }, backend(1))]
        );
        assert_eq!(
            tables.services.dump().unwrap(),
            [(frontend, ServiceValue::frontend(1, 0, 0))]
        );
        assert_eq!(
            tables.ipcache.dump().unwrap(),
            [(prefix, IpcacheValue::direct(3, 0))]
        );
        assert_eq!(tables.endpoints.dump().unwrap(), []);
    });
}

#[test]
fn ipcache_takes_batches_and_gives_the_longest_prefix() {
    check(|tables, _| {
        let hosts: Vec<_> = (0..10_000_u32)
            .map(|host| {
                let [_, _, c, d] = host.to_be_bytes();
                MapOp::IpcachePut(
                    IpcacheKey::ipv4([10, 2, c, d], 32),
                    IpcacheValue::direct(1000 + host, 0),
                )
            })
            .collect();
        let mut ops = vec![MapOp::IpcachePut(
            IpcacheKey::ipv4([10, 2, 0, 0], 16),
            IpcacheValue::direct(7, 0),
        )];
        ops.extend(hosts.iter().cloned());
        assert!(apply::apply(tables, &ops).is_complete());
        let identity = |octets| {
            tables
                .ipcache
                .lookup(&IpcacheKey::ipv4(octets, 32))
                .unwrap()
                .map(|value| value.identity)
        };
        assert_eq!(identity([10, 2, 0, 9]), Some(1009));
        assert_eq!(identity([10, 2, 255, 9]), Some(7));
        assert_eq!(identity([10, 3, 0, 1]), None);
        assert_eq!(tables.ipcache.dump().unwrap().len(), 10_001);

        let deletes: Vec<_> = hosts
            .iter()
            .filter_map(|op| match op {
                MapOp::IpcachePut(key, _) => Some(MapOp::IpcacheDelete(*key)),
                _ => None,
            })
            .collect();
        // Again: absent keys are deleted as well as present ones.
        for _ in 0..2 {
            let report = apply::apply(tables, &deletes);
            assert!(report.is_complete(), "{:?}", report.failed);
        }
        assert_eq!(tables.ipcache.dump().unwrap().len(), 1);
    });
}

#[test]
fn one_bad_operation_fails_alone() {
    check(|tables, _| {
        let good =
            |host| MapOp::IpcachePut(IpcacheKey::ipv4([10, 2, 0, host], 32), IpcacheValue::direct(9, 0));
        let too_long = IpcacheKey {
            prefix_len: 161,
            ..IpcacheKey::ipv4([10, 2, 0, 2], 32)
        };
        let ops = [
            good(0),
            good(1),
            MapOp::IpcachePut(too_long, IpcacheValue::direct(9, 0)),
            good(3),
            good(4),
        ];
        let report = apply::apply(tables, &ops);
        assert_eq!(
            report.failed.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
            [2]
        );
        assert!(report.error(2).is_some() && report.error(3).is_none());
        assert!(
            chain(report.error(2).unwrap()).contains("isthmus_ipcache"),
            "{:?}",
            report.failed
        );
        assert_eq!(tables.ipcache.dump().unwrap().len(), 4);
    });
}

#[test]
fn full_map_fails_the_rest_and_says_so() {
    let _lab = Lab::new();
    let spec = MapSpec {
        max_entries: 3,
        ..maps::IPCACHE
    };
    let map = Map::<IpcacheKey, IpcacheValue>::create(&spec).unwrap();
    let keys: Vec<_> = (0..5)
        .map(|host| IpcacheKey::ipv4([10, 2, 0, host], 32))
        .collect();
    let failures = map.put_batch(&keys, &[IpcacheValue::direct(9, 0); 5]);
    assert_eq!(
        failures
            .iter()
            .map(|(index, error)| (*index, error.is_full()))
            .collect::<Vec<_>>(),
        [(3, true), (4, true)]
    );
    assert_eq!(map.dump().unwrap().len(), 3);
}

#[test]
fn backends_stay_when_a_slot_could_not_be_written() {
    let mut lab = Lab::new();
    let config = lab.datapath_config();
    drop(pins::prepare(&config.bpf_root).unwrap());
    // A service map that is only readable through this descriptor stands in for one that is full.
    let tables = Tables::open_or_create(&config.bpf_root).unwrap();
    tables.backends.put(&BackendKey { id: 1 }, &backend(1)).unwrap();
    let tables = Tables {
        services: Tables::open_readonly(&config.bpf_root).unwrap().services,
        ..tables
    };
    let frontend = ServiceKey::frontend(ipv4_mapped([10, 96, 0, 1]), 80, 6);
    let report = apply::apply(
        &tables,
        &[
            MapOp::ServicePut(frontend.at_slot(1), ServiceValue::slot(1, 2)),
            MapOp::BackendDelete(1),
            MapOp::IpcachePut(IpcacheKey::ipv4([10, 2, 0, 0], 24), IpcacheValue::direct(2, 0)),
        ],
    );
    assert!(
        matches!(report.error(0), Some(OpError::Map(_))),
        "{:?}",
        report.failed
    );
    assert!(
        matches!(report.error(1), Some(OpError::Withheld)),
        "{:?}",
        report.failed
    );
    assert!(report.error(2).is_none());
    assert_eq!(tables.backends.dump().unwrap().len(), 1);
}

#[test]
fn tables_are_readable_from_outside_but_not_writable() {
    check(|tables, bpf_root| {
        tables.backends.put(&BackendKey { id: 1 }, &backend(1)).unwrap();
        let outside = Tables::open_readonly(bpf_root).unwrap();
        assert_eq!(
            outside.backends.dump().unwrap(),
            [(BackendKey { id: 1 }, backend(1))]
        );
        let refused = outside
            .backends
            .put(&BackendKey { id: 2 }, &backend(2))
            .unwrap_err();
        assert_eq!(refused.source.raw_os_error(), Some(1));
        assert_eq!(outside.counters().unwrap(), []);
    });
}

#[test]
fn absent_tables_name_the_flag() {
    let error = Tables::open_readonly(std::path::Path::new("/nowhere")).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("/nowhere/isthmus/maps/isthmus_services"),
        "{error}"
    );
    assert!(error.to_string().contains("--bpf-root"), "{error}");
}

#[test]
fn other_abi_version_is_refused() {
    let mut lab = Lab::new();
    let config = lab.datapath_config();
    drop(pins::prepare(&config.bpf_root).unwrap());
    let spec = MapSpec {
        name: "isthmus_abi",
        kind: maps::MapKind::Array,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
    };
    let version =
        Map::<u32, u32>::open_or_create(&spec, &pins::root_dir(&config.bpf_root).join("abi")).unwrap();
    version.put(&0, &99).unwrap();
    let error = pins::prepare(&config.bpf_root).unwrap_err().to_string();
    assert!(error.contains("ABI version 99"), "{error}");
}
