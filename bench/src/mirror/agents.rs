//! Readers that outlive a server: each follows one mirrored prefix as an agent does, with the follower that agents use.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use isthmus_kvstore::{Change, EtcdConfig, Feed, Options, Update, follow};
use isthmus_runtime::CancellationToken;
use isthmus_wire::keys::{Kind, Scope};
use tokio::task::JoinSet;

use super::mock::Mock;
use crate::servers::Certificates;

/// Which prefixes of a cluster are followed, one a reader: endpoints twice, for they are most.
const FOLLOWED: [Kind; 4] = [Kind::Ip, Kind::Nodes, Kind::Ip, Kind::Identities];
const LOOK_PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(180);

/// What they have seen, all together.
#[derive(Debug, Default)]
struct Seen {
    synced: AtomicUsize,
    lists: AtomicU64,
    /// Keys and values of changes after the first list.
    changed_bytes: AtomicU64,
}

/// The readers; they end with the value.
pub struct Agents {
    seen: Arc<Seen>,
    stop: CancellationToken,
    count: usize,
    tasks: JoinSet<()>,
}

impl Agents {
    /// Starts `count` of them.
    pub fn start(
        count: usize,
        mocks: &[Mock],
        certificates: &Certificates,
        address: SocketAddr,
    ) -> Result<Self> {
        let config = EtcdConfig::parse(&certificates.etcd_config(address, super::AGENT))?;
        let (seen, stop, mut tasks) = (
            Arc::new(Seen::default()),
            CancellationToken::new(),
            JoinSet::new(),
        );
        for number in 0..count {
            let mock = &mocks[number % mocks.len()];
            let kind = FOLLOWED[number / mocks.len() % FOLLOWED.len()];
            let prefix = kind.prefix(Scope::Cache, &mock.name).context("no prefix")?;
            let feed = Feed::prefix(&prefix, kind.value_len_max());
            let mut follow = follow(config.clone(), Options::default(), [feed], stop.child_token());
            let seen = seen.clone();
            tasks.spawn(async move {
                let (mut ever, mut synced) = (false, false);
                while let Some(update) = follow.updates.recv().await {
                    match update {
                        Update::Synced { .. } if !synced => {
                            (ever, synced) = (true, true);
                            seen.synced.fetch_add(1, Ordering::SeqCst);
                        }
                        Update::Disconnected { .. } if synced => {
                            synced = false;
                            seen.synced.fetch_sub(1, Ordering::SeqCst);
                        }
                        Update::Listing { .. } => {
                            seen.lists.fetch_add(1, Ordering::Relaxed);
                        }
                        Update::Changes { changes, .. } if ever => {
                            let bytes: usize = changes.iter().map(bytes).sum();
                            seen.changed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
            });
        }
        Ok(Self {
            seen,
            stop,
            count,
            tasks,
        })
    }

    /// How many are in step with the server.
    pub fn synced(&self) -> usize {
        self.seen.synced.load(Ordering::SeqCst)
    }

    /// Lists that were begun.
    pub fn lists(&self) -> u64 {
        self.seen.lists.load(Ordering::Relaxed)
    }

    /// Bytes of keys and values of changes after each one's first list.
    pub fn changed_bytes(&self) -> f64 {
        self.seen.changed_bytes.load(Ordering::Relaxed) as f64
    }

    /// Waits until all are in step, or none is.
    pub async fn until(&self, all: bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let want = if all { self.count } else { 0 };
        while self.synced() != want {
            if Instant::now() > deadline {
                bail!(
                    "{} of {} readers are in step, not {want}",
                    self.synced(),
                    self.count
                );
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        Ok(())
    }

    /// Ends them.
    pub async fn end(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn bytes(change: &Change) -> usize {
    match change {
        Change::Put { key, value, .. } => key.len() + value.len(),
        Change::Delete { key, .. } | Change::Refused { key, .. } => key.len(),
    }
}
