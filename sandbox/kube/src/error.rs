//! Errors of the API, in the shape that Kubernetes clients know: a `Status` object with code, reason and details.
//!
//! In: what went wrong, said by the pure core. Out: [`ApiError`], which the HTTP shell turns into a response body and
//! the in-process client returns as it is. Invariant: every refusal has a machine-readable reason and names its input.

use serde_json::{Value, json};

/// A refused request.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// Kubernetes' word for the class of the error, for example `NotFound`.
    pub reason: &'static str,
    /// Text for people.
    pub message: String,
    /// The `details` of the `Status`, or null.
    pub details: Value,
}

/// One cause of an `Invalid` error.
#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    /// Path of the field, for example `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl Cause {
    /// A cause at `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Cause {
        Cause {
            field: field.into(),
            message: message.into(),
        }
    }
}

fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() {
        resource.to_owned()
    } else {
        format!("{resource}.{group}")
    }
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: String, details: Value) -> ApiError {
        ApiError {
            code,
            reason,
            message,
            details,
        }
    }

    /// 404: the object is not there.
    pub fn not_found(group: &str, resource: &str, name: &str) -> ApiError {
        let details = json!({"name": name, "group": group, "kind": resource});
        ApiError::new(
            404,
            "NotFound",
            format!("{} {name:?} not found", qualified(group, resource)),
            details,
        )
    }

    /// 404: the path is not served at all.
    pub fn unknown_path() -> ApiError {
        ApiError::new(
            404,
            "NotFound",
            "the server could not find the requested resource".into(),
            json!({"causes": [{"reason": "UnexpectedServerResponse", "message": "404 page not found"}]}),
        )
    }

    /// 409: an object of this name exists.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> ApiError {
        let details = json!({"name": name, "group": group, "kind": resource});
        let message = format!("{} {name:?} already exists", qualified(group, resource));
        ApiError::new(409, "AlreadyExists", message, details)
    }

    /// 409: the object changed since it was read, or a precondition failed.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> ApiError {
        let details = json!({"name": name, "group": group, "kind": resource});
        let message = format!(
            "Operation cannot be fulfilled on {} {name:?}: {why}",
            qualified(group, resource)
        );
        ApiError::new(409, "Conflict", message, details)
    }

    /// 409 of server-side apply: fields that other managers own.
    pub fn apply_conflict(conflicts: &[(String, String)]) -> ApiError {
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|(manager, field)| {
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {manager:?}"), "field": field})
            })
            .collect();
        let list: Vec<String> = conflicts
            .iter()
            .map(|(manager, field)| format!("{manager:?}: {field}"))
            .collect();
        let word = if conflicts.len() == 1 {
            "conflict"
        } else {
            "conflicts"
        };
        let message = format!(
            "Apply failed with {} {word}: conflicts with {}",
            conflicts.len(),
            list.join(", ")
        );
        ApiError::new(409, "Conflict", message, json!({"causes": causes}))
    }

    /// 422: the object breaks rules of its kind.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> ApiError {
        let text: Vec<String> = causes
            .iter()
            .map(|c| format!("{}: {}", c.field, c.message))
            .collect();
        let text = if text.len() == 1 {
            text.join("")
        } else {
            format!("[{}]", text.join(", "))
        };
        let causes: Vec<Value> = causes
            .iter()
            .map(|c| json!({"reason": "FieldValueInvalid", "message": c.message, "field": c.field}))
            .collect();
        ApiError::new(
            422,
            "Invalid",
            format!("{} {name:?} is invalid: {text}", qualified(group, kind)),
            json!({"name": name, "group": group, "kind": kind, "causes": causes}),
        )
    }

    /// 400: the request cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError::new(400, "BadRequest", message.into(), Value::Null)
    }

    /// 403: the request is understood and refused.
    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(403, "Forbidden", message.into(), Value::Null)
    }

    /// 410: the asked revision is older than the history.
    pub fn expired(asked: u64, oldest: u64) -> ApiError {
        ApiError::new(
            410,
            "Expired",
            format!("too old resource version: {asked} ({oldest})"),
            Value::Null,
        )
    }

    /// 504: the asked revision lies in the future.
    pub fn too_large_revision(asked: u64, current: u64) -> ApiError {
        ApiError::new(
            504,
            "Timeout",
            format!("Too large resource version: {asked}, current: {current}"),
            json!({
                "retryAfterSeconds": 1,
                "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            }),
        )
    }

    /// 405: the verb does not fit the path.
    pub fn method_not_allowed() -> ApiError {
        ApiError::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource".into(),
            Value::Null,
        )
    }

    /// 406: no answer in a format that the client takes.
    pub fn not_acceptable() -> ApiError {
        let message = "only the following media types are accepted: application/json, application/yaml";
        ApiError::new(406, "NotAcceptable", message.into(), Value::Null)
    }

    /// 413: the body is over the limit.
    pub fn too_large(limit: usize) -> ApiError {
        ApiError::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
            Value::Null,
        )
    }

    /// 415: a body or patch type that is not taken here.
    pub fn unsupported_media(got: &str, takes: &str) -> ApiError {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {takes} (got {got:?})"
        );
        ApiError::new(415, "UnsupportedMediaType", message, Value::Null)
    }

    /// 500: this program is at fault.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(500, "InternalError", message.into(), Value::Null)
    }

    /// Whether this is a lost race that a fresh read may win.
    pub fn is_conflict(&self) -> bool {
        self.code == 409 && self.reason == "Conflict"
    }

    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// The `Status` object.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}
