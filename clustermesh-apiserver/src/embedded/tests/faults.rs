//! The file on bad disks: power that goes at any call, calls that fail, damaged and truncated files, and a file that has grown.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{DeleteRangeRequest, PutRequest};
use rand::{Rng, SeedableRng, rngs::StdRng};
use redb::{Database, StorageBackend};

use super::{Model, name};
use crate::embedded::{
    file::{Directory, File, OpenDatabase, OpenError},
    state::{Command, DiskWrite, State},
};

/// What power loss may tear.
const SECTOR: usize = 512;

/// A file of a disk that has a cache, and that can be told to fail.
#[derive(Debug, Default)]
pub(super) struct Platter {
    /// As calls see it.
    now: Vec<u8>,
    /// As it was flushed.
    durable: Vec<u8>,
    /// What was done since, in order.
    unflushed: Vec<Done>,
    /// Calls that change it, until they fail.
    left: Option<u32>,
    error: Option<io::ErrorKind>,
}

#[derive(Debug)]
enum Done {
    Len(usize),
    Sector(usize, Vec<u8>),
}

fn done(bytes: &mut Vec<u8>, done: &Done) {
    match done {
        Done::Len(len) => bytes.resize(*len, 0),
        Done::Sector(at, data) => {
            bytes.resize(bytes.len().max(at + data.len()), 0);
            bytes[*at..at + data.len()].copy_from_slice(data);
        }
    }
}

impl Platter {
    /// Whether a changing call goes through.
    fn change(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(self.error.unwrap_or(io::ErrorKind::Other).into()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The power goes: of what was not flushed some sectors are there, and some are not.
    fn lose_power(&mut self, random: &mut StdRng) {
        let kept = random.random_range(0.0..=1.0);
        for change in std::mem::take(&mut self.unflushed) {
            if matches!(change, Done::Len(_)) || random.random_bool(kept) {
                done(&mut self.durable, &change);
            }
        }
        self.now = self.durable.clone();
        self.left = None;
    }
}

#[derive(Clone, Debug)]
struct Backend(Arc<Mutex<Platter>>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.0.lock().unwrap();
        let at = offset as usize;
        let bytes = platter.now.get(at..at + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        let change = Done::Len(len as usize);
        done(&mut platter.now, &change);
        platter.unflushed.push(change);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        platter.durable = platter.now.clone();
        platter.unflushed.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.change()?;
        let mut at = offset as usize;
        let mut data = data;
        while !data.is_empty() {
            let (sector, rest) = data.split_at(data.len().min(SECTOR - at % SECTOR));
            let change = Done::Sector(at, sector.to_vec());
            done(&mut platter.now, &change);
            platter.unflushed.push(change);
            at += sector.len();
            data = rest;
        }
        Ok(())
    }
}

/// Platters by number. The file of a path says which number it has, so that renaming it works.
#[derive(Clone, Debug, Default)]
pub(super) struct Platters(Arc<Mutex<Vec<Arc<Mutex<Platter>>>>>);

impl Platters {
    fn of(&self, path: &Path) -> Arc<Mutex<Platter>> {
        let mut platters = self.0.lock().unwrap();
        let number = std::fs::read_to_string(path).ok();
        let number = number.map_or(platters.len(), |text| text.parse().unwrap());
        if number == platters.len() {
            platters.push(Arc::default());
            std::fs::write(path, number.to_string()).unwrap();
        }
        platters[number].clone()
    }

    /// A way to open files that are kept here.
    pub(super) fn open(&self) -> OpenDatabase {
        let platters = self.clone();
        Arc::new(move |path| {
            let mut builder = Database::builder();
            builder.set_check_integrity_on_open(true);
            // Little is cached, so that much of a transaction is written before its end.
            builder.set_cache_size(64 * 1024);
            builder.create_with_backend(Backend(platters.of(path)))
        })
    }

    /// All calls that change anything fail after `calls`, until told otherwise.
    pub(super) fn fail(&self, path: &Path, calls: Option<u32>, error: io::ErrorKind) {
        let platter = self.of(path);
        let mut platter = platter.lock().unwrap();
        (platter.left, platter.error) = (calls, Some(error));
    }
}

/// A group of writes at random, and the state after it.
fn group(state: &State, random: &mut StdRng, value_max: usize) -> (State, Vec<DiskWrite>) {
    let (mut state, mut writes) = (state.clone(), vec![]);
    for _ in 0..random.random_range(1..6) {
        let key: Bytes = format!("key/{}", random.random_range(0..12)).into();
        let command = match random.random_range(0..10) {
            0 => Command::Delete(DeleteRangeRequest {
                key,
                range_end: Bytes::from_static(b"key/5"),
                ..Default::default()
            }),
            1 => Command::Compact(state.revision()),
            2 => Command::Grant {
                id: random.random_range(1..9),
                ttl: 60,
            },
            _ => Command::Put(PutRequest {
                key,
                value: vec![random.random(); random.random_range(0..value_max)].into(),
                ..Default::default()
            }),
        };
        if let Ok((_, effects)) = state.apply(&command, &Model::new()) {
            writes.extend(effects.writes);
        }
    }
    (state, writes)
}

#[test]
fn power_that_goes_at_any_call_takes_nothing_acknowledged_and_leaves_no_half_group() {
    let (mut kept, mut whole, mut none) = (0, 0, 0);
    for seed in 0..60 {
        let mut random = StdRng::seed_from_u64(seed);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.redb");
        let platters = Platters::default();
        let taken = Directory::take(directory.path(), &name("c1"), platters.open()).unwrap();
        let taken = Arc::new(taken);
        let opened = taken.open(7).unwrap();
        let (mut file, mut state) = (opened.file, opened.loaded.state);
        for _ in 0..random.random_range(1..4) {
            for _ in 0..random.random_range(0..6) {
                let (next, writes) = group(&state, &mut random, 20_000);
                file.commit(&writes).unwrap();
                state = next;
            }
            let calls = random.random_range(0..60);
            platters.fail(&path, Some(calls), io::ErrorKind::Other);
            let (next, writes) = group(&state, &mut random, 20_000);
            let acknowledged = file.commit(&writes).is_ok();
            // Closing does not reach the disk any more either.
            platters.fail(&path, Some(0), io::ErrorKind::Other);
            drop(file);
            platters.of(&path).lock().unwrap().lose_power(&mut random);
            let opened = taken.open(8).unwrap();
            assert_eq!(opened.history, 7, "seed {seed}");
            let found = opened.loaded.state;
            assert!(
                found == next || (found == state && !acknowledged),
                "seed {seed}: acknowledged {acknowledged}, at {} and found {}",
                next.revision(),
                found.revision()
            );
            match (acknowledged, found == next) {
                (true, _) => kept += 1,
                (false, true) => whole += 1,
                (false, false) => none += 1,
            }
            (file, state) = (opened.file, found);
        }
    }
    // All three happen, so that the disk is as bad as it should be.
    assert!(kept > 5 && whole > 0 && none > 5, "{kept} {whole} {none}");
}

#[test]
fn a_damaged_file_is_refused_and_left_alone_or_holds_what_it_held() {
    let mut random = StdRng::seed_from_u64(5);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let opened = File::open(directory.path(), &name("c1"), 7).unwrap();
    let mut states: Vec<State> = vec![opened.loaded.state];
    for _ in 0..20 {
        let (state, writes) = group(states.last().unwrap(), &mut random, 3000);
        opened.file.commit(&writes).unwrap();
        states.push(state);
    }
    // As a killed process leaves it, and as one that ended does.
    let killed = std::fs::read(&path).unwrap();
    drop(opened.file);
    let ended = std::fs::read(&path).unwrap();
    let mut refused = BTreeMap::new();
    for (kind, whole) in [("killed", &killed), ("ended", &ended)] {
        for round in 0..150 {
            let mut bytes = whole.clone();
            match round % 3 {
                0 => bytes.truncate(random.random_range(0..bytes.len())),
                1 => {
                    // Where there is something: a file is mostly empty.
                    let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
                    bytes[used[random.random_range(0..used.len())]] ^= 1 << random.random_range(0..8);
                }
                _ => {
                    let at = random.random_range(0..bytes.len() - 4096);
                    bytes[at..at + 4096].fill(random.random());
                }
            }
            std::fs::write(&path, &bytes).unwrap();
            match File::open(directory.path(), &name("c1"), 9) {
                Ok(opened) => {
                    assert_eq!(opened.history, 7);
                    let found = opened.loaded.state;
                    // What a torn last write looks like cannot be told from damage to it.
                    let allowed = if kind == "killed" { 2 } else { 1 };
                    let known = states.iter().rev().take(allowed).any(|state| *state == found);
                    assert!(known, "{kind}, round {round}: something else was read");
                }
                Err(error) => {
                    assert!(
                        matches!(error, OpenError::Unreadable { .. }),
                        "{kind}, round {round}: {error}"
                    );
                    assert!(
                        std::fs::read(&path).unwrap() == bytes,
                        "{kind}, round {round}: it was touched"
                    );
                    *refused.entry(kind).or_insert(0) += 1;
                }
            }
        }
    }
    assert!(refused.values().all(|count| *count > 30), "{refused:?}");
}

#[test]
fn a_copy_takes_the_files_place_with_what_was_written_meanwhile() {
    let mut random = StdRng::seed_from_u64(6);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let opened = File::open(directory.path(), &name("c1"), 7).unwrap();
    let (mut file, mut state) = (opened.file, opened.loaded.state);
    for _ in 0..4 {
        let write = |file: &File, state: &mut State, random: &mut StdRng, count: usize| {
            let mut all = vec![];
            for _ in 0..count {
                let (next, writes) = group(state, random, 100_000);
                file.commit(&writes).unwrap();
                *state = next;
                all.extend(writes);
            }
            all
        };
        write(&file, &mut state, &mut random, 60);
        let compact = Command::Compact(state.revision());
        if let Ok((_, effects)) = state.apply(&compact, &Model::new()) {
            file.commit(&effects.writes).unwrap();
        }
        let before = file.len();
        let copying = file.copy().unwrap();
        let meanwhile = write(&file, &mut state, &mut random, 5);
        let copy = copying.run().unwrap();
        copy.commit(&meanwhile).unwrap();
        // Here a kill leaves the old file under the name, and a part of a new one.
        assert!(directory.path().join("store.redb.new").exists());
        file = copy.take_place().unwrap();
        assert!(file.len() < before, "{before} bytes became {}", file.len());
        write(&file, &mut state, &mut random, 2);
        drop(file);
        std::fs::write(directory.path().join("store.redb.new"), "half").unwrap();
        let opened = File::open(directory.path(), &name("c1"), 9).unwrap();
        assert_eq!((opened.history, &opened.loaded.state), (7, &state));
        file = opened.file;
    }
    assert!(path.exists());
}
