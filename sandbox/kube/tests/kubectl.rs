//! The real kubectl against the served API.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/cluster.rs"]
mod cluster;

use cluster::start;
use isthmus_sandbox_kube::meta;
use serde_json::{Value, json};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: web:1
        resources: {requests: {cpu: 1}}
        ports: [{name: http, containerPort: 8080}]
        env: [{name: A, value: "1"}]
---
apiVersion: v1
kind: Service
metadata: {name: web, annotations: {service.cilium.io/global: "true"}}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_is_applied_rolled_out_scaled_and_deleted() {
    let cluster = start().await;
    let first = cluster.kubectl_with("apply -f -", WEB).await;
    assert!(
        first.contains("deployment.apps/web created") && first.contains("service/web created"),
        "{first}"
    );
    cluster
        .kubectl("rollout status deployment/web --timeout=20s")
        .await;
    cluster
        .kubectl("wait --for=condition=Available deployment/web --timeout=20s")
        .await;
    cluster
        .kubectl("wait --for=condition=Ready pod -l app=web --timeout=20s")
        .await;
    assert!(
        cluster
            .kubectl_with("apply -f -", WEB)
            .await
            .contains("service/web unchanged")
    );

    let endpoints = cluster.endpoints("web");
    assert_eq!(endpoints.len(), 3);
    assert!(
        endpoints
            .iter()
            .all(|e| e["conditions"] == json!({"ready": true, "serving": true, "terminating": false}))
    );
    let zones: std::collections::BTreeSet<&str> =
        endpoints.iter().filter_map(|e| e["zone"].as_str()).collect();
    assert_eq!(zones.len(), 2, "the pods are spread over both nodes");

    let pods: Value = serde_json::from_str(&cluster.kubectl("get pods -l app=web -o json").await).unwrap();
    let before: Vec<&str> = pods["items"].as_array().unwrap().iter().map(meta::uid).collect();
    cluster
        .kubectl_with("apply -f -", &WEB.replace("web:1", "web:2"))
        .await;
    cluster
        .kubectl("rollout status deployment/web --timeout=20s")
        .await;
    cluster
        .until("end of the old pods", |client| {
            let pods = client.all("pods", Some("default"));
            pods.len() == 3 && pods.iter().all(|pod| !before.contains(&meta::uid(pod.value())))
        })
        .await;
    cluster.kubectl("rollout undo deployment/web").await;
    cluster
        .kubectl("rollout status deployment/web --timeout=20s")
        .await;
    assert!(
        cluster
            .kubectl("get deployment web -o wide")
            .await
            .contains("web:1")
    );

    cluster.kubectl("scale deployment/web --replicas=5").await;
    cluster
        .until("five endpoints", |_| cluster.endpoints("web").len() == 5)
        .await;
    cluster.kubectl("scale deployment/web --replicas=1").await;
    cluster
        .until("one endpoint", |_| cluster.endpoints("web").len() == 1)
        .await;
    cluster.kubectl_with("delete -f - --timeout=20s", WEB).await;
    cluster
        .until("end of everything", |client| {
            let left = ["pods", "replicasets.apps", "endpointslices.discovery.k8s.io"];
            left.iter().all(|resource| client.all(resource, None).is_empty())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_have_the_columns_of_kubernetes() {
    let cluster = start().await;
    cluster.kubectl_with("apply -f -", WEB).await;
    cluster
        .kubectl("rollout status deployment/web --timeout=20s")
        .await;
    let header = |text: &str| {
        text.lines()
            .next()
            .unwrap_or("")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    for (command, want) in [
        (
            "get pods -o wide",
            "NAME READY STATUS RESTARTS AGE IP NODE NOMINATED NODE READINESS GATES",
        ),
        ("get services", "NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE"),
        ("get deployments", "NAME READY UP-TO-DATE AVAILABLE AGE"),
        ("get nodes", "NAME STATUS ROLES AGE VERSION"),
        ("get endpointslices", "NAME ADDRESSTYPE PORTS ENDPOINTS AGE"),
        ("get ns", "NAME STATUS AGE"),
        ("get serviceaccounts", "NAME AGE"),
    ] {
        assert_eq!(header(&cluster.kubectl(command).await), want, "{command}");
    }
    let pods = cluster.kubectl("get pods").await;
    assert!(pods.contains("1/1") && pods.contains("Running"), "{pods}");
    let pod = cluster
        .kubectl("get pods -o name")
        .await
        .lines()
        .next()
        .unwrap()
        .to_owned();
    assert!(
        cluster
            .kubectl(&format!("logs {pod}"))
            .await
            .contains("says hello")
    );
    assert!(cluster.kubectl("describe service web").await.contains("10.96.0."));
    assert!(
        cluster
            .kubectl("get pods --field-selector status.phase=Failed -o name")
            .await
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patches_labels_and_annotations() {
    let cluster = start().await;
    cluster.kubectl_with("apply -f -", WEB).await;
    cluster.kubectl("label service web tier=front").await;
    cluster.kubectl("annotate service web note=hello").await;
    let patch = |kind: &'static str, patch: &'static str| {
        let cluster = &cluster;
        async move {
            let output = cluster
                .try_kubectl(&["patch", "deployment", "web", "--type", kind, "-p", patch], "")
                .await;
            assert!(
                output.status.success(),
                "{kind}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    };
    patch(
        "strategic",
        r#"{"spec":{"template":{"spec":{"containers":[{"name":"web","env":[{"name":"B","value":"2"}]}]}}}}"#,
    )
    .await;
    patch("merge", r#"{"metadata":{"labels":{"merged":"yes"}}}"#).await;
    patch("json", r#"[{"op":"replace","path":"/spec/replicas","value":4}]"#).await;
    let web = cluster
        .api
        .client()
        .get("deployments.apps", "default", "web")
        .unwrap();
    let web = web.value();
    let container = &web["spec"]["template"]["spec"]["containers"][0];
    let names: Vec<&str> = container["env"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|e| e["name"].as_str())
        .collect();
    assert_eq!(
        (names, web["spec"]["replicas"].as_i64()),
        (vec!["A", "B"], Some(4))
    );
    assert_eq!(container["image"], "web:1");
    assert_eq!(meta::label(web, "merged"), Some("yes"));
    let service = cluster.api.client().get("services", "default", "web").unwrap();
    assert_eq!(meta::label(service.value(), "tier"), Some("front"));
    assert_eq!(meta::annotation(service.value(), "note"), Some("hello"));
    cluster.kubectl("label service web tier-").await;
    let service = cluster.api.client().get("services", "default", "web").unwrap();
    assert_eq!(meta::label(service.value(), "tier"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_side_apply_refuses_what_others_own() {
    let cluster = start().await;
    cluster.kubectl_with("apply --server-side -f -", WEB).await;
    cluster.kubectl("scale deployment/web --replicas=7").await;
    let refused = cluster
        .try_kubectl(&["apply", "--server-side", "-f", "-"], WEB)
        .await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains(".spec.replicas"),
        "{text}"
    );
    cluster
        .kubectl_with("apply --server-side --force-conflicts -f -", WEB)
        .await;
    let web = cluster
        .api
        .client()
        .get("deployments.apps", "default", "web")
        .unwrap();
    assert_eq!(web.value()["spec"]["replicas"], 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_are_created_without_a_manifest() {
    let cluster = start().await;
    cluster.kubectl("create namespace zone").await;
    cluster
        .kubectl("create configmap settings --from-literal=a=b -n zone")
        .await;
    cluster
        .kubectl("create secret generic keys --from-literal=a=b -n zone")
        .await;
    cluster.kubectl("create serviceaccount robot -n zone").await;
    cluster
        .kubectl("create deployment web --image=web --replicas=2 --port=80 -n zone")
        .await;
    cluster
        .kubectl("rollout status deployment/web -n zone --timeout=20s")
        .await;
    cluster.kubectl("expose deployment web --port=80 -n zone").await;
    cluster
        .kubectl("create service nodeport door --tcp=80:8080 -n zone")
        .await;
    cluster.kubectl("run single --image=web -n zone").await;
    cluster
        .kubectl("wait --for=condition=Ready pod/single -n zone --timeout=20s")
        .await;
    cluster
        .until("two endpoints", |_| cluster.endpoints("web").len() == 2)
        .await;
    let client = cluster.api.client();
    assert_eq!(
        client.get("configmaps", "zone", "settings").unwrap().value()["data"],
        json!({"a": "b"})
    );
    assert_eq!(
        client.get("secrets", "zone", "keys").unwrap().value()["data"],
        json!({"a": "Yg=="})
    );
    let door = client.get("services", "zone", "door").unwrap();
    assert_eq!(door.value()["spec"]["ports"][0]["targetPort"], 8080);
    assert_eq!(door.value()["spec"]["ports"][0]["nodePort"], 30000);

    cluster.kubectl("cordon n1").await;
    cluster
        .kubectl("drain n1 --force --ignore-daemonsets --timeout=20s")
        .await;
    cluster
        .until("pods on the other node only", |client| {
            let pods = client.all("pods", Some("zone"));
            pods.len() == 2 && pods.iter().all(|pod| pod.value()["spec"]["nodeName"] == "n2")
        })
        .await;
    cluster.kubectl("uncordon n1").await;
    cluster.kubectl("delete namespace zone --timeout=20s").await;
    assert!(client.get("namespaces", "", "zone").is_err());
    assert!(client.all("services", Some("zone")).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_kinds_are_served_as_soon_as_they_are_established() {
    let cluster = start().await;
    let definition = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: bridges.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: bridges, kind: Bridge, shortNames: [br]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns: [{name: Span, type: integer, jsonPath: .spec.span}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, required: [span], properties: {span: {type: integer, minimum: 1}}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
"#;
    cluster.kubectl_with("apply -f -", definition).await;
    cluster
        .kubectl("wait --for=condition=Established crd/bridges.example.com --timeout=20s")
        .await;
    let bridge = "apiVersion: example.com/v1\nkind: Bridge\nmetadata: {name: one}\nspec: {span: 12}\n";
    cluster.kubectl_with("apply -f -", bridge).await;
    let table = cluster.kubectl("get br").await;
    assert!(table.contains("SPAN") && table.contains("12"), "{table}");
    let refused = cluster
        .try_kubectl(&["apply", "-f", "-"], &bridge.replace("12", "0"))
        .await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("greater than or equal to 1"));
    cluster
        .kubectl_with("apply -f -", &bridge.replace("12", "13"))
        .await;
    let one = cluster
        .api
        .client()
        .get("bridges.example.com", "default", "one")
        .unwrap();
    assert_eq!(meta::generation(one.value()), 2);
    cluster
        .kubectl("delete crd bridges.example.com --timeout=20s")
        .await;
    assert!(
        !cluster
            .try_kubectl(&["get", "bridges"], "")
            .await
            .status
            .success()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_treats_dependents_as_asked() {
    let cluster = start().await;
    let client = cluster.api.client();
    for (cascade, left) in [("orphan", 3), ("foreground", 0), ("background", 0)] {
        cluster.kubectl_with("apply -f -", WEB).await;
        cluster
            .kubectl("rollout status deployment/web --timeout=20s")
            .await;
        cluster
            .kubectl(&format!(
                "delete deployment web --cascade={cascade} --timeout=20s"
            ))
            .await;
        if cascade == "foreground" {
            assert!(client.all("pods", Some("default")).is_empty());
        }
        cluster
            .until(cascade, |client| {
                client.all("pods", Some("default")).len() == left
            })
            .await;
        if left > 0 {
            assert_eq!(client.all("replicasets.apps", None).len(), 1);
            cluster.kubectl("delete replicaset -l app=web").await;
            cluster
                .until("end of the orphans", |client| {
                    client.all("pods", Some("default")).is_empty()
                })
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_explained() {
    let cluster = start().await;
    let dry = cluster.kubectl_with("apply --dry-run=server -f -", WEB).await;
    assert!(dry.contains("server dry run"), "{dry}");
    assert!(cluster.api.client().all("deployments.apps", None).is_empty());
    for (manifest, want) in [
        (
            WEB.replace("port: 80,", "port: 0,"),
            "must be between 1 and 65535",
        ),
        (
            WEB.replace("matchLabels: {app: web}", "matchLabels: {app: other}"),
            "does not match template `labels`",
        ),
        (
            WEB.replace("name: web, annotations", "name: Web, annotations"),
            "DNS-1035",
        ),
        (WEB.replace("replicas: 3", "replicas: many"), "invalid type"),
    ] {
        let refused = cluster.try_kubectl(&["apply", "-f", "-"], &manifest).await;
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && text.contains(want),
            "{want:?} is not in {text}"
        );
    }
    let missing = cluster.try_kubectl(&["get", "pod", "nobody"], "").await;
    assert_eq!(
        String::from_utf8_lossy(&missing.stderr).trim(),
        "Error from server (NotFound): pods \"nobody\" not found"
    );
}
