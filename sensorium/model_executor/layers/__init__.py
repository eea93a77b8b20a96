"""Layers that model files are made of. They know nothing of requests, and hide devices, kernels and weight layouts."""
