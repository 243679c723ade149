//! `isthmus bpf lb list`: frontends of the map, with the backend that each slot names.

use std::collections::BTreeMap;

use isthmus_bpf_abi::{
    Backend, BackendKey, SCOPE_EXTERNAL, SCOPE_INTERNAL, ServiceKey, ServiceValue, backend_state,
    service_flag,
};
use serde::Serialize;

use crate::{
    output::{Columns, Format, json},
    view::{protocol, socket_address},
};

/// A frontend and its slots; also the JSON form.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// `address:port`.
    pub address: String,
    /// TCP, UDP, SCTP or a number.
    pub protocol: String,
    /// `external` or `internal`.
    pub scope: String,
    /// Number of the service on this node.
    pub service_id: u32,
    /// `global`, `cluster-ip`.
    pub flags: Vec<&'static str>,
    /// How many slots count. Absent if there are slots without a frontend.
    pub count: Option<u16>,
    /// The slots, in order.
    pub slots: Vec<Slot>,
}

/// A slot and its backend.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// From 1.
    pub slot: u16,
    /// Number of the backend on this node.
    pub backend_id: u32,
    /// `address:port`; absent if the map of backends has no such number.
    pub address: Option<String>,
    /// `active`, `terminating`, `quarantined`; `missing` without a backend.
    pub state: String,
    /// Cluster that it runs in; absent without a backend.
    pub cluster_id: Option<u16>,
    /// Above the count: the programs do not look at it.
    pub unused: bool,
}

/// Joins the two maps: frontends by address, port, protocol and scope.
pub fn resolve(
    services: impl IntoIterator<Item = (ServiceKey, ServiceValue)>,
    backends: impl IntoIterator<Item = (BackendKey, Backend)>,
) -> Vec<Frontend> {
    let backends: BTreeMap<u32, Backend> = backends
        .into_iter()
        .map(|(key, backend)| (key.id, backend))
        .collect();
    let mut frontends = BTreeMap::<_, BTreeMap<u16, ServiceValue>>::new();
    for (key, value) in services {
        // The map's own order is by hash; a slot seen twice while the map changed counts once.
        let frontend = (key.address, key.port, key.proto, key.scope);
        frontends.entry(frontend).or_default().insert(key.slot, value);
    }
    let frontend =
        |((address, port, proto, scope), mut slots): ((_, _, _, _), BTreeMap<u16, ServiceValue>)| {
            let head = slots.remove(&0);
            let count = head.map(|head| head.count);
            Frontend {
                address: socket_address(&address, port),
                protocol: protocol(proto),
                scope: match scope {
                    SCOPE_EXTERNAL => "external".into(),
                    SCOPE_INTERNAL => "internal".into(),
                    other => other.to_string(),
                },
                service_id: head
                    .or(slots.values().next().copied())
                    .map_or(0, |value| value.service_id),
                flags: head.map_or(vec![], |head| flags(head.flags)),
                count,
                slots: slots
                    .into_iter()
                    .map(|(number, value)| slot(number, value, count, &backends))
                    .collect(),
            }
        };
    frontends.into_iter().map(frontend).collect()
}

fn slot(number: u16, value: ServiceValue, count: Option<u16>, backends: &BTreeMap<u32, Backend>) -> Slot {
    let backend = backends.get(&value.backend_id);
    Slot {
        slot: number,
        backend_id: value.backend_id,
        address: backend.map(|backend| socket_address(&backend.address, backend.port)),
        state: match backend.map(|backend| backend.state) {
            None => "missing".into(),
            Some(backend_state::ACTIVE) => "active".into(),
            Some(backend_state::TERMINATING) => "terminating".into(),
            Some(backend_state::QUARANTINED) => "quarantined".into(),
            Some(other) => other.to_string(),
        },
        cluster_id: backend.map(|backend| backend.cluster_id),
        unused: count.is_none_or(|count| number > count),
    }
}

fn flags(bits: u16) -> Vec<&'static str> {
    [
        (service_flag::GLOBAL, "global"),
        (service_flag::CLUSTER_IP, "cluster-ip"),
    ]
    .into_iter()
    .filter_map(|(bit, name)| (bits & bit != 0).then_some(name))
    .collect()
}

/// Whether every slot that counts has its backend. If not, the maps may have changed while they were read.
pub fn is_whole(frontends: &[Frontend]) -> bool {
    let mut slots = frontends.iter().flat_map(|frontend| &frontend.slots);
    slots.all(|slot| slot.unused || slot.address.is_some())
}

/// The text: a line per slot.
pub fn render(frontends: &[Frontend], format: Format) -> String {
    if format == Format::Json {
        return json(&frontends);
    }
    let wide = format == Format::Wide;
    let mut headings = vec![
        "FRONTEND",
        "PROTOCOL",
        "ID",
        "FLAGS",
        "SLOT",
        "BACKEND",
        "STATE",
        "CLUSTER-ID",
    ];
    if wide {
        headings.extend(["SCOPE", "BACKEND-ID"]);
    }
    let mut columns = Columns::new(&headings, &["ID", "CLUSTER-ID", "BACKEND-ID"]);
    for frontend in frontends {
        let mut row = |slot: String, backend: &str, state: String, cluster: Option<u16>, id: Option<u32>| {
            let mut cells = vec![
                frontend.address.clone(),
                frontend.protocol.clone(),
                frontend.service_id.to_string(),
                frontend.flags.join(","),
                slot,
                backend.to_owned(),
                state,
                cluster.map(|cluster| cluster.to_string()).unwrap_or_default(),
            ];
            if wide {
                cells.extend([
                    frontend.scope.clone(),
                    id.map(|id| id.to_string()).unwrap_or_default(),
                ]);
            }
            columns.row(cells);
        };
        if frontend.count == Some(0) && frontend.slots.is_empty() {
            row("0/0".into(), "", "no backend".into(), None, None);
        }
        let count = frontend.count.map_or("?".into(), |count| count.to_string());
        for slot in &frontend.slots {
            let unused = if slot.unused { ", unused" } else { "" };
            row(
                format!("{}/{count}", slot.slot),
                slot.address.as_deref().unwrap_or_default(),
                format!("{}{unused}", slot.state),
                slot.cluster_id,
                Some(slot.backend_id),
            );
        }
        // The programs would refuse a connection that chose one of these.
        for missing in 1..=frontend.count.unwrap_or_default() {
            if !frontend.slots.iter().any(|slot| slot.slot == missing) {
                row(format!("{missing}/{count}"), "", "no slot".into(), None, None);
            }
        }
    }
    columns.finish("No frontends.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_bpf_abi::{PROTO_TCP, ipv4_mapped};
    use proptest::prelude::*;

    fn backend(id: u32, last: u8, state: u8, cluster_id: u16) -> (BackendKey, Backend) {
        let address = ipv4_mapped([10, 1, 0, last]);
        let port = 8080_u16.to_be_bytes();
        (
            BackendKey { id },
            Backend {
                address,
                port,
                proto: PROTO_TCP,
                state,
                cluster_id,
                zone: 0,
                pad: 0,
            },
        )
    }

    type Maps = (Vec<(ServiceKey, ServiceValue)>, Vec<(BackendKey, Backend)>);

    fn maps() -> Maps {
        let key = ServiceKey::frontend(ipv4_mapped([10, 96, 0, 10]), 80, PROTO_TCP);
        let other = ServiceKey::frontend(
            [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            443,
            PROTO_TCP,
        );
        let flags = service_flag::GLOBAL | service_flag::CLUSTER_IP;
        let services = vec![
            (key.at_slot(2), ServiceValue::slot(3, 8)),
            (key.at_slot(3), ServiceValue::slot(3, 99)),
            (key, ServiceValue::frontend(3, 2, flags)),
            (key.at_slot(1), ServiceValue::slot(3, 7)),
            (other, ServiceValue::frontend(4, 0, service_flag::CLUSTER_IP)),
        ];
        (
            services,
            vec![
                backend(8, 3, backend_state::QUARANTINED, 2),
                backend(7, 2, backend_state::ACTIVE, 1),
            ],
        )
    }

    #[test]
    fn slots_show_their_backends() {
        let (services, backends) = maps();
        let want = "\
FRONTEND        PROTOCOL   ID   FLAGS               SLOT   BACKEND         STATE             CLUSTER-ID
10.96.0.10:80   TCP         3   global,cluster-ip   1/2    10.1.0.2:8080   active                     1
10.96.0.10:80   TCP         3   global,cluster-ip   2/2    10.1.0.3:8080   quarantined                2
10.96.0.10:80   TCP         3   global,cluster-ip   3/2    -               missing, unused            -
[fd00::1]:443   TCP         4   cluster-ip          0/0    -               no backend                 -
";
        let frontends = resolve(services, backends);
        assert_eq!(render(&frontends, Format::Table), want);
        assert!(is_whole(&frontends), "an unused slot may name anything");
    }

    #[test]
    fn a_slot_without_its_backend_is_not_whole() {
        let (services, mut backends) = maps();
        backends.pop();
        assert!(!is_whole(&resolve(services, backends)));
    }

    #[test]
    fn a_slot_that_is_absent_is_said() {
        let (mut services, backends) = maps();
        services.retain(|(key, _)| key.slot != 1);
        let text = render(&resolve(services, backends), Format::Wide);
        assert!(text.contains("1/2    -               no slot"), "{text}");
        assert_eq!(render(&[], Format::Table), "No frontends.\n");
    }

    #[test]
    fn json_names_are_stable() {
        let (services, backends) = maps();
        let value: serde_json::Value =
            serde_json::from_str(&render(&resolve(services, backends), Format::Json)).unwrap();
        let slot = serde_json::json!({
            "slot": 1, "backendId": 7, "address": "10.1.0.2:8080", "state": "active", "clusterId": 1, "unused": false
        });
        assert_eq!(value[0]["slots"][0], slot);
        assert_eq!(value[0]["scope"], "external");
    }

    proptest! {
        /// The maps' own order does not show.
        #[test]
        fn order_does_not_matter(order in Just((0..5usize).collect::<Vec<_>>()).prop_shuffle()) {
            let (services, backends) = maps();
            let shuffled: Vec<_> = order.into_iter().map(|at| services[at]).collect();
            prop_assert_eq!(resolve(shuffled, backends.clone()), resolve(services, backends));
        }
    }
}
