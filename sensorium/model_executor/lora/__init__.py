"""Low-rank adapters beside a loaded model: their tensors, the layers that these belong to, and what layers add."""
