"""Attention backends (interface, torch reference, native CPU backend), linear methods, and fused operations."""
