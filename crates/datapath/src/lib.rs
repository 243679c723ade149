//! Loads, pins, attaches; batch map calls.
