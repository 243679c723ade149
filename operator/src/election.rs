//! Which of several operators writes: decisions over a Kubernetes Lease. Pure; [`lease`] is the shell around it.
//!
//! In: the Lease as it was read, results of writes, the time. Out: what to write, and whether this process leads.
//!
//! As in Kubernetes' own election, another holder's clock is never trusted: its lease has expired when *we* have seen it unchanged
//! for its whole duration. Unchanged means the same version of the object: a holder whose clock jumps back can write the same content
//! twice. The holder gives up earlier ([`Timing::renew_deadline`] after the start of its last successful write) than
//! anybody may take over ([`Timing::lease_duration`]), so two never lead at once.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

pub mod lease;

/// Kubernetes' defaults. `retry_period` < `renew_deadline` < `lease_duration`.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Others wait so long before they take over.
    pub lease_duration: Duration,
    /// The holder stops if it could not renew for so long.
    pub renew_deadline: Duration,
    /// Time between two looks at the Lease.
    pub retry_period: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// A Lease's content.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// Who holds it; empty if nobody.
    pub holder: String,
    /// How long it is valid without renewal.
    pub duration: Duration,
    /// When the holder took it, by the holder's clock.
    pub acquired: Option<Timestamp>,
    /// When it was last renewed, by the holder's clock.
    pub renewed: Option<Timestamp>,
    /// How often it changed hands.
    pub transitions: i32,
}

/// What this process is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// The only one that writes.
    Leading,
    /// Another one leads.
    Following {
        /// Which one.
        holder: String,
    },
    /// Nobody is known to lead: the Kubernetes API does not answer, or the Lease is about to be taken.
    Unknown,
}

/// State of one candidate. Times are durations since any fixed moment, the same in all calls.
#[derive(Debug)]
pub struct Election {
    me: String,
    timing: Timing,
    /// The Lease as last seen, its version, and since when it is so.
    seen: Option<(Record, String, Duration)>,
    lead_until: Option<Duration>,
}

impl Election {
    /// A candidate named `me`, which must be unique among all candidates.
    pub fn new(me: String, timing: Timing) -> Self {
        Self {
            me,
            timing,
            seen: None,
            lead_until: None,
        }
    }

    /// The Lease was read: its content and version. Returns what to write, if it is ours to write.
    pub fn on_read(
        &mut self,
        now: Duration,
        wall: Timestamp,
        lease: Option<(Record, String)>,
    ) -> Option<Record> {
        let Some((record, version)) = lease else {
            self.seen = None;
            return Some(self.mine(wall, None));
        };
        if self.seen.as_ref().is_none_or(|(_, seen, _)| *seen != version) {
            self.seen = Some((record.clone(), version, now));
        }
        if record.holder == self.me {
            return Some(self.mine(wall, Some(&record)));
        }
        // Somebody else has it, whatever we thought.
        self.lead_until = None;
        (record.holder.is_empty() || self.has_expired(now)).then(|| self.mine(wall, Some(&record)))
    }

    /// `record` was written by a request that began at `started`, and has this version now.
    pub fn on_written(&mut self, started: Duration, record: Record, version: String) {
        self.lead_until = Some(started + self.timing.renew_deadline);
        self.seen = Some((record, version, started));
    }

    /// What this process is now.
    pub fn role(&self, now: Duration) -> Role {
        if self.lead_until.is_some_and(|until| now < until) {
            return Role::Leading;
        }
        match &self.seen {
            Some((record, _, _))
                if !record.holder.is_empty() && record.holder != self.me && !self.has_expired(now) =>
            {
                Role::Following {
                    holder: record.holder.clone(),
                }
            }
            _ => Role::Unknown,
        }
    }

    /// When leadership ends unless it is renewed. `None` if this process does not lead.
    pub fn lead_until(&self, now: Duration) -> Option<Duration> {
        self.lead_until.filter(|until| now < *until)
    }

    /// Gives leadership up. Returns what to write, so that another one need not wait.
    pub fn release(&mut self, now: Duration, wall: Timestamp) -> Option<Record> {
        self.lead_until(now)?;
        self.lead_until = None;
        let (record, _, _) = self.seen.as_ref()?;
        Some(Record {
            holder: String::new(),
            duration: Duration::from_secs(1),
            acquired: record.acquired,
            renewed: Some(wall),
            transitions: record.transitions,
        })
    }

    fn has_expired(&self, now: Duration) -> bool {
        self.seen
            .as_ref()
            .is_some_and(|(record, _, since)| now >= *since + record.duration)
    }

    fn mine(&self, wall: Timestamp, old: Option<&Record>) -> Record {
        let renewal = old.filter(|old| old.holder == self.me);
        Record {
            holder: self.me.clone(),
            duration: self.timing.lease_duration,
            acquired: renewal.map_or(Some(wall), |old| old.acquired),
            renewed: Some(wall),
            transitions: match (old, renewal) {
                (Some(old), None) => old.transitions.saturating_add(1),
                (Some(old), Some(_)) => old.transitions,
                (None, _) => 0,
            },
        }
    }
}

#[cfg(test)]
mod tests;
