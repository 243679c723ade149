//! A Kubernetes API emulator with the controllers that a small cluster needs.
