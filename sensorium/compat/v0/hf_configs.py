"""Adds the names of transformers 4.45 to 4.47 to configs of transformers 5, for files that were written for those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sensorium.config import rope_parameters

FLAT = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Values that outer configs repeated from their text config."""

RENAMED = {
    "in_chans": "in_channels",
    "image_token_index": "image_token_id",
    "video_token_index": "video_token_id",
    "audio_token_index": "audio_token_id",
}
"""Old names and their new ones."""


def as_of_release(config: Any) -> None:
    """Add the missing names, in place, to a config and its nested configs."""
    for each in _parts(config):
        _set_missing(each, _rope_values(each))
        _set_missing(each, {old: getattr(each, new) for old, new in RENAMED.items() if hasattr(each, new)})
    text = config.get_text_config()
    if text is not config:
        _set_missing(config, {name: getattr(text, name) for name in FLAT if hasattr(text, name)})


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict"):
            yield from _parts(value)


def _rope_values(config: Any) -> Mapping[str, Any]:
    """`rope_theta` and similar values, which used to be attributes of the config, not items of a mapping."""
    parameters = rope_parameters(config)
    names = ("rope_theta", "partial_rotary_factor")
    return {name: parameters[name] for name in names if name in parameters}


def _set_missing(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not hasattr(config, name):
            setattr(config, name, value)
