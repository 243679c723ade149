//! Keys, values, events and constants that BPF and user side share.
#![no_std]
