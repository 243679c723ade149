//! Connections: TCP and TLS to one of the endpoints, HTTP/2 with keep-alive.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use isthmus_tls::{ClientTls, TlsError};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::Channel;
use tower::service_fn;

use crate::{
    config::{Endpoint, EtcdConfig},
    pace::Pace,
};

/// Timeouts and limits of a connection.
#[derive(Clone, Debug)]
pub struct Options {
    /// TCP, TLS and HTTP/2 together.
    pub connect_timeout: Duration,
    /// One unary call.
    pub call_timeout: Duration,
    /// An HTTP/2 ping is sent after so much silence,
    pub keep_alive_interval: Duration,
    /// and the connection is given up after so much more without an answer. Together with the interval this bounds how long
    /// a server that stopped without closing its connections goes unnoticed.
    pub keep_alive_timeout: Duration,
    /// Largest message that is read, in bytes. A page that is larger is asked for in smaller parts.
    pub message_len_max: usize,
    /// Keys in a page.
    pub page_len: i64,
    /// Delay after the first failed connection; doubles with each more,
    pub retry_base: Duration,
    /// up to this.
    pub retry_cap: Duration,
    /// Updates that wait for a slow consumer; then reading stops.
    pub queue_len_max: usize,
    /// When connections may begin; shared by all that should not begin together.
    pub connects: Option<Pace>,
    /// When lists from their beginning may begin; of one upstream.
    pub lists: Option<Pace>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(30),
            keep_alive_interval: Duration::from_secs(15),
            keep_alive_timeout: Duration::from_secs(25),
            message_len_max: 64 * 1024 * 1024,
            page_len: 256,
            retry_base: Duration::from_millis(50),
            retry_cap: Duration::from_secs(30),
            queue_len_max: 64,
            connects: None,
            lists: None,
        }
    }
}

/// Why no endpoint could be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Certificates.
    #[error("TLS files for etcd are not usable")]
    Tls(#[from] TlsError),
    /// A host name that cannot be one.
    #[error("{0} is no valid endpoint")]
    Endpoint(Endpoint),
    /// Nothing there, or not trusted.
    #[error("cannot connect to {endpoint}: {cause}")]
    Transport {
        /// Which endpoint.
        endpoint: Endpoint,
        /// The innermost cause, which says more than "transport error".
        cause: String,
    },
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Connects to `endpoint`. TLS files are read for it, and again whenever the channel has to connect once more.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    config: &EtcdConfig,
    options: &Options,
) -> Result<Channel, ConnectError> {
    let invalid = || ConnectError::Endpoint(endpoint.clone());
    let tls = match (&config.trusted_ca_file, endpoint.tls) {
        (Some(ca), true) => {
            let identity = config
                .identity
                .as_ref()
                .map(|(cert, key)| (cert.as_path(), key.as_path()));
            let name = ServerName::try_from(endpoint.host.clone()).map_err(|_| invalid())?;
            Some((Arc::new(ClientTls::from_files(ca, identity)?), name))
        }
        // EtcdConfig rules out an https endpoint without a CA; a server that wants TLS refuses plain text.
        _ => None,
    };
    let uri: Uri = endpoint.to_string().parse().map_err(|_| invalid())?;
    let builder = Channel::builder(plain(&uri).ok_or_else(invalid)?)
        .origin(uri)
        .connect_timeout(options.connect_timeout)
        .http2_keep_alive_interval(options.keep_alive_interval)
        .keep_alive_timeout(options.keep_alive_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(8 * 1024 * 1024)
        .tcp_nodelay(true);
    let (target, aliases) = (endpoint.clone(), Arc::new(config.host_aliases.clone()));
    let connector = service_fn(move |_: Uri| {
        let (target, aliases, tls) = (target.clone(), aliases.clone(), tls.clone());
        async move {
            let tcp = dial(&target, &aliases).await?;
            tcp.set_nodelay(true)?;
            let stream: Box<dyn Io> = match tls {
                None => Box::new(tcp),
                Some((tls, name)) => Box::new(TlsConnector::from(tls.config()).connect(name, tcp).await?),
            };
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    // The channel's own timeout covers the connector; the handshake of HTTP/2 waits for nothing.
    let connecting = builder.connect_with_connector(connector);
    let failed = |cause| ConnectError::Transport {
        endpoint: endpoint.clone(),
        cause,
    };
    match tokio::time::timeout(options.connect_timeout, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(failed(innermost(&error))),
        Err(_) => Err(failed(format!("no answer within {:?}", options.connect_timeout))),
    }
}

/// The same address with the scheme `http`: TLS is our connector's affair, not the channel's.
fn plain(uri: &Uri) -> Option<Uri> {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTP);
    Uri::from_parts(parts).ok()
}

async fn dial(endpoint: &Endpoint, aliases: &BTreeMap<String, Vec<IpAddr>>) -> io::Result<TcpStream> {
    match aliases.get(&endpoint.host) {
        None => TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await,
        Some(ips) => {
            let addresses: Vec<SocketAddr> =
                ips.iter().map(|ip| SocketAddr::new(*ip, endpoint.port)).collect();
            TcpStream::connect(addresses.as_slice()).await
        }
    }
}

pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
