//! The register of endpoints: idempotent calls, restarts, garbage collection.

use super::*;
use proptest::prelude::*;

fn attachment(number: usize) -> Attachment {
    Attachment {
        container_id: format!("c{number}"),
        ifname: "eth0".into(),
    }
}

fn device(ifindex: u32) -> Device {
    Device {
        netns: "/var/run/netns/x".into(),
        host_ifindex: ifindex,
        host_mac: [2, 0, 0, 0, 0, 1],
        pod_mac: [2, 0, 0, 0, 0, 2],
    }
}

fn endpoints() -> Endpoints {
    let mut endpoints = Endpoints::default();
    endpoints.set_cidrs(
        Some("10.1.1.0/29".parse().unwrap()),
        Some("fd00:1::/64".parse().unwrap()),
    );
    endpoints
}

#[test]
fn allocate_repeats_the_same_answer() {
    let mut endpoints = endpoints();
    let first = endpoints.allocate(attachment(1), Pod::default()).unwrap().clone();
    let again = endpoints.allocate(attachment(1), Pod::default()).unwrap().clone();
    assert_eq!(first, again);
    assert_eq!(first.ipv4.unwrap().to_string(), "10.1.1.2");
    assert_eq!(first.ipv6.unwrap().to_string(), "fd00:1::2");
    assert_eq!(first.host_ifname.len(), 13);
}

#[test]
fn refusals_say_why() {
    let mut none = Endpoints::default();
    assert_eq!(
        none.allocate(attachment(1), Pod::default()),
        Err(EndpointError::NoCidr)
    );
    let mut endpoints = endpoints();
    for number in 0..5 {
        endpoints.allocate(attachment(number), Pod::default()).unwrap();
    }
    let full = endpoints.allocate(attachment(9), Pod::default()).unwrap_err();
    assert_eq!(
        full.to_string(),
        "all 5 addresses of pod CIDR 10.1.1.0/29 are in use"
    );
    assert_eq!(endpoints.can_allocate().unwrap_err(), full);
    // The refused call must not have leaked an IPv6 address.
    assert_eq!(endpoints.pools().last().unwrap().used(), 5);
    let long = Attachment {
        container_id: "x".repeat(513),
        ifname: "eth0".into(),
    };
    assert!(matches!(
        endpoints.allocate(long, Pod::default()),
        Err(EndpointError::Field { .. })
    ));
    assert!(matches!(
        endpoints.attach(&attachment(9), "x", device(1)),
        Err(EndpointError::Unknown { .. })
    ));
    assert!(matches!(
        endpoints.attach(&attachment(1), "x", device(1)),
        Err(EndpointError::WrongInterface { .. })
    ));
}

#[test]
fn check_names_the_difference() {
    let mut endpoints = endpoints();
    let endpoint = endpoints.allocate(attachment(1), Pod::default()).unwrap().clone();
    let ips: Vec<_> = endpoint.ips().collect();
    let check = |endpoints: &Endpoints, ifindex, ips: &[IpAddr]| {
        endpoints
            .check(&attachment(1), &endpoint.host_ifname, ifindex, ips)
            .err()
            .map(|error| error.to_string())
    };
    assert!(check(&endpoints, 7, &ips).unwrap().contains("never created"));
    endpoints
        .attach(&attachment(1), &endpoint.host_ifname, device(7))
        .unwrap();
    assert_eq!(check(&endpoints, 7, &ips), None);
    assert!(check(&endpoints, 8, &ips).unwrap().contains("number 8"));
    assert!(check(&endpoints, 7, &ips[..1]).unwrap().contains("fd00:1::2"));
}

#[test]
fn garbage_is_what_is_not_named() {
    let mut endpoints = endpoints();
    for number in 0..3 {
        endpoints.allocate(attachment(number), Pod::default()).unwrap();
    }
    let valid = [attachment(1), attachment(77)].into_iter().collect();
    assert_eq!(endpoints.not_in(&valid), [attachment(0), attachment(2)]);
}

#[test]
fn contradicting_records_are_left_out() {
    let mut endpoints = endpoints();
    endpoints.allocate(attachment(1), Pod::default()).unwrap();
    let mut saved = endpoints.saved();
    let mut twin = saved.endpoints[0].clone();
    twin.attachment = attachment(2);
    twin.id = 9;
    saved.endpoints.push(twin.clone());
    let (restored, left_out) = Endpoints::restore(saved);
    assert_eq!(restored.len(), 1);
    assert_eq!(left_out, [twin]);
}

proptest! {
    /// Any history of calls, with restarts in between: numbers, addresses and names stay unique.
    #[test]
    fn numbers_addresses_and_names_are_unique(steps in proptest::collection::vec((0usize..12, 0u8..4), 0..120)) {
        let mut endpoints = Endpoints::default();
        let cidrs = (Some("10.1.1.0/28".parse().unwrap()), Some("fd00:1::/124".parse().unwrap()));
        endpoints.set_cidrs(cidrs.0, cidrs.1);
        for (number, action) in steps {
            match action {
                0 | 1 => {
                    let before = endpoints.find(&attachment(number)).cloned();
                    if let (Ok(after), Some(before)) =
                        (endpoints.allocate(attachment(number), Pod::default()), before)
                    {
                        prop_assert_eq!(after, &before);
                    }
                }
                2 => {
                    let had = endpoints.find(&attachment(number)).is_some();
                    prop_assert_eq!(endpoints.release(&attachment(number)).is_some(), had);
                }
                _ => {
                    let saved = endpoints.saved();
                    let (mut restored, left_out) = Endpoints::restore(saved.clone());
                    prop_assert!(left_out.is_empty());
                    restored.set_cidrs(cidrs.0, cidrs.1);
                    prop_assert_eq!(restored.saved(), saved);
                    endpoints = restored;
                }
            }
            let count = endpoints.len();
            let ids: BTreeSet<_> = endpoints.iter().map(|e| e.id).collect();
            let ips: BTreeSet<_> = endpoints.iter().flat_map(Endpoint::ips).collect();
            let names: BTreeSet<_> = endpoints.iter().map(|e| e.host_ifname.clone()).collect();
            prop_assert_eq!((ids.len(), ips.len(), names.len()), (count, 2 * count, count));
            for pool in endpoints.pools() {
                prop_assert_eq!(pool.used(), count);
            }
        }
    }
}
