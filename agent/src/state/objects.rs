//! Objects of clusters into the merges: nodes, addresses, identities, services; and what "listed in full" means for each.
//!
//! In: decoded objects and their names. Out: changed merges. Services of a cluster that changes their form are held back
//! until the new form is listed, and then swapped for the old ones between two drains.

use isthmus_mesh::{Source as MeshSource, SourceTable};
use isthmus_model::ClusterId;
use isthmus_wire::keys::Kind;

use super::State;
use crate::{
    decode::{Object, ObjectName, Source},
    node::LocalNode,
};

/// A change that waits for the new form to be listed.
#[derive(Debug)]
pub(super) enum Buffered {
    Put(Box<Object>),
    Gone(ObjectName),
}

/// Kubernetes' label for a node's zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl State {
    pub(super) fn on_listed(&mut self, source: &Source) {
        match source.kind {
            Kind::Nodes => {
                self.table_synced(source.cluster_id, SourceTable::Nodes);
                self.routes_changed = true;
            }
            Kind::Ip => {
                self.table_synced(source.cluster_id, SourceTable::IpEntries);
                self.routes_changed = true;
            }
            Kind::Identities => {}
            Kind::Frames | Kind::Slices | Kind::Services => {
                if self.rereading.contains_key(&source.cluster) {
                    self.finish_reread(source);
                    return;
                }
                match source.kind {
                    Kind::Frames => self.table_synced(source.cluster_id, SourceTable::Frames),
                    Kind::Slices => self.table_synced(source.cluster_id, SourceTable::Slices),
                    _ => {
                        self.table_synced(source.cluster_id, SourceTable::Frames);
                        self.table_synced(source.cluster_id, SourceTable::Slices);
                    }
                }
            }
        }
    }

    pub(super) fn table_synced(&mut self, cluster: ClusterId, table: SourceTable) {
        let source = MeshSource { cluster, table };
        self.lb.source_synced(source);
        self.ipcache.source_synced(source);
        self.routes.source_synced(source);
    }

    /// Swaps a cluster's services for what was read in the new form, once that is listed in full. Between two drains,
    /// so that backends which both forms name are not touched.
    pub(super) fn finish_reread(&mut self, source: &Source) {
        let listed = self
            .sources
            .clusters()
            .any(|(name, cluster)| *name == source.cluster && cluster.services_listed());
        if !listed {
            return;
        }
        let buffered = self.rereading.remove(&source.cluster).unwrap_or_default();
        self.lb.cluster_removed(source.cluster_id);
        self.json_slices
            .retain(|(cluster, _), _| *cluster != source.cluster);
        for change in buffered {
            match change {
                Buffered::Put(object) => self.put(source, *object),
                Buffered::Gone(name) => self.gone(source, name),
            }
        }
        self.tell_clusters();
        self.table_synced(source.cluster_id, SourceTable::Frames);
        self.table_synced(source.cluster_id, SourceTable::Slices);
    }

    pub(super) fn put_or_buffer(&mut self, source: &Source, object: Object) {
        match self.rereading.get_mut(&source.cluster) {
            Some(buffer) if is_service(source.kind) => buffer.push(Buffered::Put(Box::new(object))),
            _ => self.put(source, object),
        }
    }

    pub(super) fn gone_or_buffer(&mut self, source: &Source, name: ObjectName) {
        match self.rereading.get_mut(&source.cluster) {
            Some(buffer) if is_service(source.kind) => buffer.push(Buffered::Gone(name)),
            _ => self.gone(source, name),
        }
    }

    pub(super) fn put(&mut self, source: &Source, object: Object) {
        let own = source.cluster == self.identity.cluster;
        match object {
            Object::Node(node) => {
                self.ipcache.upsert_node(&node);
                self.routes.upsert_node(&node);
                self.routes_changed = true;
                if own && node.name == self.identity.node {
                    let local = LocalNode::new(&node);
                    if let Ok(local) = &local {
                        self.lb.set_node_addresses(local.addresses.iter().copied());
                    }
                    self.lb
                        .set_zone(node.labels.get(ZONE_LABEL).map_or("", String::as_str));
                    self.local.set_node(local);
                }
                self.nodes
                    .insert((source.cluster.clone(), node.name.clone()), node);
            }
            Object::Ip(entry) => {
                self.ipcache.upsert_entry(source.cluster_id, &entry);
                if own {
                    self.local.set_identity(entry.prefix, Some(entry.identity));
                }
            }
            Object::Identity(number, labels) => {
                self.identities.insert(number, labels);
            }
            Object::Frame(frame) => {
                if own && frame.global {
                    self.global.insert(frame.name.clone());
                } else if own {
                    self.global.remove(&frame.name);
                }
                self.lb.upsert_frame(&frame);
            }
            Object::Slice(slice) => self.lb.upsert_slice(&slice),
            Object::Service(frame, slices) => {
                let key = (source.cluster.clone(), frame.name.clone());
                let before = self.json_slices.insert(key, slices.len()).unwrap_or(0);
                self.lb.upsert_frame(&frame);
                for slice in &slices {
                    self.lb.upsert_slice(slice);
                }
                for number in slices.len()..before {
                    self.lb
                        .delete_slice(source.cluster_id, &frame.name, &json_slice(number));
                }
            }
        }
    }

    pub(super) fn gone(&mut self, source: &Source, name: ObjectName) {
        let own = source.cluster == self.identity.cluster;
        match name {
            ObjectName::Node(name) => {
                // This node's own object comes back with the operator; until then the node works on what it was told.
                if own && name == self.identity.node {
                    return;
                }
                self.ipcache.delete_node(source.cluster_id, &name);
                self.routes.delete_node(source.cluster_id, &name);
                self.routes_changed = true;
                self.nodes.remove(&(source.cluster.clone(), name));
            }
            ObjectName::Ip(prefix) => {
                self.ipcache.delete_entry(source.cluster_id, prefix);
                if own {
                    self.local.set_identity(prefix, None);
                }
            }
            ObjectName::Identity(number) => {
                self.identities.remove(&number);
            }
            ObjectName::Service(name) => {
                self.lb.delete_frame(source.cluster_id, &name);
                if own {
                    self.global.remove(&name);
                }
                let key = (source.cluster.clone(), name);
                for number in 0..self.json_slices.remove(&key).unwrap_or(0) {
                    self.lb
                        .delete_slice(source.cluster_id, &key.1, &json_slice(number));
                }
            }
            ObjectName::Slice(service, slice) => self.lb.delete_slice(source.cluster_id, &service, &slice),
        }
    }
}

fn is_service(kind: Kind) -> bool {
    matches!(kind, Kind::Frames | Kind::Slices | Kind::Services)
}

/// The name that `wire` gives to the n-th slice of a service in Cilium's form.
fn json_slice(number: usize) -> String {
    format!("json-{number}")
}
