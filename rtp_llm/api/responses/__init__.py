"""OpenAI's Responses API (platform.openai.com/docs/api-reference/responses)."""
