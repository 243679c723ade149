//! The mocked clusters: a server of ours for each, in this process, over mutual TLS, fed by its [`Population`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use isthmus_clustermesh_apiserver::{
    metrics::ServerMetrics,
    server::{ServerLimits, serve},
    shared::Shared,
    store::{HistoryLimits, Relist, Store, SubId},
};
use isthmus_model::ClusterName;
use isthmus_runtime::{CancellationToken, Health, Metrics};
use isthmus_tls::ServerTls;
use tokio::net::TcpListener;

use super::population::{CHANGES_PER_SECOND, Population};
use crate::servers::Certificates;

/// How often a heart beats; Cilium's beats once a minute.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// One mocked cluster.
pub struct Mock {
    pub name: ClusterName,
    pub address: SocketAddr,
    /// Keys at first.
    pub keys: usize,
    /// Their bytes, with their values.
    pub bytes: usize,
    shared: Shared,
    population: Mutex<Population>,
    /// When each revision was made, from the first change on.
    made: Mutex<HashMap<i64, Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mock {
    /// Serves cluster `id` until `stop`.
    async fn start(id: u32, seed: u64, certificates: &Certificates, stop: CancellationToken) -> Result<Self> {
        let mut population = Population::new(id, seed)?;
        let name = population.name.clone();
        let changes = population.begin()?;
        let limits = HistoryLimits::default();
        let mut store = Store::new(name.clone(), seed + 2 * u64::from(id), limits, limits);
        let list = Relist {
            cluster_id: seed + 2 * u64::from(id) + 1,
            revision: population.revision(),
            new_history: true,
            changes,
            present: None,
        };
        store.relist(&SubId::Own, list);
        let entries = store.entries(&SubId::Own);
        let (keys, bytes) = entries.fold((0, 0), |(keys, bytes), (key, value)| {
            (keys + 1, bytes + key.len() + value.len())
        });
        let shared = Shared::new(store);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let tls = ServerTls::from_files(
            &certificates.path("server.crt"),
            &certificates.path("server.key"),
            &certificates.path("ca.crt"),
        )?;
        let metrics = ServerMetrics::new(&Metrics::new("mock"));
        let (cluster, health, limits) = (name.clone(), Health::default(), ServerLimits::default());
        let served = serve(
            listener,
            tls,
            cluster,
            shared.clone(),
            None,
            limits,
            metrics,
            health,
            stop,
        );
        tokio::spawn(served);
        Ok(Self {
            name,
            address,
            keys,
            bytes,
            shared,
            population: Mutex::new(population),
            made: Mutex::default(),
        })
    }

    /// How its mirror's file says where it is.
    pub fn file(&self, certificates: &Certificates) -> String {
        certificates.etcd_config(self.address, super::REMOTE)
    }

    /// When the change at `revision` was made.
    pub fn made(&self, revision: i64) -> Option<Instant> {
        lock(&self.made).get(&revision).copied()
    }

    /// How many changes of objects were made.
    pub fn changes(&self) -> usize {
        lock(&self.made).len()
    }

    fn change(&self) -> Result<()> {
        let mut population = lock(&self.population);
        let change = population.change()?;
        let revision = population.revision();
        lock(&self.made).insert(revision, Instant::now());
        self.shared
            .update(|store| store.apply(&SubId::Own, revision, vec![change]));
        Ok(())
    }

    fn beat(&self, now: Duration) {
        let mut population = lock(&self.population);
        let beat = population.beat(now.as_secs());
        let revision = population.revision();
        self.shared
            .update(|store| store.apply(&SubId::Own, revision, vec![beat]));
    }
}

/// Starts `clusters` of them; their IDs begin at 2.
pub async fn start_all(
    clusters: u32,
    seed: u64,
    certificates: &Certificates,
    stop: &CancellationToken,
) -> Result<Arc<Vec<Mock>>> {
    let mut mocks = Vec::new();
    for id in 2..clusters + 2 {
        let mock = Mock::start(id, seed, certificates, stop.child_token()).await;
        mocks.push(mock.with_context(|| format!("mocked cluster {id}"))?);
    }
    Ok(Arc::new(mocks))
}

/// Changes all clusters, one after the other, each at its rate, until `stop`; returns how many changes were made.
pub async fn churn(mocks: Arc<Vec<Mock>>, stop: CancellationToken) -> Result<u64> {
    let pause = Duration::from_secs_f64(1.0 / (CHANGES_PER_SECOND * mocks.len() as f64));
    let begun = tokio::time::Instant::now();
    let mut beaten = begun;
    for number in 0u64.. {
        tokio::select! {
            () = stop.cancelled() => return Ok(number),
            () = tokio::time::sleep_until(begun + pause.mul_f64(number as f64)) => {}
        }
        mocks[number as usize % mocks.len()].change()?;
        if beaten.elapsed() >= HEARTBEAT {
            beaten += HEARTBEAT;
            mocks.iter().for_each(|mock| mock.beat(begun.elapsed()));
        }
    }
    Ok(0)
}
