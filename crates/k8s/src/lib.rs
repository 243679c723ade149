//! Annotations, and Kubernetes objects to the model.
