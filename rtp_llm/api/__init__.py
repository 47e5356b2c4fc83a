"""HTTP: OpenAI and native endpoints in front of the engine. Never imports torch."""
