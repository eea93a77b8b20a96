"""Chat messages to prompts, by the checkpoint's template; their media and tools; and how answers are parsed."""
