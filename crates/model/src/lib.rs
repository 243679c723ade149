//! Domain values that cannot be wrong: ids, names, labels, addresses, services, nodes.
