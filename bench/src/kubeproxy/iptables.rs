//! kube-proxy's iptables mode: a list of rules, one a service, then a chain for each service and for each of its endpoints.
//!
//! The restore is `--noflush` and names each chain that it fills, as kube-proxy's. When endpoints change it holds the list of all
//! services and the chains of the one that changed. Where both are installed the legacy variant is used: it evaluates the same
//! rules faster, and the other one's restore takes minutes for 10,000 services.

use std::{fmt::Write, net::SocketAddrV4, time::Duration};

use anyhow::{Context, Result};

use super::{feed, hash};
use crate::{
    lab::{require, run},
    services::{PODS, PORT, Services},
};

/// Chains, and rules that do not depend on services.
const FILTER: &str = "\
*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";
const NAT_CHAINS: &str = "\
*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
";
const NAT_RULES: &str = "\
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";
/// The last rule of KUBE-SERVICES.
const NODE_PORTS: &str = "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n";
/// Ways into these chains, which kube-proxy makes once.
const JUMPS: &str = "\
*filter
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
COMMIT
*nat
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
COMMIT
";

/// Endpoints beyond which kube-proxy takes a cluster for a large one.
const LARGE: usize = 1_000;

/// The rules of one namespace.
pub struct Iptables {
    namespace: String,
    restore: &'static str,
    /// What the peer is called.
    pub name: &'static str,
}

impl Iptables {
    /// Rules without services.
    pub fn new(namespace: &str) -> Result<Self> {
        let (restore, name) = variant()?;
        let rules = Self {
            namespace: namespace.to_owned(),
            restore,
            name,
        };
        rules.restore(&format!("{FILTER}{NAT_CHAINS}{NAT_RULES}{NODE_PORTS}"))?;
        rules.restore(JUMPS)?;
        Ok(rules)
    }

    /// Writes the first `count` services; those before were written as well. Returns the time of the restore.
    pub fn write(&self, services: &Services, count: u32) -> Result<Duration> {
        self.restore(&rules(services, count, 0..count))
    }

    /// Writes service `number` of `count` again, after its endpoints changed.
    pub fn change(&self, services: &Services, count: u32, number: u32) -> Result<Duration> {
        self.restore(&rules(services, count, number..number + 1))
    }

    /// The command that restores.
    pub fn command(&self) -> &'static str {
        self.restore
    }

    fn restore(&self, input: &str) -> Result<Duration> {
        feed(&self.namespace, &[self.restore, "--noflush", "-w", "60"], input)
    }
}

/// The command that restores, and what to call it.
fn variant() -> Result<(&'static str, &'static str)> {
    const LEGACY: &str = "iptables-legacy-restore";
    const ANY: &str = "iptables-restore";
    const NAME_LEGACY: &str = "kube-proxy's rules, iptables (legacy)";
    if require(&[LEGACY]).is_ok() {
        return Ok((LEGACY, NAME_LEGACY));
    }
    require(&[ANY])?;
    let version = run(&[ANY, "--version"]).context("asking iptables for its version")?;
    match version.contains("nf_tables") {
        true => Ok((ANY, "kube-proxy's rules, iptables (nf_tables)")),
        false => Ok((ANY, NAME_LEGACY)),
    }
}

/// What is restored: the list of `count` services, and the chains of some.
pub fn rules(services: &Services, count: u32, with_chains: std::ops::Range<u32>) -> String {
    let mut text = String::from(FILTER) + NAT_CHAINS;
    for number in with_chains.clone() {
        line(&mut text, format_args!(":{} - [0:0]", service_chain(number)));
        for target in services.targets(number) {
            line(
                &mut text,
                format_args!(":{} - [0:0]", endpoint_chain(number, target)),
            );
        }
    }
    text.push_str(NAT_RULES);
    for number in 0..count {
        let (name, ip) = (port_name(number), Services::frontend(number));
        let ip = ip.ip();
        let chain = service_chain(number);
        line(
            &mut text,
            format_args!(
                "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} -j {chain}"
            ),
        );
    }
    let large = count as usize * services.backends > LARGE;
    for number in with_chains {
        chains(&mut text, services, number, large);
    }
    text + NODE_PORTS
}

/// A service's chains. In a `large` cluster kube-proxy leaves out the comments of a rule for each endpoint.
fn chains(text: &mut String, services: &Services, number: u32, large: bool) {
    let comment = |words: String| match large {
        true => String::new(),
        false => format!("-m comment --comment {words} "),
    };
    let (name, ip) = (port_name(number), Services::frontend(number));
    let ip = ip.ip();
    let chain = service_chain(number);
    line(
        text,
        format_args!(
            "-A {chain} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} ! -s {PODS} -j KUBE-MARK-MASQ"
        ),
    );
    let targets = services.targets(number);
    for (at, target) in targets.iter().enumerate() {
        let endpoint = endpoint_chain(number, *target);
        let left = targets.len() - at;
        let chance = match left {
            1 => String::new(),
            _ => format!(
                "-m statistic --mode random --probability {:.10} ",
                1.0 / left as f64
            ),
        };
        line(
            text,
            format_args!(
                "-A {chain} {}{chance}-j {endpoint}",
                comment(format!("\"{name} -> {target}\""))
            ),
        );
    }
    for target in targets {
        let endpoint = endpoint_chain(number, target);
        let ip = target.ip();
        line(
            text,
            format_args!("-A {endpoint} {}-s {ip} -j KUBE-MARK-MASQ", comment(name.clone())),
        );
        line(
            text,
            format_args!(
                "-A {endpoint} {}-m tcp -p tcp -j DNAT --to-destination {target}",
                comment(name.clone())
            ),
        );
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{arguments}");
}

fn port_name(number: u32) -> String {
    format!("bench/{}:p80", Services::name(number))
}

fn service_chain(number: u32) -> String {
    format!("KUBE-SVC-{}", hash(&number, 16))
}

fn endpoint_chain(number: u32, target: SocketAddrV4) -> String {
    format!("KUBE-SEP-{}", hash(&(number, target), 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_written_as_kube_proxy_does() {
        let services = Services::absent(2);
        let text = rules(&services, 2, 0..2);
        let (chain, first) = (service_chain(0), endpoint_chain(0, services.targets(0)[0]));
        for expected in [
            format!(
                "-A KUBE-SERVICES -m comment --comment \"bench/service-0:p80 cluster IP\" -m tcp -p tcp -d 172.30.0.1 --dport 80 -j {chain}\n"
            ),
            format!(
                "-A {chain} -m comment --comment \"bench/service-0:p80 cluster IP\" -m tcp -p tcp -d 172.30.0.1 --dport 80 ! -s 10.0.0.0/8 -j KUBE-MARK-MASQ\n"
            ),
            format!(
                "-A {chain} -m comment --comment \"bench/service-0:p80 -> 10.128.0.0:8080\" -m statistic --mode random --probability 0.5000000000 -j {first}\n"
            ),
            format!("-A {first} -m comment --comment bench/service-0:p80 -s 10.128.0.0 -j KUBE-MARK-MASQ\n"),
            format!(
                "-A {first} -m comment --comment bench/service-0:p80 -m tcp -p tcp -j DNAT --to-destination 10.128.0.0:8080\n"
            ),
        ] {
            assert!(text.contains(&expected), "{expected}");
        }
    }

    #[test]
    fn a_large_cluster_has_no_comments_of_endpoints() {
        for (count, comments) in [(200, 200 * 2 + 200 * 5 * 3), (201, 201 * 2)] {
            let text = rules(&Services::absent(5), count, 0..count);
            let of_services =
                text.matches("--comment \"bench/").count() + text.matches("--comment bench/").count();
            assert_eq!(of_services, comments as usize, "{count} services");
        }
    }

    #[test]
    fn a_change_lists_all_services_and_one_services_chains() {
        let text = rules(&Services::absent(5), 100, 7..8);
        assert_eq!(text.matches("-A KUBE-SERVICES").count(), 100 + 1);
        assert_eq!(text.matches(":KUBE-SVC-").count(), 1);
        assert_eq!(text.matches("DNAT --to-destination").count(), 5);
    }
}
