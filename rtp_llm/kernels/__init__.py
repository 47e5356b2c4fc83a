"""The interface of attention backends, its reference implementation in torch, and linear layers with prepacked
weights for CPU."""
