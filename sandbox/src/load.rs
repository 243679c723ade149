//! Requests from inside a pod, and what became of each: the measuring side of the demo and the end-to-end tests.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Child,
    task::JoinHandle,
    time::Instant,
};

use crate::{SandboxClient, workload::Answer};

/// Which pod asks.
#[derive(Clone, Debug)]
pub struct Asker {
    /// Its cluster.
    pub cluster: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
}

/// How it asks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Style {
    /// A new TCP connection each time.
    #[default]
    Connections,
    /// One TCP connection that stays open.
    Kept,
    /// A datagram from a new socket each time.
    Datagrams,
}

/// A load generator that runs in a pod.
#[derive(Debug)]
pub struct Load {
    child: Child,
    reader: JoinHandle<()>,
    answers: Arc<Mutex<Vec<Answer>>>,
}

/// Sums over a span of requests.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Requests.
    pub requests: u64,
    /// Those that failed.
    pub failed: u64,
    /// Answers by cluster.
    pub by_cluster: BTreeMap<String, u64>,
    /// The first few different errors.
    pub errors: Vec<String>,
    /// Unix microseconds at which the last failed request began.
    pub last_failure_us: Option<u64>,
}

impl Tally {
    /// Counts `answers`.
    pub fn of<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Self {
        let mut tally = Self::default();
        for answer in answers {
            tally.requests += 1;
            if answer.error.is_empty() {
                let cluster = answer.from.split('/').next().unwrap_or_default();
                *tally.by_cluster.entry(cluster.to_owned()).or_default() += 1;
            } else {
                tally.failed += 1;
                tally.last_failure_us = tally.last_failure_us.max(Some(answer.at_us));
                if tally.errors.len() < 5 && !tally.errors.contains(&answer.error) {
                    tally.errors.push(answer.error.clone());
                }
            }
        }
        tally
    }

    /// The clusters that answered.
    pub fn clusters(&self) -> Vec<&str> {
        self.by_cluster.keys().map(String::as_str).collect()
    }
}

impl Load {
    /// Starts asking `target` from a pod. `program` is the `isthmus` binary, which carries the load generator.
    pub async fn start(
        sandbox: &SandboxClient,
        program: &Path,
        asker: &Asker,
        target: SocketAddr,
        style: Style,
        rate: u32,
    ) -> anyhow::Result<Self> {
        let mut command = sandbox.exec(&asker.cluster, &asker.namespace, &asker.pod).await?;
        command.arg(program).args(["sandbox", "workload", "load"]);
        command.args(["--target", &target.to_string(), "--rate", &rate.to_string()]);
        match style {
            Style::Connections => {}
            Style::Kept => drop(command.arg("--keep")),
            Style::Datagrams => drop(command.arg("--udp")),
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start the load generator in pod {}", asker.pod))?;
        let stdout = child.stdout.take().context("the load generator has no output")?;
        let answers = Arc::new(Mutex::new(vec![]));
        let sink = answers.clone();
        let reader = tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(answer) = serde_json::from_str(&line) {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
                }
            }
        });
        Ok(Self {
            child,
            reader,
            answers,
        })
    }

    /// How many answers there are; a mark for [`Self::since`].
    pub fn mark(&self) -> usize {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The answers from number `mark` on.
    pub fn since(&self, mark: usize) -> Vec<Answer> {
        self.answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .skip(mark)
            .cloned()
            .collect()
    }

    /// Waits until `count` further requests were answered and returns them.
    pub async fn next(&self, count: usize, limit: Duration) -> anyhow::Result<Vec<Answer>> {
        let mark = self.mark();
        let deadline = Instant::now() + limit;
        loop {
            let answers = self.since(mark);
            if answers.len() >= count {
                return Ok(answers);
            }
            if Instant::now() >= deadline || self.reader.is_finished() {
                bail!(
                    "the load generator gave {} answers of {count} within {limit:?}",
                    answers.len()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a stretch of `stretch` requests in a row satisfies `holds`; returns the tally of that stretch.
    pub async fn until(
        &self,
        stretch: usize,
        limit: Duration,
        what: &str,
        holds: impl Fn(&Tally) -> bool,
    ) -> anyhow::Result<Tally> {
        let deadline = Instant::now() + limit;
        let begun = self.mark();
        loop {
            let answers = self.since(begun);
            let recent = Tally::of(&answers[answers.len().saturating_sub(stretch)..]);
            if recent.requests as usize == stretch && holds(&recent) {
                return Ok(recent);
            }
            if Instant::now() >= deadline || self.reader.is_finished() {
                bail!(
                    "{what} did not come true within {limit:?}; the last {} requests: {recent:?}",
                    recent.requests
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops asking and returns everything.
    pub async fn stop(mut self) -> anyhow::Result<Vec<Answer>> {
        self.child
            .start_kill()
            .context("cannot stop the load generator")?;
        self.child
            .wait()
            .await
            .context("cannot wait for the load generator")?;
        self.reader
            .await
            .context("the reader of the load generator panicked")?;
        Ok(std::mem::take(
            &mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_count_by_cluster_and_remember_the_last_failure() {
        let answer = |at_us, from: &str, error: &str| Answer {
            at_us,
            took_us: 1,
            from: from.into(),
            error: error.into(),
        };
        let answers = [
            answer(1, "east/a", ""),
            answer(2, "", "refused"),
            answer(3, "west/b", ""),
            answer(4, "west/c", ""),
        ];
        let tally = Tally::of(&answers);
        assert_eq!(
            (tally.requests, tally.failed, tally.last_failure_us),
            (4, 1, Some(2))
        );
        assert_eq!(tally.clusters(), ["east", "west"]);
        assert_eq!(tally.by_cluster["west"], 2);
    }
}
