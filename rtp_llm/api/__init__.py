"""The HTTP API: OpenAI's endpoints, and those of alibaba/rtp-llm ("native"), in front of the engine.

The engine is the scheduler loop on rank 0. This package never imports torch.
"""
