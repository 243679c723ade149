//! Carries the maps of an older ABI version over to this one, so that an upgrade needs no empty node.
//!
//! In: the pinned maps of version 1. Out: pins of this version. Versions 1 and 2 have services, backends, ipcache, endpoints and
//! sockets' ways back in common; those maps stay as they are. The node's configuration has become longer: a new map with
//! what the old one says takes its pin, so that programs which find it know their node at once. Counters have more
//! directions: they begin anew.
//!
//! Invariants: programs of the older version hold their own maps and go on until their links are updated; each pin changes
//! in one step; whoever dies on the way can begin again, since the version is written last.

use std::{fs, io, os::fd::AsFd, path::Path};

use isthmus_bpf_abi::{
    CONFIG_INDEX, MetricsValue, NodeConfig,
    maps::{self, MapSpec},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    map::{Layout, Map, MapError, MapOpenError},
    pins, sys,
};

/// The oldest version that can be carried over.
pub const VERSION_MIN: u32 = 1;

/// Bytes of a `NodeConfig` in version 1; version 2 has the same fields first.
const CONFIG_1: usize = 80;
/// Counters in version 1.
const METRICS_1: u32 = 256;
/// What the pin of a map is called until it takes its place. bpffs allows no dots in names.
const NEW: &str = "_new";

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

/// From version 1 to 2, in the folder of pinned maps. Calling again goes on where it ended.
pub fn from_1(dir: &Path) -> Result<(), MigrateError> {
    let config_1 = MapSpec {
        value_size: CONFIG_1 as u32,
        ..maps::CONFIG
    };
    if is_like(dir, &config_1)? {
        let old = Map::<u32, [u8; CONFIG_1]>::open_readonly(&config_1, &dir.join(config_1.name))?;
        let mut bytes = [0; size_of::<NodeConfig>()];
        bytes[..CONFIG_1].copy_from_slice(&old.lookup(&CONFIG_INDEX)?.unwrap_or([0; CONFIG_1]));
        replace(dir, &maps::CONFIG, |new: &Map<u32, NodeConfig>| {
            let config = NodeConfig::read_from_bytes(bytes.as_bytes()).unwrap_or_default();
            new.put(&CONFIG_INDEX, &config)
        })?;
    }
    let metrics_1 = MapSpec {
        max_entries: METRICS_1,
        ..maps::METRICS
    };
    if is_like(dir, &metrics_1)? {
        replace(dir, &maps::METRICS, |_: &Map<u32, MetricsValue>| Ok(()))?;
    }
    Ok(())
}

/// Whether a map with these sizes is pinned under its name.
fn is_like(dir: &Path, spec: &MapSpec) -> Result<bool, MigrateError> {
    let path = dir.join(spec.name);
    let failed = |source| MigrateError::Pin {
        path: path.display().to_string(),
        source,
    };
    let Some(map) = sys::obj_get(&path, true).map_err(failed)? else {
        return Ok(false);
    };
    let info = sys::map_info(map.as_fd()).map_err(failed)?;
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
    let failed = |source| MigrateError::Pin {
        path: path.display().to_string(),
        source,
    };
    pins::remove(&new).map_err(failed)?;
    fill(&Map::open_or_create(spec, &new)?)?;
    fs::rename(&new, &path).map_err(failed)
}
