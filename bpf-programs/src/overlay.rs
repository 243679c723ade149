//! Tunnel data: which node a packet goes to or came from, and the source's identity in the VNI.

use aya_ebpf::{
    bindings::{
        BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, TC_ACT_REDIRECT, bpf_tunnel_key,
        bpf_tunnel_key__bindgen_ty_1, bpf_tunnel_key__bindgen_ty_2, bpf_tunnel_key__bindgen_ty_3,
    },
    helpers::{bpf_redirect, bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key},
    programs::TcContext,
};
use isthmus_bpf_abi::{DropReason, IDENTITY_REMOTE_NODE, IpcacheValue, VNI_MAX, ipcache_flag, ipv4_of};

use crate::tables;

const KEY_SIZE: u32 = size_of::<bpf_tunnel_key>() as u32;

/// Where the ipcache sends a packet.
pub enum Route {
    /// Through the overlay, to the node in this entry.
    Tunnel(IpcacheValue),
    /// Not through the overlay: the stack's routes decide.
    Stack,
}

/// Reads the ipcache's answer for a destination.
#[inline(always)]
pub fn route(entry: Option<IpcacheValue>) -> Result<Route, DropReason> {
    let Some(entry) = entry else {
        return Ok(Route::Stack);
    };
    if entry.flags & ipcache_flag::UNROUTABLE != 0 {
        return Err(DropReason::Unroutable);
    }
    let tunnel = ipcache_flag::HAS_TUNNEL_ENDPOINT | ipcache_flag::SKIP_TUNNEL;
    if entry.flags & tunnel == ipcache_flag::HAS_TUNNEL_ENDPOINT {
        Ok(Route::Tunnel(entry))
    } else {
        Ok(Route::Stack)
    }
}

/// Gives the packet the data with which the VXLAN device will wrap it: to the entry's node, from `identity`.
#[inline(never)]
pub fn encapsulate(ctx: &TcContext, identity: u32, to: &IpcacheValue) -> Result<(), DropReason> {
    if identity == 0 || identity > VNI_MAX {
        return Err(DropReason::InvalidVni);
    }
    let mut key = empty_key();
    key.tunnel_id = identity;
    let flags = if to.flags & ipcache_flag::TUNNEL_ENDPOINT_IPV6 != 0 {
        let a = to.tunnel_endpoint;
        key.__bindgen_anon_1.remote_ipv6 = [
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ];
        u64::from(BPF_F_TUNINFO_IPV6)
    } else {
        // The kernel takes IPv4 in host order here. IPv4's outer checksum protects nothing that the inner ones do
        // not; IPv6 requires one unless the receiver was told otherwise.
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(ipv4_of(&to.tunnel_endpoint));
        u64::from(BPF_F_ZERO_CSUM_TX)
    };
    // SAFETY: `skb` is the program's context and `key` a whole key on the stack.
    let result = unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, KEY_SIZE, flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::EncapFailed)
    }
}

/// Sends the packet into the overlay: to the entry's node, from `identity`. Returns the verdict.
#[inline(always)]
pub fn send(ctx: &TcContext, identity: u32, to: &IpcacheValue) -> Result<i32, DropReason> {
    let vxlan_ifindex = tables::config().map_or(0, |config| config.vxlan_ifindex);
    if vxlan_ifindex == 0 {
        return Err(DropReason::NotConfigured);
    }
    encapsulate(ctx, identity, to)?;
    // SAFETY: takes numbers.
    match unsafe { bpf_redirect(vxlan_ifindex, 0) } {
        verdict if verdict == i64::from(TC_ACT_REDIRECT) => Ok(TC_ACT_REDIRECT),
        _ => Err(DropReason::RedirectFailed),
    }
}

/// The identity of what the node itself sends.
#[inline(always)]
pub fn node_identity() -> u32 {
    match tables::config() {
        Some(config) if config.node_identity != 0 => config.node_identity,
        _ => IDENTITY_REMOTE_NODE,
    }
}

/// The VNI of a packet that came out of the tunnel, or already has the data to go into it.
#[inline(always)]
pub fn vni(ctx: &TcContext) -> Option<u32> {
    let mut key = empty_key();
    // The kernel wants to be told the outer family and refuses the other one.
    for flags in [0, u64::from(BPF_F_TUNINFO_IPV6)] {
        // SAFETY: as in `encapsulate`.
        if unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut key, KEY_SIZE, flags) } == 0 {
            return Some(key.tunnel_id);
        }
    }
    None
}

#[inline(always)]
fn empty_key() -> bpf_tunnel_key {
    bpf_tunnel_key {
        tunnel_id: 0,
        __bindgen_anon_1: bpf_tunnel_key__bindgen_ty_1 { remote_ipv6: [0; 4] },
        tunnel_tos: 0,
        tunnel_ttl: 0,
        __bindgen_anon_2: bpf_tunnel_key__bindgen_ty_2 { tunnel_ext: 0 },
        tunnel_label: 0,
        __bindgen_anon_3: bpf_tunnel_key__bindgen_ty_3 { local_ipv6: [0; 4] },
    }
}
