//! The KV service: Range, transactions that read, locks of readers ([`locks`](super::locks)), and writes for those who may
//! ([`write`](super::write)).

use std::sync::Arc;

use isthmus_proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse, kv_server,
    range_request::{SortOrder, SortTarget},
};
use isthmus_tls::rights::KeyRange;
use prost::Message;
use tonic::{Request, Response, Status};

use super::{Context, Peer, errors, face::Face, locks::Locks, txn, write};
use crate::{
    embedded::{
        Answer, Command,
        check::{check, check_size},
    },
    store::{Budget, RangeError, Route, Store, SubId},
};

/// Keys of a page as etcd's and Cilium's readers ask for them; a page is answered whatever its size.
const PAGE: usize = 256;
/// Keys that a transaction may look at.
const TXN_KEYS_MAX: usize = 100_000;

pub(super) struct Kv(pub(super) Arc<Context>);

impl Kv {
    fn read(
        &self,
        peer: &Peer,
        face: Face,
        range: &KeyRange,
        request: &RangeRequest,
        budget: &mut Budget,
    ) -> Result<Result<RangeResponse, RangeError>, Status> {
        self.0.shared.read(|store| {
            let route = store.route(range);
            if !face.is_served(store, &route) {
                Err(errors::no_leader())
            } else if store.is_incomplete(range) {
                Err(errors::incomplete())
            } else {
                let mut answer = store.range_within(&route, request, budget);
                if let Ok(RangeResponse {
                    header: Some(header), ..
                }) = &mut answer
                {
                    face.show(store, header);
                    // A list begins at the present, and then knows which history that is in.
                    if request.revision <= 0
                        && let Some((epoch, _)) = store.mistakable(&route)
                    {
                        peer.has_listed(&route, epoch);
                    }
                }
                Ok(answer)
            }
        })
    }

    /// Reads, and waits for what will be there in a moment.
    async fn read_soon(
        &self,
        peer: &Peer,
        face: Face,
        range: &KeyRange,
        request: &RangeRequest,
        budget: &mut Budget,
    ) -> Result<RangeResponse, Status> {
        let mut changes = self.0.shared.changes();
        let mut answer = self.read(peer, face, range, request, budget)?;
        if answer == Err(RangeError::Future) {
            // A reader that comes from another replica may be some milliseconds ahead of this one.
            let reached = async {
                while answer == Err(RangeError::Future) && changes.changed().await.is_ok() {
                    answer = self.read(peer, face, range, request, budget)?;
                }
                Ok::<_, Status>(())
            };
            match tokio::time::timeout(self.0.limits.future_revision_wait, reached).await {
                Ok(result) => result?,
                // A source that got on without an event wakes nobody.
                Err(_) => answer = self.read(peer, face, range, request, budget)?,
            }
        }
        // History of a server that begins anew may be on its way; the store bounds how long that may take.
        let arriving = |store: &Store| store.is_arriving(&store.route(range), request.revision);
        while answer == Err(RangeError::Compacted) {
            let waits = self.0.shared.read(arriving);
            if waits && changes.changed().await.is_err() {
                break;
            }
            // Also if it came between these looks.
            answer = self.read(peer, face, range, request, budget)?;
            if !waits {
                break;
            }
        }
        answer.map_err(errors::range)
    }

    /// A header of the locks at `revision`, as the client is to see it.
    fn lock_header(&self, face: Face, locks: &Locks, revision: i64) -> Result<ResponseHeader, Status> {
        let mut header = ResponseHeader {
            revision,
            ..locks.header()
        };
        self.0.shared.read(|store| {
            if !face.is_served(store, &Route::Sub(SubId::Own)) {
                return Err(errors::no_leader());
            }
            face.show(store, &mut header);
            Ok(header)
        })
    }

    fn lock_write(
        &self,
        peer: &Peer,
        face: Face,
        locks: &Locks,
        command: &Command,
        budget: &mut Budget,
    ) -> Result<Answer, Status> {
        let mut answer = locks.write(&peer.name, command, budget)?;
        let header = match &mut answer {
            Answer::Put(response) => &mut response.header,
            Answer::Delete(response) => &mut response.header,
            Answer::Txn(response) => &mut response.header,
            Answer::Done { .. } => return Ok(answer),
        };
        let revision = header.as_ref().map_or(0, |header| header.revision);
        *header = Some(self.lock_header(face, locks, revision)?);
        Ok(answer)
    }

    fn lock_range(
        &self,
        face: Face,
        locks: &Locks,
        request: &RangeRequest,
        budget: &mut Budget,
    ) -> Result<RangeResponse, Status> {
        let own = Route::Sub(SubId::Own);
        let answer = locks
            .shared
            .read(|store| store.range_within(&own, request, budget));
        let mut answer = answer.map_err(errors::range)?;
        let revision = answer.header.as_ref().map_or(0, |header| header.revision);
        answer.header = Some(self.lock_header(face, locks, revision)?);
        Ok(answer)
    }

    /// Looks for what a transaction that only reads asks for. It reads what its sender may read.
    fn read_txn(&self, face: Face, request: &TxnRequest, budget: &mut Budget) -> Result<TxnResponse, Status> {
        self.0.shared.read(|store| {
            let route = txn::route(store, request, Route::Sub(SubId::Own));
            if !face.is_served(store, &route) {
                return Err(errors::no_leader());
            }
            if !txn::reads_only(request, &mut |range| !store.is_incomplete(range)) {
                return Err(errors::incomplete());
            }
            let mut answer = txn::answer(store, &route, request, budget).map_err(errors::range)?;
            if let Some(header) = &mut answer.header {
                face.show(store, header);
            }
            Ok(answer)
        })
    }

    /// Charges what was looked at, and sends the answer when there is a place for it.
    async fn deliver<T: Message>(
        &self,
        peer: &Peer,
        budget: &Budget,
        answer: Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let looked = budget.looked();
        let answer = answer.inspect_err(|_| self.0.listed(peer, looked, 0))?;
        let bytes = answer.encoded_len();
        self.0.deliver(peer, looked, answer, bytes).await
    }

    /// What a transaction may look at.
    fn txn_budget(&self) -> Budget {
        Budget::new(TXN_KEYS_MAX, self.0.limits.answer_bytes)
    }
}

#[tonic::async_trait]
impl kv_server::Kv for Kv {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let (peer, face) = (Peer::of(&request)?, Face::of(&request));
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
        let locks = self.0.locks_in(&peer, &asked);
        if locks.is_none() && !peer.may_read(&asked) {
            return Err(errors::permission_denied());
        }
        self.0.list_turn(&peer).await?;
        self.0.metrics.ranges.inc();
        let mut budget = Budget::unlimited();
        let answer = match locks {
            Some(locks) => self.lock_range(face, locks, &request, &mut budget),
            None => self.read_soon(&peer, face, &range, &request, &mut budget).await,
        };
        // Up to here it shares the store's bytes; to send it is to copy it.
        let answer = answer.and_then(|answer| {
            let limit = self.0.limits.answer_bytes;
            if answer.kvs.len() <= PAGE || answer.encoded_len() <= limit {
                return Ok(answer);
            }
            Err(errors::answer_too_large(answer.encoded_len(), limit, PAGE))
        });
        self.deliver(&peer, &budget, answer).await
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let (peer, face) = (Peer::of(&request)?, Face::of(&request));
        let key = KeyRange::from_etcd(&request.get_ref().key, &[]);
        let Some(locks) = self.0.locks_in(&peer, &key) else {
            return write::put(&self.0, request).await;
        };
        let command = Command::Put(request.into_inner());
        // Who takes a lock waits for no turn, and pays.
        let mut budget = self.txn_budget();
        let answer = match self.lock_write(&peer, face, locks, &command, &mut budget) {
            Ok(Answer::Put(response)) => Ok(response),
            Ok(_) => Err(errors::mismatch()),
            Err(status) => Err(status),
        };
        self.deliver(&peer, &budget, answer).await
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let (peer, face) = (Peer::of(&request)?, Face::of(&request));
        let range = KeyRange::from_etcd(&request.get_ref().key, &request.get_ref().range_end);
        let Some(locks) = self.0.locks_in(&peer, &range) else {
            return write::delete_range(&self.0, request).await;
        };
        // Who gives a lock back waits for nothing.
        if !request.get_ref().range_end.is_empty() {
            self.0.list_turn(&peer).await?;
        }
        let command = Command::Delete(request.into_inner());
        let mut budget = self.txn_budget();
        let answer = match self.lock_write(&peer, face, locks, &command, &mut budget) {
            Ok(Answer::Delete(response)) => Ok(response),
            Ok(_) => Err(errors::mismatch()),
            Err(status) => Err(status),
        };
        self.deliver(&peer, &budget, answer).await
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        if write::writer(&self.0, &request).is_some() {
            return write::txn(&self.0, request).await;
        }
        let (peer, face) = (Peer::of(&request)?, Face::of(&request));
        if peer.rights.is_none() {
            return Err(errors::permission_denied());
        }
        let request = request.into_inner();
        // First, for what is checked of each part, and then of all of them together, is more than that.
        check_size(&request)?;
        let command = Command::Txn(request);
        check(&command)?;
        let Command::Txn(request) = &command else {
            return Err(errors::mismatch());
        };
        let reads_nothing =
            request.compare.is_empty() && request.success.is_empty() && request.failure.is_empty();
        let locks = self
            .0
            .locks_of(&peer)
            .filter(|locks| !reads_nothing && locks.concerns(request));
        let may_read = &mut |range: &KeyRange| range.is_empty() || peer.may_read(range);
        if locks.is_none() && !txn::reads_only(request, may_read) {
            return Err(errors::permission_denied());
        }
        self.0.list_turn(&peer).await?;
        let mut budget = self.txn_budget();
        let answer = match locks {
            Some(locks) => match self.lock_write(&peer, face, locks, &command, &mut budget) {
                Ok(Answer::Txn(response)) => Ok(response),
                Ok(_) => Err(errors::mismatch()),
                Err(status) => Err(status),
            },
            None => self.read_txn(face, request, &mut budget),
        };
        self.deliver(&peer, &budget, answer).await
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        write::compact(&self.0, request).await
    }
}
