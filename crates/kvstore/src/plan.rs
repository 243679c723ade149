//! What to write so that a store holds the desired content. Pure.
//!
//! Invariants: an equal value is never written; a key outside the pruned scopes is never deleted; a synced canary is written
//! after everything else, so that who sees it finds the rest; a transaction stays within etcd's limits.

use std::collections::BTreeMap;

use bytes::Bytes;
use isthmus_wire::keys::SYNCED;

/// One write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// The key.
        key: Bytes,
        /// Its value.
        value: Bytes,
    },
    /// Deletes a key; deleting what is absent succeeds.
    Delete {
        /// The key.
        key: Bytes,
    },
}

impl Op {
    /// The key it writes.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Put { key, value } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// How large a transaction may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most operations; etcd's default for `max-txn-ops` is 128.
    pub ops: usize,
    /// Most bytes of keys and values in one transaction, unless a single value is larger.
    pub bytes: usize,
    /// Largest value in bytes; larger ones are not planned. etcd's default for `max-request-bytes` is 1.5 MiB.
    pub value: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ops: 128,
            bytes: 1024 * 1024,
            value: 1_536 * 1024 - 16 * 1024,
        }
    }
}

/// What is to be done, in order: each transaction after the one before it has succeeded.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Plan {
    /// Transactions; keys within one are distinct.
    pub txns: Vec<Vec<Op>>,
    /// Desired keys whose value is above the limit, and which stay as they are.
    pub refused: Vec<Bytes>,
}

/// The writes that turn `actual` into `desired`. Keys of `actual` that are not desired are deleted where `may_delete` says so.
pub fn plan_writes(
    actual: &BTreeMap<Bytes, Bytes>,
    desired: &BTreeMap<Bytes, Bytes>,
    may_delete: impl Fn(&[u8]) -> bool,
    limits: Limits,
) -> Plan {
    let is_canary = |key: &[u8]| key.starts_with(SYNCED.as_bytes());
    let mut plan = Plan::default();
    let mut canaries = Vec::new();
    let mut puts = Vec::new();
    for (key, value) in desired {
        if actual.get(key) == Some(value) {
            continue;
        }
        if value.len() > limits.value {
            plan.refused.push(key.clone());
            continue;
        }
        let put = Op::Put {
            key: key.clone(),
            value: value.clone(),
        };
        if is_canary(key) {
            canaries.push(put);
        } else {
            puts.push(put);
        }
    }
    let deletes = actual
        .keys()
        .filter(|key| !desired.contains_key(*key) && may_delete(key))
        .map(|key| Op::Delete { key: key.clone() });
    // Puts before deletes, so that what moved to another key is never absent from both.
    puts.extend(deletes);
    pack(puts, limits, &mut plan.txns);
    // Canaries begin a transaction of their own: the ones before have then succeeded.
    pack(canaries, limits, &mut plan.txns);
    plan
}

fn pack(ops: Vec<Op>, limits: Limits, txns: &mut Vec<Vec<Op>>) {
    let (mut txn, mut bytes) = (Vec::new(), 0);
    for op in ops {
        if !txn.is_empty() && (txn.len() >= limits.ops || bytes + op.len() > limits.bytes) {
            txns.push(std::mem::take(&mut txn));
            bytes = 0;
        }
        bytes += op.len();
        txn.push(op);
    }
    if !txn.is_empty() {
        txns.push(txn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content() -> impl Strategy<Value = BTreeMap<Bytes, Bytes>> {
        let key = prop_oneof!["[a-c]{1,2}", "own/[a-c]", "cilium/synced/c1/[a-c]",];
        let value = prop_oneof![Just(vec![]), Just(vec![1]), Just(vec![0; 12]), Just(vec![0; 40])];
        proptest::collection::btree_map(key.prop_map(Bytes::from), value.prop_map(Bytes::from), 0..20)
    }

    proptest! {
        #[test]
        fn every_prefix_of_a_plan_is_valid(actual in content(), desired in content(), ops in 1usize..5, bytes in 1usize..60) {
            let limits = Limits { ops, bytes, value: 30 };
            let owned = |key: &[u8]| key.starts_with(b"own/");
            let plan = plan_writes(&actual, &desired, owned, limits);
            let mut state = actual.clone();
            let mut last_data = 0;
            for (index, txn) in plan.txns.iter().enumerate() {
                prop_assert!(!txn.is_empty() && txn.len() <= ops);
                let len: usize = txn.iter().map(Op::len).sum();
                prop_assert!(len <= bytes || txn.len() == 1);
                let canaries = txn.iter().filter(|op| op.key().starts_with(SYNCED.as_bytes())).count();
                prop_assert!(canaries == 0 || canaries == txn.len());
                if canaries == 0 {
                    last_data = index;
                } else {
                    prop_assert!(index > last_data || last_data == 0);
                }
                for op in txn {
                    match op {
                        Op::Put { key, value } => {
                            prop_assert_ne!(state.insert(key.clone(), value.clone()), Some(value.clone()));
                        }
                        Op::Delete { key } => {
                            prop_assert!(owned(key));
                            prop_assert!(state.remove(key).is_some());
                        }
                    }
                    // At each point a key holds its old or its desired value.
                    let key = op.key();
                    prop_assert!(state.get(key) == desired.get(key));
                }
            }
            for (key, value) in &desired {
                let want = if plan.refused.contains(key) { actual.get(key) } else { Some(value) };
                prop_assert_eq!(state.get(key), want);
                prop_assert!(!plan.refused.contains(key) || value.len() > 30);
            }
            for key in state.keys() {
                prop_assert!(desired.contains_key(key) || (actual.contains_key(key) && !owned(key)));
            }
            prop_assert!(plan_writes(&desired, &desired, |_| true, limits).txns.is_empty());
        }
    }
}
