//! Frames and slices from a remote cluster; what decodes is written and read back.
#![no_main]

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters};

libfuzzer_sys::fuzz_target!(|value: &[u8]| {
    let max = MaxConnectedClusters::C255;
    let (Ok(cluster), Ok(id)) = (ClusterName::new("c1"), ClusterId::new(1, max)) else { return };
    let range = IdentityRange::of(id, max);
    let _ = range;
    if let Ok(slice) = isthmus_wire::slice::decode_slice("shop/cart/s0", value, &cluster, id) {
        let bytes = isthmus_wire::slice::encode_slice(&slice);
        assert_eq!(isthmus_wire::slice::decode_slice("shop/cart/s0", &bytes, &cluster, id).ok(), Some(slice));
    }
    let _ = isthmus_wire::slice::decode_frame("shop/cart", value, &cluster, id);
});
