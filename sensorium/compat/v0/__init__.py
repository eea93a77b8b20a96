"""The names that model files of vLLM 0.6 (0.6.3 to 0.6.6, V0) import, so that these run unchanged as plug-ins.

The package has no engine logic: each name is Sensorium's own object, or a wrapper around it that takes V0's arguments.

How imports are resolved in a file that is loaded as a plug-in, and in no other:

    from vllm.a.b import X      1. sensorium/compat/v0/vllm/a/b.py, if it has X
                                2. sensorium/a/b.py, if it has X; of model_executor/models only the modules in `SHARED`
                                3. an ImportError that says what to use instead
    from .b import X            a file b.py beside it, else as vllm.model_executor.models.b
    from transformers.a import X    as usual; names that transformers has removed are looked up in `moved.MOVED`
    from xformers.ops import X  sensorium/compat/v0/xformers/ops.py; likewise flash_attn

So `sensorium/compat/v0/vllm` mirrors the modules of `vllm`, one small file for each. It has only the names that
Sensorium's module of the same path lacks or that have another meaning there. A model (`models/llama.py`) has its own
module here, which hides Sensorium's file of that name, since the constructors differ. For names that have no useful
meaning here, `absent.REASONS` says what to use instead.

`importing` has the mechanism. In every other file, `import vllm` imports an installed vllm.
"""
