"""Where transformers 5, or this package, has names of transformers 4.45 to 4.47."""

from __future__ import annotations

import importlib
from typing import Any

_HERE = "sensorium.compat.v0.hf_functions"
_MODELS = "transformers.models"

MOVED: dict[str, str] = {
    "transformers:apply_chunking_to_forward": "transformers.pytorch_utils:apply_chunking_to_forward",
    "transformers.modeling_utils:apply_chunking_to_forward": "transformers.pytorch_utils:apply_chunking_to_forward",
    f"{_MODELS}.clip.modeling_clip:CLIPSdpaAttention": f"{_MODELS}.clip.modeling_clip:CLIPAttention",
    f"{_MODELS}.siglip.modeling_siglip:SiglipSdpaAttention": f"{_MODELS}.siglip.modeling_siglip:SiglipAttention",
    f"{_MODELS}.mllama.image_processing_mllama:get_optimal_tiled_canvas": (
        f"{_MODELS}.mllama.image_processing_pil_mllama:get_optimal_tiled_canvas"
    ),
    f"{_MODELS}.pixtral.image_processing_pixtral:_num_image_tokens": (
        f"{_MODELS}.pixtral.image_processing_pil_pixtral:_num_image_tokens"
    ),
    f"{_MODELS}.pixtral.modeling_pixtral:PixtralRotaryEmbedding": f"{_HERE}:PixtralRotaryEmbedding",
    f"{_MODELS}.pixtral.modeling_pixtral:position_ids_in_meshgrid": f"{_HERE}:position_ids_in_meshgrid",
    f"{_MODELS}.qwen2_vl.image_processing_qwen2_vl:make_batched_images": (
        "transformers.image_utils:make_flat_list_of_images"
    ),
    f"{_MODELS}.qwen2_vl.image_processing_qwen2_vl:make_batched_videos": f"{_HERE}:make_batched_videos",
    f"{_MODELS}.qwen2_vl.image_processing_qwen2_vl:smart_resize": (
        f"{_MODELS}.qwen2_vl.image_processing_pil_qwen2_vl:smart_resize"
    ),
}
"""`module:name` then, and now: there, or written anew here."""


def moved(module: str, name: str) -> Any:
    """What a name of a module of transformers stood for. Raises KeyError if it isn't among those that moved."""
    home, _, attribute = MOVED[f"{module}:{name}"].partition(":")
    return getattr(importlib.import_module(home), attribute)
