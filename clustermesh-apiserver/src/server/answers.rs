//! Answers to those who read: each client's turn, what it pays for that, and how much of large ones is on its way over all
//! clients. What was looked at is paid for, also where the answer is short or a refusal.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Response, Status};

use super::{Context, Peer, border::Reason, errors};

/// Answers below this are not counted: they are copied and gone in a moment.
const LARGE_LEN: usize = 1024 * 1024;
/// Bytes of a permit.
const UNIT: usize = 1024;

/// The place of a large answer, until it was sent. It goes with the response, as an extension.
#[derive(Clone, Debug)]
pub(crate) struct Large(#[expect(dead_code, reason = "held, not looked at")] Arc<OwnedSemaphorePermit>);

/// Places for large answers.
#[derive(Debug)]
pub(crate) struct Answers {
    places: Arc<Semaphore>,
    all: u32,
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl Answers {
    /// For so many bytes at once.
    pub(crate) fn new(bytes: usize) -> Self {
        let all = units(bytes).max(1);
        Self {
            places: Arc::new(Semaphore::new(all as usize)),
            all,
        }
    }

    /// Waits for a place for an answer of so many bytes, first come, first served. One that is larger than all places together
    /// goes alone. `None` if it takes longer than `patience`.
    async fn place(&self, bytes: usize, patience: Duration) -> Option<Large> {
        let needed = units(bytes).min(self.all);
        let place = self.places.clone().acquire_many_owned(needed);
        // The semaphore is never closed.
        let place = tokio::time::timeout(patience, place).await.ok()?.ok()?;
        Some(Large(Arc::new(place)))
    }
}

impl Context {
    /// Waits until it is the turn of another Range of `peer`, or refuses it if that takes too long.
    pub(crate) async fn list_turn(&self, peer: &Peer) -> Result<(), Status> {
        let now = self.now();
        let own = peer.lists().wait(&self.limits, now);
        let client = self.border().list_wait(&peer.name, &self.limits, now);
        match own.max(client) {
            Duration::ZERO => Ok(()),
            wait if wait <= self.limits.patience => {
                tokio::time::sleep(wait).await;
                Ok(())
            }
            wait => {
                self.throttled(
                    peer,
                    Reason::ListRate.as_str(),
                    &format!("its turn is in {wait:?}"),
                );
                Err(errors::too_many_requests())
            }
        }
    }

    /// Charges to `peer` that so many keys were looked at and so many bytes are answered.
    pub(crate) fn listed(&self, peer: &Peer, keys: usize, bytes: usize) {
        let now = self.now();
        // A call that finds nothing is not for nothing.
        let keys = keys as u64 + 1;
        peer.lists().listed(keys, bytes as u64, &self.limits, now);
        self.border().listed(&peer.name, keys, &self.limits, now);
    }

    /// Charges `answer`, of so many bytes, for which so many keys were looked at; if it is large, waits for its place, or
    /// refuses it if that takes too long.
    pub(crate) async fn deliver<T>(
        &self,
        peer: &Peer,
        looked: usize,
        answer: T,
        bytes: usize,
    ) -> Result<Response<T>, Status> {
        self.listed(peer, looked, bytes);
        let mut response = Response::new(answer);
        if bytes >= LARGE_LEN {
            let Some(large) = self.answers.place(bytes, self.limits.patience).await else {
                let what = format!("an answer of {bytes} bytes");
                self.throttled(peer, Reason::AnswersInFlight.as_str(), &what);
                return Err(errors::too_many_requests());
            };
            response.extensions_mut().insert(large);
        }
        Ok(response)
    }
}

impl Peer {
    fn lists(&self) -> std::sync::MutexGuard<'_, super::border::Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_answers_wait_for_each_other_and_one_that_is_too_large_goes_alone() {
        let (answers, moment) = (Answers::new(10 * UNIT), Duration::from_millis(1));
        let first = answers.place(6 * UNIT, moment).await.unwrap();
        assert!(answers.place(5 * UNIT, moment).await.is_none());
        let second = answers.place(4 * UNIT, moment).await.unwrap();
        assert!(answers.place(1, moment).await.is_none());
        // Also a copy holds the place.
        let copy = first.clone();
        drop(first);
        assert!(answers.place(6 * UNIT, moment).await.is_none());
        drop((copy, second));
        let all = answers.place(1000 * UNIT, moment).await.unwrap();
        assert!(answers.place(1, moment).await.is_none());
        drop(all);
        assert!(answers.place(1, moment).await.is_some());
    }
}
