//! A client that can behave badly: HTTP/2 frames over TLS, with windows, resets and session resumption in the test's hands.

use std::{net::SocketAddr, path::Path, sync::Arc};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream, client};
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use prost::Message;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpSocket, task::JoinHandle};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::lab::Pki;

pub type Tls = TlsStream<tokio::net::TcpStream>;

/// How a client connects.
#[derive(Clone)]
pub struct Dial {
    /// Sessions are resumed by whoever shares this.
    pub tls: Arc<ClientConfig>,
    /// Address of loopback to come from.
    pub from: &'static str,
    /// Bytes of a stream, and of the connection, that may come before they are read.
    pub windows: (u32, u32),
}

fn config(ca: &Path, identity: Option<(&Path, &Path)>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(ca).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = CertificateDer::pem_file_iter(cert).unwrap().map(Result::unwrap);
            let key = PrivateKeyDer::from_pem_file(key).unwrap();
            builder.with_client_auth_cert(chain.collect(), key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

impl Dial {
    /// As `name`, whose certificate `pki` has issued or issues now.
    pub fn new(pki: &Pki, name: &str) -> Self {
        let (cert, key) = pki.issue(name);
        Self::with(&pki.path("ca.crt"), Some((&cert, &key)))
    }

    /// With these files.
    pub fn with(ca: &Path, identity: Option<(&Path, &Path)>) -> Self {
        Self {
            tls: config(ca, identity),
            from: "127.0.0.1",
            windows: (1 << 20, 1 << 20),
        }
    }

    pub fn from(mut self, from: &'static str) -> Self {
        self.from = from;
        self
    }

    pub fn windows(mut self, stream: u32, connection: u32) -> Self {
        self.windows = (stream, connection);
        self
    }

    /// TCP and TLS; nothing is said yet.
    pub async fn shake(&self, address: SocketAddr) -> anyhow::Result<Tls> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(self.from.parse()?, 0))?;
        let tcp = socket.connect(address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("localhost")?;
        Ok(TlsConnector::from(self.tls.clone()).connect(name, tcp).await?)
    }

    pub async fn open(&self, address: SocketAddr) -> anyhow::Result<Raw> {
        let tls = self.shake(address).await?;
        let resumed = tls.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
        let (send, connection) = client::Builder::new()
            .initial_window_size(self.windows.0)
            .initial_connection_window_size(self.windows.1)
            .initial_max_send_streams(4096)
            .max_concurrent_reset_streams(100_000)
            .handshake(tls)
            .await?;
        Ok(Raw {
            send,
            resumed,
            connection: tokio::spawn(connection),
        })
    }
}

/// A connection. It ends with the value.
pub struct Raw {
    pub send: client::SendRequest<Bytes>,
    pub resumed: bool,
    /// Ends with the connection.
    pub connection: JoinHandle<Result<(), h2::Error>>,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub fn framed(message: &impl Message) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend((message.encoded_len() as u32).to_be_bytes());
    message.encode(&mut bytes).unwrap();
    bytes.into()
}

pub fn watch_request(prefix: &str, start_revision: i64) -> WatchRequest {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: prefix.as_bytes().to_vec().into(),
            range_end: end.into(),
            start_revision,
            ..Default::default()
        })),
    }
}

pub fn range_request(prefix: &str) -> RangeRequest {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    RangeRequest {
        key: prefix.as_bytes().to_vec().into(),
        range_end: end.into(),
        ..Default::default()
    }
}

impl Raw {
    /// Another one that calls over the same connection.
    pub fn share(&self) -> Self {
        Self {
            send: self.send.clone(),
            resumed: self.resumed,
            connection: tokio::spawn(async { Ok(()) }),
        }
    }

    /// Sends the head of a call and its first message; the answer is not waited for.
    pub async fn begin(
        &mut self,
        path: &str,
        request: &impl Message,
        last: bool,
    ) -> anyhow::Result<(client::ResponseFuture, SendStream<Bytes>)> {
        let head = http::Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut requests) = self.send.clone().ready().await?.send_request(head, false)?;
        requests.send_data(framed(request), last)?;
        Ok((response, requests))
    }

    /// Opens a watch of `prefix` in a stream of its own, and waits until it is made.
    pub async fn watch(&mut self, prefix: &str, start_revision: i64) -> anyhow::Result<Answers> {
        let request = watch_request(prefix, start_revision);
        let (response, requests) = self.begin("/etcdserverpb.Watch/Watch", &request, false).await?;
        let mut answers = Answers {
            requests: Some(requests),
            body: response.await?.into_body(),
            buffer: Vec::new(),
        };
        let created: WatchResponse = answers.next().await?;
        anyhow::ensure!(created.created && !created.canceled, "{created:?}");
        Ok(answers)
    }

    /// Lists `prefix` in one answer. An error is the gRPC status' text.
    pub async fn list(&mut self, prefix: &str) -> anyhow::Result<RangeResponse> {
        let (response, requests) = self
            .begin("/etcdserverpb.KV/Range", &range_request(prefix), true)
            .await?;
        let response = response.await?;
        if let Some(status) = tonic::Status::from_header_map(response.headers()) {
            anyhow::bail!("{}", status.message());
        }
        let mut answers = Answers {
            requests: Some(requests),
            body: response.into_body(),
            buffer: Vec::new(),
        };
        answers.next().await
    }
}

/// Answers of a call.
pub struct Answers {
    /// The stream ends when this is dropped.
    requests: Option<SendStream<Bytes>>,
    body: RecvStream,
    buffer: Vec<u8>,
}

impl Answers {
    /// The two directions of a stream apart.
    pub fn split(mut self) -> (SendStream<Bytes>, Self) {
        (self.requests.take().unwrap(), self)
    }

    /// The next message. When the stream has ended, an error with its trailers.
    pub async fn next<M: Message + Default>(&mut self) -> anyhow::Result<M> {
        loop {
            if let Some((prefix, rest)) = self.buffer.split_at_checked(5) {
                let len = (&prefix[1..]).get_u32() as usize;
                if let Some(message) = rest.get(..len) {
                    let message = M::decode(message)?;
                    self.buffer.drain(..5 + len);
                    return Ok(message);
                }
            }
            let Some(data) = self.body.data().await else {
                anyhow::bail!("ended: {:?}", self.body.trailers().await?);
            };
            let data = data?;
            self.body.flow_control().release_capacity(data.len())?;
            self.buffer.extend_from_slice(&data);
        }
    }

    /// Revisions of the events of a watch, until the one of `end`.
    pub async fn revisions(&mut self, end: i64) -> anyhow::Result<Vec<i64>> {
        let mut seen = vec![];
        while seen.last().is_none_or(|last| *last < end) {
            let response: WatchResponse = self.next().await?;
            anyhow::ensure!(!response.canceled, "{response:?}");
            let kvs = response.events.iter().filter_map(|event| event.kv.as_ref());
            seen.extend(kvs.map(|kv| kv.mod_revision));
        }
        Ok(seen)
    }
}
