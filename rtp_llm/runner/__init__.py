"""Device work of one rank: weights, KV cache, and the execution of steps."""
