"""Engines that run in processes of their own, possibly with another Python. Modules here do not import the rest of
rtp_llm, except `offline`, which is this project's engine.
"""
