//! The files that components and people read: etcd configurations, cluster files, kubeconfigs.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use isthmus_sandbox_kube::kubeconfig_yaml;
use serde_json::json;

use crate::pki;
use crate::plan::{ETCD_PORT, KUBE_API_PORT, Plan, StoreKind, etcd_config_yaml};

/// A file or directory that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct WriteError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Makes all directories and writes all files.
pub fn write_all(plan: &Plan) -> Result<(), WriteError> {
    directory(&plan.log_dir())?;
    for cluster in &plan.clusters {
        let name = &cluster.name;
        let mesh = plan.clustermesh_dir(name);
        directory(&mesh)?;
        let own = match plan.store {
            StoreKind::Etcd => etcd_config_yaml(&format!("http://127.0.0.1:{ETCD_PORT}"), None),
            // The API server takes writes from the cluster's administrator.
            StoreKind::Embedded => {
                let admin = pki::client_pair(plan, "admin", name);
                etcd_config_yaml(&https(cluster.apiserver()), Some(admin))
            }
        };
        write(&plan.own_etcd_config(name), &own)?;
        let local = Some(pki::client_pair(plan, "local", name));
        write(
            &plan.agent_etcd_config(name),
            &etcd_config_yaml(&https(cluster.apiserver()), local),
        )?;
        for remote in plan.clusters.iter().filter(|remote| remote.name != *name) {
            let pair = Some(pki::client_pair(plan, "remote", name));
            write(
                &mesh.join(&remote.name),
                &etcd_config_yaml(&https(remote.apiserver()), pair),
            )?;
        }
        write(
            &plan.cluster_kubeconfig(name),
            &kubeconfig_yaml(name, &format!("http://{}", cluster.kube_api())),
        )?;
        let inside = format!("http://127.0.0.1:{KUBE_API_PORT}");
        write(&plan.operator_kubeconfig(name), &kubeconfig_yaml(name, &inside))?;
        for node in &cluster.nodes {
            directory(&plan.node_dir(&node.name).join("state"))?;
        }
    }
    write(&plan.kubeconfig(), &merged_kubeconfig(plan))
}

fn https(address: SocketAddr) -> String {
    format!("https://{address}")
}

/// One context per cluster, named like it; the first cluster's is the current one. JSON is YAML.
fn merged_kubeconfig(plan: &Plan) -> String {
    let each = |entry: &dyn Fn(&crate::plan::ClusterPlan) -> serde_json::Value| -> Vec<serde_json::Value> {
        plan.clusters.iter().map(entry).collect()
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": each(&|cluster| json!({
            "name": cluster.name, "cluster": {"server": format!("http://{}", cluster.kube_api())}})),
        "contexts": each(&|cluster| json!({
            "name": cluster.name, "context": {"cluster": cluster.name, "user": cluster.name, "namespace": "default"}})),
        "users": each(&|cluster| json!({"name": cluster.name, "user": {}})),
        "current-context": plan.clusters.first().map(|cluster| &cluster.name),
    });
    // Strings, lists and maps alone: this cannot fail, and an empty file would be seen at once.
    serde_yaml_ng::to_string(&config).unwrap_or_default()
}

fn directory(path: &Path) -> Result<(), WriteError> {
    std::fs::create_dir_all(path).map_err(|source| WriteError {
        path: path.into(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), WriteError> {
    std::fs::write(path, text).map_err(|source| WriteError {
        path: path.into(),
        source,
    })
}
