//! Get and list.

use std::sync::Arc;

use k8s_openapi::ByteString;
use serde_json::{Value, json};

use super::KubeApi;
use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Key, Object};

/// Options of the list verb.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// Only objects with these labels.
    pub labels: LabelSelector,
    /// Only objects with these fields.
    pub fields: FieldSelector,
    /// Objects of one page at most.
    pub limit: Option<usize>,
    /// Where the page before ended.
    pub continue_token: Option<String>,
    /// The state at this revision (`exact`) or a newer one.
    pub resource_version: Option<u64>,
    /// Whether `resource_version` is exactly the wanted one.
    pub exact: bool,
}

/// A page of a list.
#[derive(Debug)]
pub struct Page {
    /// The objects, by namespace and name.
    pub items: Vec<Arc<Object>>,
    /// The revision at which the list is true.
    pub revision: u64,
    /// Where the next page starts, if there is one.
    pub continue_token: Option<String>,
    /// How many objects come after this page, when that is known.
    pub remaining: Option<usize>,
}

impl KubeApi {
    /// One object.
    pub fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Object>, ApiError> {
        let key = Key::new(&kind.storage, namespace, name);
        let found = self.state().store.get(&key).cloned();
        found.ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, name))
    }

    /// Objects of a kind, all or of one namespace. Pages of one list show the state of its first page.
    pub fn list(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        options: &ListOptions,
    ) -> Result<Page, ApiError> {
        let token = options
            .continue_token
            .as_deref()
            .filter(|t| !t.is_empty())
            .map(decode_token)
            .transpose()?;
        let state = self.state();
        let current = state.store.revision();
        let pinned = match &token {
            Some((revision, _)) => Some(*revision),
            None => options.resource_version.filter(|r| options.exact && *r > 0),
        };
        let asked = pinned.or(options.resource_version).unwrap_or(0);
        if asked > current {
            return Err(ApiError::too_large_revision(asked, current));
        }
        let after = token.map(|(_, key)| key);
        let revision = pinned.unwrap_or(current);
        let fits = |o: &&Arc<Object>| options.labels.matches(o.value()) && options.fields.matches(o.value());
        let past = match pinned {
            // An unchanged past is the present.
            Some(pinned) if pinned < current => {
                let snapshot = state.store.at(&kind.storage, pinned);
                Some(snapshot.map_err(|compacted| ApiError::expired(pinned, compacted.oldest))?)
            }
            _ => None,
        };
        let mut matching: Box<dyn Iterator<Item = &Arc<Object>>> = match &past {
            Some(snapshot) => Box::new(
                snapshot
                    .iter()
                    .filter(|(key, _)| after.as_ref().is_none_or(|after| *key > after))
                    .filter(|((ns, _), _)| namespace.is_none_or(|want| want == ns))
                    .map(|(_, object)| object)
                    .filter(fits),
            ),
            None => match (options.fields.exact_name(), namespace, &after) {
                (Some(name), Some(namespace), None) => Box::new(
                    state
                        .store
                        .get(&Key::new(&kind.storage, namespace, name))
                        .into_iter()
                        .filter(fits),
                ),
                _ => Box::new(
                    state
                        .store
                        .scan(&kind.storage, namespace, after.as_ref())
                        .filter(fits),
                ),
            },
        };
        let Some(limit) = options.limit.filter(|limit| *limit > 0) else {
            let items = matching.cloned().collect();
            return Ok(Page {
                items,
                revision,
                continue_token: None,
                remaining: None,
            });
        };
        let items: Vec<Arc<Object>> = matching.by_ref().take(limit).cloned().collect();
        let remaining = matching.count();
        let last = items.last().filter(|_| remaining > 0);
        let continue_token = last.map(|last| encode_token(revision, last.value()));
        let known = options.labels.is_empty() && options.fields.is_empty() && remaining > 0;
        Ok(Page {
            items,
            revision,
            continue_token,
            remaining: known.then_some(remaining),
        })
    }
}

fn encode_token(revision: u64, last: &Value) -> String {
    let token =
        json!({"v": "meta.k8s.io/v1", "rv": revision, "ns": meta::namespace(last), "name": meta::name(last)});
    let encoded = serde_json::to_value(ByteString(token.to_string().into_bytes())).unwrap_or_default();
    // The URL-safe alphabet without padding, as the server uses.
    let text = encoded.as_str().unwrap_or_default();
    text.trim_end_matches('=').replace('+', "-").replace('/', "_")
}

fn decode_token(token: &str) -> Result<(u64, (String, String)), ApiError> {
    let refuse = || ApiError::bad_request("continue key is not valid");
    let mut text = token.replace('-', "+").replace('_', "/");
    while !text.len().is_multiple_of(4) {
        text.push('=');
    }
    let bytes: ByteString = serde_json::from_value(json!(text)).map_err(|_| refuse())?;
    let token: Value = serde_json::from_slice(&bytes.0).map_err(|_| refuse())?;
    let revision = token["rv"].as_u64().ok_or_else(refuse)?;
    let text = |field: &str| token[field].as_str().map(str::to_owned).ok_or_else(refuse);
    Ok((revision, (text("ns")?, text("name")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_and_garbage_is_refused() {
        let token = encode_token(7, &json!({"metadata": {"namespace": "a", "name": "ö?>b"}}));
        assert_eq!(decode_token(&token).unwrap(), (7, ("a".into(), "ö?>b".into())));
        for bad in ["x", "====", "e30"] {
            assert!(decode_token(bad).is_err(), "{bad}");
        }
    }
}
