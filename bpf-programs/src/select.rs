//! Which backend of a frontend: the one that its client stays on, the one that the service's Maglev table has for the flow, or
//! the one in a slot.

use isthmus_bpf_abi::{
    AffinityKey, AffinityValue, Backend, DropReason, SCOPE_INTERNAL, SELECT_TRIES_MAX, ServiceKey,
    ServiceValue, affinity_holds, backend_state, maglev_position, next_slot, pick_slot, service_flag,
};

use crate::{ct, tables};

/// What the tables say about a frontend.
pub enum Selection {
    /// No frontend has this address, port and protocol.
    NotAService,
    /// Go where `usable` was last asked about.
    Backend {
        /// The service's number.
        service_id: u32,
    },
    /// A frontend, but nowhere to go.
    Nowhere(DropReason),
}

/// Who asks for what.
pub struct Request<'a> {
    /// The frontend. Becomes that for traffic from inside the cluster, where the two differ.
    pub frontend: &'a mut ServiceKey,
    /// Who asks. The service's number is filled in here.
    pub client: &'a mut AffinityKey,
    /// The flow's number, if it has one that is the same on every node: then Maglev tables are asked.
    pub flow: Option<u32>,
    /// Whether the request comes from outside the cluster.
    pub outside: bool,
}

/// Chooses a backend; among slots by `number`, the same for the same. `usable` says why a backend cannot be taken.
#[inline(always)]
pub fn select(
    request: &mut Request<'_>,
    number: impl Fn() -> u32,
    mut usable: impl FnMut(u32, &Backend) -> Result<(), DropReason>,
) -> Selection {
    let Some(mut service) = tables::service(request.frontend) else {
        return Selection::NotAService;
    };
    // What is kept on this node is traffic from outside; who asks inside the cluster may go everywhere.
    if !request.outside && service.flags & service_flag::EXTERNAL_LOCAL != 0 {
        let inside = ServiceKey {
            scope: SCOPE_INTERNAL,
            ..*request.frontend
        };
        if let Some(all) = tables::service(&inside) {
            service = all;
            *request.frontend = inside;
        }
    }
    if service.count == 0 {
        return Selection::Nowhere(DropReason::NoBackend);
    }
    let sticks = service.flags & service_flag::AFFINITY != 0;
    if sticks {
        request.client.service_id = service.service_id;
        if let Some((id, backend)) = kept(request.client, &service)
            && usable(id, backend).is_ok()
        {
            return Selection::Backend {
                service_id: service.service_id,
            };
        }
    }
    let mut chosen = 0;
    let mut note = |id, backend: &Backend| {
        chosen = id;
        usable(id, backend)
    };
    let found = by_table(request, &service, &mut note) || {
        match by_slot(request.frontend, number, &mut note) {
            Ok(()) => true,
            Err(reason) => return Selection::Nowhere(reason),
        }
    };
    if sticks && found {
        let value = AffinityValue {
            last_used: ct::now(),
            backend_id: chosen,
        };
        // Without memory for it the client may get another backend next time.
        tables::remember_client(request.client, &value);
    }
    Selection::Backend {
        service_id: service.service_id,
    }
}

/// The backend that the client stays on, with its number. Backends are a service's own, so one that is there and takes new
/// flows is one of this service.
#[inline(always)]
fn kept(client: &AffinityKey, service: &ServiceValue) -> Option<(u32, &'static Backend)> {
    let entry = tables::client(client)?;
    let now = ct::now();
    // SAFETY: the value lives until the program ends. Programs on other CPUs write it too, each what it saw last.
    let (value, last_used) = unsafe { (*entry, &raw mut (*entry).last_used) };
    if !affinity_holds(&value, service.affinity_seconds(), now) {
        return None;
    }
    let backend = tables::backend(value.backend_id)?;
    if backend.state != backend_state::ACTIVE {
        return None;
    }
    if value.last_used != now {
        // SAFETY: as above.
        unsafe { *last_used = now };
    }
    Some((value.backend_id, backend))
}

/// Asks the service's Maglev table. Returns whether it has one and the backend there can be used.
#[inline(always)]
fn by_table(
    request: &Request<'_>,
    service: &ServiceValue,
    usable: &mut impl FnMut(u32, &Backend) -> Result<(), DropReason>,
) -> bool {
    let Some(flow) = request.flow else {
        return false;
    };
    let size = tables::config().map_or(0, |config| config.maglev_table_size);
    if service.flags & service_flag::MAGLEV == 0 || size == 0 {
        return false;
    }
    let (chunk, element) = maglev_position(flow, size);
    let id = tables::maglev_chunk(service.service_id, chunk)
        .and_then(|chunk| chunk.backend_ids.get(element as usize))
        .map_or(0, |id| *id);
    tables::backend(id).is_some_and(|backend| usable(id, backend).is_ok())
}

/// Follows frontend, slot, backend.
///
/// A miss on the way means that the agent is just changing the service: start again at the frontend, which may have
/// another count by then, and take the next slot; a bounded number of times.
#[inline(always)]
fn by_slot(
    frontend: &ServiceKey,
    number: impl Fn() -> u32,
    usable: &mut impl FnMut(u32, &Backend) -> Result<(), DropReason>,
) -> Result<(), DropReason> {
    let mut reason = DropReason::BackendGone;
    let mut slot_number = 0;
    for attempt in 0..SELECT_TRIES_MAX {
        let Some(service) = tables::service(frontend) else {
            // Gone between two looks: it was one when the call began, and its address still leads nowhere.
            return Err(DropReason::BackendGone);
        };
        if service.count == 0 {
            return Err(DropReason::NoBackend);
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
        match usable(slot.backend_id, backend) {
            Ok(()) => return Ok(()),
            Err(why) => reason = why,
        }
    }
    Err(reason)
}
