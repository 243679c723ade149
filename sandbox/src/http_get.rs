//! One HTTP GET over one connection, made in any network namespace: probes and readiness checks.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::Empty;
use hyper_util::rt::TokioIo;

use crate::netns;

/// What to get, from where.
#[derive(Clone, Debug)]
pub struct Get {
    /// The namespace that the connection is made from; `None` is the machine's own.
    pub netns: Option<PathBuf>,
    /// The server.
    pub address: SocketAddr,
    /// The path, with a leading slash.
    pub path: String,
    /// Headers beside `Host`.
    pub headers: Vec<(String, String)>,
}

/// The status code of the answer; its body is not read.
pub async fn status(get: Get, timeout: Duration) -> io::Result<u16> {
    let exchange = async {
        let stream = netns::connect(get.netns, get.address, timeout).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let mut request = http::Request::get(&get.path).header(http::header::USER_AGENT, "kube-probe/1.33");
        if !get
            .headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("host"))
        {
            request = request.header(http::header::HOST, get.address.to_string());
        }
        for (name, value) in &get.headers {
            request = request.header(name, value);
        }
        let request = request
            .body(Empty::<bytes::Bytes>::new())
            .map_err(io::Error::other)?;
        // Drives the connection; it ends when the sender is dropped.
        tokio::spawn(connection);
        let answer = sender.send_request(request).await.map_err(io::Error::other)?;
        Ok(answer.status().as_u16())
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
