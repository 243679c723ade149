//! Which backend of a frontend: follows frontend, slot, backend.

use isthmus_bpf_abi::{Backend, DropReason, SELECT_TRIES_MAX, ServiceKey, next_slot, pick_slot};

use crate::tables;

/// What the tables say about a frontend.
pub enum Selection {
    /// No frontend has this address, port and protocol.
    NotAService,
    /// Go there.
    Backend {
        /// Where.
        backend: Backend,
        /// The service's.
        service_id: u32,
    },
    /// A frontend, but nowhere to go.
    Nowhere(DropReason),
}

/// Chooses by `number`, the same for the same. `usable` says why a backend cannot be taken.
///
/// A miss on the way means that the agent is just changing the service: start again at the frontend, which may have
/// another count by then, and take the next slot; a bounded number of times.
#[inline(always)]
pub fn select(
    frontend: &ServiceKey,
    number: impl Fn() -> u32,
    mut usable: impl FnMut(u32, &Backend) -> Result<(), DropReason>,
) -> Selection {
    let mut reason = DropReason::BackendGone;
    let mut slot_number = 0;
    for attempt in 0..SELECT_TRIES_MAX {
        let Some(service) = tables::service(frontend) else {
            // Gone between two tries: it was one when the call began, and its address still leads nowhere.
            return if attempt == 0 {
                Selection::NotAService
            } else {
                Selection::Nowhere(DropReason::BackendGone)
            };
        };
        if service.count == 0 {
            return Selection::Nowhere(DropReason::NoBackend);
        }
        slot_number = if attempt == 0 {
            pick_slot(number(), service.count)
        } else {
            next_slot(slot_number, service.count)
        };
        let Some(slot) = tables::service(&frontend.at_slot(slot_number)) else {
            continue;
        };
        if slot.service_id != service.service_id {
            continue;
        }
        let Some(backend) = tables::backend(slot.backend_id) else {
            continue;
        };
        if let Err(why) = usable(slot.backend_id, &backend) {
            reason = why;
            continue;
        }
        return Selection::Backend {
            backend,
            service_id: service.service_id,
        };
    }
    Selection::Nowhere(reason)
}
