"""`sensorium verify`: what a model computes here, compared with what Hugging Face computes with the same weights.

`cases` makes the prompts, `reference` asks Hugging Face, `ways` runs the engine whole, in chunks, in batches, from its
caches and preempted; `verdict` compares, and `layers` finds where two models part. `run.verify` joins them.
"""
