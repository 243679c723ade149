//! The environment and the command line of a container.
//!
//! Pure: from the pod, its addresses and the services of its namespace. What the sandbox does not have (ConfigMaps,
//! Secrets) is refused with a sentence that ends up in the container's status.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, Service};

/// What the environment is made from, beside the container.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its addresses.
    pub pod_ips: &'a [String],
    /// Its node's address.
    pub host_ip: &'a str,
    /// The services of its namespace.
    pub services: &'a [Service],
}

/// The environment: services first, then the container's own in order, so that these win.
pub fn environment(facts: Facts<'_>, container: &Container) -> Result<Vec<(String, String)>, String> {
    let spec = facts.pod.spec.as_ref();
    let mut env = BTreeMap::new();
    env.insert(
        "HOSTNAME".to_owned(),
        facts.pod.metadata.name.clone().unwrap_or_default(),
    );
    if spec.and_then(|spec| spec.enable_service_links).unwrap_or(true) {
        facts
            .services
            .iter()
            .for_each(|service| env.extend(service_variables(service)));
    }
    for variable in container.env.iter().flatten() {
        let value = value_of(facts, variable)?;
        let value = value.unwrap_or_else(|| expand(variable.value.as_deref().unwrap_or_default(), &env));
        env.insert(variable.name.clone(), value);
    }
    if let Some(source) = container.env_from.iter().flatten().next() {
        let kind = if source.config_map_ref.is_some() {
            "ConfigMap"
        } else {
            "Secret"
        };
        return Err(format!("the sandbox has no {kind}s: `envFrom` is not supported"));
    }
    Ok(env.into_iter().collect())
}

/// The command line: `command`, then `args`, with `$(NAME)` replaced from the environment.
pub fn command_line(container: &Container, env: &[(String, String)]) -> Result<Vec<String>, String> {
    let env: BTreeMap<String, String> = env.iter().cloned().collect();
    if container.command.as_ref().is_none_or(Vec::is_empty) {
        return Err(
            "the sandbox ignores images and so has no entrypoint: give the container a `command`, \
                    which runs from this machine's file system"
                .into(),
        );
    }
    let words = container.command.iter().chain(&container.args).flatten();
    Ok(words.map(|word| expand(word, &env)).collect())
}

fn value_of(facts: Facts<'_>, variable: &EnvVar) -> Result<Option<String>, String> {
    let Some(source) = &variable.value_from else {
        return Ok(None);
    };
    if let Some(field) = &source.field_ref {
        return field_value(facts, &field.field_path).map(Some).ok_or_else(|| {
            format!(
                "`{}`: the field `{}` is not supported",
                variable.name, field.field_path
            )
        });
    }
    let optional = source.config_map_key_ref.as_ref().and_then(|key| key.optional) == Some(true)
        || source.secret_key_ref.as_ref().and_then(|key| key.optional) == Some(true);
    if optional {
        return Ok(Some(String::new()));
    }
    Err(format!(
        "`{}`: the sandbox supports `fieldRef` only (no ConfigMaps, Secrets or resources)",
        variable.name
    ))
}

fn field_value(facts: Facts<'_>, path: &str) -> Option<String> {
    let metadata = &facts.pod.metadata;
    let spec = facts.pod.spec.as_ref();
    let keyed = |prefix: &str, map: &Option<BTreeMap<String, String>>| {
        let key = path
            .strip_prefix(prefix)?
            .strip_prefix("['")?
            .strip_suffix("']")?;
        Some(
            map.as_ref()
                .and_then(|map| map.get(key))
                .cloned()
                .unwrap_or_default(),
        )
    };
    Some(match path {
        "metadata.name" => metadata.name.clone()?,
        "metadata.namespace" => metadata.namespace.clone()?,
        "metadata.uid" => metadata.uid.clone()?,
        "spec.nodeName" => spec?.node_name.clone()?,
        "spec.serviceAccountName" => spec?
            .service_account_name
            .clone()
            .unwrap_or_else(|| "default".into()),
        "status.hostIP" => facts.host_ip.into(),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => keyed("metadata.labels", &metadata.labels)
            .or_else(|| keyed("metadata.annotations", &metadata.annotations))?,
    })
}

/// `{SVC}_SERVICE_HOST`, `{SVC}_SERVICE_PORT` and `{SVC}_SERVICE_PORT_{NAME}` of a service with a cluster IP.
fn service_variables(service: &Service) -> Vec<(String, String)> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let address = spec.cluster_ip.as_deref().unwrap_or_default();
    let ports = spec.ports.as_deref().unwrap_or_default();
    let (Some(name), Some(first)) = (&service.metadata.name, ports.first()) else {
        return Vec::new();
    };
    if address.is_empty() || address == "None" {
        return Vec::new();
    }
    let prefix = variable_name(name);
    let mut variables = vec![
        (format!("{prefix}_SERVICE_HOST"), address.to_owned()),
        (format!("{prefix}_SERVICE_PORT"), first.port.to_string()),
    ];
    variables.extend(ports.iter().filter_map(|port| {
        let name = port.name.as_ref().filter(|name| !name.is_empty())?;
        Some((
            format!("{prefix}_SERVICE_PORT_{}", variable_name(name)),
            port.port.to_string(),
        ))
    }));
    variables
}

fn variable_name(name: &str) -> String {
    name.to_ascii_uppercase().replace(['-', '.'], "_")
}

/// Replaces `$(NAME)` where NAME is set, leaves it where it is not, and makes `$$` a `$`.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let variable = after.strip_prefix('(').and_then(|inner| {
            let (name, tail) = inner.split_once(')')?;
            Some((env.get(name)?, tail))
        });
        rest = if let Some((value, tail)) = variable {
            out.push_str(value);
            tail
        } else {
            out.push('$');
            after.strip_prefix('$').unwrap_or(after)
        };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn pod() -> Pod {
        from_value(json!({
            "metadata": {"name": "web-0", "namespace": "shop", "uid": "u", "labels": {"app": "web"}},
            "spec": {"nodeName": "east-1", "containers": []}
        }))
        .unwrap()
    }

    fn services() -> Vec<Service> {
        from_value(json!([
            {"metadata": {"name": "my-db"}, "spec": {"clusterIP": "10.101.0.7",
                "ports": [{"name": "sql", "port": 5432}, {"name": "admin-x", "port": 9000}]}},
            {"metadata": {"name": "headless"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}}
        ]))
        .unwrap()
    }

    #[track_caller]
    fn check(env: serde_json::Value, name: &str, want: Option<&str>) {
        let container: Container = from_value(json!({"name": "c", "env": env})).unwrap();
        let (pod, services) = (pod(), services());
        let ips = ["10.1.1.5".to_owned(), "fd00::5".to_owned()];
        let facts = Facts {
            pod: &pod,
            pod_ips: &ips,
            host_ip: "172.31.0.11",
            services: &services,
        };
        let found = environment(facts, &container).unwrap();
        let value = found
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str());
        assert_eq!(value, want);
    }

    fn field(path: &str) -> serde_json::Value {
        json!([{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}])
    }

    #[test]
    fn fields_of_the_pod_are_found() {
        check(field("metadata.name"), "X", Some("web-0"));
        check(field("metadata.namespace"), "X", Some("shop"));
        check(field("metadata.labels['app']"), "X", Some("web"));
        check(field("metadata.labels['none']"), "X", Some(""));
        check(field("spec.nodeName"), "X", Some("east-1"));
        check(field("status.podIP"), "X", Some("10.1.1.5"));
        check(field("status.podIPs"), "X", Some("10.1.1.5,fd00::5"));
        check(field("status.hostIP"), "X", Some("172.31.0.11"));
        check(json!([]), "HOSTNAME", Some("web-0"));
    }

    #[test]
    fn services_with_a_cluster_ip_have_variables() {
        check(json!([]), "MY_DB_SERVICE_HOST", Some("10.101.0.7"));
        check(json!([]), "MY_DB_SERVICE_PORT", Some("5432"));
        check(json!([]), "MY_DB_SERVICE_PORT_ADMIN_X", Some("9000"));
        check(json!([]), "HEADLESS_SERVICE_HOST", None);
        check(
            json!([{"name": "MY_DB_SERVICE_HOST", "value": "own"}]),
            "MY_DB_SERVICE_HOST",
            Some("own"),
        );
    }

    #[test]
    fn references_are_replaced_in_order() {
        let env = json!([{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(NONE)-$$(A)"}]);
        check(env, "B", Some("1-$(NONE)-$(A)"));
    }

    #[test]
    fn what_the_sandbox_does_not_have_is_refused_by_name() {
        let container: Container = from_value(json!({"name": "c", "env": [
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}))
        .unwrap();
        let pod = pod();
        let facts = Facts {
            pod: &pod,
            pod_ips: &[],
            host_ip: "",
            services: &[],
        };
        assert!(environment(facts, &container).unwrap_err().contains("`PASSWORD`"));
    }

    #[test]
    fn a_command_line_needs_a_command() {
        let env = [("PORT".to_owned(), "80".to_owned())];
        let with = |command: serde_json::Value| -> Container {
            from_value(json!({"name": "c", "command": command, "args": ["-p", "$(PORT)"]})).unwrap()
        };
        assert_eq!(
            command_line(&with(json!(["serve"])), &env).unwrap(),
            ["serve", "-p", "80"]
        );
        assert!(
            command_line(&with(json!([])), &env)
                .unwrap_err()
                .contains("`command`")
        );
    }
}
