//! The client's side: verifies the server by a CA bundle and its name, shows its own certificate if it has one.

use std::{path::Path, sync::Arc};

use rustls::ClientConfig;

use crate::{
    ALPN_H2,
    files::{Reloading, TlsError, names, provider, read_certificates, read_key, read_roots},
};

/// Client configuration from PEM files.
pub struct ClientTls(Reloading<ClientConfig>);

impl ClientTls {
    /// Reads the `ca` bundle and, if given, the pair of certificate and key.
    pub fn from_files(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        let ca = ca.to_owned();
        let identity = identity.map(|(cert, key)| (cert.to_owned(), key.to_owned()));
        let mut paths = vec![ca.clone()];
        if let Some((cert, key)) = &identity {
            paths.extend([cert.clone(), key.clone()]);
        }
        Reloading::new(paths, move || {
            let identity = identity
                .as_ref()
                .map(|(cert, key)| (cert.as_path(), key.as_path()));
            build(&ca, identity)
        })
        .map(Self)
    }

    /// The configuration for the next handshake; follows changes of the files.
    pub fn config(&self) -> Arc<ClientConfig> {
        self.0.current()
    }
}

fn build(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<ClientConfig, TlsError> {
    let paths = || match identity {
        Some((cert, key)) => names(&[ca, cert, key]),
        None => names(&[ca]),
    };
    let failed = |source| TlsError::Config {
        paths: paths(),
        source,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_root_certificates(read_roots(ca)?);
    let mut config = match identity {
        Some((cert, key)) => builder
            .with_client_auth_cert(read_certificates(cert)?, read_key(key)?)
            .map_err(failed)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(config)
}
