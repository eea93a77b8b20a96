"""The rules of `MULTIMODAL_REGISTRY`: decorators, plugins, limits, largest numbers of tokens, hints."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    ModelError,
    SensoriumError,
    UnknownModalityError,
    UnregisteredModalityError,
)
from sensorium.inputs import INPUT_REGISTRY, InputContext, InputProcessingContext
from sensorium.model_executor.models.interfaces import SupportsMultiModal, check_supports_multimodal
from sensorium.multimodal import (
    MULTIMODAL_REGISTRY,
    MultiModalInputsV2,
    MultiModalKwargs,
    MultiModalPlugin,
    MultiModalRegistry,
)
from tests.helpers.configs import make_model_config


def mapper(ctx: InputContext, data: object) -> MultiModalKwargs:
    count = len(data) if isinstance(data, list) else 1
    return MultiModalKwargs({"pixel_values": torch.zeros(count, 2)})


def new_model(*, takes_media: bool = True) -> type:
    bases = (nn.Module, SupportsMultiModal) if takes_media else (nn.Module,)
    return type("Model", bases, {})


def prepared(registry: MultiModalRegistry, model_class: type, **fields: Any) -> Any:
    config = make_model_config(model_class, **fields)
    registry.init_mm_limits_per_prompt(config)
    return config


class DepthPlugin(MultiModalPlugin):
    """A modality of a third party."""

    def get_data_key(self) -> str:
        return "depth"

    def _default_input_mapper(self, ctx: InputContext, data: object, **mm_processor_kwargs: object) -> MultiModalKwargs:
        return MultiModalKwargs({"depth_map": torch.ones(1)})

    def _default_max_multimodal_tokens(self, ctx: InputContext) -> int:
        return 12


class Processor:
    """A merged processor."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        self.ctx = ctx

    @classmethod
    def make(cls, ctx: InputProcessingContext) -> Processor:
        return cls(ctx)

    def apply(self, prompt: object, mm_data: object, mm_processor_kwargs: object) -> MultiModalInputsV2:
        return MultiModalInputsV2(
            type="multimodal",
            prompt=str(prompt),
            prompt_token_ids=[1],
            mm_kwargs=MultiModalKwargs(),
            mm_placeholders={},
        )


# Decorators


def test_decorators_return_the_class_and_may_stand_in_any_order() -> None:
    decorators = [
        MULTIMODAL_REGISTRY.register_image_input_mapper(),
        MULTIMODAL_REGISTRY.register_max_image_tokens(5),
        INPUT_REGISTRY.register_dummy_data(lambda ctx, seq_len, mm_counts: ()),
        INPUT_REGISTRY.register_input_processor(lambda ctx, inputs: inputs),
    ]
    for order in (decorators, decorators[::-1]):
        model = new_model()
        assert functools.reduce(lambda cls, decorate: decorate(cls), order, model) is model
        assert MULTIMODAL_REGISTRY.get_plugin("image").has_input_mapper(model)
        config = prepared(MULTIMODAL_REGISTRY, model)
        assert MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config)["image"] == 5


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_every_modality_has_a_shorthand(modality: str) -> None:
    model = new_model()
    getattr(MULTIMODAL_REGISTRY, f"register_{modality}_input_mapper")(mapper)(model)
    getattr(MULTIMODAL_REGISTRY, f"register_max_{modality}_tokens")(7)(model)
    config = prepared(MULTIMODAL_REGISTRY, model)
    assert MULTIMODAL_REGISTRY.map_input(config, {modality: "anything"})["pixel_values"].shape == (1, 2)
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(config) == 7


@pytest.mark.parametrize(
    ("register", "what"),
    [
        (lambda: MULTIMODAL_REGISTRY.register_image_input_mapper(mapper), "input mapper"),
        (lambda: MULTIMODAL_REGISTRY.register_max_image_tokens(3), "maximum number of tokens"),
        (lambda: MULTIMODAL_REGISTRY.register_placeholder_tokens("image", 3), "placeholder tokens"),
        (lambda: MULTIMODAL_REGISTRY.register_placeholder_str("image", "<i>"), "placeholder string"),
        (lambda: MULTIMODAL_REGISTRY.register_processor(Processor.make), "merged processor"),
        (lambda: INPUT_REGISTRY.register_dummy_data(lambda *_: ()), "dummy data factory"),
        (lambda: INPUT_REGISTRY.register_dummy_encoder_data(lambda *_: ()), "dummy encoder data factory"),
        (lambda: INPUT_REGISTRY.register_input_processor(lambda *_: None), "input processor"),
    ],
)
def test_registering_again_warns_but_not_on_a_subclass(
    register: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = register()(new_model())
    subclass = register()(type("Subclass", (model,), {}))
    assert not caplog.records
    register()(subclass)
    assert what in caplog.text
    assert "overwritten by the new one" in caplog.text


def test_the_last_registration_wins() -> None:
    model = new_model()
    MULTIMODAL_REGISTRY.register_max_image_tokens(3)(model)
    MULTIMODAL_REGISTRY.register_max_image_tokens(4)(model)
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(prepared(MULTIMODAL_REGISTRY, model)) == 4


def test_a_subclass_inherits_and_overrides() -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model())
    subclass = type("Subclass", (model,), {})
    plugin = MULTIMODAL_REGISTRY.get_plugin("image")
    assert plugin.get_input_mapper(subclass) is mapper

    def other(ctx: InputContext, data: object) -> MultiModalKwargs:
        return MultiModalKwargs()

    MULTIMODAL_REGISTRY.register_image_input_mapper(other)(subclass)
    assert plugin.get_input_mapper(subclass) is other
    assert plugin.get_input_mapper(model) is mapper


def test_registries_share_the_default_plugins() -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model())
    assert MultiModalRegistry().get_plugin("image").get_input_mapper(model) is mapper


class Bound:
    def method(self, ctx: InputContext, data: object) -> MultiModalKwargs:
        return MultiModalKwargs({"bound": torch.ones(1)})


@pytest.mark.parametrize(
    ("function", "key"),
    [
        (lambda ctx, data: {"plain": torch.ones(1)}, "plain"),
        (Bound().method, "bound"),
        (functools.partial(lambda ctx, data, name: MultiModalKwargs({name: torch.ones(1)}), name="partial"), "partial"),
    ],
)
def test_lambdas_bound_methods_and_partials_are_mappers(function: Any, key: str) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(function)(new_model())
    mapped = MULTIMODAL_REGISTRY.map_input(prepared(MULTIMODAL_REGISTRY, model), {"image": "x"})
    assert isinstance(mapped, MultiModalKwargs)
    assert list(mapped) == [key]


@pytest.mark.parametrize(
    "decorate",
    [
        MULTIMODAL_REGISTRY.register_image_input_mapper,
        MULTIMODAL_REGISTRY.register_max_image_tokens,
        functools.partial(MULTIMODAL_REGISTRY.register_input_mapper, "video"),
        MULTIMODAL_REGISTRY.register_input_mapper,
        MULTIMODAL_REGISTRY.register_max_multimodal_tokens,
        functools.partial(MULTIMODAL_REGISTRY.register_placeholder_tokens, "image"),
        functools.partial(MULTIMODAL_REGISTRY.register_placeholder_str, "image"),
        MULTIMODAL_REGISTRY.register_processor,
        INPUT_REGISTRY.register_dummy_data,
        INPUT_REGISTRY.register_dummy_encoder_data,
        INPUT_REGISTRY.register_input_processor,
    ],
)
def test_a_decorator_without_parentheses_is_an_error_that_says_so(decorate: Any) -> None:
    with pytest.raises(TypeError, match="parentheses"):
        decorate(new_model())


@pytest.mark.parametrize("not_a_function", [3, "mapper", [mapper]])
def test_a_mapper_must_be_callable(not_a_function: Any) -> None:
    with pytest.raises(ModelError, match="register_image_input_mapper"):
        MULTIMODAL_REGISTRY.register_image_input_mapper(not_a_function)


def test_registrations_without_the_interface_are_an_error_at_load() -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model(takes_media=False))
    with pytest.raises(TypeError, match=r"class Model\(nn.Module, SupportsMultiModal\)"):
        check_supports_multimodal(model)
    check_supports_multimodal(new_model(takes_media=False))
    check_supports_multimodal(MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model()))


# Modalities


@pytest.mark.parametrize("register", ["register_input_mapper", "register_max_multimodal_tokens"])
def test_an_unknown_modality_is_refused_at_decoration(register: str) -> None:
    with pytest.raises(NotImplementedError, match="Unknown multi-modal data type: smell"):
        getattr(MULTIMODAL_REGISTRY, register)("smell")


def test_a_plugin_adds_a_modality(caplog: pytest.LogCaptureFixture) -> None:
    registry = MultiModalRegistry()
    registry.register_plugin(DepthPlugin())
    assert not caplog.records
    model = registry.register_input_mapper("depth")(new_model())
    registry.register_max_multimodal_tokens("depth")(model)
    config = prepared(registry, model)
    assert registry.get_mm_limits_per_prompt(config) == {"image": 1, "audio": 1, "video": 1, "depth": 1}
    assert registry.map_input(config, {"depth": object()})["depth_map"].shape == (1,)
    assert registry.get_max_tokens_by_modality(config)["depth"] == 12
    registry.register_plugin(DepthPlugin())
    assert "overwritten by the new plugin DepthPlugin" in caplog.text


# Limits


@pytest.mark.parametrize(
    ("num_items", "limit", "is_ok"),
    [(0, 0, True), (0, 1, True), (1, 1, True), (1, 2, True), (2, 2, True), (1, 0, False), (2, 1, False)],
)
def test_limits_bound_the_items_of_a_prompt(num_items: int, limit: int, is_ok: bool) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model())
    config = prepared(MULTIMODAL_REGISTRY, model, limits={"image": limit})
    forms: list[dict[str, Any]] = [{"image": ["item"] * num_items}]
    if num_items < 2:
        forms.append({"image": "item"} if num_items else {})
    for data in forms:
        if is_ok:
            mapped = MULTIMODAL_REGISTRY.map_input(config, data)
            assert ("pixel_values" in mapped) == (num_items > 0)
        else:
            with pytest.raises(ValueError, match=rf"At most {limit} image.*got {num_items}"):
                MULTIMODAL_REGISTRY.map_input(config, data)


@pytest.mark.parametrize("one_item", [{"a": 1, "b": 2}, torch.zeros(5, 2), ("waveform", 16000)])
def test_only_a_list_holds_several_items(one_item: Any) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model())
    MULTIMODAL_REGISTRY.map_input(prepared(MULTIMODAL_REGISTRY, model), {"image": one_item})


def test_a_modality_that_is_not_named_has_a_limit_of_one() -> None:
    config = prepared(MULTIMODAL_REGISTRY, new_model(), limits={"image": 4})
    assert MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(config) == {"image": 4, "audio": 1, "video": 1}


def test_a_text_model_takes_no_media() -> None:
    config = prepared(MULTIMODAL_REGISTRY, new_model(takes_media=False))
    assert set(MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(config).values()) == {0}
    with pytest.raises(ValueError, match="does not support multi-modal inputs"):
        MULTIMODAL_REGISTRY.map_input(config, {"image": "x"})


def test_a_limit_for_an_unknown_modality_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = prepared(MULTIMODAL_REGISTRY, new_model(), limits={"smell": 3})
    assert "smell" in caplog.text
    assert "smell" not in MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(config)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 0"):
        prepared(MULTIMODAL_REGISTRY, new_model(), limits={"image": -1})


def test_limits_are_the_configurations() -> None:
    """They lay in a table by `id()`, and whoever had not called `init_mm_limits_per_prompt` before got an error."""
    config = make_model_config(new_model(), limits={"image": 2})
    assert MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(config) == {"image": 2, "audio": 1, "video": 1}
    other = make_model_config(config.model_class)
    assert MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(other) == {"image": 1, "audio": 1, "video": 1}


# Errors of a request


def test_data_of_an_unknown_modality_is_that_requests_error() -> None:
    config = prepared(MULTIMODAL_REGISTRY, MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model()))
    with pytest.raises(UnknownModalityError, match="Unknown multi-modal data type: smell") as caught:
        MULTIMODAL_REGISTRY.map_input(config, {"smell": "x"})
    assert isinstance(caught.value, NotImplementedError)
    assert caught.value.status == 400


def test_data_without_a_mapper_is_that_requests_error() -> None:
    config = prepared(MULTIMODAL_REGISTRY, MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model()))
    with pytest.raises(UnregisteredModalityError, match=r"AudioPlugin is registered for model class Model") as caught:
        MULTIMODAL_REGISTRY.map_input(config, {"audio": "x"})
    assert isinstance(caught.value, KeyError)
    assert caught.value.status == 400


def test_data_are_checked_before_anything_is_mapped() -> None:
    calls: list[object] = []

    def record(ctx: InputContext, data: object) -> MultiModalKwargs:
        calls.append(data)
        return MultiModalKwargs()

    model = MULTIMODAL_REGISTRY.register_image_input_mapper(record)(new_model())
    config = prepared(MULTIMODAL_REGISTRY, model)
    with pytest.raises(InvalidRequestError):
        MULTIMODAL_REGISTRY.map_input(config, {"image": "fine", "audio": ["too", "many"]} | {"image": ["a", "b"]})
    with pytest.raises(UnregisteredModalityError):
        MULTIMODAL_REGISTRY.map_input(config, {"image": "fine", "audio": "none"})
    assert not calls


def test_two_mappers_may_not_return_the_same_key() -> None:
    model = new_model()
    MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(model)
    MULTIMODAL_REGISTRY.register_audio_input_mapper(mapper)(model)
    config = prepared(MULTIMODAL_REGISTRY, model)
    with pytest.raises(ValueError, match="pixel_values") as caught:
        MULTIMODAL_REGISTRY.map_input(config, {"image": "x", "audio": "y"})
    assert isinstance(caught.value, SensoriumError)


@pytest.mark.parametrize("leaf", [None, "text", object(), {"nested": 1}])
@pytest.mark.parametrize("wrap", [lambda leaf: leaf, lambda leaf: [torch.ones(1), [leaf]]])
def test_a_mapper_must_return_tensors_arrays_and_numbers(leaf: Any, wrap: Any) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(lambda ctx, data: {"bad_key": wrap(leaf)})(new_model())
    with pytest.raises(TypeError, match="bad_key"):
        MULTIMODAL_REGISTRY.map_input(prepared(MULTIMODAL_REGISTRY, model), {"image": "x"})


@pytest.mark.parametrize("result", [None, torch.ones(1), [1]])
def test_a_mapper_must_return_a_dict(result: Any) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(lambda ctx, data: result)(new_model())
    with pytest.raises(TypeError, match="expected a dict"):
        MULTIMODAL_REGISTRY.map_input(prepared(MULTIMODAL_REGISTRY, model), {"image": "x"})


def test_create_input_mapper_binds_the_model() -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(new_model())
    map_input = MULTIMODAL_REGISTRY.create_input_mapper(prepared(MULTIMODAL_REGISTRY, model))
    assert map_input({"image": "x"}, None)["pixel_values"].shape == (1, 2)


# Largest numbers of tokens


def test_largest_numbers_of_tokens() -> None:
    model = new_model()
    MULTIMODAL_REGISTRY.register_max_image_tokens(10)(model)
    MULTIMODAL_REGISTRY.register_max_multimodal_tokens("video", lambda ctx: 100)(model)
    config = prepared(MULTIMODAL_REGISTRY, model, limits={"image": 3, "video": 2})
    per_item = {"image": 10, "video": 100, "audio": 0}
    assert MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config) == per_item
    assert MULTIMODAL_REGISTRY.get_max_tokens_by_modality(config) == {"image": 30, "video": 200, "audio": 0}
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(config) == 230


@pytest.mark.parametrize(("modality", "default"), [("image", 3000), ("video", 4096)])
def test_default_largest_numbers_of_tokens(modality: str, default: int) -> None:
    model = MULTIMODAL_REGISTRY.register_max_multimodal_tokens(modality)(new_model())
    config = prepared(MULTIMODAL_REGISTRY, model)
    assert MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config)[modality] == default


def test_audio_has_no_defaults() -> None:
    model = new_model()
    MULTIMODAL_REGISTRY.register_audio_input_mapper()(model)
    MULTIMODAL_REGISTRY.register_max_audio_tokens()(model)
    config = prepared(MULTIMODAL_REGISTRY, model)
    with pytest.raises(NotImplementedError, match="no default audio input mapper"):
        MULTIMODAL_REGISTRY.map_input(config, {"audio": "x"})
    with pytest.raises(NotImplementedError, match="no default maximum number of audio tokens"):
        MULTIMODAL_REGISTRY.get_max_multimodal_tokens(config)


@pytest.mark.parametrize("number", [0, -1])
def test_a_largest_number_below_one_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        MULTIMODAL_REGISTRY.register_max_image_tokens(number)
    model = MULTIMODAL_REGISTRY.register_max_image_tokens(lambda ctx: number)(new_model())
    with pytest.raises(ValueError, match="positive integer"):
        MULTIMODAL_REGISTRY.get_max_multimodal_tokens(prepared(MULTIMODAL_REGISTRY, model))


def test_a_mapper_without_a_largest_number_counts_as_zero_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)(type("NoMaximum", (new_model(),), {}))
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(prepared(MULTIMODAL_REGISTRY, model)) == 0
    assert "NoMaximum takes 'image' data" in caplog.text


def test_a_class_that_takes_no_media_has_no_tokens_of_media() -> None:
    model = MULTIMODAL_REGISTRY.register_max_image_tokens(10)(new_model(takes_media=False))
    assert MULTIMODAL_REGISTRY.get_max_multimodal_tokens(prepared(MULTIMODAL_REGISTRY, model)) == 0


# Hints


@pytest.mark.parametrize(
    ("declared", "ids"),
    [(7, {7}), ([7, 8], {7, 8}), ((-3,), {-3}), (lambda ctx: ctx.get_hf_config().vocab_size, {64})],
)
def test_placeholder_tokens_are_declared_as_ids_or_by_a_function(declared: Any, ids: set[int]) -> None:
    model = MULTIMODAL_REGISTRY.register_placeholder_tokens("image", declared)(new_model())
    config = make_model_config(model)
    assert MULTIMODAL_REGISTRY.get_placeholder_token_ids(config, "image") == frozenset(ids)
    assert MULTIMODAL_REGISTRY.get_placeholder_tokens(config) == {"image": ids}
    assert MULTIMODAL_REGISTRY.get_placeholder_token_ids(config, "video") is None
    assert MULTIMODAL_REGISTRY.get_placeholder_tokens(make_model_config(new_model())) == {}


def test_placeholder_strings_are_declared_as_text_or_by_a_function_of_the_number() -> None:
    model = MULTIMODAL_REGISTRY.register_placeholder_str("image", "<image>")(new_model())
    MULTIMODAL_REGISTRY.register_placeholder_str("audio", lambda i: f"Audio {i}: <a>")(model)
    config = make_model_config(model)
    assert MULTIMODAL_REGISTRY.get_placeholder_str(config, "image", 2) == "<image>"
    assert MULTIMODAL_REGISTRY.get_placeholder_str(config, "audio", 2) == "Audio 2: <a>"
    assert MULTIMODAL_REGISTRY.get_placeholder_str(config, "video") is None


# Merged processors


def test_a_merged_processor_is_made_with_the_tokenizer() -> None:
    model = MULTIMODAL_REGISTRY.register_processor(Processor.make)(new_model())
    config = make_model_config(model)
    assert MULTIMODAL_REGISTRY.has_processor(config)
    processor: Any = MULTIMODAL_REGISTRY.create_processor(config, "tokenizer")
    assert processor.ctx.tokenizer == "tokenizer"
    assert processor.apply("text", {}, {})["prompt_token_ids"] == [1]
    other = make_model_config(new_model())
    assert not MULTIMODAL_REGISTRY.has_processor(other)
    with pytest.raises(KeyError, match="register_processor"):
        MULTIMODAL_REGISTRY.create_processor(other, "tokenizer")
