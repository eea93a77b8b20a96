"""Routes of models that make vectors and scores: `/v1/embeddings`, `/classify`, `/score`, `/rerank`, `/pooling`."""
