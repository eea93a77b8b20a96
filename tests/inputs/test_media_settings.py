"""`mm_processor_kwargs`: every setting has its effect, or it is refused by name, in a request and at load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY
from sensorium.inputs.media_settings import MediaSettings
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.inputs import MultiModalKwargs
from sensorium.multimodal.registry import MultiModalRegistry
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.configs import make_model_config
from tests.helpers.direct import engine_config


def native(family: str) -> Any:
    return engine_config(make_checkpoint(family)).model_config


def map_tiles(ctx: object, data: object, *, tiles: int = 4) -> MultiModalKwargs:
    return MultiModalKwargs({"tiles": np.zeros(tiles)})


def most_rows(ctx: object, *, most: int = 4) -> int:
    return most


def custom(**engine: Any) -> Any:
    class Model:
        supports_multimodal = True

    MULTIMODAL_REGISTRY.register_input_mapper("image", map_tiles)(Model)
    MULTIMODAL_REGISTRY.register_max_multimodal_tokens("image", most_rows)(Model)
    return make_model_config(Model, mm_processor_kwargs=engine or None)


def by_default(path: Path, *modalities: str, **engine: Any) -> Any:
    class Model:
        supports_multimodal = True

    for modality in modalities:
        MULTIMODAL_REGISTRY.register_input_mapper(modality)(Model)
    return make_model_config(Model, model=path, mm_processor_kwargs=engine or None)


def settings_of(model_config: Any, registry: MultiModalRegistry = MULTIMODAL_REGISTRY) -> MediaSettings:
    return MediaSettings(model_config, INPUT_REGISTRY, registry)


WRONG_NAMES: list[Mapping[str, Any]] = [
    {"max_pixel": 16384},
    {"MAX_PIXELS": 16384},
    {"images_kwargs": {"max_pixels": 16384}},
    {"backend": "torchvision"},
    {"revision": "x"},
    {"trust_remote_code": True},
    {"return_tensors": "np"},
    {"device": "cuda"},
    {"": 1},
]


@pytest.mark.parametrize("kwargs", WRONG_NAMES, ids=lambda kwargs: str(next(iter(kwargs))))
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_omni_thinker", "llama"])
def test_names_that_the_model_does_not_take_are_refused_by_name(family: str, kwargs: Mapping[str, Any]) -> None:
    """A slip, max_pixel for max_pixels, was answered with 200 and had no effect."""
    (name,) = kwargs
    with pytest.raises(InvalidRequestError, match=rf"mm_processor_kwargs: got '{name}'"):
        settings_of(native(family)).check_request(kwargs)


def test_a_slip_is_told_what_was_meant() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean max_pixels"):
        settings_of(native("qwen2_vl")).check_request({"max_pixel": 16384})


@pytest.mark.parametrize(
    ("family", "name"),
    [("llava", "max_pixels"), ("llava", "num_frames"), ("llava", "patch_size"), ("qwen2_vl", "crop_size")],
)
def test_names_of_another_processor_are_refused(family: str, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        settings_of(native(family)).check_request({name: 8})


@pytest.mark.parametrize("name", ["do_center_crop", "crop_size", "do_pad", "pad_size", "image_seq_length"])
def test_names_that_a_processor_shares_and_passes_over_are_refused(name: str) -> None:
    """All image processors of a family declare one list of names; each uses some of them."""
    with pytest.raises(InvalidRequestError, match=name):
        settings_of(by_default(make_checkpoint("qwen2_vl"), "image")).check_request({name: True})


def test_names_that_are_taken() -> None:
    settings_of(native("qwen2_vl")).check_request({"min_pixels": 28 * 28, "max_pixels": 56 * 56, "num_frames": 4})
    settings_of(native("llava")).check_request({"do_resize": False, "image_mean": [0.5] * 3, "do_convert_rgb": True})
    default = settings_of(by_default(make_checkpoint("qwen2_vl"), "image", "video"))
    default.check_request({"max_pixels": 56 * 56, "do_normalize": False, "fps": 2.0})
    settings_of(custom(tiles=3, most=9)).check_engine()
    settings_of(custom()).check_request({"tiles": 3})
    with pytest.raises(InvalidRequestError, match="most"):  # at load only
        settings_of(custom()).check_request({"most": 3})


WRONG_VALUES: list[tuple[str, Any]] = [
    ("max_pixels", 0),
    ("max_pixels", -1),
    ("max_pixels", 1.5),
    ("max_pixels", True),
    ("max_pixels", "many"),
    ("max_pixels", [1]),
    ("max_pixels", 10**30),
    ("min_pixels", 0),
    ("size", {}),
    ("size", {"longest_edge": 0, "shortest_edge": 1}),
    ("size", {"longest": 5}),
    ("size", "large"),
    ("size", {"shortest_edge": {"x": 1}}),
    ("do_resize", "no"),
    ("do_normalize", 3),
    ("image_mean", "x"),
    ("image_mean", []),
    ("image_std", [0, 0, 0]),
    ("image_std", [float("nan")] * 3),
    ("rescale_factor", 0),
    ("rescale_factor", float("inf")),
    ("resample", 99),
    ("merge_size", 0),
    ("patch_size", -3),
    ("temporal_patch_size", 0),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    """`max_pixels: 0` was a ZeroDivisionError deep in a processor."""
    path = make_checkpoint("qwen2_vl")
    with pytest.raises(InvalidRequestError, match=name):
        settings_of(by_default(path, "image")).check_request({name: value})
    with pytest.raises(ConfigError, match=name):
        settings_of(by_default(path, "image", **{name: value})).check_engine()


@pytest.mark.parametrize("kwargs", [{"fps": 0}, {"fps": "x"}, {"num_frames": 0}, {"num_frames": 2, "fps": 1.0}])
def test_wrong_sampling_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(kwargs))):
        settings_of(native("qwen2_vl")).check_request(kwargs)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True])
def test_native_models_refuse_the_same_values(value: Any) -> None:
    from PIL import Image

    from tests.inputs.front import front_of

    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>",
        "multi_modal_data": {"image": [Image.new("RGB", (60, 60))]},
        "mm_processor_kwargs": {"max_pixels": value},
    }
    with pytest.raises(InvalidRequestError, match="max_pixels"):
        front_of("qwen2_vl")(prompt)


def test_a_least_beyond_the_most_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="min_pixels"):
        settings_of(by_default(make_checkpoint("qwen2_vl"), "image")).check_request(
            {"min_pixels": 10**6, "max_pixels": 10**4}
        )


def test_a_merged_processor_takes_what_it_likes() -> None:
    class Model:
        supports_multimodal = True

    registry = MultiModalRegistry()
    registry.register_processor(lambda ctx: None)(Model)  # type: ignore[arg-type,return-value]
    settings_of(make_model_config(Model), registry).check_request({"anything": 1})
