//! In which order clusters are asked for a service's backends: tiers and Cilium's affinity, resolved to a rank for each cluster.
//!
//! In: affinity, preference, names of clusters. Out: an [`Order`], asked for a rank by cluster ID.

use std::collections::BTreeMap;

use isthmus_model::{Affinity, ClusterName, MinHealthy, Preference, TierCluster, preference::TIERS_MAX};

/// Most ranks: named tiers, and the clusters that none names.
pub(crate) const RANKS_MAX: usize = TIERS_MAX + 1;

/// Rank 0 is asked first.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Order {
    /// Ascending by cluster.
    pub(super) named: Vec<(u16, u8)>,
    /// Rank of all others.
    pub(super) rest: u8,
    pub(crate) ranks: u8,
    pub(crate) min: MinHealthy,
    pub(crate) spill_over: bool,
    /// Terminating backends of the first rank keep the others out (Cilium's affinity remote).
    pub(crate) first_holds: bool,
}

impl Order {
    /// All clusters alike.
    pub(crate) const fn flat() -> Self {
        Self {
            named: Vec::new(),
            rest: 0,
            ranks: 1,
            min: MinHealthy::Count(1),
            spill_over: true,
            first_holds: false,
        }
    }

    /// `names`: of the clusters that are known by now. One that is not has no backends either.
    pub(crate) fn new(
        local: u16,
        affinity: Affinity,
        preference: &Preference,
        names: &BTreeMap<u16, ClusterName>,
    ) -> Self {
        let flat = Self {
            min: preference.min_healthy,
            spill_over: preference.spill_over,
            ..Self::flat()
        };
        let tiers = preference.tiers.list();
        if tiers.is_empty() {
            return match affinity {
                Affinity::None => flat,
                Affinity::Local => Self {
                    named: vec![(local, 0)],
                    rest: 1,
                    ranks: 2,
                    ..flat
                },
                Affinity::Remote => Self {
                    named: vec![(local, 1)],
                    ranks: 2,
                    first_holds: true,
                    ..flat
                },
            };
        }
        let mut named = BTreeMap::new();
        let mut rest = None;
        for (rank, tier) in (0u8..).zip(tiers) {
            for cluster in tier {
                match cluster {
                    TierCluster::Others => rest = Some(rank),
                    // By its keyword a cluster has the rank that the keyword has, whatever its name has.
                    TierCluster::Local => drop(named.insert(local, rank)),
                    TierCluster::Named(name) => {
                        for (id, _) in names.iter().filter(|(_, known)| *known == name) {
                            named.entry(*id).or_insert(rank);
                        }
                    }
                }
            }
        }
        let last = tiers.len() as u8;
        Self {
            named: named.into_iter().collect(),
            rest: rest.unwrap_or(last),
            ranks: if rest.is_some() { last } else { last + 1 },
            ..flat
        }
    }

    pub(crate) fn rank(&self, cluster: u16) -> u8 {
        match self.named.binary_search_by_key(&cluster, |(id, _)| *id) {
            Ok(at) => self.named[at].1,
            Err(_) => self.rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(affinity: Affinity, tiers: &str) -> Order {
        let names = [(1, "here"), (2, "us-east"), (3, "us-west"), (4, "ap")]
            .map(|(id, name)| (id, ClusterName::new(name).unwrap()))
            .into();
        let preference = Preference {
            tiers: tiers.parse().unwrap(),
            ..Preference::default()
        };
        Order::new(1, affinity, &preference, &names)
    }

    fn check(affinity: Affinity, tiers: &str, want: [u8; 4], ranks: u8) {
        let order = order(affinity, tiers);
        assert_eq!(
            [1, 2, 3, 4].map(|id| order.rank(id)),
            want,
            "{affinity:?} {tiers}"
        );
        assert_eq!(order.ranks, ranks, "{affinity:?} {tiers}");
    }

    #[test]
    fn affinity_is_a_special_case_and_tiers_replace_it() {
        check(Affinity::None, "", [0, 0, 0, 0], 1);
        check(Affinity::Local, "", [0, 1, 1, 1], 2);
        check(Affinity::Remote, "", [1, 0, 0, 0], 2);
        check(Affinity::Remote, "local, us-east|us-west, *", [0, 1, 1, 2], 3);
        check(Affinity::None, "us-east, *, local", [2, 0, 1, 1], 3);
    }

    #[test]
    fn who_is_not_named_comes_last() {
        check(Affinity::None, "us-east, gone", [2, 0, 2, 2], 3);
        check(Affinity::None, "local", [0, 1, 1, 1], 2);
        check(Affinity::None, "*", [0, 0, 0, 0], 1);
        check(Affinity::None, "here, us-east", [0, 1, 2, 2], 3);
    }
}
