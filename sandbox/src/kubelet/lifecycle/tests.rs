//! Lives of pods, as facts and at random.

use proptest::prelude::*;

use super::*;

fn view(restart: RestartPolicy, containers: &[(bool, bool)]) -> PodView {
    PodView {
        containers: containers
            .iter()
            .map(|(init, pre_stop)| ContainerView {
                init: *init,
                pre_stop: *pre_stop,
            })
            .collect(),
        restart,
        grace: Duration::from_secs(30),
        deletion: None,
        network_ready: true,
    }
}

const fn s(seconds: u64) -> Time {
    Duration::from_secs(seconds)
}

/// A pod whose world does what it is told at once, except that containers end only when they are told to.
struct World {
    view: PodView,
    state: PodState,
    now: Time,
}

impl World {
    fn new(view: PodView) -> Self {
        Self {
            state: PodState::new(&view),
            view,
            now: Time::ZERO,
        }
    }

    /// Does everything there is to do; returns it.
    fn settle(&mut self) -> Vec<Action> {
        let mut done = Vec::new();
        loop {
            let actions = step(&self.view, &self.state, self.now);
            if actions.is_empty() {
                return done;
            }
            for action in actions {
                self.state.begin(action, self.now);
                let event = match action {
                    Action::CreateNetwork => Some(Event::NetworkUp),
                    Action::RemoveNetwork => Some(Event::NetworkGone),
                    Action::RemoveObject => Some(Event::ObjectGone),
                    Action::Kill(container) => Some(Event::Exited {
                        container,
                        success: false,
                    }),
                    Action::Start(_) | Action::PreStop(_) | Action::Terminate(_) => None,
                };
                if let Some(event) = event {
                    self.on(event);
                }
                done.push(action);
            }
        }
    }

    fn on(&mut self, event: Event) {
        self.state.on(&self.view, event, self.now);
    }

    fn delete(&mut self, grace: Duration) {
        self.view.deletion = Some(grace);
        self.state.observe(&self.view, self.now);
    }
}

#[test]
fn init_containers_run_one_after_the_other_before_the_rest() {
    let mut pod = World::new(view(
        RestartPolicy::Always,
        &[(true, false), (true, false), (false, false), (false, false)],
    ));
    assert_eq!(pod.settle(), [Action::CreateNetwork, Action::Start(0)]);
    pod.on(Event::Exited {
        container: 0,
        success: true,
    });
    assert_eq!(pod.settle(), [Action::Start(1)]);
    assert_eq!(pod.state.phase(&pod.view), Phase::Pending);
    pod.on(Event::Exited {
        container: 1,
        success: true,
    });
    assert_eq!(pod.settle(), [Action::Start(2), Action::Start(3)]);
    assert_eq!(pod.state.phase(&pod.view), Phase::Running);
}

#[test]
fn a_crashing_container_is_started_again_with_growing_delays() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, false)]));
    pod.settle();
    pod.on(Event::Exited {
        container: 0,
        success: false,
    });
    assert_eq!(pod.settle(), [Action::Start(0)]);
    pod.on(Event::Exited {
        container: 0,
        success: true,
    });
    assert_eq!(pod.settle(), []);
    assert_eq!(next_look(&pod.state, pod.now), Some(s(1)));
    pod.now = s(1);
    assert_eq!(pod.settle(), [Action::Start(0)]);
    assert_eq!(pod.state.phase(&pod.view), Phase::Running);
}

#[test]
fn a_pod_that_runs_to_its_end_gives_back_its_network_and_keeps_its_object() {
    for (policy, success, want) in [
        (RestartPolicy::Never, true, Phase::Succeeded),
        (RestartPolicy::Never, false, Phase::Failed),
        (RestartPolicy::OnFailure, true, Phase::Succeeded),
    ] {
        let mut pod = World::new(view(policy, &[(false, false)]));
        pod.settle();
        pod.on(Event::Exited {
            container: 0,
            success,
        });
        assert_eq!(pod.settle(), [Action::RemoveNetwork]);
        assert_eq!(pod.state.phase(&pod.view), want);
        assert!(!pod.state.is_over());
        pod.delete(s(30));
        assert_eq!(pod.settle(), [Action::RemoveObject]);
    }
}

#[test]
fn deletion_goes_hook_term_kill_network_object() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, true)]));
    pod.settle();
    pod.now = s(5);
    pod.delete(s(10));
    assert_eq!(pod.settle(), [Action::PreStop(0)]);
    pod.on(Event::PreStopDone(0));
    assert_eq!(pod.settle(), [Action::Terminate(0)]);
    assert_eq!(next_look(&pod.state, pod.now), Some(s(15)));
    pod.now = s(15);
    assert_eq!(
        pod.settle(),
        [Action::Kill(0), Action::RemoveNetwork, Action::RemoveObject]
    );
    assert!(pod.state.is_over());
}

#[test]
fn a_hook_that_hangs_is_cut_off_by_the_grace_period() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, true)]));
    pod.settle();
    pod.delete(s(3));
    assert_eq!(pod.settle(), [Action::PreStop(0)]);
    pod.now = s(3);
    assert_eq!(pod.settle()[0], Action::Kill(0));
}

#[test]
fn a_second_deletion_can_only_shorten_the_grace_period() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, false)]));
    pod.settle();
    pod.delete(s(30));
    assert_eq!(pod.settle(), [Action::Terminate(0)]);
    pod.delete(s(60));
    assert_eq!(next_look(&pod.state, pod.now), Some(s(30)));
    pod.delete(s(0));
    assert_eq!(pod.settle()[0], Action::Kill(0));
}

#[test]
fn an_unhealthy_container_is_ended_and_started_again() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, false)]));
    pod.settle();
    pod.on(Event::Unhealthy(0));
    assert_eq!(pod.settle(), [Action::Terminate(0)]);
    pod.on(Event::Exited {
        container: 0,
        success: true,
    });
    assert_eq!(pod.settle(), [Action::Start(0)]);
    assert_eq!(next_look(&pod.state, pod.now), None);
}

#[test]
fn a_network_that_fails_is_tried_again_with_backoff_and_a_deleted_pod_does_not_wait_for_it() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, false)]));
    for _ in 0..2 {
        pod.state.begin(Action::CreateNetwork, pod.now);
        assert_eq!(pod.settle(), []);
        pod.on(Event::NetworkFailed);
    }
    assert_eq!(next_look(&pod.state, pod.now), Some(Duration::from_millis(250)));
    pod.delete(s(30));
    assert_eq!(pod.settle(), [Action::RemoveObject]);
}

#[test]
fn nothing_is_attached_before_the_network_is_ready() {
    let mut pod = World::new(view(RestartPolicy::Always, &[(false, false)]));
    pod.view.network_ready = false;
    assert_eq!(pod.settle(), []);
    pod.view.network_ready = true;
    assert_eq!(pod.settle(), [Action::CreateNetwork, Action::Start(0)]);
}

fn views() -> impl Strategy<Value = PodView> {
    let policy = prop_oneof![
        Just(RestartPolicy::Always),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Never)
    ];
    let containers = prop::collection::vec((any::<bool>(), any::<bool>()), 0..3).prop_map(|mut list| {
        list.sort_by_key(|(init, _)| !init);
        list.push((false, false));
        list
    });
    (policy, containers).prop_map(|(policy, containers)| view(policy, &containers))
}

proptest! {
    /// Whatever happens in whatever order: nothing starts in an ending pod, the network outlives the containers, the
    /// object outlives the network, and an ending pod is over when its grace period is.
    #[test]
    fn every_pod_ends_in_order(view in views(), happenings in prop::collection::vec((0u8..7, 0usize..4, any::<bool>()), 0..40)) {
        let mut pod = World::new(view);
        for (what, container, success) in happenings {
            pod.now += Duration::from_millis(700);
            let at = container % pod.view.containers.len();
            let running = matches!(pod.state.containers[at].run, Run::Running { .. });
            match what {
                0 | 1 if running => pod.on(Event::Exited { container: at, success }),
                2 => pod.on(Event::PreStopDone(at)),
                3 => pod.on(Event::Unhealthy(at)),
                4 => pod.view.network_ready = success,
                5 if success => pod.delete(s(5)),
                _ => {}
            }
            let ending = pod.state.is_ending();
            for action in pod.settle() {
                prop_assert!(!ending || !matches!(action, Action::Start(_) | Action::CreateNetwork));
            }
            if pod.state.network == Network::Removed {
                prop_assert!(!pod.state.is_running());
            }
        }
        pod.delete(s(5));
        pod.settle();
        while let Some(at) = next_look(&pod.state, pod.now) {
            pod.now = at;
            pod.settle();
        }
        prop_assert!(pod.state.is_over());
        prop_assert!(!pod.state.is_running());
    }
}
