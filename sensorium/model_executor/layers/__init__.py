"""The layers of model files. They are independent of requests, and hide devices, kernels and weight layouts."""
