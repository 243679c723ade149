//! Cilium's keyspace: keys and JSON to and from the model, with limits.
