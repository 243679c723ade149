//! etcd as a stream of typed events and a batched writer.
