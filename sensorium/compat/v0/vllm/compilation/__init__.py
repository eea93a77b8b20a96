"""Names of `vllm.compilation`."""
