//! Which remote clusters can be reached: judged by how fresh their state is and by what their nodes answer, apart.
//!
//! In: for each cluster, what the control plane knows ([`Control`]) and what probes through the tunnel say ([`Data`]); the
//! time. Out: a [`Judgement`] each, and a [`Change`] when one begins or ceases to be unreachable.
//!
//! The four shapes of a partition, and what comes of each:
//!
//! | state fresh | nodes answer | verdict | backends |
//! | --- | --- | --- | --- |
//! | yes | yes | reachable | in rotation |
//! | no (control plane only) | yes | suspect: what is known may be old | in rotation: they are seen to be there |
//! | yes | no (data plane only, either direction) | unreachable | last resort |
//! | no | no (both) | unreachable | last resort |
//!
//! A probe is a round trip, so a way that works in one direction only counts as no answer on both sides. If nothing is known
//! of the nodes (they never answered a probe, and do not say that they would), loss of the control plane makes a cluster
//! suspect and no more: an API server that moves or restarts is not a dead cluster.
//!
//! Invariants: a cluster is unreachable only while no node has answered for at least [`ReachConfig::leave_after`] less one
//! sixth, the time that it takes to act, and at least [`UNANSWERED_MIN`] probes went unanswered. It is reachable again when its
//! nodes have answered for [`ReachConfig::return_after`], plus a jitter that differs by node and cluster; the hold doubles
//! each time that it fails again soon, up to [`ReachConfig::hold_max`].

use std::{collections::BTreeMap, fmt, time::Duration};

use isthmus_model::ClusterId;

use crate::mix::mix;

/// Probes of a cluster that must go unanswered before silence means something.
pub const UNANSWERED_MIN: u32 = 2;

/// Times of the judgement.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReachConfig {
    /// Within this time after its nodes fall silent a cluster's backends leave rotation.
    pub leave_after: Duration,
    /// For so long its nodes must answer before they return.
    pub return_after: Duration,
    /// Most that is added to that, so that not all nodes of a mesh turn at once.
    pub jitter_max: Duration,
    /// Longest hold of a cluster that comes and goes.
    pub hold_max: Duration,
    /// A failure within this time after the last one is one of a cluster that comes and goes.
    pub flap_window: Duration,
}

impl Default for ReachConfig {
    fn default() -> Self {
        Self {
            leave_after: Duration::from_secs(3),
            return_after: Duration::from_secs(1),
            jitter_max: Duration::from_millis(400),
            hold_max: Duration::from_secs(60),
            flap_window: Duration::from_secs(300),
        }
    }
}

/// What the control plane knows about a cluster's state.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Control {
    /// Nothing: the own API server does not say, or does not answer.
    #[default]
    Unknown,
    /// It is mirrored, and its heartbeat is seen.
    Fresh,
    /// What is known may be old: it is not mirrored, or its heartbeat has stopped.
    Stale,
}

/// What the nodes of a cluster answered.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Data {
    /// Whether silence means something: its nodes answered once, or say that they would.
    pub speaks: bool,
    /// When it was asked first.
    pub asked_at: Option<Duration>,
    /// When any node answered last.
    pub answered_at: Option<Duration>,
    /// Probes of any node since then that are due an answer and got none.
    pub unanswered: u32,
}

/// How a cluster is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Verdict {
    /// Its backends are used.
    Reachable,
    /// They are used, and there is something to look at.
    Suspect,
    /// They are the last resort.
    Unreachable,
}

impl Verdict {
    /// Its name in metrics and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reachable => "reachable",
            Self::Suspect => "suspect",
            Self::Unreachable => "unreachable",
        }
    }
}

/// Why.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// State is fresh, and nodes answer or do not know probes.
    Well,
    /// State may be old, and nodes answer.
    ControlOnly,
    /// State may be old, and of the nodes nothing is known.
    ControlBlind,
    /// No node answers lately; too short to mean much.
    Quiet,
    /// No node answers, though the state is fresh.
    DataOnly,
    /// No node answers, and the state may be old.
    Both,
    /// No node answers, and whether the state is fresh is not known.
    DataBlind,
    /// Nodes answer again, for a short time.
    Returning,
}

impl Reason {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Well => "state is fresh",
            Self::ControlOnly => "state may be old, but nodes answer",
            Self::ControlBlind => "state may be old, and its nodes answer no probes of ours",
            Self::Quiet => "no node answered the last probes",
            Self::DataOnly => "no node answers probes, though its state is fresh",
            Self::Both => "no node answers probes, and its state may be old",
            Self::DataBlind => "no node answers probes",
            Self::Returning => "nodes answer again; waiting for it to last",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is thought of a cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Judgement {
    /// How it is.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Since when the verdict is that.
    pub since: Duration,
}

/// A cluster's backends leave rotation, or return.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Change {
    /// Whose.
    pub cluster: ClusterId,
    /// They are used again.
    pub healthy: bool,
    /// Why.
    pub reason: Reason,
}

#[derive(Debug)]
struct Entry {
    judgement: Judgement,
    /// Nodes answer again, since then.
    alive_since: Option<Duration>,
    /// When it failed last.
    failed_at: Option<Duration>,
    hold: Duration,
}

/// The judge. See the module.
#[derive(Debug)]
pub struct Reach {
    config: ReachConfig,
    seed: u64,
    clusters: BTreeMap<ClusterId, Entry>,
}

impl Reach {
    /// `seed` differs by node: jitter comes from it.
    pub const fn new(config: ReachConfig, seed: u64) -> Self {
        Self {
            config,
            seed,
            clusters: BTreeMap::new(),
        }
    }

    /// Takes in what is known of a cluster now. To be called when that changes, and often enough to see silence grow: a few
    /// times in [`ReachConfig::leave_after`].
    pub fn observe(
        &mut self,
        now: Duration,
        cluster: ClusterId,
        control: Control,
        data: Data,
    ) -> Option<Change> {
        let config = self.config;
        let entry = self.clusters.entry(cluster).or_insert_with(|| Entry {
            judgement: Judgement {
                verdict: Verdict::Reachable,
                reason: Reason::Well,
                since: now,
            },
            alive_since: None,
            failed_at: None,
            hold: config.return_after,
        });
        let was_out = entry.judgement.verdict == Verdict::Unreachable;
        let silence = silence(now, &data, config.leave_after);
        let silent = silence >= config.leave_after * 5 / 6;
        let (verdict, reason) = if was_out {
            // Out: any silence worth a name starts the wait for answers anew.
            if silence >= config.leave_after / 3 {
                entry.alive_since = None;
            } else if entry.alive_since.is_none() {
                entry.alive_since = Some(now);
            }
            let jitter = jitter(self.seed, cluster, entry.failed_at, config.jitter_max);
            let held = entry.alive_since.map(|since| now.saturating_sub(since));
            if held.is_some_and(|held| held >= entry.hold + jitter) {
                alive(control, &data, Duration::ZERO, config)
            } else if held.is_some() {
                (Verdict::Unreachable, Reason::Returning)
            } else {
                (Verdict::Unreachable, dead(control))
            }
        } else if silent {
            (Verdict::Unreachable, dead(control))
        } else {
            alive(control, &data, silence, config)
        };
        let is_out = verdict == Verdict::Unreachable;
        if is_out && !was_out {
            let again = entry
                .failed_at
                .is_some_and(|at| now.saturating_sub(at) < config.flap_window);
            entry.hold = if again {
                (entry.hold * 2).min(config.hold_max)
            } else {
                config.return_after
            };
            entry.failed_at = Some(now);
            entry.alive_since = None;
        }
        let since = if verdict == entry.judgement.verdict {
            entry.judgement.since
        } else {
            now
        };
        entry.judgement = Judgement {
            verdict,
            reason,
            since,
        };
        (is_out != was_out).then_some(Change {
            cluster,
            healthy: !is_out,
            reason,
        })
    }

    /// Forgets clusters that are not part of the mesh any more.
    pub fn retain(&mut self, mut keep: impl FnMut(ClusterId) -> bool) {
        self.clusters.retain(|cluster, _| keep(*cluster));
    }

    /// What is thought of each cluster, by ID.
    pub fn judgements(&self) -> impl Iterator<Item = (ClusterId, Judgement)> + '_ {
        self.clusters
            .iter()
            .map(|(cluster, entry)| (*cluster, entry.judgement))
    }
}

/// For how long nobody has answered; nothing while that means nothing.
/// A cluster that was never heard gets twice the time: the way to it may still be made.
fn silence(now: Duration, data: &Data, first: Duration) -> Duration {
    let since = data.answered_at.or(data.asked_at.map(|at| at + first));
    match since {
        Some(since) if data.speaks && data.unanswered >= UNANSWERED_MIN => now.saturating_sub(since),
        _ => Duration::ZERO,
    }
}

fn alive(control: Control, data: &Data, silence: Duration, config: ReachConfig) -> (Verdict, Reason) {
    if silence >= config.leave_after / 2 {
        return (Verdict::Suspect, Reason::Quiet);
    }
    match (control, data.answered_at) {
        (Control::Stale, Some(_)) => (Verdict::Suspect, Reason::ControlOnly),
        (Control::Stale, None) => (Verdict::Suspect, Reason::ControlBlind),
        _ => (Verdict::Reachable, Reason::Well),
    }
}

const fn dead(control: Control) -> Reason {
    match control {
        Control::Fresh => Reason::DataOnly,
        Control::Stale => Reason::Both,
        Control::Unknown => Reason::DataBlind,
    }
}

fn jitter(seed: u64, cluster: ClusterId, failed_at: Option<Duration>, most: Duration) -> Duration {
    let times = failed_at.map_or(0, |at| at.as_millis() as u64);
    let random = mix(mix(seed ^ u64::from(cluster.get())) ^ times);
    most.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests;
