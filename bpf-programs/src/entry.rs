//! An entry of the conntrack table, as the kernel lends it: a pointer into the table's memory, which programs on other CPUs write
//! too. Copies go in words of eight bytes: the compiler calls functions that go byte by byte for what it cannot prove not to
//! overlap, and the verifier walks each byte again.

use core::ptr::NonNull;

use isthmus_bpf_abi::CtValue;

/// Words of a [`CtValue`].
const WORDS: usize = size_of::<CtValue>() / size_of::<u64>();
const _: () = assert!(size_of::<CtValue>().is_multiple_of(size_of::<u64>()) && align_of::<CtValue>() == 8);

/// See the module. What it points to lives until the program ends (RCU), and no `Entry` outlives that.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Entry(NonNull<CtValue>);

impl Entry {
    /// # Safety
    ///
    /// `value` must be what a lookup in the conntrack table gave in this run of the program.
    #[inline(always)]
    pub const unsafe fn new(value: NonNull<CtValue>) -> Self {
        Self(value)
    }

    /// Copies it.
    #[inline(always)]
    pub fn copy_to(self, to: &mut CtValue) {
        let (from, to) = (
            self.0.as_ptr().cast::<u64>(),
            core::ptr::from_mut(to).cast::<u64>(),
        );
        for at in 0..WORDS {
            // SAFETY: the value is there and aligned, see the type; any bytes are valid. Programs on other CPUs may write it,
            // whole fields at a time: each word is read once.
            unsafe { to.add(at).write(from.add(at).read_volatile()) };
        }
    }

    /// Looks at it where it is. What it says may change between two looks at one field.
    #[inline(always)]
    pub fn get(&self) -> &CtValue {
        // SAFETY: the value is there, see the type, and any bytes are valid.
        unsafe { self.0.as_ref() }
    }

    /// Writes what a packet changes, as `from` has it.
    #[inline(always)]
    pub fn update(self, from: &CtValue) {
        let value = self.0.as_ptr();
        // SAFETY: the value is there, see the type. Programs on other CPUs write it too, whole fields at a time, and each of them
        // writes what it saw last: a lost update is repaired by the next packet.
        unsafe {
            (*value).state = from.state;
            (*value).flags = from.flags;
            (*value).last_seen = from.last_seen;
            (*value).ifindex = from.ifindex;
        }
    }
}
