//! The pure part of the EndpointSlice controller.
//!
//! In: a Service, the pods that its selector matches, zones of nodes, and its existing slices. Out: slices to create,
//! update and delete. Invariants: an endpoint that stays keeps its slice; a slice without a change is not written; no
//! slice has more than [`SLICE_LEN_MAX`] endpoints; an endpoint is in one slice of its family and ports; a Service with
//! a selector always has at least one slice of each of its families.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::Name;
use crate::controllers::pods;
use crate::meta;

/// Endpoints of one slice at most.
pub const SLICE_LEN_MAX: usize = 100;

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// What a round writes.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// New slices.
    pub create: Vec<Value>,
    /// Slices with new content.
    pub update: Vec<Value>,
    /// Names of slices that go.
    pub delete: Vec<String>,
}

/// The zone of a node, or "".
pub fn zone_of(node: &Value) -> &str {
    meta::label(node, "topology.kubernetes.io/zone").unwrap_or("")
}

/// The service that a slice of this controller belongs to.
pub fn service_of(slice: &Value) -> Option<Name> {
    let ours = meta::label(slice, MANAGED_BY) == Some(CONTROLLER);
    let name = meta::label(slice, SERVICE_NAME).filter(|_| ours)?;
    Some((meta::namespace(slice).to_owned(), name.to_owned()))
}

/// Whether this controller made the slice for this service.
pub fn is_of(slice: &Value, service: &str) -> bool {
    service_of(slice).is_some_and(|(_, name)| name == service)
}

/// Whether two states of a pod make the same endpoints.
pub fn looks_same(old: &Value, new: &Value) -> bool {
    let view = |pod: &Value| {
        (
            pod["metadata"]["labels"].clone(),
            pod["status"]["podIPs"].clone(),
            pod["status"]["podIP"].clone(),
            pods::node_of(pod).to_owned(),
            pods::is_ready(pod),
            pods::is_over(pod),
            meta::is_terminating(pod),
        )
    };
    view(old) == view(new)
}

/// Endpoints by the port list that they answer on (as JSON text), then by pod UID.
type Groups = BTreeMap<String, BTreeMap<String, Value>>;

/// Decides a round.
pub fn plan(service: &Value, pods: &[&Value], zones: &BTreeMap<&str, &str>, existing: &[&Value]) -> Plan {
    let mut plan = Plan::default();
    let families: Vec<&str> = meta::list_at(service, &["spec", "ipFamilies"])
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let external = meta::str_at(service, &["spec", "type"]) == "ExternalName";
    for family in ["IPv4", "IPv6"] {
        let of_family: Vec<&Value> = existing
            .iter()
            .copied()
            .filter(|slice| meta::str_at(slice, &["addressType"]) == family)
            .collect();
        if external || !families.contains(&family) {
            plan.delete
                .extend(of_family.iter().map(|slice| meta::name(slice).to_owned()));
            continue;
        }
        plan_family(
            service,
            family,
            groups(service, family, pods, zones),
            &of_family,
            &mut plan,
        );
    }
    plan
}

fn plan_family(service: &Value, family: &str, mut groups: Groups, existing: &[&Value], plan: &mut Plan) {
    let labels = labels_of(service);
    let no_ports = json!([]).to_string();
    if groups.is_empty() {
        // A placeholder says that the service has no endpoints; the ports of the slice that is left may stay.
        let keep = existing.iter().min_by_key(|slice| meta::name(slice).to_owned());
        let ports = keep.map_or(no_ports, |slice| slice["ports"].to_string());
        groups.insert(ports, BTreeMap::new());
    }
    let mut handled: BTreeSet<&str> = BTreeSet::new();
    for (ports, wanted) in groups {
        let ports: Value = serde_json::from_str(&ports).unwrap_or_default();
        let mut of_ports: Vec<&Value> = existing
            .iter()
            .copied()
            .filter(|slice| slice["ports"] == ports)
            .collect();
        of_ports.sort_by_key(|slice| meta::name(slice).to_owned());
        handled.extend(of_ports.iter().map(|slice| meta::name(slice)));
        plan_group(service, family, &ports, &labels, wanted, &of_ports, plan);
    }
    let stale = existing
        .iter()
        .map(|slice| meta::name(slice))
        .filter(|name| !handled.contains(name));
    plan.delete.extend(stale.map(str::to_owned));
}

fn plan_group(
    service: &Value,
    family: &str,
    ports: &Value,
    labels: &Map<String, Value>,
    mut wanted: BTreeMap<String, Value>,
    existing: &[&Value],
    plan: &mut Plan,
) {
    // What stays, slice by slice, in its present order.
    let mut kept: Vec<(&Value, Vec<Value>)> = Vec::new();
    for slice in existing {
        let mut endpoints = Vec::new();
        for endpoint in meta::list_at(slice, &["endpoints"]) {
            let uid = meta::str_at(endpoint, &["targetRef", "uid"]);
            if let Some(endpoint) = wanted.remove(uid) {
                endpoints.push(endpoint);
            }
        }
        kept.push((slice, endpoints));
    }
    // What is new fills the slices that change anyway, then others with room, the fullest first.
    let mut rest: Vec<Value> = wanted.into_values().collect();
    rest.reverse();
    let mut order: Vec<usize> = (0..kept.len()).collect();
    order.sort_by_key(|&at| {
        let (slice, endpoints) = &kept[at];
        let changes = endpoints.as_slice() != meta::list_at(slice, &["endpoints"]);
        (!changes, std::cmp::Reverse(endpoints.len()), at)
    });
    for at in order {
        while kept[at].1.len() < SLICE_LEN_MAX
            && let Some(endpoint) = rest.pop()
        {
            kept[at].1.push(endpoint);
        }
    }
    rest.reverse();
    let any_kept = kept.iter().any(|(_, endpoints)| !endpoints.is_empty()) || !rest.is_empty();
    let mut placeholder_left = !any_kept;
    for (slice, endpoints) in kept {
        if endpoints.is_empty() && !std::mem::take(&mut placeholder_left) {
            plan.delete.push(meta::name(slice).to_owned());
            continue;
        }
        let same_labels = meta::labels(slice) == Some(labels);
        if same_labels && endpoints.as_slice() == meta::list_at(slice, &["endpoints"]) {
            continue;
        }
        let mut updated = slice.clone();
        updated["endpoints"] = Value::Array(endpoints);
        updated["metadata"]["labels"] = Value::Object(labels.clone());
        plan.update.push(updated);
    }
    let empty = [];
    let chunks: Vec<&[Value]> = if placeholder_left {
        vec![&empty[..]]
    } else {
        rest.chunks(SLICE_LEN_MAX).collect()
    };
    for endpoints in chunks {
        plan.create.push(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": format!("{}-", meta::name(service)),
                "labels": labels,
                "ownerReferences": [meta::controller_reference(service, "v1", "Service")],
            },
            "addressType": family,
            "endpoints": endpoints,
            "ports": ports,
        }));
    }
}

/// The service's own labels, and those of the controller.
fn labels_of(service: &Value) -> Map<String, Value> {
    let mut labels = meta::labels(service).cloned().unwrap_or_default();
    labels.remove(HEADLESS);
    if meta::str_at(service, &["spec", "clusterIP"]) == "None" {
        labels.insert(HEADLESS.into(), json!(""));
    }
    labels.insert(SERVICE_NAME.into(), json!(meta::name(service)));
    labels.insert(MANAGED_BY.into(), json!(CONTROLLER));
    labels
}

fn groups(service: &Value, family: &str, pods: &[&Value], zones: &BTreeMap<&str, &str>) -> Groups {
    let mut groups = Groups::new();
    for pod in pods.iter().filter(|pod| !pods::is_over(pod)) {
        let addresses = addresses_of(pod, family);
        if addresses.is_empty() {
            continue;
        }
        let endpoint = endpoint(service, pod, &addresses, zones);
        let ports = ports_of(service, pod).to_string();
        groups
            .entry(ports)
            .or_default()
            .insert(meta::uid(pod).to_owned(), endpoint);
    }
    groups
}

fn addresses_of<'a>(pod: &'a Value, family: &str) -> Vec<&'a str> {
    let mut all: Vec<&str> = meta::list_at(pod, &["status", "podIPs"])
        .iter()
        .map(|entry| meta::str_at(entry, &["ip"]))
        .collect();
    if all.is_empty() {
        all.push(meta::str_at(pod, &["status", "podIP"]));
    }
    let is_v6 = family == "IPv6";
    all.retain(|address| !address.is_empty() && address.contains(':') == is_v6);
    all
}

fn endpoint(service: &Value, pod: &Value, addresses: &[&str], zones: &BTreeMap<&str, &str>) -> Value {
    let serving = pods::is_ready(pod);
    let terminating = meta::is_terminating(pod);
    let ready = meta::bool_at(service, &["spec", "publishNotReadyAddresses"]) || (serving && !terminating);
    let mut endpoint = json!({
        "addresses": addresses,
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "targetRef": {
            "kind": "Pod",
            "namespace": meta::namespace(pod),
            "name": meta::name(pod),
            "uid": meta::uid(pod),
        },
    });
    let node = pods::node_of(pod);
    if !node.is_empty() {
        endpoint["nodeName"] = json!(node);
    }
    if let Some(zone) = zones.get(node).filter(|zone| !zone.is_empty()) {
        endpoint["zone"] = json!(zone);
    }
    let hostname = meta::str_at(pod, &["spec", "hostname"]);
    if !hostname.is_empty() && meta::str_at(pod, &["spec", "subdomain"]) == meta::name(service) {
        endpoint["hostname"] = json!(hostname);
    }
    endpoint
}

/// The service's ports as this pod serves them; a named port that the pod lacks is left out.
fn ports_of(service: &Value, pod: &Value) -> Value {
    let mut ports = Vec::new();
    for port in meta::list_at(service, &["spec", "ports"]) {
        let protocol = meta::str_at(port, &["protocol"]);
        let number = match meta::at(port, &["targetPort"]) {
            Some(Value::String(name)) => named_port(pod, name, protocol),
            Some(number) => number.as_i64(),
            None => meta::int_at(port, &["port"]),
        };
        let Some(number) = number else { continue };
        let mut entry = json!({"name": meta::str_at(port, &["name"]), "port": number, "protocol": protocol});
        if let Some(protocol) = meta::at(port, &["appProtocol"]) {
            entry["appProtocol"] = protocol.clone();
        }
        ports.push(entry);
    }
    Value::Array(ports)
}

fn named_port(pod: &Value, name: &str, protocol: &str) -> Option<i64> {
    let containers = meta::list_at(pod, &["spec", "containers"]).iter();
    let found = containers
        .flat_map(|container| meta::list_at(container, &["ports"]))
        .find(|port| {
            meta::str_at(port, &["name"]) == name && meta::str_at(port, &["protocol"]) == protocol
        })?;
    meta::int_at(found, &["containerPort"])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn service(extra: Value) -> Value {
        let mut service = json!({
            "metadata": {"name": "s", "namespace": "ns", "uid": "s", "labels": {"own": "1"}},
            "spec": {"clusterIP": "10.0.0.1", "ipFamilies": ["IPv4"], "ports": [{"name": "", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
        });
        json_patch::merge(&mut service, &extra);
        service
    }

    fn pod(id: usize, ready: bool, extra: Value) -> Value {
        let status = if ready { "True" } else { "False" };
        let mut pod = json!({
            "metadata": {"name": format!("p{id}"), "namespace": "ns", "uid": format!("u{id:04}")},
            "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "web", "containerPort": 8000 + id, "protocol": "TCP"}]}]},
            "status": {
                "phase": "Running",
                "podIPs": [{"ip": format!("10.1.{}.{}", id / 250, id % 250)}, {"ip": format!("fd00::{id:x}")}],
                "conditions": [{"type": "Ready", "status": status}],
            },
        });
        json_patch::merge(&mut pod, &extra);
        pod
    }

    fn round(service: &Value, pods: &[Value], existing: &[Value]) -> Plan {
        let zones = BTreeMap::from([("n", "z1")]);
        plan(
            service,
            &pods.iter().collect::<Vec<_>>(),
            &zones,
            &existing.iter().collect::<Vec<_>>(),
        )
    }

    #[test]
    fn conditions_are_those_of_kubernetes() {
        let gone = json!({"metadata": {"deletionTimestamp": "2020-01-01T00:00:00Z"}});
        let pods = [
            pod(0, true, json!({})),
            pod(1, false, json!({})),
            pod(2, true, gone.clone()),
            pod(3, false, gone),
        ];
        let check = |service: &Value, ready: [bool; 4]| {
            let plan = round(service, &pods, &[]);
            let endpoints = plan.create[0]["endpoints"].as_array().unwrap();
            let got: Vec<Value> = endpoints.iter().map(|e| e["conditions"].clone()).collect();
            let want: Vec<Value> = [(true, false), (false, false), (true, true), (false, true)]
                .into_iter()
                .zip(ready)
                .map(|((serving, terminating), ready)| json!({"ready": ready, "serving": serving, "terminating": terminating}))
                .collect();
            assert_eq!(got, want);
            assert_eq!(
                (endpoints[0]["zone"].as_str(), endpoints[0]["nodeName"].as_str()),
                (Some("z1"), Some("n"))
            );
        };
        check(&service(json!({})), [true, false, false, false]);
        check(
            &service(json!({"spec": {"publishNotReadyAddresses": true}})),
            [true; 4],
        );
    }

    #[test]
    fn named_ports_make_groups_and_families_make_slices() {
        let named = service(
            json!({"spec": {"ipFamilies": ["IPv6", "IPv4"], "ports": [{"name": "x", "port": 80, "protocol": "TCP", "targetPort": "web"}]}}),
        );
        let plan = round(&named, &[pod(1, true, json!({})), pod(2, true, json!({}))], &[]);
        let seen: BTreeSet<(String, i64)> = plan
            .create
            .iter()
            .map(|s| {
                (
                    s["addressType"].as_str().unwrap().to_owned(),
                    s["ports"][0]["port"].as_i64().unwrap(),
                )
            })
            .collect();
        let want = [("IPv4", 8001), ("IPv4", 8002), ("IPv6", 8001), ("IPv6", 8002)];
        assert_eq!(seen, want.into_iter().map(|(f, p)| (f.to_owned(), p)).collect());
    }

    #[test]
    fn ended_pods_and_pods_without_an_address_are_left_out() {
        let pods = [
            pod(1, true, json!({"status": {"phase": "Failed"}})),
            pod(2, true, json!({"status": {"podIPs": []}})),
        ];
        let plan = round(&service(json!({})), &pods, &[]);
        assert_eq!(plan.create.len(), 1, "a placeholder");
        assert_eq!(plan.create[0]["endpoints"], json!([]));
    }

    /// Applies a plan as the server would.
    fn apply(plan: Plan, existing: &mut Vec<Value>, next: &mut usize) {
        existing.retain(|slice| !plan.delete.iter().any(|name| name == meta::name(slice)));
        for update in plan.update {
            let slot = existing
                .iter_mut()
                .find(|s| meta::name(s) == meta::name(&update))
                .unwrap();
            *slot = update;
        }
        for mut slice in plan.create {
            *next += 1;
            slice["metadata"]["name"] = json!(format!("s-{next:05}"));
            slice["metadata"]["namespace"] = json!("ns");
            existing.push(slice);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn slices_hold_exactly_the_pods_and_settle(rounds in prop::collection::vec(
            prop::collection::btree_map(0usize..400, any::<bool>(), 0..300), 1..5,
        )) {
            let service = service(json!({}));
            let (mut existing, mut next) = (Vec::new(), 0);
            for wanted in rounds {
                let pods: Vec<Value> = wanted.iter().map(|(id, ready)| pod(*id, *ready, json!({}))).collect();
                let before: BTreeMap<String, String> = homes(&existing);
                apply(round(&service, &pods, &existing), &mut existing, &mut next);
                let after = homes(&existing);
                let want: BTreeSet<String> = wanted.keys().map(|id| format!("u{id:04}")).collect();
                prop_assert_eq!(&after.keys().cloned().collect::<BTreeSet<_>>(), &want);
                for (uid, home) in &after {
                    prop_assert!(before.get(uid).is_none_or(|old| old == home), "{} moved", uid);
                }
                prop_assert!(existing.iter().all(|s| s["endpoints"].as_array().unwrap().len() <= SLICE_LEN_MAX));
                prop_assert!(!existing.is_empty());
                prop_assert_eq!(round(&service, &pods, &existing), Plan::default());
            }
        }
    }

    /// In which slice each pod is.
    fn homes(slices: &[Value]) -> BTreeMap<String, String> {
        let mut homes = BTreeMap::new();
        for slice in slices {
            for endpoint in slice["endpoints"].as_array().unwrap() {
                let uid = endpoint["targetRef"]["uid"].as_str().unwrap().to_owned();
                assert!(homes.insert(uid, meta::name(slice).to_owned()).is_none(), "twice");
            }
        }
        homes
    }
}
