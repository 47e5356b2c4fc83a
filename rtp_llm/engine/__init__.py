"""Scheduling on rank 0 (KV blocks, scheduler, step builder), and the main loops of all ranks."""
