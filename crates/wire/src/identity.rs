//! Identities: `.../identities/v1/id/<number>` = label string.
//!
//! Source: Cilium's `pkg/identity/cache/allocator.go`: a remote identity is refused unless its number lies in the
//! cluster's range and its labels name the cluster, with source `k8s`.

use isthmus_model::{ClusterName, IdentityRange, Labels, NumericIdentity, labels};

use crate::refusal::{Refusal, VALUE_LEN_MAX};

/// Reads an identity of `cluster` and checks it as Cilium's readers do.
pub fn decode(
    number: NumericIdentity,
    value: &[u8],
    cluster: &ClusterName,
    range: IdentityRange,
) -> Result<Labels, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    if !range.contains(number) {
        return Err(Refusal::IdentityRange(number.0));
    }
    let text = std::str::from_utf8(value).map_err(|_| Refusal::malformed("label string", "(not UTF-8)"))?;
    let labels = Labels::parse(text).map_err(Refusal::Labels)?;
    let names_cluster = labels
        .find(labels::POLICY_CLUSTER)
        .is_some_and(|label| label.source == labels::SOURCE_K8S && label.value == cluster.as_str());
    if names_cluster {
        Ok(labels)
    } else {
        Err(Refusal::IdentityCluster(cluster.to_string()))
    }
}

/// Writes an identity's value.
pub fn encode(labels: &Labels) -> Vec<u8> {
    labels.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::{ClusterId, MaxConnectedClusters};

    #[test]
    fn only_identities_of_the_cluster_pass() {
        let max = MaxConnectedClusters::C255;
        let cluster = ClusterName::new("c1").unwrap();
        let range = IdentityRange::of(ClusterId::new(1, max).unwrap(), max);
        let check = |number, text: &str| {
            decode(NumericIdentity(number), text.as_bytes(), &cluster, range).map_err(|e| e.reason())
        };
        assert!(check(65_553, "k8s:app=a;k8s:io.cilium.k8s.policy.cluster=c1;").is_ok());
        assert_eq!(
            check(131_072, "k8s:io.cilium.k8s.policy.cluster=c1;").unwrap_err(),
            "identity_range"
        );
        assert_eq!(
            check(65_553, "k8s:io.cilium.k8s.policy.cluster=c2;").unwrap_err(),
            "identity_cluster"
        );
        assert_eq!(
            check(65_553, "any:io.cilium.k8s.policy.cluster=c1;").unwrap_err(),
            "identity_cluster"
        );
        assert_eq!(check(65_553, "k8s:app").unwrap_err(), "labels");
    }
}
