//! From entries of the map of the way back to the sockets whose flows end. Pure.
//!
//! In: departed backends, the map's entries, and a verdict on flows. Out: the entries of sockets to end. Sockets of one flow
//! (one frontend and one backend) are judged together: a map of 262,144 entries has few of those.

use std::collections::{HashMap, HashSet};

use isthmus_bpf_abi::{ReverseSkKey, ReverseSkValue};
use isthmus_datapath::sock_diag::Protocol;
use isthmus_mesh::loadbalancer::{Departed, Flow};

/// Sockets with flows to departed backends, by flow. Some may be closed long since.
#[derive(Debug)]
pub struct Selection {
    departed: Departed,
    protocols: Vec<Protocol>,
    flows: HashMap<Flow, Vec<ReverseSkKey>>,
}

impl Selection {
    /// Of these backends, in these protocols.
    pub fn new(departed: Departed, protocols: Vec<Protocol>) -> Self {
        Self {
            departed,
            protocols,
            flows: HashMap::new(),
        }
    }

    /// Takes in an entry.
    pub fn take(&mut self, key: &ReverseSkKey, value: &ReverseSkValue) {
        let backend = (key.address, u16::from_be_bytes(key.port), key.proto);
        let wanted = self
            .protocols
            .iter()
            .any(|protocol| protocol.number() == key.proto);
        if wanted && self.departed.contains(&backend) {
            let frontend = (value.address, u16::from_be_bytes(value.port));
            let flow = Flow { frontend, backend };
            self.flows.entry(flow).or_default().push(*key);
        }
    }

    /// Whether there is nothing to judge.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Entries of the sockets whose flows end.
    pub fn targets(self, mut ends: impl FnMut(&Flow) -> bool) -> HashSet<ReverseSkKey> {
        let ending = self.flows.into_iter().filter(|(flow, _)| ends(flow));
        ending.flat_map(|(_, keys)| keys).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    type Number = (u8, u8, u8);

    fn entry(cookie: u64, (frontend, backend, proto): Number) -> (ReverseSkKey, ReverseSkValue) {
        let key = ReverseSkKey {
            cookie,
            address: [backend; 16],
            port: [0, backend],
            proto,
            pad: [0; 5],
        };
        let value = ReverseSkValue {
            address: [frontend; 16],
            service_id: 1,
            port: [1, frontend],
            pad: [0; 2],
        };
        (key, value)
    }

    proptest! {
        /// Each socket is a target exactly if its own flow ends, its backend departed and its protocol is wanted.
        #[test]
        fn sockets_of_flows_that_end_are_the_targets(
            entries in vec((0..3_u8, 0..4_u8, prop_oneof![Just(6_u8), Just(17), Just(132)]), 0..60),
            left in proptest::collection::btree_set((0..4_u8, prop_oneof![Just(6_u8), Just(17)]), 0..6),
            ended in proptest::collection::btree_set((0..3_u8, 0..4_u8), 0..8),
            tcp: bool,
        ) {
            let mut departed = Departed::default();
            for (backend, proto) in &left {
                departed.add(([*backend; 16], u16::from(*backend), *proto));
            }
            let protocols = if tcp { Protocol::ALL.to_vec() } else { vec![Protocol::Udp] };
            let mut selection = Selection::new(departed, protocols);
            let mut want = BTreeSet::new();
            for (cookie, number) in (0..).zip(&entries) {
                let (key, value) = entry(cookie, *number);
                selection.take(&key, &value);
                let (frontend, backend, proto) = *number;
                if left.contains(&(backend, proto)) && ended.contains(&(frontend, backend)) && (tcp || proto == 17) {
                    want.insert(key);
                }
            }
            let mut asked = vec![];
            let targets = selection.targets(|flow| {
                asked.push(*flow);
                assert_eq!(flow.frontend.1, 256 + u16::from(flow.frontend.0[0]));
                ended.contains(&(flow.frontend.0[0], flow.backend.0[0]))
            });
            prop_assert_eq!(targets.into_iter().collect::<BTreeSet<_>>(), want);
            let asked_for: BTreeSet<Flow> = asked.iter().copied().collect();
            prop_assert_eq!(asked_for.len(), asked.len(), "a flow is judged once");
        }
    }
}
