"""Models: their layers, their weights, and the adapter that calls each by its own signature."""
