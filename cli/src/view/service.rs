//! `isthmus service list`: frontends and their backends in all clusters.

use std::collections::BTreeMap;

use isthmus_proto::agent::{Backend, Frontend, Service};
use serde::Serialize;

use crate::output::{Columns, Format, json, yes_no};

/// JSON form.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct View<'a> {
    namespace: &'a str,
    name: &'a str,
    global: bool,
    shared: bool,
    affinity: &'a str,
    frontends: Vec<FrontendView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FrontendView<'a> {
    address: &'a str,
    protocol: &'a str,
    service_id: u32,
    backends: Vec<BackendView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct BackendView<'a> {
    address: &'a str,
    cluster: &'a str,
    node: &'a str,
    zone: &'a str,
    state: &'a str,
    used: bool,
    reason: &'a str,
    backend_id: u32,
}

impl<'a> From<&'a Service> for View<'a> {
    fn from(service: &'a Service) -> Self {
        let backend = |backend: &'a Backend| BackendView {
            address: &backend.address,
            cluster: &backend.cluster,
            node: &backend.node,
            zone: &backend.zone,
            state: &backend.state,
            used: backend.used,
            reason: &backend.reason,
            backend_id: backend.backend_id,
        };
        let frontend = |frontend: &'a Frontend| FrontendView {
            address: &frontend.address,
            protocol: &frontend.protocol,
            service_id: frontend.service_id,
            backends: frontend.backends.iter().map(backend).collect(),
        };
        Self {
            namespace: &service.namespace,
            name: &service.name,
            global: service.global,
            shared: service.shared,
            affinity: &service.affinity,
            frontends: service.frontends.iter().map(frontend).collect(),
        }
    }
}

/// The text. `backends` asks for a line per backend, as the wide format does.
pub fn render(services: &[Service], format: Format, backends: bool) -> String {
    const EMPTY: &str = "No services.";
    match format {
        Format::Json => json(&services.iter().map(View::from).collect::<Vec<_>>()),
        Format::Table if !backends => {
            let headings = [
                "NAMESPACE",
                "NAME",
                "GLOBAL",
                "SHARED",
                "AFFINITY",
                "ID",
                "FRONTEND",
                "PROTOCOL",
                "BACKENDS",
            ];
            let mut columns = Columns::new(&headings, &["ID"]);
            for (service, frontend) in frontends(services) {
                let [namespace, name, global, shared, affinity] = service_cells(service);
                let used = used_by_cluster(&frontend.backends);
                let (id, address) = (frontend.service_id.to_string(), &*frontend.address);
                columns.row([
                    namespace,
                    name,
                    global,
                    shared,
                    affinity,
                    &*id,
                    address,
                    &*frontend.protocol,
                    &*used,
                ]);
            }
            columns.finish(EMPTY)
        }
        Format::Table | Format::Wide => {
            let headings = [
                "NAMESPACE",
                "NAME",
                "GLOBAL",
                "SHARED",
                "AFFINITY",
                "FRONTEND",
                "PROTOCOL",
                "BACKEND",
                "CLUSTER",
                "NODE",
                "ZONE",
                "STATE",
                "USED",
                "REASON",
            ];
            let mut columns = Columns::new(&headings, &[]);
            for (service, frontend) in frontends(services) {
                let [namespace, name, global, shared, affinity] = service_cells(service);
                let none = Backend {
                    reason: "no backend".into(),
                    ..Backend::default()
                };
                let backends = if frontend.backends.is_empty() {
                    std::slice::from_ref(&none)
                } else {
                    &frontend.backends
                };
                for backend in backends {
                    columns.row([
                        namespace,
                        name,
                        global,
                        shared,
                        affinity,
                        &frontend.address,
                        &frontend.protocol,
                        &backend.address,
                        &backend.cluster,
                        &backend.node,
                        &backend.zone,
                        &backend.state,
                        if backend.address.is_empty() {
                            ""
                        } else {
                            yes_no(backend.used)
                        },
                        &backend.reason,
                    ]);
                }
            }
            columns.finish(EMPTY)
        }
    }
}

fn frontends(services: &[Service]) -> impl Iterator<Item = (&Service, &Frontend)> {
    services
        .iter()
        .flat_map(|service| service.frontends.iter().map(move |frontend| (service, frontend)))
}

fn service_cells(service: &Service) -> [&str; 5] {
    // Affinity and sharing mean something for global services alone.
    let (shared, affinity) = if service.global {
        (yes_no(service.shared), &*service.affinity)
    } else {
        ("", "")
    };
    [
        &service.namespace,
        &service.name,
        yes_no(service.global),
        shared,
        affinity,
    ]
}

/// How many backends of each cluster are used: `2 (east 1, west 1)`.
fn used_by_cluster(backends: &[Backend]) -> String {
    let mut clusters = BTreeMap::<&str, usize>::new();
    for backend in backends.iter().filter(|backend| backend.used) {
        *clusters.entry(&backend.cluster).or_default() += 1;
    }
    let total: usize = clusters.values().sum();
    if total == 0 {
        return "0".into();
    }
    let parts: Vec<_> = clusters
        .iter()
        .map(|(cluster, count)| format!("{cluster} {count}"))
        .collect();
    format!("{total} ({})", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> Vec<Service> {
        let backend = |address: &str, cluster: &str, used, reason: &str| Backend {
            address: address.into(),
            cluster: cluster.into(),
            node: format!("{cluster}-1"),
            zone: String::new(),
            state: if used { "active" } else { "unready" }.into(),
            used,
            reason: reason.into(),
            backend_id: 1,
        };
        let frontend = |address: &str, backends| Frontend {
            address: address.into(),
            protocol: "TCP".into(),
            service_id: 12,
            backends,
        };
        vec![
            Service {
                namespace: "default".into(),
                name: "web".into(),
                global: true,
                shared: true,
                affinity: "local".into(),
                frontends: vec![frontend(
                    "10.96.0.10:80",
                    vec![
                        backend("10.1.0.2:8080", "east", true, ""),
                        backend("10.1.0.3:8080", "east", false, "not ready"),
                        backend("10.2.0.2:8080", "west", true, ""),
                    ],
                )],
            },
            Service {
                namespace: "kube-system".into(),
                name: "dns".into(),
                global: false,
                shared: false,
                affinity: "none".into(),
                frontends: vec![frontend("[fd00::a]:53", vec![])],
            },
        ]
    }

    #[test]
    fn a_frontend_shows_its_backends_by_cluster() {
        let want = "\
NAMESPACE     NAME   GLOBAL   SHARED   AFFINITY   ID   FRONTEND        PROTOCOL   BACKENDS
default       web    yes      yes      local      12   10.96.0.10:80   TCP        2 (east 1, west 1)
kube-system   dns    no       -        -          12   [fd00::a]:53    TCP        0
";
        assert_eq!(render(&services(), Format::Table, false), want);
    }

    #[test]
    fn wide_has_a_line_per_backend() {
        let want = "\
NAMESPACE     NAME   GLOBAL   SHARED   AFFINITY   FRONTEND        PROTOCOL   BACKEND         CLUSTER   NODE     ZONE   STATE     USED   REASON
default       web    yes      yes      local      10.96.0.10:80   TCP        10.1.0.2:8080   east      east-1   -      active    yes    -
default       web    yes      yes      local      10.96.0.10:80   TCP        10.1.0.3:8080   east      east-1   -      unready   no     not ready
default       web    yes      yes      local      10.96.0.10:80   TCP        10.2.0.2:8080   west      west-1   -      active    yes    -
kube-system   dns    no       -        -          [fd00::a]:53    TCP        -               -         -        -      -         -      no backend
";
        assert_eq!(render(&services(), Format::Wide, false), want);
        assert_eq!(render(&services(), Format::Table, true), want);
    }

    #[test]
    fn json_has_everything() {
        let value: serde_json::Value =
            serde_json::from_str(&render(&services(), Format::Json, false)).unwrap();
        let backend = &value[0]["frontends"][0]["backends"][1];
        assert_eq!(
            (backend["used"].as_bool(), backend["reason"].as_str()),
            (Some(false), Some("not ready"))
        );
        assert_eq!(render(&[], Format::Json, false), "[]\n");
        assert_eq!(render(&[], Format::Table, false), "No services.\n");
    }
}
