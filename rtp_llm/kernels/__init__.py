"""The interface of attention backends, its reference implementation in torch, and a prepacked linear for CPU."""
