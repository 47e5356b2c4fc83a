"""rtp-llm: a server for large language models with tensor parallelism and an OpenAI-compatible HTTP API."""

__version__ = "0.1.0"
