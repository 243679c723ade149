//! Grants as text and as judge.

use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters, SliceEndpoint};
use proptest::prelude::*;

use super::*;

const FILE: &str = "endpoints: ['https://c2:2379']\nisthmus-accept:\n  identities: [131072-135000, 7]\n  \
                    pod-cidrs: [10.2.0.0/16, 'fd00:2::/48']\n  node-cidrs: [172.18.2.0/24]\n  \
                    namespaces: [shop, 'team-*']\n  services: ['shop/cart', 'team-*/*']\n  \
                    max-entries: {nodes: 10, ip: 20}\n  max-bytes: 64Mi\n";

fn grants(accept: &str) -> Grants {
    Grants::parse(&format!("isthmus-accept: {accept}")).unwrap()
}

fn entry(prefix: &str, identity: u32) -> IpEntry {
    IpEntry {
        prefix: prefix.parse::<IpNet>().unwrap(),
        host_ip: Some("172.18.2.3".parse().unwrap()),
        identity: NumericIdentity(identity),
        encryption_key: 0,
        namespace: "shop".into(),
        pod_name: String::new(),
        service_account: String::new(),
        named_ports: vec![],
    }
}

fn reason(result: Result<(), Refusal>) -> &'static str {
    result.map_or_else(|refusal| refusal.reason(), |()| "granted")
}

#[test]
fn files_without_grants_restrict_nothing_and_have_no_fingerprint() {
    for text in ["", "endpoints: [a]", "isthmus-accept: {}", "[1]"] {
        assert_eq!(Grants::parse(text).unwrap(), Grants::default(), "{text}");
    }
    assert_eq!(Grants::default().fingerprint(), 0);
    let (a, b) = (grants("{pod-cidrs: []}"), grants("{node-cidrs: []}"));
    assert_ne!(a.fingerprint(), b.fingerprint());
    assert_eq!(a.fingerprint(), grants("{pod-cidrs: []}").fingerprint());
    assert_eq!(Grants::default().bytes_max(), BYTES_MAX_DEFAULT);
    let grants = Grants::parse(FILE).unwrap();
    assert_eq!(
        (grants.bytes_max(), grants.entries_max(Kind::Ip)),
        (64 << 20, Some(20))
    );
}

#[test]
fn mistakes_are_refused_by_name() {
    for (accept, words) in [
        ("", "nothing"),
        ("[a]", "a list"),
        ("{pod-cidr: [10.0.0.0/8]}", "pod-cidr"),
        ("{pod-cidrs: }", "nothing"),
        ("{pod-cidrs: 10.0.0.0/8}", "10.0.0.0/8"),
        ("{pod-cidrs: [10.0.0.1/8]}", "10.0.0.1/8"),
        ("{pod-cidrs: [10.0.0]}", "CIDRs"),
        ("{identities: [9-8]}", "9-8"),
        ("{identities: [-1]}", "-1"),
        ("{namespaces: [Shop]}", "Shop"),
        ("{namespaces: ['']}", "namespaces"),
        ("{services: [cart]}", "<namespace>/<name>"),
        ("{services: ['a/b/c']}", "a/b/c"),
        ("{max-entries: {pods: 1}}", "pods"),
        ("{max-entries: {nodes: -1}}", "nodes"),
        ("{max-entries: {nodes: 10000001}}", "10000001"),
        ("{max-bytes: 1GB}", "1GB"),
        ("{max-bytes: 99999999999Gi}", "Gi"),
    ] {
        let error = Grants::parse(&format!("isthmus-accept: {accept}")).unwrap_err();
        assert!(error.to_string().contains(words), "{accept}: {error}");
    }
    let error = Grants::parse("isthmus-acept: {}").unwrap_err().to_string();
    assert!(error.contains("isthmus-acept"), "{error}");
}

#[test]
fn addresses_lie_where_they_may() {
    let grants = Grants::parse(FILE).unwrap();
    let check = |prefix: &str, identity| reason(grants.ip(&entry(prefix, identity)));
    assert_eq!(check("10.2.3.4/32", 131_073), "granted");
    assert_eq!(check("10.2.3.0/24", 131_073), "granted");
    assert_eq!(check("fd00:2::5/128", 135_000), "granted");
    assert_eq!(check("10.3.0.1/32", 131_073), "not_granted_cidr");
    assert_eq!(
        check("10.0.0.0/8", 131_073),
        "not_granted_cidr",
        "wider than the grant"
    );
    assert_eq!(check("0.0.0.0/0", 2), "not_granted_cidr");
    assert_eq!(check("10.2.3.4/32", 135_001), "not_granted_identity");
    assert_eq!(check("172.18.2.9/32", 6), "granted", "a node's own address");
    assert_eq!(check("172.18.2.9/32", 131_073), "not_granted_cidr");
    assert_eq!(check("10.2.3.4/32", 7), "granted", "a privilege that is given");
    assert_eq!(check("10.2.3.4/32", 200), "not_granted_identity");
    let mut tunnel = entry("10.2.3.4/32", 131_073);
    tunnel.host_ip = Some("10.9.9.9".parse().unwrap());
    assert_eq!(reason(grants.ip(&tunnel)), "not_granted_cidr");
    let mut foreign = entry("10.2.3.4/32", 131_073);
    foreign.namespace = "kube-system".into();
    assert_eq!(reason(grants.ip(&foreign)), "not_granted_namespace");
    // Without node-cidrs a node's identity opens no way around pod-cidrs.
    let pods_only = super::tests::grants("{pod-cidrs: [10.2.0.0/16]}");
    assert_eq!(reason(pods_only.ip(&entry("10.1.0.5/32", 6))), "not_granted_cidr");
    let refusal = pods_only.ip(&entry("10.1.0.5/32", 6)).unwrap_err().to_string();
    assert!(
        refusal.contains("10.1.0.5 is not granted") && refusal.contains("pod-cidrs"),
        "{refusal}"
    );
}

fn node() -> Node {
    let max = MaxConnectedClusters::C255;
    Node {
        name: "n1".into(),
        cluster: ClusterName::new("c2").unwrap(),
        cluster_id: ClusterId::new(2, max).unwrap(),
        internal_ips: vec!["172.18.2.3".parse().unwrap()],
        external_ips: vec![],
        router_ips: vec!["10.2.0.1".parse().unwrap()],
        ipv4_alloc_cidr: Some("10.2.0.0/24".parse().unwrap()),
        ipv6_alloc_cidr: None,
        ipv4_health_ip: None,
        ipv6_health_ip: None,
        encryption_key: 0,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        identity: NumericIdentity::REMOTE_NODE,
        wireguard_public_key: String::new(),
        boot_id: String::new(),
    }
}

#[test]
fn nodes_are_judged_by_all_their_addresses() {
    let grants = Grants::parse(FILE).unwrap();
    let check = |change: fn(&mut Node)| {
        let mut node = node();
        change(&mut node);
        reason(grants.node(&node, &node::encode(&node)))
    };
    assert_eq!(check(|_| {}), "granted");
    assert_eq!(
        check(|node| node.internal_ips = vec!["10.1.0.1".parse().unwrap()]),
        "not_granted_cidr"
    );
    assert_eq!(
        check(|node| node.external_ips = vec!["8.8.8.8".parse().unwrap()]),
        "not_granted_cidr"
    );
    assert_eq!(
        check(|node| node.router_ips = vec!["10.1.0.1".parse().unwrap()]),
        "not_granted_cidr"
    );
    assert_eq!(
        check(|node| node.ipv4_alloc_cidr = Some("10.0.0.0/8".parse().unwrap())),
        "not_granted_cidr"
    );
    assert_eq!(
        check(|node| node.ipv4_health_ip = Some("10.1.0.1".parse().unwrap())),
        "not_granted_cidr"
    );
    assert_eq!(
        check(|node| node.identity = NumericIdentity(9)),
        "not_granted_identity"
    );
    // What our model has no place for, other readers use.
    let text = String::from_utf8(node::encode(&node())).unwrap();
    for (from, to) in [
        (
            "\"IPv4SecondaryAllocCIDRs\":null",
            "\"IPv4SecondaryAllocCIDRs\":[{\"IP\":\"10.1.0.0\",\"Mask\":\"////AA==\"}]",
        ),
        ("\"IPv4IngressIP\":\"\"", "\"IPv4IngressIP\":\"10.1.0.1\""),
    ] {
        let lie = text.replace(from, to);
        assert_ne!(lie, text);
        assert_eq!(
            reason(grants.node(&node(), lie.as_bytes())),
            "not_granted_cidr",
            "{to}"
        );
    }
}

#[test]
fn services_and_identities_stay_in_their_namespaces() {
    let grants = Grants::parse(FILE).unwrap();
    let max = MaxConnectedClusters::C255;
    let check = |namespace: &str, name: &str, backend: &str| {
        let slice = Slice {
            cluster: ClusterName::new("c2").unwrap(),
            cluster_id: ClusterId::new(2, max).unwrap(),
            service: ServiceName::new(namespace, name).unwrap(),
            slice: "s".into(),
            ports: vec![],
            endpoints: vec![SliceEndpoint::ready(backend.parse().unwrap())],
        };
        reason(grants.slice(&slice))
    };
    assert_eq!(check("shop", "cart", "10.2.0.9"), "granted");
    assert_eq!(
        check("team-a", "x", "172.18.2.9"),
        "granted",
        "a pod in the node's network"
    );
    assert_eq!(check("shop", "db", "10.2.0.9"), "not_granted_service");
    assert_eq!(check("kube-system", "dns", "10.2.0.9"), "not_granted_namespace");
    assert_eq!(check("shop", "cart", "10.1.0.9"), "not_granted_cidr");
    let identity = |text: &str| {
        let labels = Labels::parse(text).unwrap();
        reason(grants.identity_labels(NumericIdentity(131_073), &labels))
    };
    assert_eq!(identity("k8s:io.kubernetes.pod.namespace=shop;"), "granted");
    assert_eq!(
        identity("k8s:io.kubernetes.pod.namespace=prod;"),
        "not_granted_namespace"
    );
    assert_eq!(
        identity("any:io.kubernetes.pod.namespace=shop;"),
        "not_granted_namespace"
    );
    assert_eq!(identity("k8s:app=a;"), "not_granted_namespace");
}

/// Whether `pattern` matches `name`, by trying every way.
fn matches_slowly(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skipped| matches_slowly(rest, &name[skipped..])),
        Some((byte, rest)) => name.first() == Some(byte) && matches_slowly(rest, &name[1..]),
    }
}

proptest! {
    #[test]
    fn patterns_match_as_they_say(pattern in "[ab*]{0,8}", name in "[ab]{0,10}") {
        prop_assert_eq!(Pattern(pattern.clone()).matches(&name), matches_slowly(pattern.as_bytes(), name.as_bytes()));
    }

    #[test]
    fn an_address_passes_if_and_only_if_a_grant_contains_it(
        cidrs in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..4),
        address in any::<u32>(),
        len in 0u8..=32,
        inside in any::<bool>(),
    ) {
        let cidrs: Vec<IpNet> = cidrs
            .into_iter()
            .map(|(address, len)| IpNet::new(IpAddr::V4(address.into()), len).unwrap().trunc())
            .collect();
        // Random addresses hardly ever hit: half of them begin with a grant.
        let mut net = IpNet::new(IpAddr::V4(address.into()), len).unwrap();
        if let (true, Some(IpNet::V4(first))) = (inside, cidrs.first()) {
            let bits = u32::from(first.network()) | (address & u32::from(first.hostmask()));
            net = IpNet::new(IpAddr::V4(bits.into()), len.max(first.prefix_len())).unwrap();
        }
        let net = net.trunc();
        let list: Vec<String> = cidrs.iter().map(|cidr| format!("'{cidr}'")).collect();
        let grants = grants(&format!("{{pod-cidrs: [{}]}}", list.join(",")));
        let contained = cidrs.iter().any(|cidr| {
            let (IpNet::V4(cidr), IpNet::V4(net)) = (cidr, &net) else { return false };
            cidr.network() <= net.network() && net.broadcast() <= cidr.broadcast()
        });
        let mut entry = entry("10.0.0.1/32", 131_073);
        entry.prefix = net;
        prop_assert_eq!(grants.ip(&entry).is_ok(), contained);
    }

    #[test]
    fn hostile_text_never_panics(text in ".{0,200}") {
        let _ = Grants::parse(&text);
        let _ = Grants::parse(&format!("isthmus-accept: {text}"));
    }
}
