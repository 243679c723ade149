//! kube-proxy's nftables mode: a map from address, protocol and port to a service's chain, which chooses among the endpoints'.
//!
//! The kernel's time to take an anonymous map, which each service's choice is, grows with those that are there and with those in the same
//! transaction: one transaction with 10,000 services takes two minutes. So services are written a batch at a time, as if they had
//! been made so. And services without a backend that answers can be written short: all chains, but a plain `goto` in place of the
//! choice. Who asks another service does not meet them.

use std::{fmt::Write, net::SocketAddrV4, time::Duration};

use anyhow::Result;

use super::{feed, hash};
use crate::{
    lab::require,
    services::{CLUSTER_IPS, PODS, PORT, Services},
};

/// What the peer is called.
pub const NAME: &str = "kube-proxy's rules, nftables";
/// Whole services of one transaction.
const BATCH: u32 = 500;
/// Services written short of one transaction.
const BATCH_SHORT: u32 = 5_000;

const BASE: &str = "\
add table ip kube-proxy { comment \"rules for kube-proxy\" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment \"Active ClusterIPs\" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; comment \"IPs that accept NodePort traffic\" ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain { comment \"helper for @no-endpoint-services / @no-endpoint-nodeports\" ; }
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
";
const RULES: &str = "\
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add element ip kube-proxy nodeport-ips { 192.0.2.1 }
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
";

/// The rules of one namespace.
pub struct Nftables {
    namespace: String,
    written: u32,
}

impl Nftables {
    /// Rules without services.
    pub fn new(namespace: &str) -> Result<Self> {
        require(&["nft"])?;
        let rules = Self {
            namespace: namespace.to_owned(),
            written: 0,
        };
        let unallocated = format!(
            "add rule ip kube-proxy cluster-ips-check ip daddr {{ {CLUSTER_IPS} }} drop comment \"Drop traffic to unallocated ClusterIPs\"\n"
        );
        rules.feed(&format!("{BASE}{unallocated}{RULES}"))?;
        Ok(rules)
    }

    /// Writes services until there are `count`; whole, or those that nobody answers for short. Returns the time.
    pub fn write(&mut self, services: &Services, count: u32, whole: bool) -> Result<Duration> {
        let mut time = Duration::ZERO;
        for batch in batches(self.written, count, whole) {
            time += self.feed(&rules(services, batch.clone(), whole))?;
            self.written = batch.end;
        }
        Ok(time)
    }

    /// Writes a service again, after its endpoints changed. The chains of all endpoints are there; that of one that has gone is
    /// deleted later.
    pub fn change(&self, services: &Services, number: u32) -> Result<Duration> {
        self.feed(&change(services, number))
    }

    fn feed(&self, input: &str) -> Result<Duration> {
        feed(&self.namespace, &["nft", "-f", "-"], input)
    }
}

/// What makes the base without services, and then the services, whole: for who feeds it elsewhere.
pub fn inputs(services: &Services, count: u32) -> Vec<String> {
    let batches = batches(0, count, true).into_iter();
    let services = batches.map(|batch| rules(services, batch, true));
    [format!("{BASE}{RULES}")].into_iter().chain(services).collect()
}

fn batches(mut from: u32, to: u32, whole: bool) -> Vec<std::ops::Range<u32>> {
    let most = if whole { BATCH } else { BATCH_SHORT };
    let mut batches = vec![];
    while from < to {
        let end = to.min(from + most);
        batches.push(from..end);
        from = end;
    }
    batches
}

fn rules(services: &Services, numbers: std::ops::Range<u32>, whole: bool) -> String {
    let mut text = String::new();
    for number in numbers.clone() {
        line(
            &mut text,
            format_args!("add chain ip kube-proxy {}", service_chain(number)),
        );
        for target in services.targets(number) {
            line(
                &mut text,
                format_args!("add chain ip kube-proxy {}", endpoint_chain(number, target)),
            );
        }
    }
    for number in numbers {
        let ip = *Services::frontend(number).ip();
        let chain = service_chain(number);
        service_rules(
            &mut text,
            services,
            number,
            whole || services.real.contains(&number),
        );
        for target in services.targets(number) {
            endpoint_rules(&mut text, number, target);
        }
        line(
            &mut text,
            format_args!("add element ip kube-proxy cluster-ips {{ {ip} }}"),
        );
        line(
            &mut text,
            format_args!("add element ip kube-proxy service-ips {{ {ip} . tcp . {PORT} : goto {chain} }}"),
        );
    }
    text
}

fn service_rules(text: &mut String, services: &Services, number: u32, whole: bool) {
    let (chain, ip) = (service_chain(number), *Services::frontend(number).ip());
    line(
        text,
        format_args!(
            "add rule ip kube-proxy {chain} ip daddr {ip} ip saddr != {PODS} jump mark-for-masquerade"
        ),
    );
    let targets = services.targets(number);
    let endpoints: Vec<String> = targets
        .iter()
        .map(|target| endpoint_chain(number, *target))
        .collect();
    if !whole {
        line(
            text,
            format_args!("add rule ip kube-proxy {chain} goto {}", endpoints[0]),
        );
        return;
    }
    let choice: Vec<String> = (0..)
        .zip(&endpoints)
        .map(|(at, endpoint)| format!("{at} : goto {endpoint}"))
        .collect();
    line(
        text,
        format_args!(
            "add rule ip kube-proxy {chain} numgen random mod {} vmap {{ {} }}",
            choice.len(),
            choice.join(" , ")
        ),
    );
}

fn endpoint_rules(text: &mut String, number: u32, target: SocketAddrV4) {
    let (chain, ip) = (endpoint_chain(number, target), target.ip());
    line(
        text,
        format_args!("add rule ip kube-proxy {chain} ip saddr {ip} jump mark-for-masquerade"),
    );
    line(
        text,
        format_args!("add rule ip kube-proxy {chain} meta l4proto tcp dnat to {target}"),
    );
}

fn change(services: &Services, number: u32) -> String {
    let mut text = String::new();
    line(
        &mut text,
        format_args!("flush chain ip kube-proxy {}", service_chain(number)),
    );
    service_rules(&mut text, services, number, true);
    text
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{arguments}");
}

fn service_chain(number: u32) -> String {
    format!(
        "service-{}-bench/{}/tcp/p80",
        hash(&number, 8),
        Services::name(number)
    )
}

fn endpoint_chain(number: u32, target: SocketAddrV4) -> String {
    let (name, ip, port) = (Services::name(number), target.ip(), target.port());
    format!(
        "endpoint-{}-bench/{name}/tcp/p80__{ip}/{port}",
        hash(&(number, target), 8)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_written_as_kube_proxy_does() {
        let services = Services::absent(2);
        let text = rules(&services, 0..1, true);
        let chain = service_chain(0);
        let [first, second] = [0, 1].map(|at| endpoint_chain(0, services.targets(0)[at]));
        let expected = format!(
            "add chain ip kube-proxy {chain}\n\
             add chain ip kube-proxy {first}\n\
             add chain ip kube-proxy {second}\n\
             add rule ip kube-proxy {chain} ip daddr 172.30.0.1 ip saddr != 10.0.0.0/8 jump mark-for-masquerade\n\
             add rule ip kube-proxy {chain} numgen random mod 2 vmap {{ 0 : goto {first} , 1 : goto {second} }}\n\
             add rule ip kube-proxy {first} ip saddr 10.128.0.0 jump mark-for-masquerade\n\
             add rule ip kube-proxy {first} meta l4proto tcp dnat to 10.128.0.0:8080\n\
             add rule ip kube-proxy {second} ip saddr 10.128.0.1 jump mark-for-masquerade\n\
             add rule ip kube-proxy {second} meta l4proto tcp dnat to 10.128.0.1:8080\n\
             add element ip kube-proxy cluster-ips {{ 172.30.0.1 }}\n\
             add element ip kube-proxy service-ips {{ 172.30.0.1 . tcp . 80 : goto {chain} }}\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn batches_cover_everything_once() {
        assert_eq!(batches(100, 1_200, true), [100..600, 600..1_100, 1_100..1_200]);
        assert_eq!(batches(5, 5, false), []);
    }
}
