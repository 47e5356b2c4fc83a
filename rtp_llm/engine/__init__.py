"""KV blocks, scheduler, step builder, and the loops that run them."""
