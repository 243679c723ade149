//! A group's Maglev table as the maps hold it: in chunks, written where something changed.
//!
//! In: who takes traffic, with ideal shares. Out: a [`Table`], and which chunks differ from the one before.

use std::{collections::BTreeSet, sync::Arc};

use isthmus_bpf_abi::{MAGLEV_CHUNK, MaglevChunk};

use super::{allot::Bid, group::Group};
use crate::maglev::{self, MaglevBackend, MaglevConfig};

/// Entries name backends by their numbers in the map; zero past the end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Table {
    chunks: Vec<Arc<MaglevChunk>>,
}

/// How many chunks a table of `size` entries has.
pub(crate) const fn chunks_of(size: u32) -> u32 {
    size.div_ceil(MAGLEV_CHUNK)
}

impl Table {
    /// The table for those that take traffic; `None` if nobody does.
    pub(crate) fn build(config: &MaglevConfig, group: &Group, shares: &[(Bid, u64)]) -> Option<Self> {
        let backends: Vec<MaglevBackend> = shares
            .iter()
            .map(|(bid, share)| MaglevBackend {
                address: bid.key.0,
                port: bid.key.1,
                weight: *share,
                id: group.candidates[bid.at].id,
            })
            .collect();
        let entries = maglev::table(&config.seed, config.table_size, &backends);
        (!entries.is_empty()).then(|| Self::of_entries(&entries))
    }

    fn of_entries(entries: &[u32]) -> Self {
        let chunk = |part: &[u32]| {
            let mut backend_ids = [0; MAGLEV_CHUNK as usize];
            backend_ids[..part.len()].copy_from_slice(part);
            Arc::new(MaglevChunk { backend_ids })
        };
        Self {
            chunks: entries.chunks(MAGLEV_CHUNK as usize).map(chunk).collect(),
        }
    }

    /// A table found in the maps; `None` if it has not `size` entries that all satisfy `known`.
    pub(crate) fn restore(
        size: u32,
        chunks: Vec<Arc<MaglevChunk>>,
        known: impl Fn(u32) -> bool,
    ) -> Option<Self> {
        let whole = chunks.len() == chunks_of(size) as usize;
        let ids = chunks.iter().flat_map(|chunk| chunk.backend_ids);
        let sound = (0..)
            .zip(ids)
            .all(|(entry, id)| if entry < size { known(id) } else { id == 0 });
        (whole && sound && size > 0).then_some(Self { chunks })
    }

    /// Whether all that it names takes traffic.
    pub(crate) fn fits(&self, group: &Group) -> bool {
        let known: BTreeSet<u32> = group.slots.iter().map(|at| group.candidates[*at].id).collect();
        let mut named = self.chunks.iter().flat_map(|chunk| &chunk.backend_ids);
        named.all(|id| *id == 0 || known.contains(id))
    }

    pub(crate) fn chunks(&self) -> &[Arc<MaglevChunk>] {
        &self.chunks
    }

    /// The chunks that are not as in `before`.
    pub(crate) fn changed(&self, before: Option<&Self>) -> Vec<u32> {
        let old = |at: u32| before.and_then(|before| before.chunks.get(at as usize));
        (0..self.chunks.len() as u32)
            .filter(|at| old(*at) != self.chunks.get(*at as usize))
            .collect()
    }
}
