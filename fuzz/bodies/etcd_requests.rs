//! Requests of etcd's API as any client may send them: read, routed, checked and answered by the API server's pure parts.

use std::time::Duration;

use bytes::Bytes;
use isthmus_clustermesh_apiserver::{
    embedded::{
        Command, Refusal,
        check::check,
        state::{Past, State},
    },
    server::{
        locks::{LockLimits, LockSpace, concerns},
        txn,
    },
    store::{Budget, Cursor, HistoryLimits, Next, Relist, Route, SourceChange, Store, SubId, WatchStart},
};
use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest,
    PutRequest, RangeRequest, TxnRequest, WatchRequest, watch_create_request::FilterType,
    watch_request::RequestUnion,
};
use isthmus_tls::{Rights, rights::KeyRange};
use isthmus_wire::keys::Kind;
use prost::Message;

/// Keys that the store holds.
const KEYS: usize = 60;
/// What a transaction may look at and answer.
const KEYS_LOOKED_AT: usize = 500;
const ANSWER_BYTES: usize = 20_000;
const LOCKS: &str = "cilium/.initlock/";
/// Watches that are looked at.
const WATCHES_MAX: usize = 64;

fn change(key: &str, revision: i64) -> SourceChange {
    SourceChange::Put {
        key: Bytes::from(key.to_owned()),
        value: Bytes::from_static(b"value"),
        create_revision: revision,
        mod_revision: revision,
        version: 1,
    }
}

/// The own cluster's state, a mirrored kind, and this server's own keys.
fn store() -> Option<Store> {
    let (own, remote) = (ClusterName::new("c1").ok()?, ClusterName::new("c2").ok()?);
    let limits = HistoryLimits {
        len: 20,
        bytes: 10_000,
        age: HistoryLimits::AGE,
    };
    let mut store = Store::new(own, 7, limits, limits).counting_from(1_000_000);
    let mirrored = SubId::Remote(remote, Kind::Nodes);
    store.add_sub(mirrored.clone());
    let list = |cluster_id, changes| Relist {
        cluster_id,
        revision: 10,
        new_history: false,
        changes,
        present: None,
    };
    let keys = |prefix: &str| {
        (0..20)
            .map(|at| change(&format!("{prefix}{at}"), at % 10 + 1))
            .collect()
    };
    store.relist(&SubId::Own, list(1, keys("cilium/state/nodes/v1/c1/n")));
    store.relist(&mirrored, list(2, keys("cilium/cache/nodes/v1/c2/n")));
    for at in 0..20 {
        store.put_local(
            format!("cilium/synced/c2/{at}").into(),
            Bytes::from_static(b"now"),
        );
    }
    for at in 11..40 {
        store.apply(
            &SubId::Own,
            at,
            vec![change(&format!("cilium/state/nodes/v1/c1/n{}", at % 20), at)],
        );
    }
    Some(store)
}

struct NoPast;

impl Past for NoPast {
    fn range(&self, _: &RangeRequest) -> Result<isthmus_proto::etcdserverpb::RangeResponse, Refusal> {
        Err(Refusal::Compacted)
    }
}

fn locks() -> LockSpace {
    let limits = LockLimits {
        leases_per_client: 3,
        leases: 4,
        keys_per_client: 3,
        keys: 4,
        key_bytes: 100,
    };
    let mut locks = LockSpace::new(KeyRange::prefix(LOCKS), 100, limits);
    let _ = locks.grant("remote", 1, 60, Duration::ZERO);
    locks
}

fn judge(range: &KeyRange) {
    for name in ["admin-c1", "local-c1", "remote", "remote-c2"] {
        if let Some(rights) = Rights::of_common_name(name, "c1") {
            assert!(!rights.covers(range) || !range.is_empty());
        }
    }
}

fn range(request: &RangeRequest) {
    let Some(store) = store() else { return };
    let range = KeyRange::from_etcd(&request.key, &request.range_end);
    judge(&range);
    let route = store.route(&range);
    if let Ok(answer) = store.range(&route, request) {
        assert!(answer.kvs.len() <= KEYS && answer.count >= 0 && answer.count as usize <= KEYS);
        assert!(answer.header.is_some_and(|header| header.cluster_id != 0));
        assert!(answer.kvs.iter().all(|kv| range.contains(&kv.key)));
        let limit = usize::try_from(request.limit).unwrap_or_default();
        assert!(limit == 0 || answer.kvs.len() <= limit);
        assert!(!answer.more || (limit > 0 && answer.kvs.len() == limit));
    }
}

fn write(command: &Command) {
    let mut state = State::default();
    let _ = state.apply(&Command::Grant { id: 1, ttl: 60 }, &NoPast);
    let refused = check(command).is_err();
    let before = state.revision();
    let applied = state.apply(command, &NoPast);
    assert!(!(refused && applied.is_ok()));
    assert!(state.revision() == before || (applied.is_ok() && state.revision() == before + 1));
    let mut locks = locks();
    let mut budget = Budget::new(KEYS_LOOKED_AT, ANSWER_BYTES);
    let _ = locks.look(command, &mut budget);
    assert!(budget.looked() <= KEYS_LOOKED_AT);
    if let Ok((_, changes)) = locks.write("remote", command, &NoPast) {
        let inside = |change: &SourceChange| change.key().starts_with(LOCKS.as_bytes());
        assert!(changes.changes.iter().all(inside));
    }
    // A client's lease is all that its keys hang on.
    let _ = locks.revoke("remote", 1);
    assert!(locks.leases("remote").is_empty() && locks.next_end().is_none());
}

fn transaction(request: TxnRequest) {
    let command = Command::Txn(request);
    let refused = check(&command).is_err();
    let Command::Txn(request) = &command else { return };
    if let (false, Some(store)) = (refused, store()) {
        let _ = concerns(&KeyRange::prefix(LOCKS), request);
        let mut ranges = 0;
        let reads_only = txn::reads_only(request, &mut |range| {
            judge(range);
            ranges += 1;
            true
        });
        if reads_only {
            let mut budget = Budget::new(KEYS_LOOKED_AT, ANSWER_BYTES);
            let route = txn::route(&store, request, Route::Sub(SubId::Own));
            if let Ok(answer) = txn::answer(&store, &route, request, &mut budget) {
                // Every range in it has a header, which is not counted twice.
                assert!(answer.encoded_len() <= ANSWER_BYTES + 64 * (ranges + 1));
            }
            assert!(budget.looked() <= KEYS_LOOKED_AT);
        }
    }
    write(&command);
}

/// Messages, each after a byte that is its length.
fn watches(mut bytes: &[u8]) {
    let Some(mut store) = store() else { return };
    let mut cursors: Vec<Cursor> = vec![];
    let mut revision = 40;
    while let Some((len, rest)) = bytes.split_first() {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        bytes = rest;
        let request = WatchRequest::decode(message)
            .ok()
            .and_then(|request| request.request_union);
        match request {
            Some(RequestUnion::CreateRequest(create)) if cursors.len() < WATCHES_MAX => {
                let range = KeyRange::from_etcd(&create.key, &create.range_end);
                judge(&range);
                let has = |filter: FilterType| create.filters.contains(&(filter as i32));
                let (cursor, header) = store.watch(WatchStart {
                    start_revision: create.start_revision,
                    no_put: has(FilterType::Noput),
                    no_delete: has(FilterType::Nodelete),
                    prev_kv: create.prev_kv,
                    range,
                });
                assert!(header.revision > 0);
                cursors.push(cursor);
            }
            Some(RequestUnion::CancelRequest(cancel)) if !cursors.is_empty() => {
                cursors.swap_remove(cancel.watch_id.unsigned_abs() as usize % cursors.len());
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                for cursor in &mut cursors {
                    if store.next(cursor).is_none() {
                        let _ = store.progress(cursor, true);
                    }
                    let _ = store.future_of(cursor);
                }
            }
            _ => {
                revision += 1;
                store.apply(
                    &SubId::Own,
                    revision,
                    vec![change("cilium/state/nodes/v1/c1/n1", revision)],
                );
            }
        }
        cursors.retain_mut(|cursor| {
            let mut looks = 0;
            loop {
                looks += 1;
                assert!(looks < 1000, "a watch speaks for ever");
                match store.next(cursor) {
                    None => return true,
                    Some(Next::Events { events, .. }) => assert!(!events.is_empty()),
                    Some(Next::Compacted { .. }) => return false,
                }
            }
        });
    }
}

fn leases(bytes: &[u8]) {
    let mut locks = locks();
    let (mut now, mut bytes) = (Duration::ZERO, bytes);
    while let Some((kind, rest)) = bytes.split_first() {
        let (message, rest) = rest.split_at(rest.len().min(24));
        bytes = rest;
        match kind % 5 {
            0 => {
                if let Ok(request) = LeaseGrantRequest::decode(message)
                    && check(&Command::Grant {
                        id: request.id,
                        ttl: request.ttl,
                    })
                    .is_ok()
                {
                    let _ = locks.grant("remote", request.id, request.ttl, now);
                }
            }
            1 => {
                if let Ok(request) = LeaseRevokeRequest::decode(message) {
                    let _ = locks.revoke("remote", request.id);
                }
            }
            2 => {
                if let Ok(request) = LeaseKeepAliveRequest::decode(message) {
                    assert!(
                        locks
                            .keep_alive("remote", request.id, now)
                            .is_none_or(|ttl| ttl > 0)
                    );
                }
            }
            3 => {
                if let Ok(request) = LeaseTimeToLiveRequest::decode(message) {
                    let _ = locks.lease("remote", request.id, now);
                }
            }
            _ => now += Duration::from_secs(u64::from(*kind)),
        }
        while locks.expire(now).is_some() {}
        assert!(locks.next_end().is_none_or(|end| end > now) && locks.leases("remote").len() <= 3);
    }
}

/// The first byte says which message the rest is.
pub fn run(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind % 6 {
        0 => {
            if let Ok(request) = RangeRequest::decode(bytes) {
                range(&request);
            }
        }
        1 => {
            if let Ok(request) = TxnRequest::decode(bytes) {
                transaction(request);
            }
        }
        2 => {
            if let Ok(request) = PutRequest::decode(bytes) {
                write(&Command::Put(request));
            }
        }
        3 => {
            if let Ok(request) = DeleteRangeRequest::decode(bytes) {
                write(&Command::Delete(request));
            }
        }
        4 => watches(bytes),
        _ => leases(bytes),
    }
}
