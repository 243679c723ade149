//! The operator: publishes one cluster's networking state from its Kubernetes API to its etcd.
//!
//! In: five watches of the Kubernetes API, the identities that etcd holds. Out: keys of that etcd, which the clustermesh-apiserver
//! serves to this cluster's agents and to other clusters.
//!
//! [`state`], [`allocator`] and [`election`] decide and are pure; [`watch`], [`publish`] and [`election::lease`] move bytes.
//!
//! Invariants: one operator of a cluster writes at a time; an unchanged object writes nothing, also after a restart; when
//! Kubernetes or etcd goes away, what is published stays, and nothing is deleted before both were read in full.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use isthmus_runtime::{CancellationToken, Health, Metrics, admin};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::sync::watch as channel;

pub mod allocator;
pub mod config;
pub mod election;
pub mod metrics;
pub mod publish;
pub mod state;
pub mod watch;

pub use config::{Args, Config};

use election::{
    Role,
    lease::{self, Leadership},
};
use metrics::OperatorMetrics;
use publish::Publisher;

/// Longest wait for a connection to the Kubernetes API.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence of the Kubernetes API while an answer is due; a little more than a watch stays open.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// An operator that is ready to run.
pub struct Operator {
    config: Config,
    client: Client,
    health: Health,
    metrics: OperatorMetrics,
    admin_address: SocketAddr,
    shutdown: CancellationToken,
}

impl Operator {
    /// Prepares an operator and starts its admin endpoint. Neither Kubernetes nor etcd need be there yet.
    pub async fn build(config: Config, shutdown: CancellationToken) -> anyhow::Result<Self> {
        let client = kube_client(&config).await?;
        let (health, metrics) = (Health::default(), Metrics::new("operator"));
        let operator_metrics = OperatorMetrics::register(&metrics);
        let admin_address =
            admin::serve(config.admin_listen, health.clone(), metrics, shutdown.clone()).await?;
        Ok(Self {
            config,
            client,
            health,
            metrics: operator_metrics,
            admin_address,
            shutdown,
        })
    }

    /// Where the admin endpoint listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Health of its parts.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Publishes until the shutdown token is cancelled; then stops writing and lets another operator lead.
    pub async fn run(self) {
        let Self {
            config,
            client,
            health,
            metrics,
            shutdown,
            ..
        } = self;
        let (leadership, publisher_leadership) = match config.lease {
            Some(_) => channel::channel(Leadership::none(Role::Unknown)),
            None => channel::channel(Leadership::leading()),
        };
        let leadership = Arc::new(leadership);
        let stop_election = CancellationToken::new();
        let election = config.lease.map(|lease| {
            let stop = stop_election.clone();
            tokio::spawn(lease::run(client.clone(), lease, leadership.clone(), stop))
        });
        let publisher = Publisher {
            settings: config.settings,
            etcd: config.etcd,
            told: watch::start(&client, &shutdown),
            leadership: publisher_leadership,
            metrics,
            health,
        };
        publisher.run(shutdown).await;
        // Only now, when nothing is written any more, may another one take over.
        stop_election.cancel();
        if let Some(election) = election {
            // A panic was logged by its hook; the Lease expires then.
            let _ = election.await;
        }
        drop(leadership);
    }
}

async fn kube_client(config: &Config) -> anyhow::Result<Client> {
    let mut kube_config = match &config.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)
                .with_context(|| format!("--k8s-kubeconfig-path {} is not a kubeconfig", path.display()))?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("--k8s-kubeconfig-path {} is not usable", path.display()))?
        }
        None => kube::Config::incluster().context(
            "not in a pod with a service account; name a kubeconfig file with --k8s-kubeconfig-path",
        )?,
    };
    kube_config.connect_timeout = Some(CONNECT_TIMEOUT);
    kube_config.read_timeout = Some(READ_TIMEOUT);
    kube_config.reset_reader_on_write = true;
    Client::try_from(kube_config).context("cannot make a client for the Kubernetes API")
}
