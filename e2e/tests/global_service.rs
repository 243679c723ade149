//! A global service in two clusters: every row of the merge table, both families, TCP and UDP, as a client pod sees it.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, program};
use isthmus_sandbox::load::{Load, Style, Tally};

struct Scene {
    sandbox: Sandbox,
}

impl Scene {
    async fn load(&self, cluster: &str, service: &str, family: usize, style: Style) -> anyhow::Result<Load> {
        let target = SocketAddr::new(self.sandbox.cluster_ip(cluster, service, family).await?, 80);
        let asker = self.sandbox.asker(cluster, "client");
        Load::start(
            self.sandbox.client(),
            &program("isthmus")?,
            &asker,
            target,
            style,
            200,
        )
        .await
    }

    async fn annotate(&self, cluster: &str, service: &str, annotations: &[&str]) -> anyhow::Result<()> {
        let args = [
            &["-n", NAMESPACE, "annotate", "--overwrite", "service", service][..],
            annotations,
        ]
        .concat();
        self.sandbox.kubectl(cluster).run(&args).await.map(drop)
    }

    /// Asks from `cluster` until exactly `want` answer, without a failure since the change.
    async fn expect(&self, cluster: &str, service: &str, what: &str, want: &[&str]) -> anyhow::Result<()> {
        let load = self.load(cluster, service, 0, Style::Connections).await?;
        let holds = |tally: &Tally| tally.failed == 0 && tally.clusters() == want;
        load.until(100, PATIENCE, what, holds)
            .await
            .with_context(|| format!("{service}: {what}"))?;
        load.stop().await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn global_services_follow_the_merge_table() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-global", 2, 2).await?;
    for (cluster, node) in [("east", "east-1"), ("west", "west-1")] {
        sandbox.make_client(cluster, "client", Some(node)).await?;
        sandbox.make_service(cluster, "hello", 2, GLOBAL).await?;
        sandbox.make_service(cluster, "plain", 1, &[]).await?;
        let old = [("io.cilium/global-service", "true")];
        sandbox.make_service(cluster, "old", 1, &old).await?;
    }
    let scene = Scene { sandbox };
    both_families_and_protocols(&scene).await?;
    pods_reach_pods_everywhere(&scene).await?;
    merge_table(&scene).await?;
    old_annotation_names(&scene).await?;
    open_connections_stay_and_show_the_frontend(&scene).await
}

async fn both_families_and_protocols(scene: &Scene) -> anyhow::Result<()> {
    for cluster in ["east", "west"] {
        for family in [0, 1] {
            for style in [Style::Connections, Style::Datagrams, Style::Kept] {
                let load = scene.load(cluster, "hello", family, style).await?;
                // An open connection stays with one backend; new ones reach both clusters.
                let clusters = if style == Style::Kept { 1 } else { 2 };
                let holds = |tally: &Tally| tally.failed == 0 && tally.by_cluster.len() == clusters;
                let what = format!("{style:?} from {cluster} in family {family}");
                load.until(100, PATIENCE, &what, holds).await?;
                load.stop().await?;
            }
        }
    }
    Ok(())
}

async fn pods_reach_pods_everywhere(scene: &Scene) -> anyhow::Result<()> {
    for cluster in ["east", "west"] {
        let ips = scene
            .sandbox
            .kubectl(cluster)
            .run(&[
                "-n",
                NAMESPACE,
                "get",
                "pods",
                "-l",
                "app=hello",
                "-o",
                "jsonpath={.items[*].status.podIPs[*].ip}",
            ])
            .await?;
        ensure!(
            ips.split_whitespace().count() == 4,
            "two pods with two addresses each: {ips}"
        );
        for ip in ips.split_whitespace() {
            let mut ping = scene.sandbox.client().exec("west", NAMESPACE, "client").await?;
            let output = ping.args(["ping", "-c", "2", "-W", "2", ip]).output().await?;
            ensure!(
                output.status.success(),
                "ping {ip} from west: {}",
                String::from_utf8_lossy(&output.stdout)
            );
        }
    }
    Ok(())
}

async fn merge_table(scene: &Scene) -> anyhow::Result<()> {
    scene
        .expect(
            "west",
            "plain",
            "a service that is not global stays at home",
            &["west"],
        )
        .await?;
    scene
        .expect("west", "hello", "both global", &["east", "west"])
        .await?;

    scene
        .annotate("east", "hello", &["service.cilium.io/shared=false"])
        .await?;
    scene
        .expect("west", "hello", "the other one is not shared", &["west"])
        .await?;
    scene
        .expect(
            "east",
            "hello",
            "not shared, but global: uses the others'",
            &["east", "west"],
        )
        .await?;
    scene
        .annotate("east", "hello", &["service.cilium.io/shared-"])
        .await?;
    scene
        .expect("west", "hello", "shared again", &["east", "west"])
        .await?;

    scene
        .annotate("west", "hello", &["service.cilium.io/global=false"])
        .await?;
    scene
        .expect("west", "hello", "not global here", &["west"])
        .await?;
    scene
        .expect("east", "hello", "the other one is not global", &["east"])
        .await?;
    scene
        .annotate("west", "hello", &["service.cilium.io/global=true"])
        .await?;

    scene
        .annotate("west", "hello", &["service.cilium.io/affinity=local"])
        .await?;
    scene.expect("west", "hello", "affinity local", &["west"]).await?;
    scene
        .expect("east", "hello", "affinity is not on the wire", &["east", "west"])
        .await?;
    scene
        .sandbox
        .kubectl("west")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=0"])
        .await?;
    scene
        .expect(
            "west",
            "hello",
            "affinity local without local backends",
            &["east"],
        )
        .await?;
    scene
        .sandbox
        .kubectl("west")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=2"])
        .await?;
    scene
        .expect(
            "west",
            "hello",
            "affinity local with local backends again",
            &["west"],
        )
        .await?;

    scene
        .annotate("west", "hello", &["service.cilium.io/affinity=remote"])
        .await?;
    scene
        .expect("west", "hello", "affinity remote", &["east"])
        .await?;
    scene
        .sandbox
        .kubectl("east")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=0"])
        .await?;
    scene
        .expect(
            "west",
            "hello",
            "affinity remote without remote backends",
            &["west"],
        )
        .await?;
    scene
        .sandbox
        .kubectl("east")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=2"])
        .await?;
    scene
        .annotate("west", "hello", &["service.cilium.io/affinity=sideways"])
        .await?;
    scene
        .expect("west", "hello", "an unknown affinity is none", &["east", "west"])
        .await?;
    scene
        .annotate("west", "hello", &["service.cilium.io/affinity-"])
        .await?;

    scene
        .sandbox
        .kubectl("east")
        .run(&["-n", NAMESPACE, "delete", "service", "hello"])
        .await?;
    scene
        .expect("west", "hello", "the other service is deleted", &["west"])
        .await?;
    scene.sandbox.make_service("east", "hello", 2, GLOBAL).await?;
    scene.expect("west", "hello", "and back", &["east", "west"]).await
}

async fn old_annotation_names(scene: &Scene) -> anyhow::Result<()> {
    scene
        .expect("west", "old", "the old name makes it global", &["east", "west"])
        .await?;
    scene
        .annotate("east", "old", &["io.cilium/shared-service=false"])
        .await?;
    scene
        .expect("west", "old", "the old name withdraws it", &["west"])
        .await?;
    scene
        .annotate("east", "old", &["service.cilium.io/shared=true"])
        .await?;
    scene
        .expect("west", "old", "the new name wins", &["east", "west"])
        .await
}

async fn open_connections_stay_and_show_the_frontend(scene: &Scene) -> anyhow::Result<()> {
    // An endpoint that drains keeps its open connection until it ends; new ones go elsewhere.
    let kept = scene.load("west", "hello", 0, Style::Kept).await?;
    kept.next(50, PATIENCE).await?;
    scene
        .annotate("east", "hello", &["service.cilium.io/shared=false"])
        .await?;
    scene.expect("west", "hello", "withdrawn", &["west"]).await?;
    kept.next(50, PATIENCE).await?;
    scene
        .annotate("east", "hello", &["service.cilium.io/shared-"])
        .await?;
    let tally = Tally::of(&kept.stop().await?);
    ensure!(tally.failed == 0, "the open connection broke: {:?}", tally.errors);
    Ok(())
}
