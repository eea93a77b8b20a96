"""Holds outputs to grammars: compiles them and computes which tokens may come next, in processes of their own.

    engine core  --compile-->  checker: tries each grammar in a child that may hang, grow or crash
    engine core  --rows, tokens-->  mask server: one matcher for each constrained request
    worker       <--masks---------  (shared memory, computed while the model runs; see `sensorium.token_masks`)

The library that does the work (llguidance) is written in Rust and fast, but a compile can't be interrupted, and some
grammars make it overflow its stack, take all memory or not come back. Nothing of that reaches the engine here, and
neither does the second that a large vocabulary takes to index, with Python's lock held.
"""
