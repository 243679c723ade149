//! Operator core, being assembled.
pub mod allocator;
pub mod state;
