//! etcd's errors. Clients recognise them by their text, so the texts are part of the protocol.

use tonic::Status;

use crate::store::RangeError;

/// Text of a denied call; a denied watch carries it in its cancel reason.
pub const PERMISSION_DENIED: &str = "etcdserver: permission denied";

/// A write, or a read outside the peer's ranges.
pub fn permission_denied() -> Status {
    Status::permission_denied(PERMISSION_DENIED)
}

/// A range without a key.
pub fn empty_key() -> Status {
    Status::invalid_argument("etcdserver: key is not provided")
}

/// A sort order or target that is none.
pub fn invalid_sort() -> Status {
    Status::invalid_argument("etcdserver: invalid sort option")
}

/// The own cluster's state is not known yet.
pub fn no_leader() -> Status {
    Status::unavailable("etcdserver: no leader")
}

/// A remote cluster that was not read in full yet. Concerns these keys only, so it is no reason to connect elsewhere.
pub fn incomplete() -> Status {
    Status::failed_precondition("the remote cluster was not read in full yet since this server's start")
}

/// This process ends. Clients resume their watches elsewhere from their own revisions.
pub fn stopped() -> Status {
    Status::unavailable("etcdserver: server stopped")
}

/// Password authentication; makes etcd's client drop a configured password.
pub fn no_authentication() -> Status {
    Status::failed_precondition("etcdserver: authentication is not enabled")
}

/// A limit of this server is reached.
pub const TOO_MANY_REQUESTS: &str = "etcdserver: too many requests";

/// Too much was asked for lately, by this client or by all.
pub fn too_many_requests() -> Status {
    Status::resource_exhausted(TOO_MANY_REQUESTS)
}

/// An answer that no reader should ask for in one piece.
pub fn answer_too_large(bytes: usize, limit: usize, page: usize) -> Status {
    Status::resource_exhausted(format!(
        "etcdserver: the answer has {bytes} bytes and this server sends at most {limit} unless they are at most {page} keys; list in pages, with a limit"
    ))
}

/// An answer of another kind than its question's would be.
pub fn mismatch() -> Status {
    Status::internal("the answer is none to this call")
}

/// A range that is not answered.
pub fn range(error: RangeError) -> Status {
    match error {
        RangeError::Compacted | RangeError::Future => Status::out_of_range(error.to_string()),
        RangeError::TooLarge => Status::invalid_argument(error.to_string()),
    }
}
