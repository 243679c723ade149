//! What a peer may read, by the common name of its certificate. Pure.
//!
//! The names and ranges are Cilium's (`pkg/kvstore/etcdinit`), with Isthmus' own prefixes beside them. They give no right to write: that is the
//! store's affair (embedded, locks).
//! A request is allowed if its whole range lies inside the union of the granted ranges: the rule of etcd, for Range and Watch.

/// A half-open range of keys.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct KeyRange {
    start: Vec<u8>,
    /// Exclusive; `None` = to the end of the keyspace.
    end: Option<Vec<u8>>,
}

impl KeyRange {
    /// The range that etcd means by these two fields: an empty `range_end` is the single key, one zero byte "to the end".
    pub fn from_etcd(key: &[u8], range_end: &[u8]) -> Self {
        let end = match range_end {
            [] => {
                let mut next = key.to_vec();
                next.push(0);
                Some(next)
            }
            [0] => None,
            end => Some(end.to_vec()),
        };
        Self {
            start: key.to_vec(),
            end,
        }
    }

    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: &str) -> Self {
        // Text never ends in 0xff, so its last byte always has a successor.
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self {
            start: prefix.as_bytes().to_vec(),
            end: (!end.is_empty()).then_some(end),
        }
    }

    /// Just `key`.
    pub fn key(key: &str) -> Self {
        Self::from_etcd(key.as_bytes(), &[])
    }

    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_slice() && self.end.as_deref().is_none_or(|end| key < end)
    }

    /// The first key of the range, unless it is empty.
    pub fn start(&self) -> &[u8] {
        &self.start
    }

    /// Whether every key of this range is in `outer`.
    pub fn lies_in(&self, outer: &Self) -> bool {
        outer.start <= self.start && self.ends_within(&outer.end)
    }

    /// Whether some key is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let begins_before_end_of = |a: &Self, b: &Self| b.end.as_ref().is_none_or(|end| a.start < *end);
        !self.is_empty()
            && !other.is_empty()
            && begins_before_end_of(self, other)
            && begins_before_end_of(other, self)
    }

    /// Whether no key lies in the range.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    fn ends_within(&self, end: &Option<Vec<u8>>) -> bool {
        match (&self.end, end) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(mine), Some(end)) => mine <= end,
        }
    }
}

/// What one peer may read: sorted ranges with gaps between them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rights {
    ranges: Vec<KeyRange>,
}

impl Rights {
    /// The rights of `common_name` at the API server of `cluster`; `None` for a name that has none.
    pub fn of_common_name(common_name: &str, cluster: &str) -> Option<Self> {
        let heartbeat = KeyRange::prefix("cilium/.heartbeat");
        let (role, of) = common_name.split_once('-').unwrap_or((common_name, ""));
        Some(Self::new(match role {
            "admin" if of == cluster => vec![KeyRange::prefix("")],
            "local" if of == cluster => vec![
                heartbeat,
                KeyRange::prefix("cilium/cache/"),
                KeyRange::prefix("cilium/state/"),
                KeyRange::prefix("cilium/cluster-config/"),
                KeyRange::prefix("cilium/synced/"),
                KeyRange::prefix("isthmus/"),
            ],
            "remote" if common_name == "remote" || !of.is_empty() => vec![
                heartbeat,
                KeyRange::prefix("cilium/state/"),
                KeyRange::key(&format!("cilium/cluster-config/{cluster}")),
                KeyRange::prefix(&format!("cilium/synced/{cluster}/")),
                KeyRange::prefix("isthmus/state/"),
            ],
            _ => return None,
        }))
    }

    /// The union of `ranges`.
    pub fn new(mut ranges: Vec<KeyRange>) -> Self {
        ranges.retain(|range| !range.is_empty());
        ranges.sort();
        let mut merged: Vec<KeyRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if last.end.as_ref().is_none_or(|end| range.start <= *end) => {
                    if last.ends_within(&range.end) {
                        last.end = range.end;
                    }
                }
                _ => merged.push(range),
            }
        }
        Self { ranges: merged }
    }

    /// Whether the whole of `range` may be read. An empty range is not covered: nobody needs one.
    pub fn covers(&self, range: &KeyRange) -> bool {
        !range.is_empty() && self.ranges.iter().any(|granted| range.lies_in(granted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix_allowed(name: &str, prefix: &str) -> bool {
        Rights::of_common_name(name, "c1").is_some_and(|rights| rights.covers(&KeyRange::prefix(prefix)))
    }

    #[test]
    fn remote_clusters_read_state_and_their_own_kind_of_marks() {
        for name in ["remote", "remote-c2"] {
            for prefix in [
                "cilium/.heartbeat",
                "cilium/state/nodes/v1/c1/",
                "cilium/synced/c1/",
                "isthmus/state/slices/v1/c1/",
            ] {
                assert!(prefix_allowed(name, prefix), "{name} {prefix}");
            }
            for prefix in [
                "",
                "cilium/",
                "cilium/cache/",
                "cilium/synced/",
                "cilium/synced/c10/",
                "cilium/cluster-config/",
                "isthmus/",
                "isthmus/local/",
                "isthmus/cache/",
                "isthmus/status/",
            ] {
                assert!(!prefix_allowed(name, prefix), "{name} {prefix}");
            }
        }
        let rights = Rights::of_common_name("remote", "c1").unwrap();
        assert!(rights.covers(&KeyRange::key("cilium/cluster-config/c1")));
        assert!(!rights.covers(&KeyRange::key("cilium/cluster-config/c10")));
        assert!(!rights.covers(&KeyRange::prefix("cilium/cluster-config/c1")));
        assert!(rights.covers(&KeyRange::from_etcd(b"cilium/.heartbeat", b"cilium/.heartbeau")));
        assert!(!rights.covers(&KeyRange::from_etcd(b"cilium/state/", b"\0")));
    }

    #[test]
    fn local_and_admin_names_belong_to_one_cluster() {
        assert!(prefix_allowed("local-c1", "isthmus/local/"));
        assert!(prefix_allowed("local-c1", "cilium/synced/"));
        assert!(!prefix_allowed("local-c1", "cilium/"));
        assert!(prefix_allowed("admin-c1", ""));
        for name in [
            "local-c2", "admin-c2", "admin", "local", "remote-", "root", "", "remotes",
        ] {
            assert_eq!(Rights::of_common_name(name, "c1"), None, "{name}");
        }
    }
}
