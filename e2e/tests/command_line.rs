//! What a person sees: status, lists, tables; and one clear message with the right exit code when something is wrong.

use std::process::Command;

use anyhow::{Context, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_show_what_is_there() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-cli", 2, 1).await?;
    for cluster in ["east", "west"] {
        sandbox.make_service(cluster, "hello", 1, GLOBAL).await?;
        sandbox.make_client(cluster, "client", None).await?;
    }
    eventually("west knows backends of both clusters", async || {
        let list = sandbox
            .isthmus("west-1", &["service", "list", "--all-backends"])
            .await?;
        ensure!(
            list.contains("hello") && list.contains("east") && list.contains("west"),
            "{list}"
        );
        Ok(())
    })
    .await?;
    sandbox.client().wait_ready(PATIENCE).await?;

    let status = sandbox.isthmus("west-1", &["status"]).await?;
    for word in ["west", "kvstore", "datapath", "clustermesh"] {
        ensure!(status.to_lowercase().contains(word), "no {word} in\n{status}");
    }
    let mesh = sandbox.isthmus_json("west-1", &["clustermesh", "status"]).await?;
    ensure!(mesh.to_string().contains("\"east\""), "{mesh}");
    for table in [
        "services",
        "nodes",
        "ipcache",
        "identities",
        "endpoints",
        "clusters",
    ] {
        let rows = sandbox.isthmus_json("west-1", &["db", "show", table]).await?;
        ensure!(
            rows.as_array().is_some_and(|rows| !rows.is_empty()),
            "table {table} is empty: {rows}"
        );
    }
    for list in ["lb", "ipcache", "endpoint"] {
        let rows = sandbox.isthmus_json("west-1", &["bpf", list, "list"]).await?;
        ensure!(
            rows.as_array().is_some_and(|rows| !rows.is_empty()),
            "bpf {list} list is empty: {rows}"
        );
    }
    let unknown = sandbox
        .isthmus_output("west-1", &["db", "show", "nonsense"])
        .await?;
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(
        !unknown.status.success() && text.contains("nonsense") && text.contains("services"),
        "{text}"
    );

    refusals_are_visible(&sandbox).await?;
    sandbox_exec_runs_in_the_pod(&sandbox)
}

/// A remote that lies: what is wrong is refused, counted and shown; the rest goes on.
async fn refusals_are_visible(sandbox: &Sandbox) -> anyhow::Result<()> {
    let mut etcd = sandbox.etcd("east").await?;
    for (key, value) in [
        ("cilium/state/nodes/v1/east/evil", "{not json".to_owned()),
        (
            "cilium/state/nodes/v1/east/liar",
            r#"{"Name":"liar","Cluster":"west","ClusterID":2,"IPAddresses":[]}"#.to_owned(),
        ),
        (
            "cilium/state/ip/v1/default/10.1.0.300",
            r#"{"IP":"10.1.0.300","Mask":null,"HostIP":"","ID":65600,"Key":0,"Metadata":""}"#.to_owned(),
        ),
        (
            "cilium/state/ip/v1/default/10.2.0.99",
            r#"{"IP":"10.2.0.99","Mask":null,"HostIP":"10.9.9.9","ID":131073,"Key":0,"Metadata":""}"#
                .to_owned(),
        ),
        (
            "cilium/state/identities/v1/id/131073",
            "k8s:app=x;k8s:io.cilium.k8s.policy.cluster=west;".to_owned(),
        ),
        (
            "isthmus/state/slices/v1/east/test/hello/evil",
            "x".repeat(1_200_000),
        ),
    ] {
        etcd.put(key, value, None)
            .await
            .with_context(|| format!("cannot put {key}"))?;
    }
    eventually("refusals by reason", async || {
        let mesh = sandbox
            .isthmus_json("west-1", &["clustermesh", "status"])
            .await?
            .to_string();
        for reason in [
            "malformed",
            "wrong_cluster",
            "malformed_field",
            "identity_range",
            "too_large",
        ] {
            ensure!(mesh.contains(reason), "no {reason} in {mesh}");
        }
        Ok(())
    })
    .await?;
    let nodes = sandbox
        .isthmus_json("west-1", &["db", "show", "nodes"])
        .await?
        .to_string();
    ensure!(nodes.contains("east-1") && !nodes.contains("liar"), "{nodes}");
    Ok(())
}

fn sandbox_exec_runs_in_the_pod(sandbox: &Sandbox) -> anyhow::Result<()> {
    let args = [
        "sandbox",
        "exec",
        "--name",
        sandbox.name(),
        "--cluster",
        "west",
        "-n",
        NAMESPACE,
        "client",
        "--",
        "ip",
        "-o",
        "-4",
        "addr",
        "show",
        "eth0",
    ];
    let shown = isthmus_e2e::run("isthmus", &args)?;
    ensure!(
        shown.contains("10.2."),
        "the pod's address is not of west's range: {shown}"
    );
    Ok(())
}

#[test]
fn a_wrong_flag_is_one_clear_message_and_exit_code_64() -> anyhow::Result<()> {
    for (name, args, words) in [
        (
            "isthmus-agent",
            &[
                "--cluster-id",
                "700",
                "--cluster-name",
                "a",
                "--node-name",
                "n",
                "--etcd-config",
                "/x",
            ][..],
            &["cluster-id", "700"][..],
        ),
        (
            "isthmus-operator",
            &[
                "--cluster-name",
                "Not_Valid",
                "--cluster-id",
                "1",
                "--etcd-config",
                "/x",
            ],
            &["cluster-name", "Not_Valid"],
        ),
        (
            "isthmus-clustermesh-apiserver",
            &["--max-connected-clusters", "300"],
            &["max-connected-clusters", "300"],
        ),
        (
            "isthmus",
            &["sandbox", "up", "--clusters", "many"],
            &["clusters", "many"],
        ),
    ] {
        let output = Command::new(program(name)?).args(args).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(64),
            "{name} {args:?} ended with {}: {text}",
            output.status
        );
        for word in words {
            ensure!(
                text.contains(word),
                "{name} {args:?} does not name {word}: {text}"
            );
        }
    }
    Ok(())
}

#[test]
fn without_root_the_message_says_what_to_do() -> anyhow::Result<()> {
    // A copy that an ordinary user may execute.
    let folder = tempfile::Builder::new().prefix("isthmus-e2e").tempdir()?;
    let copy = folder.path().join("isthmus");
    std::fs::copy(program("isthmus")?, &copy)?;
    let open = |path| std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755));
    open(folder.path())?;
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(&copy)
        .args(["sandbox", "up", "--name", "e2e-noroot"])
        .output()
        .context("cannot run setpriv (util-linux)")?;
    let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
    ensure!(
        !output.status.success() && text.contains("root") && text.contains("sudo"),
        "{text}"
    );
    Ok(())
}
