//! Carries the maps of an older ABI version over to this one, so that an upgrade needs no empty node.
//!
//! In: the pinned maps of version 1 or 2. Out: pins of this version. All versions have services, backends, ipcache, endpoints and
//! sockets' ways back in common; those maps stay as they are. The node's configuration has become longer: a new map with
//! what the old one says takes its pin, so that programs which find it know their node at once. Since version 2 counters have
//! more directions: those of version 1 begin anew. Since version 3 a flow's entry is longer: a copy of all flows takes the pin,
//! and when this version's programs run everywhere, [`finish`] adds those that the old programs have begun meanwhile.
//!
//! Invariants: programs of the older version hold their own maps and go on until their links are updated; each pin changes
//! in one step; whoever dies on the way can begin again, since the version is written last; and nobody else is on the way, for
//! the lock on the pins ([`pins::prepare`]) is held from before the version is read until after [`finish`].

use std::{collections::HashSet, fs, io, os::fd::AsFd, path::Path};

use isthmus_bpf_abi::{
    CONFIG_INDEX, CtKey, CtValue, MetricsValue, NodeConfig,
    maps::{self, MapSpec},
};
use zerocopy::FromBytes;

use crate::{
    map::{Layout, Map, MapError, MapOpenError},
    pins, sys,
};

/// The oldest version that can be carried over.
pub const VERSION_MIN: u32 = 1;

/// Bytes of a `NodeConfig` in version 1; later versions have the same fields first.
const CONFIG_1: usize = 80;
/// The same in version 2.
const CONFIG_2: usize = 88;
/// Counters in version 1.
const METRICS_1: u32 = 256;
/// Bytes of a `CtValue` in version 2; later versions have the same fields first.
const CT_2: usize = 32;
/// What the pin of a map is called until it takes its place. bpffs allows no dots in names.
const NEW: &str = "_new";
/// What the pin of version 2's flows is called until [`finish`].
const FLOWS_2: &str = "isthmus_ct_2";

/// The flows' map in version 2.
const CT_SPEC_2: MapSpec = MapSpec {
    value_size: CT_2 as u32,
    ..maps::CT
};

/// Maps cannot be carried over.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A map.
    #[error(transparent)]
    Open(#[from] MapOpenError),
    /// What is in it.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A pin.
    #[error("replacing the pin {path}")]
    Pin {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// From an older version to this one, in the folder of pinned maps. Calling again goes on where it ended.
pub fn begin(dir: &Path) -> Result<(), MigrateError> {
    configuration::<CONFIG_1>(dir)?;
    configuration::<CONFIG_2>(dir)?;
    let metrics_1 = MapSpec {
        max_entries: METRICS_1,
        ..maps::METRICS
    };
    if is_like(dir, &metrics_1)? {
        replace(dir, &maps::METRICS, |_: &Map<u32, MetricsValue>| Ok(()))?;
    }
    if is_like(dir, &CT_SPEC_2)? {
        let path = dir.join(maps::CT_NAME);
        let kept = dir.join(FLOWS_2);
        let failed = pin_error(&path);
        pins::remove(&kept).map_err(&failed)?;
        fs::rename(&path, &kept).map_err(&failed)?;
        // Without its pin for a moment: who begins again here finds the flows under their other name.
        let old = Map::<CtKey, [u8; CT_2]>::open_readonly(&CT_SPEC_2, &kept)?;
        replace(dir, &maps::CT, |new| add_flows(&old, new))?;
    }
    Ok(())
}

/// Adds to the flows those that older programs began after the copy. Call when no link runs such a program any more.
pub fn finish(dir: &Path, flows: &Map<CtKey, CtValue>) -> Result<(), MigrateError> {
    let kept = dir.join(FLOWS_2);
    if !kept.exists() {
        return Ok(());
    }
    let old = Map::<CtKey, [u8; CT_2]>::open_readonly(&CT_SPEC_2, &kept)?;
    add_flows(&old, flows)?;
    pins::remove(&kept).map_err(pin_error(&kept))
}

/// Copies the flows that `new` lacks.
fn add_flows(old: &Map<CtKey, [u8; CT_2]>, new: &Map<CtKey, CtValue>) -> Result<(), MapError> {
    let there: HashSet<CtKey> = new.dump()?.into_iter().map(|(key, _)| key).collect();
    for (key, value) in old.dump()? {
        if !there.contains(&key) {
            let mut bytes = [0; size_of::<CtValue>()];
            bytes[..CT_2].copy_from_slice(&value);
            if let Ok(value) = CtValue::read_from_bytes(&bytes) {
                new.put_new(&key, &value)?;
            }
        }
    }
    Ok(())
}

/// Replaces the configuration's map if its value has `OLD` bytes.
fn configuration<const OLD: usize>(dir: &Path) -> Result<(), MigrateError>
where
    [u8; OLD]: Layout,
{
    let spec = MapSpec {
        value_size: OLD as u32,
        ..maps::CONFIG
    };
    if !is_like(dir, &spec)? {
        return Ok(());
    }
    let old = Map::<u32, [u8; OLD]>::open_readonly(&spec, &dir.join(spec.name))?;
    let mut bytes = [0; size_of::<NodeConfig>()];
    bytes[..OLD].copy_from_slice(&old.lookup(&CONFIG_INDEX)?.unwrap_or([0; OLD]));
    replace(dir, &maps::CONFIG, |new: &Map<u32, NodeConfig>| {
        let config = NodeConfig::read_from_bytes(&bytes).unwrap_or_default();
        new.put(&CONFIG_INDEX, &config)
    })
}

/// Whether a map with these sizes is pinned under its name.
fn is_like(dir: &Path, spec: &MapSpec) -> Result<bool, MigrateError> {
    let path = dir.join(spec.name);
    let failed = pin_error(&path);
    let Some(map) = sys::obj_get(&path, true).map_err(&failed)? else {
        return Ok(false);
    };
    let info = sys::map_info(map.as_fd()).map_err(&failed)?;
    Ok((info.value_size, info.max_entries) == (spec.value_size, spec.max_entries))
}

/// Makes a map, fills it, and puts it in the place of the one of its name.
fn replace<K: Layout, V: Layout>(
    dir: &Path,
    spec: &MapSpec,
    fill: impl FnOnce(&Map<K, V>) -> Result<(), MapError>,
) -> Result<(), MigrateError> {
    let path = dir.join(spec.name);
    let new = dir.join(format!("{}{NEW}", spec.name));
    let failed = pin_error(&path);
    pins::remove(&new).map_err(&failed)?;
    fill(&Map::open_or_create(spec, &new)?)?;
    fs::rename(&new, &path).map_err(&failed)
}

fn pin_error(path: &Path) -> impl Fn(io::Error) -> MigrateError + use<> {
    let path = path.display().to_string();
    move |source| MigrateError::Pin {
        path: path.clone(),
        source,
    }
}
