"""Reads a checkpoint's config.json, normalises its spellings, makes a Hugging Face config of it, and checks it.

A malformed, missing or absurd value is one error of this package; no exception of transformers is passed on.
Transformers is imported when a config is made, not before.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.checkpoint import first_float_type, member, read_json
from sensorium.config import DTYPES
from sensorium.errors import ConfigError, ModelError
from sensorium.logger import get_logger
from sensorium.sampling_defaults import read_end_ids
from sensorium.settings import MAX_INT, Bounds

logger = get_logger(__name__)

_CONFIG = "config.json"
_DTYPE_NAMES = ("dtype", "torch_dtype")
_DTYPE_SPELLINGS: Mapping[str, str] = {
    **{name: name for name in DTYPES},
    **dict.fromkeys(("float", "fp32", "f32", "single"), "float32"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("half", "fp16", "f16"), "float16"),
}
_SIZE, _COUNT, _EPSILON = Bounds(1, 1 << 20), Bounds(1, MAX_INT), Bounds(0, 1)
_BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "num_layers", "depth"), Bounds(1, 10_000)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "embed_dim", "encoder_ffn_dim"), _SIZE),
    **dict.fromkeys(("out_hidden_size", "output_dim", "num_mel_bins", "n_window"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "num_heads"), _SIZE),
    **dict.fromkeys(("head_dim", "patch_size", "image_size", "temporal_patch_size", "spatial_merge_size"), _SIZE),
    "vocab_size": Bounds(1, 1 << 26),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "max_target_positions"), _COUNT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), _COUNT),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), _EPSILON),
}
"""What no model's sizes are outside of. Names that a config doesn't have, null, and lists are passed over."""
_ROPE_BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("rope_theta", "factor"), Bounds(0, 1e30, above=True)),
    "original_max_position_embeddings": _COUNT,
}
_MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """A checkpoint's config as it is written, settings that replace values of it included, and what it became."""

    written: Mapping[str, Any]
    hf_config: Any
    unknown_dtypes: tuple[str, ...] = ()
    """Its dtypes that no model runs in here; they are left out of `hf_config`."""

    @property
    def architectures(self) -> list[str]:
        """Names of the classes that serve it. Raises `ModelError` if there are none."""
        found = self.written.get("architectures")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            raise ModelError(
                f"architectures in {_CONFIG}: got {found!r:.120}, expected a list with the name of a model class. "
                "Add it, or set hf_overrides (--hf-overrides) to "
                '{"architectures": ["..."]}.'
            )
        return list(found)


def load_hf_config(
    path: Path, trust_remote_code: bool, code_revision: str | None, overrides: Mapping[str, Any]
) -> CheckpointConfig:
    """The config of the checkpoint in a folder, with `overrides` in place of its values.

    Raises:
        ModelError: It is malformed, of an unknown type, or transformers refuses it.
    """
    on_disk = read_json(path / _CONFIG)
    written = _merged(on_disk, overrides)
    for name in written.pop("configuration_files", None) or ():
        member(path, name, f"configuration_files in {_CONFIG}")
    unknown = tuple(_put_dtypes_right(written))
    is_remote = trust_remote_code and "AutoConfig" in _mapping_in(written, "auto_map")
    if not is_remote and not isinstance(written.get("model_type"), str):
        raise ModelError(
            f"model_type in {_CONFIG}: got {written.get('model_type')!r:.120}, expected the name of a type that "
            "transformers knows. Add it, or download the file again."
        )
    if not trust_remote_code and "AutoConfig" in _mapping_in(written, "auto_map") and not _is_known(written):
        raise ModelError(
            f"auto_map in {_CONFIG}: got a config whose class comes with the checkpoint, expected one of transformers. "
            "If you trust that code, set trust_remote_code (--trust-remote-code)."
        )
    options = {"trust_remote_code": trust_remote_code, "code_revision": code_revision}
    try:
        hf_config = _made(path, written, is_changed=written != on_disk, is_remote=is_remote, options=options)
    except Exception as error:  # transformers, or the code of a checkpoint, may raise any exception
        _check_written(written, error)
        raise ModelError(f"config of {path}: transformers can't read it: {_reason(error)}{_hint(written)}") from error
    _tell_of_unknown_overrides(hf_config, on_disk, overrides)
    return CheckpointConfig(written, hf_config, unknown)


def _made(
    path: Path, written: Mapping[str, Any], *, is_changed: bool, is_remote: bool, options: Mapping[str, Any]
) -> Any:
    from transformers import AutoConfig

    if not is_changed:
        return AutoConfig.from_pretrained(path, **options)
    if is_remote:
        return type(AutoConfig.from_pretrained(path, **options)).from_dict(dict(written))
    # Transformers reads the file itself in several places, so it gets a file.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _CONFIG).write_text(json.dumps(written), encoding="utf-8")
        hf_config = AutoConfig.from_pretrained(folder, **options)
    hf_config._name_or_path = str(path)  # noqa: SLF001  as transformers sets it
    return hf_config


def _merged(written: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values; within the config of a part, only those that are named."""
    merged = dict(written)
    for name, value in overrides.items():
        before = merged.get(name)
        is_part = name.endswith("_config") and isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(before, value) if is_part else value  # type: ignore[arg-type]
    return merged


def _put_dtypes_right(level: dict[str, Any]) -> Iterator[str]:
    """Write the types of a config and its parts as transformers does; unusable ones are removed and reported."""
    for name in _DTYPE_NAMES:
        value = level.get(name)
        if value is None:
            continue
        spelling = _DTYPE_SPELLINGS.get(str(value).lower().removeprefix("torch."))
        if spelling is not None:
            level[name] = spelling
        else:
            del level[name]
            if value != "auto":
                yield f"{value!r:.60}"
    for name, value in level.items():
        if name.endswith("_config") and isinstance(value, dict):
            part = dict(value)
            yield from _put_dtypes_right(part)
            level[name] = part


def _mapping_in(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _reason(error: Exception) -> str:
    """An exception of another library in a few words."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]}..."
    return shown if shown.endswith((".", "!")) else f"{shown}."


def _is_known(written: Mapping[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return written.get("model_type") in CONFIG_MAPPING


def _hint(written: Mapping[str, Any]) -> str:
    """How to have a type of one's own read."""
    model_type = written.get("model_type")
    if _is_known(written):
        return " Correct the value, or set another one in hf_overrides (--hf-overrides)."
    return (
        f" If {model_type!r} is a model_type of your own, register its class: "
        f"AutoConfig.register({model_type!r}, YourConfig), in the function of a plug-in package when serving."
    )


def _tell_of_unknown_overrides(hf_config: Any, on_disk: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Warn of an override that the config doesn't know: it may be misspelt."""
    known = {*on_disk, *dir(type(hf_config)), *getattr(hf_config, "attribute_map", {}), *_DTYPE_NAMES}
    known |= set(getattr(type(hf_config), "__dataclass_fields__", ())) | {"architectures", "rope_scaling", "rope_theta"}
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            logger.warning(
                "hf_overrides: got %r, which %s has no use for%s. Only a model class that reads it will see it.",
                name,
                type(hf_config).__name__,
                f"; {close[0]!r} may be meant" if close else "",
            )


def config_of_part(hf_config: Any, part: str | None) -> Any:
    """The part of a config that is about the class that is served, where that is one part of a larger checkpoint.

    That its output head is tied may stand in the whole's config.
    """
    own = getattr(hf_config, part, None) if part else None
    if own is None:
        return hf_config
    if getattr(hf_config, "tie_word_embeddings", False):
        own.tie_word_embeddings = True
    return own


def written_end_ids(written: Mapping[str, Any], hf_config: Any) -> frozenset[int]:
    """End-of-sequence ids that config.json names, for the whole, the part that is served, and its text.

    Those that a config class has by default don't count: they belong to the checkpoints that the class was made for.
    """
    served = (hf_config.model_type, hf_config.get_text_config().model_type)

    def found(level: Mapping[str, Any]) -> Iterator[frozenset[int]]:
        yield read_end_ids(level, _CONFIG)
        for name, value in level.items():
            if isinstance(value, Mapping) and (name == "text_config" or value.get("model_type") in served):
                yield from found(value)

    return frozenset().union(*found(written))


# Checks


def check_values(hf_config: Any) -> None:
    """Refuse sizes that no model has: layers, channels and heads of 0 or of millions, windows of 0, NaN.

    Raises:
        ModelError: It names the value and where it stands.
    """
    for place, level in _levels(hf_config):
        for name, bounds in _BOUNDS.items():
            _check_number(f"{place}{name}", _value(level, name), bounds)
        for settings in ("rope_parameters", "rope_scaling"):
            for name, bounds in _ROPE_BOUNDS.items():
                value = _mapping_in(vars(level), settings).get(name)
                _check_number(f"{place}{settings}.{name}", value, bounds)
    _check_heads(hf_config.get_text_config())


def _check_written(level: Mapping[str, Any], cause: Exception, place: str = "") -> None:
    """`check_values` of a config that couldn't be made, most likely because of such a value."""
    for name, value in level.items():
        if name in _BOUNDS:
            try:
                _check_number(f"{place}{name}", value, _BOUNDS[name])
            except ModelError as error:
                raise error from cause
        if name.endswith("_config") and isinstance(value, Mapping):
            _check_written(value, cause, f"{place}{name}.")


def _levels(hf_config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """A config and those of its parts, each with its name in front."""
    yield place, hf_config
    for name, value in vars(hf_config).items():
        if hasattr(value, "get_text_config"):
            yield from _levels(value, f"{place}{name}.")


def _value(level: Any, name: str) -> object:
    """A value of a config; None where it has none for all layers, or where another one says that it doesn't count."""
    if name == "sliding_window" and getattr(level, "use_sliding_window", True) is False:
        return None
    try:
        return getattr(level, name, None)
    except Exception as error:  # what configs raise on values that differ from layer to layer
        logger.debug("%s has no single value", name, exc_info=error)
        return None


def _check_number(name: str, value: object, bounds: Bounds) -> None:
    if value is None or isinstance(value, list | tuple | Mapping):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not bounds.holds(value):
        raise ModelError(
            f"{name} in {_CONFIG}: got {value!r:.60}, expected {bounds}. Correct the file, or set another value in "
            "hf_overrides (--hf-overrides)."
        )


def _check_heads(text: Any) -> None:
    hidden_size, num_heads = _value(text, "hidden_size"), _value(text, "num_attention_heads")
    num_kv_heads = _value(text, "num_key_value_heads")
    if not isinstance(num_heads, int):
        return
    if isinstance(hidden_size, int) and _value(text, "head_dim") is None and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size in {_CONFIG}: got {hidden_size}, expected a multiple of num_attention_heads ({num_heads}). "
            "Correct one of them."
        )
    if isinstance(num_kv_heads, int) and num_heads % num_kv_heads:
        raise ModelError(
            f"num_key_value_heads in {_CONFIG}: got {num_kv_heads}, expected a divisor of num_attention_heads "
            f"({num_heads}). Correct one of them."
        )


# What follows from it


def resolve_dtype(dtype: str, config: CheckpointConfig, hf_config: Any, path: Path | None) -> str:
    """A dtype's name; "auto" is the checkpoint's own, which keeps outputs equal to the reference.

    Where the config names none it is that of the weights in `path`, if there is one.

    Raises:
        ModelError: The checkpoint's own is none that models are run in here.
    """
    if dtype != "auto":
        return dtype
    for level in (hf_config, hf_config.get_text_config()):
        found = str(getattr(level, "dtype", None)).removeprefix("torch.")
        if found in DTYPES:
            return found
    unknown = [*config.unknown_dtypes]
    if not unknown and path is not None:
        stored = first_float_type(path)
        if stored is None or stored in DTYPES:
            return stored or "float32"
        unknown = [repr(stored)]
    if unknown:
        raise ModelError(
            f"dtype of the checkpoint: got {unknown[0]}, expected one of {', '.join(DTYPES)}. Set dtype (--dtype) to "
            "one of these."
        )
    return "float32"


def resolve_max_model_len(asked: int | None, hf_config: Any, trained: int | None = None) -> int:
    """The context length: as asked, at most the model's own. `trained`: what other files say, where they count."""
    text = hf_config.get_text_config()
    name = "max_position_embeddings" if hasattr(text, "max_position_embeddings") else "max_target_positions"
    own = getattr(text, name, None)
    if asked is None:
        return min((int(each) for each in (own, trained) if each), default=4096)
    if own and asked > own:
        raise ConfigError(
            f"max_model_len: got {asked}, expected at most {own}, the model's {name}. "
            "Lower max_model_len, or raise the limit in hf_overrides if you know that the model can do more."
        )
    return asked
