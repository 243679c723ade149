//! The HTTP shell: plain HTTP/1.1 and h2c on a listener.
//!
//! In: requests. Out: JSON, tables and watch streams. It parses, calls the verbs of [`KubeApi`] and encodes; it decides
//! nothing about objects. Limits: a body of 3 MiB; a watch ends after the time that the client asked for, or 45 minutes.

use std::io;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::Response;
use axum::serve::ListenerExt;
use http::{Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::KubeApi;
use crate::controllers;
use crate::error::ApiError;

mod accept;
mod discovery;
mod openapi;
mod path;
mod pods;
mod protobuf;
mod query;
mod resources;
mod scale;
mod stream;
mod table;

use accept::Accept;
use path::Target;
use query::Query;

/// Bodies of requests may have this many bytes, as on a real server.
pub const BODY_LEN_MAX: usize = 3 * 1024 * 1024;

/// The version that the server says it is.
const VERSION: &str = "v1.32.4";

#[derive(Clone)]
struct Shell {
    api: KubeApi,
    shutdown: CancellationToken,
}

impl KubeApi {
    /// Serves until `shutdown`, with the controllers if the options want them. Running watches end then too.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) -> io::Result<()> {
        let controllers = if self.options().controllers {
            Some(controllers::spawn(self, shutdown.clone()))
        } else {
            None
        };
        let shell = Shell {
            api: self.clone(),
            shutdown: shutdown.clone(),
        };
        let app = Router::new().fallback(answer).with_state(shell);
        // A watch event is one small write; it must not wait for the acknowledgement of the one before.
        let listener = listener.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "cannot set TCP_NODELAY");
            }
        });
        axum::serve(listener, app)
            .with_graceful_shutdown(shutdown.cancelled_owned())
            .await?;
        if let Some(mut controllers) = controllers {
            while controllers.join_next().await.is_some() {}
        }
        Ok(())
    }
}

/// A request that has been read.
struct Call {
    method: Method,
    query: Query,
    accept: Accept,
    content_type: String,
    manager: String,
    body: Bytes,
}

impl Call {
    /// The body as an object: JSON, YAML or protobuf.
    fn object(&self) -> Result<Value, ApiError> {
        parse_body(&self.content_type, &self.body)
    }

    /// The body as an object, or null when there is none.
    fn optional_object(&self) -> Result<Value, ApiError> {
        if self.body.is_empty() {
            Ok(Value::Null)
        } else {
            self.object()
        }
    }
}

fn parse_body(content_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    let kind = content_type.split(';').next().unwrap_or("").trim();
    if kind == "application/vnd.kubernetes.protobuf" {
        return protobuf::decode(body);
    }
    if kind.ends_with("yaml") {
        return serde_yaml_ng::from_slice(body)
            .map_err(|e| ApiError::bad_request(format!("the body is not valid YAML: {e}")));
    }
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("the body is not valid JSON: {e}")))
}

async fn answer(State(shell): State<Shell>, request: Request<Body>) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let response = match handle(&shell, request).await {
        Ok(response) => response,
        Err(error) => status_response(&error),
    };
    tracing::trace!(%method, %uri, status = response.status().as_u16(), "request");
    response
}

async fn handle(shell: &Shell, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let header = |name: header::HeaderName| {
        parts
            .headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or("")
            .to_owned()
    };
    let query = Query::parse(parts.uri.query().unwrap_or(""))?;
    let limited = http_body_util::Limited::new(body, BODY_LEN_MAX);
    let body = match http_body_util::BodyExt::collect(limited).await {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(ApiError::too_large(BODY_LEN_MAX));
        }
        Err(error) => return Err(ApiError::bad_request(format!("cannot read the body: {error}"))),
    };
    let manager = query
        .text("fieldManager")
        .map_or_else(|| manager_of(&header(header::USER_AGENT)), str::to_owned);
    let call = Call {
        accept: Accept::parse(&header(header::ACCEPT)),
        content_type: header(header::CONTENT_TYPE),
        method: parts.method,
        query,
        manager,
        body,
    };
    let path = parts.uri.path();
    match Target::parse(path)? {
        Target::Plain(path) => plain(shell, &path, &call),
        Target::Resource(target) => resources::handle(shell, &target, &call).await,
    }
}

/// The default field manager: the user agent up to its first slash.
fn manager_of(user_agent: &str) -> String {
    let name = user_agent.split('/').next().unwrap_or("").trim();
    let name: String = name.chars().filter(|c| !c.is_control()).take(128).collect();
    if name.is_empty() { "unknown".into() } else { name }
}

fn plain(shell: &Shell, path: &str, call: &Call) -> Result<Response, ApiError> {
    if call.method != Method::GET && call.method != Method::HEAD {
        return Err(ApiError::method_not_allowed());
    }
    let kinds = shell.api.kinds();
    let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
    let value = match segments.as_slice() {
        [] => json!({"paths": discovery::paths(&kinds)}),
        ["healthz" | "readyz" | "livez", ..] => return Ok(text_response("ok")),
        ["version"] => discovery::version(VERSION),
        ["api"] => discovery::core_versions(),
        ["apis"] => discovery::groups(&kinds),
        ["apis", group] => discovery::group(&kinds, group).ok_or_else(ApiError::unknown_path)?,
        ["api", version] => discovery::resources(&kinds, "", version).ok_or_else(ApiError::unknown_path)?,
        ["apis", group, version] => {
            discovery::resources(&kinds, group, version).ok_or_else(ApiError::unknown_path)?
        }
        ["openapi", "v2"] => return Ok(openapi::v2(&kinds, &call.accept)),
        ["openapi", "v3"] => openapi::v3_index(&kinds),
        ["openapi", "v3", rest @ ..] => openapi::v3(&kinds, rest).ok_or_else(ApiError::unknown_path)?,
        _ => return Err(ApiError::unknown_path()),
    };
    Ok(json_response(StatusCode::OK, &value))
}

fn json_response(status: StatusCode, value: &Value) -> Response {
    bytes_response(
        status,
        "application/json",
        serde_json::to_vec(value).unwrap_or_default().into(),
    )
}

fn bytes_response(status: StatusCode, content_type: &'static str, bytes: Bytes) -> Response {
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    response
}

fn text_response(text: &'static str) -> Response {
    bytes_response(
        StatusCode::OK,
        "text/plain; charset=utf-8",
        Bytes::from_static(text.as_bytes()),
    )
}

fn status_response(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json_response(status, &error.status())
}
