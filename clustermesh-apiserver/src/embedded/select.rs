//! Reads inside a transaction: comparisons and ranges over the state as the transaction sees it. Pure.

use std::cmp::Ordering;

use bytes::Bytes;
use isthmus_proto::{
    etcdserverpb::{
        Compare, RangeRequest, RangeResponse, ResponseHeader,
        compare::{CompareResult, CompareTarget, TargetUnion},
        range_request::{SortOrder, SortTarget},
    },
    mvccpb::KeyValue,
};

use super::content::Content;
use crate::store::{Encoded, Revisions};

/// Answers `request`, whose revision is the present one, at `revision`.
pub(super) fn range(content: &Content, revision: i64, request: &RangeRequest) -> RangeResponse {
    let all = || content.between(&request.key, &request.range_end);
    let mut response = RangeResponse {
        header: Some(ResponseHeader {
            revision,
            ..Default::default()
        }),
        count: all().count() as i64,
        ..Default::default()
    };
    if request.count_only {
        return response;
    }
    let within = |at: i64, min: i64, max: i64| (min == 0 || at >= min) && (max == 0 || at <= max);
    let (target, order) = (request.sort_target(), request.sort_order());
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
    let filtered = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    // As etcd does, before it sorts what has no order.
    let look_at = match limit {
        Some(limit) if order == SortOrder::None && filtered == [0; 4] => limit.saturating_add(1),
        _ => usize::MAX,
    };
    // Only what is answered is made into a message.
    let mut page: Vec<(Revisions, &Encoded)> = all()
        .take(look_at)
        .map(|record| (record.encoded.revisions(), &record.encoded))
        .filter(|(at, _)| {
            within(at.modified, request.min_mod_revision, request.max_mod_revision)
                && within(
                    at.create,
                    request.min_create_revision,
                    request.max_create_revision,
                )
        })
        .collect();
    if order != SortOrder::None || target != SortTarget::Key {
        // Equal ones stay in key order, also when descending.
        page.sort_by(|(at, a), (other, b)| {
            let ordering = match target {
                SortTarget::Key => a.key().cmp(b.key()),
                SortTarget::Version => at.version.cmp(&other.version),
                SortTarget::Create => at.create.cmp(&other.create),
                SortTarget::Mod => at.modified.cmp(&other.modified),
                SortTarget::Value => a.value().cmp(b.value()),
            };
            if order == SortOrder::Descend {
                ordering.reverse()
            } else {
                ordering
            }
        });
    }
    if let Some(limit) = limit
        && page.len() > limit
    {
        page.truncate(limit);
        response.more = true;
    }
    response.kvs = page.into_iter().map(|(_, encoded)| encoded.key_value()).collect();
    if request.keys_only {
        response.kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
    }
    response
}

/// Whether every key of the comparison's range holds to it. Without any key, an absent one is compared.
pub(super) fn holds(content: &Content, compare: &Compare) -> bool {
    let mut keys = content.between(&compare.key, &compare.range_end).peekable();
    if keys.peek().is_none() {
        // An absent key has no value, not even an empty one.
        return compare.target() != CompareTarget::Value && holds_for(compare, &KeyValue::default());
    }
    keys.all(|record| holds_for(compare, &record.encoded.key_value()))
}

/// Whether the key holds to the comparison.
pub(crate) fn holds_for(compare: &Compare, kv: &KeyValue) -> bool {
    let asked = compare.target_union.as_ref();
    let number = match asked {
        Some(
            TargetUnion::Version(n)
            | TargetUnion::CreateRevision(n)
            | TargetUnion::ModRevision(n)
            | TargetUnion::Lease(n),
        ) => *n,
        Some(TargetUnion::Value(_)) | None => 0,
    };
    let ordering = match compare.target() {
        CompareTarget::Version => kv.version.cmp(&number),
        CompareTarget::Create => kv.create_revision.cmp(&number),
        CompareTarget::Mod => kv.mod_revision.cmp(&number),
        CompareTarget::Lease => kv.lease.cmp(&number),
        CompareTarget::Value => {
            let value: &[u8] = match asked {
                Some(TargetUnion::Value(value)) => value,
                _ => &[],
            };
            kv.value[..].cmp(value)
        }
    };
    match compare.result() {
        CompareResult::Equal => ordering == Ordering::Equal,
        CompareResult::NotEqual => ordering != Ordering::Equal,
        CompareResult::Greater => ordering == Ordering::Greater,
        CompareResult::Less => ordering == Ordering::Less,
    }
}
