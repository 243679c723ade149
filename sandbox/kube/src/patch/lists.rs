//! Which lists of an object merge, and by which keys.
//!
//! For built-in kinds the rules of the API types are a table by field name and the name of the field around it; for
//! custom kinds they are read from the schema (`x-kubernetes-list-type`). A [`Cursor`] walks an object beside its rules.

use serde_json::Value;

use crate::kind::Kind;
use crate::meta;

/// How a list merges under server-side apply.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ListType {
    /// Replaced as a whole.
    Atomic,
    /// A set of scalars.
    Set,
    /// Objects found by these fields.
    Map(Vec<String>),
}

/// How a list merges under strategic merge patch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Strategic {
    /// Replaced as a whole.
    Replace,
    /// Scalars are added.
    Scalars,
    /// Objects found by this field.
    Key(&'static str),
}

/// A place in an object with the rules that hold there.
#[derive(Clone, Copy, Debug)]
pub enum Cursor<'a> {
    /// In a built-in kind: its storage name, the field and the field around it.
    Builtin {
        /// For example `services`.
        storage: &'a str,
        /// The field around this one, "" at the top.
        parent: &'a str,
        /// This field, "" at the top.
        field: &'a str,
    },
    /// In a custom kind: its schema here, null where it says nothing.
    Custom {
        /// The schema.
        schema: &'a Value,
        /// Whether this is the top of the object.
        root: bool,
    },
}

impl<'a> Cursor<'a> {
    /// The top of an object of this kind.
    pub fn root(kind: &'a Kind) -> Cursor<'a> {
        match &kind.custom {
            Some(custom) => Cursor::Custom {
                schema: &custom.schema,
                root: true,
            },
            None => Cursor::Builtin {
                storage: kind.storage.as_str(),
                parent: "",
                field: "",
            },
        }
    }

    /// The field `name` of the map here.
    pub fn child(self, name: &'a str) -> Cursor<'a> {
        match self {
            Cursor::Builtin { storage, field, .. } => Cursor::Builtin {
                storage,
                parent: field,
                field: name,
            },
            Cursor::Custom { root: true, .. } if name == "metadata" => Cursor::Builtin {
                storage: "",
                parent: "",
                field: name,
            },
            Cursor::Custom { schema, .. } => {
                let property = schema.get("properties").and_then(|p| p.get(name));
                let property = property.or_else(|| schema.get("additionalProperties"));
                Cursor::Custom {
                    schema: property.unwrap_or(&Value::Null),
                    root: false,
                }
            }
        }
    }

    /// An item of the list here. Fields of the item have the list's name around them.
    pub fn item(self) -> Cursor<'a> {
        match self {
            Cursor::Builtin { .. } => self,
            Cursor::Custom { schema, .. } => Cursor::Custom {
                schema: schema.get("items").unwrap_or(&Value::Null),
                root: false,
            },
        }
    }

    /// How the list here merges under server-side apply.
    pub fn list_type(self) -> ListType {
        match self {
            Cursor::Builtin {
                storage,
                parent,
                field,
            } => match (builtin(storage, parent, field), parent, field) {
                (_, "containers" | "initContainers" | "ephemeralContainers", "ports") => {
                    keys(&["containerPort", "protocol"])
                }
                (_, "spec", "ports") if storage == "services" => keys(&["port", "protocol"]),
                (_, _, "topologySpreadConstraints") => keys(&["topologyKey", "whenUnsatisfiable"]),
                (Strategic::Key(key), _, _) => keys(&[key]),
                (Strategic::Scalars, _, _) => ListType::Set,
                (Strategic::Replace, _, _) => ListType::Atomic,
            },
            Cursor::Custom { schema, .. } => match meta::str_at(schema, &["x-kubernetes-list-type"]) {
                "set" => ListType::Set,
                "map" => ListType::Map(
                    meta::list_at(schema, &["x-kubernetes-list-map-keys"])
                        .iter()
                        .filter_map(|key| key.as_str().map(str::to_owned))
                        .collect(),
                ),
                _ => ListType::Atomic,
            },
        }
    }

    /// Whether the map here is replaced as a whole under server-side apply.
    pub fn map_is_atomic(self) -> bool {
        match self {
            Cursor::Builtin { field, .. } => matches!(
                field,
                "selector"
                    | "nodeSelector"
                    | "labelSelector"
                    | "namespaceSelector"
                    | "podSelector"
                    | "resourceFieldRef"
                    | "fieldRef"
                    | "secretKeyRef"
                    | "configMapKeyRef"
                    | "claimRef"
                    | "targetRef"
                    | "involvedObject"
            ),
            Cursor::Custom { schema, .. } => meta::str_at(schema, &["x-kubernetes-map-type"]) == "atomic",
        }
    }

    /// How the list here merges under strategic merge patch.
    pub fn strategic(self) -> Strategic {
        match self {
            Cursor::Builtin {
                storage,
                parent,
                field,
            } => builtin(storage, parent, field),
            Cursor::Custom { .. } => Strategic::Replace,
        }
    }
}

fn keys(keys: &[&str]) -> ListType {
    ListType::Map(keys.iter().map(|&key| key.to_owned()).collect())
}

fn builtin(storage: &str, parent: &str, field: &str) -> Strategic {
    let of_container = matches!(parent, "containers" | "initContainers" | "ephemeralContainers");
    match field {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "imagePullSecrets"
        | "webhooks"
        | "schedulingGates"
        | "resourceClaims" => Strategic::Key("name"),
        "env" if of_container => Strategic::Key("name"),
        "ports" if of_container => Strategic::Key("containerPort"),
        "volumeMounts" if of_container => Strategic::Key("mountPath"),
        "volumeDevices" if of_container => Strategic::Key("devicePath"),
        "ports" if storage == "services" && parent == "spec" => Strategic::Key("port"),
        "conditions" if parent == "status" => Strategic::Key("type"),
        "addresses" if storage == "nodes" => Strategic::Key("type"),
        "taints" if storage == "nodes" => Strategic::Key("key"),
        "podIPs" | "hostIPs" | "hostAliases" => Strategic::Key("ip"),
        "topologySpreadConstraints" => Strategic::Key("topologyKey"),
        "ownerReferences" if parent == "metadata" => Strategic::Key("uid"),
        "secrets" if storage == "serviceaccounts" => Strategic::Key("name"),
        "finalizers" if matches!(parent, "metadata" | "spec") => Strategic::Scalars,
        "podCIDRs" if storage == "nodes" => Strategic::Scalars,
        _ => Strategic::Replace,
    }
}
