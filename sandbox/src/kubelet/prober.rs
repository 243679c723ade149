//! Carries out probes and hooks, from where a kubelet would: the node's network namespace.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::container::Launch;
use super::probe::ProbeSpec;
use crate::{http_get, netns};

/// What a probe or a hook does.
#[derive(Clone, Debug)]
pub enum Check {
    /// A command in the container: success is exit code 0.
    Exec(Vec<String>),
    /// A GET: success is 200 to 399.
    Http(http_get::Get),
    /// A TCP connection.
    Tcp {
        /// The namespace that it is made from.
        netns: PathBuf,
        /// Its target.
        address: SocketAddr,
    },
    /// Nothing for this time.
    Sleep(Duration),
    /// It cannot be done, and why.
    Refused(String),
}

/// Where checks of one container are made from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The node's network namespace.
    pub node_netns: PathBuf,
    /// The pod's first address.
    pub pod_ip: IpAddr,
}

/// The settings of a probe, with kubelet's defaults. `period` overrules the probe's own, for tests and demonstrations.
pub fn spec(probe: &Probe, period: Option<Duration>) -> ProbeSpec {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(
            value
                .and_then(|value| u64::try_from(value).ok())
                .unwrap_or(default),
        )
    };
    let count = |value: Option<i32>, default: u32| {
        value
            .and_then(|value| u32::try_from(value).ok())
            .filter(|value| *value > 0)
            .unwrap_or(default)
    };
    let at_least_one = |value: Duration| {
        if value.is_zero() {
            Duration::from_secs(1)
        } else {
            value
        }
    };
    ProbeSpec {
        initial_delay: seconds(probe.initial_delay_seconds, 0),
        period: period.unwrap_or_else(|| at_least_one(seconds(probe.period_seconds, 10))),
        timeout: at_least_one(seconds(probe.timeout_seconds, 1)),
        success_threshold: count(probe.success_threshold, 1),
        failure_threshold: count(probe.failure_threshold, 3),
    }
}

/// What a probe does.
pub fn of_probe(probe: &Probe, container: &Container, origin: &Origin) -> Check {
    let handler = LifecycleHandler {
        exec: probe.exec.clone(),
        http_get: probe.http_get.clone(),
        tcp_socket: probe.tcp_socket.clone(),
        sleep: None,
    };
    if probe.grpc.is_some() {
        return Check::Refused("the sandbox has no gRPC probes: use httpGet, tcpSocket or exec".into());
    }
    of_handler(&handler, container, origin)
}

/// What a hook does.
pub fn of_handler(handler: &LifecycleHandler, container: &Container, origin: &Origin) -> Check {
    if let Some(exec) = &handler.exec {
        return Check::Exec(exec.command.clone().unwrap_or_default());
    }
    if let Some(sleep) = &handler.sleep {
        return Check::Sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0)));
    }
    if let Some(get) = &handler.http_get {
        if get
            .scheme
            .as_deref()
            .is_some_and(|scheme| !scheme.eq_ignore_ascii_case("http"))
        {
            return Check::Refused("the sandbox probes HTTP only: use scheme HTTP or tcpSocket".into());
        }
        let headers = get.http_headers.iter().flatten();
        return match address(get.host.as_deref(), &get.port, container, origin) {
            Ok(address) => Check::Http(http_get::Get {
                netns: Some(origin.node_netns.clone()),
                address,
                path: with_slash(get.path.as_deref().unwrap_or("/")),
                headers: headers
                    .map(|header| (header.name.clone(), header.value.clone()))
                    .collect(),
            }),
            Err(message) => Check::Refused(message),
        };
    }
    if let Some(tcp) = &handler.tcp_socket {
        return match address(tcp.host.as_deref(), &tcp.port, container, origin) {
            Ok(address) => Check::Tcp {
                netns: origin.node_netns.clone(),
                address,
            },
            Err(message) => Check::Refused(message),
        };
    }
    Check::Refused("it has none of exec, httpGet, tcpSocket, sleep".into())
}

fn with_slash(path: &str) -> String {
    if path.starts_with('/') {
        path.into()
    } else {
        format!("/{path}")
    }
}

fn address(
    host: Option<&str>,
    port: &IntOrString,
    container: &Container,
    origin: &Origin,
) -> Result<SocketAddr, String> {
    let ip = match host.filter(|host| !host.is_empty()) {
        None => origin.pod_ip,
        Some(host) => host
            .parse()
            .map_err(|_| format!("the host `{host}` is not an IP address"))?,
    };
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => name.parse().ok().or_else(|| {
            let ports = container.ports.iter().flatten();
            ports
                .filter(|port| port.name.as_deref() == Some(name))
                .map(|port| port.container_port)
                .next()
        }),
    };
    let number = number.and_then(|number| u16::try_from(number).ok());
    let number = number.ok_or_else(|| format!("the container has no port {port:?}"))?;
    Ok(SocketAddr::new(ip, number))
}

/// Does it: `Err` says why it failed. `launch` is how commands are run in the container.
pub async fn run(check: Check, launch: Launch, timeout: Duration) -> Result<(), String> {
    match check {
        Check::Exec(argv) => match (Launch { argv, ..launch }).run(timeout).await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the command failed".into()),
            Err(error) => Err(format!("the command: {error}")),
        },
        Check::Http(get) => match http_get::status(get.clone(), timeout).await {
            Ok(200..=399) => Ok(()),
            Ok(status) => Err(format!("GET http://{}{}: status {status}", get.address, get.path)),
            Err(error) => Err(format!("GET http://{}{}: {error}", get.address, get.path)),
        },
        Check::Tcp { netns, address } => match netns::connect(Some(netns), address, timeout).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("connecting to {address}: {error}")),
        },
        Check::Sleep(time) => {
            tokio::time::sleep(time.min(timeout)).await;
            Ok(())
        }
        Check::Refused(message) => Err(message),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn check(probe: serde_json::Value) -> Check {
        let container: Container =
            from_value(json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]})).unwrap();
        let probe: Probe = from_value(probe).unwrap();
        let origin = Origin {
            node_netns: "/run/netns/n".into(),
            pod_ip: "10.1.1.5".parse().unwrap(),
        };
        of_probe(&probe, &container, &origin)
    }

    #[test]
    fn named_ports_are_those_of_the_container() {
        let Check::Http(get) = check(json!({"httpGet": {"path": "healthz", "port": "web"}})) else {
            panic!()
        };
        assert_eq!(
            (get.address.to_string().as_str(), get.path.as_str()),
            ("10.1.1.5:8080", "/healthz")
        );
        assert!(matches!(
            check(json!({"tcpSocket": {"port": "none"}})),
            Check::Refused(_)
        ));
        assert!(matches!(
            check(json!({"tcpSocket": {"port": 99999}})),
            Check::Refused(_)
        ));
        assert!(matches!(check(json!({"grpc": {"port": 1}})), Check::Refused(_)));
    }

    #[test]
    fn settings_have_kubelets_defaults() {
        let defaults = spec(&Probe::default(), None);
        assert_eq!(
            (defaults.period, defaults.timeout),
            (Duration::from_secs(10), Duration::from_secs(1))
        );
        assert_eq!((defaults.success_threshold, defaults.failure_threshold), (1, 3));
        assert_eq!(
            spec(&Probe::default(), Some(Duration::from_millis(50))).period,
            Duration::from_millis(50)
        );
    }
}
