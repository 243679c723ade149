//! Probes of other nodes through the real datapath: who answers, how fast, and since when not.
//!
//! In: the nodes to probe, the passing of time, answers. Out: what to send now, and a verdict a node. Pure: `now` is the
//! time since the agent's start; [`udp`] sends and receives.
//!
//! A probe is a small UDP datagram from this node's stack to the other node's router address: it takes the route to the
//! pod CIDR, the VXLAN device, `to_overlay`, the ipcache, the other node's `from_overlay` and its stack, and the answer
//! comes back the same way. So "reachable" means that the tunnel works in both directions, not that a socket is open.
//!
//! Invariants: a node is unreachable after [`MISSES_MAX`] probes in a row without an answer, and reachable again at the
//! first answer; at most [`SENDS_PER_TICK_MAX`] probes leave in one tick, whatever the number of nodes.

pub mod sentinels;
pub mod udp;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use isthmus_model::ClusterName;

/// A node of any cluster.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NodeKey {
    /// Its cluster.
    pub cluster: ClusterName,
    /// Its name.
    pub node: String,
}

/// Probes in a row that may go unanswered before a node counts as unreachable.
pub const MISSES_MAX: u32 = 2;
/// Most probes that leave in one tick.
pub const SENDS_PER_TICK_MAX: usize = 64;
/// Time between two probes of a node, if there are few enough nodes.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// How long an answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// A probe to send.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Send {
    /// To whom.
    pub node: NodeKey,
    /// Router address of that node.
    pub address: IpAddr,
    /// Number that the answer must carry.
    pub nonce: u64,
}

/// What is known about a node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    /// Router address that is probed.
    pub address: Option<IpAddr>,
    /// Round trip of the last answer.
    pub latency: Option<Duration>,
    /// When the last answer came.
    pub last_success: Option<Duration>,
    /// Probes without an answer since the last answer.
    pub misses: u32,
    /// Why the last probe failed; empty if it did not.
    pub cause: String,
}

impl Verdict {
    /// Whether too many probes in a row went unanswered.
    pub fn is_unreachable(&self) -> bool {
        self.misses >= MISSES_MAX
    }
}

#[derive(Debug)]
struct Target {
    next: Duration,
    pending: Option<(u64, Duration)>,
    verdict: Verdict,
}

/// The bookkeeping.
#[derive(Debug)]
pub struct Prober {
    targets: BTreeMap<NodeKey, Target>,
    /// Answers are matched by nonce: who cannot see the probe cannot answer for the node.
    pending: BTreeMap<u64, NodeKey>,
    nonce: u64,
}

impl Prober {
    /// `seed` makes nonces unpredictable.
    pub fn new(seed: u64) -> Self {
        Self {
            targets: BTreeMap::new(),
            pending: BTreeMap::new(),
            nonce: seed,
        }
    }

    /// Sets the nodes to probe. Nodes that stay keep what is known about them; new ones are probed at once.
    pub fn set_targets(&mut self, now: Duration, nodes: &BTreeMap<NodeKey, IpAddr>) {
        self.targets.retain(|node, _| nodes.contains_key(node));
        self.pending.retain(|_, node| nodes.contains_key(node));
        for (node, address) in nodes {
            let target = self.targets.entry(node.clone()).or_insert_with(|| Target {
                next: now,
                pending: None,
                verdict: Verdict::default(),
            });
            if target.verdict.address != Some(*address) {
                // Another address is another question: what was asked before no longer counts.
                if let Some((nonce, _)) = target.pending.take() {
                    self.pending.remove(&nonce);
                }
                target.verdict = Verdict {
                    address: Some(*address),
                    ..Verdict::default()
                };
                target.next = now;
            }
        }
    }

    /// Counts what went unanswered and returns what to send now.
    pub fn tick(&mut self, now: Duration) -> Vec<Send> {
        let interval = self.interval();
        let mut sends = Vec::new();
        for (node, target) in &mut self.targets {
            if let Some((nonce, sent)) = target.pending
                && now.saturating_sub(sent) >= TIMEOUT
            {
                target.pending = None;
                self.pending.remove(&nonce);
                target.verdict.misses = target.verdict.misses.saturating_add(1);
                if target.verdict.cause.is_empty() || target.verdict.misses == 1 {
                    target.verdict.cause = "no answer through the tunnel".to_owned();
                }
            }
            let Some(address) = target.verdict.address else {
                continue;
            };
            if target.pending.is_none() && target.next <= now && sends.len() < SENDS_PER_TICK_MAX {
                self.nonce = mix(self.nonce);
                target.pending = Some((self.nonce, now));
                // Misses are confirmed quickly, so that "two in a row" is a matter of seconds.
                target.next = now
                    + if target.verdict.misses == 0 {
                        interval
                    } else {
                        interval.min(TIMEOUT)
                    };
                self.pending.insert(self.nonce, node.clone());
                sends.push(Send {
                    node: node.clone(),
                    address,
                    nonce: self.nonce,
                });
            }
        }
        sends
    }

    /// The time between two probes of a node: longer when there are more nodes than one interval can carry.
    fn interval(&self) -> Duration {
        let ticks = self.targets.len().div_ceil(SENDS_PER_TICK_MAX);
        // One tick is a second; a mesh has far fewer nodes than would overflow.
        INTERVAL.max(Duration::from_secs(ticks as u64))
    }

    /// An answer came from `from` with `nonce`. Returns whose it was, if it was expected.
    pub fn on_answer(&mut self, now: Duration, from: IpAddr, nonce: u64) -> Option<NodeKey> {
        let node = self.pending.get(&nonce)?.clone();
        let target = self.targets.get_mut(&node)?;
        let (_, sent) = target.pending?;
        if target.verdict.address != Some(from) {
            return None;
        }
        self.pending.remove(&nonce);
        target.pending = None;
        target.verdict.latency = Some(now.saturating_sub(sent));
        target.verdict.last_success = Some(now);
        target.verdict.misses = 0;
        target.verdict.cause.clear();
        Some(node)
    }

    /// A probe could not even be sent: a miss with a better cause.
    pub fn on_send_error(&mut self, nonce: u64, cause: &str) {
        let Some(node) = self.pending.remove(&nonce) else {
            return;
        };
        if let Some(target) = self.targets.get_mut(&node) {
            target.pending = None;
            target.verdict.misses = target.verdict.misses.saturating_add(1);
            target.verdict.cause = cause.chars().take(200).collect();
        }
    }

    /// Says more about why a node does not answer.
    pub fn explain(&mut self, node: &NodeKey, cause: String) {
        if let Some(target) = self.targets.get_mut(node)
            && target.verdict.misses > 0
        {
            target.verdict.cause = cause;
        }
    }

    /// Verdicts, by node.
    pub fn verdicts(&self) -> impl Iterator<Item = (&NodeKey, &Verdict)> {
        self.targets.iter().map(|(node, target)| (node, &target.verdict))
    }
}

/// splitmix64: a permutation of all 64-bit numbers after the addition, so nonces do not repeat soon.
const fn mix(state: u64) -> u64 {
    let mut value = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(node: usize) -> NodeKey {
        NodeKey {
            cluster: ClusterName::new("c2").unwrap(),
            node: format!("n{node}"),
        }
    }

    fn ip(node: usize) -> IpAddr {
        IpAddr::from([10, 2, (node / 250) as u8, (node % 250) as u8 + 1])
    }

    fn nodes(count: usize) -> BTreeMap<NodeKey, IpAddr> {
        (0..count).map(|node| (key(node), ip(node))).collect()
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn verdict(prober: &Prober) -> Verdict {
        prober.verdicts().next().unwrap().1.clone()
    }

    #[test]
    fn two_misses_make_a_node_unreachable_and_one_answer_brings_it_back() {
        let mut prober = Prober::new(1);
        prober.set_targets(seconds(0), &nodes(1));
        let mut now = 0;
        let mut sent = 0;
        while !verdict(&prober).is_unreachable() {
            sent += prober.tick(seconds(now)).len();
            now += 1;
            assert!(now < 12, "{:?}", verdict(&prober));
        }
        assert!(sent <= 3);
        assert_eq!(verdict(&prober).cause, "no answer through the tunnel");
        let send = loop {
            if let Some(send) = prober.tick(seconds(now)).pop() {
                break send;
            }
            now += 1;
        };
        let answer = prober.on_answer(seconds(now) + Duration::from_millis(3), ip(0), send.nonce);
        assert_eq!(answer, Some(key(0)));
        let verdict = verdict(&prober);
        assert!(!verdict.is_unreachable() && verdict.cause.is_empty());
        assert_eq!(verdict.latency, Some(Duration::from_millis(3)));
    }

    #[test]
    fn answers_count_once_from_the_right_address_and_not_after_a_move() {
        let mut prober = Prober::new(1);
        prober.set_targets(seconds(0), &nodes(1));
        let send = prober.tick(seconds(0)).pop().unwrap();
        assert_eq!(prober.on_answer(seconds(0), ip(5), send.nonce), None);
        assert_eq!(prober.on_answer(seconds(0), ip(0), send.nonce ^ 1), None);
        prober.set_targets(seconds(1), &[(key(0), ip(7))].into());
        assert_eq!(prober.on_answer(seconds(1), ip(0), send.nonce), None);
        let send = prober.tick(seconds(1)).pop().unwrap();
        assert_eq!(send.address, ip(7));
        assert!(prober.on_answer(seconds(1), ip(7), send.nonce).is_some());
        assert_eq!(prober.on_answer(seconds(1), ip(7), send.nonce), None);
    }

    #[test]
    fn a_send_error_is_a_miss_with_its_cause() {
        let mut prober = Prober::new(1);
        prober.set_targets(seconds(0), &nodes(1));
        let send = prober.tick(seconds(0)).pop().unwrap();
        prober.on_send_error(send.nonce, "network is unreachable");
        assert_eq!(verdict(&prober).misses, 1);
        assert_eq!(verdict(&prober).cause, "network is unreachable");
    }

    proptest! {
        #[test]
        fn sends_are_bounded_and_fair(count in 0usize..400, ticks in 1u64..60) {
            let mut prober = Prober::new(7);
            prober.set_targets(seconds(0), &nodes(count));
            let mut probed = BTreeMap::<NodeKey, u32>::new();
            for now in 0..ticks {
                let sends = prober.tick(seconds(now));
                prop_assert!(sends.len() <= SENDS_PER_TICK_MAX);
                for send in sends {
                    *probed.entry(send.node.clone()).or_default() += 1;
                    prop_assert!(prober.on_answer(seconds(now), send.address, send.nonce).is_some());
                }
            }
            prop_assert!(prober.pending.is_empty());
            // Every node gets its turn within one interval.
            if ticks > prober.interval().as_secs() {
                prop_assert_eq!(probed.len(), count);
            }
        }
    }
}
