"""Engines that run in a process of their own, perhaps in another Python. Nothing here imports the rest of rtp_llm but
`offline`, which is our own engine.
"""
