//! Protobuf: etcd's v3 subset and the agent's local API.
