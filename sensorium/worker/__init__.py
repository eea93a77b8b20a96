"""One device: its model, its memory, its steps."""
