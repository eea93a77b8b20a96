"""Chat messages to prompts, and answers taken apart: the checkpoint's template, its media and its tools."""
