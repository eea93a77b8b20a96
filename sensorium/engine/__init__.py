"""The engine: arguments, the core loop, and the faces that callers drive it by."""
