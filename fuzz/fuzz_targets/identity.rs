//! Cluster configs, label strings and keys from a remote cluster.
#![no_main]

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters};

libfuzzer_sys::fuzz_target!(|value: &[u8]| {
    let max = MaxConnectedClusters::C255;
    let (Ok(cluster), Ok(id)) = (ClusterName::new("c1"), ClusterId::new(1, max)) else { return };
    let range = IdentityRange::of(id, max);
    let _ = isthmus_wire::ClusterConfig::decode(value);
    let _ = isthmus_wire::identity::decode(isthmus_model::NumericIdentity(65_536), value, &cluster, range);
    if let Ok(rest) = isthmus_wire::keys::suffix(value, "") {
        let _ = (isthmus_wire::keys::parse_slice(rest), isthmus_wire::keys::parse_identity(rest));
    }
});
