"""Layers of a decoder, sharded over the tensor-parallel group, and the sampler."""
