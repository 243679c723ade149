//! What a stream of watches answers, message by message the same as etcd.

use isthmus_proto::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchResponse,
    watch_create_request::FilterType, watch_request::RequestUnion,
};
use isthmus_proto::mvccpb::Event;

use crate::both::{Both, Session, channel};

const KEY: &str = "cilium/state/x/a";

fn watch() -> WatchCreateRequest {
    WatchCreateRequest {
        key: "cilium/state/x/".into(),
        range_end: "cilium/state/x0".into(),
        ..Default::default()
    }
}

fn create(request: WatchCreateRequest) -> RequestUnion {
    RequestUnion::CreateRequest(request)
}

fn cancel(watch_id: i64) -> RequestUnion {
    RequestUnion::CancelRequest(WatchCancelRequest { watch_id })
}

fn progress() -> RequestUnion {
    RequestUnion::ProgressRequest(WatchProgressRequest {})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_are_chosen_refused_and_never_used_again_as_etcd_does() {
    let both = Both::start("admin-c1").await;
    let mut sessions = both.sessions();
    let with_id = |watch_id| WatchCreateRequest { watch_id, ..watch() };
    assert_eq!(sessions.ask("the first", create(watch())).await.watch_id, 0);
    assert_eq!(sessions.ask("chosen", create(with_id(1))).await.watch_id, 1);
    let twice = sessions.ask("chosen twice", create(with_id(1))).await;
    assert!(twice.created && twice.canceled && twice.watch_id == -1);
    assert_eq!(
        sessions.ask("after the chosen", create(watch())).await.watch_id,
        2
    );
    assert_eq!(sessions.ask("far off", create(with_id(70))).await.watch_id, 70);
    let cancelled = sessions.ask("a cancel", cancel(0)).await;
    assert!(cancelled.canceled && cancelled.cancel_reason.is_empty());
    // No answer to the cancel of what is not there: the next one is that to the create.
    sessions.send(cancel(0)).await;
    sessions.send(cancel(1234)).await;
    assert_eq!(sessions.ask("after a cancel", create(watch())).await.watch_id, 3);
    sessions.ask("another cancel", cancel(1)).await;
    sessions.ask("a chosen one again", create(with_id(1))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_that_are_none_are_refused_and_an_empty_key_is_the_first() {
    let both = Both::start("admin-c1").await;
    let mut sessions = both.sessions();
    for (key, range_end) in [("b", "a"), ("b", "b")] {
        let request = WatchCreateRequest {
            key: key.into(),
            range_end: range_end.into(),
            ..Default::default()
        };
        let refused = sessions.ask("an empty range", create(request)).await;
        assert!(refused.created && refused.canceled && !refused.cancel_reason.is_empty());
    }
    let request = WatchCreateRequest::default();
    assert!(!sessions.ask("an empty key", create(request)).await.canceled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_filters_and_values_before_are_etcds() {
    let both = Both::start("admin-c1").await;
    let mut sessions = both.sessions();
    let filtered = |filters: &[FilterType], prev_kv| WatchCreateRequest {
        filters: filters.iter().map(|filter| *filter as i32).collect(),
        prev_kv,
        ..watch()
    };
    // One watch a session, so that the order of answers is known.
    for request in [
        watch(),
        filtered(&[], true),
        filtered(&[FilterType::Noput], true),
        filtered(&[FilterType::Nodelete], false),
        WatchCreateRequest {
            key: KEY.into(),
            prev_kv: true,
            ..Default::default()
        },
        WatchCreateRequest {
            key: "cilium/state/x/".into(),
            range_end: "cilium/state/x/b".into(),
            ..Default::default()
        },
    ] {
        let what = format!("{request:?}");
        let mut sessions = both.sessions();
        sessions.ask(&what, create(request.clone())).await;
        let puts = !request.filters.contains(&(FilterType::Noput as i32));
        let deletes = !request.filters.contains(&(FilterType::Nodelete as i32));
        both.write(&[
            (KEY, Some("1")),
            ("cilium/state/x/b", Some("1")),
            ("cilium/state/y", Some("1")),
        ])
        .await;
        if puts {
            assert!(!sessions.agree(&what).await.events.is_empty());
        }
        both.write(&[(KEY, Some("2"))]).await;
        if puts {
            sessions.agree(&what).await;
        }
        both.write(&[(KEY, None)]).await;
        if deletes {
            sessions.agree(&what).await;
        }
        // Nothing more was said.
        sessions.ask(&what, cancel(0)).await;
    }
    // A start in the future is silent until then, and so is one that comes right after what is there.
    let now = both.write(&[(KEY, Some("now"))]).await;
    let from = |start_revision| WatchCreateRequest {
        start_revision,
        ..watch()
    };
    sessions.ask("a future start", create(from(now + 3))).await;
    for value in ["1", "2", "3", "4"] {
        both.write(&[(KEY, Some(value))]).await;
    }
    let first = sessions.agree("the start is reached").await;
    assert_eq!(first.events[0].kv.as_ref().unwrap().mod_revision, now + 3);
    sessions.agree("and the next").await;
    sessions
        .ask("the present as the start", create(from(now + 5)))
        .await;
    both.write(&[(KEY, Some("5"))]).await;
    // Which of the two watches is told first is nobody's promise.
    let (theirs, ours) = (sessions.theirs.two().await, sessions.ours.two().await);
    assert_eq!(ours, theirs);
    assert_eq!(ours.map(|answer| answer.watch_id), [0, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_told_to_all_watches_at_once_and_only_after_what_there_was() {
    let both = Both::start("admin-c1").await;
    let mut sessions = both.sessions();
    let empty = sessions.ask("without a watch", progress()).await;
    assert_eq!(empty.watch_id, -1);
    sessions.ask("a watch", create(watch())).await;
    sessions
        .ask(
            "another",
            create(WatchCreateRequest {
                key: "cilium/state/z".into(),
                ..Default::default()
            }),
        )
        .await;
    let revision = both.write(&[(KEY, Some("1"))]).await;
    sessions.agree("its event").await;
    let told = sessions.ask("progress", progress()).await;
    assert_eq!((told.watch_id, told.header.unwrap().revision), (-1, revision));
    assert!(!told.created && !told.canceled && told.events.is_empty());
    // However it falls together with changes, everything up to a notification was delivered before it.
    let mut ours = Session::open(both.ours.clone());
    ours.send(create(watch())).await;
    ours.next().await.unwrap();
    let mut client = both.etcd.client().await.unwrap();
    let (mut last, mut seen, mut notifications) = (0, 0, 0);
    for round in 0..60 {
        let put = client.put(KEY, round.to_string(), None).await.unwrap();
        last = put.header().unwrap().revision();
        ours.send(progress()).await;
    }
    while seen < last || notifications < 1 {
        let answer = ours.next().await.unwrap();
        let at = answer.header.unwrap().revision;
        if answer.events.is_empty() {
            notifications += 1;
            // Every revision from here on is one of this watch.
            assert!(at <= seen.max(revision), "told of {at} after {seen}");
        }
        for event in answer.events {
            let modified = event.kv.unwrap().mod_revision;
            assert!(seen == 0 || modified == seen + 1);
            seen = modified;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quiet_watches_are_told_of_progress_if_they_asked_and_miss_nothing_by_it() {
    let both = Both::start("admin-c1").await;
    let mut ours = Session::open(both.ours.clone());
    ours.send(create(WatchCreateRequest {
        progress_notify: true,
        ..watch()
    }))
    .await;
    ours.next().await.unwrap();
    let mut client = both.etcd.client().await.unwrap();
    let (mut wanted, mut got, mut told) = (vec![], vec![], 0);
    for round in 0..200 {
        // Others' keys move the revision on, so that there is progress to tell.
        let other = client
            .put("cilium/state/y", round.to_string(), None)
            .await
            .unwrap();
        if round % 3 == 0 {
            let put = client.put(KEY, round.to_string(), None).await.unwrap();
            wanted.push(put.header().unwrap().revision());
        }
        told = other.header().unwrap().revision();
    }
    let mut progress_at = 0;
    while got.len() < wanted.len() || progress_at < told {
        let answer = ours.next().await.unwrap();
        let at = answer.header.unwrap().revision;
        if answer.events.is_empty() {
            progress_at = at;
        }
        for event in answer.events {
            let modified = event.kv.unwrap().mod_revision;
            assert!(
                modified > progress_at,
                "{modified} after a notification of {progress_at}"
            );
            got.push(modified);
        }
    }
    assert_eq!(got, wanted);
}

/// What comes until revision `end`, put together, and whether something came in parts. Parts are marked rightly.
async fn whole(session: &mut Session, end: i64) -> (Vec<Event>, bool) {
    let (mut events, mut split, mut open): (Vec<Event>, bool, Option<i64>) = (vec![], false, None);
    loop {
        let answer: WatchResponse = session.next().await.unwrap();
        assert!(!answer.events.is_empty() && !answer.created && !answer.canceled);
        let first = answer.events[0].kv.as_ref().unwrap().mod_revision;
        let last = events.last().map(|event| event.kv.as_ref().unwrap().mod_revision);
        // A revision goes on in the next message only if that was announced.
        assert!(last.is_none_or(|last| last < first || open.is_some()));
        assert!(open.is_none_or(|id| id == answer.watch_id));
        open = answer.fragment.then_some(answer.watch_id);
        split |= answer.fragment;
        events.extend(answer.events);
        let reached = events.last().unwrap().kv.as_ref().unwrap().mod_revision;
        if reached >= end && open.is_none() {
            return (events, split);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_responses_come_in_parts_to_those_who_asked_and_whole_to_others() {
    let both = Both::start("admin-c1").await;
    let begin = both.write(&[(KEY, Some("1"))]).await + 1;
    let large = "v".repeat(900_000);
    let keys: Vec<String> = (0..12).map(|index| format!("cilium/state/x/{index}")).collect();
    let ops: Vec<(&str, Option<&str>)> = keys.iter().map(|key| (&**key, Some(&*large))).collect();
    // In one revision 11 MB, and then as much in several, which etcd's limit here makes parts of too.
    both.write(&ops).await;
    for op in &ops {
        both.write(&[*op]).await;
    }
    let end = both.write(&[(KEY, Some("2"))]).await;
    for fragment in [true, false] {
        let mut sessions = both.sessions();
        let request = WatchCreateRequest {
            fragment,
            start_revision: begin,
            ..watch()
        };
        sessions.ask("a watch", create(request)).await;
        let (want, theirs_split) = whole(&mut sessions.theirs, end).await;
        let (got, ours_split) = whole(&mut sessions.ours, end).await;
        assert_eq!(got, want);
        assert_eq!((theirs_split, ours_split), (fragment, fragment));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_in_the_future_of_another_view_is_not_waited_for_for_ever() {
    let both = Both::start("local-c1").await;
    let future = |key: &str, end: &str| WatchCreateRequest {
        key: key.to_owned().into(),
        range_end: end.to_owned().into(),
        start_revision: i64::MAX / 2,
        ..Default::default()
    };
    // Nothing is mirrored here: this is the merged view, and the locks are a view of their own.
    for (key, end) in [
        ("cilium/cache/nodes/v1/c2/", "cilium/cache/nodes/v1/c20"),
        ("cilium/.initlock/", "cilium/.initlock0"),
    ] {
        let mut session = Session::open(channel(&both.pki, both.server.address, "local-c1").await);
        session.send(create(future(key, end))).await;
        assert!(session.next().await.unwrap().created);
        let ended = session.next().await.unwrap();
        assert!(
            ended.canceled && ended.compact_revision > 0 && ended.watch_id == 0,
            "{ended:?}"
        );
    }
}
