//! Delivery to a pod of this node: new MAC addresses, then straight into the pod's namespace.
//!
//! The TTL stays as it is. It guards against loops, and none leads through here: a pod's namespace is where a packet ends. What
//! goes on between nodes goes into the overlay, where nothing is sent in again but the answers to clients outside, or out of a
//! device, which costs a hop (`send`). So the fast path counts as no hop, whether the pods share a node or not.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, helpers::bpf_redirect_peer, programs::TcContext};
use isthmus_bpf_abi::{DropReason, Endpoint};

use crate::parse::ETH_DESTINATION;

/// Hands the packet to `endpoint`. Returns the verdict.
#[inline(always)]
pub fn to_pod(ctx: &TcContext, endpoint: &Endpoint) -> Result<i32, DropReason> {
    let p = endpoint.pod_mac;
    let h = endpoint.host_mac;
    let macs = [
        p[0], p[1], p[2], p[3], p[4], p[5], h[0], h[1], h[2], h[3], h[4], h[5],
    ];
    ctx.store(ETH_DESTINATION, &macs, 0)
        .map_err(|_| DropReason::WriteFailed)?;
    // SAFETY: takes numbers. The switch happens after the program ended; it needs the ingress of a device,
    // and the three hooks that deliver (of a veth, of the overlay, of a device to the outside) are such.
    match unsafe { bpf_redirect_peer(endpoint.ifindex, 0) } {
        verdict if verdict == i64::from(TC_ACT_REDIRECT) => Ok(TC_ACT_REDIRECT),
        _ => Err(DropReason::RedirectFailed),
    }
}
