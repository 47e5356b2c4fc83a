"""The HTTP API in front of the engine: OpenAI's endpoints, and those of alibaba/rtp-llm ("native").

The engine is the scheduler loop on rank 0. This package never imports torch.
"""
