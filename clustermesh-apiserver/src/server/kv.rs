//! The KV service: Range, and writes for those who may ([`write`](super::write)).

use std::sync::Arc;

use isthmus_proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, TxnRequest, TxnResponse, kv_server,
    range_request::{SortOrder, SortTarget},
};
use isthmus_tls::rights::KeyRange;
use prost::Message;
use tonic::{Request, Response, Status};

use super::{Context, Peer, errors, write};
use crate::store::RangeError;

/// Keys of a page as etcd's and Cilium's readers ask for them; a page is answered whatever its size.
const PAGE: usize = 256;

pub(super) struct Kv(pub(super) Arc<Context>);

impl Kv {
    fn read(
        &self,
        range: &KeyRange,
        request: &RangeRequest,
    ) -> Result<Result<RangeResponse, RangeError>, Status> {
        self.0.shared.read(|store| {
            let route = store.route(range);
            if !store.is_served(&route) {
                Err(errors::no_leader())
            } else if store.is_incomplete(range) {
                Err(errors::incomplete())
            } else {
                Ok(store.range(&route, request))
            }
        })
    }
}

#[tonic::async_trait]
impl kv_server::Kv for Kv {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        if request.key.is_empty() {
            return Err(errors::empty_key());
        }
        if SortOrder::try_from(request.sort_order).is_err()
            || SortTarget::try_from(request.sort_target).is_err()
        {
            return Err(errors::invalid_sort());
        }
        let range = KeyRange::from_etcd(&request.key, &request.range_end);
        // A range that ends before it begins is answered with nothing, as etcd does.
        let asked = if range.is_empty() {
            KeyRange::from_etcd(&request.key, &[])
        } else {
            range.clone()
        };
        if !peer.may_read(&asked) {
            return Err(errors::permission_denied());
        }
        self.0.list_turn(&peer).await?;
        self.0.metrics.ranges.inc();
        let mut changes = self.0.shared.changes();
        let mut answer = self.read(&range, &request)?;
        if answer == Err(RangeError::Future) {
            // A reader that comes from another replica may be some milliseconds ahead of this one.
            let reached = async {
                while answer == Err(RangeError::Future) && changes.changed().await.is_ok() {
                    answer = self.read(&range, &request)?;
                }
                Ok::<_, Status>(())
            };
            if let Ok(result) = tokio::time::timeout(self.0.limits.future_revision_wait, reached).await {
                result?;
            }
        }
        let answer = answer.map_err(errors::out_of_range)?;
        // Up to here it shares the store's bytes; to send it is to copy it.
        let (bytes, limit) = (answer.encoded_len(), self.0.limits.answer_bytes);
        if answer.kvs.len() > PAGE && bytes > limit {
            return Err(errors::answer_too_large(bytes, limit, PAGE));
        }
        let place = self.0.list_answer(&peer, answer.kvs.len(), bytes).await?;
        let mut response = Response::new(answer);
        if let Some(place) = place {
            response.extensions_mut().insert(place);
        }
        Ok(response)
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        write::put(&self.0, request).await
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        write::delete_range(&self.0, request).await
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        write::txn(&self.0, request).await
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        write::compact(&self.0, request).await
    }
}
