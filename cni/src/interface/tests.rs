//! Allocations and earlier results become interfaces or are refused; every missing piece is a difference.

use super::*;
use crate::config::{PrevInterface, PrevIp};
use proptest::prelude::*;

fn attachment() -> Attachment {
    Attachment {
        container_id: "c".into(),
        ifname: "eth0".into(),
    }
}

fn allocation() -> AllocateResponse {
    AllocateResponse {
        endpoint_id: 7,
        ipv4: "10.1.0.9".into(),
        ipv6: "fd00::9".into(),
        ipv4_gateway: "10.1.0.1".into(),
        ipv6_gateway: "fd00::1".into(),
        mtu: 1450,
        host_ifname: "lxc7".into(),
    }
}

fn interface() -> Interface {
    Interface::from_allocation(&attachment(), &allocation()).unwrap()
}

#[test]
fn an_allocation_may_have_one_family() {
    let answer = AllocateResponse {
        ipv4: String::new(),
        ipv4_gateway: String::new(),
        ..allocation()
    };
    let interface = Interface::from_allocation(&attachment(), &answer).unwrap();
    assert_eq!(interface.families.len(), 1);
    assert_eq!(interface.families[0].host_prefix(), 128);
}

#[test]
fn wrong_allocations_are_refused() {
    let wrong = [
        AllocateResponse {
            endpoint_id: 0,
            ..allocation()
        },
        AllocateResponse {
            endpoint_id: 65_536,
            ..allocation()
        },
        AllocateResponse {
            host_ifname: "no/slash".into(),
            ..allocation()
        },
        AllocateResponse {
            ipv4: "fd00::9".into(),
            ..allocation()
        },
        AllocateResponse {
            ipv4: "0.0.0.0".into(),
            ..allocation()
        },
        AllocateResponse {
            ipv4_gateway: String::new(),
            ..allocation()
        },
        AllocateResponse {
            ipv4_gateway: "10.1.0.9".into(),
            ..allocation()
        },
        AllocateResponse {
            ipv4: String::new(),
            ipv6: String::new(),
            ..allocation()
        },
        AllocateResponse {
            mtu: 1279,
            ..allocation()
        },
        AllocateResponse {
            mtu: 65_536,
            ..allocation()
        },
    ];
    for answer in wrong {
        assert!(
            Interface::from_allocation(&attachment(), &answer).is_err(),
            "{answer:?}"
        );
    }
}

fn prev_result() -> PrevResult {
    let end = |name: &str, sandbox: &str| PrevInterface {
        name: name.into(),
        mac: String::new(),
        sandbox: sandbox.into(),
    };
    PrevResult {
        interfaces: vec![end("lxc7", ""), end("eth0", "/run/netns/p")],
        ips: vec![
            PrevIp {
                address: "10.1.0.9/32".into(),
                gateway: Some("10.1.0.1".parse().unwrap()),
            },
            PrevIp {
                address: "fd00::9/128".into(),
                gateway: Some("fd00::1".parse().unwrap()),
            },
        ],
    }
}

#[test]
fn an_earlier_result_is_the_same_interface() {
    let found = Interface::from_result(&attachment(), &prev_result()).unwrap();
    assert_eq!(
        found,
        Interface {
            mtu: None,
            ..interface()
        }
    );
}

#[test]
fn results_of_others_are_refused() {
    let mut wrong = vec![PrevResult::default(); 1];
    for change in [
        (|result: &mut PrevResult| result.ips.clear()) as fn(&mut PrevResult),
        |result| result.ips[0].address = "10.1.0.9/24".into(),
        |result| result.ips[0].address = "10.1.0.9".into(),
        |result| result.ips[1].gateway = None,
        |result| drop(result.interfaces.remove(0)),
        |result| result.interfaces[1].name = "eth1".into(),
    ] {
        let mut result = prev_result();
        change(&mut result);
        wrong.push(result);
    }
    for result in wrong {
        assert!(
            Interface::from_result(&attachment(), &result).is_err(),
            "{result:?}"
        );
    }
}

fn observed(interface: &Interface) -> (Observed, Observed) {
    let link = |index, name: &str, peer, last| Link {
        index,
        name: name.into(),
        mac: Mac([2, 0, 0, 0, 0, last]),
        mtu: 1450,
        up: true,
        veth: true,
        peer: Some(peer),
        alias: String::new(),
    };
    let none = |link| Observed {
        link,
        addresses: vec![],
        routes: vec![],
        neighbours: vec![],
    };
    let (mut pod, mut host) = (none(link(2, "eth0", 9, 1)), none(link(9, "lxc7", 2, 2)));
    for family in &interface.families {
        let (bits, ipv4) = (family.host_prefix(), family.address.is_ipv4());
        pod.addresses.push((family.address, bits));
        pod.routes.push(Route {
            destination: Some((family.gateway, bits)),
            gateway: None,
            ipv4,
        });
        pod.routes.push(Route {
            destination: None,
            gateway: Some(family.gateway),
            ipv4,
        });
        pod.neighbours.push((family.gateway, host.link.mac));
        host.routes.push(Route {
            destination: Some((family.address, bits)),
            gateway: None,
            ipv4,
        });
        host.neighbours.push((family.address, pod.link.mac));
    }
    (pod, host)
}

#[test]
fn missing_ends_are_one_difference() {
    let interface = interface();
    let (pod, host) = observed(&interface);
    assert_eq!(
        differences(&interface, Some(&pod), Some(&host)),
        Vec::<String>::new()
    );
    assert_eq!(
        differences(&interface, None, Some(&host)),
        ["the pod has no interface eth0"]
    );
    assert_eq!(
        differences(&interface, Some(&pod), None),
        ["the node has no interface lxc7"]
    );
    let mut other = host.clone();
    other.link.index = 10;
    assert_eq!(differences(&interface, Some(&pod), Some(&other)).len(), 1);
}

proptest! {
    /// Whatever single piece is taken away, exactly one sentence names it.
    #[test]
    fn each_missing_piece_is_one_difference(piece in 0usize..5, second in any::<bool>()) {
        let interface = interface();
        let (mut pod, mut host) = observed(&interface);
        let at = usize::from(second);
        match piece {
            0 => drop(pod.addresses.remove(at)),
            1 => drop(pod.routes.remove(2 * at + usize::from(second))),
            2 => drop(pod.neighbours.remove(at)),
            3 => drop(host.routes.remove(at)),
            _ => drop(host.neighbours.remove(at)),
        }
        prop_assert_eq!(differences(&interface, Some(&pod), Some(&host)).len(), 1);
    }

    #[test]
    fn hostile_allocations_never_panic(id in any::<u32>(), text in proptest::array::uniform5(".{0,20}"), mtu in any::<u32>()) {
        let [ipv4, ipv6, ipv4_gateway, ipv6_gateway, host_ifname] = text;
        let answer = AllocateResponse { endpoint_id: id, ipv4, ipv6, ipv4_gateway, ipv6_gateway, mtu, host_ifname };
        if let Ok(interface) = Interface::from_allocation(&attachment(), &answer) {
            prop_assert!(!interface.families.is_empty());
        }
    }
}
