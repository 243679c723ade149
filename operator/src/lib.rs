//! Publishes one cluster's networking state.
