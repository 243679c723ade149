//! Incremental against from-scratch, and single facts.

use isthmus_k8s::annotations;
use isthmus_model::{ClusterId, ClusterName};
use k8s_openapi::{
    api::{
        core::v1::{NodeSpec, PodIP, PodSpec, PodStatus, ServicePort, ServiceSpec},
        discovery::v1::{Endpoint, EndpointPort},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use proptest::prelude::*;

use super::*;

mod world;
use world::*;

#[test]
fn a_global_service_is_published_everywhere_and_a_plain_one_locally() {
    let mut run = Run::new();
    run.put(object_namespace(0, 0));
    run.put(object_service(0, Flavor::Plain));
    run.put(object_slice(0, 0, 2));
    assert_eq!(
        run.keys(),
        [
            "isthmus/local/services/v1/c1/n0/s0",
            "isthmus/local/slices/v1/c1/n0/s0/e0"
        ]
    );
    run.put(object_service(0, Flavor::Global));
    let global = run.keys();
    assert_eq!(
        global,
        [
            "cilium/state/services/v1/c1/n0/s0",
            "isthmus/local/services/v1/c1/n0/s0",
            "isthmus/local/slices/v1/c1/n0/s0/e0",
            "isthmus/state/services/v1/c1/n0/s0",
            "isthmus/state/slices/v1/c1/n0/s0/e0",
        ]
    );
    run.put(object_service(0, Flavor::NotShared));
    assert_eq!(run.keys().len(), 2);
    run.put(object_service(0, Flavor::Global));
    assert_eq!(run.keys(), global);
    run.delete(object_service(0, Flavor::Global));
    assert_eq!(run.keys(), Vec::<String>::new());
}

#[test]
fn one_changed_endpoint_changes_its_slice_and_the_blob() {
    let mut run = Run::new();
    run.put(object_service(0, Flavor::Global));
    run.put(object_slice(0, 0, 90));
    run.put(object_slice(1, 0, 90));
    let changes = run.put(object_slice(1, 0, 91));
    let keys: Vec<_> = changes
        .iter()
        .map(|change| String::from_utf8_lossy(&change.key))
        .collect();
    assert_eq!(
        keys,
        [
            "isthmus/local/slices/v1/c1/n0/s0/e1",
            "isthmus/state/slices/v1/c1/n0/s0/e1",
            "cilium/state/services/v1/c1/n0/s0"
        ]
    );
}

#[test]
fn identities_come_before_the_addresses_that_name_them() {
    let mut run = Run::new();
    run.put(object_namespace(0, 0));
    let changes = run.put(object_pod(0, 0, 1, 7));
    let keys: Vec<_> = changes
        .iter()
        .map(|change| String::from_utf8_lossy(&change.key).into_owned())
        .collect();
    assert_eq!(keys.len(), 2);
    assert!(keys[0].starts_with("cilium/state/identities/v1/id/"), "{keys:?}");
    assert_eq!(keys[1], "cilium/state/ip/v1/default/10.1.0.7");
}

#[test]
fn a_relabelled_namespace_gives_each_of_its_pods_another_identity_in_place() {
    let mut run = Run::new();
    run.put(object_namespace(0, 0));
    run.put(object_namespace(1, 0));
    for (number, namespace) in [(0, 0), (1, 0), (2, 1)] {
        run.put(object_pod(number, namespace, number, number + 1));
    }
    let changes = run.put(object_namespace(0, 1));
    let keys: Vec<_> = changes
        .iter()
        .map(|change| String::from_utf8_lossy(&change.key).into_owned())
        .collect();
    assert!(changes.iter().all(|change| change.value.is_some()), "{keys:?}");
    let identity = |key: &String| key.starts_with("cilium/state/identities/");
    let (identities, addresses) = keys.split_at(2);
    assert!(identities.iter().all(identity), "{keys:?}");
    let want = ["10.1.0.1", "10.1.0.2"].map(|ip| format!("cilium/state/ip/v1/default/{ip}"));
    assert_eq!(addresses, want, "and no pod of another namespace");
}

#[test]
fn a_deleted_service_takes_its_slices_along_and_gets_them_back() {
    let mut run = Run::new();
    run.put(object_slice(0, 1, 3));
    assert_eq!(
        run.keys(),
        Vec::<String>::new(),
        "slices of a service that is not there"
    );
    let puts = run.put(object_service(1, Flavor::Global));
    let there = run.keys();
    assert_eq!(puts.len(), there.len());
    // Its slices are deleted by Kubernetes some time later; pods live on.
    let gone = run.delete(object_service(1, Flavor::Global));
    assert!(gone.iter().all(|change| change.value.is_none()), "{gone:?}");
    assert_eq!(run.keys(), Vec::<String>::new());
    run.put(object_service(1, Flavor::Global));
    assert_eq!(run.keys(), there);
}

#[test]
fn an_address_that_moves_to_another_pod_is_never_absent() {
    let mut run = Run::new();
    run.put(object_namespace(0, 0));
    run.put(object_pod(0, 0, 1, 7));
    let both = run.put(object_pod(1, 0, 2, 7));
    assert!(both.iter().all(|change| change.value.is_some()));
    let gone = run.delete(object_pod(0, 0, 1, 7));
    assert!(gone.iter().all(|change| change.value.is_some()), "{gone:?}");
    let value = &run.published["cilium/state/ip/v1/default/10.1.0.7".as_bytes()];
    assert!(String::from_utf8_lossy(value).contains(r#""K8sPodName":"p1""#));
}

#[test]
fn a_pod_waits_for_its_namespace() {
    let mut run = Run::new();
    assert_eq!(run.put(object_pod(0, 0, 1, 7)), []);
    assert_eq!(run.put(object_namespace(0, 0)).len(), 2);
}

#[test]
fn unused_identities_go_after_the_grace_period() {
    let mut run = Run::new();
    run.put(object_namespace(0, 0));
    run.put(object_pod(0, 0, 1, 7));
    run.delete(object_pod(0, 0, 1, 7));
    assert_eq!(run.keys().len(), 1);
    run.now += RETENTION.grace;
    run.state.collect(run.now);
    run.settle();
    assert_eq!(run.keys(), Vec::<String>::new());
}

#[test]
fn a_problem_is_reported_once_until_the_object_changes() {
    let mut run = Run::new();
    let Object::Service(mut service) = object_service(0, Flavor::Global) else {
        unreachable!()
    };
    let affinity = (annotations::AFFINITY[0].to_owned(), "near".to_owned());
    service
        .metadata
        .annotations
        .get_or_insert_default()
        .extend([affinity]);
    let put = |service: &Service| Input::Service(Event::Apply(service.clone()));
    assert_eq!(run.state.on(put(&service)).len(), 1);
    assert_eq!(run.state.on(put(&service)), []);
    service
        .metadata
        .annotations
        .get_or_insert_default()
        .remove(annotations::AFFINITY[0]);
    assert_eq!(run.state.on(put(&service)), []);
    assert_eq!(
        run.state
            .on(Input::Service(Event::Apply(Service::default())))
            .len(),
        1
    );
}

#[test]
fn nothing_is_desired_before_the_identities_were_taken_over() {
    let mut state = State::new(settings());
    state.on(object_namespace(0, 0).put());
    state.on(object_pod(0, 0, 1, 7).put());
    assert_eq!(state.desired(Duration::ZERO), []);
    assert!(state.everything().is_empty());
    let key = format!("cilium/state/identities/v1/id/{}", 65_536 + 77);
    let value = "k8s:app=1;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=n0;\
                 k8s:io.cilium.k8s.namespace.labels.v=0;k8s:io.cilium.k8s.policy.cluster=c1;\
                 k8s:io.kubernetes.pod.namespace=n0;";
    let stored = [
        (key.as_bytes(), value.as_bytes()),
        (b"cilium/state/identities/v1/id/x".as_slice(), b"".as_slice()),
    ];
    let refused = state.activate(stored, 1, Duration::ZERO);
    assert_eq!(refused.len(), 1);
    let desired = state.desired(Duration::ZERO);
    assert_eq!(desired.len(), 2, "{desired:?}");
    assert_eq!(desired[0].key, key.as_bytes());
    assert_eq!(desired[0].value.as_deref(), Some(value.as_bytes()));
    state.deactivate();
    assert_eq!(state.desired(Duration::ZERO), []);
}

#[test]
fn cilium_services_can_be_switched_off() {
    let mut run = Run::with(Settings {
        cilium_services: false,
        ..settings()
    });
    run.put(object_service(0, Flavor::Global));
    assert!(
        run.keys()
            .iter()
            .all(|key| !key.starts_with("cilium/state/services"))
    );
    assert_eq!(run.keys().len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn incremental_equals_from_scratch(steps in proptest::collection::vec(step(), 1..60)) {
        let mut run = Run::new();
        let mut objects = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(object) => {
                    run.put(object.clone());
                    // The same object again changes nothing.
                    prop_assert_eq!(run.put(object.clone()), []);
                    objects.insert(object.key(), object);
                }
                Step::Delete(object) => {
                    run.delete(object.clone());
                    objects.remove(&object.key());
                }
                Step::Relist(kind, drop) => {
                    if drop {
                        objects.retain(|(of, key), _| *of != kind || key.name.ends_with('0'));
                    }
                    for input in relist(kind, objects.values()) {
                        run.state.on(input);
                    }
                    run.settle();
                }
                Step::Wait(seconds) => {
                    run.now += Duration::from_secs(seconds);
                    run.state.collect(run.now);
                    run.settle();
                }
            }
            prop_assert_eq!(&run.published, &run.state.everything());
        }
        // Another process that starts now, from what etcd holds, wants the same to the byte.
        let mut fresh = State::new(settings());
        for kind in Kind::ALL {
            for input in relist(kind, objects.values()) {
                fresh.on(input);
            }
        }
        prop_assert!(fresh.is_synced());
        let stored = run.published.iter().filter(|(key, _)| key.starts_with(b"cilium/state/identities/"));
        let refused = fresh.activate(stored.map(|(key, value)| (&key[..], &value[..])), 4711, run.now);
        prop_assert!(refused.is_empty());
        let mut published = BTreeMap::new();
        apply(&mut published, &fresh.desired(run.now));
        prop_assert_eq!(&published, &run.published);
        prop_assert_eq!(fresh.desired(run.now), []);
    }
}
