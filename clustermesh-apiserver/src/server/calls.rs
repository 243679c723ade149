//! The calls around reading that clients make: leases, status, members, authentication. Readers' leases are kept with their
//! locks ([`locks`](super::locks)); a writer's are the embedded store's.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use isthmus_proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, AuthStatusRequest, AuthStatusResponse, AuthenticateRequest,
    AuthenticateResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest,
    LeaseKeepAliveResponse, LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, Member, MemberListRequest,
    MemberListResponse, ResponseHeader, StatusRequest, StatusResponse, alarm_request::AlarmAction,
    auth_server, cluster_server, lease_server, maintenance_server,
};
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

use super::{Context, Peer, errors, locks::Locks, write};
use crate::{
    embedded::{Command, LeaseInfo, check::check},
    store::{Route, SubId},
};

/// What Status says; Cilium 1.4 wants 3.1.0 or newer.
const VERSION: &str = "3.5.0";

pub(super) struct Calls(pub(super) Arc<Context>);

impl Calls {
    /// A header of the own cluster's view, for a peer that has rights. (Cilium's readers pin the first cluster ID they see.)
    fn header<T>(&self, request: &Request<T>) -> Result<ResponseHeader, Status> {
        if Peer::of(request)?.rights.is_none() {
            return Err(errors::permission_denied());
        }
        own_header(&self.0)
    }

    /// The sender's locks and leases, and its name for them.
    fn locks<T>(&self, request: &Request<T>) -> Result<(&Locks, Arc<Peer>), Status> {
        let peer = Peer::of(request)?;
        let locks = self.0.locks_of(&peer).ok_or_else(errors::permission_denied)?;
        Ok((locks, peer))
    }
}

pub(super) fn own_header(context: &Context) -> Result<ResponseHeader, Status> {
    let own = Route::Sub(SubId::Own);
    context.shared.read(|store| {
        if store.is_served(&own) {
            Ok(store.header(&own))
        } else {
            Err(errors::no_leader())
        }
    })
}

/// The ID that the client has chosen for its lease, or one that is chosen here.
pub(super) fn lease_id(request: &LeaseGrantRequest) -> i64 {
    match request.id {
        0 => rand::random_range(1..i64::MAX),
        id => id,
    }
}

fn time_to_live(
    header: Option<ResponseHeader>,
    request: LeaseTimeToLiveRequest,
    lease: Option<LeaseInfo>,
) -> LeaseTimeToLiveResponse {
    let (ttl, granted_ttl, mut keys) = match lease {
        Some(lease) => (lease.left, lease.ttl, lease.keys),
        None => (-1, 0, Vec::new()),
    };
    if !request.keys {
        keys.clear();
    }
    LeaseTimeToLiveResponse {
        header,
        id: request.id,
        ttl,
        granted_ttl,
        keys,
    }
}

#[tonic::async_trait]
impl lease_server::Lease for Calls {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        if let Some(embedded) = write::writer(&self.0, &request) {
            return write::lease_grant(&self.0, embedded, request.into_inner()).await;
        }
        let header = self.header(&request)?;
        let (locks, peer) = self.locks(&request)?;
        let request = request.into_inner();
        let id = lease_id(&request);
        check(&Command::Grant { id, ttl: request.ttl })?;
        let ttl = locks.grant(&peer.name, id, request.ttl, self.0.now())?;
        Ok(Response::new(LeaseGrantResponse {
            header: Some(header),
            id,
            ttl,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        if let Some(embedded) = write::writer(&self.0, &request) {
            return write::lease_revoke(&self.0, embedded, request.into_inner()).await;
        }
        let header = Some(self.header(&request)?);
        let (locks, peer) = self.locks(&request)?;
        locks.revoke(&peer.name, request.get_ref().id)?;
        Ok(Response::new(LeaseRevokeResponse { header }))
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        self.header(&request)?;
        let context = self.0.clone();
        let stop = Peer::of(&request)?.left();
        if let Some(embedded) = write::writer(&context, &request) {
            let answers = write::lease_keep_alive(context.clone(), embedded.clone(), request.into_inner());
            return Ok(Response::new(Box::pin(answers.take_until(stop))));
        }
        let (_, peer) = self.locks(&request)?;
        let answers = request.into_inner().map(move |request| {
            let id = request?.id;
            let ttl = context.locks.keep_alive(&peer.name, id, context.now());
            Ok(LeaseKeepAliveResponse {
                header: Some(own_header(&context)?),
                id,
                // 0 tells that there is none.
                ttl: ttl.unwrap_or_default(),
            })
        });
        Ok(Response::new(Box::pin(answers.take_until(stop))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let header = Some(self.header(&request)?);
        if let Some(embedded) = write::writer(&self.0, &request) {
            let lease = embedded.lease(request.get_ref().id).await?;
            return Ok(Response::new(time_to_live(header, request.into_inner(), lease)));
        }
        let (locks, peer) = self.locks(&request)?;
        self.0.list_turn(&peer).await?;
        let lease = locks.lease(&peer.name, request.get_ref().id, self.0.now());
        let looked = lease.as_ref().map_or(0, |lease| lease.keys.len());
        let answer = time_to_live(header, request.into_inner(), lease);
        let bytes = answer.encoded_len();
        self.0.deliver(&peer, looked, answer, bytes).await
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let header = Some(self.header(&request)?);
        let answer = |ids: Vec<i64>| LeaseLeasesResponse {
            header,
            leases: ids.into_iter().map(|id| LeaseStatus { id }).collect(),
        };
        if let Some(embedded) = write::writer(&self.0, &request) {
            return Ok(Response::new(answer(embedded.leases().await?)));
        }
        let (locks, peer) = self.locks(&request)?;
        self.0.list_turn(&peer).await?;
        let answer = answer(locks.leases(&peer.name));
        let (looked, bytes) = (answer.leases.len(), answer.encoded_len());
        self.0.deliver(&peer, looked, answer, bytes).await
    }
}

#[tonic::async_trait]
impl cluster_server::Cluster for Calls {
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let header = self.header(&request)?;
        let member = Member {
            id: header.member_id,
            name: self.0.cluster.to_string(),
            client_ur_ls: vec![format!("https://{}", self.0.address)],
            ..Default::default()
        };
        Ok(Response::new(MemberListResponse {
            header: Some(header),
            members: vec![member],
        }))
    }
}

#[tonic::async_trait]
impl maintenance_server::Maintenance for Calls {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let header = self.header(&request)?;
        let own_cluster = Peer::of(&request)?.may_read(&super::replica::range());
        let index = u64::try_from(header.revision).unwrap_or_default();
        let (db_size, db_size_in_use) = write::sizes(&self.0);
        let mut response = Response::new(StatusResponse {
            version: VERSION.to_owned(),
            db_size,
            db_size_in_use,
            errors: write::alarm_texts(&self.0, &header),
            leader: header.member_id,
            raft_index: index,
            raft_term: header.raft_term,
            raft_applied_index: index,
            header: Some(header),
            ..Default::default()
        });
        if own_cluster {
            super::replica::describe(&self.0, response.metadata_mut());
        }
        Ok(response)
    }

    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let header = self.header(&request)?;
        let changes = request.get_ref().action != AlarmAction::Get as i32;
        if changes && write::writer(&self.0, &request).is_none() {
            return Err(errors::permission_denied());
        }
        Ok(Response::new(write::alarm(&self.0, header, &request)))
    }
}

#[tonic::async_trait]
impl auth_server::Auth for Calls {
    async fn authenticate(
        &self,
        _: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        Err(errors::no_authentication())
    }

    async fn auth_status(
        &self,
        request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        Ok(Response::new(AuthStatusResponse {
            header: Some(self.header(&request)?),
            // There are no passwords; certificates decide.
            enabled: false,
            auth_revision: 1,
        }))
    }
}
