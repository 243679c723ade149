//! What to follow: which prefixes of which clusters, from the cluster configs and canaries that the upstream shows.
//!
//! In: cluster configs, canaries, "listed in full" marks. Out: [`Effect`]s, in order. Pure.
//!
//! Rules:
//! - A prefix is followed once its canary is there (if the cluster writes canaries), so that a full list of it is the
//!   whole truth, and "synced" is simply "listed".
//! - The own cluster is read at its operator's keys, others at the mirror's. A cluster that announces Isthmus' slices is
//!   read through them, another through Cilium's service JSON. When that changes, the new form is read anew and what it
//!   does not confirm goes; until then the old content stays in use.
//! - A cluster whose config and status key are both gone is out: its data is drained. A config alone may be gone because an
//!   API server began anew and has not reached the remote cluster yet; its status says that the cluster is still meant.
//!   The own cluster is never drained.
//! - A config that cannot be right (ID of another cluster, out of range) changes nothing but the status.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_wire::{
    ClusterConfig,
    keys::{Kind, Scope},
};

use crate::decode::Source;

/// What the shell and the state must do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// A cluster is part of the mesh.
    Join(ClusterName, ClusterId),
    /// Begin to follow this prefix.
    Follow(Source),
    /// Stop; what is known from it stays.
    Unfollow(Source),
    /// The cluster's services come in another form from now on: what the new form does not confirm goes once it is listed.
    Reread(ClusterName, ClusterId),
    /// Forget everything of this cluster.
    Drain(ClusterName, ClusterId),
}

/// What is known about a cluster's sources.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cluster {
    /// Its ID.
    pub id: ClusterId,
    /// It is read through frames and slices, not through Cilium's service JSON.
    pub slices: bool,
    canaries: bool,
    scope: Scope,
    followed: BTreeMap<Kind, bool>,
}

impl Cluster {
    /// The kinds to read, with their scopes.
    fn wanted(&self) -> impl Iterator<Item = (Kind, Scope)> + use<> {
        let base = [Kind::Nodes, Kind::Ip, Kind::Identities];
        let services: &[Kind] = if self.slices {
            &[Kind::Frames, Kind::Slices]
        } else {
            &[Kind::Services]
        };
        let scope = self.scope;
        base.into_iter()
            .chain(services.iter().copied())
            .map(move |kind| (kind, scope_of(kind, scope)))
    }

    /// Whether every kind was listed in full.
    pub fn is_synced(&self) -> bool {
        self.wanted()
            .all(|(kind, _)| self.followed.get(&kind).copied() == Some(true))
    }

    /// Whether frames and slices, or the services in Cilium's form, were listed in full.
    pub fn services_listed(&self) -> bool {
        self.wanted()
            .filter(|(kind, _)| matches!(kind, Kind::Frames | Kind::Slices | Kind::Services))
            .all(|(kind, _)| self.followed.get(&kind).copied() == Some(true))
    }

    /// Kinds that were not listed in full yet, with whether their canary is still missing.
    pub fn missing(&self) -> impl Iterator<Item = (Kind, bool)> + '_ {
        self.wanted()
            .filter_map(|(kind, _)| match self.followed.get(&kind) {
                Some(true) => None,
                Some(false) => Some((kind, false)),
                None => Some((kind, true)),
            })
    }
}

/// The own cluster's frames and slices are those for local agents: all services, not only the exported ones.
fn scope_of(kind: Kind, scope: Scope) -> Scope {
    match (kind, scope) {
        (Kind::Frames | Kind::Slices, Scope::State) => Scope::Local,
        _ => scope,
    }
}

/// Why a cluster config is not followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConfigRefusal {
    /// The own cluster's config says something else than the agent's flags.
    #[error(
        "--cluster-id is {flag}, but the cluster config of {cluster} says {config}: the operator runs with another ID"
    )]
    OwnId {
        /// The own cluster.
        cluster: ClusterName,
        /// What the flag says.
        flag: ClusterId,
        /// What the config says.
        config: u32,
    },
    /// Two clusters claim one ID.
    #[error("cluster {cluster} says that it has ID {id}, which is the ID of cluster {holder}")]
    Duplicate {
        /// The refused cluster.
        cluster: ClusterName,
        /// The ID.
        id: ClusterId,
        /// Who has it.
        holder: ClusterName,
    },
    /// The ID does not fit the mesh.
    #[error("cluster {cluster} has no valid ID: {why}")]
    Id {
        /// The refused cluster.
        cluster: ClusterName,
        /// What is wrong.
        why: String,
    },
}

/// All clusters and their sources.
#[derive(Debug)]
pub struct Sources {
    own: ClusterName,
    own_id: ClusterId,
    max: MaxConnectedClusters,
    listed: bool,
    clusters: BTreeMap<ClusterName, Cluster>,
    /// Clusters that the API server mirrors or tries to, with their ID if it is known.
    statuses: BTreeMap<ClusterName, Option<ClusterId>>,
    statuses_listed: bool,
    /// Clusters that have joined and whose config is gone.
    config_gone: BTreeSet<ClusterName>,
    canaries: BTreeSet<(ClusterName, Kind, Scope)>,
    refused: BTreeMap<ClusterName, ConfigRefusal>,
    /// Configs that were refused for another cluster's ID: judged again when that one leaves. The two are told of by feeds of
    /// their own, so a cluster's new name may come before its old one is gone.
    waiting: BTreeMap<ClusterName, ClusterConfig>,
}

impl Sources {
    /// Nothing known yet.
    pub fn new(own: ClusterName, own_id: ClusterId, max: MaxConnectedClusters) -> Self {
        Self {
            own,
            own_id,
            max,
            listed: false,
            clusters: BTreeMap::new(),
            statuses: BTreeMap::new(),
            statuses_listed: false,
            config_gone: BTreeSet::new(),
            canaries: BTreeSet::new(),
            refused: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }

    /// A cluster's config was written. Each change of what is followed is an effect.
    pub fn on_config(&mut self, name: &ClusterName, config: &ClusterConfig) -> Vec<Effect> {
        let mut effects = self.judge(name, config);
        if effects.iter().any(|effect| matches!(effect, Effect::Drain(..))) {
            self.judge_waiting(&mut effects);
        }
        effects
    }

    /// An ID is free again: somebody may wait for it.
    fn judge_waiting(&mut self, effects: &mut Vec<Effect>) {
        for (name, config) in self.waiting.clone() {
            effects.extend(self.judge(&name, &config));
        }
    }

    fn judge(&mut self, name: &ClusterName, config: &ClusterConfig) -> Vec<Effect> {
        self.waiting.remove(name);
        let id = match self.check(name, config) {
            Ok(id) => id,
            Err(refusal) => {
                if matches!(refusal, ConfigRefusal::Duplicate { .. }) {
                    self.waiting.insert(name.clone(), config.clone());
                }
                self.refused.insert(name.clone(), refusal);
                return vec![];
            }
        };
        self.refused.remove(name);
        self.config_gone.remove(name);
        let mut effects = vec![];
        if self.clusters.get(name).is_some_and(|cluster| cluster.id != id) {
            effects.extend(self.drain(name));
        }
        let scope = if *name == self.own {
            Scope::State
        } else {
            Scope::Cache
        };
        let canaries = config.capabilities.synced_canaries;
        // The own operator is always one of ours.
        let slices = *name == self.own || config.has_slices();
        let cluster = self.clusters.entry(name.clone()).or_insert_with(|| {
            effects.push(Effect::Join(name.clone(), id));
            Cluster {
                id,
                slices,
                canaries,
                scope,
                followed: BTreeMap::new(),
            }
        });
        cluster.canaries = canaries;
        if cluster.slices != slices {
            cluster.slices = slices;
            let wanted: BTreeSet<Kind> = cluster.wanted().map(|(kind, _)| kind).collect();
            let dropped: Vec<Kind> = cluster
                .followed
                .keys()
                .filter(|kind| !wanted.contains(kind))
                .copied()
                .collect();
            for kind in dropped {
                cluster.followed.remove(&kind);
                effects.push(Effect::Unfollow(source(name, cluster, kind)));
            }
            effects.push(Effect::Reread(name.clone(), id));
        }
        self.follow_what_is_ready(name, &mut effects);
        effects
    }

    /// A cluster's config was deleted.
    pub fn on_config_gone(&mut self, name: &ClusterName) -> Vec<Effect> {
        self.refused.remove(name);
        self.waiting.remove(name);
        if *name != self.own && self.clusters.contains_key(name) {
            self.config_gone.insert(name.clone());
        }
        self.drain_if_out(name)
    }

    /// Every cluster config that exists has been seen.
    pub fn on_configs_listed(&mut self) {
        self.listed = true;
    }

    /// The API server mirrors this cluster, or tries to.
    pub fn on_status(&mut self, name: &ClusterName, id: u32) {
        self.statuses
            .insert(name.clone(), ClusterId::new(id, self.max).ok());
    }

    /// The API server no longer tries to mirror this cluster.
    pub fn on_status_gone(&mut self, name: &ClusterName) -> Vec<Effect> {
        self.statuses.remove(name);
        self.drain_if_out(name)
    }

    /// Every status that exists has been seen.
    pub fn on_statuses_listed(&mut self) -> Vec<Effect> {
        self.statuses_listed = true;
        let gone: Vec<ClusterName> = self.config_gone.iter().cloned().collect();
        gone.iter().flat_map(|name| self.drain_if_out(name)).collect()
    }

    fn drain_if_out(&mut self, name: &ClusterName) -> Vec<Effect> {
        let out =
            self.statuses_listed && !self.statuses.contains_key(name) && self.config_gone.contains(name);
        if !out {
            return vec![];
        }
        let mut effects = self.drain(name);
        self.judge_waiting(&mut effects);
        effects
    }

    /// A canary was written: the part of its key after `cilium/synced/`. Unknown ones are ignored, as Cilium does.
    pub fn on_canary(&mut self, suffix: &str) -> Vec<Effect> {
        let Some(canary) = parse_canary(suffix) else {
            return vec![];
        };
        let cluster = canary.0.clone();
        self.canaries.insert(canary);
        let mut effects = vec![];
        self.follow_what_is_ready(&cluster, &mut effects);
        effects
    }

    /// A canary was deleted. What is followed stays followed; the cluster's next incarnation waits for a new canary.
    pub fn on_canary_gone(&mut self, suffix: &str) {
        if let Some(canary) = parse_canary(suffix) {
            self.canaries.remove(&canary);
        }
    }

    /// A source was listed in full. False if it is not followed (any more).
    pub fn on_listed(&mut self, source: &Source) -> bool {
        let cluster = self.clusters.get_mut(&source.cluster);
        let Some(cluster) = cluster.filter(|cluster| cluster.id == source.cluster_id) else {
            return false;
        };
        match cluster.followed.get_mut(&source.kind) {
            Some(listed) => {
                *listed = true;
                true
            }
            None => false,
        }
    }

    /// The IDs of all clusters of the mesh, once they are all known: configs and statuses are listed, the own cluster is
    /// there, and every cluster that the API server tries to mirror has told its ID at some time.
    pub fn all_ids(&self) -> Option<BTreeSet<ClusterId>> {
        if !self.listed || !self.statuses_listed || !self.clusters.contains_key(&self.own) {
            return None;
        }
        let mut ids: BTreeSet<ClusterId> = self.clusters.values().map(|cluster| cluster.id).collect();
        for (name, id) in &self.statuses {
            match (self.clusters.get(name), id) {
                (Some(_), _) => {}
                (None, Some(id)) => {
                    ids.insert(*id);
                }
                (None, None) => return None,
            }
        }
        Some(ids)
    }

    /// Whether configs and statuses were listed in full, and the own cluster is there.
    pub fn is_listed(&self) -> bool {
        self.listed && self.statuses_listed && self.clusters.contains_key(&self.own)
    }

    /// Whether the cluster's config is missing although it is still meant to be part of the mesh.
    pub fn is_config_gone(&self, name: &ClusterName) -> bool {
        self.config_gone.contains(name)
    }

    /// The own cluster, once its config is there.
    pub fn own(&self) -> Option<&Cluster> {
        self.clusters.get(&self.own)
    }

    /// All clusters, by name.
    pub fn clusters(&self) -> impl Iterator<Item = (&ClusterName, &Cluster)> {
        self.clusters.iter()
    }

    /// All clusters but the own one.
    pub fn remotes(&self) -> impl Iterator<Item = (&ClusterName, &Cluster)> {
        self.clusters.iter().filter(|(name, _)| **name != self.own)
    }

    /// Clusters whose config was refused, and why.
    pub fn refused(&self) -> &BTreeMap<ClusterName, ConfigRefusal> {
        &self.refused
    }

    fn check(&self, name: &ClusterName, config: &ClusterConfig) -> Result<ClusterId, ConfigRefusal> {
        let id = config.cluster_id(self.max).map_err(|error| ConfigRefusal::Id {
            cluster: name.clone(),
            why: error.to_string(),
        })?;
        if *name == self.own {
            return if id == self.own_id {
                Ok(id)
            } else {
                Err(ConfigRefusal::OwnId {
                    cluster: name.clone(),
                    flag: self.own_id,
                    config: config.id,
                })
            };
        }
        let holder = if id == self.own_id {
            Some(&self.own)
        } else {
            self.clusters
                .iter()
                .find(|(other, cluster)| *other != name && cluster.id == id)
                .map(|(other, _)| other)
        };
        match holder {
            None => Ok(id),
            Some(holder) => Err(ConfigRefusal::Duplicate {
                cluster: name.clone(),
                id,
                holder: holder.clone(),
            }),
        }
    }

    fn drain(&mut self, name: &ClusterName) -> Vec<Effect> {
        // Nobody will tell about its canaries any more; when it joins again they are listed again.
        self.canaries.retain(|(cluster, ..)| cluster != name);
        self.config_gone.remove(name);
        let Some(cluster) = self.clusters.remove(name) else {
            return vec![];
        };
        let mut effects: Vec<Effect> = cluster
            .followed
            .keys()
            .map(|kind| Effect::Unfollow(source(name, &cluster, *kind)))
            .collect();
        effects.push(Effect::Drain(name.clone(), cluster.id));
        effects
    }

    fn follow_what_is_ready(&mut self, name: &ClusterName, effects: &mut Vec<Effect>) {
        let Some(cluster) = self.clusters.get_mut(name) else {
            return;
        };
        let ready: Vec<Kind> = cluster
            .wanted()
            .filter(|(kind, scope)| {
                !cluster.followed.contains_key(kind)
                    && (!cluster.canaries || self.canaries.contains(&(name.clone(), *kind, *scope)))
            })
            .map(|(kind, _)| kind)
            .collect();
        for kind in ready {
            cluster.followed.insert(kind, false);
            effects.push(Effect::Follow(source(name, cluster, kind)));
        }
    }
}

fn parse_canary(suffix: &str) -> Option<(ClusterName, Kind, Scope)> {
    let (cluster, base) = suffix.split_once('/')?;
    let cluster = ClusterName::new(cluster).ok()?;
    Kind::ALL.into_iter().find_map(|kind| {
        [Scope::State, Scope::Cache, Scope::Local]
            .into_iter()
            .find(|scope| kind.base_prefix(*scope) == Some(base))
            .map(|scope| (cluster.clone(), kind, scope))
    })
}

fn source(name: &ClusterName, cluster: &Cluster, kind: Kind) -> Source {
    Source {
        cluster: name.clone(),
        cluster_id: cluster.id,
        kind,
        scope: scope_of(kind, cluster.scope),
    }
}

#[cfg(test)]
mod tests;
