"""Names of `vllm.model_executor.models`: a module for each model whose parts files import, with V0's constructors."""
