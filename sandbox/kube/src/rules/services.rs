//! Cluster addresses and node ports of Services.
//!
//! In: a Service, complete but for what the server assigns, and the stored one. Out: the Service with addresses,
//! families, policies and ports. [`ServiceNumbers`] knows what is in use. Pure. Invariants: no address or node port is
//! given twice; what a Service has stays the same through updates; a refused Service takes nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use crate::error::Cause;
use crate::meta;

/// Addresses and node ports in use.
#[derive(Clone, Debug)]
pub struct ServiceNumbers {
    networks: Vec<IpNet>,
    node_ports: RangeInclusive<u16>,
    used_addresses: BTreeSet<IpAddr>,
    used_ports: BTreeSet<(u16, String)>,
    next_port: u16,
    next_offset: u32,
}

/// What an assignment took so far.
#[derive(Default)]
struct Taken {
    addresses: Vec<IpAddr>,
    ports: Vec<(u16, String)>,
}

/// Addresses of a network that are given out at most; a v6 network has more than anyone needs.
const OFFSETS_MAX: u32 = 1 << 20;

/// A conflict in a request, or an exhausted pool.
type Refusal = Cause;

impl ServiceNumbers {
    /// Nothing in use. The primary family is that of the first network.
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>, node_ports: RangeInclusive<u16>) -> ServiceNumbers {
        let networks = v4.map(IpNet::V4).into_iter().chain(v6.map(IpNet::V6)).collect();
        let next_port = *node_ports.start();
        ServiceNumbers {
            networks,
            node_ports,
            used_addresses: BTreeSet::new(),
            used_ports: BTreeSet::new(),
            next_port,
            next_offset: 1,
        }
    }

    /// Completes `service`, which replaces `old`, and takes what it gets.
    pub fn assign(&mut self, service: &mut Value, old: Option<&Value>) -> Result<(), Vec<Cause>> {
        fill_plain_defaults(service);
        let causes = check(service, old);
        if !causes.is_empty() {
            return Err(causes);
        }
        if let Some(old) = old {
            self.release(old);
        }
        let mut taken = Taken::default();
        let result = self
            .assign_addresses(service, old, &mut taken)
            .and_then(|()| self.assign_node_ports(service, old, &mut taken));
        if let Err(cause) = result {
            self.give_back(taken, old);
            return Err(vec![cause]);
        }
        Ok(())
    }

    /// Gives back what a Service has.
    pub fn release(&mut self, service: &Value) {
        for address in addresses(service) {
            self.used_addresses.remove(&address);
        }
        for (port, protocol) in node_ports(service) {
            self.used_ports.remove(&(port, protocol));
        }
    }

    /// Undoes a refused assignment.
    fn give_back(&mut self, taken: Taken, old: Option<&Value>) {
        for address in taken.addresses {
            self.used_addresses.remove(&address);
        }
        for port in taken.ports {
            self.used_ports.remove(&port);
        }
        if let Some(old) = old {
            self.used_addresses.extend(addresses(old));
            self.used_ports.extend(node_ports(old));
        }
    }

    fn assign_addresses(
        &mut self,
        service: &mut Value,
        old: Option<&Value>,
        taken: &mut Taken,
    ) -> Result<(), Refusal> {
        if meta::str_at(service, &["spec", "type"]) == "ExternalName" {
            let spec = meta::map_mut(service, "spec");
            for field in [
                "clusterIP",
                "clusterIPs",
                "ipFamilies",
                "ipFamilyPolicy",
                "internalTrafficPolicy",
            ] {
                spec.remove(field);
            }
            return Ok(());
        }
        let mut wanted = requested_addresses(service);
        if wanted.is_empty() {
            wanted = old.map(requested_addresses).unwrap_or_default();
        }
        let headless = wanted.first().is_some_and(|a| a == "None");
        let families = self.families(service, old, if headless { &[] } else { &wanted })?;
        let addresses = if headless {
            vec!["None".to_owned()]
        } else {
            let mut addresses = Vec::new();
            for family in &families {
                let asked = wanted.iter().find(|a| family_of(a) == Some(family));
                let address = self.take(family, asked)?;
                taken.addresses.push(address);
                addresses.push(address.to_string());
            }
            addresses
        };
        let spec = meta::map_mut(service, "spec");
        spec.insert("clusterIP".into(), json!(addresses[0]));
        spec.insert("clusterIPs".into(), json!(addresses));
        if !spec.contains_key("ipFamilyPolicy") {
            let policy = if families.len() == 2 {
                "RequireDualStack"
            } else {
                "SingleStack"
            };
            spec.insert("ipFamilyPolicy".into(), json!(policy));
        }
        spec.insert("ipFamilies".into(), json!(families));
        Ok(())
    }

    /// The families that the Service gets, in order.
    fn families(
        &self,
        service: &Value,
        old: Option<&Value>,
        wanted: &[String],
    ) -> Result<Vec<&'static str>, Refusal> {
        let served: Vec<&'static str> = self.networks.iter().map(network_family).collect();
        let mut families: Vec<&'static str> = Vec::new();
        let asked = meta::list_at(service, &["spec", "ipFamilies"])
            .iter()
            .filter_map(Value::as_str);
        let kept = old
            .iter()
            .flat_map(|old| meta::list_at(old, &["spec", "ipFamilies"]))
            .filter_map(Value::as_str);
        let from_addresses = wanted.iter().filter_map(|a| family_of(a));
        let all: Vec<&str> = from_addresses.chain(asked).chain(kept).collect();
        for family in all {
            let Some(family) = served.iter().copied().find(|s| *s == family) else {
                let message = format!("Invalid value: {family:?}: not configured on this cluster");
                return Err(Cause::new("spec.ipFamilies", message));
            };
            if !families.contains(&family) {
                families.push(family);
            }
        }
        if families.is_empty() {
            families.extend(served.first());
        }
        let asked = meta::list_at(service, &["spec", "ipFamilies"])
            .len()
            .max(wanted.len());
        match meta::str_at(service, &["spec", "ipFamilyPolicy"]) {
            "PreferDualStack" => families.extend(
                served
                    .iter()
                    .filter(|f| !families.contains(f))
                    .collect::<Vec<_>>(),
            ),
            "RequireDualStack" => {
                families.extend(
                    served
                        .iter()
                        .filter(|f| !families.contains(f))
                        .collect::<Vec<_>>(),
                );
                if families.len() < 2 {
                    let message = "Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services";
                    return Err(Cause::new("spec.ipFamilyPolicy", message));
                }
            }
            "SingleStack" if asked > 1 => {
                let message = "Invalid value: \"SingleStack\": may only have one IP family";
                return Err(Cause::new("spec.ipFamilyPolicy", message));
            }
            "SingleStack" => families.truncate(1),
            _ => {}
        }
        Ok(families)
    }

    fn take(&mut self, family: &str, asked: Option<&String>) -> Result<IpAddr, Refusal> {
        let refuse = |message: String| Cause::new("spec.clusterIPs", message);
        let Some(network) = self
            .networks
            .iter()
            .copied()
            .find(|n| network_family(n) == family)
        else {
            return Err(refuse(format!("Invalid value: no {family} network for services")));
        };
        if let Some(asked) = asked {
            let address: IpAddr = asked
                .parse()
                .map_err(|_| refuse(format!("Invalid value: {asked:?}: must be a valid IP address")))?;
            if !network.contains(&address) {
                let message =
                    format!("Invalid value: {asked:?}: the provided IP is not in the valid range {network}");
                return Err(refuse(message));
            }
            if !self.used_addresses.insert(address) {
                return Err(refuse(format!(
                    "Invalid value: {asked:?}: provided IP is already allocated"
                )));
            }
            return Ok(address);
        }
        let size = usable_offsets(&network);
        for step in 0..size {
            let offset = (self.next_offset - 1 + step) % size + 1;
            let address = address_at(&network, offset);
            if self.used_addresses.insert(address) {
                self.next_offset = offset % size + 1;
                return Ok(address);
            }
        }
        Err(refuse(format!(
            "Internal error: the service network {network} is full"
        )))
    }

    fn assign_node_ports(
        &mut self,
        service: &mut Value,
        old: Option<&Value>,
        taken: &mut Taken,
    ) -> Result<(), Refusal> {
        let kind = meta::str_at(service, &["spec", "type"]);
        let wants = match kind {
            "NodePort" => true,
            "LoadBalancer" => {
                meta::at(service, &["spec", "allocateLoadBalancerNodePorts"]) != Some(&json!(false))
            }
            _ => false,
        };
        let allowed = matches!(kind, "NodePort" | "LoadBalancer");
        let kept: Vec<(i64, String, u16)> = old.map(port_numbers).unwrap_or_default();
        let ports = service["spec"].get_mut("ports").and_then(Value::as_array_mut);
        for (at, port) in ports.into_iter().flatten().enumerate() {
            let protocol = meta::str_at(port, &["protocol"]).to_owned();
            let asked = meta::int_at(port, &["nodePort"]).unwrap_or(0);
            let Some(map) = port.as_object_mut() else { continue };
            if !allowed {
                map.remove("nodePort");
                continue;
            }
            let number = map.get("port").and_then(Value::as_i64).unwrap_or(0);
            let before = kept
                .iter()
                .find(|(port, proto, _)| *port == number && *proto == protocol)
                .map(|k| k.2);
            let chosen = match (asked, before) {
                (0, Some(before)) => before,
                (0, None) if !wants => continue,
                (0, None) => self.free_port(&protocol).ok_or_else(|| {
                    Cause::new(format!("spec.ports[{at}].nodePort"), "Internal error: no free node port is left")
                })?,
                (asked, _) => u16::try_from(asked).ok().filter(|p| self.node_ports.contains(p)).ok_or_else(|| {
                    let (low, high) = (self.node_ports.start(), self.node_ports.end());
                    let message = format!(
                        "Invalid value: {asked}: provided port is not in the valid range. The range of valid ports is {low}-{high}"
                    );
                    Cause::new(format!("spec.ports[{at}].nodePort"), message)
                })?,
            };
            if !self.used_ports.insert((chosen, protocol.clone())) {
                let message = format!("Invalid value: {chosen}: provided port is already allocated");
                return Err(Cause::new(format!("spec.ports[{at}].nodePort"), message));
            }
            taken.ports.push((chosen, protocol));
            map.insert("nodePort".into(), json!(chosen));
        }
        Ok(())
    }

    fn free_port(&mut self, protocol: &str) -> Option<u16> {
        let (low, high) = (
            u32::from(*self.node_ports.start()),
            u32::from(*self.node_ports.end()),
        );
        let size = high - low + 1;
        for step in 0..size {
            let port = (low + (u32::from(self.next_port) - low + step) % size) as u16;
            if !self.used_ports.contains(&(port, protocol.to_owned())) {
                self.next_port = if u32::from(port) == high {
                    low as u16
                } else {
                    port + 1
                };
                return Some(port);
            }
        }
        None
    }
}

fn network_family(network: &IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "IPv4",
        IpNet::V6(_) => "IPv6",
    }
}

fn family_of(address: &str) -> Option<&'static str> {
    match address.parse().ok()? {
        IpAddr::V4(_) => Some("IPv4"),
        IpAddr::V6(_) => Some("IPv6"),
    }
}

/// How many addresses a network gives out: all but the first and, for v4, the last.
fn usable_offsets(network: &IpNet) -> u32 {
    let bits = u32::from(network.max_prefix_len() - network.prefix_len());
    let size = 1u64 << bits.min(32);
    u32::try_from(size.saturating_sub(2))
        .unwrap_or(OFFSETS_MAX)
        .clamp(1, OFFSETS_MAX)
}

fn address_at(network: &IpNet, offset: u32) -> IpAddr {
    match network {
        IpNet::V4(net) => Ipv4Addr::from_bits(net.network().to_bits().wrapping_add(offset)).into(),
        IpNet::V6(net) => {
            Ipv6Addr::from_bits(net.network().to_bits().wrapping_add(u128::from(offset))).into()
        }
    }
}

fn requested_addresses(service: &Value) -> Vec<String> {
    let list = meta::list_at(service, &["spec", "clusterIPs"]);
    let mut addresses: Vec<String> = list
        .iter()
        .filter_map(|a| a.as_str().map(str::to_owned))
        .collect();
    let single = meta::str_at(service, &["spec", "clusterIP"]);
    if addresses.is_empty() && !single.is_empty() {
        addresses.push(single.to_owned());
    }
    addresses.retain(|a| !a.is_empty());
    addresses
}

fn addresses(service: &Value) -> impl Iterator<Item = IpAddr> {
    requested_addresses(service)
        .into_iter()
        .filter_map(|a| a.parse().ok())
}

fn port_numbers(service: &Value) -> Vec<(i64, String, u16)> {
    meta::list_at(service, &["spec", "ports"])
        .iter()
        .filter_map(|port| {
            let node_port = u16::try_from(meta::int_at(port, &["nodePort"])?).ok()?;
            Some((
                meta::int_at(port, &["port"])?,
                meta::str_at(port, &["protocol"]).to_owned(),
                node_port,
            ))
        })
        .collect()
}

fn node_ports(service: &Value) -> impl Iterator<Item = (u16, String)> {
    port_numbers(service)
        .into_iter()
        .map(|(_, protocol, node_port)| (node_port, protocol))
}

fn fill_plain_defaults(service: &mut Value) {
    let spec = meta::map_mut(service, "spec");
    let mut set = |key: &str, value: Value| {
        if spec.get(key).is_none_or(|v| v.is_null() || v == "") {
            spec.insert(key.to_owned(), value);
        }
    };
    set("type", json!("ClusterIP"));
    set("sessionAffinity", json!("None"));
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    let mut set = |key: &str, value: Value| {
        if spec.get(key).is_none_or(|v| v.is_null() || v == "") {
            spec.insert(key.to_owned(), value);
        }
    };
    if kind != "ExternalName" {
        set("internalTrafficPolicy", json!("Cluster"));
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        set("externalTrafficPolicy", json!("Cluster"));
    }
    if kind == "LoadBalancer" {
        set("allocateLoadBalancerNodePorts", json!(true));
    }
    if kind != "LoadBalancer" {
        spec.remove("allocateLoadBalancerNodePorts");
    }
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        spec.remove("externalTrafficPolicy");
    }
    if spec["sessionAffinity"] == "ClientIP" && !spec.contains_key("sessionAffinityConfig") {
        spec.insert(
            "sessionAffinityConfig".into(),
            json!({"clientIP": {"timeoutSeconds": 10800}}),
        );
    }
    for port in spec
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if meta::str_at(port, &["protocol"]).is_empty() {
            port["protocol"] = json!("TCP");
        }
        let absent = meta::at(port, &["targetPort"]).is_none_or(|t| *t == json!(0) || *t == json!(""));
        if absent {
            port["targetPort"] = port["port"].clone();
        }
    }
}

fn check(service: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let kind = meta::str_at(service, &["spec", "type"]);
    if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer" | "ExternalName") {
        let message =
            format!("Unsupported value: {kind:?}: takes ClusterIP, ExternalName, LoadBalancer, NodePort");
        causes.push(Cause::new("spec.type", message));
    }
    let wanted = requested_addresses(service);
    let single = meta::str_at(service, &["spec", "clusterIP"]);
    if !single.is_empty() && wanted.first().is_some_and(|first| first != single) {
        causes.push(Cause::new(
            "spec.clusterIPs[0]",
            "Invalid value: first value must match `clusterIP`",
        ));
    }
    let before = old.map(requested_addresses).unwrap_or_default();
    let stays = kind != "ExternalName" && !before.is_empty() && !wanted.is_empty();
    if stays && wanted.first() != before.first() {
        let message = format!("Invalid value: {wanted:?}: may not change once set");
        causes.push(Cause::new("spec.clusterIPs[0]", message));
    }
    let headless = wanted.first().or(before.first()).is_some_and(|a| a == "None");
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        let message = format!("Invalid value: \"None\": may not be set to 'None' for {kind} services");
        causes.push(Cause::new("spec.clusterIPs[0]", message));
    }
    let ports = meta::list_at(service, &["spec", "ports"]);
    if ports.is_empty() && !headless && kind != "ExternalName" {
        causes.push(Cause::new("spec.ports", "Required value"));
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (at, port) in ports.iter().enumerate() {
        let here = |field: &str| format!("spec.ports[{at}].{field}");
        let name = meta::str_at(port, &["name"]);
        if name.is_empty() && ports.len() > 1 {
            causes.push(Cause::new(here("name"), "Required value"));
        } else if !name.is_empty() && meta::check_label(name).is_err() {
            causes.push(Cause::new(
                here("name"),
                format!("Invalid value: {name:?}: must be a DNS label"),
            ));
        } else if !names.insert(name) {
            causes.push(Cause::new(here("name"), format!("Duplicate value: {name:?}")));
        }
        let number = meta::int_at(port, &["port"]).unwrap_or(0);
        if !(1..=65535).contains(&number) {
            let message = format!("Invalid value: {number}: must be between 1 and 65535, inclusive");
            causes.push(Cause::new(here("port"), message));
        }
        let protocol = meta::str_at(port, &["protocol"]);
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            causes.push(Cause::new(
                here("protocol"),
                format!("Unsupported value: {protocol:?}: takes SCTP, TCP, UDP"),
            ));
        }
        if !numbers.insert((number, protocol)) {
            causes.push(Cause::new(
                format!("spec.ports[{at}]"),
                format!("Duplicate value: {number}/{protocol}"),
            ));
        }
        if meta::at(port, &["targetPort"])
            .and_then(Value::as_i64)
            .is_some_and(|t| !(1..=65535).contains(&t))
        {
            causes.push(Cause::new(
                here("targetPort"),
                "Invalid value: must be between 1 and 65535, inclusive",
            ));
        }
    }
    causes
}

#[cfg(test)]
mod tests;
