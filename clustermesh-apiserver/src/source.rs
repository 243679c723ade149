//! Follows the own cluster's etcd into the store, by one watch over everything: so its revisions stay in order.

use std::time::Duration;

use isthmus_kvstore::{Change, Feed, Follow, History, Past, Update};
use isthmus_runtime::{Health, State};
use tokio::time::{Instant, sleep_until};

use crate::{
    ingest::{Ingest, Ingested, IngestedPast, past_before},
    shared::Shared,
    store::{SourceChange, Store, SubId},
};

/// Name of this part in the health register.
const PART: &str = "etcd";
/// From the first key of Cilium's up to the last of ours.
const FIRST_KEY: &str = "cilium/";
const END_KEY: &str = "isthmus0";

/// So many revisions before the first list are asked for, so that readers of the server before this one go on from where they
/// were.
const HISTORY_REVISIONS: i64 = 20_000;

/// The range to follow. Values are bounded by the largest kind.
pub fn feed() -> Feed {
    Feed::range(FIRST_KEY, END_KEY, isthmus_wire::refusal::SERVICE_JSON_LEN_MAX)
        .with_history(HISTORY_REVISIONS)
}

/// Runs until `follow` ends. While the etcd is away the last state is served as it is, heartbeat included: readers see its age.
pub async fn run(mut follow: Follow, shared: Shared, health: Health) {
    health.set(PART, State::Starting("waiting for the first list".to_owned()));
    let mut ingest = Ingest::default();
    let mut listed = false;
    let mut trouble = String::new();
    let begun = Instant::now();
    let now_ms = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    loop {
        let due = ingest.due_ms();
        let update = tokio::select! {
            biased;
            update = follow.updates.recv() => match update {
                Some(update) => update,
                None => return,
            },
            () = sleep_until(begun + Duration::from_millis(due.unwrap_or(0))), if due.is_some() => {
                tracing::warn!("the own etcd's history is not there yet; readers that need it list");
                shared.update(|store| ingest.on_tick(store, &SubId::Own, now_ms()));
                continue;
            }
        };
        match update {
            Update::Connected { client } => {
                tracing::info!(endpoint = %client.endpoint(), "connected to the own etcd");
            }
            Update::Disconnected { error, .. } | Update::Failed { error, .. } => {
                if trouble != error {
                    tracing::warn!(error, "the own etcd does not answer");
                }
                let state = if listed {
                    State::Degraded(format!("serving the last known state: {error}"))
                } else {
                    State::Starting(error.clone())
                };
                trouble = error;
                health.set(PART, state);
            }
            Update::Listing { trusted, .. } => ingest.on_listing(trusted),
            Update::History { history, .. } => {
                shared.update(|store| on_history(store, &mut ingest, history, now_ms()));
            }
            Update::Changes {
                revision, changes, ..
            } => shared.update(|store| {
                let changes = changes
                    .into_iter()
                    .filter_map(|change| own(store, change))
                    .collect();
                ingest.on_changes(store, &SubId::Own, revision, changes);
            }),
            Update::Listed {
                cluster_id,
                revision,
                new_history,
                ..
            } => {
                shared
                    .update(|store| ingest.on_listed(store, &SubId::Own, cluster_id, revision, new_history));
            }
            Update::Synced { revision, .. } => {
                listed = true;
                trouble.clear();
                tracing::info!(revision, "following the own etcd");
                health.set(PART, State::Ok("following".to_owned()));
            }
        }
        if ingest.waiting().is_some() {
            let complete = shared.update(|store| {
                let complete = is_complete(store, &ingest);
                if complete {
                    ingest.release(store, &SubId::Own);
                }
                complete
            });
            if complete {
                tracing::info!("the own etcd holds its canaries again");
                trouble.clear();
                health.set(PART, State::Ok("following".to_owned()));
            } else {
                if trouble != LOST {
                    tracing::warn!("{LOST}");
                    LOST.clone_into(&mut trouble);
                }
                health.set(PART, State::Degraded(LOST.to_owned()));
            }
        }
    }
}

fn on_history(store: &mut Store, ingest: &mut Ingest, history: History, now_ms: u64) {
    let sub = &SubId::Own;
    match history {
        History::Begins { from } => ingest.on_history_begins(store, sub, from, now_ms),
        History::Events(past) => {
            let past = past
                .into_iter()
                .filter_map(|past| own_past(store, past))
                .collect();
            ingest.on_past(store, sub, past);
        }
        History::Complete => {
            tracing::debug!("the own etcd's history is there");
            ingest.on_history_complete(store, sub);
        }
        History::Lost => {
            tracing::info!("the own etcd's history cannot be had; readers that missed changes list");
            ingest.on_history_lost(store, sub);
        }
    }
}

fn own_past(store: &Store, past: Past) -> Option<IngestedPast> {
    let revision = past.change.mod_revision();
    let before = past_before(past.change.key(), past.before, |_| true);
    let change = own(store, past.change)?;
    Some(IngestedPast {
        revision,
        change,
        before,
    })
}

/// Why a new history is not served yet.
const LOST: &str =
    "the own etcd lost its data; serving the last known state until its canaries are written again";

/// Whether every canary that the old history had is in the new one: its writer writes them last.
fn is_complete(store: &Store, ingest: &Ingest) -> bool {
    let canaries = store.own_canaries();
    ingest
        .waiting()
        .is_some_and(|present| canaries.iter().all(|canary| present.contains(canary)))
}

/// The change, if it is of a key that the own etcd has a say in.
fn own(store: &Store, change: Change) -> Option<Ingested> {
    let ingested = match change {
        Change::Put {
            key,
            value,
            create_revision,
            mod_revision,
            version,
        } => Ingested::Change(SourceChange::Put {
            key,
            value,
            create_revision,
            mod_revision,
            version,
        }),
        Change::Delete { key, mod_revision } => Ingested::Change(SourceChange::Delete { key, mod_revision }),
        Change::Refused { key, len, .. } => {
            tracing::warn!(key = %String::from_utf8_lossy(&key), len, "value in the own etcd is too large; keeping the previous one");
            Ingested::Kept(key)
        }
    };
    store.is_own(ingested.key()).then_some(ingested)
}
