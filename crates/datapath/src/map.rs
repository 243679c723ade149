//! One map with typed keys and values: single operations, batches, dumps.
//!
//! In: keys and values of `bpf-abi`. Out: results; a failure names the map, the call and the errno.
//!
//! Invariants: a [`Map`] is only made from a descriptor whose kind and sizes the kernel confirmed; what a batch did
//! not do because of one entry it goes on with after that entry; deleting what is absent succeeds. A kernel without
//! batches for a kind of map gets single operations.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use isthmus_bpf_abi::maps::MapSpec;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::{self, BatchProgress, ENOTSUPP};

/// Entries in one batch call. Large enough that the call's own cost does not show, small enough for the cache.
pub const BATCH_ENTRIES_MAX: usize = 4096;

/// What a key or value must be: plain bytes without padding.
pub trait Layout: FromBytes + IntoBytes + Immutable + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + Copy> Layout for T {}

/// A map operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} on map {map}")]
pub struct MapError {
    /// Which map.
    pub map: &'static str,
    /// What was tried.
    pub call: &'static str,
    /// The kernel's answer. E2BIG and ENOSPC mean that the map is full.
    #[source]
    pub source: io::Error,
}

impl MapError {
    /// Whether the map has no room: the entry fits only after others are gone.
    pub fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }
}

/// A map that cannot be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum MapOpenError {
    /// The kernel refuses.
    #[error("{call} for map {map} at {path}")]
    Call {
        /// Which map.
        map: &'static str,
        /// What was tried.
        call: &'static str,
        /// Its pin.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is none: no agent runs with this bpf root.
    #[error("no map is pinned at {path}: does an agent run with this --bpf-root?")]
    Absent {
        /// Its pin.
        path: String,
    },
    /// Another layout than this program's.
    #[error(
        "the map at {path} has {found}, this version needs {wanted}: stop the agent, remove the folder `isthmus` there and start again"
    )]
    Mismatch {
        /// Its pin.
        path: String,
        /// Kind and sizes there.
        found: String,
        /// Kind and sizes here.
        wanted: String,
    },
}

/// Entries of a batch that failed, by position. All others were done.
pub type Failures = Vec<(usize, MapError)>;

/// A map with keys `K` and values `V`.
#[derive(Debug)]
pub struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    types: PhantomData<fn(K) -> V>,
}

/// How far a walk over a map has come, see [`Map::scan`]. For one map.
#[derive(Debug)]
pub struct Scan {
    position: Option<Vec<u8>>,
    keys: Vec<u8>,
    values: Vec<u8>,
    count: usize,
    over: bool,
}

impl Default for Scan {
    fn default() -> Self {
        Self {
            position: None,
            keys: Vec::new(),
            values: Vec::new(),
            count: BATCH_ENTRIES_MAX,
            over: false,
        }
    }
}

impl Scan {
    /// Whether all entries were seen.
    pub fn is_over(&self) -> bool {
        self.over
    }
}

impl<K: Layout, V: Layout> Map<K, V> {
    /// Opens the map pinned at `path`, or makes and pins it.
    pub fn open_or_create(spec: &MapSpec, path: &Path) -> Result<Self, MapOpenError> {
        let failed = |call| {
            move |source| MapOpenError::Call {
                map: spec.name,
                call,
                path: path.display().to_string(),
                source,
            }
        };
        if let Some(fd) = sys::obj_get(path, false).map_err(failed("BPF_OBJ_GET"))? {
            return Self::checked(spec, fd, path);
        }
        let fd = sys::map_create(spec).map_err(failed("BPF_MAP_CREATE"))?;
        sys::obj_pin(fd.as_fd(), path).map_err(failed("BPF_OBJ_PIN"))?;
        Self::checked(spec, fd, path)
    }

    /// Opens the map pinned at `path` for reading.
    pub fn open_readonly(spec: &MapSpec, path: &Path) -> Result<Self, MapOpenError> {
        let found = sys::obj_get(path, true).map_err(|source| MapOpenError::Call {
            map: spec.name,
            call: "BPF_OBJ_GET",
            path: path.display().to_string(),
            source,
        })?;
        let fd = found.ok_or_else(|| MapOpenError::Absent {
            path: path.display().to_string(),
        })?;
        Self::checked(spec, fd, path)
    }

    /// Makes a map without a pin: it goes with the last descriptor.
    pub fn create(spec: &MapSpec) -> Result<Self, MapOpenError> {
        let path = Path::new("(no pin)");
        let fd = sys::map_create(spec).map_err(|source| MapOpenError::Call {
            map: spec.name,
            call: "BPF_MAP_CREATE",
            path: path.display().to_string(),
            source,
        })?;
        Self::checked(spec, fd, path)
    }

    fn checked(spec: &MapSpec, fd: OwnedFd, path: &Path) -> Result<Self, MapOpenError> {
        let info = sys::map_info(fd.as_fd()).map_err(|source| MapOpenError::Call {
            map: spec.name,
            call: "BPF_OBJ_GET_INFO_BY_FD",
            path: path.display().to_string(),
            source,
        })?;
        assert_eq!(
            spec.key_size as usize,
            size_of::<K>(),
            "key type of {}",
            spec.name
        );
        let found = [
            info.map_type,
            info.key_size,
            info.value_size,
            info.max_entries,
            info.map_flags & spec.flags,
        ];
        let wanted = [
            spec.kind as u32,
            spec.key_size,
            spec.value_size,
            spec.max_entries,
            spec.flags,
        ];
        if found != wanted {
            let show = |[kind, key, value, max, flags]: [u32; 5]| {
                format!("type {kind}, key {key}, value {value}, {max} entries, flags {flags}")
            };
            return Err(MapOpenError::Mismatch {
                path: path.display().to_string(),
                found: show(found),
                wanted: show(wanted),
            });
        }
        Ok(Self {
            fd,
            name: spec.name,
            types: PhantomData,
        })
    }

    /// The map's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Bytes of kernel memory that the map takes now, as the kernel counts them.
    pub fn memory_bytes(&self) -> Result<u64, MapError> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()))
            .map_err(self.failed("reading fdinfo"))?;
        text.lines()
            .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
            .ok_or_else(|| self.failed("reading fdinfo")(io::ErrorKind::InvalidData.into()))
    }

    /// The value of `key`.
    pub fn lookup(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut value = V::new_zeroed();
        let found = sys::map_lookup(self.fd(), key.as_bytes(), value.as_mut_bytes())
            .map_err(self.failed("BPF_MAP_LOOKUP_ELEM"))?;
        Ok(found.then_some(value))
    }

    /// Writes one entry.
    pub fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        sys::map_update(self.fd(), key.as_bytes(), value.as_bytes())
            .map_err(self.failed("BPF_MAP_UPDATE_ELEM"))
    }

    /// Writes one entry unless its key is there. Returns whether it was written.
    pub fn put_new(&self, key: &K, value: &V) -> Result<bool, MapError> {
        sys::map_insert(self.fd(), key.as_bytes(), value.as_bytes())
            .map_err(self.failed("BPF_MAP_UPDATE_ELEM"))
    }

    /// Removes one entry; it may be absent.
    pub fn delete(&self, key: &K) -> Result<(), MapError> {
        sys::map_delete(self.fd(), key.as_bytes())
            .map(drop)
            .map_err(self.failed("BPF_MAP_DELETE_ELEM"))
    }

    /// Writes entries, in order. `keys` and `values` have the same length.
    pub fn put_batch(&self, keys: &[K], values: &[V]) -> Failures {
        assert_eq!(
            keys.len(),
            values.len(),
            "one value for each key of {}",
            self.name
        );
        self.in_batches(
            keys.len(),
            "BPF_MAP_UPDATE_BATCH",
            |from, to| {
                sys::map_update_batch(
                    self.fd(),
                    keys[from..to].as_bytes(),
                    values[from..to].as_bytes(),
                    to - from,
                )
            },
            |at| self.put(&keys[at], &values[at]),
        )
    }

    /// Writes all entries with a single call, or fails somewhere in the middle: for entries that are known to fit.
    pub fn put_whole(&self, keys: &[K], values: &[V]) -> Result<(), MapError> {
        assert_eq!(
            keys.len(),
            values.len(),
            "one value for each key of {}",
            self.name
        );
        match sys::map_update_batch(self.fd(), keys.as_bytes(), values.as_bytes(), keys.len()).error {
            None => Ok(()),
            Some(source) => Err(self.failed("BPF_MAP_UPDATE_BATCH")(source)),
        }
    }

    /// Removes entries; any may be absent.
    pub fn delete_batch(&self, keys: &[K]) -> Failures {
        self.in_batches(
            keys.len(),
            "BPF_MAP_DELETE_BATCH",
            |from, to| sys::map_delete_batch(self.fd(), keys[from..to].as_bytes(), to - from),
            |at| self.delete(&keys[at]),
        )
    }

    /// Runs `batch` over `0..len`; an entry that stops it is noted and skipped. Falls back to `single`.
    fn in_batches(
        &self,
        len: usize,
        call: &'static str,
        batch: impl Fn(usize, usize) -> BatchProgress,
        single: impl Fn(usize) -> Result<(), MapError>,
    ) -> Failures {
        let mut failures = Failures::new();
        let mut at = 0;
        while at < len {
            let end = (at + BATCH_ENTRIES_MAX).min(len);
            let BatchProgress { done, error } = batch(at, end);
            at += done;
            let Some(source) = error else { continue };
            match source.raw_os_error() {
                Some(ENOTSUPP | libc::EOPNOTSUPP) => {
                    failures.extend((at..len).filter_map(|index| Some((index, single(index).err()?))));
                    return failures;
                }
                // Only deletes answer so: it is gone, as wanted.
                Some(libc::ENOENT) => {}
                _ => failures.push((
                    at,
                    MapError {
                        map: self.name,
                        call,
                        source,
                    },
                )),
            }
            at += 1;
        }
        failures
    }

    /// All entries. Entries that change meanwhile may be missed or seen twice.
    pub fn dump(&self) -> Result<Vec<(K, V)>, MapError> {
        let mut entries = Vec::new();
        let mut scan = Scan::default();
        while !scan.is_over() {
            entries.extend(self.scan(&mut scan)?);
        }
        Ok(entries)
    }

    /// The next entries of a walk over the map, about [`BATCH_ENTRIES_MAX`] of them. Entries that change meanwhile may be
    /// missed or seen twice. A kernel without batches for this kind of map gives all at once.
    pub fn scan(&self, scan: &mut Scan) -> Result<Vec<(K, V)>, MapError> {
        loop {
            scan.keys.resize(scan.count * size_of::<K>(), 0);
            scan.values.resize(scan.count * size_of::<V>(), 0);
            let result = sys::map_lookup_batch(
                self.fd(),
                &mut scan.position,
                size_of::<K>().max(4),
                &mut scan.keys,
                &mut scan.values,
                scan.count,
            );
            let (got, last) = match result {
                Ok(result) => result,
                // One hash bucket holds more than fits.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    scan.count *= 2;
                    continue;
                }
                Err(error) if matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EOPNOTSUPP)) => {
                    scan.over = true;
                    return self.dump_singly();
                }
                Err(error) => return Err(self.failed("BPF_MAP_LOOKUP_BATCH")(error)),
            };
            scan.over = last;
            let pairs = scan
                .keys
                .chunks_exact(size_of::<K>())
                .zip(scan.values.chunks_exact(size_of::<V>()));
            return Ok(pairs
                .take(got)
                .filter_map(|(key, value)| {
                    Some((K::read_from_bytes(key).ok()?, V::read_from_bytes(value).ok()?))
                })
                .collect());
        }
    }

    fn dump_singly(&self) -> Result<Vec<(K, V)>, MapError> {
        let mut entries = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0_u8; size_of::<K>()];
        while sys::map_next_key(self.fd(), key.as_deref(), &mut next)
            .map_err(self.failed("BPF_MAP_GET_NEXT_KEY"))?
        {
            if let Ok(typed) = K::read_from_bytes(&next)
                && let Some(value) = self.lookup(&typed)?
            {
                entries.push((typed, value));
            }
            key = Some(next.clone());
        }
        Ok(entries)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn failed(&self, call: &'static str) -> impl Fn(io::Error) -> MapError {
        let map = self.name;
        move |source| MapError { map, call, source }
    }
}

impl<V: Layout> Map<u32, V> {
    /// The values of all possible CPUs at `index` of a per-CPU array.
    pub fn lookup_per_cpu(&self, index: u32) -> Result<Vec<V>, MapError> {
        let cpus =
            aya::util::nr_cpus().map_err(|(_, error)| self.failed("counting the possible CPUs")(error))?;
        let stride = size_of::<V>().next_multiple_of(8);
        let mut bytes = vec![0_u8; stride * cpus];
        sys::map_lookup(self.fd(), index.as_bytes(), &mut bytes)
            .map_err(self.failed("BPF_MAP_LOOKUP_ELEM"))?;
        Ok(bytes
            .chunks_exact(stride)
            .filter_map(|cpu| V::read_from_prefix(cpu).ok().map(|(value, _)| value))
            .collect())
    }
}
