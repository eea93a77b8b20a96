"""Names of `vllm`, of which Sensorium has no equal at the same path."""
