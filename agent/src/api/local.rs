//! The CLI's calls: status, services, clusters, tables. All read; they ask the loop and turn its state into messages.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::Stream;
use isthmus_kvstore::{EtcdConfig, Options, Replica, ask_replicas};
use isthmus_mesh::loadbalancer::{BackendView, ServiceView};
use isthmus_model::Protocol;
use isthmus_proto::agent::{
    self as proto, ClusterMeshStatusRequest, ClusterMeshStatusResponse, Health, ListServicesRequest,
    ListServicesResponse, ShowTableRequest, ShowTableResponse, StatusRequest, StatusResponse,
    local_server::Local,
};
use isthmus_runtime::State;
use isthmus_wire::status::ReplicaStatus;
use tonic::{Request, Response, Status};

use crate::{
    api::tables::{self, Table},
    rounds::Handle,
    state::RemoteView,
    status::{Subsystem, subsystems},
};

/// Longest part of a table in one message, in bytes: well below the 4 MiB that gRPC clients read.
const PART_LEN_MAX: usize = 512 * 1024;
/// How long a replica of the API server may take to answer.
const REPLICA_PATIENCE: Duration = Duration::from_secs(3);

/// The service.
#[derive(Clone, Debug)]
pub struct LocalService {
    state: Handle,
    upstream: Arc<EtcdConfig>,
}

impl LocalService {
    /// Answers from this loop's state, and asks the API server's replicas that `upstream` names.
    pub fn new(state: Handle, upstream: EtcdConfig) -> Self {
        Self {
            state,
            upstream: Arc::new(upstream),
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&crate::status::Facts, Duration) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let read = self.state.read(look).await;
        read.ok_or_else(|| Status::unavailable("the agent is stopping"))
    }
}

#[tonic::async_trait]
impl Local for LocalService {
    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let answer = self
            .read(|facts, now| {
                let identity = facts.state.identity();
                let subsystems: Vec<proto::Subsystem> =
                    subsystems(facts, now).into_iter().map(subsystem).collect();
                let worst = subsystems.iter().map(|one| one.health).max();
                StatusResponse {
                    cluster_name: identity.cluster.to_string(),
                    cluster_id: identity.cluster_id.get().into(),
                    node_name: identity.node.clone(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    health: worst.unwrap_or(Health::Unknown.into()),
                    subsystems,
                }
            })
            .await?;
        Ok(Response::new(answer))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        let all = request.into_inner().all_backends;
        let services = self
            .read(move |facts, _| {
                let views = facts.state.lb().services();
                views
                    .filter(|view| all || view.local)
                    .map(|view| service(view, all))
                    .collect()
            })
            .await?;
        Ok(Response::new(ListServicesResponse { services }))
    }

    async fn cluster_mesh_status(
        &self,
        request: Request<ClusterMeshStatusRequest>,
    ) -> Result<Response<ClusterMeshStatusResponse>, Status> {
        let unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX));
        let mut answer = self
            .read(move |facts, _| ClusterMeshStatusResponse {
                clusters: facts
                    .state
                    .remotes()
                    .into_iter()
                    .map(|remote| cluster(remote, unix_ms))
                    .collect(),
                global_services: facts.state.global_services().try_into().unwrap_or(u32::MAX),
                replicas: Vec::new(),
            })
            .await?;
        if request.into_inner().replicas {
            let asked = ask_replicas(&self.upstream, &Options::default(), REPLICA_PATIENCE).await;
            answer.replicas = asked.into_iter().map(replica).collect();
        }
        Ok(Response::new(answer))
    }

    type ShowTableStream = Pin<Box<dyn Stream<Item = Result<ShowTableResponse, Status>> + Send>>;

    async fn show_table(
        &self,
        request: Request<ShowTableRequest>,
    ) -> Result<Response<Self::ShowTableStream>, Status> {
        let name = request.into_inner().table;
        let Some(table) = Table::ALL.into_iter().find(|table| table.name() == name) else {
            let known: Vec<&str> = Table::ALL.into_iter().map(Table::name).collect();
            return Err(Status::not_found(format!(
                "there is no table {:?}; there are {}",
                name.chars().take(64).collect::<String>(),
                known.join(", ")
            )));
        };
        let text = self
            .read(move |facts, now| tables::json(table, facts, now))
            .await?;
        let parts = parts(&text).map(|part| {
            Ok(ShowTableResponse {
                json: part.to_owned(),
            })
        });
        let parts: Vec<_> = parts.collect();
        Ok(Response::new(Box::pin(futures::stream::iter(parts))))
    }
}

fn subsystem(subsystem: Subsystem) -> proto::Subsystem {
    let (health, message) = match subsystem.health {
        State::Ok(message) => (Health::Ok, message),
        // Starting is not a failure, and not all is well either.
        State::Starting(message) | State::Degraded(message) => (Health::Degraded, message),
        State::Failed(message) => (Health::Failed, message),
    };
    proto::Subsystem {
        name: subsystem.name.to_owned(),
        health: health.into(),
        message,
        // 0 means "not applicable", so an age is at least 1.
        age_ms: subsystem.age.map_or(0, |age| millis(age).max(1)),
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

fn service(view: ServiceView, all: bool) -> proto::Service {
    let frontends = view
        .frontends
        .iter()
        .map(|frontend| {
            let belongs = |backend: &&BackendView| {
                let port = backend.port_name == frontend.port_name
                    && (backend.protocol == frontend.protocol || backend.protocol == Protocol::Any);
                port && backend.address.is_ipv4() == frontend.address.is_ipv4()
                    && (all || backend.unused.is_none())
            };
            proto::Frontend {
                address: std::net::SocketAddr::new(frontend.address, frontend.port).to_string(),
                protocol: frontend.protocol.to_string(),
                service_id: frontend.service_id,
                backends: view.backends.iter().filter(belongs).map(backend).collect(),
            }
        })
        .collect();
    proto::Service {
        namespace: view.name.namespace.to_string(),
        name: view.name.name.to_string(),
        global: view.global,
        shared: view.shared,
        affinity: view.affinity.as_str().to_owned(),
        frontends,
    }
}

fn backend(view: &BackendView) -> proto::Backend {
    proto::Backend {
        address: std::net::SocketAddr::new(view.address, view.port).to_string(),
        cluster: view.cluster.clone(),
        node: view.node.clone(),
        zone: view.zone.clone(),
        state: tables::backend_state(view).to_owned(),
        used: view.unused.is_none(),
        reason: view.unused.map(|unused| unused.to_string()).unwrap_or_default(),
        backend_id: view.backend_id.unwrap_or(0),
    }
}

fn replica(replica: Replica) -> proto::Replica {
    let (status, error) = match replica.answer {
        Ok(status) => (status, String::new()),
        Err(error) => (ReplicaStatus::default(), error),
    };
    proto::Replica {
        endpoint: replica.endpoint.to_string(),
        address: replica
            .address
            .map(|address| address.to_string())
            .unwrap_or_default(),
        error,
        round_trip_ms: millis(replica.round_trip),
        version: status.version,
        started_ms: status.started_ms,
        revision: status.revision,
        remotes: status.remotes,
        remotes_connected: status.remotes_connected,
        remotes_ready: status.remotes_ready,
        watches: status.watches,
        streams: status.streams,
        keys: status.keys,
        bytes: status.bytes,
    }
}

fn cluster(remote: RemoteView, unix_ms: u64) -> proto::RemoteCluster {
    let (ready, status, services) = (remote.is_ready(), remote.summary(), remote.services());
    let connected = remote.is_connected();
    let mirror = remote.status.unwrap_or_default();
    let objects = |kind: &str| mirror.objects.get(kind).copied().unwrap_or(0);
    let heartbeat_age_ms = match mirror.heartbeat_seen_ms {
        0 => 0,
        seen => unix_ms.saturating_sub(seen).max(1),
    };
    proto::RemoteCluster {
        name: remote.name.to_string(),
        cluster_id: remote
            .cluster
            .as_ref()
            .map_or(mirror.cluster_id, |cluster| cluster.id.get().into()),
        connected,
        ready,
        status,
        num_nodes: remote.nodes.try_into().unwrap_or(u64::MAX),
        num_endpoints: objects("ip"),
        num_identities: objects("identities"),
        num_services: services,
        num_failures: mirror.num_failures,
        last_failure_ms: mirror.last_failure_ms,
        heartbeat_age_ms,
        slices: remote.cluster.map_or(mirror.slices, |cluster| cluster.slices),
        refused: mirror.refused.into_iter().collect(),
        last_refusals: mirror.last_refusals,
        phase: mirror.phase.as_str().to_owned(),
        received: mirror.progress.received,
        expected: mirror.progress.expected,
        keys_per_second: mirror.progress.keys_per_second,
        bytes_per_second: mirror.progress.bytes_per_second,
        left_ms: mirror.progress.left_ms,
        stale_since_ms: mirror.stale_since_ms,
        last_error: mirror.last_error,
        retries: mirror.retries,
        next_retry_ms: mirror.next_retry_ms,
        bytes: mirror.bytes,
        restricted: mirror.restricted,
    }
}

/// Cuts at character boundaries.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (part, after) = rest.split_at(rest.floor_char_boundary(PART_LEN_MAX));
        rest = after;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_short_and_join_to_the_whole() {
        let text = "ä".repeat(PART_LEN_MAX);
        let all: Vec<&str> = parts(&text).collect();
        assert!(all.iter().all(|part| part.len() <= PART_LEN_MAX));
        assert_eq!(all.concat(), text);
        assert_eq!(parts("[]").count(), 1);
    }
}
