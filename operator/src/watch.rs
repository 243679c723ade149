//! Watches of the Kubernetes API: one list-and-watch per kind, resumed with backoff and jitter, into one bounded queue.

use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use isthmus_runtime::{Backoff, CancellationToken, backoff};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource,
    runtime::{
        WatchStreamExt as _,
        utils::Backoff as Pace,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::{
    config::chain,
    state::{Input, Kind},
};

/// Events that wait for the state; then reading from the API stops.
const QUEUE_LEN_MAX: usize = 1024;
/// The API closes a watch after so many seconds, and it is opened again: bounds how long a dead connection goes unnoticed.
const WATCH_SECONDS: u32 = 60;
/// Objects in one page of a list.
const PAGE_LEN: u32 = 500;

/// What a watch tells.
#[derive(Debug)]
pub enum Told {
    /// An event.
    Event(Box<Input>),
    /// The API does not answer as it should; what is known stays.
    Failed {
        /// Which kind's watch.
        kind: Kind,
        /// Why, for people.
        error: String,
    },
}

/// Starts all watches. They end when the receiver is dropped or the token is cancelled.
pub fn start(client: &Client, shutdown: &CancellationToken) -> mpsc::Receiver<Told> {
    let (told, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    let watch = Watch { told, shutdown };
    watch.start::<Service>(Kind::Services, Api::all(client.clone()), Input::Service);
    watch.start::<EndpointSlice>(Kind::EndpointSlices, Api::all(client.clone()), Input::Slice);
    watch.start::<Pod>(Kind::Pods, Api::all(client.clone()), Input::Pod);
    watch.start::<Node>(Kind::Nodes, Api::all(client.clone()), Input::Node);
    watch.start::<Namespace>(Kind::Namespaces, Api::all(client.clone()), Input::Namespace);
    receiver
}

struct Watch<'s> {
    told: mpsc::Sender<Told>,
    shutdown: &'s CancellationToken,
}

impl Watch<'_> {
    fn start<K>(&self, kind: Kind, api: Api<K>, wrap: fn(Event<K>) -> Input)
    where
        K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let (told, shutdown) = (self.told.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            let config = watcher::Config::default()
                .timeout(WATCH_SECONDS)
                .page_size(PAGE_LEN);
            let events = watcher(api, config).backoff(Jittered::default());
            pin_mut!(events);
            loop {
                let event = tokio::select! {
                    () = shutdown.cancelled() => return,
                    event = events.next() => event,
                };
                let message = match event {
                    Some(Ok(event)) => Told::Event(Box::new(wrap(event))),
                    Some(Err(error)) => Told::Failed {
                        kind,
                        error: chain(&error),
                    },
                    None => return,
                };
                if told.send(message).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Delays of retries, from 0.1 to 15 s.
#[derive(Debug)]
struct Jittered(Backoff);

impl Default for Jittered {
    fn default() -> Self {
        Self(Backoff::new(Duration::from_millis(200), Duration::from_secs(15)))
    }
}

impl Iterator for Jittered {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.0.next(backoff::random()))
    }
}

impl Pace for Jittered {
    fn reset(&mut self) {
        self.0.reset();
    }
}
