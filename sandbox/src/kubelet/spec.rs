//! What a pod's object asks for, in the lifecycle's terms.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::lifecycle::{ContainerView, PodView, RestartPolicy};

/// A pod's annotation that overrules the period of all its probes, in milliseconds (10 at least): kubelet's own unit
/// is a second, which is long for a demonstration.
pub const PROBE_PERIOD_ANNOTATION: &str = "sandbox.isthmus.io/probe-period-ms";

/// The pod's containers as the view has them: init containers first. A sidecar (an init container that is always
/// restarted) counts as an ordinary container.
pub fn containers(pod: &Pod) -> Vec<(&Container, bool)> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let is_sidecar = |container: &Container| container.restart_policy.as_deref() == Some("Always");
    let init = spec.init_containers.iter().flatten();
    let (sidecars, init): (Vec<_>, Vec<_>) = init.partition(|container| is_sidecar(container));
    let main = sidecars
        .into_iter()
        .chain(&spec.containers)
        .map(|container| (container, false));
    init.into_iter()
        .map(|container| (container, true))
        .chain(main)
        .collect()
}

/// The lifecycle's view. `gone`: the object has vanished.
pub fn view(pod: &Pod, gone: bool, network_ready: bool) -> PodView {
    let spec = pod.spec.as_ref();
    let seconds = |value: Option<i64>| {
        value
            .and_then(|value| u64::try_from(value).ok())
            .map(Duration::from_secs)
    };
    let grace = seconds(spec.and_then(|spec| spec.termination_grace_period_seconds));
    let grace = grace.unwrap_or(Duration::from_secs(30));
    let deleted = pod.metadata.deletion_timestamp.is_some();
    let deletion = if gone {
        Some(Duration::ZERO)
    } else {
        deleted.then(|| seconds(pod.metadata.deletion_grace_period_seconds).unwrap_or(grace))
    };
    let container = |(container, init): (&Container, bool)| ContainerView {
        init,
        pre_stop: container
            .lifecycle
            .as_ref()
            .is_some_and(|hooks| hooks.pre_stop.is_some()),
    };
    PodView {
        containers: containers(pod).into_iter().map(container).collect(),
        restart: match spec.and_then(|spec| spec.restart_policy.as_deref()) {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        },
        grace,
        deletion,
        network_ready: network_ready || is_host_network(pod),
    }
}

/// Whether the pod shares its node's network namespace.
pub fn is_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true)
}

/// The period of all probes, when the pod overrules it.
pub fn probe_period(pod: &Pod) -> Option<Duration> {
    let value = pod.metadata.annotations.as_ref()?.get(PROBE_PERIOD_ANNOTATION)?;
    let millis: u64 = value.parse().ok()?;
    (millis >= 10).then(|| Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn a_pods_spec_is_read() {
        let pod: Pod = from_value(json!({
            "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 7,
                "annotations": {PROBE_PERIOD_ANNOTATION: "50"}},
            "spec": {"restartPolicy": "Never", "initContainers": [{"name": "side", "restartPolicy": "Always"}, {"name": "i"}],
                "containers": [{"name": "c", "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}]}
        }))
        .unwrap();
        let names: Vec<_> = containers(&pod)
            .iter()
            .map(|(container, init)| (container.name.as_str(), *init))
            .collect();
        assert_eq!(names, [("i", true), ("side", false), ("c", false)]);
        let seen = view(&pod, false, true);
        assert_eq!(
            (seen.restart, seen.deletion),
            (RestartPolicy::Never, Some(Duration::from_secs(7)))
        );
        assert!(seen.containers[2].pre_stop);
        assert_eq!(view(&pod, true, true).deletion, Some(Duration::ZERO));
        assert_eq!(probe_period(&pod), Some(Duration::from_millis(50)));
    }
}
