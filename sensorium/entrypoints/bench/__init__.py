"""Benchmarks: random workloads, a light load generator, statistics, charts. Commands are in `entrypoints/cli`."""
