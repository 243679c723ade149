//! Which part of the store a key or a range belongs to.
//!
//! The cache prefixes of a mirrored cluster belong to that mirror, one sub-store for each kind of object: a kind is followed
//! by one watch, and only within one watch is the order of revisions known. Mirrored cluster configs, canaries and statuses
//! are written by this server. All else is the own cluster's etcd.

use isthmus_model::ClusterName;
use isthmus_tls::rights::KeyRange;
use isthmus_wire::keys::{CLUSTER_CONFIG, Kind, REMOTE_STATUS, SYNCED, Scope, cluster_config};

/// Names a sub-store.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SubId {
    /// The own cluster's etcd.
    Own,
    /// One kind of a mirrored cluster's objects.
    Remote(ClusterName, Kind),
}

/// Which view serves a range.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Route {
    /// One sub-store, in its own revisions.
    Sub(SubId),
    /// Several, or this server's own keys.
    Merged,
}

/// Prefixes under which not everything is the own etcd's.
const SPECIAL: [&str; 5] = [
    CLUSTER_CONFIG,
    SYNCED,
    REMOTE_STATUS,
    "cilium/cache/",
    "isthmus/cache/",
];

fn cache_prefix(kind: Kind) -> String {
    // Every kind has a cache form.
    format!("{}/", kind.base_prefix(Scope::Cache).unwrap_or_default())
}

/// The sub-store that holds `key`; `None` = this server itself, or nobody.
pub(super) fn sub_of(key: &[u8], own: &ClusterName) -> Option<SubId> {
    for kind in Kind::ALL {
        if let Some(rest) = key.strip_prefix(cache_prefix(kind).as_bytes()) {
            let cluster = rest.split(|byte| *byte == b'/').next()?;
            let cluster = ClusterName::new(std::str::from_utf8(cluster).ok()?).ok()?;
            return (rest.len() > cluster.as_str().len()).then_some(SubId::Remote(cluster, kind));
        }
    }
    let own_marks =
        key == cluster_config(own).as_bytes() || key.starts_with(format!("{SYNCED}{own}/").as_bytes());
    let special = SPECIAL.iter().any(|prefix| key.starts_with(prefix.as_bytes()));
    (own_marks || !special).then_some(SubId::Own)
}

/// The mirrored kind within which all of `range` lies, if there is one.
pub(super) fn remote_of(range: &KeyRange, own: &ClusterName) -> Option<SubId> {
    let id = sub_of(range.start(), own)?;
    let SubId::Remote(cluster, kind) = &id else {
        return None;
    };
    let prefix = KeyRange::prefix(&format!("{}{cluster}/", cache_prefix(*kind)));
    range.lies_in(&prefix).then_some(id)
}

/// The view that serves `range`; `exists` tells which sub-stores there are.
pub(super) fn route(range: &KeyRange, own: &ClusterName, exists: impl Fn(&SubId) -> bool) -> Route {
    let Some(id) = sub_of(range.start(), own) else {
        return Route::Merged;
    };
    let inside = match &id {
        SubId::Own => {
            let own_marks = [
                KeyRange::key(&cluster_config(own)),
                KeyRange::prefix(&format!("{SYNCED}{own}/")),
            ];
            own_marks.iter().any(|marks| range.lies_in(marks))
                || !SPECIAL
                    .iter()
                    .any(|prefix| range.overlaps(&KeyRange::prefix(prefix)))
        }
        SubId::Remote(cluster, kind) => {
            range.lies_in(&KeyRange::prefix(&format!("{}{cluster}/", cache_prefix(*kind))))
        }
    };
    if inside && exists(&id) {
        Route::Sub(id)
    } else {
        Route::Merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn own() -> ClusterName {
        ClusterName::new("c1").unwrap()
    }

    fn of_prefix(prefix: &str) -> Route {
        route(
            &KeyRange::prefix(prefix),
            &own(),
            |id| !matches!(id, SubId::Remote(cluster, _) if cluster.as_str() == "c9"),
        )
    }

    #[test]
    fn readers_prefixes_stay_inside_one_sub_store() {
        let remote = |kind| Route::Sub(SubId::Remote(ClusterName::new("c2").unwrap(), kind));
        for (prefix, want) in [
            ("cilium/.heartbeat", Route::Sub(SubId::Own)),
            ("cilium/state/nodes/v1/c1/", Route::Sub(SubId::Own)),
            ("cilium/state/", Route::Sub(SubId::Own)),
            ("isthmus/local/slices/v1/c1/", Route::Sub(SubId::Own)),
            ("cilium/synced/c1/", Route::Sub(SubId::Own)),
            ("cilium/synced/c2/", Route::Merged),
            ("cilium/synced/", Route::Merged),
            ("cilium/cluster-config/", Route::Merged),
            ("cilium/cache/nodes/v1/c2/", remote(Kind::Nodes)),
            ("cilium/cache/identities/v1/c2/id/", remote(Kind::Identities)),
            ("isthmus/cache/slices/v1/c2/", remote(Kind::Slices)),
            ("cilium/cache/nodes/v1/c2", Route::Merged),
            ("cilium/cache/nodes/v1/c9/", Route::Merged),
            ("cilium/cache/", Route::Merged),
            ("isthmus/status/v1/remotes/", Route::Merged),
            ("isthmus/", Route::Merged),
            ("", Route::Merged),
        ] {
            assert_eq!(of_prefix(prefix), want, "{prefix}");
        }
        let key = |key: &str| route(&KeyRange::key(key), &own(), |_| true);
        assert_eq!(key("cilium/cluster-config/c1"), Route::Sub(SubId::Own));
        assert_eq!(key("cilium/cluster-config/c10"), Route::Merged);
        assert_eq!(key("cilium/cache/nodes/v1/c2/n1"), remote(Kind::Nodes));
    }

    fn some_key() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("cilium"),
            Just("isthmus"),
            Just("cache"),
            Just("state"),
            Just("nodes"),
            Just("v1"),
            Just("c1"),
            Just("c2"),
            Just("c10"),
            Just("synced"),
            Just("cluster-config"),
            Just("x"),
            Just(""),
        ];
        proptest::collection::vec(part, 1..6).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #[test]
        fn a_routed_range_holds_no_other_sub_stores_keys(start in some_key(), end in some_key(), key in some_key(), prefix in any::<bool>()) {
            let range = if prefix { KeyRange::prefix(&start) } else { KeyRange::from_etcd(start.as_bytes(), end.as_bytes()) };
            if let Route::Sub(id) = route(&range, &own(), |_| true) && range.contains(key.as_bytes()) {
                prop_assert_eq!(sub_of(key.as_bytes(), &own()), Some(id));
            }
        }
    }
}
