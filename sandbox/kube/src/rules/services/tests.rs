//! Tests of the assignment of addresses and node ports.

use super::*;

fn numbers() -> ServiceNumbers {
    let v6 = "fd00::/112".parse().ok();
    ServiceNumbers::new("10.96.0.0/29".parse().ok(), v6, 30000..=30002)
}

fn service(spec: Value) -> Value {
    json!({"metadata": {"name": "s"}, "spec": spec})
}

fn ports() -> Value {
    json!([{"port": 80}])
}

#[test]
fn addresses_are_unique_until_the_network_is_full_and_come_back() {
    let mut numbers = numbers();
    let mut given = BTreeSet::new();
    let mut last = Value::Null;
    for _ in 0..6 {
        last = service(json!({"ports": ports()}));
        numbers.assign(&mut last, None).unwrap();
        assert!(given.insert(last["spec"]["clusterIP"].to_string()));
    }
    let mut more = service(json!({"ports": ports()}));
    assert!(numbers.assign(&mut more, None).is_err());
    numbers.release(&last);
    let mut more = service(json!({"ports": ports()}));
    numbers.assign(&mut more, None).unwrap();
    assert_eq!(more["spec"]["clusterIP"], last["spec"]["clusterIP"]);
}

#[test]
fn dual_stack_headless_and_stable_updates() {
    let mut numbers = numbers();
    let mut dual = service(json!({"ports": ports(), "ipFamilyPolicy": "PreferDualStack"}));
    numbers.assign(&mut dual, None).unwrap();
    assert_eq!(dual["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(dual["spec"]["clusterIPs"].as_array().unwrap().len(), 2);
    let mut update = service(json!({"ports": [{"port": 81}], "ipFamilyPolicy": "PreferDualStack"}));
    numbers.assign(&mut update, Some(&dual)).unwrap();
    assert_eq!(update["spec"]["clusterIPs"], dual["spec"]["clusterIPs"]);
    let mut moved = update.clone();
    moved["spec"]["clusterIP"] = json!("10.96.0.6");
    moved["spec"]["clusterIPs"] = json!(["10.96.0.6"]);
    assert!(numbers.assign(&mut moved, Some(&update)).is_err());
    let mut headless = service(json!({"clusterIP": "None"}));
    numbers.assign(&mut headless, None).unwrap();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
}

#[test]
fn node_ports_are_given_kept_and_refused() {
    let mut numbers = numbers();
    let mut first = service(json!({"type": "NodePort", "ports": ports()}));
    numbers.assign(&mut first, None).unwrap();
    assert_eq!(first["spec"]["ports"][0]["nodePort"], 30000);
    let mut update = service(json!({"type": "NodePort", "ports": [{"port": 80, "targetPort": 8080}]}));
    numbers.assign(&mut update, Some(&first)).unwrap();
    assert_eq!(update["spec"]["ports"][0]["nodePort"], 30000);
    for node_port in [30000, 29999, 30003] {
        let mut bad = service(json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": node_port}]}));
        let before = numbers.used_addresses.clone();
        assert!(numbers.assign(&mut bad, None).is_err(), "{node_port}");
        assert_eq!(numbers.used_addresses, before);
    }
    let mut back = service(json!({"ports": ports()}));
    numbers.assign(&mut back, Some(&update)).unwrap();
    assert_eq!(back["spec"]["ports"][0].get("nodePort"), None);
}
