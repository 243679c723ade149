//! How much a reader may look at, and how much it has looked at. Pure.

use super::RangeError;

/// Changes of history, of which no more than a key is compared, that cost what a key costs which is answered.
const CHANGES_OF_A_KEY: u64 = 4;

/// What may be looked at and answered for one request. The store cannot change meanwhile, and what was looked at is what it
/// has cost, however little is answered.
#[derive(Clone, Debug)]
pub struct Budget {
    /// In changes.
    left: u64,
    /// In changes.
    looked: u64,
    bytes: usize,
}

impl Budget {
    /// So many keys, and so many bytes of the answer.
    pub fn new(keys: usize, bytes: usize) -> Self {
        Self {
            left: (keys as u64).saturating_mul(CHANGES_OF_A_KEY),
            looked: 0,
            bytes,
        }
    }

    /// No bounds but those of the store. It is counted nevertheless.
    pub fn unlimited() -> Self {
        Self {
            left: u64::MAX,
            looked: 0,
            bytes: usize::MAX,
        }
    }

    /// Keys that were looked at, with history at its price.
    pub fn looked(&self) -> usize {
        usize::try_from(self.looked.div_ceil(CHANGES_OF_A_KEY)).unwrap_or(usize::MAX)
    }

    fn take(&mut self, changes: u64) -> Result<(), RangeError> {
        self.left = self.left.checked_sub(changes).ok_or(RangeError::TooLarge)?;
        self.looked += changes;
        Ok(())
    }

    /// Looks at so many keys; to be called before that is done.
    pub fn look(&mut self, keys: usize) -> Result<(), RangeError> {
        self.take((keys as u64).saturating_mul(CHANGES_OF_A_KEY))
    }

    /// Looks at a change of history.
    pub(super) fn look_at_change(&mut self) -> Result<(), RangeError> {
        self.take(1)
    }

    /// Answers so many bytes.
    pub fn answer(&mut self, bytes: usize) -> Result<(), RangeError> {
        self.bytes = self.bytes.checked_sub(bytes).ok_or(RangeError::TooLarge)?;
        Ok(())
    }
}
