//! The verbs on resources, objects and subresources.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::accept::Accept;
use super::path::ResourcePath;
use super::{Call, Shell, bytes_response, json_response, pods, scale, stream, table};
use crate::api::{Deleted, ListOptions, WatchOptions, Watcher, WriteOptions};
use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;
use crate::patch::{self, Patch};
use crate::rules::{DeleteOptions, Part, Propagation};
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::Object;

pub async fn handle(shell: &Shell, path: &ResourcePath, call: &Call) -> Result<Response, ApiError> {
    let kind = shell
        .api
        .kind(&path.group, &path.version, &path.plural)
        .ok_or_else(ApiError::unknown_path)?;
    if path.namespace.is_some() && !kind.namespaced {
        return Err(ApiError::unknown_path());
    }
    let namespace = path.namespace.as_deref();
    let Some(name) = path.name.as_deref() else {
        return collection(shell, &kind, namespace, path.watch, call);
    };
    if kind.namespaced && namespace.is_none() {
        return Err(ApiError::unknown_path());
    }
    let namespace = namespace.unwrap_or("");
    match path.subresource.as_deref() {
        None if path.watch => collection(shell, &kind, path.namespace.as_deref(), true, call),
        None => object(shell, &kind, namespace, name, Part::Main, "", call),
        Some("status") if kind.subresources.status => {
            object(shell, &kind, namespace, name, Part::Status, "status", call)
        }
        Some("scale") if kind.subresources.scale => scale_of(shell, &kind, namespace, name, call),
        Some("log") if kind.storage.as_str() == "pods" => {
            pods::log(shell, &kind, namespace, name, call).await
        }
        Some("eviction") if kind.storage.as_str() == "pods" => {
            pods::evict(shell, &kind, namespace, name, call)
        }
        Some("binding") if kind.storage.as_str() == "pods" => pods::bind(shell, &kind, namespace, name, call),
        Some("finalize") if kind.storage.as_str() == "namespaces" => finalize(shell, &kind, name, call),
        Some(_) => Err(ApiError::unknown_path()),
    }
}

fn collection(
    shell: &Shell,
    kind: &Arc<Kind>,
    namespace: Option<&str>,
    watch: bool,
    call: &Call,
) -> Result<Response, ApiError> {
    match call.method {
        Method::GET if watch || call.query.flag("watch") => start_watch(shell, kind, namespace, call),
        Method::GET => list(shell, kind, namespace, call),
        Method::POST if kind.virtual_only => review(kind, call),
        Method::POST => {
            if kind.namespaced && namespace.is_none() {
                return Err(ApiError::method_not_allowed());
            }
            let options = write_options(call, Part::Main, "")?;
            let created = shell
                .api
                .create(kind, namespace.unwrap_or(""), call.object()?, &options)?;
            Ok(object_response(kind, &created, StatusCode::CREATED, call))
        }
        Method::DELETE => delete_collection(shell, kind, namespace, call),
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn object(
    shell: &Shell,
    kind: &Kind,
    namespace: &str,
    name: &str,
    part: Part,
    subresource: &'static str,
    call: &Call,
) -> Result<Response, ApiError> {
    let api = &shell.api;
    match call.method {
        Method::GET => Ok(object_response(
            kind,
            &api.get(kind, namespace, name)?,
            StatusCode::OK,
            call,
        )),
        Method::PUT => {
            let options = write_options(call, part, subresource)?;
            let updated = api.update(kind, namespace, name, call.object()?, &options)?;
            Ok(object_response(kind, &updated, StatusCode::OK, call))
        }
        Method::PATCH => {
            let options = write_options(call, part, subresource)?;
            let written = api.patch(kind, namespace, name, &read_patch(call)?, &options)?;
            let status = if written.created {
                StatusCode::CREATED
            } else {
                StatusCode::OK
            };
            Ok(object_response(kind, &written.object, status, call))
        }
        Method::DELETE if part == Part::Main => {
            let options = delete_options(&call.optional_object()?, call)?;
            match api.delete(kind, namespace, name, &options)? {
                Deleted::Removed(object) if kind.storage.as_str() != "pods" => Ok(json_response(
                    StatusCode::OK,
                    &deleted_status(kind, object.value()),
                )),
                deleted => Ok(object_response(kind, deleted.object(), StatusCode::OK, call)),
            }
        }
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn deleted_status(kind: &Kind, object: &Value) -> Value {
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {
            "name": meta::name(object),
            "group": kind.group,
            "kind": kind.plural,
            "uid": meta::uid(object),
        },
    })
}

fn list(shell: &Shell, kind: &Kind, namespace: Option<&str>, call: &Call) -> Result<Response, ApiError> {
    let (labels, fields) = selectors(kind, call)?;
    let options = ListOptions {
        labels,
        fields,
        limit: call.query.number("limit")?,
        continue_token: call.query.text("continue").map(str::to_owned),
        resource_version: call.query.number("resourceVersion")?,
        exact: call.query.text("resourceVersionMatch") == Some("Exact"),
    };
    let page = shell.api.list(kind, namespace, &options)?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(token) = page.continue_token {
        metadata["continue"] = json!(token);
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = json!(remaining);
    }
    let wire = |o: &Arc<Object>| kind.to_wire(o.value());
    match call.accept {
        Accept::Table(version) => {
            let items: Vec<Value> = page.items.iter().map(wire).collect();
            let include = call.query.text("includeObject") != Some("None");
            let mut table = table::render(kind, &items, version, include);
            table["metadata"] = metadata;
            Ok(json_response(StatusCode::OK, &table))
        }
        Accept::Metadata => {
            let items: Vec<Value> = page
                .items
                .iter()
                .map(|o| table::only_metadata(o.value()))
                .collect();
            let list = json!({
                "kind": "PartialObjectMetadataList",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata,
                "items": items,
            });
            Ok(json_response(StatusCode::OK, &list))
        }
        Accept::Nothing => Err(ApiError::not_acceptable()),
        _ => {
            // Objects are encoded once and shared with watchers; the list around them is text.
            let mut text = format!(
                "{{\"kind\":{},\"apiVersion\":{},\"metadata\":{metadata},\"items\":[",
                json!(kind.list_kind),
                json!(kind.api_version())
            )
            .into_bytes();
            for (at, object) in page.items.iter().enumerate() {
                if at > 0 {
                    text.push(b',');
                }
                if kind.is_storage_version() {
                    text.extend_from_slice(&object.json());
                } else {
                    text.extend_from_slice(wire(object).to_string().as_bytes());
                }
            }
            text.extend_from_slice(b"]}\n");
            Ok(bytes_response(StatusCode::OK, "application/json", text.into()))
        }
    }
}

fn start_watch(
    shell: &Shell,
    kind: &Arc<Kind>,
    namespace: Option<&str>,
    call: &Call,
) -> Result<Response, ApiError> {
    if call.accept == Accept::Nothing {
        return Err(ApiError::not_acceptable());
    }
    let (labels, fields) = selectors(kind, call)?;
    let options = WatchOptions {
        resource_version: call.query.number("resourceVersion")?,
        labels,
        fields,
        bookmarks: call.query.flag("allowWatchBookmarks"),
        send_initial_events: call.query.flag("sendInitialEvents"),
    };
    if options.send_initial_events
        && (!options.bookmarks || call.query.text("resourceVersionMatch") != Some("NotOlderThan"))
    {
        return Err(ApiError::bad_request(
            "sendInitialEvents requires resourceVersionMatch=NotOlderThan and allowWatchBookmarks=true",
        ));
    }
    let timeout = call
        .query
        .number::<u64>("timeoutSeconds")?
        .filter(|s| *s > 0)
        .map(Duration::from_secs);
    let watcher = Watcher::start(&shell.api, kind.clone(), namespace, options)?;
    Ok(stream::watch(
        watcher,
        call.accept,
        timeout,
        shell.shutdown.clone(),
    ))
}

fn delete_collection(
    shell: &Shell,
    kind: &Kind,
    namespace: Option<&str>,
    call: &Call,
) -> Result<Response, ApiError> {
    if kind.namespaced && namespace.is_none() {
        return Err(ApiError::method_not_allowed());
    }
    let (labels, fields) = selectors(kind, call)?;
    let options = delete_options(&call.optional_object()?, call)?;
    let page = shell.api.list(
        kind,
        namespace,
        &ListOptions {
            labels,
            fields,
            ..ListOptions::default()
        },
    )?;
    let mut items = Vec::new();
    for object in page.items {
        let object = object.value();
        match shell
            .api
            .delete(kind, meta::namespace(object), meta::name(object), &options)
        {
            Ok(deleted) => items.push(kind.to_wire(deleted.object().value())),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    let list = json!({
        "kind": kind.list_kind,
        "apiVersion": kind.api_version(),
        "metadata": {"resourceVersion": shell.api.revision().to_string()},
        "items": items,
    });
    Ok(json_response(StatusCode::OK, &list))
}

fn scale_of(
    shell: &Shell,
    kind: &Kind,
    namespace: &str,
    name: &str,
    call: &Call,
) -> Result<Response, ApiError> {
    let options = write_options(call, Part::Main, "scale")?;
    let written = match call.method {
        Method::GET => shell.api.get(kind, namespace, name)?,
        Method::PUT => {
            let body = call.object()?;
            shell.api.modify(kind, namespace, name, &options, |old| {
                scale::onto(kind, old, &body)
            })?
        }
        Method::PATCH => {
            let patch = read_patch(call)?;
            shell.api.modify(kind, namespace, name, &options, |old| {
                let before = scale::of(kind, old);
                let after = match &patch {
                    Patch::Json(patch) => patch::json_patch(&before, patch)?,
                    Patch::Merge(patch) | Patch::Strategic(patch) | Patch::Apply(patch) => {
                        patch::merge_patch(&before, patch)?
                    }
                };
                scale::onto(kind, old, &after)
            })?
        }
        _ => return Err(ApiError::method_not_allowed()),
    };
    Ok(json_response(StatusCode::OK, &scale::of(kind, written.value())))
}

/// `PUT .../namespaces/<name>/finalize`: sets the finalizers of the spec.
fn finalize(shell: &Shell, kind: &Kind, name: &str, call: &Call) -> Result<Response, ApiError> {
    if call.method != Method::PUT {
        return Err(ApiError::method_not_allowed());
    }
    let body = call.object()?;
    let options = WriteOptions {
        part: Part::Whole,
        ..WriteOptions::default()
    };
    let updated = shell.api.modify(kind, "", name, &options, |old| {
        let mut new = old.clone();
        new["spec"]["finalizers"] = body["spec"]["finalizers"].clone();
        Ok(new)
    })?;
    Ok(object_response(kind, &updated, StatusCode::OK, call))
}

/// Reviews are answered, not stored: everyone may do everything here.
fn review(kind: &Kind, call: &Call) -> Result<Response, ApiError> {
    let mut review = call.object()?;
    review["kind"] = json!(kind.kind);
    review["apiVersion"] = json!(kind.api_version());
    let user = json!({"username": "sandbox", "groups": ["system:masters", "system:authenticated"]});
    review["status"] = match kind.kind.as_str() {
        "TokenReview" => json!({"authenticated": true, "user": user}),
        "SelfSubjectReview" => json!({"userInfo": user}),
        _ => json!({"allowed": true}),
    };
    Ok(json_response(StatusCode::CREATED, &review))
}

fn object_response(kind: &Kind, object: &Arc<Object>, status: StatusCode, call: &Call) -> Response {
    match call.accept {
        Accept::Table(version) => json_response(
            status,
            &table::render(kind, &[kind.to_wire(object.value())], version, true),
        ),
        Accept::Metadata => json_response(status, &table::only_metadata(object.value())),
        _ => {
            let bytes: Bytes = if kind.is_storage_version() {
                object.json()
            } else {
                kind.to_wire(object.value()).to_string().into()
            };
            bytes_response(status, "application/json", bytes)
        }
    }
}

fn selectors(kind: &Kind, call: &Call) -> Result<(LabelSelector, FieldSelector), ApiError> {
    let refuse = |error: crate::selector::SelectorError| ApiError::bad_request(error.to_string());
    let labels = LabelSelector::parse(call.query.text("labelSelector").unwrap_or("")).map_err(refuse)?;
    let fields = call.query.text("fieldSelector").unwrap_or("");
    let fields = FieldSelector::parse(fields, |field| kind.selects_by(field)).map_err(refuse)?;
    Ok((labels, fields))
}

fn write_options(call: &Call, part: Part, subresource: &'static str) -> Result<WriteOptions, ApiError> {
    let patches = call.method == Method::PATCH && call.content_type.starts_with("application/apply-patch");
    let manager = if patches {
        call.query.text("fieldManager").map(str::to_owned)
    } else {
        Some(call.manager.clone())
    };
    Ok(WriteOptions {
        dry_run: dry_run(call)?,
        manager,
        force: call.query.flag("force"),
        strict: call.query.text("fieldValidation") == Some("Strict"),
        part,
        subresource,
    })
}

fn dry_run(call: &Call) -> Result<bool, ApiError> {
    match call.query.text("dryRun") {
        None => Ok(false),
        Some("All") => Ok(true),
        Some(other) => Err(ApiError::bad_request(format!(
            "dryRun: Unsupported value: {other:?}: supported values: \"All\""
        ))),
    }
}

fn read_patch(call: &Call) -> Result<Patch, ApiError> {
    let media = call.content_type.split(';').next().unwrap_or("").trim();
    let body = || super::parse_body("application/json", &call.body);
    match media {
        "application/json-patch+json" => Ok(Patch::Json(body()?)),
        "application/merge-patch+json" => Ok(Patch::Merge(body()?)),
        "application/strategic-merge-patch+json" => Ok(Patch::Strategic(body()?)),
        // JSON is YAML, and much faster to read as what it is.
        "application/apply-patch+yaml" => {
            Ok(Patch::Apply(body().or_else(|_| {
                super::parse_body("application/yaml", &call.body)
            })?))
        }
        other => Err(ApiError::unsupported_media(
            other,
            "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, \
             application/apply-patch+yaml",
        )),
    }
}

/// The options of a delete, from its body and the query; the query wins.
pub fn delete_options(body: &Value, call: &Call) -> Result<DeleteOptions, ApiError> {
    let grace = call.query.number("gracePeriodSeconds")?;
    let propagation = call
        .query
        .text("propagationPolicy")
        .unwrap_or_else(|| meta::str_at(body, &["propagationPolicy"]));
    let orphan = call.query.text("orphanDependents").map(|t| t == "true");
    let orphan = orphan.or_else(|| body.get("orphanDependents").and_then(Value::as_bool));
    let propagation = match (propagation, orphan) {
        ("Background", _) | ("", Some(false) | None) => Propagation::Background,
        ("Foreground", _) => Propagation::Foreground,
        ("Orphan", _) | ("", Some(true)) => Propagation::Orphan,
        (other, _) => {
            return Err(ApiError::bad_request(format!(
                "propagationPolicy: Unsupported value: {other:?}: supported values: \"Foreground\", \"Background\", \"Orphan\""
            )));
        }
    };
    let precondition = |field: &str| {
        let text = meta::str_at(body, &["preconditions", field]);
        (!text.is_empty()).then(|| text.to_owned())
    };
    let body_dry_run = meta::list_at(body, &["dryRun"]).iter().any(|v| v == "All");
    Ok(DeleteOptions {
        grace_period_seconds: grace.or_else(|| meta::int_at(body, &["gracePeriodSeconds"])),
        propagation,
        uid: precondition("uid"),
        resource_version: precondition("resourceVersion"),
        dry_run: dry_run(call)? || body_dry_run,
    })
}
