"""The interface of attention backends, its reference implementation in torch, linear methods, and fused operations."""
