//! Which clusters' backends a service prefers, and how much a cluster must be able to carry: ordered tiers, a minimum of healthy
//! backends, spill-over, slow start.
//!
//! In: texts of annotations. Out: values whose constructors have checked them, and the same texts again, for the wire.
//!
//! Cilium's affinity is the special case of two tiers (`local, *` or `*, local`) and a minimum of one backend; where tiers are
//! given they replace it.

use std::{fmt, str::FromStr};

use crate::ClusterName;

/// Most tiers that a service can name.
pub const TIERS_MAX: usize = 8;
/// Most clusters in one tier: no mesh has more.
const TIER_CLUSTERS_MAX: usize = 511;
/// Longest text of tiers that is read.
const TIERS_LEN_MAX: usize = 4096;

/// A cluster, or several, in a tier.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum TierCluster {
    /// The cluster that the frontend is in: `local`.
    Local,
    /// The cluster of this name.
    Named(ClusterName),
    /// Every cluster that no tier names: `*`.
    Others,
}

impl fmt::Display for TierCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Named(name) => name.fmt(f),
            Self::Others => f.write_str("*"),
        }
    }
}

/// Clusters in the order in which they are asked, as `local, us-east|us-west, *`: `,` between tiers, `|` within one. Clusters that
/// no tier names come last.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Tiers(Vec<Vec<TierCluster>>);

/// A text that says no tiers.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TiersError {
    /// Too many, or too long.
    #[error("tiers are at most {TIERS_MAX}, in at most {TIERS_LEN_MAX} characters")]
    TooMany,
    /// A part that names no cluster.
    #[error("{0:?} is no cluster: a tier has names of clusters, local or *, with | between them")]
    Cluster(String),
    /// One cluster in two places.
    #[error("{0} is named twice")]
    Twice(String),
}

impl Tiers {
    /// The tiers, in order; none if the service names none.
    pub fn list(&self) -> &[Vec<TierCluster>] {
        &self.0
    }

    /// Whether no tier is named.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for Tiers {
    type Err = TiersError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        if text.len() > TIERS_LEN_MAX || text.split(',').count() > TIERS_MAX {
            return Err(TiersError::TooMany);
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut tiers = Vec::new();
        for tier in text.split(',') {
            let mut clusters = Vec::new();
            for part in tier.split('|').map(str::trim) {
                let cluster = match part {
                    "local" => TierCluster::Local,
                    "*" => TierCluster::Others,
                    name => TierCluster::Named(
                        ClusterName::new(name)
                            .map_err(|_| TiersError::Cluster(name.chars().take(64).collect()))?,
                    ),
                };
                if !seen.insert(cluster.clone()) {
                    return Err(TiersError::Twice(cluster.to_string()));
                }
                clusters.push(cluster);
            }
            if clusters.len() > TIER_CLUSTERS_MAX {
                return Err(TiersError::TooMany);
            }
            tiers.push(clusters);
        }
        Ok(Self(tiers))
    }
}

impl fmt::Display for Tiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, tier) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str(",")?;
            }
            for (number, cluster) in tier.iter().enumerate() {
                if number > 0 {
                    f.write_str("|")?;
                }
                cluster.fmt(f)?;
            }
        }
        Ok(())
    }
}

/// How much of a tier must be healthy before it carries all traffic.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum MinHealthy {
    /// So many backends.
    Count(u16),
    /// So many hundredths of its capacity: of the weights of all backends that it is meant to have.
    Percent(u8),
}

impl Default for MinHealthy {
    fn default() -> Self {
        Self::Count(1)
    }
}

impl fmt::Display for MinHealthy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A text that says no minimum.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is neither a number from 1 to 65535 nor a percentage from 1% to 100%")]
pub struct MinHealthyError(String);

impl FromStr for MinHealthy {
    type Err = MinHealthyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MinHealthyError(text.chars().take(32).collect());
        match text.strip_suffix('%') {
            Some(percent) => match percent.parse() {
                Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
                _ => Err(error()),
            },
            None => match text.parse() {
                Ok(count @ 1..) => Ok(Self::Count(count)),
                _ => Err(error()),
            },
        }
    }
}

/// What a service prefers beside its affinity.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Preference {
    /// Order of clusters. Without, the affinity says it.
    pub tiers: Tiers,
    /// When a tier carries all.
    pub min_healthy: MinHealthy,
    /// A tier below its minimum keeps the share of the traffic that its capacity is fit for, and the next one gets the rest.
    /// Otherwise it gets nothing as long as a later one has its minimum.
    pub spill_over: bool,
    /// Seconds in which a backend that became ready gets more and more, up to its share. 0: at once.
    pub slow_start_seconds: u16,
}

impl Default for Preference {
    fn default() -> Self {
        Self {
            tiers: Tiers::default(),
            min_healthy: MinHealthy::default(),
            spill_over: true,
            slow_start_seconds: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_read_and_written() {
        let check = |text: &str, want: &str| {
            let tiers: Tiers = text.parse().unwrap();
            assert_eq!(tiers.to_string(), want);
            assert_eq!(want.parse::<Tiers>().unwrap(), tiers);
        };
        check("", "");
        check("local", "local");
        check("local, us-east | us-west , *", "local,us-east|us-west,*");
        check("c1,c2,c3,c4,c5,c6,c7,*", "c1,c2,c3,c4,c5,c6,c7,*");
    }

    #[test]
    fn what_is_no_list_of_tiers_is_refused() {
        for text in [",", "local,", "a||b", "UP", "a b", "*,*", "local|local", "a,b|a"] {
            assert!(text.parse::<Tiers>().is_err(), "{text}");
        }
        assert_eq!("1,2,3,4,5,6,7,8,9".parse::<Tiers>(), Err(TiersError::TooMany));
        assert_eq!("a|".repeat(3000).parse::<Tiers>(), Err(TiersError::TooMany));
    }

    #[test]
    fn a_minimum_is_a_number_or_a_percentage() {
        for text in ["1", "65535", "1%", "100%"] {
            assert_eq!(text.parse::<MinHealthy>().unwrap().to_string(), text);
        }
        for text in ["0", "65536", "0%", "101%", "-1", "", "%", "half"] {
            assert!(text.parse::<MinHealthy>().is_err(), "{text}");
        }
    }
}
