"""Names of `vllm.model_executor.layers`."""
