//! rustls with the ring provider, certificate reload, peer names to rights.
