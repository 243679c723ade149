//! Both clients against one server: it cannot tell them apart, and neither can who calls them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
    kv_server::{Kv, KvServer},
    request_op::Request as TxnOp,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response};

use super::*;
use crate::{
    client::{CallError, Client, Owner},
    config::{Endpoint, EtcdConfig},
    connect::Options,
};

const HEADER: ResponseHeader = ResponseHeader {
    cluster_id: 7,
    member_id: 8,
    revision: 42,
    raft_term: 9,
};
const MESSAGE_LEN_MAX: usize = 64 * 1024;

/// Answers reads by their first key, and notes all requests.
#[derive(Clone, Default)]
struct Server {
    ranges: Arc<Mutex<Vec<RangeRequest>>>,
    txns: Arc<Mutex<Vec<TxnRequest>>>,
}

#[tonic::async_trait]
impl Kv for Server {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let request = request.into_inner();
        let key = request.key.clone();
        self.ranges.lock().unwrap().push(request);
        let value_len = match &key[..] {
            b"compacted" => {
                return Err(Status::out_of_range(
                    "etcdserver: mvcc: required revision has been compacted",
                ));
            }
            b"future" => {
                return Err(Status::out_of_range(
                    "etcdserver: mvcc: required revision is a future revision",
                ));
            }
            b"denied" => return Err(Status::permission_denied("etcdserver: permission denied")),
            b"gone" => return Err(Status::unavailable("etcdserver: no leader")),
            b"silent" => std::future::pending().await,
            b"large" => MESSAGE_LEN_MAX,
            _ => 3,
        };
        Ok(Response::new(RangeResponse {
            header: (key != "headless").then_some(HEADER),
            kvs: vec![KeyValue {
                key,
                create_revision: 1,
                mod_revision: 2,
                version: 3,
                value: vec![b'v'; value_len].into(),
                lease: 4,
            }],
            more: true,
            count: 5,
        }))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let request = request.into_inner();
        let is_empty = request.success.is_empty();
        self.txns.lock().unwrap().push(request);
        Ok(Response::new(TxnResponse {
            header: (!is_empty).then_some(HEADER),
            succeeded: true,
            responses: vec![],
        }))
    }

    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn delete_range(
        &self,
        _: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn compact(&self, _: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        Err(Status::unimplemented("not called"))
    }
}

/// A server, and a client of each kind. The server ends with the test's runtime.
async fn start() -> (Server, Client, Client) {
    let server = Server::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = EtcdConfig {
        endpoints: vec![Endpoint {
            tls: false,
            host: "127.0.0.1".to_owned(),
            port: listener.local_addr().unwrap().port(),
        }],
        trusted_ca_file: None,
        identity: None,
        host_aliases: BTreeMap::new(),
    };
    let serve = tonic::transport::Server::builder()
        .add_service(KvServer::new(server.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serve);
    let options = Options {
        call_timeout: std::time::Duration::from_millis(500),
        message_len_max: MESSAGE_LEN_MAX,
        ..Options::default()
    };
    let own = Client::connect_to(Owner::Ourselves, &config, &options)
        .await
        .unwrap();
    let other = Client::connect(&config, &options).await.unwrap();
    (server, own, other)
}

fn read(start: &'static str) -> Read {
    Read {
        start: start.into(),
        end: Bytes::new(),
        limit: 0,
        revision: 0,
        serializable: false,
        part: Part::All,
    }
}

#[tokio::test]
async fn reads_are_the_same_with_either_client() {
    let (server, own, other) = start().await;
    let page = Read {
        end: "b".into(),
        limit: 256,
        ..read("a")
    };
    let pinned = Read {
        revision: 6,
        serializable: true,
        ..page.clone()
    };
    let keys = Read {
        part: Part::Keys,
        ..pinned.clone()
    };
    let count = Read {
        part: Part::Count,
        ..pinned.clone()
    };
    for read in [read("a"), page, pinned, keys, count] {
        let answers = [own.read(&read).await.unwrap(), other.read(&read).await.unwrap()];
        let (header, response) = &answers[0];
        assert_eq!((header.cluster_id, header.revision), (7, 42));
        assert_eq!(response.kvs[0].value, "vvv");
        assert_eq!(answers[0], answers[1]);
        let ranges = std::mem::take(&mut *server.ranges.lock().unwrap());
        assert_eq!(ranges, [RangeRequest::from(&read), RangeRequest::from(&read)]);
    }
}

#[tokio::test]
async fn errors_are_the_same_with_either_client() {
    let (_server, own, other) = start().await;
    for client in [own, other] {
        let error = async |start| client.read(&read(start)).await.unwrap_err();
        assert!(matches!(error("compacted").await, CallError::Compacted));
        assert!(matches!(error("future").await, CallError::Future));
        assert!(matches!(error("denied").await, CallError::Denied));
        assert!(matches!(
            error("large").await,
            CallError::TooLarge(MESSAGE_LEN_MAX)
        ));
        assert!(matches!(error("headless").await, CallError::NoHeader));
        assert!(matches!(error("silent").await, CallError::Timeout(_)));
        assert_eq!(
            error("gone").await.to_string(),
            "Unavailable: etcdserver: no leader"
        );
    }
}

#[tokio::test]
async fn a_transaction_holds_the_operations_and_nothing_else() {
    let (server, own, other) = start().await;
    let ops = [
        Op::Put {
            key: "a".into(),
            value: "1".into(),
        },
        Op::Delete { key: "b".into() },
    ];
    for client in [own, other] {
        assert_eq!(client.write(&ops).await.unwrap(), 42);
        assert!(matches!(client.write(&[]).await, Err(CallError::NoHeader)));
    }
    let op = |request| RequestOp {
        request: Some(request),
    };
    let put = PutRequest {
        key: "a".into(),
        value: "1".into(),
        ..Default::default()
    };
    let delete = DeleteRangeRequest {
        key: "b".into(),
        ..Default::default()
    };
    let txn = TxnRequest {
        success: vec![op(TxnOp::RequestPut(put)), op(TxnOp::RequestDeleteRange(delete))],
        ..Default::default()
    };
    let empty = TxnRequest::default();
    assert_eq!(
        *server.txns.lock().unwrap(),
        [txn.clone(), empty.clone(), txn, empty]
    );
}
