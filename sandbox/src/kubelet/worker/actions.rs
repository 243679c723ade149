//! What the actions of a pod's life are: networks, processes, hooks, probes, the object's deletion.
//!
//! Each takes little time here: what takes longer runs in a task and comes back as a [`Happening`].

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use tracing::warn;

use super::{Happening, Part, Worker, chain};
use crate::control::PodHandle;
use crate::kubelet::container::{Launch, Process, exit_code};
use crate::kubelet::lifecycle::{Action, Event};
use crate::kubelet::network::Attachment;
use crate::kubelet::probe::{Health, Kind};
use crate::kubelet::prober::{self, Origin};
use crate::kubelet::{env, logs, spec};
use crate::{cgroup, netns};

/// How long a pod's leftover processes may take to end.
const CGROUP_PATIENCE: Duration = Duration::from_secs(10);

impl Worker {
    pub(super) async fn perform(&mut self, action: Action) {
        match action {
            Action::CreateNetwork => self.create_network(),
            Action::RemoveNetwork => self.remove_network(),
            Action::Start(at) => {
                if let Err(message) = self.start(at).await {
                    self.node.event(&self.pod, "Failed", &message);
                    self.facts.containers[at].refused = Some(message);
                    let event = Event::Exited {
                        container: at,
                        success: false,
                    };
                    self.state.on(&self.view, event, self.now());
                }
            }
            Action::PreStop(at) => self.pre_stop(at),
            Action::Terminate(at) => {
                if let Some(process) = &self.parts[at].process {
                    process.terminate();
                }
            }
            Action::Kill(at) => {
                if let Some(Err(error)) = self.parts[at].process.as_ref().map(Process::kill) {
                    warn!(pod = self.name(), %error, "cannot kill a container");
                }
            }
            Action::RemoveObject => self.remove_object(),
        }
    }

    fn attachment(&self) -> Attachment {
        Attachment {
            netns: self.node.sandbox.pod_netns(self.uid()),
            container_id: self.uid().into(),
            namespace: self.namespace().into(),
            name: self.name().into(),
        }
    }

    fn netns(&self) -> PathBuf {
        if spec::is_host_network(&self.pod) {
            netns::path(&self.node.plan.netns)
        } else {
            netns::path(&self.node.sandbox.pod_netns(self.uid()))
        }
    }

    fn cgroup(&self) -> PathBuf {
        self.node.sandbox.pod_cgroup(&self.node.plan.name, self.uid())
    }

    fn create_network(&self) {
        let tell = self.tell();
        if spec::is_host_network(&self.pod) {
            return tell(Happening::NetworkUp(vec![IpAddr::V4(self.node.plan.address)]));
        }
        let (plugin, attachment) = (self.node.plugin.clone(), self.attachment());
        tokio::spawn(async move {
            tell(match plugin.add(&attachment).await {
                Ok(ips) => Happening::NetworkUp(ips),
                Err(error) => Happening::NetworkFailed(chain(&error)),
            });
        });
    }

    fn remove_network(&self) {
        let (plugin, attachment, group) = (self.node.plugin.clone(), self.attachment(), self.cgroup());
        let host_network = spec::is_host_network(&self.pod);
        let tell = self.tell();
        tokio::spawn(async move {
            let result = async {
                // Processes that commands of people started in the pod go with it.
                cgroup::remove(&group, CGROUP_PATIENCE)
                    .await
                    .map_err(|error| error.to_string())?;
                if host_network {
                    return Ok(());
                }
                plugin.remove(&attachment).await.map_err(|error| chain(&error))
            };
            tell(
                result
                    .await
                    .map_or_else(Happening::RemoveFailed, |()| Happening::NetworkGone),
            );
        });
    }

    fn remove_object(&self) {
        let tell = self.tell();
        if self.gone {
            return tell(Happening::ObjectGone);
        }
        let (api, name) = (self.api(), self.name().to_owned());
        let uid = Some(self.uid().to_owned());
        tokio::spawn(async move {
            let preconditions = Some(Preconditions {
                uid,
                resource_version: None,
            });
            let params = DeleteParams {
                preconditions,
                ..DeleteParams::default().grace_period(0)
            };
            tell(match api.delete(&name, &params).await {
                Ok(_) => Happening::ObjectGone,
                // Gone already, or another pod has its name now.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                    Happening::ObjectGone
                }
                Err(error) => Happening::ObjectFailed(error.to_string()),
            });
        });
    }

    async fn start(&mut self, at: usize) -> Result<(), String> {
        let part = &mut self.parts[at];
        part.run += 1;
        let run = part.run;
        if run > 1 {
            self.facts.containers[at].restarts += 1;
        }
        let container = spec::containers(&self.pod)[at].0.clone();
        let launch = self.launch(&container).await?;
        let pod_dir = self.node.sandbox.pod_dir(self.uid());
        std::fs::create_dir_all(&pod_dir)
            .map_err(|error| format!("cannot make {}: {error}", pod_dir.display()))?;
        let tell = self.tell();
        let process = launch.start(logs::file(&pod_dir, &container.name), move |status| {
            let (code, signal) = exit_code(&status);
            tell(Happening::Exited {
                at,
                run,
                code,
                signal,
            });
        });
        let process =
            process.map_err(|error| format!("cannot start `{}`: {error}", launch.argv.join(" ")))?;
        let period = spec::probe_period(&self.pod);
        let probe = |probe: &Option<_>| probe.as_ref().map(|probe| prober::spec(probe, period));
        let health = Health::new(
            probe(&container.startup_probe),
            probe(&container.readiness_probe),
            probe(&container.liveness_probe),
            self.now(),
        );
        let known = &mut self.facts.containers[at];
        known.refused = None;
        known.started_at = Some(Timestamp::now());
        known.id = Some(format!("sandbox://{}-{run}", container.name));
        self.node
            .pods
            .set_running(&self.node.plan.cluster, &self.pod, &container.name, true);
        self.parts[at] = Part {
            run,
            process: Some(process),
            launch,
            health,
        };
        self.publish_handle();
        Ok(())
    }

    async fn launch(&self, container: &Container) -> Result<Launch, String> {
        let services: Api<Service> = Api::namespaced(self.node.client.clone(), self.namespace());
        let services = services.list(&ListParams::default()).await;
        let services = services
            .map_err(|error| format!("cannot list services: {error}"))?
            .items;
        let facts = env::Facts {
            pod: &self.pod,
            pod_ips: &self.facts.ips,
            host_ip: &self.facts.host_ip,
            services: &services,
        };
        let env = env::environment(facts, container)?;
        Ok(Launch {
            argv: env::command_line(container, &env)?,
            env,
            directory: container.working_dir.clone().map(PathBuf::from),
            netns: self.netns(),
            cgroup: self.cgroup().join(&container.name),
        })
    }

    pub(super) fn publish_handle(&self) {
        let env = self.parts.iter().rev().find(|part| part.process.is_some());
        let handle = PodHandle {
            netns: self.netns(),
            cgroup: self.cgroup().join("exec"),
            env: env.map(|part| part.launch.env.clone()).unwrap_or_default(),
            ips: self.facts.ips.clone(),
        };
        self.node.pods.publish(&self.node.plan.cluster, &self.pod, handle);
    }

    fn origin(&self) -> Option<Origin> {
        let pod_ip = self.facts.ips.first()?.parse().ok()?;
        Some(Origin {
            node_netns: netns::path(&self.node.plan.netns),
            pod_ip,
        })
    }

    fn pre_stop(&self, at: usize) {
        let tell = self.tell();
        let run = self.parts[at].run;
        let container = spec::containers(&self.pod)[at].0;
        let hook = container
            .lifecycle
            .as_ref()
            .and_then(|hooks| hooks.pre_stop.as_ref());
        let (Some(hook), Some(origin)) = (hook, self.origin()) else {
            return tell(Happening::PreStopDone {
                at,
                run,
                result: Ok(()),
            });
        };
        let check = prober::of_handler(hook, container, &origin);
        let (launch, timeout) = (self.parts[at].launch.clone(), self.view.grace);
        tokio::spawn(async move {
            let result = prober::run(check, launch, timeout).await;
            tell(Happening::PreStopDone { at, run, result });
        });
    }

    /// Starts the probes that are due.
    pub(super) fn probe(&mut self) {
        let (now, origin, tell) = (self.now(), self.origin(), Arc::new(self.tell()));
        let Some(origin) = origin else { return };
        let containers = spec::containers(&self.pod);
        for (at, part) in self
            .parts
            .iter_mut()
            .enumerate()
            .filter(|(_, part)| part.process.is_some())
        {
            for (kind, timeout) in part.health.begin_due(now) {
                let container = containers[at].0;
                let probe = match kind {
                    Kind::Startup => &container.startup_probe,
                    Kind::Readiness => &container.readiness_probe,
                    Kind::Liveness => &container.liveness_probe,
                };
                let Some(probe) = probe else { continue };
                let check = prober::of_probe(probe, container, &origin);
                let (launch, run, tell) = (part.launch.clone(), part.run, Arc::clone(&tell));
                tokio::spawn(async move {
                    let result = prober::run(check, launch, timeout).await;
                    tell(Happening::Probed {
                        at,
                        run,
                        kind,
                        result,
                    });
                });
            }
        }
    }
}
