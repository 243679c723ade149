//! `isthmus bpf ipcache list`: prefixes with identity and tunnel endpoint.

use std::net::IpAddr;

use isthmus_bpf_abi::{FAMILY_IPV4, IpcacheKey, IpcacheValue, ipcache_flag};
use serde::Serialize;

use crate::{
    output::{Columns, Format, json},
    view::ip,
};

/// JSON form.
#[derive(Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// With prefix length.
    pub prefix: String,
    /// Security identity.
    pub identity: u32,
    /// The node to send to; absent if it is reached directly.
    pub tunnel_endpoint: Option<IpAddr>,
    /// Encryption key index; 0 for none.
    pub encrypt_key: u8,
    /// Of another cluster.
    pub remote_cluster: bool,
    /// Sent without encapsulation.
    pub skip_tunnel: bool,
    /// Nothing answers there.
    pub unroutable: bool,
    /// 0 unless clusters have overlapping addresses.
    pub cluster_id: u16,
}

/// From the map's entries, by family, address, length.
pub fn entries(map: impl IntoIterator<Item = (IpcacheKey, IpcacheValue)>) -> Vec<Entry> {
    let mut map: Vec<_> = map.into_iter().collect();
    map.sort_unstable_by_key(|(key, _)| (key.cluster_id, key.family, key.address, key.prefix_len));
    map.dedup_by_key(|(key, _)| *key);
    map.into_iter().map(|(key, value)| entry(&key, &value)).collect()
}

fn entry(key: &IpcacheKey, value: &IpcacheValue) -> Entry {
    let address = if key.family == FAMILY_IPV4 {
        let [a, b, c, d, ..] = key.address;
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(key.address)
    };
    let flag = |bit| value.flags & bit != 0;
    let bits = key
        .address_bits()
        .map_or_else(|| "?".into(), |bits| bits.to_string());
    Entry {
        prefix: format!("{address}/{bits}"),
        identity: value.identity,
        tunnel_endpoint: ip(&value.tunnel_endpoint).filter(|_| flag(ipcache_flag::HAS_TUNNEL_ENDPOINT)),
        encrypt_key: value.key,
        remote_cluster: flag(ipcache_flag::REMOTE_CLUSTER),
        skip_tunnel: flag(ipcache_flag::SKIP_TUNNEL),
        unroutable: flag(ipcache_flag::UNROUTABLE),
        cluster_id: key.cluster_id,
    }
}

/// The text.
pub fn render(entries: &[Entry], format: Format) -> String {
    if format == Format::Json {
        return json(&entries);
    }
    let wide = format == Format::Wide;
    let mut headings = vec!["PREFIX", "IDENTITY", "TUNNEL-ENDPOINT", "FLAGS"];
    if wide {
        headings.extend(["ENCRYPT-KEY", "CLUSTER-ID"]);
    }
    let mut columns = Columns::new(&headings, &["IDENTITY", "ENCRYPT-KEY", "CLUSTER-ID"]);
    for entry in entries {
        let flags = [
            (entry.remote_cluster, "remote-cluster"),
            (entry.skip_tunnel, "skip-tunnel"),
            (entry.unroutable, "unroutable"),
        ];
        let flags: Vec<_> = flags
            .into_iter()
            .filter_map(|(set, name)| set.then_some(name))
            .collect();
        let mut row = vec![
            entry.prefix.clone(),
            entry.identity.to_string(),
            entry.tunnel_endpoint.map(|ip| ip.to_string()).unwrap_or_default(),
            flags.join(","),
        ];
        if wide {
            row.extend([entry.encrypt_key.to_string(), entry.cluster_id.to_string()]);
        }
        columns.row(row);
    }
    columns.finish("The ipcache is empty.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_bpf_abi::ipv4_mapped;

    #[test]
    fn entries_are_in_order() {
        let node = ipv4_mapped([172, 16, 0, 2]);
        let mut pod6 = [0; 16];
        (pod6[0], pod6[15]) = (0xfd, 9);
        let map = [
            (IpcacheKey::ipv6(pod6, 128), IpcacheValue::direct(65_540, 0)),
            (
                IpcacheKey::ipv4([10, 2, 0, 9], 32),
                IpcacheValue::tunnel(131_073, node, 0, ipcache_flag::REMOTE_CLUSTER),
            ),
            (
                IpcacheKey::ipv4([10, 1, 0, 0], 24),
                IpcacheValue::direct(2, ipcache_flag::UNROUTABLE),
            ),
            (
                IpcacheKey::ipv4([10, 1, 0, 0], 24),
                IpcacheValue::direct(2, ipcache_flag::UNROUTABLE),
            ),
        ];
        let want = "\
PREFIX        IDENTITY   TUNNEL-ENDPOINT   FLAGS
10.1.0.0/24          2   -                 unroutable
10.2.0.9/32     131073   172.16.0.2        remote-cluster
fd00::9/128      65540   -                 -
";
        let entries = entries(map);
        assert_eq!(render(&entries, Format::Table), want);
        let value: serde_json::Value = serde_json::from_str(&render(&entries, Format::Json)).unwrap();
        assert_eq!(value[1]["tunnelEndpoint"], "172.16.0.2");
        assert_eq!(
            (&value[1]["remoteCluster"], &value[0]["tunnelEndpoint"]),
            (&true.into(), &serde_json::Value::Null)
        );
    }
}
