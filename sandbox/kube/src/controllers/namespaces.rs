//! Namespaces: a new one gets its default service account, one that is being deleted is emptied and then goes.

use std::collections::BTreeSet;

use serde_json::json;

use super::{Controller, ignore_gone};
use crate::api::{Client, namespaced_resources};
use crate::error::ApiError;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::store::{Event, EventKind};

/// See the module's header.
pub struct Namespaces;

impl Controller for Namespaces {
    type Key = String;
    const NAME: &'static str = "namespaces";
    const RESOURCES: &'static [&'static str] = &[];

    fn all(&mut self, client: &Client) -> BTreeSet<String> {
        client
            .all("namespaces", None)
            .iter()
            .map(|ns| meta::name(ns.value()).to_owned())
            .collect()
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<String>) {
        if event.key.resource.as_str() == "namespaces" {
            keys.insert(event.key.name.clone());
        } else if event.kind == EventKind::Deleted && !event.key.namespace.is_empty() {
            // The last object of a namespace may have gone, or its service account.
            keys.insert(event.key.namespace.clone());
        }
    }

    fn reconcile(&mut self, client: &Client, name: &String) -> Result<(), ApiError> {
        let Some(namespace) = client.find("namespaces", "", name) else {
            return Ok(());
        };
        if !meta::is_terminating(namespace.value()) {
            if client.find("serviceaccounts", name, "default").is_none() {
                let created =
                    client.create("serviceaccounts", name, json!({"metadata": {"name": "default"}}));
                return ignore_gone(
                    created
                        .map(|_| ())
                        .or_else(|e| if e.code == 409 { Ok(()) } else { Err(e) }),
                );
            }
            return Ok(());
        }
        let resources = namespaced_resources(&client.api().state());
        let mut left = 0;
        for resource in resources {
            for object in client.all(resource.as_str(), Some(name)) {
                let object = meta::name(object.value());
                ignore_gone(client.delete(resource.as_str(), name, object, &DeleteOptions::default()))?;
            }
            left += client.all(resource.as_str(), Some(name)).len();
        }
        if left > 0 {
            // Each object that goes brings us back here.
            return Ok(());
        }
        ignore_gone(client.modify("namespaces", "", name, Part::Whole, |ns| {
            ns["spec"]["finalizers"] = json!([]);
        }))
    }
}
