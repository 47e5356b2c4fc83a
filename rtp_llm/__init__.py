"""rtp-llm: an appliance that serves large language models tensor-parallel."""

__version__ = "0.1.0"
