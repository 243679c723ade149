//! Layouts against the version, and the calculations that BPF shares.

use core::mem::offset_of;

use super::*;

/// FNV-1a over every number that makes up the layouts: a change of any of them changes it.
fn layout_fingerprint() -> u64 {
    let numbers = [
        offset_of!(ServiceKey, port),
        offset_of!(ServiceKey, slot),
        offset_of!(ServiceKey, proto),
        offset_of!(ServiceKey, scope),
        size_of::<ServiceKey>(),
        offset_of!(ServiceValue, service_id),
        offset_of!(ServiceValue, count),
        offset_of!(ServiceValue, flags),
        size_of::<ServiceValue>(),
        size_of::<BackendKey>(),
        offset_of!(Backend, port),
        offset_of!(Backend, proto),
        offset_of!(Backend, state),
        offset_of!(Backend, cluster_id),
        offset_of!(Backend, zone),
        size_of::<Backend>(),
        offset_of!(ReverseSkKey, address),
        offset_of!(ReverseSkKey, port),
        offset_of!(ReverseSkKey, proto),
        size_of::<ReverseSkKey>(),
        offset_of!(ReverseSkValue, service_id),
        offset_of!(ReverseSkValue, port),
        size_of::<ReverseSkValue>(),
        offset_of!(IpcacheKey, cluster_id),
        offset_of!(IpcacheKey, family),
        offset_of!(IpcacheKey, address),
        size_of::<IpcacheKey>(),
        offset_of!(IpcacheValue, tunnel_endpoint),
        offset_of!(IpcacheValue, key),
        offset_of!(IpcacheValue, flags),
        size_of::<IpcacheValue>(),
        size_of::<EndpointKey>(),
        offset_of!(Endpoint, endpoint_id),
        offset_of!(Endpoint, identity),
        offset_of!(Endpoint, flags),
        offset_of!(Endpoint, pod_mac),
        offset_of!(Endpoint, host_mac),
        size_of::<Endpoint>(),
        offset_of!(NodeConfig, node_ipv6),
        offset_of!(NodeConfig, router_ipv4),
        offset_of!(NodeConfig, router_ipv6),
        offset_of!(NodeConfig, vxlan_ifindex),
        offset_of!(NodeConfig, node_identity),
        offset_of!(NodeConfig, features),
        offset_of!(NodeConfig, cluster_id),
        offset_of!(NodeConfig, maglev_table_size),
        offset_of!(NodeConfig, snat_port_min),
        offset_of!(NodeConfig, snat_port_max),
        offset_of!(NodeConfig, tunnel_port),
        size_of::<NodeConfig>(),
        offset_of!(CtKey, destination),
        offset_of!(CtKey, source_port),
        offset_of!(CtKey, destination_port),
        offset_of!(CtKey, proto),
        size_of::<CtKey>(),
        offset_of!(CtValue, nat_port),
        offset_of!(CtValue, state),
        offset_of!(CtValue, flags),
        offset_of!(CtValue, last_seen),
        offset_of!(CtValue, backend_id),
        offset_of!(CtValue, service_id),
        offset_of!(CtValue, peer_address),
        offset_of!(CtValue, peer_port),
        offset_of!(CtValue, ifindex),
        size_of::<CtValue>(),
        offset_of!(FragmentKey, destination),
        offset_of!(FragmentKey, id),
        offset_of!(FragmentKey, proto),
        size_of::<FragmentKey>(),
        offset_of!(FragmentValue, destination_port),
        offset_of!(MaglevKey, chunk),
        MAGLEV_CHUNK as usize,
        offset_of!(AffinityKey, service_id),
        offset_of!(AffinityKey, kind),
        offset_of!(AffinityValue, backend_id),
        offset_of!(SourceRangeKey, service_id),
        offset_of!(SourceRangeKey, address),
        offset_of!(Device, ipv6),
        offset_of!(PrefixKey, address),
        size_of::<MetricsValue>(),
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    for number in numbers {
        eat(number as u8);
    }
    for spec in maps::ALL {
        spec.name.bytes().for_each(&mut eat);
        for number in [
            spec.kind as u32,
            spec.key_size,
            spec.value_size,
            spec.max_entries,
            spec.flags,
        ] {
            number.to_le_bytes().into_iter().for_each(&mut eat);
        }
    }
    hash
}

#[test]
fn layout_change_needs_a_new_version() {
    assert_eq!(
        (ABI_VERSION, layout_fingerprint()),
        (3, 7_912_464_920_063_524_597),
        "a layout, map name or size changed: bump ABI_VERSION, then write both new numbers here"
    );
}

#[test]
fn every_slot_is_reached_and_none_beyond() {
    for count in [1u16, 2, 3, 255, 256, 10_000, u16::MAX] {
        assert_eq!(pick_slot(0, count), 1, "count {count}");
        assert_eq!(pick_slot(u32::MAX, count), count, "count {count}");
    }
    let mut seen = [0u32; 4];
    for step in 0..1000u32 {
        seen[pick_slot(step.wrapping_mul(4_294_967), 4) as usize - 1] += 1;
    }
    assert!(seen.iter().all(|&hits| hits.abs_diff(250) <= 2), "{seen:?}");
}

#[test]
fn flow_hash_is_stable_and_spreads() {
    let frontend = ipv4_mapped([10, 96, 0, 10]);
    assert_eq!(flow_hash(7, &frontend, [0, 53]), flow_hash(7, &frontend, [0, 53]));
    let mut seen = [0u32; 8];
    for cookie in 0..8_000u64 {
        seen[pick_slot(flow_hash(cookie, &frontend, [0, 53]), 8) as usize - 1] += 1;
    }
    assert!(seen.iter().all(|&hits| (850..1150).contains(&hits)), "{seen:?}");
}

#[test]
fn next_slot_walks_all_slots() {
    let mut slot = pick_slot(3_000_000_000, 5);
    let mut seen = [false; 5];
    for _ in 0..5 {
        seen[slot as usize - 1] = true;
        slot = next_slot(slot, 5);
    }
    assert_eq!(seen, [true; 5]);
    assert_eq!(next_slot(9, 5), 1, "the count shrank");
    assert_eq!(next_slot(1, 1), 1);
}

#[test]
fn ipcache_host_key_keeps_the_family_apart() {
    let four = IpcacheKey::host(&ipv4_mapped([10, 1, 0, 5]));
    assert_eq!(
        (four.prefix_len, four.family, four.address[..4].as_ref()),
        (64, FAMILY_IPV4, [10, 1, 0, 5].as_ref())
    );
    assert_eq!(four.address[4..], [0; 12]);
    let mut six = [0; 16];
    six[0] = 0xfd;
    six[15] = 5;
    let six_key = IpcacheKey::host(&six);
    assert_eq!(
        (six_key.prefix_len, six_key.family, six_key.address),
        (160, FAMILY_IPV6, six)
    );
    assert_eq!(
        (four.address_bits(), six_key.address_bits()),
        (Some(32), Some(128))
    );
    assert_eq!(
        IpcacheKey {
            prefix_len: 65,
            ..four
        }
        .address_bits(),
        None
    );
    assert_eq!(
        IpcacheKey {
            prefix_len: 31,
            ..four
        }
        .address_bits(),
        None
    );
}

#[test]
fn tunnel_value_says_its_family() {
    let four = IpcacheValue::tunnel(
        65_537,
        ipv4_mapped([192, 0, 2, 1]),
        0,
        ipcache_flag::REMOTE_CLUSTER,
    );
    assert_eq!(
        four.flags,
        ipcache_flag::HAS_TUNNEL_ENDPOINT | ipcache_flag::REMOTE_CLUSTER
    );
    let mut address = [0; 16];
    address[0] = 0x20;
    let six = IpcacheValue::tunnel(65_537, address, 0, 0);
    assert_eq!(
        six.flags,
        ipcache_flag::HAS_TUNNEL_ENDPOINT | ipcache_flag::TUNNEL_ENDPOINT_IPV6
    );
}

#[test]
fn reasons_are_numbered_without_gaps_and_fit() {
    for (index, reason) in DropReason::ALL.iter().enumerate() {
        assert_eq!(*reason as usize, index);
        for direction in Direction::ALL {
            let at = metric_index(*reason, direction);
            assert!(at < maps::METRICS.max_entries);
            assert_eq!(metric_of(at), Some((*reason, direction)));
        }
    }
    assert_eq!(metric_of(DropReason::ALL.len() as u32 * DIRECTIONS), None);
}

#[test]
fn maglev_position_covers_the_table_and_no_more() {
    let size = MAGLEV_TABLE_SIZE_DEFAULT;
    assert_eq!(maglev_position(0, size), (0, 0));
    assert_eq!(maglev_position(size - 1, size), (127, 124));
    assert_eq!(maglev_position(size, size), (0, 0));
    let (chunk, element) = maglev_position(u32::MAX, size);
    assert!(chunk < size.div_ceil(MAGLEV_CHUNK) && element < MAGLEV_CHUNK);
}

#[test]
fn affinity_lies_in_slot_0() {
    let value = ServiceValue::frontend(3, 2, service_flag::CLUSTER_IP).with_affinity(10_800);
    assert_eq!((value.affinity_seconds(), value.count), (10_800, 2));
    assert_eq!(value.flags, service_flag::CLUSTER_IP | service_flag::AFFINITY);
}

#[test]
fn affinity_holds_for_its_seconds_and_no_longer() {
    for last_used in [100, u32::MAX - 5] {
        let value = AffinityValue {
            last_used,
            backend_id: 7,
        };
        let at = |after: u32| affinity_holds(&value, 10, last_used.wrapping_add(after));
        assert_eq!((at(0), at(10), at(11), at(1 << 30)), (true, true, false, false));
        assert!(at(u32::MAX), "a clock that was read a second ago");
    }
}
