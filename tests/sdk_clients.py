"""Clients of OpenAI's and Anthropic's SDKs for servers on this machine. Close them, or use them in a `with`."""

from typing import Any

import anthropic
import openai


def openai_client(url: str, **options: Any) -> openai.OpenAI:
    """Returns a client for the server at `url` (without /v1) that does not retry; `options` override that."""
    transport = openai.DefaultHttpxClient(trust_env=False)  # no proxy
    defaults = {"api_key": "none", "max_retries": 0, "timeout": 60, "http_client": transport}
    return openai.OpenAI(base_url=f"{url}/v1", **{**defaults, **options})


def anthropic_client(url: str) -> anthropic.Anthropic:
    """Returns a client for the server at `url` that does not retry."""
    transport = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60, http_client=transport)
