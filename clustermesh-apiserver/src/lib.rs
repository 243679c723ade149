//! clustermesh-apiserver: serves a cluster's state to other clusters' mirrors and to its own agents, and mirrors the others.
//!
//! In: the own cluster's etcd ([`source`]) or writes to an [`embedded`] store, remote clusters' API servers ([`mirror`]). Out: etcd's v3 read API over mutual
//! TLS ([`server`]). Between them stands the [`store`].
//!
//! Invariants: what is known stays when an upstream goes away, and its age can be told by its heartbeat; replicas share no
//! state and give the same revisions, so that a client moves from one to another without listing again.

pub mod embedded;
pub mod ingest;
pub mod metrics;
pub mod mirror;
pub mod server;
pub mod shared;
pub mod source;
pub mod store;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use isthmus_kvstore::{EtcdConfig, Options, follow};
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::{CancellationToken, Health, Metrics};
use isthmus_tls::ServerTls;
use tokio::{
    net::TcpListener,
    sync::oneshot,
    time::{Instant, MissedTickBehavior},
};

use embedded::file::{File, Opened};
use metrics::{EmbeddedMetrics, MirrorMetrics, ServerMetrics, StoreMetrics};
use mirror::{MirrorConfig, readiness::ReadyTimeouts};
use server::ServerLimits;
use shared::Shared;
use store::{HistoryLimits, Store, SubId};

/// How often the store's metrics are set.
const METRICS_INTERVAL: Duration = Duration::from_secs(5);

/// Where the own cluster's state is.
#[derive(Clone, Debug)]
pub enum StoreConfig {
    /// In an etcd.
    Etcd(EtcdConfig),
    /// In a file of this server, which takes the local operator's writes.
    Embedded {
        /// Directory of the file; made if it is not there.
        data_dir: PathBuf,
        /// How much it may hold.
        limits: embedded::Limits,
    },
}

/// Longest time between two looks for history that is too old.
const AGE_LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Everything that the server is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Own cluster.
    pub cluster: ClusterName,
    /// Own ID.
    pub cluster_id: ClusterId,
    /// Size of the mesh.
    pub max: MaxConnectedClusters,
    /// Where the own cluster's state is.
    pub store: StoreConfig,
    /// Directory of remote clusters' files; `None` = no mirror.
    pub clustermesh_config: Option<PathBuf>,
    /// Where to serve.
    pub listen: SocketAddr,
    /// Server certificate chain.
    pub tls_cert_file: PathBuf,
    /// Its key.
    pub tls_key_file: PathBuf,
    /// CA bundle of the clients' certificates.
    pub tls_client_ca_file: PathBuf,
    /// Admin endpoint; `None` = none.
    pub admin_listen: Option<SocketAddr>,
    /// Connections to the own etcd and to remote clusters.
    pub connection: Options,
    /// Bounds of the server.
    pub limits: ServerLimits,
    /// History kept of the own cluster, and of the merged view.
    pub history: HistoryLimits,
    /// History kept of each kind of each remote cluster.
    pub remote_history: HistoryLimits,
    /// How long readiness waits for remote clusters.
    pub ready: ReadyTimeouts,
}

impl Config {
    /// History of a remote cluster's kind unless told otherwise: 255 clusters of six kinds add up.
    pub const REMOTE_HISTORY: HistoryLimits = HistoryLimits {
        len: 10_000,
        bytes: 8 * 1024 * 1024,
        age: HistoryLimits::AGE,
    };
}

/// A server that has its address and has not begun to serve.
pub struct Bound {
    config: Config,
    listener: TcpListener,
    tls: ServerTls,
    metrics: Metrics,
    health: Health,
    source: Source,
}

/// Where the own cluster's state comes from.
enum Source {
    Etcd(EtcdConfig),
    Embedded(Box<Opened>, embedded::Limits),
}

/// Reads the certificates, opens the embedded store if it is one, and takes the address.
pub async fn bind(config: Config) -> anyhow::Result<Bound> {
    let file = |path: &Path| path.to_owned();
    let tls = ServerTls::from_files(
        &file(&config.tls_cert_file),
        &file(&config.tls_key_file),
        &file(&config.tls_client_ca_file),
    )
    .context(
        "the server's TLS files are not usable; see --tls-cert-file, --tls-key-file and --tls-client-ca-file",
    )?;
    let source = match &config.store {
        StoreConfig::Etcd(etcd) => Source::Etcd(etcd.clone()),
        StoreConfig::Embedded { data_dir, limits } => {
            // Random and not 0; used if the store is new.
            let history = rand::random_range(1..=u64::MAX);
            let opened = File::open(data_dir, &config.cluster, history)
                .context("the embedded store is not usable; see --data-dir")?;
            Source::Embedded(Box::new(opened), *limits)
        }
    };
    let listener = TcpListener::bind(config.listen).await.with_context(|| {
        format!(
            "cannot listen on {}; choose another address with --listen",
            config.listen
        )
    })?;
    Ok(Bound {
        config,
        listener,
        tls,
        metrics: Metrics::new("clustermesh"),
        health: Health::default(),
        source,
    })
}

impl Bound {
    /// Where it will serve.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Its health, to look at from outside.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Its metrics.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// Serves until `shutdown`, and then until the clients were sent away.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self {
            config,
            listener,
            tls,
            metrics,
            health,
            source,
        } = self;
        // What the server is fed by, and asked about, goes on until its clients have gone.
        let feeding = CancellationToken::new();
        let _feeding = feeding.clone().drop_guard();
        if let Some(address) = config.admin_listen {
            isthmus_runtime::admin::serve(address, health.clone(), metrics.clone(), feeding.clone()).await?;
        }
        // Random and never 0: this process' own history begins here.
        let server_id = rand::random_range(1..=u64::MAX);
        let store = Store::new(
            config.cluster.clone(),
            server_id,
            config.history,
            config.remote_history,
        );
        // Later than anything that an earlier process, or another replica, counted: to each the other's revisions are the past
        // or the future, never its own.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let first_revision = i64::try_from(since_epoch.as_micros()).unwrap_or(1).max(1);
        let store = store.counting_from(first_revision);
        let shared = Shared::new(store);
        let (source, embedded) = match source {
            Source::Etcd(etcd) => {
                let (shared, health, stop) = (shared.clone(), health.clone(), shutdown.clone());
                let (connection, feeding) = (config.connection.clone(), feeding.clone());
                let followed = follow(etcd, connection, [source::feed()], feeding.child_token());
                let task = tokio::spawn(async move {
                    // Without it, however it ends, this server would serve what it knows now for ever, and say that all is well.
                    let _stop = stop.drop_guard();
                    source::run(followed, shared, health).await;
                    let early = !feeding.is_cancelled();
                    anyhow::ensure!(!early, "the reader of the own etcd has ended without a reason");
                    Ok(())
                });
                (task, None)
            }
            Source::Embedded(opened, limits) => {
                let metrics = EmbeddedMetrics::new(&metrics);
                let (handle, task) = embedded::start(*opened, shared.clone(), &health, metrics, limits);
                let (stop, feeding) = (shutdown.clone(), feeding.clone());
                let task = tokio::spawn(async move {
                    // Without it, however it ends, no write would be answered.
                    let _stop = stop.drop_guard();
                    let result = task.run(feeding).await;
                    result.context("the embedded store failed")
                });
                (task, Some(handle))
            }
        };
        let mut mirror = None;
        if let Some(directory) = config.clustermesh_config.clone() {
            let config = MirrorConfig {
                cluster: config.cluster.clone(),
                cluster_id: config.cluster_id,
                max: config.max,
                directory: directory.clone(),
                connection: config.connection.clone(),
                ready: config.ready,
            };
            let metrics = MirrorMetrics::new(&metrics);
            let (looked, first_look) = oneshot::channel();
            // A cluster without a status is none to agents: nobody is answered before each configured one has its status.
            let why = format!(
                "waiting to read --clustermesh-config {}; without it agents would take remote clusters for removed",
                directory.display()
            );
            health.set(mirror::PART, isthmus_runtime::State::Starting(why));
            let (shared, health) = (shared.clone(), health.clone());
            let run = mirror::run(config, shared, metrics, health, looked, feeding.clone());
            mirror = Some(tokio::spawn(run));
            tokio::select! {
                () = shutdown.cancelled() => {}
                // It ends without a word only with the process.
                _ = first_look => {}
            }
        }
        let measure = tokio::spawn(measure(
            StoreMetrics::new(&metrics),
            config.cluster.clone(),
            shared.clone(),
            feeding.clone(),
        ));
        let age = tokio::spawn(age(
            config.history.age.min(config.remote_history.age),
            shared.clone(),
            feeding.clone(),
        ));
        let served = server::serve(
            listener,
            tls,
            config.cluster,
            shared,
            embedded,
            config.limits,
            ServerMetrics::new(&metrics),
            health,
            shutdown.clone(),
        );
        let result = served.await.context("the server failed");
        shutdown.cancel();
        feeding.cancel();
        for task in [mirror, Some(measure), Some(age)].into_iter().flatten() {
            // A panic in a task is worth more than a clean end.
            task.await.context("a task of the server panicked")?;
        }
        source.await.context("a task of the server panicked")??;
        result
    }
}

/// Lets history go that is older than its limits say; the least of them is `age`.
async fn age(age: Duration, shared: Shared, shutdown: CancellationToken) {
    let every = AGE_LOOK_INTERVAL.min(age / 10).max(Duration::from_millis(1));
    let mut looks = tokio::time::interval(every);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let begun = Instant::now();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = looks.tick() => shared.update(|store| store.forget_aged(begun.elapsed())),
        }
    }
}

async fn measure(metrics: StoreMetrics, own: ClusterName, shared: Shared, shutdown: CancellationToken) {
    let mut shown = BTreeSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(METRICS_INTERVAL) => {}
        }
        let statuses: Vec<_> = shared.read(|store| {
            let ids = store.sub_ids();
            ids.filter_map(|id| Some((id.clone(), store.status(id)?)))
                .collect()
        });
        let mut gone = std::mem::take(&mut shown);
        for (id, status) in statuses {
            let label = match &id {
                SubId::Own => metrics::Sub {
                    source_cluster: own.to_string(),
                    kind: "all",
                },
                SubId::Remote(cluster, kind) => metrics::Sub {
                    source_cluster: cluster.to_string(),
                    kind: mirror::remote::kind_name(*kind),
                },
            };
            metrics.revision.get_or_create(&label).set(status.revision);
            metrics.keys.get_or_create(&label).set(status.keys as i64);
            metrics.bytes.get_or_create(&label).set(status.bytes as i64);
            metrics
                .history_len
                .get_or_create(&label)
                .set(status.history_len as i64);
            metrics
                .history_bytes
                .get_or_create(&label)
                .set(status.history_bytes as i64);
            gone.remove(&label);
            shown.insert(label);
        }
        // Only those: a reader of metrics may come at any time.
        for label in gone {
            for family in [
                &metrics.revision,
                &metrics.keys,
                &metrics.bytes,
                &metrics.history_len,
                &metrics.history_bytes,
            ] {
                family.remove(&label);
            }
        }
    }
}
