"""Names of `vllm.attention.ops`."""
