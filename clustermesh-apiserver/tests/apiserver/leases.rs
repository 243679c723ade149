//! Leases and locks of readers, beside etcd's.

use std::time::Duration;

use isthmus_proto::etcdserverpb::{
    AlarmRequest, AuthStatusRequest, AuthenticateRequest, Compare, DeleteRangeRequest, LeaseGrantRequest,
    LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, MemberListRequest, PutRequest,
    RangeRequest, RequestOp, StatusRequest, TxnRequest, TxnResponse, WatchCreateRequest,
    alarm_request::AlarmAction,
    auth_client::AuthClient,
    cluster_client::ClusterClient,
    compare::{CompareResult, CompareTarget, TargetUnion},
    kv_client::KvClient,
    lease_client::LeaseClient,
    maintenance_client::MaintenanceClient,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
    response_op::Response,
    watch_request::RequestUnion,
};
use tonic::transport::Channel;

use crate::{
    both::{Both, Session, channel, told},
    raw::Dial,
};

async fn grant(client: &mut LeaseClient<Channel>, id: i64, ttl: i64) -> Result<LeaseGrantResponse, String> {
    let answer = client
        .lease_grant(LeaseGrantRequest { id, ttl })
        .await
        .map_err(told)?;
    let mut answer = answer.into_inner();
    assert!(answer.header.take().unwrap().cluster_id != 0);
    Ok(answer)
}

async fn keep_alive(client: &mut LeaseClient<Channel>, id: i64) -> LeaseKeepAliveResponse {
    let requests = tokio_stream::iter([LeaseKeepAliveRequest { id }]);
    let mut answers = client.lease_keep_alive(requests).await.unwrap().into_inner();
    let mut answer = answers.message().await.unwrap().unwrap();
    assert!(answer.header.take().is_some());
    answer
}

async fn time_to_live(client: &mut LeaseClient<Channel>, id: i64) -> LeaseTimeToLiveResponse {
    let request = LeaseTimeToLiveRequest { id, keys: true };
    let mut answer = client.lease_time_to_live(request).await.unwrap().into_inner();
    assert!(answer.header.take().is_some());
    answer
}

async fn leases(client: &mut LeaseClient<Channel>) -> Vec<i64> {
    let answer = client
        .lease_leases(LeaseLeasesRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut ids: Vec<i64> = answer.leases.iter().map(|lease| lease.id).collect();
    ids.sort_unstable();
    ids
}

async fn revoke(client: &mut LeaseClient<Channel>, id: i64) -> Result<(), String> {
    let answer = client
        .lease_revoke(LeaseRevokeRequest { id })
        .await
        .map_err(told)?;
    assert!(answer.into_inner().header.is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_etcds() {
    let both = Both::start("remote-c2").await;
    let [mut theirs, mut ours] = both.leases();
    // A TTL below the least one, a usual one, one that is taken, one that is too long.
    for (id, ttl) in [
        (11, 0),
        (12, -5),
        (13, 900),
        (14, 60),
        (13, 900),
        (15, 9_000_000_001),
    ] {
        let want = grant(&mut theirs, id, ttl).await;
        assert_eq!(grant(&mut ours, id, ttl).await, want, "lease {id} of {ttl}");
    }
    for id in [13, 14, 999] {
        assert_eq!(keep_alive(&mut ours, id).await, keep_alive(&mut theirs, id).await);
        let [want, got] = [
            time_to_live(&mut theirs, id).await,
            time_to_live(&mut ours, id).await,
        ];
        // Of what is left, a second may have gone between.
        assert!((want.ttl - got.ttl).abs() <= 30 && (want.ttl > 0) == (got.ttl > 0));
        assert_eq!(
            (got.id, got.granted_ttl, got.keys),
            (want.id, want.granted_ttl, want.keys)
        );
    }
    for id in [14, 14, 999] {
        assert_eq!(
            revoke(&mut ours, id).await,
            revoke(&mut theirs, id).await,
            "lease {id}"
        );
    }
    assert_eq!(keep_alive(&mut ours, 14).await, keep_alive(&mut theirs, 14).await);
    // Those of two seconds end.
    let ended = async {
        while leases(&mut ours).await != [13] || leases(&mut theirs).await != [13] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ended)
        .await
        .unwrap();
    assert_eq!(revoke(&mut ours, 11).await, revoke(&mut theirs, 11).await);
    // The server chooses where the client does not.
    let [a, b] = [
        grant(&mut ours, 0, 60).await.unwrap(),
        grant(&mut ours, 0, 60).await.unwrap(),
    ];
    assert!(a.id > 0 && b.id > 0 && a.id != b.id && a.ttl == 60);
    // Others' leases are not there.
    let other = channel(&both.pki, both.server.address, "remote-c3").await;
    let mut other = LeaseClient::new(other);
    assert!(leases(&mut other).await.is_empty());
    assert_eq!(keep_alive(&mut other, 13).await.ttl, 0);
    assert_eq!(
        revoke(&mut other, 13).await.unwrap_err(),
        "NotFound: etcdserver: requested lease not found"
    );
}

const LOCKS: &str = "cilium/.initlock/";
const LOCKS_END: &str = "cilium/.initlock0";

/// `concurrency.Session` and `concurrency.Mutex` of etcd's Go client, as Cilium uses them.
struct Mutex {
    kv: KvClient<Channel>,
    leases: LeaseClient<Channel>,
    watches: Channel,
    lease: i64,
    key: String,
}

fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

impl Mutex {
    async fn new(channel: Channel) -> Self {
        let mut leases = LeaseClient::new(channel.clone());
        let lease = grant(&mut leases, 0, 25).await.unwrap().id;
        Self {
            kv: KvClient::new(channel.clone()),
            leases,
            watches: channel,
            lease,
            key: format!("{LOCKS}{lease:x}"),
        }
    }

    async fn acquire(&mut self) -> TxnResponse {
        let key = || bytes::Bytes::from(self.key.clone());
        let owner = op(Request::RequestRange(RangeRequest {
            key: LOCKS.into(),
            range_end: LOCKS_END.into(),
            sort_order: SortOrder::Ascend as i32,
            sort_target: SortTarget::Create as i32,
            limit: 1,
            ..Default::default()
        }));
        let put = PutRequest {
            key: key(),
            lease: self.lease,
            ..Default::default()
        };
        let get = RangeRequest {
            key: key(),
            ..Default::default()
        };
        let request = TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Equal as i32,
                target: CompareTarget::Create as i32,
                key: key(),
                target_union: Some(TargetUnion::CreateRevision(0)),
                ..Default::default()
            }],
            success: vec![op(Request::RequestPut(put)), owner.clone()],
            failure: vec![op(Request::RequestRange(get)), owner],
        };
        self.kv.txn(request).await.unwrap().into_inner()
    }

    /// Waits until it has the lock. Returns whether it had to wait.
    async fn lock(&mut self) -> bool {
        let answer = self.acquire().await;
        let header = answer.header.unwrap();
        let mut mine = header.revision;
        if !answer.succeeded {
            let Some(Response::ResponseRange(get)) = &answer.responses[0].response else {
                panic!()
            };
            mine = get.kvs[0].create_revision;
        }
        let Some(Response::ResponseRange(owner)) = &answer.responses[1].response else {
            panic!()
        };
        if owner.kvs.is_empty() || owner.kvs[0].create_revision == mine {
            return false;
        }
        loop {
            let last = RangeRequest {
                key: LOCKS.into(),
                range_end: LOCKS_END.into(),
                sort_order: SortOrder::Descend as i32,
                sort_target: SortTarget::Create as i32,
                limit: 1,
                max_create_revision: mine - 1,
                ..Default::default()
            };
            let last = self.kv.range(last).await.unwrap().into_inner();
            let Some(before) = last.kvs.first() else { break };
            let mut session = Session::open(self.watches.clone());
            session
                .send(RequestUnion::CreateRequest(WatchCreateRequest {
                    key: before.key.clone(),
                    start_revision: last.header.unwrap().revision,
                    ..Default::default()
                }))
                .await;
            loop {
                let answer = session.next().await.unwrap();
                assert!(!answer.canceled, "{answer:?}");
                // A deletion.
                if answer.events.iter().any(|event| event.r#type == 1) {
                    break;
                }
            }
        }
        let own = RangeRequest {
            key: self.key.clone().into(),
            ..Default::default()
        };
        let own = self.kv.range(own).await.unwrap().into_inner();
        assert_eq!(own.kvs.len(), 1, "the lease ended while it waited");
        assert_eq!((own.kvs[0].create_revision, own.kvs[0].version), (mine, 1));
        true
    }

    async fn unlock(&mut self) {
        let delete = DeleteRangeRequest {
            key: self.key.clone().into(),
            ..Default::default()
        };
        assert_eq!(
            self.kv.delete_range(delete).await.unwrap().into_inner().deleted,
            1
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mutex_works_for_readers_as_it_does_with_etcd() {
    let both = Both::start("remote-c2").await;
    for (who, channel) in ["etcd", "ours"].into_iter().zip(both.each()) {
        let [mut first, mut second, mut third] = [
            Mutex::new(channel.clone()).await,
            Mutex::new(channel.clone()).await,
            Mutex::new(channel.clone()).await,
        ];
        assert!(!first.lock().await, "{who}");
        // Again: it has it already.
        assert!(!first.lock().await, "{who}");
        let waiting = tokio::spawn(async move {
            assert!(second.lock().await);
            second
        });
        // It is in line when its key is there.
        let in_line = async |count: i64| {
            let mut kv = KvClient::new(channel.clone());
            let count_only = RangeRequest {
                key: LOCKS.into(),
                range_end: LOCKS_END.into(),
                count_only: true,
                ..Default::default()
            };
            while kv.range(count_only.clone()).await.unwrap().into_inner().count != count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        in_line(2).await;
        first.unlock().await;
        let mut second = waiting.await.unwrap();
        // A revoked lease gives the lock away, too.
        let waiting = tokio::spawn(async move {
            assert!(third.lock().await);
            third
        });
        in_line(2).await;
        revoke(&mut second.leases, second.lease).await.unwrap();
        let mut third = waiting.await.unwrap();
        third.unlock().await;
        in_line(0).await;
    }
    // Nothing of it is in the cluster's state, and neither the operator's etcd nor another reader's view has it.
    let mut mutex = Mutex::new(both.ours.clone()).await;
    assert!(!mutex.lock().await);
    let everything = RangeRequest {
        key: b"\0"[..].into(),
        range_end: b"\0"[..].into(),
        ..Default::default()
    };
    let admin = channel(&both.pki, both.server.address, "admin-c1").await;
    for channel in [admin, both.theirs.clone()] {
        let all = KvClient::new(channel)
            .range(everything.clone())
            .await
            .unwrap()
            .into_inner();
        assert!(all.kvs.iter().all(|kv| !kv.key.starts_with(LOCKS.as_bytes())));
    }
    // Who has no rights has no locks.
    let mut nobody = LeaseClient::new(channel(&both.pki, both.server.address, "nobody").await);
    let denied = "PermissionDenied: etcdserver: permission denied";
    assert_eq!(grant(&mut nobody, 0, 60).await.unwrap_err(), denied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_looks_at_so_many_locks_and_a_mutex_among_many_works() {
    let both = Both::start("remote-c2").await;
    let mut holder = Mutex::new(both.ours.clone()).await;
    assert!(!holder.lock().await);
    // 2,561 lock keys.
    for group in 0..20 {
        let puts = (0..128).map(|at| {
            op(Request::RequestPut(PutRequest {
                key: format!("{LOCKS}{:0>440}", group * 128 + at).into(),
                lease: holder.lease,
                ..Default::default()
            }))
        });
        let request = TxnRequest {
            success: puts.collect(),
            ..Default::default()
        };
        holder.kv.txn(request).await.unwrap();
    }
    let all = || {
        op(Request::RequestRange(RangeRequest {
            key: LOCKS.into(),
            range_end: LOCKS_END.into(),
            ..Default::default()
        }))
    };
    let reads = |count| TxnRequest {
        success: vec![all(); count],
        ..Default::default()
    };
    let mut kv = KvClient::new(both.ours.clone()).max_decoding_message_size(usize::MAX);
    let answer = kv.txn(reads(2)).await.unwrap().into_inner();
    for response in answer.responses {
        let Some(Response::ResponseRange(found)) = response.response else {
            panic!()
        };
        assert_eq!((found.count, found.kvs.len()), (2561, 2561));
    }
    // 100,000 are what a transaction may look at; it is refused whole, before it has written anything.
    let mut request = reads(100);
    let put = PutRequest {
        key: format!("{LOCKS}late").into(),
        lease: holder.lease,
        ..Default::default()
    };
    request.success.push(op(Request::RequestPut(put)));
    let refused = told(kv.txn(request).await.unwrap_err());
    assert_eq!(refused, "InvalidArgument: etcdserver: request is too large");
    let count = kv
        .range(RangeRequest {
            key: LOCKS.into(),
            range_end: LOCKS_END.into(),
            count_only: true,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(count.into_inner().count, 2561);
    // The next one waits for its turn among all of them.
    let mut waiting = Mutex::new(both.ours.clone()).await;
    let answer = waiting.acquire().await;
    let Some(Response::ResponseRange(owner)) = &answer.responses[1].response else {
        panic!()
    };
    assert!(answer.succeeded && owner.kvs[0].key == holder.key);
    // The holder's lease goes, with all its keys.
    revoke(&mut holder.leases, holder.lease).await.unwrap();
    assert!(!waiting.lock().await);
    waiting.unlock().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_calls_around_reading_are_answered_or_refused_clearly() {
    let both = Both::start("remote-c2").await;
    let denied = "PermissionDenied: etcdserver: permission denied";
    let [theirs, ours] = both.each();
    let mut alarms = vec![];
    for channel in [theirs.clone(), ours.clone()] {
        let answer = MaintenanceClient::new(channel)
            .alarm(AlarmRequest::default())
            .await;
        alarms.push(answer.unwrap().into_inner().alarms);
    }
    assert_eq!(alarms[0], alarms[1]);
    let mut maintenance = MaintenanceClient::new(ours.clone());
    for action in [AlarmAction::Activate, AlarmAction::Deactivate] {
        let request = AlarmRequest {
            action: action as i32,
            ..Default::default()
        };
        assert_eq!(told(maintenance.alarm(request).await.unwrap_err()), denied);
    }
    let status = maintenance.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.leader, status.header.unwrap().member_id);
    let members = ClusterClient::new(ours.clone())
        .member_list(MemberListRequest::default())
        .await;
    assert_eq!(members.unwrap().into_inner().members.len(), 1);
    let request = || AuthenticateRequest {
        name: "root".into(),
        password: "x".into(),
    };
    let [want, got] = [theirs.clone(), ours.clone()].map(|channel| async {
        told(
            AuthClient::new(channel)
                .authenticate(request())
                .await
                .unwrap_err(),
        )
    });
    assert_eq!(got.await, want.await);
    let auth = AuthClient::new(ours)
        .auth_status(AuthStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(!auth.enabled && auth.header.is_some());
    // What is not served: readers are denied, the administrator is told why.
    for (name, code) in [
        ("remote-c2", tonic::Code::PermissionDenied),
        ("admin-c1", tonic::Code::Unimplemented),
    ] {
        for path in [
            "/etcdserverpb.Maintenance/Snapshot",
            "/etcdserverpb.Maintenance/HashKV",
            "/etcdserverpb.Maintenance/Hash",
            "/etcdserverpb.Maintenance/Defragment",
            "/etcdserverpb.Maintenance/MoveLeader",
            "/etcdserverpb.Cluster/MemberAdd",
            "/etcdserverpb.Cluster/MemberRemove",
            "/etcdserverpb.Auth/UserAdd",
        ] {
            let mut raw = Dial::new(&both.pki, name)
                .open(both.server.address)
                .await
                .unwrap();
            let (response, _requests) = raw.begin(path, &StatusRequest {}, true).await.unwrap();
            let response = response.await.unwrap();
            let status = tonic::Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), code, "{name} {path}");
            assert!(
                status.message().starts_with("etcdserver: "),
                "{}",
                status.message()
            );
        }
    }
}
