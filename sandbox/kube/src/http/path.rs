//! Request paths: `/api/v1/...`, `/apis/<group>/<version>/...`, and everything else.

use crate::error::ApiError;

/// What a path names.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Discovery, health and the like; the path as it is.
    Plain(String),
    /// A resource, an object or a subresource.
    Resource(ResourcePath),
}

/// A path below a group and version.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResourcePath {
    pub group: String,
    pub version: String,
    pub plural: String,
    /// None: all namespaces, or a cluster-scoped kind.
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub subresource: Option<String>,
    /// The old `/watch/` paths.
    pub watch: bool,
}

impl Target {
    pub fn parse(path: &str) -> Result<Target, ApiError> {
        let segments = path
            .split('/')
            .filter(|segment| !segment.is_empty())
            .map(super::query::decode)
            .collect::<Result<Vec<String>, _>>()?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
            ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
            _ => return Ok(Target::Plain(path.to_owned())),
        };
        let (watch, rest) = match rest {
            ["watch", rest @ ..] if !rest.is_empty() => (true, rest),
            _ => (false, rest),
        };
        let mut found = ResourcePath {
            group: group.into(),
            version: version.into(),
            watch,
            ..ResourcePath::default()
        };
        let owned = |text: &&str| Some((*text).to_owned());
        match rest {
            // The third segment is a resource in the namespace, unless it is a subresource of the namespace itself.
            ["namespaces", name, sub @ ("status" | "finalize")] if group.is_empty() => {
                (found.plural, found.name, found.subresource) =
                    ("namespaces".into(), owned(name), owned(sub));
            }
            ["namespaces", namespace, plural] => {
                (found.namespace, found.plural) = (owned(namespace), (*plural).into());
            }
            ["namespaces", namespace, plural, name] => {
                (found.namespace, found.plural, found.name) =
                    (owned(namespace), (*plural).into(), owned(name));
            }
            ["namespaces", namespace, plural, name, sub] => {
                (found.namespace, found.plural, found.name) =
                    (owned(namespace), (*plural).into(), owned(name));
                found.subresource = owned(sub);
            }
            [plural] => found.plural = (*plural).into(),
            [plural, name] => (found.plural, found.name) = ((*plural).into(), owned(name)),
            [plural, name, sub] => {
                (found.plural, found.name, found.subresource) = ((*plural).into(), owned(name), owned(sub));
            }
            _ => return Err(ApiError::unknown_path()),
        }
        Ok(Target::Resource(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, want: (&str, &str, Option<&str>, Option<&str>, Option<&str>)) {
        let Target::Resource(got) = Target::parse(path).unwrap() else {
            panic!("{path} is plain")
        };
        let text = |o: &Option<String>| o.clone();
        assert_eq!(
            (got.group.as_str(), got.plural.as_str()),
            (want.0, want.1),
            "{path}"
        );
        assert_eq!(text(&got.namespace).as_deref(), want.2, "{path}");
        assert_eq!(text(&got.name).as_deref(), want.3, "{path}");
        assert_eq!(text(&got.subresource).as_deref(), want.4, "{path}");
    }

    #[test]
    fn paths() {
        check("/api/v1/pods", ("", "pods", None, None, None));
        check("/api/v1/namespaces", ("", "namespaces", None, None, None));
        check("/api/v1/namespaces/a", ("", "namespaces", None, Some("a"), None));
        check(
            "/api/v1/namespaces/a/finalize",
            ("", "namespaces", None, Some("a"), Some("finalize")),
        );
        check(
            "/api/v1/namespaces/a/pods/p/log",
            ("", "pods", Some("a"), Some("p"), Some("log")),
        );
        check(
            "/apis/apps/v1/namespaces/a/deployments",
            ("apps", "deployments", Some("a"), None, None),
        );
        check(
            "/apis/x.io/v1/things/system%3Aa/status",
            ("x.io", "things", None, Some("system:a"), Some("status")),
        );
        assert!(matches!(
            Target::parse("/apis/apps/v1").unwrap(),
            Target::Plain(_)
        ));
        assert!(Target::parse("/api/v1/a/b/c/d/e/f").is_err());
        assert!(Target::parse("/api/v1/%ff").is_err());
    }
}
