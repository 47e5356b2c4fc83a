"""Plain data shared by all packages: requests, steps, outputs. The lowest package: no torch, no sockets."""
