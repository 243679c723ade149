//! What the upstream and the prober said, into the state; and what others wait for, out of it.

use std::{collections::BTreeMap, sync::Arc};

use isthmus_kvstore::{Change, Update};
use isthmus_mesh::reach::Control;

use super::Rounds;
use crate::{
    prober::{ProbeTargets, Verdicts},
    state::{Event, Notice},
};

impl Rounds {
    pub(super) fn on_update(&mut self, update: Update) {
        let now = self.now();
        let upstream = &mut self.facts.upstream;
        if !matches!(update, Update::Disconnected { .. }) {
            upstream.heard_at = Some(now);
        }
        match update {
            Update::Connected { client } => {
                upstream.connected = true;
                upstream.changed_at = now;
                upstream.endpoint = client.endpoint().to_string();
                tracing::info!(
                    endpoint = upstream.endpoint,
                    "connected to the clustermesh-apiserver"
                );
            }
            Update::Disconnected { error, .. } => {
                upstream.failures += 1;
                self.outputs.metrics.upstream_failures.inc();
                if upstream.connected || upstream.failures == 1 {
                    tracing::warn!(
                        error,
                        "no connection to the clustermesh-apiserver; working on what is known"
                    );
                }
                if upstream.connected {
                    upstream.connected = false;
                    upstream.changed_at = now;
                }
                upstream.error = error;
            }
            Update::Failed { feed, error } => {
                // One that was removed meanwhile would stay refused for ever.
                if self.facts.state.is_followed(&feed) && upstream.refused_feeds.get(&*feed) != Some(&error) {
                    tracing::warn!(feed = &*feed, error, "the clustermesh-apiserver refuses a feed");
                    upstream.refused_feeds.insert(feed.to_string(), error);
                }
            }
            Update::Listing { .. } | Update::Listed { .. } | Update::History { .. } => {}
            Update::Synced { feed, .. } => {
                upstream.refused_feeds.remove(&*feed);
                self.on(Event::Synced { feed: &feed });
            }
            Update::Changes { feed, changes, .. } => {
                let feed = &*feed;
                for change in &changes {
                    match change {
                        Change::Put { key, value, .. } => self.on(Event::Put { feed, key, value }),
                        Change::Delete { key, .. } => self.on(Event::Delete { feed, key }),
                        Change::Refused { key, len, .. } => {
                            self.on(Event::Oversized { feed, key, len: *len })
                        }
                    }
                }
                let beats = self.facts.state.heartbeats();
                if beats != self.counters.heartbeats {
                    self.counters.heartbeats = beats;
                    self.facts.upstream.heartbeat_at = Some(now);
                }
            }
        }
        self.tell();
    }

    /// Hands on what others wait for, if it changed.
    pub(super) fn tell(&mut self) {
        for notice in self.facts.state.take_notices() {
            match notice {
                Notice::Refused {
                    cluster,
                    key,
                    reason,
                    why,
                } => {
                    tracing::warn!(%cluster, key, reason, why, "object refused; what was known of it stays");
                }
                Notice::Joined(cluster, id) => tracing::info!(%cluster, %id, "cluster is part of the mesh"),
                Notice::Left(cluster, id) => {
                    tracing::info!(%cluster, %id, "cluster left the mesh; it is drained")
                }
            }
        }
        let Some(cidrs) = self.facts.state.take_routes() else {
            return;
        };
        // Whatever changes a route may also have changed nodes.
        self.outputs.cidrs.send_if_modified(|before| {
            let changed = **before != cidrs;
            if changed {
                *before = Arc::new(cidrs);
            }
            changed
        });
        let node = match self.facts.state.local().node() {
            Some(Ok(node)) => Ok(node.clone()),
            Some(Err(error)) => Err(error.to_string()),
            None => Err(format!(
                "waiting for the operator to publish node {:?} of cluster {}",
                self.facts.state.identity().node,
                self.facts.state.identity().cluster
            )),
        };
        self.outputs.node.send_if_modified(|before| {
            let changed = *before != node;
            if changed {
                *before = node;
            }
            changed
        });
        let targets = self.facts.state.probe_targets();
        let targets: ProbeTargets = targets
            .into_iter()
            .map(|(key, address)| {
                let tunnel_endpoint = self.facts.state.tunnel_endpoint(&key);
                (key, (address, tunnel_endpoint))
            })
            .collect();
        self.outputs.targets.send_if_modified(|before| {
            let changed = *before != targets;
            if changed {
                *before = targets;
            }
            changed
        });
    }

    pub(super) fn on_verdicts(&mut self, verdicts: &Verdicts) {
        self.facts.probes = Some(verdicts.to_vec());
    }

    /// Judges which remote clusters can be reached, by what is known now.
    pub(super) fn judge(&mut self) {
        let now = self.now();
        let upstream = self.facts.upstream.connected;
        let remotes = self.facts.state.remotes();
        let mut present = BTreeMap::new();
        let mut changes = vec![];
        for remote in &remotes {
            let Some(cluster) = &remote.cluster else { continue };
            present.insert(cluster.id, cluster.name.clone());
            let control = match &remote.status {
                Some(status) if upstream && status.connected && !status.stale => Control::Fresh,
                Some(_) if upstream => Control::Stale,
                _ => Control::Unknown,
            };
            let found = self.clusters.iter().find(|(name, _)| *name == cluster.name);
            let mut data = found.map(|(_, data)| *data).unwrap_or_default();
            // Whoever publishes our form runs our agents, which answer.
            data.speaks |= cluster.slices;
            changes.extend(self.reach.observe(now, cluster.id, control, data));
        }
        self.reach.retain(|cluster| present.contains_key(&cluster));
        for change in changes {
            let cluster = &present[&change.cluster];
            if change.healthy {
                tracing::info!(%cluster, "a remote cluster can be reached again; its backends are used");
            } else {
                tracing::warn!(%cluster, reason = %change.reason, "a remote cluster cannot be reached; its backends are a last resort now");
            }
            self.on(Event::ClusterHealth(change.cluster, change.healthy));
        }
        let judged = self.reach.judgements();
        self.facts.reach = judged
            .filter_map(|(id, judgement)| Some((present.get(&id)?.clone(), judgement)))
            .collect();
    }
}
