"""How people reach the engine: `LLM` in a script, the command line, and the server."""
