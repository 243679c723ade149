//! Removes everything of a node, for uninstalling. Stopping an agent does none of this.
//!
//! In: the bpf root. Out: nothing left, or the list of what could not be removed; one failure stops nothing.

use std::{fs, io, path::Path};

use crate::{
    device::{self, DeviceError},
    links::{self, AttachError},
    pins,
    programs::{PacketHook, remove_folder},
    routes::{self, RouteError},
};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum TeardownError {
    /// A hook.
    #[error(transparent)]
    Detach(#[from] AttachError),
    /// A pin or folder.
    #[error("removing {path}")]
    Remove {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VXLAN device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The routes.
    #[error(transparent)]
    Routes(#[from] RouteError),
}

/// Removes links, programs and maps below `bpf_root`, which stays mounted. Returns what could not be.
pub fn remove_bpf(bpf_root: &Path) -> Vec<TeardownError> {
    let mut errors = Vec::new();
    for hook in PacketHook::ALL {
        for ifindex in links::attached_devices(bpf_root, hook).unwrap_or_default() {
            errors.extend(
                links::detach_packet_hook(bpf_root, hook, ifindex)
                    .err()
                    .map(TeardownError::from),
            );
        }
    }
    errors.extend(
        links::detach_socket_hooks(bpf_root)
            .err()
            .map(TeardownError::from),
    );
    let programs = pins::programs_dir(bpf_root);
    let objects = pins::names(&programs)
        .unwrap_or_default()
        .into_iter()
        .map(|name| programs.join(name));
    let folders = [pins::links_dir(bpf_root)]
        .into_iter()
        .chain(objects)
        .chain([programs.clone(), pins::maps_dir(bpf_root)]);
    for folder in folders {
        if let Err(source) = remove_folder(&folder) {
            errors.push(TeardownError::Remove {
                path: folder.display().to_string(),
                source,
            });
        }
    }
    let root = pins::root_dir(bpf_root);
    let removed = pins::remove(&root.join("abi")).and_then(|()| match fs::remove_dir(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    if let Err(source) = removed {
        errors.push(TeardownError::Remove {
            path: root.display().to_string(),
            source,
        });
    }
    errors
}

/// Removes routes and the VXLAN device in the network namespace of `netlink`, then all of [`remove_bpf`].
pub async fn remove_all(netlink: &rtnetlink::Handle, bpf_root: &Path) -> Vec<TeardownError> {
    let mut errors = Vec::new();
    match routes::dump(netlink).await {
        Ok(actual) => {
            let plan = routes::plan(&actual, &Default::default());
            errors.extend(
                routes::apply(netlink, &plan)
                    .await
                    .into_iter()
                    .map(TeardownError::from),
            );
        }
        Err(error) => errors.push(error.into()),
    }
    errors.extend(device::remove_vxlan(netlink).await.err().map(TeardownError::from));
    errors.extend(remove_bpf(bpf_root));
    errors
}
