//! `failover`: from a backend's readiness change, written to one cluster's Kubernetes API, to the changed BPF map on a node of
//! another cluster. Beside it, in the same run and for every change, a bare etcd: a put of as many bytes into the same etcd
//! until a watch on the same machine delivers it.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use isthmus_bpf_abi::{PROTO_TCP, ServiceKey, ServiceValue, ipv4_mapped, maps};
use isthmus_datapath::{Map, pins};
use isthmus_sandbox::{SandboxClient, kubectl::Kubectl};
use tokio::net::TcpStream;

use crate::figure::Figure;

const SANDBOX: &str = "bench-failover";
/// A change that has not arrived after so long never will.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the map is looked at while a change is on its way.
const POLL: Duration = Duration::from_micros(50);
const SLICE_PATH: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/bench";

/// Removes the sandbox, whatever happens.
struct Cleanup(PathBuf);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Err(error) = isthmus(&self.0, &["down"]) {
            eprintln!("the sandbox {SANDBOX} is not removed: {error:#}");
        }
    }
}

/// Measures `changes` changes.
pub fn run(changes: usize) -> anyhow::Result<Vec<Figure>> {
    ensure!(changes > 0, "--changes is 0: it takes at least 1");
    let program = std::env::current_exe()
        .context("where am I")?
        .with_file_name("isthmus");
    let _cleanup = Cleanup(program.clone());
    isthmus(&program, &["down"])?;
    isthmus(&program, &["up", "--clusters", "2", "--nodes", "1"])?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (mut ours, mut bare) = runtime.block_on(measure(changes))?;
    ours.sort_by(f64::total_cmp);
    bare.sort_by(f64::total_cmp);
    let figure = |metric, part| {
        Figure::beside(
            "failover",
            metric,
            "ms",
            quantile(&ours, part),
            quantile(&bare, part),
            "bare etcd put to watch",
        )
    };
    Ok(vec![figure("p50_ms", 0.5), figure("p99_ms", 0.99)])
}

async fn measure(changes: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let sandbox = SandboxClient::open(SANDBOX)?;
    let status = sandbox.status().await?;
    for cluster in ["east", "west"] {
        Kubectl::new(&status.kubeconfig, cluster).apply(SERVICE).await?;
    }
    let (east, west) = (
        Kubectl::new(&status.kubeconfig, "east"),
        Kubectl::new(&status.kubeconfig, "west"),
    );
    east.apply(&slice(true)).await?;
    let ip: IpAddr = west
        .value("default", "service/bench", "{.spec.clusterIP}")
        .await?
        .parse()
        .context("cluster IP")?;
    let IpAddr::V4(ip) = ip else {
        bail!("the first cluster IP {ip} is not IPv4")
    };
    let frontend = ServiceKey::frontend(ipv4_mapped(ip.octets()), 80, PROTO_TCP);
    let services = pins::maps_dir(&sandbox.plan().bpf_root("west-1")).join(maps::SERVICES_NAME);
    let services = Map::<ServiceKey, ServiceValue>::open_readonly(&maps::SERVICES, &services)?;
    wait_for(&services, &frontend, 2)?;

    let cluster = status
        .clusters
        .iter()
        .find(|cluster| cluster.name == "east")
        .context("no cluster east")?;
    let mut api = connect(&cluster.kube_api).await?;
    let mut etcd = etcd_client::Client::connect([&cluster.etcd], None)
        .await
        .context("etcd")?;
    let mut watch = etcd_client::Client::connect([&cluster.etcd], None)
        .await?
        .watch(
            "isthmus-bench/",
            Some(etcd_client::WatchOptions::new().with_prefix()),
        )
        .await?;
    let (mut ours, mut bare) = (Vec::with_capacity(changes), Vec::with_capacity(changes));
    for change in 0..changes {
        let ready = change % 2 == 1;
        let begun = Instant::now();
        patch(&mut api, ready).await?;
        wait_for(&services, &frontend, if ready { 2 } else { 1 })?;
        ours.push(begun.elapsed().as_secs_f64() * 1e3);

        let begun = Instant::now();
        etcd.put("isthmus-bench/key", format!("{change:0>256}"), None)
            .await
            .context("put")?;
        loop {
            let message = watch
                .message()
                .await
                .context("watch")?
                .context("the watch ended")?;
            if !message.events().is_empty() {
                break;
            }
        }
        bare.push(begun.elapsed().as_secs_f64() * 1e3);
        if (change + 1) % 50 == 0 {
            eprintln!("failover: {} of {changes} changes", change + 1);
        }
    }
    Ok((ours, bare))
}

/// Returns as soon as the frontend has `count` slots.
fn wait_for(
    services: &Map<ServiceKey, ServiceValue>,
    frontend: &ServiceKey,
    count: u16,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = services.lookup(frontend)?.map_or(0, |value| value.count);
        if found == count {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the map shows {found} backends, not {count}, after {PATIENCE:?}"
        );
        std::thread::sleep(POLL);
    }
}

type Api = http1::SendRequest<Full<Bytes>>;

async fn connect(url: &str) -> anyhow::Result<Api> {
    let address: SocketAddr = url
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .parse()
        .with_context(|| format!("address of {url}"))?;
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn patch(api: &mut Api, ready: bool) -> anyhow::Result<()> {
    let path = "/endpoints/1/conditions";
    let body = format!(
        r#"[{{"op":"replace","path":"{path}","value":{{"ready":{ready},"serving":{ready},"terminating":false}}}}]"#
    );
    let request = Request::patch(SLICE_PATH)
        .header("host", "east")
        .header("content-type", "application/json-patch+json")
        .body(Full::new(Bytes::from(body)))?;
    api.ready().await?;
    let response = api.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(
        status.is_success(),
        "the Kubernetes API answered {status}: {}",
        String::from_utf8_lossy(&body)
    );
    Ok(())
}

/// A service whose endpoints the benchmark writes itself.
const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata:
  name: bench
  namespace: default
  annotations:
    service.cilium.io/global: "true"
spec:
  ports:
  - name: http
    port: 80
    targetPort: 8080
"#;

fn slice(ready: bool) -> String {
    let endpoint = |ip: &str, ready: bool| {
        format!(
            "- addresses: [{ip}]\n  conditions: {{ready: {ready}, serving: {ready}, terminating: false}}\n"
        )
    };
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata:\n  name: bench\n  namespace: default\n  \
         labels:\n    kubernetes.io/service-name: bench\nports:\n- name: http\n  port: 8080\n  protocol: TCP\nendpoints:\n{}{}",
        endpoint("10.1.0.201", true),
        endpoint("10.1.0.202", ready)
    )
}

/// The value below which `part` of the sorted `values` lie.
fn quantile(values: &[f64], part: f64) -> f64 {
    let rank = (values.len() as f64 * part).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

fn isthmus(program: &Path, args: &[&str]) -> anyhow::Result<()> {
    let (verb, rest) = args.split_first().context("no verb")?;
    let output = Command::new(program)
        .args(["sandbox", verb, "--name", SANDBOX])
        .args(rest)
        .output()
        .with_context(|| {
            format!(
                "cannot run {}; build with `cargo build --release --workspace --bins`",
                program.display()
            )
        })?;
    if !output.status.success() {
        bail!(
            "isthmus sandbox {verb}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(
            (
                quantile(&values, 0.5),
                quantile(&values, 0.99),
                quantile(&[7.0], 0.99)
            ),
            (100.0, 198.0, 7.0)
        );
    }
}
