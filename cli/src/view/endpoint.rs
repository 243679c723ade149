//! `isthmus bpf endpoint list`: the map of local endpoints and the node's own addresses.

use std::net::IpAddr;

use isthmus_bpf_abi::{Endpoint, EndpointKey, endpoint_flag};
use serde::Serialize;

use crate::{
    output::{Columns, Format, json},
    view::{ip, mac},
};

/// JSON form.
#[derive(Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// The endpoint's address.
    pub address: Option<IpAddr>,
    /// The node's own address.
    pub host: bool,
    /// Number on this node; 0 for the node.
    pub endpoint_id: u32,
    /// Security identity.
    pub identity: u32,
    /// The node's end of the veth pair; 0 for the node.
    pub ifindex: u32,
    /// MAC address of the pod's end; empty for the node.
    pub pod_mac: String,
    /// MAC address of the node's end; empty for the node.
    pub host_mac: String,
}

/// From the map's entries: the node's first, then by number and address.
pub fn entries(map: impl IntoIterator<Item = (EndpointKey, Endpoint)>) -> Vec<Entry> {
    let mut map: Vec<_> = map.into_iter().collect();
    map.sort_unstable_by_key(|(key, endpoint)| {
        (
            endpoint.flags & endpoint_flag::HOST == 0,
            endpoint.endpoint_id,
            key.address,
        )
    });
    map.dedup_by_key(|(key, _)| *key);
    let entry = |(key, endpoint): (EndpointKey, Endpoint)| Entry {
        address: ip(&key.address),
        host: endpoint.flags & endpoint_flag::HOST != 0,
        endpoint_id: endpoint.endpoint_id,
        identity: endpoint.identity,
        ifindex: endpoint.ifindex,
        pod_mac: mac(&endpoint.pod_mac),
        host_mac: mac(&endpoint.host_mac),
    };
    map.into_iter().map(entry).collect()
}

/// The text.
pub fn render(entries: &[Entry], format: Format) -> String {
    if format == Format::Json {
        return json(&entries);
    }
    let wide = format == Format::Wide;
    let mut headings = vec!["ADDRESS", "ENDPOINT", "IDENTITY", "IFINDEX"];
    if wide {
        headings.extend(["POD-MAC", "HOST-MAC"]);
    }
    let mut columns = Columns::new(&headings, &["IDENTITY", "IFINDEX"]);
    for entry in entries {
        let number = |number: u32| {
            if number == 0 {
                String::new()
            } else {
                number.to_string()
            }
        };
        let mut row = vec![
            entry.address.map(|ip| ip.to_string()).unwrap_or_default(),
            if entry.host {
                "(node)".into()
            } else {
                number(entry.endpoint_id)
            },
            entry.identity.to_string(),
            number(entry.ifindex),
        ];
        if wide {
            row.extend([entry.pod_mac.clone(), entry.host_mac.clone()]);
        }
        columns.row(row);
    }
    columns.finish("No endpoints.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_bpf_abi::ipv4_mapped;

    #[test]
    fn the_node_comes_first() {
        let key = |last| EndpointKey {
            address: ipv4_mapped([10, 1, 0, last]),
        };
        let pod = Endpoint {
            ifindex: 12,
            endpoint_id: 3,
            identity: 65_540,
            flags: 0,
            pod_mac: [2, 0, 0, 0, 0, 1],
            host_mac: [2, 0, 0, 0, 0, 2],
        };
        let entries = entries([(key(9), pod), (key(1), Endpoint::host(1))]);
        let want = "\
ADDRESS    ENDPOINT   IDENTITY   IFINDEX   POD-MAC             HOST-MAC
10.1.0.1   (node)            1         -   -                   -
10.1.0.9   3             65540        12   02:00:00:00:00:01   02:00:00:00:00:02
";
        assert_eq!(render(&entries, Format::Wide), want);
        let value: serde_json::Value = serde_json::from_str(&render(&entries, Format::Json)).unwrap();
        assert_eq!(
            (&value[0]["host"], &value[1]["endpointId"]),
            (&true.into(), &3.into())
        );
    }
}
