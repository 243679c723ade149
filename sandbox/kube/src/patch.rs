//! The four kinds of patches.
//!
//! In: a patch and the object it is for. Out: the patched object, not yet checked. Pure. JSON patch and merge patch
//! follow RFC 6902 and 7386 (by the `json-patch` crate); strategic merge is in [`strategic`]; server-side apply, which
//! needs to know who owns which field, is in [`apply`]; [`lists`] says which lists merge by key.

use serde_json::Value;

use crate::error::ApiError;

pub mod apply;
pub mod fields;
pub mod lists;
pub mod strategic;

/// A patch with its type.
#[derive(Clone, Debug)]
pub enum Patch {
    /// `application/json-patch+json`.
    Json(Value),
    /// `application/merge-patch+json`.
    Merge(Value),
    /// `application/strategic-merge-patch+json`.
    Strategic(Value),
    /// `application/apply-patch+yaml`.
    Apply(Value),
}

/// A JSON patch may have this many operations, as on a real server.
const JSON_PATCH_OPERATIONS_MAX: usize = 10_000;

/// Applies a JSON patch.
pub fn json_patch(object: &Value, patch: &Value) -> Result<Value, ApiError> {
    let operations: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|e| ApiError::bad_request(format!("error decoding JSON patch: {e}")))?;
    if operations.0.len() > JSON_PATCH_OPERATIONS_MAX {
        return Err(ApiError::bad_request(format!(
            "the JSON patch has {} operations, at most {JSON_PATCH_OPERATIONS_MAX} are taken",
            operations.0.len()
        )));
    }
    let mut patched = object.clone();
    json_patch::patch(&mut patched, &operations).map_err(|e| ApiError {
        code: 422,
        reason: "Invalid",
        message: format!("the server rejected our request due to an error in our request: {e}"),
        details: Value::Null,
    })?;
    Ok(patched)
}

/// Applies a merge patch.
pub fn merge_patch(object: &Value, patch: &Value) -> Result<Value, ApiError> {
    if !patch.is_object() {
        return Err(ApiError::bad_request(
            "error decoding merge patch: must be a JSON object",
        ));
    }
    let mut patched = object.clone();
    json_patch::merge(&mut patched, patch);
    Ok(patched)
}
