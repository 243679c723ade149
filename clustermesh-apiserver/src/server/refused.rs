//! Calls of etcd's that this server does not answer: who may not make them is told so in etcd's words, and the administrator
//! why there is no answer. Everything else that is unknown is unimplemented, as gRPC says it. Pure.

use tonic::Status;

use super::{Peer, errors};

/// What a call of `path` is refused with, if it is one of those.
pub(super) fn refusal(path: &str, peer: &Peer) -> Option<Status> {
    let (method, why) = reason(path)?;
    Some(match peer.kind {
        "admin" => Status::unimplemented(format!("etcdserver: {method} is not supported here: {why}")),
        _ => errors::permission_denied(),
    })
}

fn reason(path: &str) -> Option<(&str, &'static str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let why = match (service, method) {
        ("etcdserverpb.Maintenance", "Defragment" | "Hash" | "HashKV" | "Snapshot") => {
            "what is served is held in memory; ask the etcd behind this server, or copy the embedded store's file"
        }
        ("etcdserverpb.Maintenance", "MoveLeader" | "Downgrade")
        | ("etcdserverpb.Cluster", "MemberAdd" | "MemberRemove" | "MemberUpdate" | "MemberPromote") => {
            "each replica stands alone and has no leader or members to change"
        }
        ("etcdserverpb.Auth", method) if !matches!(method, "Authenticate" | "AuthStatus") => {
            "rights follow from the common name of the client's certificate"
        }
        ("v3lockpb.Lock" | "v3electionpb.Election", _) => "lock with a transaction and a lease",
        _ => return None,
    };
    Some((method, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_is_not_refused() {
        for path in [
            "/etcdserverpb.KV/Range",
            "/etcdserverpb.Watch/Watch",
            "/etcdserverpb.Maintenance/Status",
            "/etcdserverpb.Maintenance/Alarm",
            "/etcdserverpb.Cluster/MemberList",
            "/etcdserverpb.Auth/Authenticate",
            "/etcdserverpb.Auth/AuthStatus",
            "/etcdserverpb.Lease/LeaseGrant",
            "/",
            "",
        ] {
            assert_eq!(reason(path), None, "{path}");
        }
        for (path, method) in [
            ("/etcdserverpb.Maintenance/Snapshot", "Snapshot"),
            ("/etcdserverpb.Cluster/MemberAdd", "MemberAdd"),
            ("/etcdserverpb.Auth/UserAdd", "UserAdd"),
        ] {
            assert_eq!(reason(path).unwrap().0, method);
        }
    }
}
