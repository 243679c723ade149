//! Runs the probes of [`probe`](crate::probe): sockets, time, and a look into the ipcache when a node does not answer.
//!
//! In: whom to probe, this node's router addresses. Out: [`Verdicts`] of nodes, whenever they changed, at most once a second;
//! [`ClusterData`] of remote clusters, more often while one is silent.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_bpf_abi::IpcacheKey;
use isthmus_datapath::Datapath;
use isthmus_mesh::{reach::Data, to_address, to_ip};
use isthmus_model::ClusterName;
use isthmus_runtime::CancellationToken;
use tokio::sync::watch;

use crate::{
    endpoints::keeper::Network,
    node::LocalNode,
    probe::{
        NodeKey, Prober, Verdict,
        sentinels::Sentinels,
        udp::{Answer, ProbeSockets},
    },
};

/// Router address and tunnel endpoint of each other node.
pub type ProbeTargets = BTreeMap<NodeKey, (IpAddr, Option<IpAddr>)>;
/// What is known of each.
pub type Verdicts = Arc<[(NodeKey, Verdict)]>;
/// What is known of each remote cluster.
pub type ClusterData = Arc<[(ClusterName, Data)]>;

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

/// Who hears of what was found.
#[derive(Debug)]
pub struct Outputs {
    /// Of each node.
    pub verdicts: watch::Sender<Verdicts>,
    /// Of each remote cluster.
    pub clusters: watch::Sender<ClusterData>,
}

/// What does not change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Port of probes.
    pub port: u16,
    /// The own cluster: it is not watched as a whole.
    pub own: ClusterName,
    /// Within this time a silent cluster must be known to be so.
    pub leave_after: Duration,
}

/// Works until `shutdown`. `started` is what times in verdicts count from.
pub async fn run(
    datapath: Arc<Datapath>,
    settings: Settings,
    started: Instant,
    mut inputs: Inputs,
    outputs: Outputs,
    shutdown: CancellationToken,
) {
    // Seeded from the system's randomness through the standard library's hasher keys.
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), started);
    let port = settings.port;
    let mut prober = Prober::new(seed);
    let mut sentinels = Sentinels::new(settings.leave_after, seed);
    let mut sockets: Vec<(IpAddr, ProbeSockets)> = vec![];
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut often = tokio::time::interval(sentinels.tick_every());
    often.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
                    let mut remote = addresses;
                    remote.retain(|node, _| node.cluster != settings.own);
                    sentinels.set_targets(&remote);
                    send(&mut prober, &sockets, port, now);
                    explain(&mut prober, &datapath, &targets);
                }
                tell(&prober, &outputs.verdicts);
                tell_clusters(&sentinels, &outputs.clusters, true);
            }
            _ = often.tick() => {
                if !sockets.is_empty() {
                    watch_clusters(&mut sentinels, &sockets, port, started.elapsed());
                    tell_clusters(&sentinels, &outputs.clusters, false);
                }
            }
            answer = next_answer(&sockets) => {
                // Told with the next tick: an answer a node and interval need not wake everyone.
                let now = started.elapsed();
                if prober.on_answer(now, answer.from, answer.nonce).is_none()
                    && !sentinels.on_answer(now, answer.from, answer.nonce)
                {
                    tracing::trace!(from = %answer.from, "probe answered late, or by a stranger");
                }
            }
        }
    }
}

fn tell(prober: &Prober, verdicts: &watch::Sender<Verdicts>) {
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

/// Tells of clusters: once a second, and at once when probes go unanswered or are answered again.
fn tell_clusters(sentinels: &Sentinels, clusters: &watch::Sender<ClusterData>, all: bool) {
    let now: ClusterData = sentinels
        .data()
        .map(|(name, data)| (name.clone(), *data))
        .collect();
    clusters.send_if_modified(|before| {
        let unanswered =
            |data: &ClusterData| data.iter().map(|(_, data)| data.unanswered).collect::<Vec<_>>();
        let changed = (all && **before != *now) || unanswered(before) != unanswered(&now);
        if changed {
            *before = now;
        }
        changed
    });
}

/// One that cannot be sent goes unanswered: the way is gone.
fn watch_clusters(sentinels: &mut Sentinels, sockets: &[(IpAddr, ProbeSockets)], port: u16, now: Duration) {
    for probe in sentinels.tick(now) {
        let socket = sockets
            .iter()
            .find(|(ip, _)| ip.is_ipv4() == probe.address.is_ipv4());
        let sent = socket.map(|(_, socket)| socket.ask(SocketAddr::new(probe.address, port), probe.nonce));
        if let Some(Err(error)) = sent {
            tracing::trace!(node = probe.node.node, cluster = %probe.node.cluster, %error, "cannot send a probe");
        }
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
