//! How the agent is: one state for each subsystem, with the age of what it rests on. Pure; times are since the agent's start.
//!
//! In: [`Facts`]. Out: [`Subsystem`]s, used alike by `/readyz`, the CLI and metrics, so that they cannot tell different
//! stories.
//!
//! Rules: green means that the thing itself was seen to work lately, and says how lately. Readiness waits for the own
//! cluster's content to be in the maps, and, bounded by a timeout, for that of every remote cluster that is connected.
//! What was ready once degrades; it does not become unready, since the datapath goes on with what it has.

use std::{collections::BTreeMap, time::Duration};

use isthmus_mesh::{
    reach::{Judgement, Verdict as Reached},
    reconcile::Progress,
};
use isthmus_model::ClusterName;
use isthmus_runtime::State as Health;

use crate::{
    endpoints::keeper::Network,
    probe::{NodeKey, Verdict},
    state::{RemoteView, State, views::kind_name},
};

/// A heartbeat that is older is late: it is written once a minute.
const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(120);
/// How many names a message lists.
const NAMES_MAX: usize = 5;

/// The connection to the own cluster's API server.
#[derive(Clone, Debug, Default)]
pub struct Upstream {
    /// Where it is connected to.
    pub endpoint: String,
    /// A connection stands.
    pub connected: bool,
    /// When that changed last.
    pub changed_at: Duration,
    /// Why the last connection failed or ended.
    pub error: String,
    /// Connections that failed or ended.
    pub failures: u64,
    /// When anything was heard last.
    pub heard_at: Option<Duration>,
    /// When the own cluster's heartbeat was last seen to change.
    pub heartbeat_at: Option<Duration>,
    /// Feeds that are refused, and why.
    pub refused_feeds: BTreeMap<String, String>,
}

/// Everything that a status is made from.
#[derive(Debug)]
pub struct Facts {
    /// What is known.
    pub state: State,
    /// The upstream.
    pub upstream: Upstream,
    /// How far the maps are.
    pub progress: Progress,
    /// Devices and routes.
    pub network: Network,
    /// Probes; `None` if they are off.
    pub probes: Option<Vec<(NodeKey, Verdict)>>,
    /// Bound on waiting for remote clusters.
    pub sync_timeout: Duration,
    /// Remote clusters were waited for long enough, once and for all.
    pub remotes_passed: bool,
    /// The maps were empty at the start: no earlier agent's view is there to work on.
    pub fresh: bool,
    /// Full passes that failed since the last one that did not, and why.
    pub compare_error: Option<String>,
    /// Which remote clusters can be reached.
    pub reach: Vec<(ClusterName, Judgement)>,
    /// Why open flows of backends that leave are not ended, although they should be.
    pub no_failover: Option<String>,
}

/// One subsystem.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Subsystem {
    /// Its name.
    pub name: &'static str,
    /// How it is.
    pub health: Health,
    /// Age of what that rests on.
    pub age: Option<Duration>,
}

/// All subsystems.
pub fn subsystems(facts: &Facts, now: Duration) -> Vec<Subsystem> {
    let heard = facts.upstream.heard_at.map(|at| now.saturating_sub(at));
    let mut all = vec![
        Subsystem {
            name: "kvstore",
            health: kvstore(facts, now),
            age: facts.upstream.heartbeat_at.map(|at| now.saturating_sub(at)),
        },
        Subsystem {
            name: "clustermesh",
            health: clustermesh(facts, now),
            age: heard,
        },
        Subsystem {
            name: "loadbalancer",
            health: loadbalancer(facts),
            age: heard,
        },
        Subsystem {
            name: "ipcache",
            health: ipcache(facts),
            age: heard,
        },
        Subsystem {
            name: "endpoints",
            health: endpoints(facts),
            age: None,
        },
        Subsystem {
            name: "datapath",
            health: datapath(facts),
            age: None,
        },
    ];
    if !facts.reach.is_empty() {
        all.push(Subsystem {
            name: "reachability",
            health: reachability(&facts.reach, now),
            age: None,
        });
    }
    if let Some(probes) = &facts.probes {
        let oldest = probes
            .iter()
            .filter_map(|(_, verdict)| verdict.last_success)
            .min();
        all.push(Subsystem {
            name: "probe",
            health: probe(probes, now),
            age: oldest.map(|at| now.saturating_sub(at)),
        });
    }
    all
}

/// Whether readiness need not wait for remote clusters (any more).
pub fn remotes_pass(facts: &Facts, now: Duration) -> bool {
    let own = facts.state.own().is_some_and(|own| own.applied);
    // Before the list of clusters is complete nobody knows whom to wait for.
    let listed = facts.state.is_listed();
    let done = own
        && listed
        && facts
            .state
            .remotes()
            .iter()
            .filter(|remote| remote.is_awaited())
            .all(RemoteView::is_applied);
    facts.remotes_passed || done || (own && now >= facts.sync_timeout)
}

/// Whether pods may start on this node, or why not. On a new node they would not reach what lives in remote clusters only
/// before the view of those is in the maps; after a restart the earlier view is there.
pub fn pods_pass(facts: &Facts, now: Duration) -> Result<(), String> {
    if !facts.fresh || facts.remotes_passed {
        return Ok(());
    }
    match clustermesh(facts, now) {
        Health::Starting(why) => Err(format!("the view of the remote clusters is not complete: {why}")),
        _ => Ok(()),
    }
}

fn kvstore(facts: &Facts, now: Duration) -> Health {
    let upstream = &facts.upstream;
    if let Some(refusal) = facts.state.own_refused() {
        return Health::Failed(refusal.to_string());
    }
    let since = now.saturating_sub(upstream.changed_at);
    if !upstream.connected {
        return match upstream.heard_at {
            None => Health::Starting(match upstream.error.as_str() {
                "" => "connecting to the clustermesh-apiserver".to_owned(),
                error => error.to_owned(),
            }),
            Some(_) => Health::Degraded(format!(
                "lost {} ago, working on what was known then: {}",
                seconds(since),
                upstream.error
            )),
        };
    }
    if let Some((feed, error)) = upstream.refused_feeds.first_key_value() {
        let more = match upstream.refused_feeds.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        // The part after the mark is of no interest to people: it tells two feeds of one prefix apart.
        let prefix = feed.split('#').next().unwrap_or_default();
        return Health::Degraded(format!(
            "cannot read {prefix}{more}, what is known stays: {error}"
        ));
    }
    let connected = format!("connected to {} for {}", upstream.endpoint, seconds(since));
    match upstream.heartbeat_at.map(|at| now.saturating_sub(at)) {
        None if since > HEARTBEAT_AGE_MAX => Health::Degraded(format!(
            "{connected}, and no heartbeat was seen: the operator does not write, or the API server does not follow"
        )),
        None => Health::Ok(format!("{connected}, waiting for the first heartbeat")),
        Some(age) if age > HEARTBEAT_AGE_MAX => Health::Degraded(format!(
            "{connected}, but the last heartbeat is {} old: the operator does not write, or the API server does not follow",
            seconds(age)
        )),
        Some(age) => Health::Ok(format!("{connected}, heartbeat {} ago", seconds(age))),
    }
}

fn clustermesh(facts: &Facts, now: Duration) -> Health {
    let remotes = facts.state.remotes();
    let late: Vec<String> = remotes
        .iter()
        .filter(|remote| !remote.is_ready())
        .map(|remote| format!("{}: {}", remote.name, remote.summary()))
        .collect();
    let ready = format!(
        "{}/{} remote clusters ready",
        remotes.len() - late.len(),
        remotes.len()
    );
    if !remotes_pass(facts, now) {
        let why = if late.is_empty() {
            "waiting for the own cluster".to_owned()
        } else {
            list(&late)
        };
        return Health::Starting(format!("{ready}; {why}"));
    }
    if late.is_empty() {
        Health::Ok(ready)
    } else {
        Health::Degraded(format!("{ready}; {}", list(&late)))
    }
}

/// What the own cluster still lacks; `None` once all of it was written to the maps.
fn own_missing(facts: &Facts) -> Option<String> {
    let Some(own) = facts.state.own() else {
        return Some("waiting for the operator to publish this cluster's config".to_owned());
    };
    if own.applied {
        return None;
    }
    let missing: Vec<String> = own
        .missing
        .iter()
        .map(|(kind, canary)| {
            let what = if *canary {
                "waiting for the operator to publish all"
            } else {
                "reading"
            };
            format!("{what} {}", kind_name(*kind))
        })
        .collect();
    Some(if missing.is_empty() {
        "writing the maps".to_owned()
    } else {
        list(&missing)
    })
}

fn loadbalancer(facts: &Facts) -> Health {
    if let Some(missing) = own_missing(facts) {
        return Health::Starting(missing);
    }
    let stats = facts.state.lb().stats();
    let mut sizes = format!(
        "{} services, {} frontends, {} backends",
        stats.services, stats.frontends, stats.backends
    );
    if stats.restored_backends > 0 {
        sizes += &format!(
            ", {} of them from before the agent's start, kept until their cluster is heard of",
            stats.restored_backends
        );
    }
    let mut wrong = vec![];
    if stats.overflow > 0 {
        wrong.push(format!(
            "{} usable backends have no room in their service",
            stats.overflow
        ));
    }
    if stats.frontend_conflicts > 0 {
        wrong.push(format!(
            "{} frontends are claimed by several services",
            stats.frontend_conflicts
        ));
    }
    if stats.backend_conflicts > 0 {
        wrong.push(format!(
            "{} backends are named by several clusters",
            stats.backend_conflicts
        ));
    }
    ok_unless(sizes, &wrong)
}

fn ipcache(facts: &Facts) -> Health {
    if let Some(missing) = own_missing(facts) {
        return Health::Starting(missing);
    }
    let ipcache = facts.state.ipcache();
    let sizes = format!(
        "{} prefixes, {} identities",
        ipcache.len(),
        facts.state.identities().len()
    );
    let mut wrong = vec![];
    if ipcache.conflicts() > 0 {
        wrong.push(format!(
            "{} prefixes are named by several clusters",
            ipcache.conflicts()
        ));
    }
    if facts.state.routes().conflicts() > 0 {
        wrong.push(format!(
            "{} pod CIDRs are used by several clusters",
            facts.state.routes().conflicts()
        ));
    }
    ok_unless(sizes, &wrong)
}

fn endpoints(facts: &Facts) -> Health {
    match &facts.network {
        Network::NotReady(why) => Health::Starting(why.clone()),
        Network::Ready { .. } => {
            let local = facts.state.local();
            let all = local.endpoints();
            let unknown = all
                .iter()
                .filter(|endpoint| local.identity_of(endpoint) == isthmus_model::NumericIdentity::INIT)
                .count();
            let text = format!("{} endpoints", all.len());
            Health::Ok(if unknown == 0 {
                text
            } else {
                format!("{text}, {unknown} without an identity yet")
            })
        }
    }
}

fn datapath(facts: &Facts) -> Health {
    match (&facts.network, &facts.progress.error, &facts.compare_error) {
        (_, Some(error), _) => Health::Degraded(format!(
            "{} map operations wait for another try: {error}",
            facts.progress.held
        )),
        (Network::NotReady(why), ..) => Health::Starting(why.clone()),
        (_, _, Some(error)) => Health::Degraded(format!("maps cannot be compared: {error}")),
        (Network::Ready { mtu }, ..) => Health::Ok(format!(
            "programs attached, overlay up with MTU {mtu}, {} map operations applied{}",
            facts.progress.applied_total,
            facts
                .no_failover
                .as_ref()
                .map(|why| format!("; {why}"))
                .unwrap_or_default()
        )),
    }
}

fn reachability(reach: &[(ClusterName, Judgement)], now: Duration) -> Health {
    let bad: Vec<String> = reach
        .iter()
        .filter(|(_, judgement)| judgement.verdict != Reached::Reachable)
        .map(|(cluster, judgement)| {
            let since = seconds(now.saturating_sub(judgement.since));
            format!(
                "{cluster} {} for {since}: {}",
                judgement.verdict.as_str(),
                judgement.reason
            )
        })
        .collect();
    let text = format!(
        "{}/{} remote clusters reachable",
        reach.len() - bad.len(),
        reach.len()
    );
    ok_unless(text, &bad)
}

fn probe(probes: &[(NodeKey, Verdict)], now: Duration) -> Health {
    let bad: Vec<String> = probes
        .iter()
        .filter(|(_, verdict)| verdict.is_unreachable())
        .map(|(key, verdict)| {
            let since = match verdict.last_success {
                Some(at) => format!("for {}", seconds(now.saturating_sub(at))),
                None => "since the agent started".to_owned(),
            };
            format!(
                "node {} of cluster {} unreachable {since}: {}",
                key.node, key.cluster, verdict.cause
            )
        })
        .collect();
    let answered = probes
        .iter()
        .filter(|(_, verdict)| verdict.misses == 0 && verdict.last_success.is_some())
        .count();
    let text = format!(
        "{answered}/{} other nodes answer through the tunnel",
        probes.len()
    );
    ok_unless(text, &bad)
}

fn ok_unless(text: String, wrong: &[String]) -> Health {
    if wrong.is_empty() {
        Health::Ok(text)
    } else {
        Health::Degraded(format!("{text}; {}", list(wrong)))
    }
}

fn list(texts: &[String]) -> String {
    let shown = texts
        .iter()
        .take(NAMES_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join("; ");
    match texts.len().checked_sub(NAMES_MAX) {
        Some(more) if more > 0 => format!("{shown}; and {more} more"),
        _ => shown,
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let max = isthmus_model::MaxConnectedClusters::C255;
        let identity = crate::state::Identity {
            cluster: isthmus_model::ClusterName::new("c1").unwrap(),
            cluster_id: isthmus_model::ClusterId::new(1, max).unwrap(),
            max,
            node: "n1".into(),
            maglev: Default::default(),
        };
        Facts {
            state: State::new(identity, crate::state::MapDump::default()),
            upstream: Upstream::default(),
            progress: Progress::default(),
            network: Network::Ready { mtu: 1450 },
            probes: None,
            sync_timeout: Duration::from_secs(60),
            remotes_passed: false,
            fresh: true,
            compare_error: None,
            reach: vec![],
            no_failover: None,
        }
    }

    #[test]
    fn a_cluster_that_cannot_be_reached_is_named_with_reason_and_age() {
        let mut facts = facts();
        let judged = |verdict, reason| Judgement {
            verdict,
            reason,
            since: Duration::from_secs(5),
        };
        let name = |name: &str| ClusterName::new(name).unwrap();
        facts.reach = vec![
            (
                name("c2"),
                judged(Reached::Reachable, isthmus_mesh::reach::Reason::Well),
            ),
            (
                name("c3"),
                judged(Reached::Unreachable, isthmus_mesh::reach::Reason::Both),
            ),
        ];
        let all = subsystems(&facts, Duration::from_secs(9));
        let found = all
            .iter()
            .find(|subsystem| subsystem.name == "reachability")
            .unwrap();
        assert_eq!(
            found.health,
            Health::Degraded(
                "1/2 remote clusters reachable; c3 unreachable for 4.0 s: no node answers probes, and its state may be old"
                    .to_owned()
            )
        );
    }

    #[test]
    fn pods_wait_on_a_new_node_and_not_after_a_restart() {
        let mut facts = facts();
        let now = Duration::from_secs(5);
        let why = pods_pass(&facts, now).unwrap_err();
        assert!(why.contains("remote clusters"), "{why}");
        // The own cluster is not there either: no timeout makes up for it.
        assert!(pods_pass(&facts, Duration::from_secs(600)).is_err());
        facts.remotes_passed = true;
        assert_eq!(pods_pass(&facts, now), Ok(()));
        facts.remotes_passed = false;
        facts.fresh = false;
        assert_eq!(pods_pass(&facts, now), Ok(()));
    }

    #[test]
    fn a_heart_that_is_not_heard_degrades() {
        let mut facts = facts();
        facts.upstream.connected = true;
        let at = |facts: &Facts, seconds| kvstore(facts, Duration::from_secs(seconds));
        assert!(matches!(at(&facts, 120), Health::Ok(_)));
        assert!(matches!(at(&facts, 121), Health::Degraded(_)));
        facts.upstream.heartbeat_at = Some(Duration::from_secs(100));
        assert!(matches!(at(&facts, 220), Health::Ok(_)));
        assert!(matches!(at(&facts, 221), Health::Degraded(_)));
    }

    #[test]
    fn a_remote_cluster_is_awaited_until_its_first_try_has_failed() {
        let mut remote = RemoteView {
            name: isthmus_model::ClusterName::new("c2").unwrap(),
            cluster: None,
            status: Some(Default::default()),
            refused: None,
            config_gone: false,
            nodes: 0,
        };
        let mut with = |connected, num_failures| {
            remote.status = Some(isthmus_wire::status::RemoteStatus {
                connected,
                num_failures,
                ..Default::default()
            });
            remote.is_awaited()
        };
        assert!(with(false, 0), "the mirror began a moment ago");
        assert!(with(true, 3));
        assert!(!with(false, 1));
    }

    #[test]
    fn long_lists_are_cut() {
        let texts: Vec<String> = (0..8).map(|n| n.to_string()).collect();
        assert_eq!(list(&texts), "0; 1; 2; 3; 4; and 3 more");
        assert_eq!(list(&texts[..2]), "0; 1");
        assert_eq!(list(&texts[..5]), "0; 1; 2; 3; 4");
    }

    #[test]
    fn an_unreachable_node_is_named_with_cluster_and_cause() {
        let key = NodeKey {
            cluster: isthmus_model::ClusterName::new("c2").unwrap(),
            node: "n1".into(),
        };
        let verdict = Verdict {
            misses: 2,
            cause: "no answer through the tunnel".into(),
            last_success: Some(Duration::from_secs(3)),
            ..Verdict::default()
        };
        let health = probe(&[(key, verdict)], Duration::from_secs(10));
        let Health::Degraded(text) = health else {
            panic!("{health:?}");
        };
        assert_eq!(
            text,
            "0/1 other nodes answer through the tunnel; node n1 of cluster c2 unreachable for 7.0 s: no answer through the tunnel"
        );
    }
}
