//! What the demo applies: a global service with its servers in both clusters, and a client in each.

use std::path::Path;

/// Namespace of everything in the demo.
pub const NAMESPACE: &str = "demo";
/// Name of the service and of its deployment.
pub const SERVICE: &str = "hello";
/// Name of the client pod.
pub const CLIENT: &str = "client";
/// Servers in each cluster.
pub const REPLICAS: u32 = 3;

/// Manifests for one cluster.
pub fn manifests(cluster: &str, program: &Path) -> String {
    let program = program.display();
    format!(
        r#"apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
---
apiVersion: v1
kind: Service
metadata:
  name: {SERVICE}
  namespace: {NAMESPACE}
  annotations:
    service.cilium.io/global: "true"
spec:
  selector:
    app: {SERVICE}
  ports:
  - name: http
    port: 80
    targetPort: 8080
  - name: ask
    port: 80
    targetPort: 8080
    protocol: UDP
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {SERVICE}
  namespace: {NAMESPACE}
spec:
  replicas: {REPLICAS}
  selector:
    matchLabels:
      app: {SERVICE}
  template:
    metadata:
      labels:
        app: {SERVICE}
    spec:
      terminationGracePeriodSeconds: 10
      containers:
      - name: server
        image: unused
        command: ["{program}", "sandbox", "workload", "serve", "--port", "8080"]
        env:
        - name: CLUSTER
          value: {cluster}
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        readinessProbe:
          tcpSocket:
            port: 8080
          periodSeconds: 1
---
apiVersion: v1
kind: Pod
metadata:
  name: {CLIENT}
  namespace: {NAMESPACE}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: client
    image: unused
    command: ["sleep", "86400"]
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_is_an_object_with_a_kind() {
        let text = manifests("east", Path::new("/usr/bin/isthmus"));
        let kinds: Vec<String> = serde_yaml_ng::Deserializer::from_str(&text)
            .map(|document| {
                let value = <serde_json::Value as serde::Deserialize>::deserialize(document).unwrap();
                value["kind"].as_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(kinds, ["Namespace", "Service", "Deployment", "Pod"]);
    }
}
