//! Whether a peer's certificate is still good, and for how long. Pure: the time is an argument.
//!
//! In: the chain that a peer has shown, the CA bundle's verifier, the time. Out: a verdict whose reason is one of a few words.
//! A handshake verifies its peer once. A connection that lives on, and a session that is resumed, are judged here again: rustls
//! keeps the chain of a resumed session and does not look at it.

use std::time::Duration;

use rustls::{
    CertificateError, Error,
    pki_types::{CertificateDer, UnixTime},
    server::danger::ClientCertVerifier,
};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Why a peer is not let in, or not any longer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PeerRefusal {
    /// It showed no certificate.
    #[error("the peer showed no certificate")]
    Absent,
    /// Too late.
    #[error("the peer's certificate has expired")]
    Expired,
    /// Too early, or one of the clocks is wrong.
    #[error("the peer's certificate is not valid yet")]
    NotYetValid,
    /// Its issuer is not, or no longer, in the CA bundle.
    #[error("the peer's certificate chains to no CA of the bundle")]
    UnknownCa,
    /// Something else is wrong with it.
    #[error("the peer's certificate cannot be used")]
    Bad,
    /// The peer gave up on our certificate.
    #[error("the peer does not accept this server's certificate")]
    RefusedUs,
    /// What it sent is no TLS that we speak.
    #[error("the peer does not speak TLS as this server does")]
    Protocol,
}

impl PeerRefusal {
    /// A word for metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Absent => "no_certificate",
            Self::Expired => "certificate_expired",
            Self::NotYetValid => "certificate_not_yet_valid",
            Self::UnknownCa => "unknown_ca",
            Self::Bad => "bad_certificate",
            Self::RefusedUs => "server_certificate_refused",
            Self::Protocol => "protocol",
        }
    }

    /// What an error of the TLS library says about the peer.
    pub fn of(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::Absent,
            Error::InvalidCertificate(certificate) => match certificate {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                // A CA that was made anew under its old name fails by signature.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownCa,
                _ => Self::Bad,
            },
            Error::AlertReceived(_) => Self::RefusedUs,
            _ => Self::Protocol,
        }
    }

    /// What a failed handshake says about the peer; `None` if it is about the network.
    pub fn of_handshake(error: &std::io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref::<Error>().map(Self::of)
    }
}

/// Verifies `chain`, leaf first, as a handshake at `now` would.
pub fn judge(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), PeerRefusal> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerRefusal::Absent)?;
    verifier
        .verify_client_cert(leaf, intermediates, now)
        .map(|_| ())
        .map_err(|error| PeerRefusal::of(&error))
}

/// The first time after `now` at which a certificate of `chain` is no longer valid: the verdict may then be another one.
/// `None` if that never comes. (A certificate is valid up to and including its last second.)
pub fn next_expiry(chain: &[CertificateDer<'_>], now: UnixTime) -> Option<UnixTime> {
    let ends = chain.iter().filter_map(|certificate| not_after(certificate));
    ends.map(|last| last.saturating_add(1))
        .filter(|end| *end > now.as_secs())
        .min()
        .map(|end| UnixTime::since_unix_epoch(Duration::from_secs(end)))
}

/// The last second in which all of `certificates` are valid, Unix time. `None` if none of them can be read.
pub(crate) fn last_second(certificates: &[CertificateDer<'_>]) -> Option<u64> {
    certificates
        .iter()
        .filter_map(|certificate| not_after(certificate))
        .min()
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<u64> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    u64::try_from(certificate.validity().not_after.timestamp()).ok()
}
