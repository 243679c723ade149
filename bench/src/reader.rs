//! A gRPC reader that costs little beside the server which it measures: HTTP/2 and TLS, and messages out of frames.

use std::{net::SocketAddr, sync::Arc, task::Poll};

use anyhow::{Context, Result, bail, ensure};
use h2::{RecvStream, SendStream, client};
use hyper::{
    Request,
    body::{Buf, Bytes},
};
use prost::Message;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

/// Bytes that a server may send before they are read.
const WINDOW: u32 = 1024 * 1024;

/// A connection of its own.
pub struct Connection(client::SendRequest<Bytes>);

impl Connection {
    /// Connects.
    pub async fn open(config: Arc<ClientConfig>, address: SocketAddr) -> Result<Self> {
        let tcp = TcpStream::connect(address).await.context("connect")?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("localhost")?;
        let tls = TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .context("TLS handshake")?;
        let (send, connection) = client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .handshake(tls)
            .await?;
        tokio::spawn(connection);
        Ok(Self(send))
    }

    /// Sends a request and does not wait for an answer.
    pub async fn begin(
        &mut self,
        path: &str,
        request: &impl Message,
        last: bool,
    ) -> Result<(client::ResponseFuture, SendStream<Bytes>)> {
        let head = Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut requests) = self.0.clone().ready().await?.send_request(head, false)?;
        requests.send_data(framed(request)?, last)?;
        Ok((response, requests))
    }

    /// Sends a request; `last` if no other follows in its stream.
    pub async fn call(&mut self, path: &str, request: &impl Message, last: bool) -> Result<Responses> {
        let (response, requests) = self.begin(path, request, last).await?;
        let response = response.await.with_context(|| path.to_owned())?;
        let status = response.status();
        ensure!(status.is_success(), "{path} is answered {status}");
        Ok(Responses {
            requests,
            body: response.into_body(),
            buffer: Vec::new(),
        })
    }
}

fn framed(request: &impl Message) -> Result<Bytes> {
    let mut message = vec![0];
    message.extend((request.encoded_len() as u32).to_be_bytes());
    request.encode(&mut message)?;
    Ok(message.into())
}

/// Responses of a call.
pub struct Responses {
    // The stream ends when this is dropped.
    requests: SendStream<Bytes>,
    body: RecvStream,
    buffer: Vec<u8>,
}

impl Responses {
    /// Sends one more request, as soon as the server takes it.
    pub async fn send(&mut self, request: &impl Message) -> Result<()> {
        let message = framed(request)?;
        self.requests.reserve_capacity(message.len());
        while self.requests.capacity() < message.len() {
            let room = std::future::poll_fn(|cx| self.requests.poll_capacity(cx)).await;
            room.context("the stream ended")??;
        }
        Ok(self.requests.send_data(message, false)?)
    }

    /// Takes the bytes that are there.
    pub async fn receive_ready(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| {
            while let Poll::Ready(data) = self.body.poll_data(cx) {
                let data = data.context("the stream ended")??;
                self.body.flow_control().release_capacity(data.len())?;
                self.buffer.extend_from_slice(&data);
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Waits for more bytes.
    pub async fn receive(&mut self) -> Result<()> {
        let Some(data) = self.body.data().await else {
            let trailers = self.body.trailers().await?;
            bail!("the stream ended: {trailers:?}");
        };
        let data = data?;
        self.body.flow_control().release_capacity(data.len())?;
        self.buffer.extend_from_slice(&data);
        Ok(())
    }

    /// The next response, if it is complete.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>> {
        let Some((prefix, rest)) = self.buffer.split_at_checked(5) else {
            return Ok(None);
        };
        let len = (&prefix[1..]).get_u32() as usize;
        let Some(message) = rest.get(..len) else {
            return Ok(None);
        };
        let response = M::decode(message)?;
        self.buffer.drain(..5 + len);
        Ok(Some(response))
    }

    /// Waits for the next response.
    pub async fn next<M: Message + Default>(&mut self) -> Result<M> {
        loop {
            if let Some(response) = self.take()? {
                return Ok(response);
            }
            self.receive().await?;
        }
    }
}
