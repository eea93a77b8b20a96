"""Runs any architecture by its own modules of Hugging Face transformers, with this engine's flat batch and paged cache.

Nothing here knows an architecture. A model's properties are found by running its modules:

- `weights`: Hugging Face's own loading; - `interface`: the functions that replace transformers' attention and mask
functions; - `mask_rules`: finds the rule of a mask function, which says what a position sees; - `mixers`: finds modules
with their own cache of a sequence, such as a recurrence's state; - `by_sequence`: runs those one sequence at a time,
over the engine's caches, in a flat batch; - `position_tables`: replaces modules that count rows, in decoders that take
no positions; - `discovery`: a few short passes that find the attention calls, and the module that holds them all (the
trunk); - `trunk`: hidden states without logits, and logits of chosen rows; - `flat`, `by_request`: the two ways to run
a model; - `packing`, `norms`: its linear layers and norms by the kernels of this engine; - `model`: the class that the
engine runs.

The way is chosen at load, by comparison with the untouched model (`sensorium.worker.transformers_tiers`).
"""
