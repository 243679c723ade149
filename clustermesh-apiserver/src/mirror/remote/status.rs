//! What a remote cluster's mirror says about itself: to agents and people by its status, to Prometheus by metrics.

use std::time::Duration;

use bytes::Bytes;
use isthmus_wire::{
    Refusal,
    keys::{HEARTBEAT, REMOTE_STATUS},
    status::Phase,
};

use super::{Remote, kind_name, wanted};
use crate::{
    metrics::{MirrorMetrics, Refused, Target},
    store::Store,
};

/// Target of the log lines that say what was refused.
const AUDIT: &str = "isthmus_audit";
/// Refused keys that are remembered so that each is logged once.
const LOGGED_MAX: usize = 10_000;
/// A heartbeat that is older is late: Cilium writes it once a minute, we every ten seconds.
const HEARTBEAT_AGE_MAX_MS: u64 = 120_000;
/// What a stopped heart means. Without an age: a status that changes every second is sent every second.
const STALE: &str = "it answers, but its heartbeat has stopped for more than 2 min: its operator does not write, or its \
                     API server has lost its etcd; what is known of it stays in use";
/// Bytes are shown to the next multiple: a status that changes with every object would be sent as often.
const BYTES_STEP: u64 = 64 * 1024;
/// Longest text of another party in a status, in characters.
const TEXT_LEN_MAX: usize = 512;
/// Refusals shown in the status.
const LAST_REFUSALS_MAX: usize = 10;

impl Remote {
    pub(super) fn on_connected(&mut self, now_ms: u64) {
        self.status.connected = true;
        self.status.connected_since_ms = now_ms;
        self.status.retries = 0;
        self.status.next_retry_ms = 0;
        self.lost_ms = 0;
        if std::mem::replace(&mut self.was_connected, true) {
            self.new_reconnects += 1;
        }
        self.connection_error.clear();
    }

    pub(super) fn on_disconnected(&mut self, error: String, retry_in: Duration, now_ms: u64) {
        if std::mem::replace(&mut self.status.connected, false) {
            self.lost_ms = now_ms;
        }
        self.status.connected_since_ms = 0;
        self.status.retries += 1;
        let retry_in_ms = u64::try_from(retry_in.as_millis()).unwrap_or(u64::MAX);
        self.status.next_retry_ms = now_ms.saturating_add(retry_in_ms);
        self.on_failure(error, now_ms);
    }

    pub(super) fn on_moved(&mut self, now_ms: u64) {
        if std::mem::replace(&mut self.status.connected, false) {
            self.lost_ms = now_ms;
        }
        self.status.connected_since_ms = 0;
        self.status.next_retry_ms = 0;
        self.connection_error = "connecting".to_owned();
    }

    pub(super) fn on_failure(&mut self, error: String, now_ms: u64) {
        let error: String = error.chars().take(TEXT_LEN_MAX).collect();
        if self.connection_error != error {
            tracing::warn!(cluster = %self.cluster, error, "the remote cluster does not answer; keeping its state");
        }
        self.status.last_error.clone_from(&error);
        self.connection_error = error;
        self.status.num_failures += 1;
        self.status.last_failure_ms = now_ms;
        self.new_failures += 1;
    }

    pub(super) fn on_refusal(&mut self, key: Bytes, refusal: &Refusal) {
        let reason = refusal.reason();
        *self.status.refused.entry(reason.to_owned()).or_default() += 1;
        *self.new_refusals.entry(reason).or_default() += 1;
        let name: String = String::from_utf8_lossy(&key).chars().take(256).collect();
        if self.logged.len() < LOGGED_MAX && self.logged.insert(Bytes::copy_from_slice(&key)) {
            let refusal: &dyn std::error::Error = refusal;
            tracing::warn!(target: AUDIT, cluster = %self.cluster, key = name, reason, error = refusal, "refused an object of a remote cluster");
        }
        let last = &mut self.status.last_refusals;
        last.push(format!("{name}: {refusal}"));
        if last.len() > LAST_REFUSALS_MAX {
            last.remove(0);
        }
    }

    /// Whether the heart of a remote cluster that answers has stopped. Of one that does not answer that is known anyway.
    fn is_stale(&self, now_ms: u64) -> bool {
        let waited = self
            .heartbeat_due_ms
            .map_or(0, |since| now_ms.saturating_sub(since));
        self.live.contains(HEARTBEAT) && waited > HEARTBEAT_AGE_MAX_MS
    }

    pub(super) fn refresh(&mut self, store: &Store, now_ms: u64) {
        let stale = self.is_stale(now_ms);
        let bytes = self.bytes(store);
        let status = &mut self.status;
        status.stale = stale;
        status.objects.clear();
        status.synced.clear();
        let wanted = self.admitted.as_ref().map(wanted).unwrap_or_default();
        for kind in &wanted {
            status.synced.insert(kind_name(*kind).to_owned(), false);
        }
        for (kind, mirrored) in self.kinds.values() {
            let keys = store.status(&mirrored.sub).map_or(0, |sub| sub.keys as u64);
            status.objects.insert(kind_name(*kind).to_owned(), keys);
            status.synced.insert(kind_name(*kind).to_owned(), mirrored.synced);
        }
        status.cluster_id = self
            .admitted
            .as_ref()
            .map_or(0, |admitted| admitted.id.get().into());
        status.slices = self.admitted.as_ref().is_some_and(|admitted| admitted.slices);
        let synced = status.synced.values().all(|synced| *synced);
        let begun = status.synced.len() == self.kinds.len();
        status.ready = self.admitted.is_some() && self.problem.is_empty() && synced;
        let waiting = || {
            let missing = status
                .synced
                .iter()
                .filter(|(_, synced)| !**synced)
                .map(|(kind, _)| kind.as_str());
            let missing: Vec<&str> = missing.collect();
            if missing.is_empty() {
                String::new()
            } else {
                format!("waiting for {}", missing.join(", "))
            }
        };
        status.phase = if self.leaving {
            Phase::Draining
        } else if !self.problem.is_empty() {
            Phase::Refused
        } else if stale || (!status.connected && self.was_connected) {
            Phase::Stale
        } else if !status.connected {
            Phase::Connecting
        } else if status.ready && self.kinds.keys().all(|feed| self.live.contains(feed)) {
            Phase::Synced
        } else {
            Phase::Listing
        };
        status.stale_since_ms = match status.phase {
            Phase::Stale if stale => self.heartbeat_due_ms.unwrap_or(now_ms),
            Phase::Stale => self.lost_ms,
            _ => 0,
        };
        status.progress = self.progress.at(now_ms, self.admitted.is_some() && begun);
        status.bytes = bytes.div_ceil(BYTES_STEP) * BYTES_STEP;
        status.restricted = self.grants.fingerprint() != 0;
        let stale = if stale { STALE } else { "" };
        let texts = [
            self.connection_error.clone(),
            self.problem.clone(),
            stale.to_owned(),
            self.complaint.clone(),
            waiting(),
        ];
        status.status = texts
            .into_iter()
            .find(|text| !text.is_empty())
            .unwrap_or_default();
    }

    pub(super) fn write_status(&mut self, store: &mut Store) {
        if self.written.as_ref() == Some(&self.status) {
            return;
        }
        self.written = Some(self.status.clone());
        let key = format!("{REMOTE_STATUS}{}", self.cluster);
        store.put_local(key.into(), self.status.encode().into());
    }

    /// Brings the metrics up to date.
    pub fn export(&mut self, metrics: &MirrorMetrics, now_ms: u64) {
        let target = Target {
            target_cluster: self.cluster.to_string(),
        };
        let status = &self.status;
        let age_s = |since_ms: u64| signed(now_ms.saturating_sub(since_ms) / 1000);
        let known_age_s = |since_ms: u64, unknown| if since_ms == 0 { unknown } else { age_s(since_ms) };
        let progress = &status.progress;
        let ready = status.connected && status.ready && !status.stale;
        let gauges = [
            (&metrics.readiness, i64::from(ready)),
            (&metrics.connected, i64::from(status.connected)),
            (&metrics.staleness, known_age_s(status.stale_since_ms, 0)),
            (&metrics.heartbeat_age, known_age_s(status.heartbeat_seen_ms, -1)),
            (&metrics.list_received, signed(progress.received)),
            (&metrics.list_expected, signed(progress.expected)),
            (
                &metrics.list_left,
                progress.left_ms.map_or(-1, |left| signed(left.div_ceil(1000))),
            ),
            (&metrics.remote_keys, signed(status.objects.values().sum())),
            (&metrics.remote_bytes, signed(status.bytes)),
            (&metrics.last_failure, signed(status.last_failure_ms / 1000)),
        ];
        for (family, value) in gauges {
            family.get_or_create(&target).set(value);
        }
        let failures = metrics.failures.get_or_create(&target);
        failures.inc_by(std::mem::take(&mut self.new_failures));
        drop(failures);
        let reconnects = metrics.reconnects.get_or_create(&target);
        reconnects.inc_by(std::mem::take(&mut self.new_reconnects));
        drop(reconnects);
        for (reason, count) in std::mem::take(&mut self.new_refusals) {
            let refused = Refused {
                target_cluster: self.cluster.to_string(),
                reason,
            };
            metrics.refused.get_or_create(&refused).inc_by(count);
        }
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
