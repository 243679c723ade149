//! The `bpf` system call: the commands that aya does not offer (batches, links with pins, test runs), each as one
//! safe function.
//!
//! In: file descriptors, byte slices, paths. Out: results with the kernel's errno. Nothing here knows what a map holds.
//!
//! Invariants: every structure is zeroed where it is not set (the kernel refuses unknown bits), every pointer in it
//! outlives the call, and slices are checked against the sizes that the kernel will read or write.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use isthmus_bpf_abi::maps::MapSpec;

/// Commands of `bpf(2)`.
#[derive(Clone, Copy)]
#[repr(i64)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapGetNextKey = 4,
    ObjPin = 6,
    ObjGet = 7,
    ProgTestRun = 10,
    ObjGetInfo = 15,
    MapLookupBatch = 24,
    MapUpdateBatch = 26,
    MapDeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// BPF_F_RDONLY: the file descriptor may not write.
const READ_ONLY: u32 = 1 << 3;

/// BPF_NOEXIST: only a new key.
const NO_EXIST: u64 = 1;

/// The kernel's own "not supported", which never should reach user space but does for batches.
pub const ENOTSUPP: i32 = 524;

fn bpf<T>(command: Command, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is one of the structures below, fully initialised, and the kernel is told its size. What it
    // points to is upheld by the callers in this file.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as i64,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

#[repr(C)]
#[derive(Default)]
struct MapCreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// Creates a map. Its kernel name is the spec's, cut to 15 bytes.
pub fn map_create(spec: &MapSpec) -> io::Result<OwnedFd> {
    let mut map_name = [0; 16];
    for (to, from) in map_name.iter_mut().take(15).zip(spec.name.bytes()) {
        *to = from;
    }
    let mut attr = MapCreateAttr {
        map_type: spec.kind as u32,
        key_size: spec.key_size,
        value_size: spec.value_size,
        max_entries: spec.max_entries,
        map_flags: spec.flags,
        map_name,
        ..Default::default()
    };
    bpf(Command::MapCreate, &mut attr).map(owned)
}

#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Copies the value of `key` into `value`. Sizes must be the map's (a per-CPU map's value: of all possible CPUs,
/// each rounded up to 8 bytes). Returns whether the key exists.
pub fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    match bpf(Command::MapLookup, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes one entry.
pub fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        ..Default::default()
    };
    bpf(Command::MapUpdate, &mut attr).map(drop)
}

/// Writes one entry unless the key exists. Returns whether it was written.
pub fn map_insert(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags: NO_EXIST,
        ..Default::default()
    };
    match bpf(Command::MapUpdate, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes one entry. Returns whether it was there.
pub fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: key.as_ptr() as u64,
        ..Default::default()
    };
    match bpf(Command::MapDelete, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies the key after `key` (or the first) into `next`. Returns whether there is one.
pub fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: raw(map),
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        ..Default::default()
    };
    match bpf(Command::MapGetNextKey, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// How far a batch came: entries done, and what stopped it before its end.
pub struct BatchProgress {
    /// Entries that were done, from the first.
    pub done: usize,
    /// Why entry number `done` was not.
    pub error: Option<io::Error>,
}

/// Writes `count` entries from contiguous `keys` and `values`.
pub fn map_update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: usize) -> BatchProgress {
    let mut attr = BatchAttr {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: count as u32,
        map_fd: raw(map),
        ..Default::default()
    };
    let result = bpf(Command::MapUpdateBatch, &mut attr);
    progress(result, attr.count, count)
}

/// Removes `count` entries by contiguous `keys`; stops at one that is absent (ENOENT).
pub fn map_delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: usize) -> BatchProgress {
    let mut attr = BatchAttr {
        keys: keys.as_ptr() as u64,
        count: count as u32,
        map_fd: raw(map),
        ..Default::default()
    };
    let result = bpf(Command::MapDeleteBatch, &mut attr);
    progress(result, attr.count, count)
}

fn progress(result: io::Result<i64>, done: u32, count: usize) -> BatchProgress {
    match result {
        Ok(_) => BatchProgress {
            done: count,
            error: None,
        },
        Err(error) => {
            // The kernel writes how many it did when an entry stops it, but leaves our own number in place when it
            // refuses the call as a whole: all done and an error together mean the latter.
            let done = if done as usize >= count { 0 } else { done as usize };
            BatchProgress {
                done,
                error: Some(error),
            }
        }
    }
}

/// Reads entries into `keys` and `values` (room for `count`), from `position` on if it is `Some`, and moves
/// `position`. Returns how many came and whether these were the last. `position` needs the key's size, at least 4.
pub fn map_lookup_batch(
    map: BorrowedFd<'_>,
    position: &mut Option<Vec<u8>>,
    position_len: usize,
    keys: &mut [u8],
    values: &mut [u8],
    count: usize,
) -> io::Result<(usize, bool)> {
    let mut out = vec![0_u8; position_len];
    let mut attr = BatchAttr {
        in_batch: position.as_ref().map_or(0, |position| position.as_ptr() as u64),
        out_batch: out.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: count as u32,
        map_fd: raw(map),
        ..Default::default()
    };
    let result = bpf(Command::MapLookupBatch, &mut attr);
    let last = match result {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    *position = Some(out);
    Ok(((attr.count as usize).min(count), last))
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Pins a map, program or link at `path`, which must not exist, on a bpffs.
pub fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        bpf_fd: raw(object),
        ..Default::default()
    };
    bpf(Command::ObjPin, &mut attr).map(drop)
}

/// Opens what is pinned at `path`; nothing if nothing is.
pub fn obj_get(path: &Path, read_only: bool) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let file_flags = if read_only { READ_ONLY } else { 0 };
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        file_flags,
        ..Default::default()
    };
    match bpf(Command::ObjGet, &mut attr) {
        Ok(fd) => Ok(Some(owned(fd))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

fn info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoAttr {
        bpf_fd: raw(object),
        info_len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(Command::ObjGetInfo, &mut attr)?;
    Ok(info)
}

/// The start of the kernel's `bpf_map_info`.
#[repr(C)]
#[derive(Default)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// Kernel's number.
    pub id: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Entries at most.
    pub max_entries: u32,
    /// BPF_F_*.
    pub map_flags: u32,
}

/// What the kernel says of a map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    prog_type: u32,
    id: u32,
}

/// The kernel's number of a program.
pub fn prog_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    info::<ProgInfo>(program).map(|info| info.id)
}

/// The start of the kernel's `bpf_link_info`, with the fields of the two kinds we make.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    /// cgroup: cgroup ID (u64), attach type. TCX: ifindex, attach type.
    words: [u32; 4],
}

const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_TCX: u32 = 11;

/// Where a link is attached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkTarget {
    /// To the cgroup with this number; 0 once it is gone.
    Cgroup(u64),
    /// To the device with this index; 0 once it is gone.
    Device(u32),
    /// To something that we never attach to.
    Other,
}

/// A link's program (by number) and target.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<(u32, LinkTarget)> {
    let info: RawLinkInfo = info(link)?;
    let target = match info.link_type {
        LINK_TYPE_CGROUP => LinkTarget::Cgroup((u64::from(info.words[1]) << 32) | u64::from(info.words[0])),
        LINK_TYPE_TCX => LinkTarget::Device(info.words[0]),
        _ => LinkTarget::Other,
    };
    Ok((info.prog_id, target))
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches a program to a cgroup (a directory's descriptor).
pub fn link_create_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: raw(program),
        target: raw(cgroup),
        attach_type,
        ..Default::default()
    };
    bpf(Command::LinkCreate, &mut attr).map(owned)
}

/// Attaches a program to a device of the calling thread's network namespace, after those already there.
pub fn link_create_tcx(program: BorrowedFd<'_>, ifindex: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: raw(program),
        target: ifindex,
        attach_type,
        ..Default::default()
    };
    bpf(Command::LinkCreate, &mut attr).map(owned)
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces a link's program: each event sees the old or the new one, none sees neither.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        ..Default::default()
    };
    bpf(Command::LinkUpdate, &mut attr).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct LinkDetachAttr {
    link_fd: u32,
}

/// Detaches a link at once; it may be detached already. Closing the last descriptor alone detaches some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetachAttr { link_fd: raw(link) };
    match bpf(Command::LinkDetach, &mut attr) {
        // A TCX link whose device is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        result => result.map(drop),
    }
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Runs a packet program once on `packet` with `context` (the start of a `__sk_buff`). Returns the verdict and the
/// packet as the program left it.
pub fn prog_test_run(program: BorrowedFd<'_>, packet: &[u8], context: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0_u8; packet.len() + 256];
    let mut attr = TestRunAttr {
        prog_fd: raw(program),
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        ctx_size_in: context.len() as u32,
        ctx_in: if context.is_empty() {
            0
        } else {
            context.as_ptr() as u64
        },
        ..Default::default()
    };
    bpf(Command::ProgTestRun, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok((attr.retval, out))
}

/// The number that links name a cgroup by: its directory's inode.
pub fn cgroup_id(cgroup: &impl AsFd) -> io::Result<u64> {
    nix::sys::stat::fstat(cgroup.as_fd())
        .map(|stat| stat.st_ino)
        .map_err(io::Error::from)
}
