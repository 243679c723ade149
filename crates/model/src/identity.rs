//! Security identity numbers: reserved ones, and how a number splits into cluster and local part.
//!
//! Source: Cilium's `pkg/identity/numericidentity.go`; 24 bits travel on the wire.

use std::{fmt, ops::RangeInclusive};

use crate::cluster::{ClusterId, MaxConnectedClusters};

/// A security identity's number.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NumericIdentity(pub u32);

impl NumericIdentity {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self(0);
    /// The node the reader runs on.
    pub const HOST: Self = Self(1);
    /// Anything outside the mesh.
    pub const WORLD: Self = Self(2);
    /// A local endpoint that Isthmus does not manage.
    pub const UNMANAGED: Self = Self(3);
    /// The health endpoint.
    pub const HEALTH: Self = Self(4);
    /// An endpoint whose identity is not known yet.
    pub const INIT: Self = Self(5);
    /// Another node of any cluster.
    pub const REMOTE_NODE: Self = Self(6);
    /// Highest number that is reserved in every cluster (reserved and user-reserved ones).
    pub const MAX_RESERVED: u32 = 255;

    /// The cluster that a number above [`Self::MAX_RESERVED`] belongs to; `None` for reserved and for node-local numbers.
    pub fn cluster(self, max: MaxConnectedClusters) -> Option<ClusterId> {
        if self.0 >> 24 != 0 {
            return None;
        }
        ClusterId::new(self.0 >> max.identity_shift(), max).ok()
    }

    /// Whether every cluster means the same by this number.
    pub const fn is_reserved(self) -> bool {
        self.0 <= Self::MAX_RESERVED
    }
}

impl fmt::Display for NumericIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The numbers that one cluster may allocate, both ends included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IdentityRange {
    first: u32,
    last: u32,
}

impl IdentityRange {
    /// The range of `cluster`: starts exactly at `id << shift`.
    pub const fn of(cluster: ClusterId, max: MaxConnectedClusters) -> Self {
        let shift = max.identity_shift();
        let first = (cluster.get() as u32) << shift;
        Self {
            first,
            last: first + (1 << shift) - 1,
        }
    }

    /// Whether `identity` lies in the range.
    pub const fn contains(self, identity: NumericIdentity) -> bool {
        identity.0 >= self.first && identity.0 <= self.last
    }

    /// The numbers, ascending.
    pub const fn numbers(self) -> RangeInclusive<u32> {
        self.first..=self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_clusters_agree_with_the_vectors() {
        let (c255, c511) = (MaxConnectedClusters::C255, MaxConnectedClusters::C511);
        let two = ClusterId::new(2, c255).unwrap();
        assert_eq!(IdentityRange::of(two, c255).numbers(), 131_072..=196_607);
        assert_eq!(IdentityRange::of(two, c511).numbers(), 65_536..=98_303);
        assert_eq!(
            NumericIdentity(131_082).cluster(c255).map(ClusterId::get),
            Some(2)
        );
        assert_eq!(
            NumericIdentity(131_082).cluster(c511).map(ClusterId::get),
            Some(4)
        );
        assert_eq!(NumericIdentity(6).cluster(c255), None);
        assert_eq!(NumericIdentity(0x0100_0001).cluster(c255), None);
    }
}
