//! OpenAPI documents, as far as kubectl needs them: which kinds take server-side dry run and field validation.
//!
//! The v2 document is empty: kubectl then leaves validation to the server and merges built-in kinds by its own types.
//! The v3 documents list the patch operation of each kind.

use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::accept::Accept;
use super::{bytes_response, discovery, json_response};
use crate::kind::Kind;

/// `/openapi/v2`.
pub fn v2(accept: &Accept) -> Response {
    if *accept == Accept::OpenApiProtobuf {
        // An empty message is a valid protobuf document.
        let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return bytes_response(StatusCode::OK, content_type, Bytes::new());
    }
    let document = json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": ""}, "paths": {}, "definitions": {}});
    json_response(StatusCode::OK, &document)
}

/// `/openapi/v3`.
pub fn v3_index(kinds: &[Arc<Kind>]) -> Value {
    let mut paths = Map::new();
    for kind in kinds {
        let root = discovery::root_of(kind);
        let key = root.trim_start_matches('/').to_owned();
        paths
            .entry(key)
            .or_insert_with(|| json!({"serverRelativeURL": format!("/openapi/v3{root}")}));
    }
    json!({"paths": paths})
}

/// `/openapi/v3/<path of a group's version>`.
pub fn v3(kinds: &[Arc<Kind>], path: &[&str]) -> Option<Value> {
    let want = format!("/{}", path.join("/"));
    let found: Vec<&Arc<Kind>> = kinds
        .iter()
        .filter(|kind| discovery::root_of(kind) == want)
        .collect();
    if found.is_empty() {
        return None;
    }
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for kind in found {
        let scope = if kind.namespaced {
            "/namespaces/{namespace}"
        } else {
            ""
        };
        let type_name = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
        let parameters: Vec<Value> = ["dryRun", "fieldManager", "fieldValidation", "force"]
            .iter()
            .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
            .collect();
        let operation = |action: &str| {
            json!({
                "parameters": parameters,
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": type_name,
            })
        };
        let collection = format!("{want}{scope}/{}", kind.plural);
        paths.insert(
            format!("{collection}/{{name}}"),
            json!({"patch": operation("patch"), "put": operation("put")}),
        );
        paths.insert(collection, json!({"post": operation("post")}));
        let schema = kind
            .custom
            .as_ref()
            .map(|c| c.schema.clone())
            .filter(Value::is_object);
        let mut schema = schema.unwrap_or_else(|| json!({"type": "object"}));
        schema["x-kubernetes-group-version-kind"] = json!([type_name]);
        let name = format!("{}.{}.{}", kind.group, kind.version, kind.kind);
        schemas.insert(name.trim_start_matches('.').to_owned(), schema);
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": ""},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}
