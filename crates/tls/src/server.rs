//! The server's side: requires and verifies a client certificate, offers HTTP/2 only.

use std::{fmt, path::Path, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, UnixTime},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};

use crate::{
    ALPN_H2,
    files::{Reloading, TlsError, names, provider, read_certificates, read_key, read_roots},
    judge::{self, PeerRefusal},
};

/// Server configuration from three PEM files.
pub struct ServerTls(Reloading<ServerState>);

/// What the files held when they were last read: the configuration of handshakes, and the means to judge peers again.
pub struct ServerState {
    config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    certificate_last_second: Option<u64>,
    client_ca_last_second: Option<u64>,
}

impl fmt::Debug for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerState")
            .field("certificate_last_second", &self.certificate_last_second)
            .field("client_ca_last_second", &self.client_ca_last_second)
            .finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads `cert` (chain, leaf first), `key` and `client_ca` (bundle that client certificates must chain to).
    pub fn from_files(cert: &Path, key: &Path, client_ca: &Path) -> Result<Self, TlsError> {
        let (cert, key, client_ca) = (cert.to_owned(), key.to_owned(), client_ca.to_owned());
        let paths = vec![cert.clone(), key.clone(), client_ca.clone()];
        Reloading::new(paths, move || build(&cert, &key, &client_ca)).map(Self)
    }

    /// The configuration for the next handshake; follows changes of the files, of the client CA too. Sessions of an earlier
    /// configuration cannot be resumed, so that a withdrawn CA is out at once.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.current().config.clone()
    }

    /// What the files hold now, or the last good ones. Equal pointers are equal files.
    pub fn current(&self) -> Arc<ServerState> {
        self.0.current()
    }

    /// Why the files, as they were last looked at, are not what is used; `None` if they are.
    pub fn complaint(&self) -> Option<String> {
        self.0.complaint()
    }
}

impl ServerState {
    /// The configuration of handshakes.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.clone()
    }

    /// Whether a client with this chain, leaf first, would be let in at `now`.
    pub fn judge(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerRefusal> {
        judge::judge(self.verifier.as_ref(), chain, now)
    }

    /// The last second, Unix time, in which the server's own chain is valid.
    pub fn certificate_last_second(&self) -> Option<u64> {
        self.certificate_last_second
    }

    /// The last second, Unix time, in which every CA of the clients' bundle is valid.
    pub fn client_ca_last_second(&self) -> Option<u64> {
        self.client_ca_last_second
    }
}

fn build(cert: &Path, key: &Path, client_ca: &Path) -> Result<ServerState, TlsError> {
    let chain = read_certificates(cert)?;
    let roots: RootCertStore = read_roots(client_ca)?;
    let client_ca_last_second = judge::last_second(&read_certificates(client_ca)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| TlsError::Verifier {
            path: client_ca.to_owned(),
            why: error.to_string(),
        })?;
    let failed = |source| TlsError::Config {
        paths: names(&[cert, key]),
        source,
    };
    let certificate_last_second = judge::last_second(&chain);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(chain, read_key(key)?)
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // The provider lists AES-GCM first, for which processors have instructions.
    config.ignore_client_order = true;
    // Resumption without state here, for any number of clients. The key is this configuration's own.
    config.ticketer = ring::Ticketer::new().map_err(failed)?;
    Ok(ServerState {
        config: Arc::new(config),
        verifier,
        certificate_last_second,
        client_ca_last_second,
    })
}
