//! Merges clusters into desired state and plans ordered map operations.
