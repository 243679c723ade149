//! Health of a daemon's parts: each part reports its own state under a name; readiness is all of them.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

/// State of one part.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum State {
    /// Not ready yet: blocks readiness.
    Starting(String),
    /// Works.
    Ok(String),
    /// Works on what is known; something is stale or being retried. Does not block readiness.
    Degraded(String),
    /// Does not work: blocks readiness.
    Failed(String),
}

/// Shared register of states. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<RwLock<BTreeMap<&'static str, State>>>);

impl Health {
    /// Sets the state of `part`.
    pub fn set(&self, part: &'static str, state: State) {
        // A poisoned lock means that a writer panicked between two inserts; the map itself is whole.
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(part, state);
    }

    /// All states, by name.
    pub fn snapshot(&self) -> BTreeMap<&'static str, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether at least one part reported and none is starting or failed.
    pub fn is_ready(&self) -> bool {
        let states = self.snapshot();
        !states.is_empty()
            && states
                .values()
                .all(|state| matches!(state, State::Ok(_) | State::Degraded(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn degraded_is_ready_and_starting_is_not() {
        let health = Health::default();
        assert!(!health.is_ready());
        health.set("a", State::Degraded("stale".into()));
        assert!(health.is_ready());
        health.set("b", State::Starting("listing".into()));
        assert!(!health.is_ready());
        health.set("b", State::Ok(String::new()));
        assert!(health.is_ready());
    }
}
