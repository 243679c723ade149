//! The name in a peer's certificate: the common name of the leaf, as etcd takes it.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest common name (X.520's upper bound).
const NAME_LEN_MAX: usize = 64;

/// Why a verified certificate gives no name.
#[derive(Debug, thiserror::Error)]
pub enum PeerNameError {
    /// No certificate at all.
    #[error("the peer showed no certificate")]
    Absent,
    /// It does not parse.
    #[error("the peer's certificate does not parse: {0}")]
    Malformed(String),
    /// Its subject has no usable common name.
    #[error("the peer's certificate has no common name of 1 to {NAME_LEN_MAX} bytes of text")]
    NoName,
    /// Its subject has several: which of them was meant is anybody's guess.
    #[error("the peer's certificate has more than one common name")]
    Ambiguous,
}

/// The common name of the leaf of `chain`, which the handshake has verified.
pub fn peer_common_name(chain: &[CertificateDer<'_>]) -> Result<String, PeerNameError> {
    let leaf = chain.first().ok_or(PeerNameError::Absent)?;
    let (_, certificate) =
        X509Certificate::from_der(leaf).map_err(|error| PeerNameError::Malformed(error.to_string()))?;
    let mut names = certificate.subject().iter_common_name();
    let name = names
        .next()
        .and_then(|name| name.as_str().ok())
        .filter(|name| (1..=NAME_LEN_MAX).contains(&name.len()))
        .ok_or(PeerNameError::NoName)?
        .to_owned();
    if names.next().is_some() {
        return Err(PeerNameError::Ambiguous);
    }
    Ok(name)
}
