//! Names, kinds and sizes of all maps. Pins carry the whole name; the kernel's own copy is cut to 15 bytes.
//!
//! Hash maps above a few megabytes are not preallocated: an entry costs memory when it exists.

/// Kind of a map, as the kernel numbers it (`enum bpf_map_type`).
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MapKind {
    /// BPF_MAP_TYPE_HASH.
    Hash = 1,
    /// BPF_MAP_TYPE_ARRAY.
    Array = 2,
    /// BPF_MAP_TYPE_PERCPU_ARRAY.
    PerCpuArray = 6,
    /// BPF_MAP_TYPE_LRU_HASH.
    LruHash = 9,
    /// BPF_MAP_TYPE_LPM_TRIE.
    LpmTrie = 11,
}

/// BPF_F_NO_PREALLOC.
pub const NO_PREALLOC: u32 = 1;

/// All that is needed to create a map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapSpec {
    /// Name, and name of the pin.
    pub name: &'static str,
    /// Kind.
    pub kind: MapKind,
    /// Key size in bytes.
    pub key_size: u32,
    /// Value size in bytes (of one CPU's, for per-CPU maps).
    pub value_size: u32,
    /// Entries at most. A put beyond fails with E2BIG (hash) or ENOSPC (trie); an LRU map evicts instead.
    pub max_entries: u32,
    /// BPF_F_* flags.
    pub flags: u32,
}

macro_rules! map_spec {
    ($const:ident, $name_const:ident, $name:literal, $kind:ident, $key:ty, $value:ty, $max:expr, $flags:expr, $doc:literal) => {
        #[doc = concat!("Name of ", $doc)]
        pub const $name_const: &str = $name;
        #[doc = concat!("Specification of ", $doc)]
        pub const $const: MapSpec = MapSpec {
            name: $name,
            kind: MapKind::$kind,
            key_size: size_of::<$key>() as u32,
            value_size: size_of::<$value>() as u32,
            max_entries: $max,
            flags: $flags,
        };
    };
}

/// Service slots, slot 0 included: 50,000 services with 20 backends each.
pub const SERVICES_MAX: u32 = 1_048_576;
/// Backends of all services and clusters.
pub const BACKENDS_MAX: u32 = 1_048_576;
/// Sockets times backends they talked to; older ones are evicted. Preallocated (LRU maps must be): about 24 MB.
pub const REVERSE_SK_MAX: u32 = 262_144;
/// Prefixes of all clusters.
pub const IPCACHE_MAX: u32 = 2_097_152;
/// Entries of translated flows, two each; older ones are evicted. Preallocated: about 42 MB.
pub const CT_MAX: u32 = 262_144;
/// Fragmented datagrams under way; older ones are evicted. Preallocated: about 1 MB.
pub const FRAGMENTS_MAX: u32 = 8_192;
/// Chunks of Maglev tables: 2,048 tables of the default size.
pub const MAGLEV_MAX: u32 = 262_144;
/// Clients times services with affinity; older ones are evicted. Preallocated: about 6 MB.
pub const AFFINITY_MAX: u32 = 65_536;
/// Source ranges of all services.
pub const SOURCE_RANGES_MAX: u32 = 65_536;
/// Devices to the outside.
pub const DEVICES_MAX: u32 = 256;
/// Prefixes that pods reach from their own addresses.
pub const NO_MASQUERADE_MAX: u32 = 1_024;
/// Addresses of local endpoints and of the node.
pub const ENDPOINTS_MAX: u32 = 65_536;

map_spec!(
    SERVICES,
    SERVICES_NAME,
    "isthmus_services",
    Hash,
    crate::ServiceKey,
    crate::ServiceValue,
    SERVICES_MAX,
    NO_PREALLOC,
    "the map of frontends and their slots."
);
map_spec!(
    BACKENDS,
    BACKENDS_NAME,
    "isthmus_backends",
    Hash,
    crate::BackendKey,
    crate::Backend,
    BACKENDS_MAX,
    NO_PREALLOC,
    "the map of backends by number."
);
map_spec!(
    REVERSE_SK,
    REVERSE_SK_NAME,
    "isthmus_reverse_sk",
    LruHash,
    crate::ReverseSkKey,
    crate::ReverseSkValue,
    REVERSE_SK_MAX,
    0,
    "the map from a socket and its backend to the frontend it asked for."
);
map_spec!(
    IPCACHE,
    IPCACHE_NAME,
    "isthmus_ipcache",
    LpmTrie,
    crate::IpcacheKey,
    crate::IpcacheValue,
    IPCACHE_MAX,
    NO_PREALLOC,
    "the map from a prefix to identity and tunnel endpoint."
);
map_spec!(
    ENDPOINTS,
    ENDPOINTS_NAME,
    "isthmus_endpoints",
    Hash,
    crate::EndpointKey,
    crate::Endpoint,
    ENDPOINTS_MAX,
    NO_PREALLOC,
    "the map of local endpoints by address."
);
map_spec!(
    METRICS,
    METRICS_NAME,
    "isthmus_metrics",
    PerCpuArray,
    u32,
    crate::MetricsValue,
    crate::REASONS * crate::DIRECTIONS,
    0,
    "the map of packet counters."
);
map_spec!(
    CONFIG,
    CONFIG_NAME,
    "isthmus_config",
    Array,
    u32,
    crate::NodeConfig,
    1,
    0,
    "the map with the node's configuration."
);

map_spec!(
    CT,
    CT_NAME,
    "isthmus_ct",
    LruHash,
    crate::CtKey,
    crate::CtValue,
    CT_MAX,
    0,
    "the map of translated flows."
);
map_spec!(
    FRAGMENTS,
    FRAGMENTS_NAME,
    "isthmus_fragments",
    LruHash,
    crate::FragmentKey,
    crate::FragmentValue,
    FRAGMENTS_MAX,
    0,
    "the map of fragmented datagrams' ports."
);
map_spec!(
    MAGLEV,
    MAGLEV_NAME,
    "isthmus_maglev",
    Hash,
    crate::MaglevKey,
    crate::MaglevChunk,
    MAGLEV_MAX,
    NO_PREALLOC,
    "the map of Maglev tables, in chunks."
);
map_spec!(
    AFFINITY,
    AFFINITY_NAME,
    "isthmus_affinity",
    LruHash,
    crate::AffinityKey,
    crate::AffinityValue,
    AFFINITY_MAX,
    0,
    "the map from clients to the backends they stay on."
);
map_spec!(
    SOURCE_RANGES,
    SOURCE_RANGES_NAME,
    "isthmus_source_ranges",
    LpmTrie,
    crate::SourceRangeKey,
    crate::SourceRangeValue,
    SOURCE_RANGES_MAX,
    NO_PREALLOC,
    "the map of prefixes that may ask services."
);

map_spec!(
    DEVICES,
    DEVICES_NAME,
    "isthmus_devices",
    Hash,
    u32,
    crate::Device,
    DEVICES_MAX,
    NO_PREALLOC,
    "the map of devices to the outside."
);
map_spec!(
    NO_MASQUERADE,
    NO_MASQUERADE_NAME,
    "isthmus_no_masquerade",
    LpmTrie,
    crate::PrefixKey,
    crate::PrefixValue,
    NO_MASQUERADE_MAX,
    NO_PREALLOC,
    "the map of prefixes that pods reach from their own addresses."
);

/// Every map.
pub const ALL: [MapSpec; 14] = [
    SERVICES,
    BACKENDS,
    REVERSE_SK,
    IPCACHE,
    ENDPOINTS,
    METRICS,
    CONFIG,
    CT,
    FRAGMENTS,
    MAGLEV,
    AFFINITY,
    SOURCE_RANGES,
    DEVICES,
    NO_MASQUERADE,
];
