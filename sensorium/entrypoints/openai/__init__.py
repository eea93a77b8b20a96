"""The HTTP server: OpenAI's routes over `AsyncLLMEngine`."""
