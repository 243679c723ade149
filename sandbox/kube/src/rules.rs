//! What the server does to an object before it stores it: defaults, checks, and the fields that only it may set.
//!
//! In: the object that a client sent, the one that is stored, the time, fresh identifiers. Out: the object to store,
//! or what is wrong with it. Pure. Invariants: name, namespace, uid and creation time never change after creation;
//! status changes only through the status subresource where a kind has one; generation counts changes of the spec.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::error::{ApiError, Cause};
use crate::kind::{Kind, custom};
use crate::meta;

pub mod defaults;
pub mod services;
pub mod validate;

/// Which part of an object a request writes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Part {
    /// The object, without its status where that is a subresource.
    #[default]
    Main,
    /// The status.
    Status,
    /// Anything: for controllers of the server itself.
    Whole,
}

/// The finalizer of foreground deletion.
pub const FOREGROUND: &str = "foregroundDeletion";
/// The finalizer that keeps dependents alive.
pub const ORPHAN: &str = "orphan";

/// What the server gives a new object.
#[derive(Clone, Debug)]
pub struct Birth {
    /// Its UID.
    pub uid: String,
    /// Letters for a generated name.
    pub suffix: String,
    /// Its creation time.
    pub now: Timestamp,
}

/// Names the object by `generateName` when it has no name.
pub fn generate_name(object: &mut Value, suffix: &str) {
    let prefix = meta::field(object, "generateName").to_owned();
    if meta::name(object).is_empty() && !prefix.is_empty() {
        let keep = prefix.len().min(63 - suffix.len());
        let prefix: String = prefix.chars().take(keep).collect();
        meta::metadata_mut(object).insert("name".into(), json!(format!("{prefix}{suffix}")));
    }
}

/// Puts the request's namespace into the object, or refuses another one.
pub fn settle_namespace(kind: &Kind, object: &mut Value, namespace: &str) -> Result<(), ApiError> {
    let own = meta::namespace(object);
    if !kind.namespaced {
        if !own.is_empty() {
            meta::metadata_mut(object).remove("namespace");
        }
        return Ok(());
    }
    if !own.is_empty() && own != namespace {
        return Err(ApiError::bad_request(format!(
            "the namespace of the provided object does not match the namespace sent on the request: {own:?}, {namespace:?}"
        )));
    }
    meta::metadata_mut(object).insert("namespace".into(), json!(namespace));
    Ok(())
}

/// Whether the body names the kind that the path serves; fills it in when it is absent.
pub fn settle_type(kind: &Kind, object: &mut Value) -> Result<(), ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the object provided is not a JSON object"));
    }
    let want = kind.api_version();
    for (field, want) in [("apiVersion", want.as_str()), ("kind", kind.kind.as_str())] {
        match object.get(field).and_then(Value::as_str) {
            None | Some("") => object[field] = json!(want),
            Some(got) if got == want => {}
            Some(got) => {
                return Err(ApiError::bad_request(format!(
                    "the {field} in the data ({got}) does not match the expected {field} ({want})"
                )));
            }
        }
    }
    Ok(())
}

/// Reads a stored-form object by its kind's type or schema. `strict` refuses unknown fields.
pub fn check_shape(kind: &Kind, object: Value, strict: bool) -> Result<Value, ApiError> {
    let mut object = object;
    if let Some(custom) = &kind.custom {
        let before = if strict { object.clone() } else { Value::Null };
        let causes = custom::apply_schema(&custom.schema, &mut object);
        if !causes.is_empty() {
            return Err(ApiError::invalid(
                &kind.group,
                &kind.kind,
                meta::name(&object),
                causes,
            ));
        }
        refuse_unknown(&before, &object)?;
        return Ok(object);
    }
    let Some(check) = kind.check else {
        return Ok(object);
    };
    defaults::numbers_to_quantities(&mut object);
    let checked = check(&object).map_err(|why| {
        let (kind, version) = (&kind.kind, &kind.version);
        ApiError::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: {why}"
        ))
    })?;
    if strict {
        refuse_unknown(&object, &checked)?;
    }
    Ok(checked)
}

fn refuse_unknown(before: &Value, after: &Value) -> Result<(), ApiError> {
    let mut unknown = Vec::new();
    collect_unknown(before, after, "", &mut unknown);
    if unknown.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = unknown
        .iter()
        .map(|field| format!("unknown field {field:?}"))
        .collect();
    Err(ApiError::bad_request(format!(
        "strict decoding error: {}",
        list.join(", ")
    )))
}

fn collect_unknown(before: &Value, after: &Value, path: &str, unknown: &mut Vec<String>) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, value) in before {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match after.get(key) {
                    Some(after) => collect_unknown(value, after, &path, unknown),
                    None if value.is_null() || matches!(value, Value::Object(m) if m.is_empty()) => {}
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            for (at, (before, after)) in before.iter().zip(after).enumerate() {
                collect_unknown(before, after, &format!("{path}[{at}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Completes a new object: server-set metadata, defaults, checks. `keep_status` is for the server's own writes.
pub fn prepare_create(
    kind: &Kind,
    object: &mut Value,
    birth: &Birth,
    keep_status: bool,
) -> Result<(), ApiError> {
    let metadata = meta::metadata_mut(object);
    for field in [
        "resourceVersion",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        metadata.remove(field);
    }
    metadata.insert("uid".into(), json!(birth.uid));
    metadata.insert("creationTimestamp".into(), json!(meta::rfc3339(birth.now)));
    if kind.has_generation() {
        metadata.insert("generation".into(), json!(1));
    }
    let starts_with_status = matches!(kind.storage.as_str(), "nodes" | "namespaces" | "services");
    if kind.subresources.status
        && !keep_status
        && !starts_with_status
        && let Some(map) = object.as_object_mut()
    {
        map.remove("status");
    }
    defaults::fill(kind, object, None);
    let mut causes = validate::metadata(kind, object);
    causes.extend(validate::create(kind, object));
    if kind.storage.as_str() == "customresourcedefinitions.apiextensions.k8s.io" {
        causes.extend(custom::default_and_check(object));
        custom::establish(object, birth.now);
    }
    refuse(kind, object, causes)
}

/// Makes of `new`, which a client sent, what shall replace `old`.
pub fn prepare_update(
    kind: &Kind,
    old: &Value,
    new: &mut Value,
    part: Part,
    now: Timestamp,
) -> Result<(), ApiError> {
    check_preconditions(kind, old, new)?;
    if part == Part::Status {
        let mut whole = old.clone();
        let status = new.get_mut("status").map(Value::take);
        match status {
            Some(status) if !status.is_null() => whole["status"] = status,
            _ => {
                if let Some(map) = whole.as_object_mut() {
                    map.remove("status");
                }
            }
        }
        if let Some(managed) = meta::at(new, &["metadata", "managedFields"]) {
            meta::metadata_mut(&mut whole).insert("managedFields".into(), managed.clone());
        }
        *new = whole;
    }
    keep_metadata(old, new);
    if part == Part::Main && kind.subresources.status {
        match (old.get("status"), new.as_object_mut()) {
            (Some(status), _) => new["status"] = status.clone(),
            (None, Some(map)) => {
                map.remove("status");
            }
            (None, None) => {}
        }
    }
    defaults::fill(kind, new, Some(old));
    let mut causes = validate::metadata(kind, new);
    if part != Part::Whole {
        causes.extend(validate::update(kind, old, new));
    }
    if kind.storage.as_str() == "customresourcedefinitions.apiextensions.k8s.io" && part == Part::Main {
        causes.extend(custom::default_and_check(new));
        custom::establish(new, now);
    }
    refuse(kind, new, causes)?;
    if kind.has_generation() {
        let changed = spec_changed(old, new);
        let generation = meta::generation(old).max(1) + i64::from(changed);
        meta::metadata_mut(new).insert("generation".into(), json!(generation));
    }
    Ok(())
}

fn refuse(kind: &Kind, object: &Value, causes: Vec<Cause>) -> Result<(), ApiError> {
    if causes.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid(
        &kind.group,
        &kind.kind,
        meta::name(object),
        causes,
    ))
}

/// The UID and resource version that a body carries are preconditions.
fn check_preconditions(kind: &Kind, old: &Value, new: &Value) -> Result<(), ApiError> {
    let conflict = |why: &str| ApiError::conflict(&kind.group, &kind.plural, meta::name(old), why);
    let uid = meta::uid(new);
    if !uid.is_empty() && uid != meta::uid(old) {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            meta::uid(old)
        );
        return Err(conflict(&why));
    }
    let revision = meta::field(new, "resourceVersion");
    if !revision.is_empty() && revision != meta::field(old, "resourceVersion") {
        return Err(conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        ));
    }
    Ok(())
}

/// Fields of the metadata that a client cannot change.
fn keep_metadata(old: &Value, new: &mut Value) {
    let from = old.get("metadata").cloned().unwrap_or_default();
    let to = meta::metadata_mut(new);
    let fixed = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "generateName",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "generation",
        "resourceVersion",
    ];
    for field in fixed {
        match from.get(field) {
            Some(value) => to.insert(field.into(), value.clone()),
            None => to.remove(field),
        };
    }
    if !to.contains_key("managedFields")
        && let Some(managed) = from.get("managedFields")
    {
        to.insert("managedFields".into(), managed.clone());
    }
}

fn spec_changed(old: &Value, new: &Value) -> bool {
    let rest = |object: &Value| -> Vec<(String, Value)> {
        let fields = object.as_object().into_iter().flatten();
        fields
            .filter(|(key, _)| !matches!(key.as_str(), "metadata" | "status" | "apiVersion" | "kind"))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    rest(old) != rest(new)
}

/// Whether two versions differ in anything but the time stamps of managed fields and the resource version.
pub fn is_same(old: &Value, new: &Value) -> bool {
    let strip = |object: &Value| {
        let mut object = object.clone();
        let metadata = meta::metadata_mut(&mut object);
        metadata.remove("resourceVersion");
        if let Some(list) = metadata.get_mut("managedFields").and_then(Value::as_array_mut) {
            list.iter_mut()
                .filter_map(Value::as_object_mut)
                .for_each(|entry| {
                    entry.remove("time");
                });
        }
        object
    };
    strip(old) == strip(new)
}

/// How dependents of a deleted object are treated.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Propagation {
    /// The object goes first, its dependents after it.
    #[default]
    Background,
    /// The dependents go first.
    Foreground,
    /// The dependents stay.
    Orphan,
}

/// Options of a delete.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Grace period; a pod's own is the default.
    pub grace_period_seconds: Option<i64>,
    /// What happens to dependents.
    pub propagation: Propagation,
    /// The UID that the object must have.
    pub uid: Option<String>,
    /// The resource version that the object must have.
    pub resource_version: Option<String>,
    /// Answer without storing anything.
    pub dry_run: bool,
}

/// What a delete does to the object.
#[derive(Clone, Debug, PartialEq)]
pub enum Deletion {
    /// It goes now.
    Remove,
    /// It stays, as this, until finalizers are gone or its grace period ends.
    Mark(Value),
    /// It is being deleted already and nothing changes.
    Nothing,
}

/// Decides what a delete of `object` does.
pub fn plan_delete(
    kind: &Kind,
    object: &Value,
    options: &DeleteOptions,
    now: Timestamp,
) -> Result<Deletion, ApiError> {
    let conflict = |what: &str, want: &str, got: &str| {
        let why =
            format!("Precondition failed: {what} in precondition: {want}, {what} in object meta: {got}");
        ApiError::conflict(&kind.group, &kind.plural, meta::name(object), &why)
    };
    if let Some(uid) = options.uid.as_deref().filter(|uid| *uid != meta::uid(object)) {
        return Err(conflict("UID", uid, meta::uid(object)));
    }
    let revision = meta::field(object, "resourceVersion");
    if let Some(want) = options
        .resource_version
        .as_deref()
        .filter(|want| *want != revision)
    {
        return Err(conflict("ResourceVersion", want, revision));
    }
    let mut marked = object.clone();
    match options.propagation {
        Propagation::Background => {}
        Propagation::Foreground => meta::add_finalizer(&mut marked, FOREGROUND),
        Propagation::Orphan => meta::add_finalizer(&mut marked, ORPHAN),
    }
    let is_namespace = kind.storage.as_str() == "namespaces";
    let grace = if kind.storage.as_str() == "pods" {
        pod_grace(object, options)
    } else {
        0
    };
    let held = meta::finalizers(&marked).next().is_some()
        || (is_namespace && !meta::list_at(object, &["spec", "finalizers"]).is_empty());
    if grace == 0 && !held {
        return Ok(Deletion::Remove);
    }
    let shortens =
        meta::int_at(object, &["metadata", "deletionGracePeriodSeconds"]).is_some_and(|old| grace < old);
    if !meta::is_terminating(object) || shortens {
        let at = Timestamp::from_second(now.as_second().saturating_add(grace)).unwrap_or(now);
        let metadata = meta::metadata_mut(&mut marked);
        metadata.insert("deletionTimestamp".into(), json!(meta::rfc3339(at)));
        metadata.insert("deletionGracePeriodSeconds".into(), json!(grace));
        if kind.has_generation() && !meta::is_terminating(object) {
            let generation = meta::generation(object).max(1) + 1;
            meta::metadata_mut(&mut marked).insert("generation".into(), json!(generation));
        }
    }
    if is_namespace {
        meta::map_mut(&mut marked, "status").insert("phase".into(), json!("Terminating"));
    }
    Ok(if marked == *object {
        Deletion::Nothing
    } else {
        Deletion::Mark(marked)
    })
}

fn pod_grace(pod: &Value, options: &DeleteOptions) -> i64 {
    let unscheduled = meta::str_at(pod, &["spec", "nodeName"]).is_empty();
    if unscheduled || matches!(meta::str_at(pod, &["status", "phase"]), "Succeeded" | "Failed") {
        return 0;
    }
    let own = meta::int_at(pod, &["spec", "terminationGracePeriodSeconds"]).unwrap_or(30);
    options.grace_period_seconds.unwrap_or(own).max(0)
}

/// Whether an object that is being deleted has nothing left that holds it.
pub fn is_released(kind: &Kind, object: &Value) -> bool {
    let grace = meta::int_at(object, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0);
    meta::is_terminating(object)
        && meta::finalizers(object).next().is_none()
        && (kind.storage.as_str() != "pods" || grace == 0)
        && (kind.storage.as_str() != "namespaces"
            || meta::list_at(object, &["spec", "finalizers"]).is_empty())
}
