//! Packing of endpoints into slices: bounded, and stable under change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use k8s_openapi::{
    api::discovery::v1::{EndpointConditions, EndpointPort},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use proptest::prelude::*;

use super::*;

fn cluster() -> Cluster {
    Cluster {
        name: ClusterName::new("c1").unwrap(),
        id: ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
    }
}

fn object(ips: impl IntoIterator<Item = String>) -> EndpointSlice {
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some("cart-x7k2p".into()),
            namespace: Some("shop".into()),
            labels: Some([(SERVICE_NAME.to_owned(), "cart".to_owned())].into()),
            ..Default::default()
        },
        address_type: "IPv4".into(),
        ports: Some(vec![EndpointPort {
            name: Some("http".into()),
            port: Some(8080),
            ..Default::default()
        }]),
        endpoints: ips
            .into_iter()
            .map(|ip| Endpoint {
                addresses: vec![ip],
                ..Default::default()
            })
            .collect(),
    }
}

fn packed(object: &EndpointSlice) -> Converted<PackedSlice> {
    pack(object, &cluster()).unwrap().unwrap()
}

fn members(ips: &BTreeSet<u32>) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let object = object(ips.iter().map(|ip| Ipv4Addr::from(*ip).to_string()));
    let slices = packed(&object).value.slices;
    slices
        .into_iter()
        .map(|slice| {
            (
                slice.slice.into(),
                slice.endpoints.iter().map(|endpoint| endpoint.ip).collect(),
            )
        })
        .collect()
}

#[test]
fn a_small_slice_keeps_its_name() {
    let Converted { value, warnings } = packed(&object(["10.1.0.2".to_owned(), "10.1.0.1".to_owned()]));
    assert_eq!(warnings, []);
    assert_eq!(value.service.to_string(), "shop/cart");
    assert_eq!(value.slices.len(), 1);
    assert_eq!(&*value.slices[0].slice, "cart-x7k2p");
    assert_eq!(
        value.slices[0].endpoints[0],
        SliceEndpoint::ready("10.1.0.1".parse().unwrap())
    );
    assert_eq!(value.slices[0].ports[0].port, 8080);
}

#[test]
fn what_is_not_ours_to_publish_is_none() {
    let none = |change: fn(&mut EndpointSlice)| {
        let mut object = object(["10.1.0.1".to_owned()]);
        change(&mut object);
        assert_eq!(pack(&object, &cluster()).unwrap(), None);
    };
    none(|object| object.address_type = "FQDN".into());
    none(|object| object.metadata.labels = None);
    none(|object| {
        let label = (MANAGED_BY.to_owned(), MESH_CONTROLLER.to_owned());
        object.metadata.labels.get_or_insert_default().extend([label]);
    });
}

#[test]
fn conditions_have_kubernetes_defaults() {
    let check = |conditions: Option<[Option<bool>; 3]>, want: [bool; 3]| {
        let mut object = object(["10.1.0.1".to_owned()]);
        object.endpoints[0].conditions = conditions.map(|[ready, serving, terminating]| EndpointConditions {
            ready,
            serving,
            terminating,
        });
        let value = packed(&object).value;
        let endpoint = &value.slices[0].endpoints[0];
        assert_eq!(
            [endpoint.ready, endpoint.serving, endpoint.terminating],
            want,
            "{conditions:?}"
        );
    };
    check(None, [true, true, false]);
    check(Some([None, None, None]), [true, true, false]);
    check(Some([Some(false), None, None]), [false, false, false]);
    check(Some([Some(false), Some(true), Some(true)]), [false, true, true]);
}

#[test]
fn bad_addresses_and_ports_are_left_out_and_named() {
    let mut object = object(["10.1.0.1".to_owned(), "fd00::1".to_owned(), "x".to_owned()]);
    let port = |port, protocol: Option<&str>| EndpointPort {
        port,
        protocol: protocol.map(str::to_owned),
        ..Default::default()
    };
    object.ports = Some(vec![
        port(None, None),
        port(Some(0), None),
        port(Some(1), Some("X")),
        port(Some(1), Some("UDP")),
    ]);
    object.metadata.annotations = Some([(annotations::WEIGHT.to_owned(), "heavy".to_owned())].into());
    let Converted { value, warnings } = packed(&object);
    assert_eq!(warnings.len(), 6);
    assert_eq!(
        (value.slices[0].endpoints.len(), value.slices[0].ports.len()),
        (1, 1)
    );
}

#[test]
fn an_address_that_is_listed_twice_counts_once_at_its_best() {
    let mut object = object(["10.1.0.1".to_owned(), "10.1.0.1".to_owned()]);
    let conditions = EndpointConditions {
        ready: Some(false),
        serving: Some(true),
        terminating: Some(true),
    };
    for place in 0..2 {
        object.endpoints[place].conditions = Some(conditions.clone());
        object.endpoints[1 - place].conditions = None;
        let value = packed(&object).value;
        assert_eq!(value.slices[0].endpoints.len(), 1);
        assert!(value.slices[0].endpoints[0].ready);
    }
}

#[test]
fn a_weight_holds_for_all_endpoints_and_no_endpoints_are_no_slices() {
    let mut weighed = object(["10.1.0.1".to_owned()]);
    weighed.metadata.annotations = Some([(annotations::WEIGHT.to_owned(), "0".to_owned())].into());
    assert_eq!(packed(&weighed).value.slices[0].endpoints[0].weight, 0);
    assert!(packed(&object([])).value.slices.is_empty());
}

#[test]
fn names_of_parts_stay_within_a_keys_limit_and_apart() {
    let (long, other) = (format!("{}a", "x".repeat(252)), format!("{}b", "x".repeat(252)));
    let bits = "01".repeat(96);
    for name in [part_name(&long, "0"), part_name(&long, &bits)] {
        assert!(name.len() <= NAME_LEN_MAX, "{name}");
    }
    assert_ne!(part_name(&long, "0"), part_name(&other, "0"));
    assert_eq!(part_name("a", ""), "a");
    assert_eq!(part_name("a", "01"), "a~01");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_endpoint_is_in_exactly_one_part_of_at_most_100(ips in proptest::collection::btree_set(any::<u32>(), 0..1000)) {
        let parts = members(&ips);
        let all: Vec<IpAddr> = parts.values().flatten().copied().collect();
        let want: BTreeSet<IpAddr> = ips.iter().map(|ip| Ipv4Addr::from(*ip).into()).collect();
        prop_assert_eq!(all.len(), want.len());
        prop_assert_eq!(all.into_iter().collect::<BTreeSet<_>>(), want);
        prop_assert!(parts.values().all(|part| (1..=Slice::MAX_ENDPOINTS).contains(&part.len())));
    }

    #[test]
    fn one_endpoint_more_touches_one_part_and_its_halves(
        base in any::<u32>(), len in 0u32..1000, extra in any::<u32>(),
    ) {
        // Neighbouring addresses, as a pod CIDR hands them out.
        let mut ips: BTreeSet<u32> = (0..len).map(|offset| base.wrapping_add(offset)).collect();
        let before = members(&ips);
        ips.insert(extra);
        let after = members(&ips);
        let gone: Vec<_> = before.iter().filter(|(name, part)| after.get(*name) != Some(part)).collect();
        let fresh: Vec<_> = after.iter().filter(|(name, part)| before.get(*name) != Some(part)).collect();
        prop_assert!(gone.len() <= 1, "{gone:?}");
        // A part of 101 splits, nearly always in two; hashes would have to agree in many bits for more.
        prop_assert!(fresh.len() <= 2, "{fresh:?}");
    }

    #[test]
    fn parts_do_not_depend_on_the_order(ips in proptest::collection::vec(any::<u32>(), 0..400)) {
        let texts: Vec<String> = ips.iter().map(|ip| Ipv4Addr::from(*ip).to_string()).collect();
        let forward = packed(&object(texts.clone()));
        let backward = packed(&object(texts.into_iter().rev()));
        prop_assert_eq!(forward, backward);
    }
}
