//! Writes: of the local operator, to the embedded store. Everybody else's, and all of them where an etcd is, are refused.
//!
//! A write must lie in the own cluster's part of the keyspace: mirrored keys and this server's own are nobody's to change.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use isthmus_proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, CompactionResponse,
    DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest,
    LeaseKeepAliveResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, ResponseHeader,
    TxnRequest, TxnResponse, alarm_request::AlarmAction, request_op,
};
use isthmus_tls::rights::KeyRange;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Context, Peer,
    calls::{lease_id, own_header},
    errors,
};
use crate::{
    embedded::{Answer, CallError, Command, Embedded, granted_ttl},
    store::{Route, Store, SubId},
};

impl Context {
    /// Whether `peer` may write, and to an embedded store: the administrator of this cluster, which is the name that its
    /// operator has.
    pub(super) fn is_writer(&self, peer: &Peer) -> bool {
        let admin_of = peer.name.strip_prefix("admin-");
        self.embedded.is_some() && admin_of == Some(self.cluster.as_str())
    }
}

/// The embedded store, if the sender of `request` may write to it.
pub(super) fn writer<'c, T>(context: &'c Context, request: &Request<T>) -> Option<&'c Embedded> {
    let peer = Peer::of(request).ok()?;
    context.embedded.as_ref().filter(|_| context.is_writer(&peer))
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(refusal) => refusal.into(),
            CallError::Disk(_) => Self::unavailable(error.to_string()),
            CallError::Stopped => errors::stopped(),
        }
    }
}

/// The header of an answer at `revision`.
fn header(context: &Context, revision: i64) -> Result<ResponseHeader, Status> {
    let header = own_header(context)?;
    Ok(ResponseHeader { revision, ..header })
}

fn fill(context: &Context, part: &mut Option<ResponseHeader>) -> Result<(), Status> {
    let revision = part.as_ref().map_or(0, |header| header.revision);
    *part = Some(header(context, revision)?);
    Ok(())
}

/// Whether all that lies between is the own cluster's. Nothing is, too.
fn is_own(store: &Store, key: &[u8], range_end: &[u8]) -> bool {
    let range = KeyRange::from_etcd(key, range_end);
    if range_end.is_empty() {
        return store.is_own(key);
    }
    range.is_empty() || store.route(&range) == Route::Sub(SubId::Own)
}

fn txn_is_own(store: &Store, request: &TxnRequest) -> bool {
    let own = |key: &Bytes, end: &Bytes| is_own(store, key, end);
    let mut compares = request.compare.iter();
    let mut ops = request.success.iter().chain(&request.failure);
    compares.all(|compare| own(&compare.key, &compare.range_end))
        && ops.all(|op| match &op.request {
            Some(request_op::Request::RequestRange(range)) => own(&range.key, &range.range_end),
            Some(request_op::Request::RequestPut(put)) => own(&put.key, &Bytes::new()),
            Some(request_op::Request::RequestDeleteRange(delete)) => own(&delete.key, &delete.range_end),
            Some(request_op::Request::RequestTxn(txn)) => txn_is_own(store, txn),
            None => true,
        })
}

async fn write<T>(
    context: &Context,
    request: Request<T>,
    own: impl FnOnce(&Store, &T) -> bool,
    command: impl FnOnce(T) -> Command,
) -> Result<Answer, Status> {
    let Some(embedded) = writer(context, &request) else {
        return Err(errors::permission_denied());
    };
    let request = request.into_inner();
    if !context.shared.read(|store| own(store, &request)) {
        return Err(errors::permission_denied());
    }
    Ok(embedded.call(command(request)).await?)
}

pub(super) async fn put(
    context: &Context,
    request: Request<PutRequest>,
) -> Result<Response<PutResponse>, Status> {
    let own = |store: &Store, put: &PutRequest| is_own(store, &put.key, &[]);
    let Answer::Put(mut response) = write(context, request, own, Command::Put).await? else {
        return Err(errors::mismatch());
    };
    fill(context, &mut response.header)?;
    Ok(Response::new(response))
}

pub(super) async fn delete_range(
    context: &Context,
    request: Request<DeleteRangeRequest>,
) -> Result<Response<DeleteRangeResponse>, Status> {
    let own = |store: &Store, delete: &DeleteRangeRequest| is_own(store, &delete.key, &delete.range_end);
    let Answer::Delete(mut response) = write(context, request, own, Command::Delete).await? else {
        return Err(errors::mismatch());
    };
    fill(context, &mut response.header)?;
    Ok(Response::new(response))
}

pub(super) async fn txn(
    context: &Context,
    request: Request<TxnRequest>,
) -> Result<Response<TxnResponse>, Status> {
    let Answer::Txn(mut response) = write(context, request, txn_is_own, Command::Txn).await? else {
        return Err(errors::mismatch());
    };
    fill(context, &mut response.header)?;
    Ok(Response::new(response))
}

pub(super) async fn compact(
    context: &Context,
    request: Request<CompactionRequest>,
) -> Result<Response<CompactionResponse>, Status> {
    let compact = |request: CompactionRequest| Command::Compact(request.revision);
    let revision = done(write(context, request, |_, _| true, compact).await?)?;
    Ok(Response::new(CompactionResponse {
        header: Some(header(context, revision)?),
    }))
}

fn done(answer: Answer) -> Result<i64, Status> {
    match answer {
        Answer::Done { revision } => Ok(revision),
        _ => Err(errors::mismatch()),
    }
}

// Leases of the operator.

pub(super) async fn lease_grant(
    context: &Context,
    embedded: &Embedded,
    request: LeaseGrantRequest,
) -> Result<Response<LeaseGrantResponse>, Status> {
    let id = lease_id(&request);
    let ttl = granted_ttl(request.ttl);
    let revision = done(embedded.call(Command::Grant { id, ttl }).await?)?;
    Ok(Response::new(LeaseGrantResponse {
        header: Some(header(context, revision)?),
        id,
        ttl,
        error: String::new(),
    }))
}

pub(super) async fn lease_revoke(
    context: &Context,
    embedded: &Embedded,
    request: LeaseRevokeRequest,
) -> Result<Response<LeaseRevokeResponse>, Status> {
    let revision = done(embedded.call(Command::Revoke(request.id)).await?)?;
    let header = Some(header(context, revision)?);
    Ok(Response::new(LeaseRevokeResponse { header }))
}

pub(super) fn lease_keep_alive(
    context: Arc<Context>,
    embedded: Embedded,
    requests: Streaming<LeaseKeepAliveRequest>,
) -> impl Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send {
    requests.then(move |request| {
        let (context, embedded) = (context.clone(), embedded.clone());
        async move {
            let id = request?.id;
            let ttl = embedded.keep_alive(id).await?;
            Ok(LeaseKeepAliveResponse {
                header: Some(own_header(&context)?),
                id,
                // 0 tells that there is none.
                ttl: ttl.unwrap_or_default(),
            })
        }
    })
}

// How much room there is.

/// Bytes of the store's file, and of what is in it; some size where there is none, so that tools which divide by it do not.
pub(super) fn sizes(context: &Context) -> (i64, i64) {
    let (file, used) = context.embedded.as_ref().map_or((1, 1), Embedded::sizes);
    let size = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX).max(1);
    (size(file), size(used))
}

fn alarms(context: &Context, header: &ResponseHeader) -> Vec<AlarmMember> {
    let full = context.embedded.as_ref().is_some_and(Embedded::is_full);
    let alarm = AlarmMember {
        member_id: header.member_id,
        alarm: AlarmType::Nospace as i32,
    };
    full.then_some(alarm).into_iter().collect()
}

/// Alarms as Status tells them.
pub(super) fn alarm_texts(context: &Context, header: &ResponseHeader) -> Vec<String> {
    let text = |alarm: &AlarmMember| format!("memberID:{} alarm:NOSPACE ", alarm.member_id);
    alarms(context, header).iter().map(text).collect()
}

/// Lists the alarms, or forgets them: the next write that does not fit raises one again. Nobody else can raise one.
pub(super) fn alarm(
    context: &Context,
    header: ResponseHeader,
    request: &Request<AlarmRequest>,
) -> AlarmResponse {
    let alarms = alarms(context, &header);
    if request.get_ref().action() == AlarmAction::Deactivate
        && let Some(embedded) = writer(context, request)
    {
        embedded.disarm();
    }
    AlarmResponse {
        header: Some(header),
        alarms,
    }
}
