//! The store that is our own, through `etcd-client`.
//!
//! In: reads and operations; a channel that [`crate::connect`] made, so that certificates are read again for each handshake.
//! Out: answers in the shape that the follower takes from any store, and revisions of transactions.
//!
//! Invariants: a transaction writes its operations unconditionally and each key once (see [`crate::plan`]); keys carry no
//! lease; an error keeps the server's status.

use etcd_client::{Error, GetOptions, KvClient, Txn, TxnOp};
use isthmus_proto::{
    etcdserverpb::{RangeResponse, ResponseHeader},
    mvccpb::KeyValue,
};
use tonic::{Status, transport::Channel};

use super::{Part, Read};
use crate::plan::Op;

pub(super) struct OwnStore {
    kv: KvClient,
}

impl OwnStore {
    /// `message_len_max` is the size of the largest answer that is read, in bytes.
    pub(super) async fn on(channel: Channel, message_len_max: usize) -> Result<Self, Error> {
        // Without a user name nothing is asked of the server here.
        let client = etcd_client::Client::from_channel(etcd_client::Channel::Tonic(channel), None).await?;
        let kv = client.kv_client().max_decoding_message_size(message_len_max);
        Ok(Self { kv })
    }

    pub(super) async fn read(&self, read: &Read) -> Result<RangeResponse, Status> {
        let mut options = GetOptions::new()
            .with_range(read.end.clone())
            .with_limit(read.limit)
            .with_revision(read.revision);
        if read.serializable {
            options = options.with_serializable();
        }
        options = match read.part {
            Part::All => options,
            Part::Keys => options.with_keys_only(),
            Part::Count => options.with_count_only(),
        };
        let mut kv = self.kv.clone();
        let mut response = kv.get(read.start.clone(), Some(options)).await.map_err(status)?;
        Ok(RangeResponse {
            header: response.header().map(header),
            kvs: response.take_kvs().into_iter().map(key_value).collect(),
            more: response.more(),
            count: response.count(),
        })
    }

    /// The transaction's revision; `None` if the answer has no header.
    pub(super) async fn write(&self, ops: &[Op]) -> Result<Option<i64>, Status> {
        let ops: Vec<TxnOp> = ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value } => TxnOp::put(key.clone(), value.clone(), None),
                Op::Delete { key } => TxnOp::delete(key.clone(), None),
            })
            .collect();
        let mut kv = self.kv.clone();
        let response = kv.txn(Txn::new().and_then(ops)).await.map_err(status)?;
        Ok(response.header().map(etcd_client::ResponseHeader::revision))
    }
}

fn header(header: &etcd_client::ResponseHeader) -> ResponseHeader {
    ResponseHeader {
        cluster_id: header.cluster_id(),
        member_id: header.member_id(),
        revision: header.revision(),
        raft_term: header.raft_term(),
    }
}

fn key_value(kv: etcd_client::KeyValue) -> KeyValue {
    let (create_revision, mod_revision, version, lease) =
        (kv.create_revision(), kv.mod_revision(), kv.version(), kv.lease());
    let (key, value) = kv.into_key_value();
    KeyValue {
        key: key.into(),
        create_revision,
        mod_revision,
        version,
        value: value.into(),
        lease,
    }
}

fn status(error: Error) -> Status {
    match error {
        Error::GRpcStatus(status) => status,
        // None of these comes from the calls above.
        error => Status::unknown(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
