"""Plain data that crosses packages: requests, steps, outputs. No torch, no sockets."""
