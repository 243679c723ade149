//! Subresources of pods that are not about the stored object alone: log, eviction, binding.

use axum::body::Body;
use axum::response::Response;
use http::{Method, StatusCode, header};
use serde_json::{Value, json};

use super::{Call, Shell, json_response};
use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::runtime::LogRequest;

/// `GET .../pods/<name>/log`.
pub async fn log(
    shell: &Shell,
    kind: &Kind,
    namespace: &str,
    name: &str,
    call: &Call,
) -> Result<Response, ApiError> {
    if call.method != Method::GET {
        return Err(ApiError::method_not_allowed());
    }
    let pod = shell.api.get(kind, namespace, name)?;
    let container = choose_container(pod.value(), call.query.text("container"))?;
    let Some(runtime) = shell.api.runtime() else {
        return Err(ApiError::internal(
            "no pod runtime is attached to this API server",
        ));
    };
    let request = LogRequest {
        namespace: namespace.to_owned(),
        pod: name.to_owned(),
        container,
        follow: call.query.flag("follow"),
        tail_lines: call.query.number("tailLines")?,
        previous: call.query.flag("previous"),
        timestamps: call.query.flag("timestamps"),
    };
    let stream = runtime
        .logs(request)
        .await
        .map_err(|refusal| ApiError::bad_request(refusal.0))?;
    let until_shutdown = futures::StreamExt::take_until(stream, shell.shutdown.clone().cancelled_owned());
    let mut response = Response::new(Body::from_stream(until_shutdown));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain"),
    );
    Ok(response)
}

fn choose_container(pod: &Value, asked: Option<&str>) -> Result<String, ApiError> {
    let name = meta::name(pod);
    let of = |list: &str| -> Vec<&str> {
        meta::list_at(pod, &["spec", list])
            .iter()
            .map(|c| meta::str_at(c, &["name"]))
            .collect()
    };
    let (containers, init) = (of("containers"), of("initContainers"));
    match (asked, containers.as_slice()) {
        (Some(asked), _) if containers.contains(&asked) || init.contains(&asked) => Ok(asked.to_owned()),
        (Some(asked), _) => Err(ApiError::bad_request(format!(
            "container {asked} is not valid for pod {name}"
        ))),
        (None, [only]) => Ok((*only).to_owned()),
        (None, _) => Err(ApiError::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            containers.join(" ")
        ))),
    }
}

/// `POST .../pods/<name>/eviction`: a delete that says why.
pub fn evict(
    shell: &Shell,
    kind: &Kind,
    namespace: &str,
    name: &str,
    call: &Call,
) -> Result<Response, ApiError> {
    if call.method != Method::POST {
        return Err(ApiError::method_not_allowed());
    }
    let body = call.optional_object()?;
    let options: DeleteOptions = super::resources::delete_options(&body["deleteOptions"], call)?;
    shell.api.delete(kind, namespace, name, &options)?;
    Ok(json_response(StatusCode::CREATED, &success()))
}

/// `POST .../pods/<name>/binding`: puts the pod on a node, once.
pub fn bind(
    shell: &Shell,
    kind: &Kind,
    namespace: &str,
    name: &str,
    call: &Call,
) -> Result<Response, ApiError> {
    if call.method != Method::POST {
        return Err(ApiError::method_not_allowed());
    }
    let body = call.object()?;
    let node = meta::str_at(&body, &["target", "name"]);
    if node.is_empty() {
        return Err(ApiError::bad_request(
            "target.name: Required value: the node to bind to",
        ));
    }
    let options = crate::api::WriteOptions {
        part: Part::Whole,
        ..Default::default()
    };
    shell.api.modify(kind, namespace, name, &options, |pod| {
        let current = meta::str_at(pod, &["spec", "nodeName"]);
        if !current.is_empty() {
            let why = format!("pod {name} is already assigned to node {current:?}");
            return Err(ApiError::conflict("", "pods/binding", name, &why));
        }
        let mut bound = pod.clone();
        bound["spec"]["nodeName"] = json!(node);
        Ok(bound)
    })?;
    Ok(json_response(StatusCode::CREATED, &success()))
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}
