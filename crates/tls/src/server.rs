//! The server's side: requires and verifies a client certificate, offers HTTP/2 only.

use std::{path::Path, sync::Arc};

use rustls::{ServerConfig, crypto::ring, server::WebPkiClientVerifier};

use crate::{
    ALPN_H2,
    files::{Reloading, TlsError, names, provider, read_certificates, read_key, read_roots},
};

/// Server configuration from three PEM files.
pub struct ServerTls(Reloading<ServerConfig>);

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
        self.0.current()
    }
}

fn build(cert: &Path, key: &Path, client_ca: &Path) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(read_roots(client_ca)?), provider())
        .build()
        .map_err(|error| TlsError::Verifier {
            path: client_ca.to_owned(),
            why: error.to_string(),
        })?;
    let failed = |source| TlsError::Config {
        paths: names(&[cert, key]),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(read_certificates(cert)?, read_key(key)?)
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // The provider lists AES-GCM first, for which processors have instructions.
    config.ignore_client_order = true;
    // Resumption without state here, for any number of clients. The key is this configuration's own.
    config.ticketer = ring::Ticketer::new().map_err(failed)?;
    Ok(config)
}
