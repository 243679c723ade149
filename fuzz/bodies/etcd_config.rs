//! The etcd client's YAML file, as a mesh configuration mounts it for each cluster.

use isthmus_kvstore::EtcdConfig;

/// A file's text.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = EtcdConfig::parse(text) {
        assert!(!config.endpoints.is_empty());
        for endpoint in &config.endpoints {
            assert!(!endpoint.host.is_empty() && !endpoint.to_string().contains(' '));
        }
    }
}
