//! Counting by reason and direction.

use isthmus_bpf_abi::{Direction, DropReason, metric_index};

use crate::tables;

/// Adds one packet (or socket call) of `bytes`.
#[inline(always)]
pub fn count(reason: DropReason, direction: Direction, bytes: u32) {
    if let Some(value) = tables::metric(metric_index(reason, direction)) {
        // SAFETY: the kernel gave a pointer to this CPU's copy. A program that interrupts this one on the same CPU
        // can lose us a count, as it can every per-CPU counter.
        unsafe {
            (*value).packets += 1;
            (*value).bytes += u64::from(bytes);
        }
    }
}
