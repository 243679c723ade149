//! Which of a frontend's backends take traffic: the affinity rules, as one function of six counts.
//!
//! Rules: Cilium's `pkg/clustermesh/loadbalancer/selectbackends.go`. Beside them: backends of a cluster that does not
//! answer are the last resort, and terminating ones serve when no active one is left among those selected.

use isthmus_model::Affinity;

/// What a backend is good for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Class {
    /// Ready, not terminating, of a weight above 0.
    Active,
    /// Terminating and still serving.
    Terminating,
    /// Neither.
    Unusable,
}

/// Backends that are alike to the selection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tier {
    LocalActive,
    LocalTerminating,
    RemoteActive,
    RemoteTerminating,
    QuarantinedActive,
    QuarantinedTerminating,
}

impl Tier {
    /// `quarantined`: the cluster does not answer; never true for the local one.
    pub(crate) const fn of(local: bool, quarantined: bool, class: Class) -> Option<Self> {
        Some(match (local, quarantined, class) {
            (_, _, Class::Unusable) => return None,
            (true, _, Class::Active) => Self::LocalActive,
            (true, _, Class::Terminating) => Self::LocalTerminating,
            (false, false, Class::Active) => Self::RemoteActive,
            (false, false, Class::Terminating) => Self::RemoteTerminating,
            (false, true, Class::Active) => Self::QuarantinedActive,
            (false, true, Class::Terminating) => Self::QuarantinedTerminating,
        })
    }
}

/// How many backends each tier has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counts([u32; 6]);

impl Counts {
    pub(crate) const fn new() -> Self {
        Self([0; 6])
    }

    pub(crate) fn add(&mut self, tier: Option<Tier>) {
        if let Some(tier) = tier {
            self.0[tier as usize] += 1;
        }
    }

    pub(crate) fn remove(&mut self, tier: Option<Tier>) {
        if let Some(tier) = tier {
            self.0[tier as usize] -= 1;
        }
    }

    pub(crate) const fn has(&self, tier: Tier) -> bool {
        self.0[tier as usize] > 0
    }
}

/// Tiers whose backends take traffic.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct TierSet(u8);

impl TierSet {
    pub(crate) const EMPTY: Self = Self(0);

    const fn of(tiers: [Tier; 2], wanted: [bool; 2]) -> Self {
        Self((wanted[0] as u8) << tiers[0] as u8 | (wanted[1] as u8) << tiers[1] as u8)
    }

    pub(crate) const fn contains(self, tier: Tier) -> bool {
        self.0 & (1 << tier as u8) != 0
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Decides. Empty only if every count is 0.
pub(crate) const fn select(affinity: Affinity, counts: &Counts) -> TierSet {
    use Tier::{
        LocalActive, LocalTerminating, QuarantinedActive, QuarantinedTerminating, RemoteActive,
        RemoteTerminating,
    };
    let local = counts.has(LocalActive) || counts.has(LocalTerminating);
    let remote = counts.has(RemoteActive) || counts.has(RemoteTerminating);
    let scope = match affinity {
        Affinity::None => [local, remote],
        // Terminating local backends do not keep remote ones out.
        Affinity::Local => [local, remote && !counts.has(LocalActive)],
        // Terminating remote backends do keep local ones out.
        Affinity::Remote => [local && !remote, remote],
    };
    let active = TierSet::of(
        [LocalActive, RemoteActive],
        [
            scope[0] && counts.has(LocalActive),
            scope[1] && counts.has(RemoteActive),
        ],
    );
    if !active.is_empty() {
        return active;
    }
    let terminating = TierSet::of([LocalTerminating, RemoteTerminating], scope);
    if !terminating.is_empty() {
        return terminating;
    }
    let quarantined = counts.has(QuarantinedActive);
    TierSet::of(
        [QuarantinedActive, QuarantinedTerminating],
        [quarantined, !quarantined && counts.has(QuarantinedTerminating)],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `counts` as `LA LT RA RT QA QT`; the answer as the names of the tiers used.
    fn check(affinity: Affinity, counts: [u32; 6], want: &str) {
        let set = select(affinity, &Counts(counts));
        let names = ["LA", "LT", "RA", "RT", "QA", "QT"];
        let got: Vec<_> = (0..6)
            .filter(|bit| set.0 & (1 << bit) != 0)
            .map(|bit| names[bit])
            .collect();
        assert_eq!(got.join(" "), want, "{affinity:?} {counts:?}");
    }

    #[test]
    fn no_affinity_uses_all_that_are_active() {
        check(Affinity::None, [1, 0, 1, 0, 0, 0], "LA RA");
        check(Affinity::None, [1, 1, 1, 1, 1, 1], "LA RA");
        check(Affinity::None, [0, 1, 1, 0, 0, 0], "RA");
        check(Affinity::None, [0, 1, 0, 1, 1, 1], "LT RT");
        check(Affinity::None, [0, 0, 0, 0, 1, 1], "QA");
        check(Affinity::None, [0, 0, 0, 0, 0, 1], "QT");
        check(Affinity::None, [0; 6], "");
    }

    #[test]
    fn local_affinity_keeps_to_active_local_ones() {
        check(Affinity::Local, [1, 0, 1, 0, 0, 0], "LA");
        check(Affinity::Local, [1, 1, 0, 1, 1, 0], "LA");
        check(Affinity::Local, [0, 1, 1, 0, 0, 0], "RA");
        check(Affinity::Local, [0, 1, 0, 1, 0, 0], "LT RT");
        check(Affinity::Local, [0, 1, 0, 0, 1, 0], "LT");
        check(Affinity::Local, [0, 0, 1, 0, 1, 0], "RA");
        check(Affinity::Local, [0, 0, 0, 0, 1, 0], "QA");
    }

    #[test]
    fn remote_affinity_keeps_to_healthy_remote_ones() {
        check(Affinity::Remote, [1, 0, 1, 0, 0, 0], "RA");
        check(Affinity::Remote, [1, 0, 0, 1, 0, 0], "RT");
        check(Affinity::Remote, [1, 0, 0, 0, 1, 0], "LA");
        check(Affinity::Remote, [0, 1, 0, 0, 1, 0], "LT");
        check(Affinity::Remote, [0, 0, 0, 0, 1, 1], "QA");
    }

    #[test]
    fn something_is_selected_whenever_there_is_something() {
        for bits in 1..64u32 {
            let counts = Counts(std::array::from_fn(|bit| bits >> bit & 1));
            for affinity in [Affinity::None, Affinity::Local, Affinity::Remote] {
                let set = select(affinity, &counts);
                assert!(!set.is_empty(), "{affinity:?} {counts:?}");
                assert_eq!(
                    u32::from(set.0) & !bits,
                    0,
                    "{affinity:?} {counts:?} selects a tier without backends"
                );
            }
        }
    }
}
