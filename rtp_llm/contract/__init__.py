"""Plain data that several packages use: requests, steps, outputs. The lowest package: no torch, no sockets."""
