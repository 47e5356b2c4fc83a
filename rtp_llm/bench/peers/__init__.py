"""Engines to measure, each run by a module in a process of its own, possibly with another Python interpreter.

So that any Python with the engine can run them, the modules import nothing else of rtp_llm than `bench.record` and
`bench.peers.worker`. The exception is `offline`, which runs this project's engine.
"""
