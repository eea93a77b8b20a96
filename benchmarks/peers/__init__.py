"""Other engines on the same workload; see `benchmarks/side_by_side.py`."""
