"""The engine: its arguments, the core loop, and the classes by which callers drive it."""
