"""What operators see of a router: metrics, the access log, traces. Not here: what is decided by any of it."""
