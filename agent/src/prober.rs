//! Runs the probes of [`probe`](crate::probe): sockets, time, and a look into the ipcache when a node does not answer.
//!
//! In: whom to probe, this node's router addresses. Out: [`Verdicts`], whenever they changed, at most once a second.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_bpf_abi::IpcacheKey;
use isthmus_datapath::Datapath;
use isthmus_mesh::{to_address, to_ip};
use isthmus_model::{ClusterId, ClusterName};
use isthmus_runtime::CancellationToken;
use tokio::sync::watch;

use crate::{
    endpoints::keeper::Network,
    node::LocalNode,
    probe::{
        NodeKey, Prober, Verdict,
        udp::{Answer, ProbeSockets},
    },
    state::State,
};

/// Router address and tunnel endpoint of each other node.
pub type ProbeTargets = BTreeMap<NodeKey, (IpAddr, Option<IpAddr>)>;
/// What is known of each.
pub type Verdicts = Arc<[(NodeKey, Verdict)]>;

/// What the task watches.
#[derive(Debug)]
pub struct Inputs {
    /// This node.
    pub node: watch::Receiver<Result<LocalNode, String>>,
    /// Its devices.
    pub network: watch::Receiver<Network>,
    /// Whom to probe.
    pub targets: watch::Receiver<ProbeTargets>,
}

/// Clusters of which no node answers, although they run agents that would: those backends are a last resort.
///
/// A cluster that never announced Isthmus' form and of which no node ever answered may not know our probes; nothing
/// follows from its silence.
pub fn unhealthy_clusters(state: &State, verdicts: &[(NodeKey, Verdict)]) -> BTreeSet<ClusterId> {
    let mut nodes: BTreeMap<&ClusterName, Vec<&Verdict>> = BTreeMap::new();
    for (key, verdict) in verdicts {
        nodes.entry(&key.cluster).or_default().push(verdict);
    }
    let silent = |cluster: &crate::state::ClusterView| {
        let Some(verdicts) = nodes.get(&cluster.name) else {
            return false;
        };
        let knows = cluster.slices || verdicts.iter().any(|verdict| verdict.last_success.is_some());
        knows && verdicts.iter().all(|verdict| verdict.is_unreachable())
    };
    state
        .clusters()
        .filter(|cluster| !cluster.own && silent(cluster))
        .map(|cluster| cluster.id)
        .collect()
}

/// Works until `shutdown`. `started` is what times in verdicts count from.
pub async fn run(
    datapath: Arc<Datapath>,
    port: u16,
    started: Instant,
    mut inputs: Inputs,
    verdicts: watch::Sender<Verdicts>,
    shutdown: CancellationToken,
) {
    // Seeded from the system's randomness through the standard library's hasher keys.
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), started);
    let mut prober = Prober::new(seed);
    let mut sockets: Vec<(IpAddr, ProbeSockets)> = vec![];
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = second.tick() => {
                bind(&mut sockets, &mut inputs, port).await;
                let targets = inputs.targets.borrow_and_update().clone();
                let addresses = targets.iter().map(|(key, (address, _))| (key.clone(), *address)).collect();
                let now = started.elapsed();
                if !sockets.is_empty() {
                    prober.set_targets(now, &addresses);
                    send(&mut prober, &sockets, port, now);
                    explain(&mut prober, &datapath, &targets);
                }
            }
            answer = next_answer(&sockets) => {
                let node = prober.on_answer(started.elapsed(), answer.from, answer.nonce);
                if node.is_none() {
                    tracing::trace!(from = %answer.from, "probe answered late, or by a stranger");
                }
                // Told with the next tick: an answer a node and interval need not wake everyone.
                continue;
            }
        }
        let now: Verdicts = prober
            .verdicts()
            .map(|(key, verdict)| (key.clone(), verdict.clone()))
            .collect();
        verdicts.send_if_modified(|before| {
            let changed = **before != *now;
            *before = now;
            changed
        });
    }
}

/// Sockets on every router address that is there. Those of former addresses go.
async fn bind(sockets: &mut Vec<(IpAddr, ProbeSockets)>, inputs: &mut Inputs, port: u16) {
    if !matches!(*inputs.network.borrow_and_update(), Network::Ready { .. }) {
        return;
    }
    let Ok(node) = inputs.node.borrow_and_update().clone() else {
        return;
    };
    sockets.retain(|(ip, _)| node.router_ips.contains(ip));
    for ip in node.router_ips {
        if sockets.iter().any(|(bound, _)| *bound == ip) {
            continue;
        }
        match ProbeSockets::bind(ip, port).await {
            Ok(pair) => sockets.push((ip, pair)),
            Err(error) => tracing::debug!(%ip, port, %error, "cannot bind the probe's sockets yet"),
        }
    }
}

fn send(prober: &mut Prober, sockets: &[(IpAddr, ProbeSockets)], port: u16, now: Duration) {
    for probe in prober.tick(now) {
        let socket = sockets
            .iter()
            .find(|(ip, _)| ip.is_ipv4() == probe.address.is_ipv4());
        let sent = match socket {
            Some((_, socket)) => socket.ask(SocketAddr::new(probe.address, port), probe.nonce),
            None => Err(std::io::Error::other(
                "no router address of that family to send from",
            )),
        };
        if let Err(error) = sent {
            prober.on_send_error(
                probe.nonce,
                &format!("cannot send a probe to {}: {error}", probe.address),
            );
        }
    }
}

async fn next_answer(sockets: &[(IpAddr, ProbeSockets)]) -> Answer {
    if sockets.is_empty() {
        return std::future::pending().await;
    }
    let waiting = sockets.iter().map(|(_, socket)| Box::pin(socket.next_answer()));
    futures::future::select_all(waiting).await.0
}

/// Says why a node may not answer: what the ipcache map says about it, against what its object says.
fn explain(prober: &mut Prober, datapath: &Datapath, targets: &ProbeTargets) {
    let silent: Vec<NodeKey> = prober
        .verdicts()
        .filter(|(_, verdict)| verdict.misses > 0)
        .map(|(key, _)| key.clone())
        .collect();
    for key in silent {
        let Some((address, tunnel_endpoint)) = targets.get(&key) else {
            continue;
        };
        let entry = datapath
            .tables()
            .ipcache
            .lookup(&IpcacheKey::host(&to_address(*address)));
        let Ok(entry) = entry else { continue };
        let map = entry
            .map(|entry| entry.tunnel_endpoint)
            .filter(|endpoint| *endpoint != [0; 16])
            .map(|endpoint| to_ip(&endpoint));
        prober.explain(&key, cause(*address, map, *tunnel_endpoint));
    }
}

fn cause(address: IpAddr, map: Option<IpAddr>, object: Option<IpAddr>) -> String {
    match (map, object) {
        (_, None) => "its node object has no address to tunnel to".to_owned(),
        (None, Some(_)) => format!("the ipcache has no tunnel endpoint for its router address {address}"),
        (Some(map), Some(object)) if map != object => format!(
            "the ipcache sends its router address {address} to {map}, but its node object says {object}"
        ),
        (Some(map), _) => format!("no answer through the tunnel to {map}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_tunnel_endpoint_is_the_cause_that_is_named() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let router = ip("10.2.0.1");
        let (right, wrong) = (ip("172.18.0.3"), ip("172.18.0.9"));
        assert!(cause(router, Some(right), Some(right)).starts_with("no answer"));
        assert!(cause(router, Some(wrong), Some(right)).contains("172.18.0.9"));
        assert!(cause(router, None, Some(right)).contains("no tunnel endpoint"));
        assert!(cause(router, None, None).contains("no address"));
    }
}
