//! The controllers of a small cluster.
//!
//! Each is a task that waits for events of some resources, turns them into keys, and brings each key's objects to
//! what they should be. What they should be is decided by pure functions in each controller's module; this module
//! drives them. Invariants: a controller reads the whole state of a key and never "what changed"; a key that failed is
//! tried again; a controller that fell behind looks at everything.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::Rng;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::{Batch, Client, KubeApi};
use crate::error::ApiError;
use crate::store::Event;

pub mod daemons;
pub mod deployments;
pub mod endpoints;
pub mod garbage;
pub mod namespaces;
pub mod pod_gc;
pub mod pods;
pub mod replica_sets;
pub mod scheduler;

/// An object of a namespaced resource, by namespace and name.
pub type Name = (String, String);

/// A controller.
trait Controller: Send + 'static {
    /// What a round is about.
    type Key: Ord + Clone + Send + std::fmt::Debug;
    /// Its name in logs.
    const NAME: &'static str;
    /// The resources that it follows; none means all.
    const RESOURCES: &'static [&'static str];

    /// Everything there is to look at.
    fn all(&mut self, client: &Client) -> BTreeSet<Self::Key>;
    /// The keys that an event concerns.
    fn affected(&mut self, client: &Client, event: &Event, keys: &mut BTreeSet<Self::Key>);
    /// Brings the objects of a key to what they should be. Doing it again is always safe.
    fn reconcile(&mut self, client: &Client, key: &Self::Key) -> Result<(), ApiError>;
}

/// Starts all controllers; they end with `shutdown`.
pub fn spawn(api: &KubeApi, shutdown: CancellationToken) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let client = || api.client();
    tasks.spawn(drive(namespaces::Namespaces, client(), shutdown.clone()));
    tasks.spawn(drive(garbage::Garbage::default(), client(), shutdown.clone()));
    tasks.spawn(drive(deployments::Deployments, client(), shutdown.clone()));
    tasks.spawn(drive(replica_sets::ReplicaSets, client(), shutdown.clone()));
    tasks.spawn(drive(daemons::DaemonSets, client(), shutdown.clone()));
    tasks.spawn(drive(scheduler::Scheduler, client(), shutdown.clone()));
    tasks.spawn(drive(endpoints::EndpointSlices, client(), shutdown.clone()));
    tasks.spawn(drive(pod_gc::PodGc, client(), shutdown));
    tasks
}

/// A failed key is tried again after about this time.
const RETRY: Duration = Duration::from_millis(500);

async fn drive<C: Controller>(mut controller: C, client: Client, shutdown: CancellationToken) {
    let mut feed = client.feed(C::RESOURCES);
    let mut failed: BTreeSet<C::Key> = BTreeSet::new();
    loop {
        let mut keys = BTreeSet::new();
        tokio::select! {
            () = shutdown.cancelled() => return,
            batch = feed.next() => match batch {
                Batch::Resync => keys = controller.all(&client),
                Batch::Events(events) => {
                    for event in &events {
                        controller.affected(&client, event, &mut keys);
                    }
                }
            },
            () = tokio::time::sleep(jittered(RETRY)), if !failed.is_empty() => keys = std::mem::take(&mut failed),
        }
        for key in keys {
            failed.remove(&key);
            if let Err(error) = controller.reconcile(&client, &key) {
                tracing::debug!(controller = C::NAME, ?key, %error, "will try again");
                failed.insert(key);
            }
            tokio::task::consume_budget().await;
        }
    }
}

fn jittered(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(0.8..1.2))
}

/// Treats "it is gone already" as success.
fn ignore_gone<T>(result: Result<T, ApiError>) -> Result<(), ApiError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
