//! The kubeconfig file for a served API.

/// A kubeconfig for the API at `url`. Names are quoted as JSON strings, which are YAML as well.
pub fn kubeconfig_yaml(cluster_name: &str, url: &str) -> String {
    let name = serde_json::Value::from(cluster_name);
    let url = serde_json::Value::from(url);
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: {name}\n  cluster:\n    server: {url}\n\
         contexts:\n\
         - name: {name}\n  context:\n    cluster: {name}\n    namespace: default\n    user: {name}\n\
         users:\n\
         - name: {name}\n  user: {{}}\n\
         current-context: {name}\n"
    )
}
