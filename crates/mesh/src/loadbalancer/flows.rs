//! Which open flows end when backends leave: those that nobody answers any more, so that clients connect anew at once and do
//! not wait for a time-out.
//!
//! In: the merge's own state. Out: [`Departed`], backends that may have left since the last call (it may name too many), and a
//! verdict on any one flow ([`LoadBalancer::verdict`]), by what is known at that moment.
//!
//! Rules, for a flow through a frontend to a backend:
//! - The backend is unready, or of weight 0: the flow ends. (The pods of a node that died are unready and no more than that,
//!   until they are evicted minutes later.)
//! - Nobody names it any more: the flow ends, unless it is a connection to an address that is still a pod's or a node's: who
//!   takes a service back from other clusters, or changes its selector, moves new connections and breaks none. What addresses
//!   there are is for the caller to know ([`Verdict::Withdrawn`]); of those outside the mesh nobody does.
//! - Terminating, serving or not: it goes on. The backend ends it itself, or goes away.
//! - Of a cluster that does not answer: it ends if another backend takes its place; as the last resort it goes on.
//! - Otherwise it goes on, also where new connections go elsewhere (another tier, zone or affinity).
//!
//! Invariant: no flow ends for a lack of knowledge. It goes on through frontends that are not known (there is nothing to fail
//! over to) or not claimed yet after a restart, and to restored backends that no source has named or left out yet.

use std::collections::BTreeSet;

use isthmus_bpf_abi::{Address, SCOPE_EXTERNAL, SCOPE_INTERNAL};

use super::{
    LoadBalancer,
    candidate::{Context, GHOST, HELD},
    group::Group,
    select::{Class, Picked},
};
use crate::Family;

/// Backends that [`Departed`] lists; beyond, it stands for every backend.
pub const DEPARTED_MAX: usize = 65_536;

/// A backend as a socket sees it: address, port (host order), IANA protocol number.
pub type Destination = (Address, u16, u8);

/// Backends that may have left.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Departed {
    backends: BTreeSet<Destination>,
    /// More than are listed: any may have.
    all: bool,
}

impl Departed {
    /// Adds one.
    pub fn add(&mut self, backend: Destination) {
        if self.all {
            return;
        }
        self.backends.insert(backend);
        if self.backends.len() > DEPARTED_MAX {
            self.backends = BTreeSet::new();
            self.all = true;
        }
    }

    /// Adds those of another.
    pub fn merge(&mut self, other: &Self) {
        self.all |= other.all;
        if self.all {
            self.backends = BTreeSet::new();
        } else {
            other.backends.iter().for_each(|backend| self.add(*backend));
        }
    }

    /// Whether this one may have left.
    pub fn contains(&self, backend: &Destination) -> bool {
        self.all || self.backends.contains(backend)
    }

    /// Whether none has.
    pub fn is_empty(&self) -> bool {
        !self.all && self.backends.is_empty()
    }
}

/// A flow that was translated at a socket.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Flow {
    /// Address and port (host order) that its client asked for.
    pub frontend: (Address, u16),
    /// Where it goes.
    pub backend: Destination,
}

/// What is known of the backend of a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Standing {
    /// Restored, and no source has said better; or kept as the last resort until all have.
    restored: bool,
    /// What its source says; `None` if no source names it.
    class: Option<Class>,
    /// A source says that it terminates, serving or not.
    terminating: bool,
    /// Its cluster does not answer.
    quarantined: bool,
    /// It has a slot.
    in_rotation: bool,
    /// Somebody has.
    replaced: bool,
}

/// What becomes of an open flow.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Verdict {
    /// It goes on.
    GoesOn,
    /// No source names its backend. It ends, unless it is a connection and its backend's address is still there.
    Withdrawn,
    /// It ends.
    Ends,
}

/// The rules of the module.
const fn verdict(standing: Standing) -> Verdict {
    if standing.restored || standing.in_rotation {
        return Verdict::GoesOn;
    }
    if standing.quarantined && standing.replaced {
        return Verdict::Ends;
    }
    match standing.class {
        Some(Class::Active | Class::Terminating) => Verdict::GoesOn,
        None | Some(Class::Unusable) if standing.terminating => Verdict::GoesOn,
        None => Verdict::Withdrawn,
        Some(Class::Unusable) => Verdict::Ends,
    }
}

impl LoadBalancer {
    /// Backends that may have left in the drains since the last call.
    pub fn take_departed(&mut self) -> Departed {
        std::mem::take(&mut self.departed)
    }

    /// What becomes of an open flow, by what the last drain knew.
    pub fn verdict(&self, flow: &Flow) -> Verdict {
        let (address, port) = flow.frontend;
        let scopes = [SCOPE_EXTERNAL, SCOPE_INTERNAL].into_iter();
        let keys = scopes.map(|scope| (address, port, flow.backend.2, scope));
        let frontends = keys
            .filter_map(|key| self.frontend_index.get(&key))
            .map(|number| self.frontends[*number].group);
        // One that still leads there will do: which scope a socket asked in was not written down.
        let verdicts = frontends.map(|group| {
            group.map_or(Verdict::GoesOn, |group| {
                self.verdict_in(&self.groups[group], &flow.backend)
            })
        });
        verdicts.min().unwrap_or(Verdict::GoesOn)
    }

    fn verdict_in(&self, group: &Group, backend: &Destination) -> Verdict {
        let Some(service) = group.service.filter(|_| group.filled && !group.dead) else {
            return Verdict::GoesOn;
        };
        let key = (backend.0, backend.1);
        let found = group.candidates.find(&self.context.hasher, key);
        let candidate = found.map(|at| &group.candidates[at]);
        let standing = Standing {
            restored: candidate.is_some_and(|one| one.is(GHOST) || one.is(HELD)),
            class: candidate
                .filter(|one| one.contributions > 0)
                .map(|one| one.view().class),
            terminating: self.is_terminating(service, group, key),
            quarantined: candidate.is_some_and(|one| self.context.quarantined(one.cluster)),
            in_rotation: candidate.is_some_and(|one| one.has_slot()),
            replaced: !group.slots.is_empty(),
        };
        verdict(standing)
    }

    /// Whether a slice that counts says so: candidates do not keep it of those that do not serve.
    fn is_terminating(&self, service: u32, group: &Group, key: (Address, u16)) -> bool {
        let Some(service) = self.services.get(service) else {
            return false;
        };
        if Family::of(&key.0) != group.port.family {
            return false;
        }
        let parts = service.parts.iter();
        let eligible = parts.filter(|part| service.eligible(part, self.context.local));
        eligible
            .flat_map(|part| part.slices.iter().map(|slice| (part.cluster, slice)))
            .filter(|(_, slice)| group.port.number_in(self.pools.ports(slice.ports)) == Some(key.1))
            .filter_map(|(cluster, slice)| Some((cluster, slice.endpoint(&key.0)?)))
            .any(|(cluster, endpoint)| {
                endpoint.terminating() && group.port.reaches(&self.context, cluster, endpoint)
            })
    }
}

impl Group {
    /// Which of the candidates that a drain looked at may have left, and which lost their place as the last resort. To be
    /// called before dead ones leave the index.
    pub(super) fn departures(&self, context: &Context, dirty: &[u32], before: Picked) -> Vec<(Address, u16)> {
        let looked_at = dirty.iter().map(|at| &self.candidates[*at]);
        let mut left: Vec<_> = looked_at
            .filter(|one| !one.alive() || context.quarantined(one.cluster))
            .map(|one| (one.address, one.port))
            .collect();
        let last_resort =
            |picked| matches!(picked, Picked::QuarantinedActive | Picked::QuarantinedTerminating);
        if last_resort(before) && self.picked() != before {
            let live = self.candidates.live().into_iter().map(|at| &self.candidates[at]);
            let lost = live.filter(|one| context.quarantined(one.cluster));
            left.extend(lost.map(|one| (one.address, one.port)));
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn class() -> impl Strategy<Value = Option<Class>> {
        prop_oneof![
            Just(None),
            Just(Some(Class::Active)),
            Just(Some(Class::Terminating)),
            Just(Some(Class::Unusable)),
        ]
    }

    prop_compose! {
        fn standing()(
            restored: bool, class in class(), terminating: bool, quarantined: bool, in_rotation: bool, replaced: bool,
        ) -> Standing {
            Standing { restored, class, terminating, quarantined, in_rotation, replaced }
        }
    }

    fn ends(standing: Standing) -> bool {
        verdict(standing) != Verdict::GoesOn
    }

    proptest! {
        #[test]
        fn what_is_used_or_not_known_to_be_gone_goes_on(standing in standing()) {
            let restored = Standing { restored: true, ..standing };
            let in_rotation = Standing { in_rotation: true, ..standing };
            let reachable = Standing { quarantined: false, ..standing };
            let active = Standing { class: Some(Class::Active), ..reachable };
            let terminating = Standing { terminating: true, ..reachable };
            for used in [restored, in_rotation, active, terminating] {
                prop_assert!(!ends(used), "{:?}", used);
            }
        }

        #[test]
        fn what_is_gone_ends(standing in standing(), unready: bool) {
            let gone = Standing {
                class: unready.then_some(Class::Unusable),
                restored: false,
                terminating: false,
                in_rotation: false,
                ..standing
            };
            let cut_off = gone.quarantined && gone.replaced;
            let withdrawn = !unready && !cut_off;
            prop_assert_eq!(verdict(gone), if withdrawn { Verdict::Withdrawn } else { Verdict::Ends });
        }

        #[test]
        fn more_than_fit_stand_for_all(first in 0..DEPARTED_MAX as u32 * 2, more in 0..40_u32) {
            let backend = |number: u32| {
                let mut address = [0; 16];
                address[..4].copy_from_slice(&number.to_be_bytes());
                (address, 80, 6)
            };
            let mut departed = Departed::default();
            (0..more).for_each(|number| departed.add(backend(number)));
            prop_assert_eq!(departed.is_empty(), more == 0);
            let mut others = Departed::default();
            (0..first).for_each(|number| others.add(backend(1_000_000 + number)));
            departed.merge(&others);
            let all = first as usize > DEPARTED_MAX || (first + more) as usize > DEPARTED_MAX;
            prop_assert_eq!(departed.contains(&backend(7_000_000)), all);
            prop_assert!((0..more).all(|number| departed.contains(&backend(number))));
            prop_assert!(departed.backends.len() <= DEPARTED_MAX);
        }
    }

    #[test]
    fn of_an_unreachable_cluster_only_the_last_resort_goes_on() {
        let standing = Standing {
            restored: false,
            class: Some(Class::Active),
            terminating: false,
            quarantined: true,
            in_rotation: false,
            replaced: true,
        };
        assert!(ends(standing));
        assert!(ends(Standing {
            class: Some(Class::Terminating),
            terminating: true,
            ..standing
        }));
        assert!(!ends(Standing {
            replaced: false,
            ..standing
        }));
    }
}
