//! Why a call is refused, in etcd's words: clients recognise errors by their text.

use tonic::{Code, Status};

use crate::store::RangeError;

/// A call that changed nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// No key.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// The value or lease to keep is that of no key.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    /// A value beside `ignore_value`.
    #[error("etcdserver: value is provided")]
    ValueProvided,
    /// A lease beside `ignore_lease`.
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    /// More operations than [`OPS_MAX`](super::check::OPS_MAX).
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    /// A transaction that writes a key twice.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// More bytes than [`REQUEST_BYTES_MAX`](super::check::REQUEST_BYTES_MAX).
    #[error("etcdserver: request is too large")]
    TooLarge,
    /// A sort order or target that is none.
    #[error("etcdserver: invalid sort option")]
    InvalidSort,
    /// A revision that is gone.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// A revision that does not exist yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    Future,
    /// No such lease.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    /// The lease's ID is taken.
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    /// The store is at its quota.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// Longer than etcd allows.
    #[error("etcdserver: too large lease TTL")]
    LeaseTtl,
}

impl From<RangeError> for Refusal {
    fn from(error: RangeError) -> Self {
        match error {
            RangeError::Compacted => Self::Compacted,
            RangeError::Future => Self::Future,
            RangeError::TooLarge => Self::TooLarge,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::EmptyKey
            | Refusal::KeyNotFound
            | Refusal::ValueProvided
            | Refusal::LeaseProvided
            | Refusal::TooManyOps
            | Refusal::DuplicateKey
            | Refusal::TooLarge
            | Refusal::InvalidSort => Code::InvalidArgument,
            Refusal::Compacted | Refusal::Future | Refusal::LeaseTtl => Code::OutOfRange,
            Refusal::NoSpace => Code::ResourceExhausted,
            Refusal::LeaseNotFound => Code::NotFound,
            Refusal::LeaseExists => Code::FailedPrecondition,
        };
        Self::new(code, refusal.to_string())
    }
}
