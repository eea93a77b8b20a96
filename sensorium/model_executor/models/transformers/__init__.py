"""Any architecture of Hugging Face transformers, by its own modules, in this engine's flat batch and paged cache.

Nothing here knows an architecture. What a model is like shows when its modules run:

- `weights`: Hugging Face's own loading;
- `interface`: what transformers' attention functions and mask functions are replaced by;
- `mask_rules`: reads from a mask function what a position sees;
- `mixers`: finds modules that keep something of a sequence by themselves, such as a recurrence's state;
- `by_sequence`: runs those one sequence at a time, over the engine's caches, in a flat batch;
- `position_tables`: stands in for modules that count rows, where a decoder takes no positions;
- `discovery`: a few short passes that find the attention calls, and the module that holds them all (the trunk);
- `trunk`: hidden states without logits, and logits of chosen rows;
- `flat`, `by_request`: the two ways to run a model;
- `packing`, `norms`: its linear layers and norms by the kernels of this engine;
- `model`: the class that the engine runs.

Which way is right is decided at load against the untouched model (`sensorium.worker.transformers_tiers`).
"""
