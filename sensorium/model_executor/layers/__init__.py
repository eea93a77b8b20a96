"""The layers that model files are built from. They know nothing of requests, and hide devices, kernels and weight
layouts."""
