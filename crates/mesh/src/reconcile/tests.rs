//! Which operations are tried when.

use isthmus_bpf_abi::{Backend, IpcacheKey, IpcacheValue, ServiceKey, ServiceValue};

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn reconciler() -> Reconciler {
    Reconciler::new(RetryConfig::default(), Duration::ZERO)
}

fn frontend(host: u8) -> ServiceKey {
    ServiceKey::frontend(isthmus_bpf_abi::ipv4_mapped([10, 96, 0, host]), 80, 6)
}

/// A backend, a slot and a count: what a new service of domain `domain` needs.
fn service(domain: u32) -> Plan {
    let backend = Backend {
        address: [0; 16],
        port: [0, 80],
        proto: 6,
        state: 0,
        cluster_id: 1,
        zone: 0,
        pad: 0,
    };
    let key = frontend(domain as u8);
    Plan {
        ops: vec![
            MapOp::BackendPut(domain, backend),
            MapOp::ServicePut(key.at_slot(1), ServiceValue::slot(domain, domain)),
            MapOp::ServicePut(key, ServiceValue::frontend(domain, 1, 0)),
        ],
        domains: vec![domain; 3],
        links: vec![],
    }
}

/// Runs a round in which operations on `failing` fail; returns what was tried.
fn run(reconciler: &mut Reconciler, now: Duration, failing: &[Object]) -> Vec<MapOp> {
    let mut tried = vec![];
    while let Some(batch) = reconciler.next_batch(100) {
        let results: Vec<_> = batch
            .iter()
            .map(|op| {
                if failing.contains(&op.object()) {
                    Err("no space")
                } else {
                    Ok(())
                }
            })
            .collect();
        reconciler.complete(now, &results);
        tried.extend(batch);
    }
    tried
}

#[test]
fn a_failed_backend_holds_its_service_and_no_other() {
    let mut reconciler = reconciler();
    let mut plan = service(1);
    plan.merge(service(2));
    reconciler.begin(ms(0), plan, 7);
    assert_eq!(run(&mut reconciler, ms(0), &[Object::Backend(1)]).len(), 4);
    let progress = reconciler.progress();
    assert_eq!((progress.held, progress.submitted, progress.applied), (3, 7, 6));
    assert_eq!(progress.error.as_deref(), Some("no space"));
    assert_eq!(reconciler.wake_at(), ms(100));

    reconciler.begin(ms(99), Plan::default(), 7);
    assert_eq!(run(&mut reconciler, ms(99), &[]), [], "too early");
    reconciler.begin(ms(100), Plan::default(), 7);
    assert_eq!(run(&mut reconciler, ms(100), &[]), service(1).ops);
    let progress = reconciler.progress();
    assert_eq!(
        (
            progress.held,
            progress.applied,
            progress.applied_total,
            progress.failed_total
        ),
        (0, 7, 6, 1)
    );
}

#[test]
fn the_delay_doubles_up_to_its_limit() {
    let mut reconciler = reconciler();
    reconciler.begin(ms(0), service(1), 1);
    let mut now = ms(0);
    let mut delays = vec![];
    for _ in 0..12 {
        run(&mut reconciler, now, &[Object::Backend(1)]);
        delays.push((reconciler.wake_at() - now).as_millis());
        now = reconciler.wake_at();
        reconciler.begin(now, Plan::default(), 1);
    }
    assert_eq!(
        delays,
        [
            100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 51_200, 60_000, 60_000
        ]
    );
}

#[test]
fn a_newer_operation_joins_the_held_ones_and_replaces_its_object() {
    let mut reconciler = reconciler();
    reconciler.begin(ms(0), service(1), 1);
    run(&mut reconciler, ms(0), &[Object::Backend(1)]);
    let gone = Plan {
        ops: vec![
            MapOp::ServiceDelete(frontend(1)),
            MapOp::ServiceDelete(frontend(1).at_slot(1)),
            MapOp::BackendDelete(1),
        ],
        domains: vec![1; 3],
        links: vec![],
    };
    reconciler.begin(ms(50), gone.clone(), 2);
    assert_eq!(run(&mut reconciler, ms(50), &[]), []);
    reconciler.begin(ms(100), Plan::default(), 2);
    assert_eq!(run(&mut reconciler, ms(100), &[]), gone.ops);
    assert_eq!(reconciler.progress().applied, 2);
}

#[test]
fn independent_operations_fail_alone() {
    let keys = [1, 2, 3].map(|host| IpcacheKey::ipv4([10, 0, 0, host], 32));
    let ops = keys
        .map(|key| MapOp::IpcachePut(key, IpcacheValue::direct(1, 0)))
        .to_vec();
    let mut reconciler = reconciler();
    reconciler.begin(ms(0), Plan::independent(ops), 1);
    assert_eq!(run(&mut reconciler, ms(0), &[Object::Ipcache(keys[1])]).len(), 3);
    assert_eq!(reconciler.progress().held, 1);
}

#[test]
fn full_passes_come_by_the_clock_and_not_while_something_is_held() {
    let mut reconciler = reconciler();
    let due = ms(600_000);
    assert!(!reconciler.full_pass_due(ms(599_999)) && reconciler.full_pass_due(due));
    reconciler.begin(due, service(1), 1);
    assert!(!reconciler.full_pass_due(due), "a round is under way");
    run(&mut reconciler, due, &[Object::Backend(1)]);
    assert!(!reconciler.full_pass_due(due));
    reconciler.begin(due + ms(100), Plan::default(), 1);
    run(&mut reconciler, due + ms(100), &[]);
    assert!(reconciler.full_pass_due(due + ms(100)));
    reconciler.full_pass_done(due + ms(100), 2);
    assert_eq!(
        (reconciler.wake_at(), reconciler.progress().repaired_total),
        (due + due + ms(100), 2)
    );
}

#[test]
fn linked_domains_wait_for_each_other() {
    let mut reconciler = reconciler();
    let mut plan = service(1);
    plan.merge(service(2));
    plan.links = vec![(1, 2)];
    reconciler.begin(ms(0), plan, 1);
    run(&mut reconciler, ms(0), &[Object::Backend(1)]);
    assert_eq!(reconciler.progress().held, 5, "all but the other backend");
    reconciler.begin(ms(1), service(2), 2);
    assert_eq!(run(&mut reconciler, ms(1), &[]), [], "still one");
    reconciler.begin(ms(100), Plan::default(), 2);
    assert_eq!(run(&mut reconciler, ms(100), &[]).len(), 6);
    assert_eq!(reconciler.progress().held, 0);
}

#[test]
fn an_object_that_is_held_links_the_domains_that_write_it() {
    let mut reconciler = reconciler();
    reconciler.begin(ms(0), service(1), 1);
    run(&mut reconciler, ms(0), &[Object::Backend(1)]);
    let mut other = service(1);
    other.domains = vec![9; 3];
    reconciler.begin(ms(50), other, 2);
    assert_eq!(run(&mut reconciler, ms(50), &[]), []);
    reconciler.begin(ms(100), Plan::default(), 2);
    assert_eq!(run(&mut reconciler, ms(100), &[]), service(1).ops);
}
