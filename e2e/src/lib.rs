//! End-to-end tests on the sandbox.
