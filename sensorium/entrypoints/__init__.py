"""How people reach the engine: `LLM` in a script, later a command line and a server."""
