//! The Watch service. Events go to the wire as they were encoded once, which the generated service cannot do: its messages
//! are encoded anew for each stream.

use std::{collections::VecDeque, convert::Infallible, sync::Arc};

use bytes::{BufMut, Bytes};
use isthmus_proto::etcdserverpb::{WatchRequest, WatchResponse};
use prost::Message;
use tonic::{
    Request, Response, Status, Streaming,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{Body, BoxFuture, Context as TaskContext, Poll, Service, StdError, http},
    server::{Grpc, NamedService, StreamingService},
};

use super::{Context, Peer, face::Face, stream::WatchStream};

const SERVICE: &str = "etcdserverpb.Watch";
const METHOD: &str = "/etcdserverpb.Watch/Watch";
/// Buffers that each stream holds all its life begin this small, for most streams are idle; a message makes room for itself.
const BUFFER_LEN: usize = 256;
/// Messages that are ready leave together up to so many bytes.
const BUNDLE_LEN: usize = 32 * 1024;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_LEN, BUNDLE_LEN)
}

/// A `WatchResponse` whose events are encoded already.
#[derive(Debug)]
pub(super) struct Frame {
    /// Everything but the events.
    pub(super) head: WatchResponse,
    /// Each with its tag and length.
    pub(super) events: Vec<Bytes>,
}

impl Frame {
    /// A frame without events.
    pub(super) fn control(head: WatchResponse) -> Self {
        Self {
            head,
            events: Vec::new(),
        }
    }

    fn encoded_len(&self) -> usize {
        self.head.encoded_len() + self.events.iter().map(Bytes::len).sum::<usize>()
    }

    /// Splits a frame of `limit` bytes or more, as etcd does: an event stays whole, and all parts but the last say that more
    /// follows.
    pub(super) fn into_fragments(self, limit: usize) -> VecDeque<Self> {
        if self.events.len() < 2 || self.encoded_len() < limit {
            return VecDeque::from([self]);
        }
        let head = WatchResponse {
            fragment: true,
            ..self.head
        };
        let head_len = head.encoded_len();
        let mut fragments: VecDeque<Self> = VecDeque::new();
        let mut len = 0;
        for event in self.events {
            match fragments.back_mut() {
                Some(last) if len + event.len() < limit => {
                    len += event.len();
                    last.events.push(event);
                }
                _ => {
                    len = head_len + event.len();
                    fragments.push_back(Self {
                        head: head.clone(),
                        events: vec![event],
                    });
                }
            }
        }
        if let Some(last) = fragments.back_mut() {
            last.head.fragment = false;
        }
        fragments
    }
}

struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Frame;
    type Decode = WatchRequest;
    type Encoder = FrameEncoder;
    type Decoder = RequestDecoder;

    fn encoder(&mut self) -> FrameEncoder {
        FrameEncoder
    }

    fn decoder(&mut self) -> RequestDecoder {
        RequestDecoder
    }
}

struct FrameEncoder;

impl Encoder for FrameEncoder {
    type Item = Frame;
    type Error = Status;

    fn encode(&mut self, frame: Frame, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(frame.encoded_len());
        frame
            .head
            .encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))?;
        // Fields of a message may come in any order, and repeated ones add up: the events simply follow.
        for event in frame.events {
            buffer.put_slice(&event);
        }
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

struct RequestDecoder;

impl Decoder for RequestDecoder {
    type Item = WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<WatchRequest>, Status> {
        WatchRequest::decode(buffer)
            .map(Some)
            .map_err(|error| Status::invalid_argument(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// The service.
#[derive(Clone)]
pub(super) struct WatchServer {
    context: Arc<Context>,
}

impl WatchServer {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

impl NamedService for WatchServer {
    const NAME: &'static str = SERVICE;
}

impl StreamingService<WatchRequest> for WatchServer {
    type Response = Frame;
    type ResponseStream = WatchStream;
    type Future = BoxFuture<Response<WatchStream>, Status>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let (peer, face) = (Peer::of(&request), Face::of(&request));
        let context = self.context.clone();
        Box::pin(async move {
            let stream = WatchStream::new(context, peer?, face, request.into_inner());
            Ok(Response::new(stream))
        })
    }
}

impl<B> Service<http::Request<B>> for WatchServer
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != METHOD {
                return Ok(Status::unimplemented("").into_http());
            }
            let limit = service.context.limits.request_bytes;
            let mut grpc = Grpc::new(WatchCodec).apply_max_message_size_config(Some(limit), None);
            Ok(grpc.streaming(service, request).await)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn fragments_are_the_whole_in_order_and_each_below_the_limit_or_one_event(lens in proptest::collection::vec(1usize..60, 0..40), limit in 1usize..300) {
            let events: Vec<Bytes> = lens.iter().enumerate().map(|(index, len)| vec![index as u8; *len].into()).collect();
            let head = WatchResponse { watch_id: 7, ..Default::default() };
            let whole = Frame { head: head.clone(), events: events.clone() };
            let is_large = whole.encoded_len() >= limit && events.len() > 1;
            let fragments = whole.into_fragments(limit);
            prop_assert_eq!(fragments.len() > 1, is_large);
            let last = fragments.len() - 1;
            for (index, fragment) in fragments.iter().enumerate() {
                prop_assert_eq!(&fragment.head, &WatchResponse { fragment: index < last, ..head.clone() });
                prop_assert!(fragment.events.len() == 1 || fragment.encoded_len() < limit || !is_large);
            }
            // None could have taken the first event of the next.
            for (fragment, next) in fragments.iter().zip(fragments.iter().skip(1)) {
                prop_assert!(fragment.encoded_len() + next.events[0].len() >= limit);
            }
            let again: Vec<Bytes> = fragments.into_iter().flat_map(|fragment| fragment.events).collect();
            prop_assert_eq!(again, events);
        }
    }
}
