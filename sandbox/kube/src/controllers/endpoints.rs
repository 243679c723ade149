//! EndpointSlices: for each Service with a selector, the addresses of its pods.
//!
//! [`slices`] decides, without I/O; here it is fed and its plan is written. A change of a pod's readiness reaches the
//! slice in the same round, without a batching delay.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Controller, Name, ignore_gone};
use crate::api::{Client, ListOptions, WriteOptions};
use crate::error::ApiError;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::selector::LabelSelector;
use crate::store::{Event, EventKind};

pub mod slices;

const SLICES: &str = "endpointslices.discovery.k8s.io";

/// See the module's header.
pub struct EndpointSlices;

impl Controller for EndpointSlices {
    /// A service.
    type Key = Name;
    const NAME: &'static str = "endpoint slices";
    const RESOURCES: &'static [&'static str] = &["services", "pods", "nodes", SLICES];

    fn all(&mut self, client: &Client) -> BTreeSet<Name> {
        let key = |o: &Value| (meta::namespace(o).to_owned(), meta::name(o).to_owned());
        let mut keys: BTreeSet<Name> = client
            .all("services", None)
            .iter()
            .map(|s| key(s.value()))
            .collect();
        keys.extend(
            client
                .all(SLICES, None)
                .iter()
                .filter_map(|s| slices::service_of(s.value())),
        );
        keys
    }

    fn affected(&mut self, client: &Client, event: &Event, keys: &mut BTreeSet<Name>) {
        let object = event.object.value();
        match event.key.resource.as_str() {
            "services" => {
                keys.insert((event.key.namespace.clone(), event.key.name.clone()));
            }
            "pods" => {
                let before = event.previous.as_ref().map(|o| o.value());
                if event.kind == EventKind::Modified && before.is_some_and(|b| slices::looks_same(b, object))
                {
                    return;
                }
                for service in client.all("services", Some(&event.key.namespace)) {
                    let service = service.value();
                    let selector = LabelSelector::from_map(meta::at(service, &["spec", "selector"]));
                    if !selector.is_empty()
                        && (selector.matches(object) || before.is_some_and(|b| selector.matches(b)))
                    {
                        keys.insert((event.key.namespace.clone(), meta::name(service).to_owned()));
                    }
                }
            }
            "nodes" => {
                let before = event
                    .previous
                    .as_ref()
                    .map(|o| slices::zone_of(o.value()).to_owned());
                if before.as_deref() != Some(slices::zone_of(object)) {
                    keys.extend(self.all(client));
                }
            }
            // Someone else's edit of one of our slices is undone.
            _ => keys.extend(slices::service_of(object)),
        }
    }

    fn reconcile(&mut self, client: &Client, (namespace, name): &Name) -> Result<(), ApiError> {
        let Some(service) = client.find("services", namespace, name) else {
            // The garbage collector takes the slices of a service that is gone.
            return Ok(());
        };
        let service = service.value();
        if meta::is_terminating(service) {
            return Ok(());
        }
        let selector = LabelSelector::from_map(meta::at(service, &["spec", "selector"]));
        if selector.is_empty() {
            return Ok(());
        }
        let options = ListOptions {
            labels: selector,
            ..ListOptions::default()
        };
        let pods = client.list("pods", Some(namespace), &options)?.items;
        let pods: Vec<&Value> = pods.iter().map(|pod| pod.value()).collect();
        let nodes = client.all("nodes", None);
        let zones: BTreeMap<&str, &str> = nodes
            .iter()
            .map(|node| (meta::name(node.value()), slices::zone_of(node.value())))
            .collect();
        let existing = client.all(SLICES, Some(namespace));
        let existing: Vec<&Value> = existing
            .iter()
            .map(|slice| slice.value())
            .filter(|s| slices::is_of(s, name))
            .collect();
        let plan = slices::plan(service, &pods, &zones, &existing);
        for slice in plan.create {
            client.create(SLICES, namespace, slice)?;
        }
        for slice in plan.update {
            let slice_name = meta::name(&slice).to_owned();
            let options = WriteOptions {
                part: Part::Main,
                ..WriteOptions::default()
            };
            ignore_gone(client.update(SLICES, namespace, &slice_name, slice, &options))?;
        }
        for slice in plan.delete {
            ignore_gone(client.delete(SLICES, namespace, &slice, &DeleteOptions::default()))?;
        }
        Ok(())
    }
}
