//! Node JSON from a remote cluster.
#![no_main]

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters};

libfuzzer_sys::fuzz_target!(|value: &[u8]| {
    let max = MaxConnectedClusters::C255;
    let (Ok(cluster), Ok(id)) = (ClusterName::new("c1"), ClusterId::new(1, max)) else { return };
    let range = IdentityRange::of(id, max);
    let _ = range;
    let _ = isthmus_wire::node::decode("n1", value, &cluster, id);
});
