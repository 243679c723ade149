//! What waits in a connection for its client to read it.
//!
//! In: the bodies of answers. Out: the same bodies, which give nothing more while too much of their connection was not read.
//! HTTP/2 takes a whole message from a body before it looks for room to send it, so that without this a client that reads
//! nothing could make the server hold a message for each of its streams.
//!
//! Invariant: the bytes that wait in a connection are below its limit, or the last message that was added made them exceed it.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context as TaskContext, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tonic::Status;

use super::answers::Large;

/// Of all connections.
#[derive(Debug)]
pub(crate) struct Totals {
    pending: AtomicUsize,
    begun: Instant,
}

impl Totals {
    pub(crate) fn new(begun: Instant) -> Self {
        Self {
            pending: AtomicUsize::new(0),
            begun,
        }
    }

    /// Bytes that wait.
    pub(crate) fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Of one connection.
#[derive(Debug)]
pub(crate) struct Account {
    totals: Arc<Totals>,
    limit: usize,
    pending: AtomicUsize,
    /// When bytes were last read by the client, or the first ones began to wait.
    moved_ms: AtomicU64,
    /// Streams that have something to say and may not yet. Held while a stream adds something, so that one at a time does.
    waiting: Mutex<Vec<Waker>>,
}

impl Account {
    pub(crate) fn new(totals: Arc<Totals>, limit: usize) -> Self {
        Self {
            totals,
            limit,
            pending: AtomicUsize::new(0),
            moved_ms: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    /// Bytes that wait.
    pub(crate) fn pending(&self) -> usize {
        self.pending.load(Ordering::SeqCst)
    }

    /// For how long what waits stands still; nothing if nothing waits.
    pub(crate) fn stands_still(&self) -> Duration {
        if self.pending() == 0 {
            return Duration::ZERO;
        }
        let moved = self.moved_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.totals.now_ms().saturating_sub(moved))
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, bytes: Bytes, large: Option<Large>) -> Counted {
        let len = bytes.len();
        if self.pending.fetch_add(len, Ordering::SeqCst) == 0 {
            self.moved_ms.store(self.totals.now_ms(), Ordering::Relaxed);
        }
        self.totals.pending.fetch_add(len, Ordering::Relaxed);
        Counted {
            bytes,
            len,
            account: self.clone(),
            _large: large,
        }
    }

    fn remove(&self, len: usize) {
        self.totals.pending.fetch_sub(len, Ordering::Relaxed);
        let before = self.pending.fetch_sub(len, Ordering::SeqCst);
        if before >= self.limit && before - len < self.limit {
            // Whoever found it full did so under this lock, and so is in the list now or will find room.
            let waiting = std::mem::take(&mut *self.waiting());
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    fn moved(&self) {
        self.moved_ms.store(self.totals.now_ms(), Ordering::Relaxed);
    }
}

/// Bytes that wait, until they are written to the connection or it ends.
pub(super) struct Counted {
    bytes: Bytes,
    len: usize,
    account: Arc<Account>,
    _large: Option<Large>,
}

impl Buf for Counted {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.account.moved();
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        self.bytes.copy_to_bytes(len)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.account.remove(self.len);
    }
}

/// A body whose bytes are counted.
pub(super) struct Metered {
    inner: tonic::body::Body,
    account: Arc<Account>,
    large: Option<Large>,
}

impl Metered {
    pub(super) fn new(inner: tonic::body::Body, account: Arc<Account>, large: Option<Large>) -> Self {
        Self {
            inner,
            account,
            large,
        }
    }
}

impl Body for Metered {
    type Data = Counted;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Counted>, Status>>> {
        let body = self.get_mut();
        let mut waiting = body.account.waiting();
        if body.account.pending() >= body.account.limit {
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        Pin::new(&mut body.inner).poll_frame(cx).map_ok(|frame| {
            let account = &body.account;
            frame.map_data(|bytes| account.add(bytes, body.large.clone()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use futures::{StreamExt, stream};
    use http_body_util::StreamBody;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A body of endless messages of `len` bytes.
    fn endless(len: usize, account: &Arc<Account>) -> Metered {
        let frames =
            stream::repeat(()).map(move |()| Ok::<_, Status>(Frame::data(Bytes::from(vec![0; len]))));
        Metered::new(
            tonic::body::Body::new(StreamBody::new(frames)),
            account.clone(),
            None,
        )
    }

    fn poll(body: &mut Metered, woken: &Arc<Woken>) -> Option<Counted> {
        let waker = Waker::from(woken.clone());
        match Pin::new(body).poll_frame(&mut TaskContext::from_waker(&waker)) {
            Poll::Ready(frame) => frame.unwrap().unwrap().into_data().ok(),
            Poll::Pending => None,
        }
    }

    #[test]
    fn streams_of_a_connection_share_what_may_wait_and_go_on_when_there_is_room() {
        let totals = Arc::new(Totals::new(Instant::now()));
        let account = Arc::new(Account::new(totals.clone(), 1000));
        let mut streams: Vec<_> = (0..1024).map(|_| endless(300, &account)).collect();
        let woken = Arc::new(Woken::default());
        let mut held: Vec<_> = streams.iter_mut().filter_map(|body| poll(body, &woken)).collect();
        // 300 each: the fourth exceeds, and no fifth is added.
        assert_eq!((held.len(), account.pending(), totals.pending()), (4, 1200, 1200));
        // The other 1020 share a waker here; it is held once.
        assert_eq!(account.waiting().len(), 1);
        held[0].advance(299);
        assert_eq!(account.pending(), 1200, "a message counts until it is gone");
        held.pop();
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
        held.extend(poll(&mut streams[700], &woken));
        assert!(poll(&mut streams[701], &woken).is_none());
        assert_eq!((held.len(), account.pending()), (4, 1200));
        // Another connection has its own.
        let other = Arc::new(Account::new(totals.clone(), 1000));
        held.extend(poll(&mut endless(5000, &other), &woken));
        assert_eq!((other.pending(), totals.pending()), (5000, 6200));
        drop(held);
        assert_eq!((account.pending(), other.pending(), totals.pending()), (0, 0, 0));
        assert_eq!(account.stands_still(), Duration::ZERO);
    }
}
