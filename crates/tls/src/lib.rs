//! Mutual TLS between clusters: rustls with the ring provider, certificates read anew when their files change, and what a
//! peer may read by its certificate's common name.
//!
//! In: PEM files, peer certificates. Out: rustls configurations, names, and the pure decision of [`rights`].
//! Invariants: the provider is named at every use and no process-wide default is relied on; a server configuration always
//! requires a client certificate; files that do not load never replace ones that did, and the complaint about them can be read.

pub mod client;
pub mod files;
pub mod judge;
pub mod peer;
pub mod rights;
pub mod server;

pub use client::ClientTls;
pub use files::TlsError;
pub use judge::PeerRefusal;
pub use peer::{PeerNameError, peer_common_name};
pub use rights::Rights;
pub use server::{ServerState, ServerTls};

/// HTTP/2, the only protocol that gRPC speaks. Go's gRPC client gives up unless the server selects it.
pub const ALPN_H2: &[u8] = b"h2";
