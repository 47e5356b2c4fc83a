"""Requests, blocks, scheduler, step and the loop that drives them."""
