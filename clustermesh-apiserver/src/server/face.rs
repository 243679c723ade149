//! Which cluster ID a client sees.
//!
//! Each source keeps its own revisions here, and an answer from a mirror says which: it carries the source's cluster ID. Our own
//! readers ask for that, with [`COMPOSITE`]. Everybody else takes a server for one etcd: Cilium's readers pin the first cluster
//! ID that they see and refuse any other. They are shown that of the own cluster's etcd on everything, in every replica and
//! after a restart. An ID then does not tell histories apart any more; what does for these clients is that a watch ends as
//! compacted when its source's history is another one, and that a start in the future is not waited for for long.

use isthmus_proto::{COMPOSITE, etcdserverpb::ResponseHeader};
use tonic::Request;

use crate::store::{Route, Store, SubId};

/// What a client takes this server for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Face {
    /// Several sources, each under its own cluster ID.
    Sources,
    /// One etcd.
    One,
}

impl Face {
    /// As the sender of `request` says.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        if request.metadata().contains_key(COMPOSITE) {
            Self::Sources
        } else {
            Self::One
        }
    }

    /// Changes a header of `store` to what the client is to see.
    pub(super) fn show(self, store: &Store, header: &mut ResponseHeader) {
        if self == Self::One {
            header.cluster_id = store.header(&Route::Sub(SubId::Own)).cluster_id;
        }
    }

    /// Whether `route` can be served: the one ID must be known first.
    pub(super) fn is_served(self, store: &Store, route: &Route) -> bool {
        store.is_served(route) && (self == Self::Sources || store.is_served(&Route::Sub(SubId::Own)))
    }

    /// Whether a start in the future of `route` may be one of another history. The own cluster's is told apart by its ID.
    pub(super) fn doubts_future(self, route: &Route) -> bool {
        self == Self::One && *route != Route::Sub(SubId::Own)
    }
}
