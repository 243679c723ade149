//! A few nodes of each remote cluster, asked often: whether a cluster answers at all, known within a second or two.
//!
//! In: the nodes of the remote clusters, the passing of time, answers. Out: what to send now, and [`Data`] for each cluster.
//! Pure, beside [`Prober`](super::Prober), which asks every node and more slowly.
//!
//! Each cluster is asked a few times in [`ReachConfig::leave_after`], its [`SENTINELS`] nodes in turn. Once it is silent for a third of that time,
//! more of its nodes are asked and more often: a few nodes that go do not look like a cluster that goes. An answer counts
//! whenever it comes, so a long way is not silence. Which nodes are asked differs by the node that asks.
//!
//! Bounds: [`OUTSTANDING_MAX`] probes a cluster are remembered, the oldest forgotten first; one probe a cluster leaves in a
//! tick.
//!
//! [`ReachConfig::leave_after`]: isthmus_mesh::reach::ReachConfig::leave_after

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use isthmus_mesh::reach::Data;
use isthmus_model::ClusterName;

use super::{NodeKey, Send, mix};

/// Nodes of a cluster that are asked while they answer.
pub const SENTINELS: usize = 3;
/// Nodes that are asked when those do not.
pub const WIDE: usize = 12;
/// Probes of a cluster that may be answered late.
pub const OUTSTANDING_MAX: usize = 64;

#[derive(Debug, Default)]
struct Cluster {
    /// In the order in which they are asked.
    nodes: Vec<(NodeKey, IpAddr)>,
    turn: usize,
    next: Duration,
    /// Nonce, address and time of probes since the last answer, oldest first.
    outstanding: VecDeque<(u64, IpAddr, Duration)>,
    data: Data,
}

/// See the module.
#[derive(Debug)]
pub struct Sentinels {
    /// Within this time a silent cluster must be seen to be so.
    leave_after: Duration,
    seed: u64,
    nonce: u64,
    clusters: BTreeMap<ClusterName, Cluster>,
}

impl Sentinels {
    /// `seed` makes nonces unpredictable, and the choice of nodes this node's own.
    pub const fn new(leave_after: Duration, seed: u64) -> Self {
        Self {
            leave_after,
            seed,
            nonce: mix(!seed),
            clusters: BTreeMap::new(),
        }
    }

    /// Sets the nodes of the remote clusters. Clusters that stay keep what is known about them.
    pub fn set_targets(&mut self, nodes: &BTreeMap<NodeKey, IpAddr>) {
        let mut wanted: BTreeMap<&ClusterName, Vec<(u64, &NodeKey, IpAddr)>> = BTreeMap::new();
        for (node, address) in nodes {
            let order = node
                .node
                .bytes()
                .fold(self.seed, |hash, byte| mix(hash ^ u64::from(byte)));
            wanted
                .entry(&node.cluster)
                .or_default()
                .push((order, node, *address));
        }
        self.clusters.retain(|cluster, _| wanted.contains_key(cluster));
        for (cluster, mut nodes) in wanted {
            nodes.sort_unstable();
            let nodes: Vec<_> = nodes
                .into_iter()
                .map(|(_, node, address)| (node.clone(), address))
                .collect();
            let known = self.clusters.entry(cluster.clone()).or_default();
            if known.nodes != nodes {
                known.nodes = nodes;
            }
        }
    }

    /// What to send now. To be called every [`Self::tick_every`].
    pub fn tick(&mut self, now: Duration) -> Vec<Send> {
        let (due, grace) = (self.leave_after / 3, self.leave_after / 6);
        let mut sends = Vec::new();
        for cluster in self.clusters.values_mut() {
            let late = |(_, _, sent): &&(u64, IpAddr, Duration)| now.saturating_sub(*sent) >= grace;
            cluster.data.unanswered = cluster.outstanding.iter().filter(late).count() as u32;
            if cluster.next > now || cluster.nodes.is_empty() {
                continue;
            }
            let heard = cluster.data.answered_at.or(cluster.data.asked_at).unwrap_or(now);
            let alarmed = now.saturating_sub(heard) >= due;
            let width = if alarmed { WIDE } else { SENTINELS }.min(cluster.nodes.len());
            let (node, address) = &cluster.nodes[cluster.turn % width];
            cluster.turn = cluster.turn.wrapping_add(1);
            // While it answers, at half the pace.
            cluster.next = if alarmed { now } else { now + grace };
            self.nonce = mix(self.nonce);
            if cluster.outstanding.len() == OUTSTANDING_MAX {
                cluster.outstanding.pop_front();
            }
            cluster.outstanding.push_back((self.nonce, *address, now));
            cluster.data.asked_at.get_or_insert(now);
            sends.push(Send {
                node: node.clone(),
                address: *address,
                nonce: self.nonce,
            });
        }
        sends
    }

    /// How often to call [`Self::tick`].
    pub fn tick_every(&self) -> Duration {
        self.leave_after / 12
    }

    /// An answer came; true if it was expected.
    pub fn on_answer(&mut self, now: Duration, from: IpAddr, nonce: u64) -> bool {
        for cluster in self.clusters.values_mut() {
            let expected = |probe: &(u64, IpAddr, Duration)| probe.0 == nonce && probe.1 == from;
            if let Some(place) = cluster.outstanding.iter().position(expected) {
                // Those before it were asked of a cluster that answers.
                cluster.outstanding.drain(..=place);
                cluster.data.answered_at = Some(now);
                cluster.data.speaks = true;
                cluster.data.unanswered = 0;
                return true;
            }
        }
        false
    }

    /// What is known of each cluster, as of the last tick.
    pub fn data(&self) -> impl Iterator<Item = (&ClusterName, &Data)> {
        self.clusters.iter().map(|(name, cluster)| (name, &cluster.data))
    }
}

#[cfg(test)]
mod tests {
    use isthmus_mesh::{
        Reach,
        reach::{Change, Control, ReachConfig, Verdict},
    };
    use isthmus_model::{ClusterId, MaxConnectedClusters};
    use proptest::prelude::*;

    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn nodes(count: usize) -> BTreeMap<NodeKey, IpAddr> {
        let key = |node: usize| NodeKey {
            cluster: ClusterName::new("c2").unwrap(),
            node: format!("n{node}"),
        };
        let address = |node: usize| IpAddr::from([10, 2, (node / 250) as u8, (node % 250) as u8]);
        (0..count).map(|node| (key(node), address(node))).collect()
    }

    /// A cluster at some distance, the sentinels and the judge.
    struct World {
        sentinels: Sentinels,
        reach: Reach,
        now: Duration,
        round_trip: Duration,
        /// Nodes that answer.
        alive: Box<dyn Fn(IpAddr) -> bool>,
        under_way: Vec<(Duration, IpAddr, u64)>,
        changes: Vec<(Duration, bool)>,
        sent: usize,
    }

    impl World {
        fn new(count: usize, round_trip: Duration) -> Self {
            let config = ReachConfig::default();
            let mut sentinels = Sentinels::new(config.leave_after, 3);
            sentinels.set_targets(&nodes(count));
            Self {
                sentinels,
                reach: Reach::new(config, 3),
                now: Duration::ZERO,
                round_trip,
                alive: Box::new(|_| true),
                under_way: vec![],
                changes: vec![],
                sent: 0,
            }
        }

        fn run(&mut self, time: Duration) {
            let end = self.now + time;
            let c2 = ClusterId::new(2, MaxConnectedClusters::C255).unwrap();
            while self.now < end {
                self.now += self.sentinels.tick_every();
                let now = self.now;
                let arrived: Vec<_> = self.under_way.extract_if(.., |(at, ..)| *at <= now).collect();
                for (at, from, nonce) in arrived {
                    assert!(
                        self.sentinels.on_answer(at, from, nonce) || self.round_trip > Duration::from_secs(1)
                    );
                }
                for send in self.sentinels.tick(now) {
                    self.sent += 1;
                    if (self.alive)(send.address) {
                        self.under_way
                            .push((now + self.round_trip, send.address, send.nonce));
                    }
                }
                let data = *self.sentinels.data().next().unwrap().1;
                let change = self.reach.observe(now, c2, Control::Fresh, data);
                self.changes
                    .extend(change.map(|Change { healthy, .. }| (now, healthy)));
            }
        }

        fn verdict(&self) -> Verdict {
            self.reach.judgements().next().unwrap().1.verdict
        }
    }

    #[test]
    fn a_silent_cluster_is_out_in_three_seconds_and_back_in_two() {
        for count in [1, 2, 3, 100] {
            let mut world = World::new(count, 20 * MILLI);
            world.run(Duration::from_secs(30));
            assert!(world.sent <= 30 * 3, "asks at leisure: {}", world.sent);
            let cut = world.now;
            world.alive = Box::new(|_| false);
            world.run(Duration::from_secs(30));
            assert_eq!(world.changes.len(), 1);
            assert!(!world.changes[0].1 && world.changes[0].0 - cut <= Duration::from_secs(3));
            let healed = world.now;
            world.alive = Box::new(|_| true);
            world.run(Duration::from_secs(3));
            assert!(world.changes[1].1 && world.changes[1].0 - healed <= Duration::from_secs(2));
        }
    }

    #[test]
    fn a_long_way_is_not_silence() {
        let mut world = World::new(5, Duration::from_secs(2));
        // Until the first answer can be there, nothing was ever heard; it does not know that this cluster speaks.
        world.run(Duration::from_secs(60));
        assert_eq!(world.changes, []);
        assert_eq!(world.verdict(), Verdict::Reachable);
    }

    #[test]
    fn the_sentinels_alone_are_not_the_cluster() {
        let mut world = World::new(30, 20 * MILLI);
        world.run(Duration::from_secs(10));
        let asked: std::collections::BTreeSet<IpAddr> =
            world.sentinels.clusters.values().next().unwrap().nodes[..SENTINELS]
                .iter()
                .map(|(_, address)| *address)
                .collect();
        world.alive = Box::new(move |address| !asked.contains(&address));
        world.run(Duration::from_secs(60));
        assert_eq!(world.changes, []);
    }

    #[test]
    fn answers_of_strangers_do_not_count() {
        let mut sentinels = Sentinels::new(Duration::from_secs(3), 3);
        sentinels.set_targets(&nodes(1));
        let send = sentinels.tick(Duration::ZERO).pop().unwrap();
        assert!(!sentinels.on_answer(MILLI, IpAddr::from([10, 9, 9, 9]), send.nonce));
        assert!(!sentinels.on_answer(MILLI, send.address, send.nonce ^ 1));
        assert!(sentinels.on_answer(MILLI, send.address, send.nonce));
        assert!(!sentinels.on_answer(MILLI, send.address, send.nonce), "once");
        sentinels.set_targets(&BTreeMap::new());
        assert_eq!(sentinels.data().count(), 0);
    }

    proptest! {
        #[test]
        fn what_is_remembered_is_bounded(count in 1usize..40, steps in 1u32..400, lost in any::<u64>()) {
            let mut sentinels = Sentinels::new(Duration::from_secs(3), lost);
            sentinels.set_targets(&nodes(count));
            for step in 0..steps {
                let now = step * sentinels.tick_every();
                let sends = sentinels.tick(now);
                prop_assert!(sends.len() <= 1);
                for send in sends {
                    if mix(lost ^ u64::from(step)).is_multiple_of(9) {
                        prop_assert!(sentinels.on_answer(now, send.address, send.nonce));
                    }
                }
                prop_assert!(sentinels.clusters.values().all(|cluster| cluster.outstanding.len() <= OUTSTANDING_MAX));
            }
        }
    }
}
