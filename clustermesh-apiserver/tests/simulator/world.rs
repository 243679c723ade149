//! The world: who is there, what may happen next, and what happens.

use std::time::Duration;

use isthmus_clustermesh_apiserver::{ingest::HOLD_MS, store::HistoryLimits};
use isthmus_kvstore::follower::Input;
use isthmus_proto::mvccpb::KeyValue;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{
    cilium::Cilium,
    engine::{Reader, Received, View},
    etcd::{CACHE, Etcd, LASTING, NAMES, STATE, Said},
    link::{Answer, Ask, Call, Link, Say, Watching},
    mood::{Fault, Figures, Mood},
    replica::{Replica, Setup},
};

enum Who {
    Replica(Box<Replica>),
    Reader(Box<Reader>),
    Cilium(Box<Cilium>),
}

/// Who asks somebody.
struct Client {
    who: Who,
    link: Option<(Link, Upstream)>,
    /// The servers that it may ask.
    upstreams: Vec<Upstream>,
}

/// Who is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Upstream {
    Etcd,
    Replica(usize),
}

pub struct World {
    random: StdRng,
    mood: Mood,
    fault: Fault,
    etcd: Etcd,
    clients: Vec<Client>,
    history: i64,
    limits: HistoryLimits,
    /// How often the etcd is compacted.
    compacts: f64,
    now_ms: u64,
    ids: u64,
    pub trace: bool,
    pub figures: Figures,
}

impl World {
    pub fn new(seed: u64, mood: Mood, fault: Fault) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let (history, len, age_ms) = match mood {
            Mood::Wild => (
                random.random_range(0..60),
                random.random_range(2..60),
                random.random_range(1..60_000),
            ),
            Mood::Calm | Mood::Long => (1_000_000, 1_000_000, u64::MAX),
        };
        let limits = HistoryLimits {
            len,
            bytes: usize::MAX,
            age: Duration::from_millis(age_ms),
        };
        let mut world = Self {
            mood,
            fault,
            etcd: Etcd::new(),
            clients: Vec::new(),
            history,
            limits,
            compacts: [0.0, 0.1, 1.0][random.random_range(0..3)],
            random,
            now_ms: 0,
            ids: 1,
            trace: false,
            figures: Figures::default(),
        };
        let (first, second) = (
            [Upstream::Replica(0), Upstream::Replica(1)],
            [Upstream::Replica(2), Upstream::Replica(3)],
        );
        for mirror in [false, false, true, true] {
            let who = Who::Replica(Box::new(world.replica(mirror)));
            let upstreams = if mirror {
                first.to_vec()
            } else {
                vec![Upstream::Etcd]
            };
            world.add(who, upstreams);
        }
        for (prefix, upstreams) in [(STATE, first), (CACHE, second)] {
            world.add(
                Who::Reader(Box::new(Reader::new(prefix, fault))),
                upstreams.to_vec(),
            );
            world.add(
                Who::Cilium(Box::new(Cilium::new(prefix, fault))),
                upstreams.to_vec(),
            );
        }
        world
    }

    fn add(&mut self, who: Who, upstreams: Vec<Upstream>) {
        let link = None;
        self.clients.push(Client { who, link, upstreams });
    }

    fn replica(&mut self, mirror: bool) -> Replica {
        self.ids += 1;
        let setup = Setup {
            mirror,
            history: self.history,
            limits: self.limits,
            id: self.ids,
        };
        Replica::new(setup, self.fault)
    }

    pub fn run(&mut self) {
        let steps = self.random.random_range(200..1200);
        for _ in 0..steps {
            self.figures.steps += 1;
            self.step();
        }
        self.calm_down();
    }

    /// Lets everything come to rest, and compares.
    fn calm_down(&mut self) {
        for round in 0.. {
            assert!(round < 2000, "it does not come to rest");
            let mut busy = false;
            for index in 0..self.clients.len() {
                self.connect(index);
                while self.call(index, true)
                    || self.answer(index)
                    || self.ask(index)
                    || self.serve(index, false)
                    || self.say(index)
                {
                    self.figures.steps += 1;
                    busy = true;
                }
                // Servers say now and then how far a watch is.
                busy |= self.serve(index, true);
                busy |= self.clients[index].link.is_none();
                busy |= self.waits(index);
            }
            self.tick(HOLD_MS / 4);
            if !busy && round > 8 {
                break;
            }
        }
        let want = self.etcd.truth[&self.etcd.cluster_id].at(i64::MAX);
        for (index, client) in self.clients.iter().enumerate() {
            if let Some(view) = client.view() {
                assert_eq!(view.content, want, "reader {index} in the end");
                self.figures.lists += view.lists as usize;
                if self.mood != Mood::Wild {
                    assert_eq!(view.lists, 1, "reader {index} listed again");
                }
            }
        }
    }

    /// Whether it is not where it should come to.
    fn waits(&self, index: usize) -> bool {
        match &self.clients[index].who {
            Who::Replica(replica) => {
                !replica.driver.follower.is_live() || replica.driver.follower.awaits_history()
            }
            Who::Reader(reader) => !reader.driver.follower.is_live(),
            Who::Cilium(cilium) => !cilium.is_watching(),
        }
    }

    fn step(&mut self) {
        let index = self.random.random_range(0..self.clients.len());
        let wild = self.mood == Mood::Wild;
        match self.random.random_range(0..100) {
            0..10 => self.write(),
            10 if wild && self.random.random_bool(self.compacts) => {
                let at = self.etcd.revision - self.random.random_range(0..20);
                let deletions_too = self.random.random() && self.no_watch_needs(at);
                self.etcd.compact(at, deletions_too);
                if self.trace {
                    println!("compacted at {at}");
                }
            }
            11 if wild && self.random.random_bool(0.2) => self.etcd_replaced(),
            12..14 => self.disconnect(index),
            14 if self.random.random_bool(0.5) => self.restart(),
            15 if wild => {
                let ms = self.random.random_range(0..HOLD_MS);
                self.tick(ms);
            }
            16..28 => self.connect(index),
            28..42 => {
                let impatient = wild && self.random.random_bool(0.2);
                self.call(index, impatient);
            }
            42..56 => {
                self.answer(index);
            }
            56..68 => {
                self.ask(index);
            }
            68..84 => {
                let progress = self.random.random_bool(0.1);
                self.serve(index, progress);
            }
            _ => {
                self.say(index);
            }
        };
    }

    fn write(&mut self) {
        let burst = match self.mood {
            Mood::Long if self.random.random_bool(0.03) => self.random.random_range(0..1500),
            _ => 1,
        };
        for _ in 0..burst {
            let mut ops: Vec<(&str, bool)> = Vec::new();
            for name in NAMES {
                if self.random.random_bool(0.3) {
                    ops.push((name, self.random.random_bool(0.6)));
                }
            }
            if self.random.random_bool(0.1) {
                ops.push((LASTING, true));
            }
            self.etcd.write(&ops);
            if self.trace {
                println!("{} {ops:?}", self.etcd.revision);
            }
        }
    }

    /// Whether no watch of etcd, but for one of history, has yet to be told of revision `at`, or may begin there. Nobody could
    /// help it: etcd does not say what it has lost.
    fn no_watch_needs(&self, at: i64) -> bool {
        self.clients
            .iter()
            .all(|client| match (&client.who, &client.link) {
                (Who::Replica(replica), Some((link, Upstream::Etcd))) => {
                    let told = match &link.watch {
                        Some((_, Watching::Etcd(watch))) => watch.prev_kv || watch.next > at,
                        _ => false,
                    };
                    told && replica.driver.follower.is_live() && link.asks.is_empty() && link.says.is_empty()
                }
                _ => true,
            })
    }

    fn etcd_replaced(&mut self) {
        for index in 0..self.clients.len() {
            if self.clients[index].asks(Upstream::Etcd) {
                self.disconnect(index);
            }
        }
        self.etcd.replace();
    }

    fn restart(&mut self) {
        let index = self.random.random_range(0..4);
        for client in 0..self.clients.len() {
            if client == index || self.clients[client].asks(Upstream::Replica(index)) {
                self.disconnect(client);
            }
        }
        let replica = self.replica(index >= 2);
        self.clients[index].who = Who::Replica(Box::new(replica));
        self.figures.restarts += 1;
        if self.trace {
            println!("{index} begins anew");
        }
    }

    fn tick(&mut self, ms: u64) {
        self.now_ms += ms;
        let now = self.now_ms;
        for client in &mut self.clients {
            if let Who::Replica(replica) = &mut client.who {
                replica.tick(now);
            }
        }
    }

    fn connect(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.link.is_some() {
            return;
        }
        let upstream = *client.upstreams.choose(&mut self.random).unwrap();
        if let Upstream::Replica(server) = upstream
            && !self.server(server).is_served()
        {
            return;
        }
        let mut link = Link::default();
        self.with(index, &mut link, |who, link, etcd, figures, now| match who {
            Who::Replica(replica) => replica.on(Input::Connected, link, etcd, now),
            Who::Reader(reader) => reader.on(Input::Connected, link, etcd, figures),
            Who::Cilium(cilium) => cilium.on_connected(link),
        });
        self.clients[index].link = Some((link, upstream));
    }

    fn disconnect(&mut self, index: usize) {
        if self.clients[index].link.take().is_none() {
            return;
        }
        self.with(
            index,
            &mut Link::default(),
            |who, link, etcd, figures, now| match who {
                Who::Replica(replica) => {
                    replica.driver.watch = None;
                    replica.on(Input::Disconnected, link, etcd, now);
                }
                Who::Reader(reader) => reader.on_disconnected(etcd, figures),
                Who::Cilium(cilium) => cilium.on_disconnected(),
            },
        );
    }

    fn with(
        &mut self,
        index: usize,
        link: &mut Link,
        act: impl FnOnce(&mut Who, &mut Link, &mut Etcd, &mut Figures, u64),
    ) {
        let who = &mut self.clients[index].who;
        act(who, link, &mut self.etcd, &mut self.figures, self.now_ms);
    }

    fn server(&self, index: usize) -> &Replica {
        match &self.clients[index].who {
            Who::Replica(replica) => replica,
            _ => unreachable!("readers serve nobody"),
        }
    }

    /// A server answers a call. These, and those below, return whether anything happened.
    fn call(&mut self, index: usize, impatient: bool) -> bool {
        let Some((mut link, upstream)) = self.clients[index].link.take() else {
            return false;
        };
        let mut done = false;
        if !link.calls.is_empty() {
            let at = self.random.random_range(0..link.calls.len());
            let call = link.calls[at].clone();
            let answer = match upstream {
                Upstream::Etcd => Some(self.etcd_answer(&call)),
                Upstream::Replica(server) => {
                    let mut figures = self.figures;
                    let answer = self.server(server).answer(&call, impatient, &mut figures);
                    self.figures = figures;
                    answer
                }
            };
            if let Some(answer) = answer {
                link.calls.swap_remove(at);
                link.answers.push(answer);
                done = true;
            }
        }
        self.clients[index].link = Some((link, upstream));
        done
    }

    fn etcd_answer(&self, call: &Call) -> Answer {
        let header = self.etcd.header();
        match call {
            Call::List { start, revision } => match self.etcd.range(*revision) {
                None => Answer::OutOfRange { check: false },
                Some(content) => {
                    let mut rest = content.values().filter(|kv| kv.key >= *start);
                    let kvs: Vec<KeyValue> = rest.by_ref().take(2).cloned().collect();
                    Answer::Page {
                        header,
                        kvs,
                        more: rest.next().is_some(),
                    }
                }
            },
            Call::Check { key, revision } => match self.etcd.range(*revision) {
                None => Answer::OutOfRange { check: true },
                Some(content) => Answer::Checked {
                    header,
                    mod_revision: content
                        .values()
                        .find(|kv| kv.key == *key)
                        .map(|kv| kv.mod_revision),
                    count: content.len() as i64,
                },
            },
        }
    }

    /// An answer arrives.
    fn answer(&mut self, index: usize) -> bool {
        let Some((link, _)) = &mut self.clients[index].link else {
            return false;
        };
        if link.answers.is_empty() {
            return false;
        }
        let at = self.random.random_range(0..link.answers.len());
        let answer = link.answers.swap_remove(at);
        self.receive(index, Received::Answer(answer));
        true
    }

    /// A server takes a request of the stream.
    fn ask(&mut self, index: usize) -> bool {
        let Some((mut link, upstream)) = self.clients[index].link.take() else {
            return false;
        };
        let ask = link.asks.pop_front();
        let done = ask.is_some();
        match (ask, upstream) {
            (None, _) => {}
            (
                Some(Ask::Watch {
                    number,
                    start,
                    prev_kv,
                }),
                Upstream::Etcd,
            ) => {
                let header = self.etcd.header();
                link.watch = Some((number, Watching::Etcd(self.etcd.watch(start, prev_kv))));
                link.says.push_back(Say::Created { number, header });
            }
            (
                Some(Ask::Watch {
                    number,
                    start,
                    prev_kv,
                }),
                Upstream::Replica(server),
            ) => {
                let mut figures = self.figures;
                let (cursor, header) = self.server(server).watch(start, prev_kv, &mut figures);
                self.figures = figures;
                link.watch = Some((number, Watching::Store(Box::new(cursor))));
                link.says.push_back(Say::Created { number, header });
            }
            (Some(Ask::Cancel { number }), _) => {
                link.watch.take_if(|(watched, _)| *watched == number);
            }
            // An old one: at once, whatever its watches have seen.
            (Some(Ask::Progress), Upstream::Etcd) => {
                let header = self.etcd.header();
                link.says.push_back(Say::Progress { header });
            }
            (Some(Ask::Progress), Upstream::Replica(server)) => self.progress(&mut link, server, true),
        }
        self.clients[index].link = Some((link, upstream));
        done
    }

    fn progress(&mut self, link: &mut Link, server: usize, always: bool) {
        if let Some((number, Watching::Store(cursor))) = &mut link.watch {
            let mut figures = self.figures;
            let said = self
                .server(server)
                .progress(*number, cursor, always, &mut figures);
            self.figures = figures;
            if matches!(said, Some(Say::Canceled { .. })) {
                link.watch = None;
            }
            link.says.extend(said);
        }
    }

    /// A server says what a watch has to say next.
    fn serve(&mut self, index: usize, progress: bool) -> bool {
        let Some((mut link, upstream)) = self.clients[index].link.take() else {
            return false;
        };
        let before = link.says.len();
        match (&mut link.watch, upstream) {
            (Some((number, Watching::Etcd(watch))), _) => match self.etcd.next(watch) {
                Some(Said::Events(header, events)) => link.says.push_back(Say::Events {
                    number: *number,
                    header,
                    events,
                }),
                Some(Said::Compacted(header, compacted)) => {
                    let number = *number;
                    link.watch = None;
                    link.says.push_back(Say::Canceled {
                        number,
                        header,
                        compacted,
                    });
                }
                None => {}
            },
            (Some((number, Watching::Store(cursor))), Upstream::Replica(server)) => {
                if progress {
                    self.progress(&mut link, server, false);
                } else {
                    let mut figures = self.figures;
                    let said = self.server(server).next(*number, cursor, &mut figures);
                    self.figures = figures;
                    if matches!(said, Some(Say::Canceled { .. })) {
                        link.watch = None;
                    }
                    link.says.extend(said);
                }
            }
            _ => {}
        }
        let said = link.says.len() > before;
        self.clients[index].link = Some((link, upstream));
        said
    }

    /// What a server said on the stream arrives.
    fn say(&mut self, index: usize) -> bool {
        let Some((link, _)) = &mut self.clients[index].link else {
            return false;
        };
        let Some(said) = link.says.pop_front() else {
            return false;
        };
        self.receive(index, Received::Say(said));
        true
    }

    fn receive(&mut self, index: usize, received: Received) {
        let Some((mut link, upstream)) = self.clients[index].link.take() else {
            return;
        };
        if self.trace {
            println!("{index} from {upstream:?}: {received:?}");
        }
        let mut thrown_away = false;
        self.with(index, &mut link, |who, link, etcd, figures, now| match who {
            Who::Replica(replica) => {
                if let Some(input) = replica.driver.input(received) {
                    replica.on(input, link, etcd, now);
                }
            }
            Who::Reader(reader) => {
                if let Some(input) = reader.driver.input(received) {
                    reader.on(input, link, etcd, figures);
                }
            }
            Who::Cilium(cilium) => thrown_away = cilium.on(received, link, etcd, figures),
        });
        self.clients[index].link = (!thrown_away).then_some((link, upstream));
    }
}

impl Client {
    fn asks(&self, upstream: Upstream) -> bool {
        self.link.as_ref().is_some_and(|(_, asked)| *asked == upstream)
    }

    fn view(&self) -> Option<&View> {
        match &self.who {
            Who::Replica(_) => None,
            Who::Reader(reader) => Some(&reader.view),
            Who::Cilium(cilium) => Some(&cilium.view),
        }
    }
}
