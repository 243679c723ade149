//! The writer's task: follows its own scopes, writes what differs, beats the heart. The store is its own, so it is listed,
//! compared and written through `etcd-client`; [`crate::client`] says why the watch stream is not.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use isthmus_runtime::{Backoff, CancellationToken, backoff};
use isthmus_wire::keys::HEARTBEAT;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::{Shared, WriterOptions};
use crate::{
    client::{CallError, Client, Owner},
    config::EtcdConfig,
    follow::{Update, follow_in},
    follower::Feed,
    plan::{Limits, Op},
    rfc3339,
};

/// Largest value that is read back; larger ones are nothing we wrote.
const VALUE_LEN_MAX: usize = 16 * 1024 * 1024;
/// A heartbeat that is not taken within this time is dropped; the next one follows.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);

struct Worker {
    shared: Arc<Shared>,
    limits: Limits,
    client: Option<Client>,
    /// Scopes that were not listed yet.
    unlisted: BTreeSet<Arc<str>>,
    retry: Backoff,
    /// No write before this time.
    not_before: Option<Instant>,
    /// The heart has beaten on this connection.
    beaten: bool,
}

pub(super) async fn run(
    shared: Arc<Shared>,
    config: EtcdConfig,
    options: WriterOptions,
    shutdown: CancellationToken,
) {
    let feeds: Vec<Feed> = options
        .scopes
        .iter()
        .map(|scope| Feed::prefix(scope, VALUE_LEN_MAX))
        .collect();
    let mut worker = Worker {
        shared: shared.clone(),
        limits: options.limits,
        client: None,
        unlisted: feeds.iter().map(|feed| feed.name.clone()).collect(),
        retry: Backoff::new(Duration::from_millis(50), Duration::from_secs(10)),
        not_before: None,
        beaten: false,
    };
    let mut follow = follow_in(
        Owner::Ourselves,
        config,
        options.connection,
        feeds,
        shutdown.child_token(),
    );
    let mut heartbeat = interval(options.heartbeat.unwrap_or(Duration::from_secs(3600)));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        worker.write(&shutdown).await;
        if options.heartbeat.is_some() && worker.beat_is_due() {
            worker.beat().await;
            heartbeat.reset();
        }
        let not_before = worker.not_before;
        let retry = async {
            match not_before {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            update = follow.updates.recv() => match update {
                Some(update) => {
                    worker.on_update(update);
                    // Take in what else is there before planning: fewer, larger transactions.
                    while let Ok(update) = follow.updates.try_recv() {
                        worker.on_update(update);
                    }
                }
                None => return,
            },
            () = shared.wake.notified() => {}
            () = retry => worker.not_before = None,
            _ = heartbeat.tick() => {
                if options.heartbeat.is_some() {
                    worker.beat().await;
                }
            }
        }
    }
}

impl Worker {
    fn on_update(&mut self, update: Update) {
        match update {
            Update::Connected { client } => {
                self.client = Some(client);
                self.beaten = false;
                self.shared.status.send_modify(|status| status.connected = true);
            }
            Update::Disconnected { error, .. } => {
                self.client = None;
                self.fail(error);
                self.shared.status.send_modify(|status| status.connected = false);
            }
            Update::Listing { feed, trusted, .. } => {
                if !trusted {
                    self.shared.content().on_untrusted(&feed);
                }
            }
            Update::Listed { .. } | Update::History { .. } => {}
            Update::Changes { changes, .. } => {
                let mut content = self.shared.content();
                changes.into_iter().for_each(|change| content.on_change(change));
            }
            Update::Synced { feed, .. } => {
                if self.unlisted.remove(&feed) && self.unlisted.is_empty() {
                    self.shared.content().on_listed();
                    self.shared.status.send_modify(|status| status.listed = true);
                }
            }
            Update::Failed { error, .. } => self.fail(error),
        }
    }

    fn fail(&self, error: String) {
        self.shared.status.send_modify(|status| {
            status.failures += 1;
            status.last_error = error;
        });
    }

    /// Writes what differs, if it can, until nothing does.
    async fn write(&mut self, shutdown: &CancellationToken) {
        let Some(client) = self.client.clone() else { return };
        if !self.unlisted.is_empty() || self.not_before.is_some() {
            return;
        }
        let (plan, generation) = {
            let mut content = self.shared.content();
            (content.take_plan(self.limits), content.generation())
        };
        for key in &plan.refused {
            tracing::warn!(key = %String::from_utf8_lossy(key), limit = self.limits.value, "value is too large for etcd; not written");
        }
        let mut txns = VecDeque::from(plan.txns);
        while let Some(mut ops) = txns.pop_front() {
            let result = tokio::select! {
                () = shutdown.cancelled() => return,
                result = client.write(&ops) => result,
            };
            match result {
                Ok(revision) => {
                    self.retry.reset();
                    let written = ops.len() as u64;
                    self.shared.content().on_written(&ops, revision);
                    self.shared.status.send_modify(|status| status.writes += written);
                }
                // Sent again it would be refused again, and hold up everything behind it: look for the key that it is about.
                Err(error) if error.is_about_the_request() && ops.len() > 1 => {
                    let half = ops.split_off(ops.len() / 2);
                    txns.push_front(half);
                    txns.push_front(ops);
                }
                Err(error) if error.is_about_the_request() => {
                    for op in ops {
                        tracing::warn!(key = %String::from_utf8_lossy(op.key()), error = &error as &dyn std::error::Error, "etcd refuses this key; not written until its value changes");
                        self.shared.content().on_refused(op);
                    }
                    self.fail(error.to_string());
                }
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "writing to etcd failed; trying again"
                    );
                    self.on_write_error(error, ops.into_iter().chain(txns.into_iter().flatten()));
                    return;
                }
            }
        }
        let (pending, refused) = {
            let content = self.shared.content();
            (content.pending(), content.refused())
        };
        self.shared.status.send_if_modified(|status| {
            let changed = (status.pending, status.refused) != (pending, refused);
            (status.pending, status.refused) = (pending, refused);
            changed
        });
        self.shared.settled.send_if_modified(|settled| {
            let changed = *settled < generation;
            *settled = generation.max(*settled);
            changed
        });
    }

    fn on_write_error(&mut self, error: CallError, unwritten: impl Iterator<Item = Op>) {
        let pending = {
            let mut content = self.shared.content();
            content.on_failed(unwritten);
            content.pending()
        };
        self.not_before = Some(Instant::now() + self.retry.next(backoff::random()));
        self.fail(error.to_string());
        self.shared.status.send_modify(|status| status.pending = pending);
    }

    /// The first one on a connection does not wait: readers that see none doubt that anybody writes.
    fn beat_is_due(&self) -> bool {
        self.client.is_some() && self.unlisted.is_empty() && !self.beaten
    }

    async fn beat(&mut self) {
        self.beaten = true;
        let Some(client) = &self.client else { return };
        if !self.unlisted.is_empty() {
            return;
        }
        let beat = [Op::Put {
            key: HEARTBEAT.into(),
            value: rfc3339::format(SystemTime::now()).into(),
        }];
        match tokio::time::timeout(HEARTBEAT_TIMEOUT, client.write(&beat)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.fail(format!("heartbeat: {error}")),
            Err(_) => self.fail(format!("heartbeat: no answer within {HEARTBEAT_TIMEOUT:?}")),
        }
    }
}
