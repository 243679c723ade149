//! etcd and the server in front of it, called with the same messages.

use std::{net::SocketAddr, sync::Arc};

use http::Uri;
use hyper_util::rt::TokioIo;
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse, WatchRequest, WatchResponse,
    kv_client::KvClient, lease_client::LeaseClient, response_op, watch_client::WatchClient,
    watch_request::RequestUnion,
};
use isthmus_tls::ClientTls;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::lab::{Apiserver, Etcd, Pki, config, eventually};

/// Two that are to answer alike.
pub struct Both {
    pub etcd: Etcd,
    pub pki: Pki,
    pub server: Apiserver,
    pub theirs: Channel,
    pub ours: Channel,
}

/// A connection with the certificate of `name`.
pub async fn channel(pki: &Pki, address: SocketAddr, name: &str) -> Channel {
    let (cert, key) = pki.issue(name);
    let tls = ClientTls::from_files(&pki.path("ca.crt"), Some((&cert, &key))).unwrap();
    let tls = Arc::new(tls);
    let connector = tower::service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let name = ServerName::try_from("localhost").unwrap();
            let stream = TlsConnector::from(tls.config()).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    // Connects at the first call, and again after each loss.
    Channel::from_static("http://localhost").connect_with_connector_lazy(connector)
}

impl Both {
    pub async fn start(name: &str) -> Self {
        let (etcd, pki) = (Etcd::start().await, Pki::new());
        let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
        server.ready().await;
        let url = format!("http://127.0.0.1:{}", etcd.port);
        Self {
            theirs: Channel::from_shared(url).unwrap().connect().await.unwrap(),
            ours: channel(&pki, server.address, name).await,
            etcd,
            pki,
            server,
        }
    }

    pub fn each(&self) -> [Channel; 2] {
        [self.theirs.clone(), self.ours.clone()]
    }

    /// Writes to etcd in one transaction, a deletion where there is no value, and waits until the server knows.
    pub async fn write(&self, ops: &[(&str, Option<&str>)]) -> i64 {
        let ops = ops.iter().map(|(key, value)| match value {
            Some(value) => etcd_client::TxnOp::put(*key, *value, None),
            None => etcd_client::TxnOp::delete(*key, None),
        });
        let txn = etcd_client::Txn::new().and_then(ops.collect::<Vec<_>>());
        let mut client = self.etcd.client().await.unwrap();
        let revision = client.txn(txn).await.unwrap().header().unwrap().revision();
        self.caught_up(revision).await;
        revision
    }

    pub async fn caught_up(&self, revision: i64) {
        eventually("the server has caught up", || async {
            let mut kv = KvClient::new(self.ours.clone());
            let request = RangeRequest {
                key: "cilium/state/none".into(),
                ..Default::default()
            };
            let header = kv.range(request).await.ok()?.into_inner().header?;
            (header.revision >= revision).then_some(())
        })
        .await;
    }

    pub async fn ranges(&self, request: &RangeRequest) -> [Result<RangeResponse, String>; 2] {
        let [theirs, ours] = self.each().map(|channel| async {
            let answer = KvClient::new(channel)
                .max_decoding_message_size(usize::MAX)
                .range(request.clone())
                .await;
            answer
                .map(|answer| plain_range(answer.into_inner()))
                .map_err(told)
        });
        [theirs.await, ours.await]
    }

    pub async fn txns(&self, request: &TxnRequest) -> [Result<TxnResponse, String>; 2] {
        let [theirs, ours] = self.each().map(|channel| async {
            let answer = KvClient::new(channel).txn(request.clone()).await;
            answer.map(|answer| plain_txn(answer.into_inner())).map_err(told)
        });
        [theirs.await, ours.await]
    }

    pub fn leases(&self) -> [LeaseClient<Channel>; 2] {
        self.each().map(LeaseClient::new)
    }

    pub fn sessions(&self) -> Sessions {
        let [theirs, ours] = self.each().map(Session::open);
        Sessions { theirs, ours }
    }
}

/// The words by which clients tell errors apart, and the code.
pub fn told(status: Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// A header without what differs between any two servers.
fn plain(header: &mut Option<ResponseHeader>) {
    let header = header.as_mut().expect("each answer has a header");
    *header = ResponseHeader {
        revision: header.revision,
        ..Default::default()
    };
}

fn plain_range(mut answer: RangeResponse) -> RangeResponse {
    plain(&mut answer.header);
    answer
}

fn plain_txn(mut answer: TxnResponse) -> TxnResponse {
    plain(&mut answer.header);
    for response in &mut answer.responses {
        match &mut response.response {
            Some(response_op::Response::ResponseRange(range)) => plain(&mut range.header),
            Some(response_op::Response::ResponseTxn(txn)) => *txn = plain_txn(std::mem::take(txn)),
            other => panic!("{other:?}"),
        }
    }
    answer
}

/// A stream of watches.
pub struct Session {
    requests: mpsc::Sender<WatchRequest>,
    /// etcd says nothing, not even that the call is there, before its first answer.
    opening: Option<JoinHandle<Result<Streaming<WatchResponse>, Status>>>,
    answers: Option<Streaming<WatchResponse>>,
}

impl Session {
    pub fn open(channel: Channel) -> Self {
        let (requests, receiver) = mpsc::channel(64);
        let mut client = WatchClient::new(channel).max_decoding_message_size(usize::MAX);
        let opening = async move {
            let answers = client.watch(ReceiverStream::new(receiver)).await?;
            Ok(answers.into_inner())
        };
        Self {
            requests,
            opening: Some(tokio::spawn(opening)),
            answers: None,
        }
    }

    /// The next answer, however long it takes.
    pub async fn answer(&mut self) -> Result<WatchResponse, Status> {
        if let Some(opening) = self.opening.take() {
            self.answers = Some(opening.await.unwrap()?);
        }
        let gone = || Status::unavailable("the stream has ended");
        let answers = self.answers.as_mut().ok_or_else(gone)?;
        answers.message().await?.ok_or_else(gone)
    }

    pub async fn send(&self, request: RequestUnion) {
        let request = WatchRequest {
            request_union: Some(request),
        };
        self.requests.send(request).await.unwrap();
    }

    /// The next answer as it came.
    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        let answer = tokio::time::timeout(std::time::Duration::from_secs(60), self.answer()).await;
        answer.expect("an answer comes")
    }

    /// The next answer without what differs between any two servers.
    async fn plain(&mut self) -> WatchResponse {
        let mut answer = self.next().await.unwrap();
        plain(&mut answer.header);
        answer
    }

    /// The next two answers, by their watches.
    pub async fn two(&mut self) -> [WatchResponse; 2] {
        let mut two = [self.plain().await, self.plain().await];
        two.sort_by_key(|answer| answer.watch_id);
        two
    }
}

/// One stream to each of the two.
pub struct Sessions {
    pub theirs: Session,
    pub ours: Session,
}

impl Sessions {
    pub async fn send(&self, request: RequestUnion) {
        self.theirs.send(request.clone()).await;
        self.ours.send(request).await;
    }

    /// The next answer, which is the same from both.
    pub async fn agree(&mut self, what: &str) -> WatchResponse {
        let want = self.theirs.plain().await;
        assert_eq!(self.ours.plain().await, want, "{what}");
        want
    }

    /// Sends to both and gets the same answer.
    pub async fn ask(&mut self, what: &str, request: RequestUnion) -> WatchResponse {
        self.send(request).await;
        self.agree(what).await
    }
}
