//! OpenAPI documents, as far as kubectl needs them: which kinds take server-side dry run and field validation.
//!
//! The v2 document has no definitions: kubectl then leaves validation to the server and merges built-in kinds by its own
//! types. It lists the patch operations, by which older versions find out about dry run. The v3 documents do the same.

use std::sync::Arc;

use axum::response::Response;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::accept::Accept;
use super::{bytes_response, discovery, json_response};
use crate::kind::Kind;

/// `/openapi/v2`.
pub fn v2(kinds: &[Arc<Kind>], accept: &Accept) -> Response {
    if *accept == Accept::OpenApiProtobuf {
        let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return bytes_response(StatusCode::OK, content_type, v2_protobuf(kinds).into());
    }
    let document = json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": ""}, "paths": {}, "definitions": {}});
    json_response(StatusCode::OK, &document)
}

/// The v2 document in gnostic's protobuf form: a path per kind with a patch operation that takes `dryRun`.
fn v2_protobuf(kinds: &[Arc<Kind>]) -> Vec<u8> {
    // Document.paths is field 8, Paths.path 2, PathItem.patch 8, Operation.parameters 8 and .vendor_extension 13.
    let parameter = nested(&[1, 2, 3], field(4, b"dryRun"));
    let paths = kinds.iter().flat_map(|kind| {
        let yaml = format!(
            "group: {:?}\nkind: {}\nversion: {}\n",
            kind.group, kind.kind, kind.version
        );
        let name = field(1, b"x-kubernetes-group-version-kind");
        let extension = [name, field(2, &field(2, yaml.as_bytes()))].concat();
        let operation = [field(8, &parameter), field(13, &extension)].concat();
        let path = format!("{}/{}/{{name}}", discovery::root_of(kind), kind.plural);
        field(
            2,
            &[field(1, path.as_bytes()), field(2, &field(8, &operation))].concat(),
        )
    });
    [field(1, b"2.0"), field(8, &paths.collect::<Vec<u8>>())].concat()
}

/// A message in a message for each number, the first one outermost.
fn nested(numbers: &[u8], inner: Vec<u8>) -> Vec<u8> {
    numbers
        .iter()
        .rev()
        .fold(inner, |inner, number| field(*number, &inner))
}

/// A length-delimited field; the number is below 16.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut len = bytes.len();
    while len > 0x7f {
        out.push((len & 0x7f) as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(bytes);
    out
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
