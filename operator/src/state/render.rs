//! Units to keys and values.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use isthmus_k8s::service;
use isthmus_model::{IpEntry, Slice};
use isthmus_wire::{identity, ip, keys, node, service as blob, slice};

use super::{ObjectKey, State, Unit};

type Pairs = Vec<(Bytes, Bytes)>;

impl State {
    /// Everything that is desired now, computed anew from the tables and the allocator.
    pub fn everything(&self) -> BTreeMap<Bytes, Bytes> {
        if self.allocator.is_none() {
            return BTreeMap::new();
        }
        let mut units = self.units();
        let numbers = self.allocator.iter().flat_map(|allocator| allocator.numbers());
        units.extend(numbers.map(Unit::Identity));
        units.iter().flat_map(|unit| self.render(unit)).collect()
    }

    /// All units but identities.
    pub(super) fn units(&self) -> BTreeSet<Unit> {
        let services = self.services.keys().cloned();
        let mut units: BTreeSet<Unit> = services
            .flat_map(|key| [Unit::Frame(key.clone()), Unit::Blob(key)])
            .collect();
        units.extend(self.slices.keys().cloned().map(Unit::Slice));
        units.extend(self.nodes.keys().cloned().map(Unit::Node));
        units.extend(self.claims.keys().copied().map(Unit::Ip));
        units
    }

    /// The keys and values that a unit decides on.
    pub(super) fn render(&self, unit: &Unit) -> Pairs {
        match unit {
            Unit::Identity(number) => {
                let labels = self
                    .allocator
                    .as_ref()
                    .and_then(|allocator| allocator.labels(*number));
                let pair =
                    labels.map(|labels| pair(&self.prefixes.identities, number, identity::encode(labels)));
                pair.into_iter().collect()
            }
            Unit::Ip(address) => {
                let pair = self.entry(address).map(|entry| {
                    pair(
                        &self.prefixes.ip,
                        ip::key_suffix(entry.prefix),
                        ip::encode(&entry),
                    )
                });
                pair.into_iter().collect()
            }
            Unit::Node(key) => {
                let pair = self
                    .nodes
                    .get(key)
                    .map(|value| pair(&self.prefixes.nodes, &value.name, node::encode(value)));
                pair.into_iter().collect()
            }
            Unit::Slice(key) => self.render_slice(key),
            Unit::Frame(key) => self.render_frame(key),
            Unit::Blob(key) => self.render_blob(key),
        }
    }

    /// What an address means: of the pods that claim it, the one that stays has it.
    fn entry(&self, address: &std::net::IpAddr) -> Option<IpEntry> {
        let claims = self.claims.get(address)?;
        let mut workloads = claims.iter().filter_map(|key| Some((key, self.pods.get(key)?)));
        let (key, workload) = if claims.len() == 1 {
            workloads.next()
        } else {
            workloads.max_by_key(|(_, workload)| workload.claim())
        }?;
        Some(workload.entry(*address, *self.assigned.get(key)?))
    }

    fn render_slice(&self, key: &ObjectKey) -> Pairs {
        let Some(packed) = self.slices.get(key) else {
            return vec![];
        };
        let service = ObjectKey {
            namespace: packed.service.namespace.clone(),
            name: packed.service.name.clone(),
        };
        let Some(frame) = self.services.get(&service) else {
            return vec![];
        };
        let exported = service::is_exported(frame);
        let mut pairs = Vec::with_capacity(packed.slices.len() * 2);
        for part in &packed.slices {
            let suffix = keys::slice_suffix(&part.service, &part.slice);
            let value = Bytes::from(slice::encode_slice(part));
            pairs.push(pair(&self.prefixes.slices_local, &suffix, value.clone()));
            if exported {
                pairs.push(pair(&self.prefixes.slices, &suffix, value));
            }
        }
        pairs
    }

    fn render_frame(&self, key: &ObjectKey) -> Pairs {
        let Some(frame) = self.services.get(key) else {
            return vec![];
        };
        let suffix = keys::service_suffix(&frame.name);
        let value = Bytes::from(slice::encode_frame(frame));
        let mut pairs = vec![pair(&self.prefixes.frames_local, &suffix, value.clone())];
        if service::is_exported(frame) {
            pairs.push(pair(&self.prefixes.frames, &suffix, value));
        }
        pairs
    }

    fn render_blob(&self, key: &ObjectKey) -> Pairs {
        let frame = self.services.get(key).filter(|frame| service::is_exported(frame));
        let Some(frame) = frame.filter(|_| self.settings.cilium_services) else {
            return vec![];
        };
        let slices = self.slices_of.get(key).into_iter().flatten();
        let parts = slices
            .filter_map(|slice| self.slices.get(slice))
            .flat_map(|packed| &packed.slices)
            .collect::<Vec<&Slice>>();
        let value = blob::encode(frame, parts);
        vec![pair(
            &self.prefixes.services,
            keys::service_suffix(&frame.name),
            value,
        )]
    }
}

fn pair(prefix: &str, suffix: impl std::fmt::Display, value: impl Into<Bytes>) -> (Bytes, Bytes) {
    (format!("{prefix}{suffix}").into(), value.into())
}
