//! Keeps a `coordination.k8s.io` Lease for [`Election`], and tells the rest of the process its role.

use std::{sync::Arc, time::Duration};

use isthmus_runtime::{CancellationToken, backoff};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

use super::{Election, Record, Role, Timing};

/// Longest wait for one answer of the Kubernetes API.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the release at the end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

/// Which Lease, and who we are.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Name of this process, unique among all candidates.
    pub identity: String,
    /// How fast.
    pub timing: Timing,
}

/// The role, and for a leader the token that ends with it.
#[derive(Clone, Debug)]
pub struct Leadership {
    /// What this process is.
    pub role: Role,
    /// Cancelled at the moment when leadership ends, whatever else is going on. Already cancelled unless leading.
    pub term: CancellationToken,
}

impl Leadership {
    /// Not leading.
    pub fn none(role: Role) -> Self {
        let term = CancellationToken::new();
        term.cancel();
        Self { role, term }
    }

    /// Leading from now on.
    pub fn leading() -> Self {
        Self {
            role: Role::Leading,
            term: CancellationToken::new(),
        }
    }
}

/// Takes part in the election until `stop`, then releases the Lease. Cancel `stop` after the last write of the term was made.
pub async fn run(
    client: Client,
    config: LeaseConfig,
    leadership: Arc<watch::Sender<Leadership>>,
    stop: CancellationToken,
) {
    let mut candidate = Candidate {
        api: Api::namespaced(client, &config.namespace),
        election: Election::new(config.identity.clone(), config.timing),
        origin: Instant::now(),
        version: None,
        config,
        leadership,
        failing: false,
    };
    while !stop.is_cancelled() {
        let next = Instant::now()
            + candidate
                .config
                .timing
                .retry_period
                .mul_f64(1.0 + backoff::random() / 5.0);
        tokio::select! {
            () = stop.cancelled() => break,
            () = candidate.attempt() => {}
        }
        candidate.announce();
        // Wake earlier if leadership ends before: it ends at that moment and not at the next look.
        while Instant::now() < next && !stop.is_cancelled() {
            let wake = candidate.lead_until().map_or(next, |until| until.min(next));
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep_until(wake) => {}
            }
            candidate.announce();
        }
    }
    candidate.release().await;
}

struct Candidate {
    api: Api<Lease>,
    election: Election,
    origin: Instant,
    /// Version of the Lease as last read or written.
    version: Option<String>,
    config: LeaseConfig,
    leadership: Arc<watch::Sender<Leadership>>,
    failing: bool,
}

impl Candidate {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn lead_until(&self) -> Option<Instant> {
        self.election
            .lead_until(self.now())
            .map(|until| self.origin + until)
    }

    /// One look at the Lease and perhaps one write, given up when leadership ends meanwhile.
    async fn attempt(&mut self) {
        let limit = Instant::now() + CALL_TIMEOUT;
        let deadline = self.lead_until().map_or(limit, |until| until.min(limit));
        let result = timeout_at(deadline, self.read_and_write()).await;
        let error = match result {
            Ok(Ok(())) => None,
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => None,
            Ok(Err(error)) => Some(format!("{error}")),
            Err(_) => Some("no answer".to_owned()),
        };
        if let Some(error) = &error
            && !self.failing
        {
            tracing::warn!(lease = %self.config.name, error, "cannot reach the Lease; trying again");
        }
        self.failing = error.is_some();
    }

    async fn read_and_write(&mut self) -> Result<(), kube::Error> {
        let lease = self.api.get_opt(&self.config.name).await?;
        self.version = lease
            .as_ref()
            .and_then(|lease| lease.metadata.resource_version.clone());
        let seen = lease.map(|lease| {
            let record = record_of(&lease.spec.unwrap_or_default());
            (record, lease.metadata.resource_version.unwrap_or_default())
        });
        let now = self.now();
        if let Some(record) = self.election.on_read(now, Timestamp::now(), seen) {
            let started = self.now();
            self.write(&record).await?;
            let version = self.version.clone().unwrap_or_default();
            self.election.on_written(started, record, version);
        }
        Ok(())
    }

    async fn write(&mut self, record: &Record) -> Result<(), kube::Error> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.config.name.clone()),
                namespace: Some(self.config.namespace.clone()),
                resource_version: self.version.clone(),
                ..Default::default()
            },
            spec: Some(spec_of(record)),
        };
        let params = PostParams::default();
        // The version makes this fail if anybody wrote in between.
        let written = match self.version {
            Some(_) => self.api.replace(&self.config.name, &params, &lease).await?,
            None => self.api.create(&params, &lease).await?,
        };
        self.version = written.metadata.resource_version;
        Ok(())
    }

    /// Tells the role if it changed. A term's token is cancelled first.
    fn announce(&self) {
        let role = self.election.role(self.now());
        self.leadership.send_if_modified(|current| {
            if current.role == role {
                return false;
            }
            current.term.cancel();
            match &role {
                Role::Leading => tracing::info!(identity = %self.config.identity, "leading"),
                Role::Following { holder } => tracing::info!(holder, "following"),
                Role::Unknown => tracing::warn!("nobody is known to lead"),
            }
            *current = match role {
                Role::Leading => Leadership::leading(),
                other => Leadership::none(other),
            };
            true
        });
    }

    async fn release(mut self) {
        let now = self.now();
        let record = self.election.release(now, Timestamp::now());
        self.announce();
        let Some(record) = record else { return };
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        match timeout_at(deadline, self.write(&record)).await {
            Ok(Ok(())) => tracing::info!("released the Lease"),
            // It expires by itself.
            Ok(Err(error)) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "could not release the Lease"
            ),
            Err(_) => tracing::warn!("could not release the Lease: no answer"),
        }
    }
}

fn record_of(spec: &LeaseSpec) -> Record {
    let seconds = spec
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok());
    Record {
        holder: spec.holder_identity.clone().unwrap_or_default(),
        duration: Duration::from_secs(seconds.unwrap_or(0)),
        acquired: spec.acquire_time.as_ref().map(|time| time.0),
        renewed: spec.renew_time.as_ref().map(|time| time.0),
        transitions: spec.lease_transitions.unwrap_or(0),
    }
}

fn spec_of(record: &Record) -> LeaseSpec {
    // Rounded up, so that a fraction never lets others take over early; a lease is seconds long.
    let seconds = record
        .duration
        .as_millis()
        .div_ceil(1000)
        .try_into()
        .unwrap_or(i32::MAX);
    LeaseSpec {
        holder_identity: Some(record.holder.clone()),
        lease_duration_seconds: Some(seconds),
        acquire_time: record.acquired.map(MicroTime),
        renew_time: record.renewed.map(MicroTime),
        lease_transitions: Some(record.transitions),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_round_trip() {
        let record = Record {
            holder: "a".into(),
            duration: Duration::from_secs(15),
            acquired: Some(Timestamp::from_second(1).unwrap()),
            renewed: Some(Timestamp::from_second(2).unwrap()),
            transitions: 3,
        };
        assert_eq!(record_of(&spec_of(&record)), record);
        let released = spec_of(&Record {
            duration: Duration::from_millis(1500),
            ..record
        });
        assert_eq!(released.lease_duration_seconds, Some(2));
        assert_eq!(record_of(&LeaseSpec::default()).duration, Duration::ZERO);
    }
}
