"""Tiny checkpoints of architectures that take media, with processors: transformers' own defaults, shrunk by the names
of values, and a tokenizer of a few words that has every special token that the processor's source names."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from sensorium.multimodal.hf_processors import cached_get_processor
from tests.helpers.tiny_architectures import SIZES, agree_on_heads, shrunk, spread

IMAGE_SIZE, PATCH_SIZE = 28, 14
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "what", "is", "this", "?", ".", "1", "2", "x")
_FIRST_SPECIAL = 100
"""Ids of special tokens begin here; below are words of no meaning."""
_SPECIAL = re.compile(r"""["'](<[^"'\s{}]{1,48}>|\[[A-Z_]{3,}\]|<[^"'\s{}]*\|>)["']""")
_SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "depth": 2,
    "max_position_embeddings": 4096,
    "max_source_positions": 1500,
    **dict.fromkeys(("out_hidden_size", "output_dim", "projection_dim", "proj_hidden_size"), 64),
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
    "mm_tokens_per_image": (IMAGE_SIZE // PATCH_SIZE) ** 2,
    "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_PARTIAL_MROPE = {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
_LAYERS = {at: {"head_dim": 32} for at in ("01", "03")}
_WITH_MROPE = (
    *("qwen2_vl", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr", "glmga", "qwen2_5_omni_thinker", "cosmos3_omni"),
    "cosmos3_edge",
)
_GRIDS = [[28, 28], [28, 56], [56, 28]]
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{key: {"text_config": _MROPE} for key in _WITH_MROPE},
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": {"window_size": 56, "fullatt_block_indexes": [1]}},
    "qwen3_vl": {"text_config": _MROPE, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    **{name: {"text_config": _PARTIAL_MROPE} for name in ("qwen3_5", "qwen3_5_moe", "minicpmv4_7", "glm4v_moe")},
    "qwen3_vl_moe": {"text_config": _MROPE, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "got_ocr2": {"vision_config": {"image_size": 128, "patch_size": 2}, "image_seq_length": 256},
    "internvl": {"image_seq_length": 1, "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]}},
    "qianfan_ocr": {"image_seq_length": 1, "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        }
    },
    "gemma3n": {
        "vision_config": {"hidden_size": 2048, "vocab_offset": 300, "vocab_size": 10},
        "audio_config": {"vocab_offset": 310, "vocab_size": 10},
    },
    "hunyuan_vl": {"text_config": {**_MROPE, "head_dim": 16}},
    "step3p7": {"text_config": {"sliding_window": 6}},
    "hyperclovax_vision_v2": {"vision_config": {"window_size": 56, "fullatt_block_indexes": [1]}},
    "qwen2_5_omni_thinker": {
        "text_config": _MROPE,
        "vision_config": {"window_size": 56, "fullatt_block_indexes": [1]},
        "vision_start_token_id": 0,
        "vision_end_token_id": 0,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": _MROPE,
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
        "vision_start_token_id": 0,
        "vision_end_token_id": 0,
        "audio_start_token_id": 0,
        "audio_end_token_id": 0,
    },
    "exaone4_5": {"vision_config": {"window_size": 56, "fullatt_block_indexes": [1]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    **{name: {"text_config": {"per_layer_config": _LAYERS}} for name in ("gemma4", "gemma4_unified")},
    **{name: {"vision_config": {"text_hidden_size": 64}} for name in ("inkling_mm_model", "inkling2")},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "aya_vision": {"downsample_factor": 1},
    **{key: {"image_grid_pinpoints": _GRIDS} for key in ("llava_next", "llava_onevision")},
}
"""What shrinking by name doesn't get right in a config, by type; nested parts by their name."""
_ROW_TOKENS: Mapping[str, str] = {"llama4": "<|patch|>", "ovis2": "<IMG_ATOM>"}
"""What stands where rows of pictures go, where that isn't what stands for a picture."""
_LIKE: Mapping[str, str] = {
    "qwen3_vl_moe": "qwen3_vl",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "glmga": "glm4v",
    "fast_vlm": "llava",
    "musicflamingo": "audioflamingo3",
    "mistral4": "mistral3",
    "kosmos-2": "clip",
    "kosmos-2.5": "kosmos-2.5",
    "cosmos3_omni": "qwen3_vl",
}
"""Types whose parts of a processor are those of another type."""
_IMAGE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "paligemma": {"image_seq_length": 4},
    "got_ocr2": {"size": {"height": 128, "width": 128}},
    "lfm2_vl": {"encoder_patch_size": 14, "tile_size": 56, "min_image_tokens": 1, "max_image_tokens": 4},
    "cohere2_vision": {"patch_size": 1},
    "deepseek_vl_hybrid": {"high_res_size": {"height": 28, "width": 28}},
    "idefics2": {"size": {"shortest_edge": 28, "longest_edge": 56}},
    "llava_next": {"image_grid_pinpoints": _GRIDS},
    "llava_onevision": {"image_grid_pinpoints": _GRIDS, "size": {"height": 28, "width": 28}},
}
"""Of an image processor, beside its small sizes."""
_PROCESSOR_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aya_vision": {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
    "internvl": {"image_seq_length": 1},
    "qianfan_ocr": {"image_seq_length": 1},
    "gemma3n": {"image_seq_length": 256},
    **{
        name: {"patch_size": PATCH_SIZE, "spatial_merge_size": 2} for name in ("mistral3", "mistral_large4", "mistral4")
    },
}


def media_types() -> dict[str, str]:
    """Model types with the class that takes their media."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for table in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM"):
        for name, value in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            found.setdefault(name, value if isinstance(value, str) else value[0])
    return found


def media_config(model_type: str) -> PretrainedConfig:
    """The defaults of a type with sizes of some dozens."""
    config_class = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = config_class()
        values = {**default.to_dict(), **_left_out(default)}
        values = _merged(shrunk(values, 0, {**SIZES, **_SIZES}), _SETTINGS.get(model_type, {}))
        agree_on_heads(values)
        return config_class(**_with_sections(values))


def _left_out(config: PretrainedConfig) -> dict[str, Any]:
    """Parts that a config has by name, but not by default."""
    kinds: Mapping[str, Any] = config.sub_configs
    left_out = {name: kind for name, kind in kinds.items() if getattr(config, name, None) is None}
    return {name: kind().to_dict() for name, kind in left_out.items() if issubclass(kind, PretrainedConfig)}


def _with_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Sections of M-RoPE that add up to half of a tiny head."""
    for name, value in values.items():
        if name == "mrope_section":
            values[name] = [2, 3, 3]
        elif isinstance(value, dict):
            _with_sections(value)
    return values


def _merged(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), dict) and name != "per_layer_config"
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def media_tokenizer(processor_class: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens that a processor's module names."""
    source = inspect.getsource(importlib.import_module(processor_class.__module__))
    named = _named_tokens(source)
    special = [text for text in dict.fromkeys(_SPECIAL.findall(source)) if text not in (*WORDS, *named.values())]
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(WORDS), _FIRST_SPECIAL)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def _named_tokens(source: str) -> dict[str, str]:
    """Attributes under which a processor asks its tokenizer for special tokens."""
    pattern = r"""tokenizer(?:\.|, ["'])(\w+_token)(?:_id)?\b"""
    names = set(re.findall(pattern, source)) - {
        "pad_token",
        "bos_token",
        "eos_token",
        "unk_token",
    }
    usual = {"image_token": "<image>", "video_token": "<video>", "audio_token": "<audio>"}
    return {name: usual.get(name, f"<{name}>") for name in sorted(names)}


def save_tiny_media(model_type: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a tiny checkpoint with its processor; returns the model."""
    config = media_config(model_type)
    processor_class = _processor_class(config)
    tokenizer = media_tokenizer(processor_class)
    tokenizer.save_pretrained(folder)
    parts = {name: _part(name, config) for name in processor_class.get_attributes() if not name.endswith("tokenizer")}
    settings = {"processor_class": processor_class.__name__, **parts, **_processor_settings(config)}
    (folder / "processor_config.json").write_text(json.dumps(settings, default=str))
    config.save_pretrained(folder)
    _agree(config, cached_get_processor(str(folder)), tokenizer)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, media_types()[model_type])(config).eval()
    spread(model, seed)
    model.save_pretrained(folder)
    return model


def _processor_class(config: PretrainedConfig) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    own = PROCESSOR_MAPPING.get(type(config), None)
    return own or PROCESSOR_MAPPING[CONFIG_MAPPING[_LIKE[config.model_type]]]


def _agree(config: Any, processor: Any, tokenizer: Any) -> None:
    """Give the config the ids of special tokens, by the names of both."""
    for modality in ("image", "video", "audio"):
        token_id = getattr(tokenizer, f"{modality}_token_id", getattr(processor, f"{modality}_token_id", None))
        text = getattr(processor, f"{modality}_token", None)
        if token_id is None and text is not None:
            token_id = tokenizer.convert_tokens_to_ids(str(text))
        for field in (f"{modality}_token_id", f"{modality}_token_index"):
            if token_id is not None and hasattr(config, field):
                setattr(config, field, token_id)
    added = tokenizer.get_added_vocab()
    if config.model_type in _ROW_TOKENS:
        config.image_token_id = added[_ROW_TOKENS[config.model_type]]
    for field, marks in _MARKS.items():
        text = next((each for mark in marks for each in added if mark in each.lower()), None)
        if hasattr(config, field) and text is not None:
            setattr(config, field, added[text])


_MARKS: Mapping[str, tuple[str, ...]] = {
    "vision_start_token_id": ("vision_start", "begin_of_image"),
    "vision_end_token_id": ("vision_end", "end_of_image"),
    "image_start_token_id": ("begin_of_image", "image_start"),
    "image_end_token_id": ("end_of_image", "image_end"),
    "boi_token_id": ("start_of_image", "boi"),
    "eoi_token_id": ("end_of_image", "eoi"),
    "audio_start_token_id": ("audio_start", "audio_bos"),
    "audio_end_token_id": ("audio_end", "audio_eos"),
}


def _part(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """The settings of an image processor, a video processor or a feature extractor of a type."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    model_type = _LIKE.get(config.model_type, config.model_type)
    if name == "image_processor":
        image_class = _image_class(config)
        small = {**_small(image_class()), **_IMAGE_SETTINGS.get(model_type, {})}
        made = image_class(**small)
        return {**made.to_dict(), "image_processor_type": type(made).__name__.removesuffix("Pil")}
    if name == "video_processor":
        kind = VIDEO_PROCESSOR_MAPPING_NAMES[model_type]
        image_class = _image_class(config)
        small = {} if image_class is None else {**_small(image_class()), **_IMAGE_SETTINGS.get(model_type, {})}
        return {**small, "video_processor_type": kind if isinstance(kind, str) else next(iter(kind.values()))}
    made_with = {"feature_size": mels} if (mels := getattr(_audio_config(config), "num_mel_bins", None)) else {}
    extractor = getattr(transformers, FEATURE_EXTRACTOR_MAPPING_NAMES[model_type])(**made_with)
    return {**extractor.to_dict(), "feature_extractor_type": type(extractor).__name__}


def _image_class(config: Any) -> Any:
    """The class of a type's image processor: PIL's, or torchvision's where there is no other; None: it has none."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    like = CONFIG_MAPPING[_LIKE.get(config.model_type, config.model_type)]
    classes = IMAGE_PROCESSOR_MAPPING.get(like, None) or {}
    return classes.get("pil") or classes.get("torchvision")


def _audio_config(config: Any) -> Any:
    return getattr(config, "audio_config", None) or getattr(config, "encoder_config", None)


def _small(processor: Any) -> dict[str, Any]:
    """Settings that make pictures as large as tiny towers take them."""
    values: dict[str, Any] = {}
    size = dict(processor.size or {})
    if {"height", "width"} <= size.keys():
        values["size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    elif "shortest_edge" in size and "longest_edge" in size and size["longest_edge"] > 100_000:  # pixels in all
        values["size"] = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    elif "shortest_edge" in size:
        values["size"] = {"shortest_edge": IMAGE_SIZE}
    elif "longest_edge" in size:
        values["size"] = {"longest_edge": 2 * IMAGE_SIZE}
    if getattr(processor, "crop_size", None):
        values["crop_size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if getattr(processor, "patch_size", None):
        values["patch_size"] = PATCH_SIZE
    return values


def _processor_settings(config: Any) -> dict[str, Any]:
    """Settings of a processor itself that follow from the config's sizes."""
    values = {
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        "num_additional_image_tokens": 1,
        "mm_tokens_per_image": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
    }
    names = inspect.signature(_processor_class(config).__init__).parameters
    chosen = {name: value for name, value in values.items() if name in names}
    return {**chosen, **_PROCESSOR_SETTINGS.get(config.model_type, {})}
