//! The node's maps, all of them, by their pins.
//!
//! In: the bpf root. Out: typed maps; the agent's are writable, the command line's are not. Counters summed over CPUs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use isthmus_bpf_abi::{
    AffinityKey, AffinityValue, Backend, BackendKey, CONFIG_INDEX, CtKey, CtValue, Device, Direction,
    DropReason, Endpoint, EndpointKey, FragmentKey, FragmentValue, IpcacheKey, IpcacheValue, MaglevChunk,
    MaglevKey, MetricsValue, NodeConfig, PrefixKey, PrefixValue, ReverseSkKey, ReverseSkValue, ServiceKey,
    ServiceValue, SourceRangeKey, SourceRangeValue,
    maps::{self, MapSpec},
    metric_index,
};

use crate::{
    map::{Layout, Map, MapError, MapOpenError},
    pins,
};

/// The maps.
#[derive(Debug)]
pub struct Tables {
    /// Frontends and their slots.
    pub services: Map<ServiceKey, ServiceValue>,
    /// Backends by number.
    pub backends: Map<BackendKey, Backend>,
    /// From socket and backend back to the frontend; written by the programs.
    pub reverse_sk: Map<ReverseSkKey, ReverseSkValue>,
    /// Prefix to identity and tunnel endpoint.
    pub ipcache: Map<IpcacheKey, IpcacheValue>,
    /// Local endpoints by address.
    pub endpoints: Map<EndpointKey, Endpoint>,
    /// Translated flows, two entries each; written by the programs.
    pub ct: Map<CtKey, CtValue>,
    /// Ports of fragmented datagrams; written by the programs.
    pub fragments: Map<FragmentKey, FragmentValue>,
    /// Maglev tables, in chunks.
    pub maglev: Map<MaglevKey, MaglevChunk>,
    /// From clients to the backends they stay on; written by the programs.
    pub affinity: Map<AffinityKey, AffinityValue>,
    /// Prefixes that may ask services.
    pub source_ranges: Map<SourceRangeKey, SourceRangeValue>,
    /// Devices to the outside, by index.
    pub devices: Map<u32, Device>,
    /// Prefixes that pods reach from their own addresses.
    pub no_masquerade: Map<PrefixKey, PrefixValue>,
    /// Packet counters; written by the programs.
    pub metrics: Map<u32, MetricsValue>,
    /// The node's configuration.
    pub config: Map<u32, NodeConfig>,
}

/// One counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Counter {
    /// What happened.
    pub reason: DropReason,
    /// Where.
    pub direction: Direction,
    /// Packets (or socket calls) and bytes of all CPUs.
    pub value: MetricsValue,
}

impl Tables {
    /// Opens the maps below `bpf_root`, making those that are absent.
    pub fn open_or_create(bpf_root: &Path) -> Result<Self, MapOpenError> {
        let dir = pins::maps_dir(bpf_root);
        Ok(Self {
            services: create(&dir, &maps::SERVICES)?,
            backends: create(&dir, &maps::BACKENDS)?,
            reverse_sk: create(&dir, &maps::REVERSE_SK)?,
            ipcache: create(&dir, &maps::IPCACHE)?,
            endpoints: create(&dir, &maps::ENDPOINTS)?,
            ct: create(&dir, &maps::CT)?,
            fragments: create(&dir, &maps::FRAGMENTS)?,
            maglev: create(&dir, &maps::MAGLEV)?,
            affinity: create(&dir, &maps::AFFINITY)?,
            source_ranges: create(&dir, &maps::SOURCE_RANGES)?,
            devices: create(&dir, &maps::DEVICES)?,
            no_masquerade: create(&dir, &maps::NO_MASQUERADE)?,
            metrics: create(&dir, &maps::METRICS)?,
            config: create(&dir, &maps::CONFIG)?,
        })
    }

    /// Opens the maps of a running (or stopped) agent for reading.
    pub fn open_readonly(bpf_root: &Path) -> Result<Self, MapOpenError> {
        let dir = pins::maps_dir(bpf_root);
        Ok(Self {
            services: open(&dir, &maps::SERVICES)?,
            backends: open(&dir, &maps::BACKENDS)?,
            reverse_sk: open(&dir, &maps::REVERSE_SK)?,
            ipcache: open(&dir, &maps::IPCACHE)?,
            endpoints: open(&dir, &maps::ENDPOINTS)?,
            ct: open(&dir, &maps::CT)?,
            fragments: open(&dir, &maps::FRAGMENTS)?,
            maglev: open(&dir, &maps::MAGLEV)?,
            affinity: open(&dir, &maps::AFFINITY)?,
            source_ranges: open(&dir, &maps::SOURCE_RANGES)?,
            devices: open(&dir, &maps::DEVICES)?,
            no_masquerade: open(&dir, &maps::NO_MASQUERADE)?,
            metrics: open(&dir, &maps::METRICS)?,
            config: open(&dir, &maps::CONFIG)?,
        })
    }

    /// Maps without pins and programs, which go with this value: to measure and to try out.
    pub fn create() -> Result<Self, MapOpenError> {
        Ok(Self {
            services: Map::create(&maps::SERVICES)?,
            backends: Map::create(&maps::BACKENDS)?,
            reverse_sk: Map::create(&maps::REVERSE_SK)?,
            ipcache: Map::create(&maps::IPCACHE)?,
            endpoints: Map::create(&maps::ENDPOINTS)?,
            ct: Map::create(&maps::CT)?,
            fragments: Map::create(&maps::FRAGMENTS)?,
            maglev: Map::create(&maps::MAGLEV)?,
            affinity: Map::create(&maps::AFFINITY)?,
            source_ranges: Map::create(&maps::SOURCE_RANGES)?,
            devices: Map::create(&maps::DEVICES)?,
            no_masquerade: Map::create(&maps::NO_MASQUERADE)?,
            metrics: Map::create(&maps::METRICS)?,
            config: Map::create(&maps::CONFIG)?,
        })
    }

    /// The node's configuration as the programs see it; all zero if it was never written.
    pub fn node_config(&self) -> Result<NodeConfig, MapError> {
        Ok(self.config.lookup(&CONFIG_INDEX)?.unwrap_or_default())
    }

    /// Writes the node's configuration.
    pub fn set_node_config(&self, config: &NodeConfig) -> Result<(), MapError> {
        self.config.put(&CONFIG_INDEX, config)
    }

    /// Writes the devices to the outside; others go.
    pub fn set_devices(&self, wanted: &BTreeMap<u32, Device>) -> Result<(), MapError> {
        replace(&self.devices, wanted)
    }

    /// Writes the prefixes that pods reach from their own addresses; others go.
    pub fn set_no_masquerade(&self, wanted: &BTreeSet<PrefixKey>) -> Result<(), MapError> {
        let wanted = wanted
            .iter()
            .map(|key| (*key, PrefixValue { there: 1 }))
            .collect();
        replace(&self.no_masquerade, &wanted)
    }

    /// One counter, summed over CPUs.
    pub fn counter(&self, reason: DropReason, direction: Direction) -> Result<MetricsValue, MapError> {
        let per_cpu = self.metrics.lookup_per_cpu(metric_index(reason, direction))?;
        Ok(per_cpu
            .iter()
            .fold(MetricsValue::default(), |sum, cpu| MetricsValue {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
            }))
    }

    /// All counters that are not zero, by reason, then direction.
    pub fn counters(&self) -> Result<Vec<Counter>, MapError> {
        let mut counters = Vec::new();
        for &reason in DropReason::ALL {
            for direction in Direction::ALL {
                let value = self.counter(reason, direction)?;
                if value.packets != 0 {
                    counters.push(Counter {
                        reason,
                        direction,
                        value,
                    });
                }
            }
        }
        Ok(counters)
    }
}

/// Makes `map` hold `wanted` and nothing else: puts what is missing or differs, then removes.
fn replace<K: Layout + Ord, V: Layout + Eq>(
    map: &Map<K, V>,
    wanted: &BTreeMap<K, V>,
) -> Result<(), MapError> {
    let there = map.dump()?;
    let now: BTreeMap<K, V> = there.iter().copied().collect();
    for (key, value) in wanted {
        if now.get(key) != Some(value) {
            map.put(key, value)?;
        }
    }
    for (key, _) in there {
        if !wanted.contains_key(&key) {
            map.delete(&key)?;
        }
    }
    Ok(())
}

fn create<K: Layout, V: Layout>(dir: &Path, spec: &MapSpec) -> Result<Map<K, V>, MapOpenError> {
    Map::open_or_create(spec, &dir.join(spec.name))
}

fn open<K: Layout, V: Layout>(dir: &Path, spec: &MapSpec) -> Result<Map<K, V>, MapOpenError> {
    Map::open_readonly(spec, &dir.join(spec.name))
}
