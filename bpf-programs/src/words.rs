//! Copies and zeros in words of eight bytes. The compiler calls functions that go byte by byte for what it cannot prove not to
//! overlap, and for every zero of more than a few bytes: slow, and the verifier walks each byte again.

use isthmus_bpf_abi::{Address, CtValue};

/// Words of a [`CtValue`].
const CT_WORDS: usize = size_of::<CtValue>() / size_of::<u64>();
const _: () = assert!(size_of::<CtValue>().is_multiple_of(size_of::<u64>()) && align_of::<CtValue>() == 8);

/// Copies an entry of the conntrack table into `to`.
#[inline(always)]
pub fn copy_flow(from: *const CtValue, to: &mut CtValue) {
    let (from, to) = (from.cast::<u64>(), core::ptr::from_mut(to).cast::<u64>());
    for at in 0..CT_WORDS {
        // SAFETY: the kernel gave a pointer to a value that lives until the program ends, aligned like `to`; any bytes are
        // valid. Programs on other CPUs may write it, whole fields at a time: each word is read once.
        unsafe { to.add(at).write(from.add(at).read_volatile()) };
    }
}

/// Makes an address of a map's value zero: there addresses are aligned to words.
#[inline(always)]
pub fn clear(address: &mut Address) {
    let to = address.as_mut_ptr().cast::<u64>();
    for at in 0..2 {
        // SAFETY: two words, aligned where they are used (a struct of `Work` that is aligned to 8, at a multiple of 8).
        unsafe { to.add(at).write_volatile(0) };
    }
}
