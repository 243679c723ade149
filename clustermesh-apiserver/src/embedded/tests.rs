//! The state against a model that keeps every revision whole, what is on disk against both, and the file against accidents.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use isthmus_model::ClusterName;
use isthmus_proto::{
    etcdserverpb::{
        Compare, DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
        response_op::Response,
    },
    mvccpb::{Event, KeyValue},
};
use proptest::prelude::*;
use prost::Message;

use super::{
    Refusal,
    file::{File, OpenError},
    state::{
        Answer, Command, DiskWrite, Effects, Loaded, Loading, NEVER_COMPACTED, Past, Place, Retention, State,
    },
};
use crate::store::SourceChange;

mod faults;
mod service;

/// Content at one revision.
type Snapshot = BTreeMap<Bytes, KeyValue>;

/// The slow and simple way: a copy of everything for each revision.
#[derive(Clone, Debug)]
struct Model {
    revisions: Vec<Snapshot>,
    leases: BTreeMap<i64, i64>,
}

impl Model {
    fn new() -> Self {
        // Revisions 0 and 1 hold nothing.
        Self {
            revisions: vec![Snapshot::new(), Snapshot::new()],
            leases: BTreeMap::new(),
        }
    }

    fn revision(&self) -> i64 {
        self.revisions.len() as i64 - 1
    }

    fn now(&self) -> &Snapshot {
        self.revisions.last().unwrap()
    }

    fn commit(&mut self, next: Snapshot) {
        // Every put changes a revision, so that equal content means that nothing was written.
        if next != *self.now() {
            self.revisions.push(next);
        }
    }

    fn put(&self, next: &mut Snapshot, put: &PutRequest) {
        let old = next.get(&put.key).cloned();
        let at = self.revision() + 1;
        let kv = KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: old.as_ref().map_or(at, |old| old.create_revision),
            mod_revision: at,
            version: old.as_ref().map_or(1, |old| old.version + 1),
            lease: put.lease,
        };
        next.insert(put.key.clone(), kv);
    }

    fn delete(next: &mut Snapshot, delete: &DeleteRangeRequest) -> i64 {
        let before = next.len();
        let end = &delete.range_end;
        next.retain(|key, _| {
            let inside = if end.is_empty() {
                *key == delete.key
            } else {
                *key >= delete.key && (end[..] == [0] || key < end)
            };
            !inside
        });
        (before - next.len()) as i64
    }

    /// Whether it is done.
    fn apply(&mut self, command: &Command) -> bool {
        let mut next = self.now().clone();
        let lease_known = |put: &PutRequest| put.lease == 0 || self.leases.contains_key(&put.lease);
        match command {
            Command::Put(put) => {
                if !lease_known(put) {
                    return false;
                }
                self.put(&mut next, put);
            }
            Command::Delete(delete) => {
                Self::delete(&mut next, delete);
            }
            Command::Txn(txn) => {
                // The generated ones compare versions only.
                let succeeded = txn.compare.iter().all(|compare| {
                    let version = self.now().get(&compare.key).map_or(0, |kv| kv.version);
                    compare.target_union == Some(TargetUnion::Version(version))
                });
                let ops = if succeeded { &txn.success } else { &txn.failure };
                let mut keys = BTreeSet::new();
                for branch in [&txn.success, &txn.failure] {
                    keys.clear();
                    for op in branch {
                        if let Some(Request::RequestPut(put)) = &op.request
                            && (!keys.insert(put.key.clone())
                                || branch.iter().any(|op| {
                                    matches!(&op.request, Some(Request::RequestDeleteRange(delete))
                                        if Self::delete(&mut BTreeMap::from([(put.key.clone(), KeyValue::default())]), delete) == 1)
                                }))
                        {
                            return false;
                        }
                    }
                }
                for op in ops {
                    match op.request.as_ref().unwrap() {
                        Request::RequestPut(put) if !lease_known(put) => return false,
                        Request::RequestPut(put) => self.put(&mut next, put),
                        Request::RequestDeleteRange(delete) => {
                            Self::delete(&mut next, delete);
                        }
                        _ => {}
                    }
                }
            }
            Command::Grant { id, ttl } => {
                return !self.leases.contains_key(id) && self.leases.insert(*id, *ttl).is_none();
            }
            Command::Revoke(id) => {
                if self.leases.remove(id).is_none() {
                    return false;
                }
                next.retain(|_, kv| kv.lease != *id);
            }
            Command::Compact(_) => return true,
        }
        self.commit(next);
        true
    }
}

/// A disk in memory.
#[derive(Clone, Debug)]
struct Disk {
    log: BTreeMap<Place, Event>,
    leases: BTreeMap<i64, i64>,
    compacted: i64,
}

impl Disk {
    fn new() -> Self {
        Self {
            log: BTreeMap::new(),
            leases: BTreeMap::new(),
            compacted: NEVER_COMPACTED,
        }
    }

    fn commit(&mut self, writes: &[DiskWrite]) {
        for write in writes.iter().cloned() {
            match write {
                DiskWrite::Append(place, logged) => {
                    let event = Event::decode(&*logged.message(place)).unwrap();
                    assert_eq!(self.log.insert(place, event), None);
                }
                DiskWrite::Remove(place) => assert!(self.log.remove(&place).is_some(), "{place:?}"),
                DiskWrite::Lease(id, ttl) => assert_eq!(self.leases.insert(id, ttl), None),
                DiskWrite::NoLease(id) => assert!(self.leases.remove(&id).is_some()),
                DiskWrite::Compacted(at) => self.compacted = at,
            }
        }
    }

    fn load(&self) -> Loaded {
        let mut loading = Loading::new(self.compacted, self.leases.clone());
        for (place, event) in &self.log {
            loading.push(*place, event.clone()).unwrap();
        }
        loading.end()
    }
}

/// The model's past, as readers' history would tell it.
impl Past for Model {
    fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refusal> {
        assert!(request.revision < self.revision());
        let all = self.revisions[request.revision as usize].values();
        Ok(RangeResponse {
            kvs: all.cloned().collect(),
            ..Default::default()
        })
    }
}

fn put(key: &'static str, value: &'static str, lease: i64) -> PutRequest {
    PutRequest {
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from_static(value.as_bytes()),
        lease,
        ..Default::default()
    }
}

fn some_key() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("a"), Just("b"), Just("b/1"), Just("b/2"), Just("c")]
}

fn some_put() -> impl Strategy<Value = PutRequest> {
    let lease = prop_oneof![4 => Just(0), 1 => 1i64..4];
    (
        some_key(),
        prop_oneof![Just(""), Just("x"), Just("a longer value")],
        lease,
    )
        .prop_map(|(key, value, lease)| put(key, value, lease))
}

fn some_delete() -> impl Strategy<Value = DeleteRangeRequest> {
    (
        some_key(),
        prop_oneof![Just(""), Just("b0"), Just("\0"), Just("z"), Just("a")],
    )
        .prop_map(|(key, end)| DeleteRangeRequest {
            key: Bytes::from_static(key.as_bytes()),
            range_end: Bytes::from_static(end.as_bytes()),
            prev_kv: false,
        })
}

fn some_op() -> impl Strategy<Value = RequestOp> {
    let everything = RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        ..Default::default()
    };
    prop_oneof![
        4 => some_put().prop_map(Request::RequestPut),
        1 => some_delete().prop_map(Request::RequestDeleteRange),
        1 => Just(Request::RequestRange(everything)),
    ]
    .prop_map(|request| RequestOp {
        request: Some(request),
    })
}

fn some_command() -> impl Strategy<Value = Command> {
    let compare = (some_key(), 0i64..3).prop_map(|(key, version)| Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Version as i32,
        key: Bytes::from_static(key.as_bytes()),
        target_union: Some(TargetUnion::Version(version)),
        ..Default::default()
    });
    let ops = || proptest::collection::vec(some_op(), 0..4);
    let txn = (proptest::collection::vec(compare, 0..2), ops(), ops());
    prop_oneof![
        5 => some_put().prop_map(Command::Put),
        2 => some_delete().prop_map(Command::Delete),
        4 => txn.prop_map(|(compare, success, failure)| Command::Txn(TxnRequest { compare, success, failure })),
        2 => (1i64..4, 1i64..100).prop_map(|(id, ttl)| Command::Grant { id, ttl }),
        1 => (1i64..4).prop_map(Command::Revoke),
        1 => (-2i64..30).prop_map(Command::Compact),
    ]
}

/// Content after `changes`.
fn replay(content: &mut Snapshot, changes: &[SourceChange]) {
    for change in changes {
        match change {
            SourceChange::Shared(encoded) => {
                content.insert(encoded.shared_key(), encoded.key_value());
            }
            SourceChange::Delete { key, .. } => assert!(content.remove(key).is_some()),
            SourceChange::Put { .. } => panic!("a copy"),
        }
    }
}

/// What the state holds, as a transaction reads it.
fn read(state: &mut State, past: &dyn Past, revision: i64) -> Result<Snapshot, Refusal> {
    let all = RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        revision,
        ..Default::default()
    };
    let txn = TxnRequest {
        success: vec![RequestOp {
            request: Some(Request::RequestRange(all)),
        }],
        ..Default::default()
    };
    let Answer::Txn(mut answer) = state.apply(&Command::Txn(txn), past)?.0 else {
        panic!("no transaction's answer");
    };
    let Some(Response::ResponseRange(range)) = answer.responses.remove(0).response else {
        panic!("no range's answer");
    };
    Ok(range.kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect())
}

proptest! {
    #[test]
    fn it_does_what_the_model_does_and_comes_back_from_disk(commands in proptest::collection::vec(some_command(), 1..60)) {
        let (mut state, mut model, mut disk) = (State::default(), Model::new(), Disk::new());
        let mut seen = Snapshot::new();
        for command in &commands {
            let before = state.clone();
            let result = state.apply(command, &model);
            match command {
                Command::Compact(at) => {
                    let allowed = *at > before.compacted() && *at <= before.revision();
                    prop_assert_eq!(result.is_ok(), allowed);
                }
                command => prop_assert_eq!(result.is_ok(), model.apply(command), "{:?}: {:?}", command, result),
            }
            let Ok((_, Effects { changes, writes, .. })) = result else {
                prop_assert_eq!(&state, &before, "what is refused changes nothing");
                continue;
            };
            prop_assert_eq!(state.revision(), model.revision());
            let all_at_one = changes.iter().all(|change| change.mod_revision() == state.revision());
            prop_assert!(all_at_one && changes.is_empty() == (state.revision() == before.revision()));
            replay(&mut seen, &changes);
            prop_assert_eq!(&seen, model.now());
            disk.commit(&writes);
            // On disk is just what is needed.
            let compacted = disk.compacted;
            let base = &model.revisions[compacted.max(0) as usize];
            let old: BTreeSet<i64> = base.values().map(|kv| kv.mod_revision).collect();
            let logged: BTreeSet<i64> = disk.log.keys().map(|place| place.0).collect();
            let wanted: BTreeSet<i64> = old.into_iter().chain((compacted.max(1) + 1)..=model.revision()).collect();
            prop_assert_eq!(logged, wanted);
            let loaded = disk.load();
            prop_assert_eq!(&loaded.state, &state);
            let mut shown = Snapshot::new();
            replay(&mut shown, &loaded.base);
            prop_assert_eq!(&shown, base);
            replay(&mut shown, &loaded.later);
            prop_assert_eq!(&shown, &seen);
        }
        let bytes: usize = disk.log.values().map(Message::encoded_len).sum();
        let spare = (disk.log.len() + disk.leases.len()) * 64;
        prop_assert!(state.bytes() >= bytes && state.bytes() <= bytes + spare, "{} of {bytes}", state.bytes());
        for (id, ttl) in &model.leases {
            let attached = model.now().values().filter(|kv| kv.lease == *id);
            let attached: Vec<Bytes> = attached.map(|kv| kv.key.clone()).collect();
            prop_assert_eq!(state.lease(*id), Some((*ttl, attached)));
        }
        let revision = state.revision();
        for at in -3..revision + 3 {
            let want = match at {
                at if at > revision => Err(Refusal::Future),
                0 => Ok(model.now()),
                at if at < state.compacted() => Err(Refusal::Compacted),
                ..0 => Ok(model.now()),
                at => Ok(&model.revisions[at as usize]),
            };
            prop_assert_eq!(read(&mut state, &model, at), want.cloned(), "at {}", at);
        }
    }

    #[test]
    fn compaction_keeps_to_its_bounds(commands in proptest::collection::vec(some_command(), 1..80), revisions in 1i64..20, bytes in 0usize..400) {
        let mut state = State::default();
        for command in &commands {
            let _ = state.apply(command, &Model::new());
            let retention = Retention { revisions, bytes };
            if let Some(at) = state.compaction_due(retention, 0) {
                prop_assert!(state.apply(&Command::Compact(at), &Model::new()).is_ok());
                prop_assert_eq!(state.compaction_due(retention, 0), None);
            }
            prop_assert!(state.revision() - state.compacted().max(1) <= revisions);
        }
    }
}

fn name(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

#[test]
fn a_file_keeps_its_history_and_content() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("new/store");
    let opened = File::open(&data, &name("c1"), 7).unwrap();
    let mut state = opened.loaded.state;
    for command in [
        Command::Grant { id: 5, ttl: 60 },
        Command::Put(put("a", "1", 5)),
        Command::Put(put("a", "2", 0)),
        Command::Put(put("b", "", 5)),
        Command::Compact(3),
    ] {
        let (_, effects) = state.apply(&command, &Model::new()).unwrap();
        opened.file.commit(&effects.writes).unwrap();
    }
    assert!(matches!(
        File::open(&data, &name("c1"), 8),
        Err(OpenError::InUse { .. })
    ));
    drop(opened.file);
    let again = File::open(&data, &name("c1"), 8).unwrap();
    assert_eq!((again.history, again.loaded.state), (7, state));
}

#[test]
fn foreign_and_damaged_files_are_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let opened = File::open(directory.path(), &name("c1"), 7).unwrap();
    let mut state = opened.loaded.state;
    let (_, effects) = state
        .apply(&Command::Put(put("a", "1", 0)), &Model::new())
        .unwrap();
    opened.file.commit(&effects.writes).unwrap();
    drop(opened.file);
    let Err(error) = File::open(directory.path(), &name("c2"), 7) else {
        panic!("it opens another cluster's");
    };
    assert!(error.to_string().contains("cluster `c1`, not of `c2`"), "{error}");
    File::open(directory.path(), &name("c1"), 7).unwrap();

    let whole = std::fs::read(&path).unwrap();
    for bytes in [vec![], b"hello".repeat(1000), whole[..whole.len() / 3].to_vec()] {
        std::fs::write(&path, &bytes).unwrap();
        let Err(error) = File::open(directory.path(), &name("c1"), 7) else {
            panic!("it opens a damaged file");
        };
        assert!(error.to_string().contains("move it away"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "it was touched");
    }
    std::fs::remove_file(&path).unwrap();
    let other = redb::Database::create(&path).unwrap();
    let transaction = other.begin_write().unwrap();
    transaction
        .open_table(redb::TableDefinition::<u8, u8>::new("theirs"))
        .unwrap();
    transaction.commit().unwrap();
    drop(other);
    assert!(matches!(
        File::open(directory.path(), &name("c1"), 7),
        Err(OpenError::Unreadable { .. })
    ));
}

#[test]
fn a_log_that_makes_no_sense_is_refused() {
    let event = |key: &'static str, mod_revision| Event {
        r#type: 0,
        kv: Some(KeyValue {
            key: Bytes::from_static(key.as_bytes()),
            create_revision: 2,
            mod_revision,
            version: 1,
            ..Default::default()
        }),
        prev_kv: None,
    };
    let load = |event| {
        let mut loading = Loading::new(0, BTreeMap::new());
        loading.push((2, 0), event).is_ok()
    };
    assert!(load(event("a", 2)));
    assert!(!load(event("", 2)));
    assert!(!load(event("a", 3)));
    assert!(!load(Event {
        kv: None,
        ..event("a", 2)
    }));
    assert!(!load(Event {
        r#type: 9,
        ..event("a", 2)
    }));
}
