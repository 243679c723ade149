//! The maps. Layouts, names and sizes are those of `bpf-abi`; the agent creates and pins them before it loads the
//! programs, and the loader finds them by name.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};
use isthmus_bpf_abi::{
    Address, AffinityKey, AffinityValue, Backend, BackendKey, CONFIG_INDEX, CtKey, CtValue, Device,
    DropReason, Endpoint, EndpointKey, FragmentKey, FragmentValue, IpcacheKey, IpcacheValue, MaglevChunk,
    MaglevKey, MetricsValue, NodeConfig, PrefixKey, PrefixValue, ReverseSkKey, ReverseSkValue, ServiceKey,
    ServiceValue, SourceRangeKey, SourceRangeValue, maps as spec,
};

use crate::{entry::Entry, work::Work};

#[map(name = "isthmus_services")]
static SERVICES: HashMap<ServiceKey, ServiceValue> =
    HashMap::pinned(spec::SERVICES.max_entries, spec::SERVICES.flags);

#[map(name = "isthmus_backends")]
static BACKENDS: HashMap<BackendKey, Backend> =
    HashMap::pinned(spec::BACKENDS.max_entries, spec::BACKENDS.flags);

#[map(name = "isthmus_reverse_sk")]
static REVERSE_SK: LruHashMap<ReverseSkKey, ReverseSkValue> =
    LruHashMap::pinned(spec::REVERSE_SK.max_entries, spec::REVERSE_SK.flags);

/// [`IpcacheKey`] after its prefix length.
type IpcacheData = [u8; size_of::<IpcacheKey>() - size_of::<u32>()];
const _: () = assert!(size_of::<Key<IpcacheData>>() == size_of::<IpcacheKey>());

#[map(name = "isthmus_ipcache")]
static IPCACHE: LpmTrie<IpcacheData, IpcacheValue> =
    LpmTrie::pinned(spec::IPCACHE.max_entries, spec::IPCACHE.flags);

#[map(name = "isthmus_endpoints")]
static ENDPOINTS: HashMap<EndpointKey, Endpoint> =
    HashMap::pinned(spec::ENDPOINTS.max_entries, spec::ENDPOINTS.flags);

#[map(name = "isthmus_ct")]
static CT: LruHashMap<CtKey, CtValue> = LruHashMap::pinned(spec::CT.max_entries, spec::CT.flags);

#[map(name = "isthmus_fragments")]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> =
    LruHashMap::pinned(spec::FRAGMENTS.max_entries, spec::FRAGMENTS.flags);

#[map(name = "isthmus_maglev")]
static MAGLEV: HashMap<MaglevKey, MaglevChunk> =
    HashMap::pinned(spec::MAGLEV.max_entries, spec::MAGLEV.flags);

#[map(name = "isthmus_affinity")]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue> =
    LruHashMap::pinned(spec::AFFINITY.max_entries, spec::AFFINITY.flags);

#[map(name = "isthmus_devices")]
static DEVICES: HashMap<u32, Device> = HashMap::pinned(spec::DEVICES.max_entries, spec::DEVICES.flags);

/// [`SourceRangeKey`] after its prefix length.
type SourceRangeData = [u8; size_of::<SourceRangeKey>() - size_of::<u32>()];
const _: () = assert!(size_of::<Key<SourceRangeData>>() == size_of::<SourceRangeKey>());

#[map(name = "isthmus_source_ranges")]
static SOURCE_RANGES: LpmTrie<SourceRangeData, SourceRangeValue> =
    LpmTrie::pinned(spec::SOURCE_RANGES.max_entries, spec::SOURCE_RANGES.flags);

/// [`PrefixKey`] after its prefix length.
type PrefixData = [u8; size_of::<PrefixKey>() - size_of::<u32>()];
const _: () = assert!(size_of::<Key<PrefixData>>() == size_of::<PrefixKey>());

#[map(name = "isthmus_no_masquerade")]
static NO_MASQUERADE: LpmTrie<PrefixData, PrefixValue> =
    LpmTrie::pinned(spec::NO_MASQUERADE.max_entries, spec::NO_MASQUERADE.flags);

/// Not pinned: nobody else has business there.
#[map(name = "isthmus_work")]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "isthmus_metrics")]
static METRICS: PerCpuArray<MetricsValue> =
    PerCpuArray::pinned(spec::METRICS.max_entries, spec::METRICS.flags);

#[map(name = "isthmus_config")]
static CONFIG: Array<NodeConfig> = Array::pinned(spec::CONFIG.max_entries, spec::CONFIG.flags);

/// The value of one slot of a service.
#[inline(always)]
pub fn service(key: &ServiceKey) -> Option<ServiceValue> {
    // SAFETY: the entry lives at least until the program ends (RCU). The kernel may give its memory to another key
    // meanwhile, so callers compare `service_id`.
    unsafe { SERVICES.get(key) }.copied()
}

/// A backend by number.
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    // SAFETY: as for `endpoint`; the agent gives a number to another backend only after it has been out of use.
    unsafe { BACKENDS.get(BackendKey { id }) }
}

/// The frontend that a socket asked for when it got a backend.
#[inline(always)]
pub fn reverse(key: &ReverseSkKey) -> Option<ReverseSkValue> {
    // SAFETY: as for `service`; keys hold a socket cookie, and that socket's owner is in the call right now.
    unsafe { REVERSE_SK.get(key) }.copied()
}

/// Remembers the way back. Fails when the kernel has no memory for it.
#[inline(always)]
pub fn remember_reverse(key: &ReverseSkKey, value: &ReverseSkValue) -> Result<(), i32> {
    REVERSE_SK.insert(key, value, 0)
}

/// The ipcache's entry of the longest prefix that holds `address`.
#[inline(always)]
pub fn ipcache(address: &Address) -> Option<IpcacheValue> {
    let key = IpcacheKey::host(address);
    // SAFETY: `Key` is packed, has the same size and the same first field, and any bytes are valid for the rest.
    let key = unsafe { &*core::ptr::from_ref(&key).cast::<Key<IpcacheData>>() };
    IPCACHE.get(key).copied()
}

/// The local endpoint, or the node itself, with `address`.
#[inline(always)]
pub fn endpoint(address: &Address) -> Option<&'static Endpoint> {
    // SAFETY: the entry lives at least until the program ends (RCU), which is all that 'static means here.
    unsafe { ENDPOINTS.get(EndpointKey { address: *address }) }
}

/// The node's configuration: all zero before the agent wrote it.
#[inline(always)]
pub fn config() -> Option<&'static NodeConfig> {
    CONFIG.get(CONFIG_INDEX)
}

/// This CPU's counter at `index`.
#[inline(always)]
pub fn metric(index: u32) -> Option<*mut MetricsValue> {
    METRICS.get_ptr_mut(index)
}

/// The entry of a translated flow, to read and to keep up to date.
#[inline(always)]
pub fn flow(key: &CtKey) -> Option<Entry> {
    let value = NonNull::new(CT.get_ptr_mut(key)?)?;
    // SAFETY: it was just looked up.
    Some(unsafe { Entry::new(value) })
}

/// Writes an entry of a translated flow. Fails when the kernel has no memory for it.
#[inline(always)]
pub fn put_flow(key: &CtKey, value: &CtValue) -> Result<(), i32> {
    CT.insert(key, value, 0)
}

/// Writes an entry of a flow unless the key is there. Fails then, or when the kernel has no memory for it.
#[inline(always)]
pub fn add_flow(key: &CtKey, value: &CtValue) -> Result<(), i32> {
    CT.insert(key, value, u64::from(BPF_NOEXIST))
}

/// Removes an entry of a translated flow; it may be absent.
#[inline(always)]
pub fn remove_flow(key: &CtKey) {
    let _ = CT.remove(key);
}

/// A part of a service's Maglev table.
#[inline(always)]
pub fn maglev_chunk(service_id: u32, chunk: u32) -> Option<&'static MaglevChunk> {
    // SAFETY: as for `endpoint`. An element that changes while it is read is the old or the new one.
    unsafe { MAGLEV.get(MaglevKey { service_id, chunk }) }
}

/// What a client stays on, to read and to keep alive.
#[inline(always)]
pub fn client(key: &AffinityKey) -> Option<*mut AffinityValue> {
    AFFINITY.get_ptr_mut(key)
}

/// Remembers what a client stays on.
#[inline(always)]
pub fn remember_client(key: &AffinityKey, value: &AffinityValue) {
    let _ = AFFINITY.insert(key, value, 0);
}

/// This CPU's room to work in.
#[inline(always)]
pub fn work() -> Result<&'static mut Work, DropReason> {
    let work = WORK.get_ptr_mut(0).ok_or(DropReason::NotConfigured)?;
    // SAFETY: any bytes that the programs wrote, and zeros, are valid; no other program has it, see `work`.
    Ok(unsafe { &mut *work })
}

/// The ports of a datagram whose first fragment was translated.
#[inline(always)]
pub fn fragment(key: &FragmentKey) -> Option<FragmentValue> {
    // SAFETY: as for `service`; a wrong value after reuse would need the memory to be evicted and filled in between.
    unsafe { FRAGMENTS.get(key) }.copied()
}

/// Remembers the ports of a datagram.
#[inline(always)]
pub fn remember_fragment(key: &FragmentKey, value: &FragmentValue) {
    let _ = FRAGMENTS.insert(key, value, 0);
}

/// Whether the agent wants the bits of [`isthmus_bpf_abi::feature`].
#[inline(always)]
pub fn has_feature(bits: u32) -> bool {
    config().is_some_and(|config| config.features & bits == bits)
}

/// A device to the outside.
#[inline(always)]
pub fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: as for `endpoint`.
    unsafe { DEVICES.get(ifindex) }
}

/// Whether one of the service's source ranges holds `address`.
#[inline(always)]
pub fn may_ask(service_id: u32, address: &Address) -> bool {
    let key = SourceRangeKey {
        prefix_len: 8 * size_of::<SourceRangeData>() as u32,
        service_id,
        address: *address,
    };
    // SAFETY: `Key` is packed, has the same size and the same first field, and any bytes are valid for the rest.
    let key = unsafe { &*core::ptr::from_ref(&key).cast::<Key<SourceRangeData>>() };
    SOURCE_RANGES.get(key).is_some()
}

/// Whether pods reach `address` from their own.
#[inline(always)]
pub fn keeps_source(address: &Address) -> bool {
    let key = PrefixKey {
        prefix_len: 8 * size_of::<PrefixData>() as u32,
        address: *address,
    };
    // SAFETY: as in `may_ask`.
    let key = unsafe { &*core::ptr::from_ref(&key).cast::<Key<PrefixData>>() };
    NO_MASQUERADE.get(key).is_some()
}
