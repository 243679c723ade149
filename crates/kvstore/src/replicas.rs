//! Asks every replica behind an upstream's endpoints how it is: each address that an endpoint's name leads to, on a connection
//! of its own, with the upstream's certificates.
//!
//! Out: a line for each address, also for those that do not answer, within the given patience.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use isthmus_proto::etcdserverpb::{StatusRequest, maintenance_client::MaintenanceClient};
use isthmus_wire::status::ReplicaStatus;

use crate::{
    client::CallError,
    config::{Endpoint, EtcdConfig},
    connect::{Options, connect},
};

/// Most addresses that are asked.
const REPLICAS_MAX: usize = 64;

/// One address of an upstream.
#[derive(Clone, Debug)]
pub struct Replica {
    /// The endpoint that leads to it.
    pub endpoint: Endpoint,
    /// Its address; `None` if the endpoint's name does not resolve.
    pub address: Option<SocketAddr>,
    /// Until it had answered, connection included.
    pub round_trip: Duration,
    /// What it says; of a server that is not Isthmus' only version and revision. Or why it does not, for people.
    pub answer: Result<ReplicaStatus, String>,
}

/// Asks all replicas at once. Each may take `patience`, and so may names to resolve.
pub async fn ask_replicas(config: &EtcdConfig, options: &Options, patience: Duration) -> Vec<Replica> {
    let resolved = config.endpoints.iter().map(|endpoint| async move {
        let found = tokio::time::timeout(patience, resolve(endpoint, config)).await;
        let found = found.unwrap_or_else(|_| Err(format!("its name was not resolved within {patience:?}")));
        (endpoint.clone(), found)
    });
    let (mut asked, mut seen) = (Vec::new(), BTreeSet::new());
    let mut failed = Vec::new();
    for (endpoint, found) in futures::future::join_all(resolved).await {
        match found {
            Err(error) => failed.push(Replica {
                endpoint,
                address: None,
                round_trip: Duration::ZERO,
                answer: Err(error),
            }),
            Ok(addresses) => {
                for address in addresses {
                    if seen.len() < REPLICAS_MAX && seen.insert(address) {
                        asked.push(ask(endpoint.clone(), address, config, options, patience));
                    }
                }
            }
        }
    }
    let mut replicas = futures::future::join_all(asked).await;
    replicas.extend(failed);
    replicas
}

pub(crate) async fn resolve(endpoint: &Endpoint, config: &EtcdConfig) -> Result<Vec<SocketAddr>, String> {
    if let Some(ips) = config.host_aliases.get(&endpoint.host) {
        return Ok(ips.iter().map(|ip| SocketAddr::new(*ip, endpoint.port)).collect());
    }
    tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port))
        .await
        .map(Iterator::collect)
        .map_err(|error| format!("its name does not resolve: {error}"))
}

async fn ask(
    endpoint: Endpoint,
    address: SocketAddr,
    config: &EtcdConfig,
    options: &Options,
    patience: Duration,
) -> Replica {
    let begun = Instant::now();
    // The name stays, which is what the certificate is for; it leads to this address only.
    let mut pinned = config.clone();
    pinned.endpoints = vec![endpoint.clone()];
    pinned
        .host_aliases
        .insert(endpoint.host.clone(), vec![address.ip()]);
    let answer = async {
        let channel = connect(&endpoint, &pinned, options)
            .await
            .map_err(|error| error.to_string())?;
        let answer = MaintenanceClient::new(channel)
            .max_decoding_message_size(options.message_len_max)
            .status(StatusRequest {})
            .await
            .map_err(|status| CallError::of(status, options.message_len_max).to_string())?;
        let said = answer.metadata().get_bin(ReplicaStatus::METADATA);
        let said = said.and_then(|value| value.to_bytes().ok());
        let own = said.and_then(|bytes| ReplicaStatus::decode(&bytes).ok());
        let message = answer.into_inner();
        Ok(own.unwrap_or_else(|| ReplicaStatus {
            version: format!("etcd {}", message.version.chars().take(32).collect::<String>()),
            revision: message.header.map_or(0, |header| header.revision),
            ..Default::default()
        }))
    };
    let answer = tokio::time::timeout(patience, answer)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {patience:?}")));
    Replica {
        endpoint,
        address: Some(address),
        round_trip: begun.elapsed(),
        answer,
    }
}
