//! Zeros in words of eight bytes. The compiler calls a function that goes byte by byte for every zero of more than a few bytes:
//! slow, and the verifier walks each byte again.

use core::mem::offset_of;

use isthmus_bpf_abi::{Address, CtValue};

/// Makes the address of a flow's peer zero.
#[inline(always)]
pub fn clear_peer(flow: &mut CtValue) {
    const { assert!(align_of::<CtValue>() == 8 && offset_of!(CtValue, peer_address).is_multiple_of(8)) };
    // SAFETY: aligned, as was just said.
    unsafe { clear(&mut flow.peer_address) };
}

/// Makes an address zero.
///
/// # Safety
///
/// It must be aligned to 8.
#[inline(always)]
pub unsafe fn clear(address: &mut Address) {
    let to = address.as_mut_ptr().cast::<u64>();
    // SAFETY: two words, which the caller has aligned.
    unsafe {
        to.write_volatile(0);
        to.add(1).write_volatile(0);
    }
}
