"""Names of V0 that have no counterpart here, and what to use instead."""

from __future__ import annotations

_LAYERS = "Use the layers of vllm.model_executor.layers and vllm.attention, whose kernels are chosen by the device"

REASONS: dict[str, str] = {
    "vllm.multimodal.processing": (
        "Processors that do all steps at once, of 0.6.5 and later, are not served: register an input processor and an "
        "input mapper, as files of 0.6.4 do"
    ),
    "vllm.multimodal.profiling": "Register dummy data instead",
    "vllm._custom_ops": _LAYERS,
    "vllm.attention.ops": _LAYERS,
    "vllm.attention.backends": _LAYERS,
    "vllm.worker": "A model file needs nothing of the engine's workers",
    "vllm.engine": "Use vllm.LLM, vllm.LLMEngine or vllm.AsyncLLMEngine",
    "vllm.lora": "Adapters lie over the model by themselves: see the setting enable_lora",
    "vllm.envs": "There are settings for what can be set, and no environment variables",
}
"""By full name (`vllm.module.Name`), or by module for all its names: a sentence for the message of the ImportError,
without the full stop."""


def reason(module: str, name: str = "") -> str:
    """What to use instead of a name that doesn't exist here."""
    parts = [*module.split("."), *([name] if name else [])]
    for count in range(len(parts), 0, -1):
        if found := REASONS.get(".".join(parts[:count])):
            return found
    return "Write what the file needs of it in the file, or beside it and import it with a dot"
