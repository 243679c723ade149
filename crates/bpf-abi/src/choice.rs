//! What binds a choice of backend: Maglev tables (`isthmus_maglev`), session affinity (`isthmus_affinity`), and who may
//! ask (`isthmus_source_ranges`).
//!
//! A service's Maglev table of M entries (M is prime, [`crate::NodeConfig::maglev_table_size`]) lies in
//! M.div_ceil([`MAGLEV_CHUNK`]) entries of an ordinary hash map: entry i of the table is element
//! i % [`MAGLEV_CHUNK`] of chunk i / [`MAGLEV_CHUNK`]; elements past M are zero. So a change of backends rewrites the chunks in
//! which something moved and no others, in batches like every other map, and needs no map in a map. While chunks of a new
//! table replace those of the old one, each entry names an old or a new backend. A service has a table when its slot 0
//! carries [`crate::service_flag::MAGLEV`]: chunks are written before that flag and removed after it is gone.

use crate::Address;

/// Elements of one chunk. A power of two, so that the index needs no division.
pub const MAGLEV_CHUNK: u32 = 128;
/// Entries of a table where nothing else is configured.
pub const MAGLEV_TABLE_SIZE_DEFAULT: u32 = 16_381;

/// Key of `isthmus_maglev`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct MaglevKey {
    /// The service's number.
    pub service_id: u32,
    /// Number of the chunk, from 0.
    pub chunk: u32,
}
const _: () = assert!(size_of::<MaglevKey>() == 8);

/// Value of `isthmus_maglev`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct MaglevChunk {
    /// Numbers of backends; zero past the table's end.
    pub backend_ids: [u32; MAGLEV_CHUNK as usize],
}
const _: () = assert!(size_of::<MaglevChunk>() == 512);

/// Chunk and element of the entry that a flow with `hash` has in a table of `size` entries (not 0).
#[inline(always)]
pub const fn maglev_position(hash: u32, size: u32) -> (u32, u32) {
    let entry = hash % size;
    (entry / MAGLEV_CHUNK, entry % MAGLEV_CHUNK)
}

/// Values of [`AffinityKey::kind`].
pub mod affinity_kind {
    /// `client` is an address.
    pub const ADDRESS: u8 = 0;
    /// `client` is a network namespace's cookie, in the first eight bytes.
    pub const NETNS: u8 = 1;
}

/// Key of `isthmus_affinity`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct AffinityKey {
    /// Who asks.
    pub client: Address,
    /// Which service.
    pub service_id: u32,
    /// One of [`affinity_kind`].
    pub kind: u8,
    /// Zero.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<AffinityKey>() == 24);

/// Value of `isthmus_affinity`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct AffinityValue {
    /// Seconds of the monotonic clock at which the client last opened a flow.
    pub last_used: u32,
    /// Its backend.
    pub backend_id: u32,
}
const _: () = assert!(size_of::<AffinityValue>() == 8);

/// Whether a client that last opened a flow when `value` says stays on its backend at `now`, for a service with affinity for
/// `seconds`. One that seems to come from the future (its program read the clock later than we did) stays.
#[inline(always)]
pub const fn affinity_holds(value: &AffinityValue, seconds: u32, now: u32) -> bool {
    let age = now.wrapping_sub(value.last_used);
    age >= 1 << 31 || age <= seconds
}

/// Bits of a [`SourceRangeKey`] before the address: always part of the prefix.
pub const SOURCE_RANGE_STATIC_BITS: u32 = 32;

/// Key of `isthmus_source_ranges` (LPM trie). An entry says that this prefix may ask; a service without
/// [`crate::service_flag::SOURCE_RANGES`] may be asked by everybody.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct SourceRangeKey {
    /// Bits that count, from `service_id` on: [`SOURCE_RANGE_STATIC_BITS`] plus the address's; an IPv4 prefix of n bits has
    /// 96 + n of those.
    pub prefix_len: u32,
    /// The service's number.
    pub service_id: u32,
    /// The prefix, IPv4 as IPv4-mapped; bits past it are zero.
    pub address: Address,
}
const _: () = assert!(size_of::<SourceRangeKey>() == 24);

/// Value of `isthmus_source_ranges`: an entry that is there allows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct SourceRangeValue {
    /// 1.
    pub allowed: u32,
}
const _: () = assert!(size_of::<SourceRangeValue>() == 4);
