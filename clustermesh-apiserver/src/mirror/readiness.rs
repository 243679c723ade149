//! When this server is ready to tell agents of remote clusters: once it has read every one that answers, or has waited long
//! enough. Pure but for [`watch()`]; time is an argument.
//!
//! Invariants: a remote cluster that does not answer, or is refused, holds nobody up; what was ready once stays ready, since
//! what is known stays.

use std::{collections::BTreeMap, time::Duration};

use isthmus_model::ClusterName;
use isthmus_runtime::{CancellationToken, Health, State};
use isthmus_wire::status::{Phase, RemoteStatus};
use tokio::{sync::watch, time::Instant};

/// A first attempt that fails sooner may be a hiccup of our own start, such as a resolver that is not there yet.
const HICCUP: Duration = Duration::from_secs(1);
/// Remote clusters that a message names.
const NAMES_MAX: usize = 5;
/// Longest reason that a message gives for one, in characters.
const REASON_LEN_MAX: usize = 160;

/// How long remote clusters are waited for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReadyTimeouts {
    /// One that was not connected within this time is not waited for.
    pub per_cluster: Duration,
    /// Nor is any after this one.
    pub global: Duration,
}

impl Default for ReadyTimeouts {
    fn default() -> Self {
        Self {
            per_cluster: Duration::from_secs(5),
            global: Duration::from_secs(600),
        }
    }
}

/// What one remote cluster means for readiness.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Standing {
    /// It is waited for: so far is it.
    Waiting(String),
    /// All of it was read.
    Synced,
    /// It is not waited for, and why.
    Passed(String),
}

/// The standings of all configured remote clusters.
pub type Board = watch::Sender<BTreeMap<ClusterName, Standing>>;

/// Judges one, which has been configured for `waited`.
pub fn standing(status: &RemoteStatus, waited: Duration, timeouts: ReadyTimeouts) -> Standing {
    let late = waited >= timeouts.per_cluster;
    let reason = || status.status.chars().take(REASON_LEN_MAX).collect::<String>();
    match status.phase {
        Phase::Refused | Phase::Draining => Standing::Passed(reason()),
        // It was read since this server started: late news hold up nobody.
        Phase::Stale if status.ready => Standing::Passed(reason()),
        _ if status.ready => Standing::Synced,
        _ if !status.connected => {
            if late || (status.num_failures > 0 && waited >= HICCUP) {
                Standing::Passed(format!("not reachable: {}", reason()))
            } else {
                Standing::Waiting("connecting".to_owned())
            }
        }
        // Connected, and refuses to be read.
        _ if late && status.num_failures > 0 && status.status == status.last_error => {
            Standing::Passed(reason())
        }
        _ => {
            let progress = &status.progress;
            let left = progress
                .left_ms
                .map(|left| format!(", {} s left", left.div_ceil(1000)));
            let (received, expected) = (progress.received, progress.expected);
            Standing::Waiting(format!(
                "listing, {received} of {expected} entries{}",
                left.unwrap_or_default()
            ))
        }
    }
}

/// The state of all. `waited` is since the first look at the directory; `passed` says that this was ready before.
pub fn verdict(
    standings: &BTreeMap<ClusterName, Standing>,
    waited: Duration,
    timeouts: ReadyTimeouts,
    passed: bool,
) -> State {
    let synced = standings
        .values()
        .filter(|standing| **standing == Standing::Synced)
        .count();
    let others: Vec<(&ClusterName, &str, bool)> = standings
        .iter()
        .filter_map(|(name, standing)| match standing {
            Standing::Synced => None,
            Standing::Waiting(text) => Some((name, text.as_str(), true)),
            Standing::Passed(text) => Some((name, text.as_str(), false)),
        })
        .collect();
    let text = |waiting: Option<bool>| {
        let wanted: Vec<_> = others
            .iter()
            .filter(|(_, _, waits)| waiting.is_none_or(|waiting| *waits == waiting))
            .collect();
        let mut text = format!("{synced}/{} remote clusters synced", standings.len());
        for (name, why, _) in wanted.iter().take(NAMES_MAX) {
            text += &format!("; {name}: {why}");
        }
        match wanted.len().checked_sub(NAMES_MAX) {
            Some(more) if more > 0 => text + &format!("; and {more} more"),
            _ => text,
        }
    };
    let waits = others.iter().any(|(_, _, waits)| *waits);
    if waits && !passed && waited < timeouts.global {
        State::Starting(text(Some(true)))
    } else if others.is_empty() {
        State::Ok(text(None))
    } else {
        State::Degraded(text(None))
    }
}

/// Keeps the state of `part` up to date until `shutdown`; the first look at the directory has just succeeded.
pub async fn watch(
    part: &'static str,
    mut standings: watch::Receiver<BTreeMap<ClusterName, Standing>>,
    timeouts: ReadyTimeouts,
    health: Health,
    shutdown: CancellationToken,
) {
    let begun = Instant::now();
    let mut passed = false;
    loop {
        let state = verdict(&standings.borrow_and_update(), begun.elapsed(), timeouts, passed);
        if !passed && !matches!(state, State::Starting(_)) {
            passed = true;
            tracing::info!(?state, waited = ?begun.elapsed(), "remote clusters need not be waited for any more");
        }
        health.set(part, state);
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = standings.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(begun + timeouts.global), if !passed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn status(phase: Phase) -> RemoteStatus {
        RemoteStatus {
            phase,
            ..Default::default()
        }
    }

    fn timeouts() -> ReadyTimeouts {
        ReadyTimeouts::default()
    }

    #[test]
    fn who_answers_is_waited_for_and_who_does_not_is_not() {
        let of = |status: &RemoteStatus, seconds| match standing(status, SECOND * seconds, timeouts()) {
            Standing::Waiting(_) => "waiting",
            Standing::Synced => "synced",
            Standing::Passed(_) => "passed",
        };
        let silent = status(Phase::Connecting);
        assert_eq!(
            (of(&silent, 4), of(&silent, 5)),
            ("waiting", "passed"),
            "a black hole"
        );
        let refused = RemoteStatus {
            num_failures: 1,
            ..status(Phase::Connecting)
        };
        assert_eq!((of(&refused, 0), of(&refused, 1)), ("waiting", "passed"));
        let connected = RemoteStatus {
            connected: true,
            ..status(Phase::Listing)
        };
        assert_eq!((of(&connected, 4), of(&connected, 500)), ("waiting", "waiting"));
        let denied = RemoteStatus {
            connected: true,
            num_failures: 3,
            status: "permission denied".into(),
            last_error: "permission denied".into(),
            ..status(Phase::Listing)
        };
        assert_eq!((of(&denied, 4), of(&denied, 5)), ("waiting", "passed"));
        assert_eq!(of(&status(Phase::Refused), 0), "passed");
        let ready = RemoteStatus {
            connected: true,
            ready: true,
            ..status(Phase::Synced)
        };
        assert_eq!(of(&ready, 0), "synced");
        let lost = RemoteStatus {
            ready: true,
            ..status(Phase::Stale)
        };
        assert_eq!(of(&lost, 0), "passed");
    }

    #[test]
    fn messages_name_who_is_waited_for() {
        let standings = BTreeMap::from([
            (ClusterName::new("a").unwrap(), Standing::Synced),
            (
                ClusterName::new("b").unwrap(),
                Standing::Waiting("connecting".into()),
            ),
            (
                ClusterName::new("c").unwrap(),
                Standing::Passed("not reachable: x".into()),
            ),
        ]);
        let at = |seconds, passed| verdict(&standings, SECOND * seconds, timeouts(), passed);
        assert_eq!(
            at(0, false),
            State::Starting("1/3 remote clusters synced; b: connecting".into())
        );
        let late = "1/3 remote clusters synced; b: connecting; c: not reachable: x";
        assert_eq!(at(600, false), State::Degraded(late.into()));
        assert_eq!(at(0, true), State::Degraded(late.into()));
        let none = verdict(&BTreeMap::new(), SECOND, timeouts(), false);
        assert_eq!(none, State::Ok("0/0 remote clusters synced".into()));
    }

    proptest! {
        #[test]
        fn dark_peers_never_hold_up_and_answering_ones_always_do(
            kinds in proptest::collection::vec(0u8..4, 0..40),
            seconds in 0u64..700,
        ) {
            let standings: BTreeMap<_, _> = kinds.iter().enumerate().map(|(number, kind)| {
                let standing = match kind {
                    0 | 1 => Standing::Synced,
                    2 => Standing::Passed("dark".into()),
                    _ => Standing::Waiting("listing".into()),
                };
                (ClusterName::new(&format!("c{number}")).unwrap(), standing)
            }).collect();
            let waits = kinds.contains(&3) && seconds < 600;
            let state = verdict(&standings, SECOND * seconds as u32, timeouts(), false);
            prop_assert_eq!(matches!(state, State::Starting(_)), waits);
            let again = verdict(&standings, SECOND * seconds as u32, timeouts(), true);
            prop_assert!(!matches!(again, State::Starting(_) | State::Failed(_)));
        }
    }
}
