"""Model files of vLLM 0.6 (0.6.3 to 0.6.6) run unchanged as plug-ins. This room has the names that they import.

It has no engine logic: each name is Sensorium's own thing, or a façade over it that takes the arguments of V0.

How a file that is loaded as a plug-in (and no other) sees modules:

    from vllm.a.b import X      1. sensorium/compat/v0/vllm/a/b.py, if it has X
                                2. sensorium/a/b.py, if it has X; of model_executor/models only the modules in `SHARED`
                                3. an ImportError that says what to use instead
    from .b import X            a file b.py beside it, else as vllm.model_executor.models.b
    from transformers.a import X    as ever; of names that have gone, what `moved.MOVED` says
    from xformers.ops import X  sensorium/compat/v0/xformers/ops.py; likewise flash_attn

So `sensorium/compat/v0/vllm` mirrors the modules of `vllm`, one small file for each, with those names only that
Sensorium doesn't have in the module of the same path, or has with another meaning. A model (`models/llama.py`) is a
module of its own here and hides Sensorium's file of that name, since constructors differ. Where a name can be
imported for no good, `absent.REASONS` says what to use.

`importing` has the mechanism. A real vllm that is installed is what every other file gets that says `import vllm`.
"""
