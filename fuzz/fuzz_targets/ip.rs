//! IPIdentityPair JSON from a remote cluster; what decodes is written and read back.
#![no_main]

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters};

libfuzzer_sys::fuzz_target!(|value: &[u8]| {
    let max = MaxConnectedClusters::C255;
    let (Ok(cluster), Ok(id)) = (ClusterName::new("c1"), ClusterId::new(1, max)) else { return };
    let range = IdentityRange::of(id, max);
    let _ = (&cluster, id);
    if let Ok(entry) = isthmus_wire::ip::decode("10.1.0.1", value, range) {
        let again = isthmus_wire::ip::decode("10.1.0.1", &isthmus_wire::ip::encode(&entry), range);
        assert_eq!(again.ok(), Some(entry));
    }
});
