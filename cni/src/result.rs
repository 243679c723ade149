//! Results on standard output, in the configuration's version.
//!
//! In: what was made. Out: JSON text. Pure.

use serde::Serialize;

use crate::{
    interface::{Interface, Link},
    version::CniVersion,
};

/// JSON text of `value`, ending in a newline.
pub(crate) fn json(value: &impl Serialize) -> String {
    // Our own structs have string keys and no failing serializers.
    let mut text = serde_json::to_string(value).unwrap_or_default();
    text.push('\n');
    text
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AddResult<'a> {
    cni_version: &'a str,
    interfaces: [ResultInterface<'a>; 2],
    ips: Vec<ResultIp>,
    routes: Vec<ResultRoute>,
    dns: Dns,
}

#[derive(Serialize)]
struct ResultInterface<'a> {
    name: &'a str,
    mac: String,
    /// Since 1.1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    sandbox: &'a str,
}

#[derive(Serialize)]
struct ResultIp {
    /// Before 1.0.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    address: String,
    gateway: String,
    /// Position in `interfaces`.
    interface: usize,
}

#[derive(Serialize)]
struct ResultRoute {
    dst: &'static str,
    gw: String,
}

/// Cluster DNS is the kubelet's affair.
#[derive(Serialize)]
struct Dns {}

/// The result of ADD: the node's end, then the pod's in `netns`.
pub fn add(version: CniVersion, interface: &Interface, host: &Link, pod: &Link, netns: &str) -> String {
    let end = |link: &'_ Link, name, sandbox| ResultInterface {
        name,
        mac: link.mac.to_string(),
        mtu: (version >= CniVersion::V1_1_0).then_some(link.mtu),
        sandbox,
    };
    let mut ips = Vec::new();
    let mut routes = Vec::new();
    for family in &interface.families {
        let (number, default) = if family.address.is_ipv4() {
            ("4", "0.0.0.0/0")
        } else {
            ("6", "::/0")
        };
        ips.push(ResultIp {
            version: (version < CniVersion::V1_0_0).then_some(number),
            address: format!("{}/{}", family.address, family.host_prefix()),
            gateway: family.gateway.to_string(),
            interface: 1,
        });
        routes.push(ResultRoute {
            dst: default,
            gw: family.gateway.to_string(),
        });
    }
    json(&AddResult {
        cni_version: version.as_str(),
        interfaces: [
            end(host, &interface.host_ifname, ""),
            end(pod, &interface.ifname, netns),
        ],
        ips,
        routes,
        dns: Dns {},
    })
}

/// The result of VERSION.
pub fn versions(version: CniVersion) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions<'a> {
        cni_version: &'a str,
        supported_versions: [&'static str; CniVersion::ALL.len()],
    }
    json(&Versions {
        cni_version: version.as_str(),
        supported_versions: CniVersion::ALL.map(CniVersion::as_str),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::{Family, Mac};
    use serde_json::{Value, json};

    fn link(last: u8) -> Link {
        Link {
            index: u32::from(last),
            name: "x".into(),
            mac: Mac([2, 0, 0, 0, 0, last]),
            mtu: 1450,
            up: true,
            veth: true,
            peer: None,
            alias: String::new(),
        }
    }

    fn result(version: CniVersion) -> Value {
        let interface = Interface {
            ifname: "eth0".into(),
            host_ifname: "lxc1".into(),
            mtu: Some(1450),
            families: vec![
                Family {
                    address: "10.1.0.9".parse().unwrap(),
                    gateway: "10.1.0.1".parse().unwrap(),
                },
                Family {
                    address: "fd00::9".parse().unwrap(),
                    gateway: "fd00::1".parse().unwrap(),
                },
            ],
        };
        serde_json::from_str(&add(version, &interface, &link(1), &link(2), "/run/netns/p")).unwrap()
    }

    #[test]
    fn newest_result() {
        assert_eq!(
            result(CniVersion::V1_1_0),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "lxc1", "mac": "02:00:00:00:00:01", "mtu": 1450},
                    {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": "/run/netns/p"}
                ],
                "ips": [
                    {"address": "10.1.0.9/32", "gateway": "10.1.0.1", "interface": 1},
                    {"address": "fd00::9/128", "gateway": "fd00::1", "interface": 1}
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}, {"dst": "::/0", "gw": "fd00::1"}],
                "dns": {}
            })
        );
    }

    #[test]
    fn older_results_have_versions_and_no_mtu() {
        for version in CniVersion::ALL {
            let result = result(version);
            assert_eq!(result["cniVersion"], version.as_str());
            assert_eq!(
                result["interfaces"][0].get("mtu").is_some(),
                version >= CniVersion::V1_1_0
            );
            let want = if version < CniVersion::V1_0_0 {
                json!("6")
            } else {
                Value::Null
            };
            assert_eq!(result["ips"][1]["version"], want);
        }
    }

    #[test]
    fn every_version_is_announced() {
        let answer: Value = serde_json::from_str(&versions(CniVersion::V0_4_0)).unwrap();
        let want = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        assert_eq!(answer, json!({"cniVersion": "0.4.0", "supportedVersions": want}));
    }
}
