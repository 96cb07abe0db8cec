"""Token ids in, token ids out: continuous batching of requests that each bring their own adapter."""
