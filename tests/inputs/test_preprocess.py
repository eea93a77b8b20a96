"""The way of a request from prompt to `EngineRequest`: forms, processors, mapping, identity."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidTypeError,
    ModelError,
    ProcessorError,
    RequestError,
    UnknownModalityError,
    UnregisteredModalityError,
)
from sensorium.inputs import token_inputs
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams
from tests.inputs.front import (
    IMAGE,
    VIDEO,
    VOCAB_SIZE,
    Calls,
    Front,
    expand,
    features_of,
    keys_of,
    map_pictures,
    new_model,
    picture,
    spans_of,
)

# Prompts


def test_a_text_becomes_ids() -> None:
    front = Front()
    processed = front("ab")
    tokenizer = front.preprocessor.encoder
    assert tokenizer is not None
    request = processed.engine_request
    assert request.prompt_token_ids == tokenizer.tokenizer.encode("ab")
    assert (processed.prompt_text, request.media, request.mrope_positions) == ("ab", (), None)
    assert request.eos_token_ids == {tokenizer.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "ids", [[5, 6], (5, 6), np.array([5, 6]), torch.tensor([5, 6])], ids=lambda v: type(v).__name__
)
def test_ids_come_in_several_forms(ids: Any) -> None:
    front = Front(tokenizer=False)
    assert front({"prompt_token_ids": ids}).engine_request.prompt_token_ids == [5, 6]
    if not isinstance(ids, torch.Tensor):
        assert front(ids).engine_request.prompt_token_ids == [5, 6]


def test_ids_win_over_text_which_is_kept_for_show() -> None:
    processed = Front()({"prompt": "hello", "prompt_token_ids": [5, 6]})
    assert processed.engine_request.prompt_token_ids == [5, 6]
    assert processed.prompt_text == "hello"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (None, InvalidTypeError, "expected a string, a list of token ids or a dict"),
        (3, InvalidTypeError, "got a value of type int"),
        ({"prompt": 3}, InvalidTypeError, "prompt: got a value of type int, expected a string"),
        ({}, InvalidTypeError, "expected 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "a", "prompts": "b"}, InvalidTypeError, r"unknown keys \['prompts'\]"),
        ({"prompt_token_ids": "ab"}, InvalidTypeError, "expected a list of token ids"),
        ({"prompt_token_ids": [1.5]}, InvalidTypeError, "other than integers"),
        ({"prompt_token_ids": [[1], [2]]}, InvalidTypeError, "other than integers"),
        ({"prompt_token_ids": [[1], [2, 3]]}, InvalidTypeError, "other than integers"),
        ({"prompt_token_ids": [2**70]}, InvalidTypeError, "other than integers"),
        ({"prompt_token_ids": {1, 2}}, InvalidTypeError, "expected a list of token ids"),
        ({"prompt": "a", "multi_modal_data": [1]}, InvalidTypeError, "expected a dict with names"),
        ({"prompt": "a", "mm_processor_kwargs": {1: 2}}, InvalidTypeError, "expected a dict with names"),
        ({"prompt": "a", "add_special_tokens": 1}, InvalidTypeError, "expected true or false"),
        ({"encoder_prompt": "a", "decoder_prompt": None}, InvalidRequestError, "decoder-only model"),
        ("", InvalidRequestError, "Prompt cannot be empty"),
        ([], InvalidRequestError, "Prompt cannot be empty"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, InvalidRequestError, "out of vocabulary"),
        ({"prompt_token_ids": [-1]}, InvalidRequestError, "got token id -1 at position 0, where no media stands"),
    ],
)
def test_prompts_of_another_shape_are_refused(prompt: Any, error: type[RequestError], message: str) -> None:
    with pytest.raises(error, match=message):
        Front()(prompt)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InvalidTypeError, match="runs without a tokenizer"):
        Front(tokenizer=False)("a")


# Media


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"smell": 1}, UnknownModalityError, "Unknown multi-modal data type: smell"),
        ({"audio": np.zeros(4)}, UnregisteredModalityError, "No input mapper in AudioPlugin .* FrontModel"),
        (
            {"image": [picture()] * 5},
            InvalidRequestError,
            r"At most 4 image\(s\) may be provided in one request: got 5",
        ),
        ({"image": None}, InvalidRequestError, "placeholder token"),
        ({"image": [None]}, InvalidTypeError, "got None for an item"),
        ({"image": "cat.png"}, InvalidTypeError, "nothing here decodes it"),
        ({"image": np.array([[1.0, np.nan]])}, InvalidRequestError, "NaN or infinite values"),
        ({"image": np.zeros((0, 4))}, InvalidRequestError, r"an empty array of shape \(0, 4\)"),
        ({"image": torch.eye(4).to_sparse()}, InvalidRequestError, "expected a dense tensor"),
        ({"image": torch.empty(2, 4, device="meta")}, InvalidRequestError, "expected a dense tensor"),
    ],
)
def test_media_that_can_not_be_taken_are_refused(data: Any, error: type[RequestError], message: str) -> None:
    with pytest.raises(error, match=message):
        Front()({"prompt": "<image>", "multi_modal_data": data})


def test_media_for_a_text_model_are_refused() -> None:
    model = type("TextModel", (torch.nn.Module,), {})
    with pytest.raises(InvalidRequestError, match="Your model does not support multi-modal inputs"):
        Front(model, features=features_of(tier="text", placeholder_token_ids={})).images(picture())


def test_an_item_gets_its_span_its_kwargs_and_its_place_among_its_kind() -> None:
    images = [picture(3, seed=1), picture(2, seed=2)]
    processed = Front().images(*images, text="a<image>b<image>c")
    request = processed.engine_request
    ids = list(request.prompt_token_ids)
    assert spans_of(processed) == [(1, 3), (5, 2)]
    assert ids[1:4] == [IMAGE] * 3
    assert ids[5:7] == [IMAGE] * 2
    for index, (item, image) in enumerate(zip(request.media, images, strict=True)):
        assert (item.modality, item.index, item.span.row_offsets) == ("image", index, None)
        assert item.kwargs is not None
        np.testing.assert_array_equal(item.kwargs["pixel_values"][0], image)
    assert processed.media_token_counts == {"image": (3, 2)}
    assert processed.num_prompt_tokens == len(ids)


def test_a_list_is_mapped_item_by_item_and_a_bare_object_as_given() -> None:
    calls = Calls()
    front = Front(new_model(calls))
    front.images(picture(2, 1), picture(2, 2))
    assert [len(data) for data in calls.of("image")] == [1, 1]
    bare = picture(2, 3)
    front({"prompt": "<image>", "multi_modal_data": {"image": bare}})
    assert calls.of("image")[-1] is bare


def lists_only(ctx: Any, data: Any) -> dict[str, Any]:
    if not isinstance(data, list):
        raise TypeError("I want a list")
    return {"pixel_values": data}


def objects_only(ctx: Any, data: Any) -> dict[str, Any]:
    return {"pixel_values": data.reshape(-1)}


@pytest.mark.parametrize("mapper", [lists_only, objects_only])
@pytest.mark.parametrize("bare", [True, False])
def test_a_mapper_may_take_one_form_only(mapper: Any, bare: bool) -> None:
    front = Front(new_model(mappers={"image": mapper}))
    data = picture() if bare else [picture()]
    (item,) = front({"prompt": "<image>", "multi_modal_data": {"image": data}}).engine_request.media
    assert item.kwargs is not None


def test_models_that_map_items_together_get_one_group() -> None:
    calls = Calls()
    front = Front(new_model(calls), features=features_of(maps_items_alone=False))
    images = [picture(3, 1), picture(2, 2)]
    (item,) = front.images(*images, text="a<image>b<image>c").engine_request.media
    assert (item.span.offset, item.span.length, item.span.num_rows) == (1, 6, 5)
    assert item.span.positions().tolist() == [1, 2, 3, 5, 6]
    assert [len(data) for data in calls.of("image")] == [2]
    assert item.kwargs is not None
    assert len(item.kwargs["pixel_values"]) == 2


def test_several_modalities_come_in_order_of_offset() -> None:
    calls = Calls()
    mappers = {"image": map_pictures("image", calls), "video": map_pictures("video", calls, "video_values")}
    front = Front(new_model(mappers=mappers))
    data = {"image": [picture(1, 1), picture(1, 2)], "video": [picture(2, 3)[None]]}
    processed = front({"prompt": "<image>a<|video_pad|>b<image>", "multi_modal_data": data})
    media = processed.engine_request.media
    assert [(item.modality, item.index, item.span.offset) for item in media] == [
        ("image", 0, 0),
        ("video", 0, 2),
        ("image", 1, 5),
    ]
    assert list(processed.engine_request.prompt_token_ids)[2:4] == [VIDEO] * 2


# Processors and mappers as authors write them


def mutating(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    expanded = expand(ctx, inputs)
    inputs["prompt_token_ids"].clear()
    inputs["multi_modal_data"]["image"].clear()
    inputs["multi_modal_data"].clear()
    return token_inputs(  # type: ignore[return-value]
        expanded["prompt_token_ids"], multi_modal_data={"image": [picture(3)]}
    )


def test_a_processor_that_changes_its_argument_does_no_harm() -> None:
    front = Front(new_model(processor=mutating))
    images = [picture(3)]
    data = {"image": images}
    ids = [IMAGE, 5]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": data}
    processed = front(prompt)
    assert spans_of(processed) == [(0, 3)]
    assert (ids, list(data), len(images)) == ([IMAGE, 5], ["image"], 1)


def test_a_plain_dict_without_type_is_fine() -> None:
    def processor(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        expanded = expand(ctx, inputs)
        return {name: expanded[name] for name in ("prompt_token_ids", "multi_modal_data")}

    assert spans_of(Front(new_model(processor=processor)).images(picture(3))) == [(0, 3)]


def test_a_processor_may_replace_an_item_and_the_replacement_counts_as_content() -> None:
    def wrap(ctx: Any, inputs: dict[str, Any], *, salt: int = 0) -> dict[str, Any]:
        expanded = expand(ctx, inputs)
        images = [{"image": image, "salt": salt} for image in inputs["multi_modal_data"]["image"]]
        return {**expanded, "multi_modal_data": {"image": images}}

    def unwrap(ctx: Any, data: Any) -> dict[str, Any]:
        return {"pixel_values": data[0]["image"], "salt": data[0]["salt"]}

    front = Front(new_model(processor=wrap, mappers={"image": unwrap}))
    image = picture(3)
    one, again = front.images(image), front.images(image)
    other = front.images(image, mm_processor_kwargs={"salt": 7})
    assert keys_of(one) == keys_of(again) != keys_of(other)
    (item,) = other.engine_request.media
    assert item.kwargs is not None
    assert item.kwargs["salt"] == 7


@pytest.mark.parametrize("as_list", [True, False])
def test_what_a_processor_takes_from_the_prompt_is_part_of_identity(as_list: bool) -> None:
    """As in Molmo, whose processor puts the length of the prompt beside the image."""

    def attach(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        expanded = expand(ctx, inputs)
        length = len(expanded["prompt_token_ids"])
        items = [{"image": image, "seq_len": length} for image in inputs["multi_modal_data"]["image"]]
        return {**expanded, "multi_modal_data": {"image": items if as_list else {"items": items}}}

    def mapper(ctx: Any, data: Any) -> dict[str, Any]:
        return {"seq_len": (data if as_list else data["items"])[0]["seq_len"]}

    front = Front(new_model(processor=attach, mappers={"image": mapper}))
    image = picture(3)
    short, same, long = (front.images(image, text=text) for text in ("<image>a", "<image>b", "<image>abc"))
    assert keys_of(short) == keys_of(same) != keys_of(long)
    assert [each.engine_request.media[0].kwargs["seq_len"] for each in (short, long)] == [4, 6]  # type: ignore[index]


def test_a_processor_may_turn_the_list_into_one_object() -> None:
    def process(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        expanded = expand(ctx, inputs)
        return {**expanded, "multi_modal_data": {"image": {"all": inputs["multi_modal_data"]["image"]}}}

    def unwrap(ctx: Any, data: Any) -> dict[str, Any]:
        return {"pixel_values": data["all"]}

    front = Front(new_model(processor=process, mappers={"image": unwrap}))
    (item,) = front.images(picture(2, 1), picture(1, 2)).engine_request.media
    assert (item.span.offset, item.span.length, item.span.num_rows) == (0, 4, 3)


def test_a_processor_may_map_by_itself() -> None:
    calls = Calls()

    def process(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        expanded = expand(ctx, inputs)
        kwargs = MultiModalKwargs({"pixel_values": torch.ones(1)})
        return token_inputs(expanded["prompt_token_ids"], multi_modal_inputs=kwargs)  # type: ignore[return-value]

    front = Front(new_model(calls, processor=process))
    (item,) = front.images(picture(2)).engine_request.media
    assert (item.span.offset, item.span.length) == (0, 2)
    assert item.kwargs is not None
    assert item.kwargs["pixel_values"].tolist() == [1.0]
    assert not calls


@pytest.mark.parametrize("given_as", ["text", "ids"])
def test_a_merged_processor_stands_in_for_processor_and_mappers(given_as: str) -> None:
    class Merged:
        def apply(self, prompt: Any, mm_data: Any, mm_processor_kwargs: Any) -> Any:
            assert isinstance(prompt, str if given_as == "text" else list)
            rows = [len(image) for image in mm_data["image"]]
            ids = [token for count in rows for token in [IMAGE] * count + [5]]
            offsets = [sum(rows[:index]) + index for index in range(len(rows))]
            ranges = [{"offset": offset, "length": count} for offset, count in zip(offsets, rows, strict=True)]
            kwargs = MultiModalKwargs({"pixel_values": torch.tensor(rows)})
            return {
                "type": "multimodal",
                "prompt": "",
                "prompt_token_ids": ids,
                "mm_kwargs": kwargs,
                "mm_placeholders": {"image": ranges},
            }

    model = type("MergedModel", (torch.nn.Module, SupportsMultiModal), {})
    model = MULTIMODAL_REGISTRY.register_processor(lambda ctx: Merged())(model)
    front = Front(model)
    prompt: dict[str, Any] = {"prompt": "a"} if given_as == "text" else {"prompt_token_ids": [5]}
    one = front({**prompt, "multi_modal_data": {"image": [picture(2)]}})
    assert spans_of(one) == [(0, 2)]
    two = front({**prompt, "multi_modal_data": {"image": [picture(2, 1), picture(3, 2)]}})
    (group,) = two.engine_request.media
    assert (group.span.offset, group.span.length, group.span.num_rows) == (0, 6, 5)
    assert keys_of(one) != keys_of(two)
    with pytest.raises(InvalidRequestError, match=r"At most 4 image\(s\)"):
        front({**prompt, "multi_modal_data": {"image": [picture(2)] * 5}})


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (lambda inputs: {**inputs, "multi_modal_data": {}}, ProcessorError),
        (lambda inputs: {"prompt_token_ids": inputs["prompt_token_ids"]}, ProcessorError),
        (lambda inputs: {**inputs, "prompt_token_ids": "ab"}, ModelError),
        (lambda inputs: {**inputs, "prompt_token_ids": [0.5]}, ModelError),
        (lambda inputs: None, ModelError),
    ],
)
def test_processors_that_break_their_rules_fail_the_request(result: Any, error: type[Exception]) -> None:
    front = Front(new_model(processor=lambda ctx, inputs: result(inputs)))
    with pytest.raises(error):
        front.images(picture())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(TypeError, InvalidTypeError), (ValueError, InvalidRequestError), (KeyError, ProcessorError)],
)
@pytest.mark.parametrize("where", ["processor", "mapper"])
def test_failures_of_author_code_tell_the_caller_nothing_but_their_kind(
    where: str, raised: type[Exception], expected: type[RequestError], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(ctx: Any, data: Any) -> Any:
        raise raised("/home/secret/path")

    model = new_model(processor=fail) if where == "processor" else new_model(mappers={"image": fail})
    with caplog.at_level(logging.WARNING), pytest.raises(expected) as caught:
        Front(model).images(picture())
    assert "secret" not in str(caught.value)
    assert raised.__name__ in str(caught.value)
    assert "secret" in caplog.text
    assert isinstance(caught.value, RequestError)


@pytest.mark.parametrize("leaf", [None, "text", object(), [1, [None]], np.array(["a"])])
def test_mapped_values_that_are_no_tensors_are_refused(leaf: object) -> None:
    front = Front(new_model(mappers={"image": lambda ctx, data: {"pixel_values": leaf}}))
    with pytest.raises(TypeError, match="in 'pixel_values'"):
        front.images(picture())


def test_two_mappers_with_one_key_are_refused() -> None:
    calls = Calls()
    front = Front(new_model(mappers={name: map_pictures(name, calls) for name in ("image", "video")}))
    data = {"image": [picture(1)], "video": [picture(1)[None]]}
    with pytest.raises(ValueError, match="the same keyword argument 'pixel_values'"):
        front({"prompt": "<image>a<|video_pad|>", "multi_modal_data": data})


# mm_processor_kwargs


def test_kwargs_of_the_request_win_over_the_engine_s_and_are_part_of_identity() -> None:
    image = picture(2)
    front = Front(mm_processor_kwargs={"scale": 2.0})
    processed = [front.images(image), front.images(image, mm_processor_kwargs={"scale": 3.0})]
    scales = [item.engine_request.media[0].kwargs["pixel_values"][0][0, 0] / image[0, 0] for item in processed]  # type: ignore[index]
    assert scales == [pytest.approx(2.0), pytest.approx(3.0)]
    assert keys_of(processed[0]) != keys_of(processed[1])
    by_argument = front(
        {"prompt": "<image>x", "multi_modal_data": {"image": [image]}}, mm_processor_kwargs={"scale": 3.0}
    )
    assert keys_of(by_argument) == keys_of(processed[1])


@pytest.mark.parametrize("name", ["colour", "ctx", "scal", "images_kwargs"])
def test_names_that_nothing_takes_are_refused(name: str) -> None:
    """They were dropped with a line in the log, where nobody who sent them could see it."""
    with pytest.raises(InvalidRequestError, match=f"'{name}'"):
        Front().images(picture(), mm_processor_kwargs={name: 1})
    with pytest.raises(ConfigError, match=f"'{name}'"):
        Front(mm_processor_kwargs={name: 1})
    Front().images(picture(), mm_processor_kwargs={name: None})  # null asks for nothing


# Identity


def test_identity_follows_content_and_nothing_else() -> None:
    front = Front()
    image = picture(3)
    base = keys_of(front.images(image))
    assert keys_of(front.images(image.copy())) == base
    assert keys_of(front.images(image, text="other text <image>")) == base
    assert keys_of(front.images(picture(3, seed=9))) != base
    assert keys_of(front.images(image.astype(np.float64))) != base
    assert all(len(key) == 64 for key in base)


def test_a_salt_separates_tenants() -> None:
    front = Front()
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": picture()}}
    keys = {tuple(keys_of(front(prompt, cache_salt=salt))) for salt in (None, "a", "b")}
    assert len(keys) == 3
    assert front(prompt, cache_salt="a").engine_request.cache_salt == "a"


def test_names_replace_content() -> None:
    calls = Calls()
    front = Front(new_model(calls))
    named = [front.images(picture(3, seed), multi_modal_uuids={"image": ["cat"]}) for seed in (1, 2)]
    assert keys_of(named[0]) == keys_of(named[1])
    assert len(calls) == 1
    assert keys_of(front.images(picture(3, 1))) != keys_of(named[0])
    assert keys_of(front.images(picture(3, 1), multi_modal_uuids={"image": [None]})) == keys_of(
        front.images(picture(3, 1))
    )


@pytest.mark.parametrize(
    ("uuids", "error"),
    [
        ({"image": ["a", "b"]}, InvalidRequestError),
        ({"image": [""]}, InvalidRequestError),
        ({"image": ["a" * 1000]}, InvalidRequestError),
        ({"image": [3]}, InvalidTypeError),
        ({"image": 3}, InvalidTypeError),
        ({"video": ["a"]}, InvalidRequestError),
    ],
)
def test_names_must_fit_their_items(uuids: Any, error: type[RequestError]) -> None:
    with pytest.raises(error, match="multi_modal_uuids"):
        Front().images(picture(), multi_modal_uuids=uuids)


def test_rows_that_depend_on_the_prompt_are_not_shared_between_prompts() -> None:
    front = Front(features=features_of(tier="0 auto-split", shares_items=False))
    image = picture(3)
    one, same, other = front.images(image), front.images(image), front.images(image, text="other <image>")
    assert keys_of(one) == keys_of(same) != keys_of(other)
    twice = front.images(image, image)
    assert len(set(keys_of(twice))) == 2


def test_equal_items_in_one_prompt_share_a_key() -> None:
    assert len(set(keys_of(Front().images(picture(3), picture(3))))) == 1


def test_unknown_objects_are_served_but_never_shared() -> None:
    class Thing:
        shape = (3, 4)

    calls = Calls()

    def mapper(ctx: Any, data: Any) -> dict[str, Any]:
        calls.append(("image", data))
        return {"pixel_values": 1}

    front = Front(new_model(mappers={"image": mapper}))
    thing = Thing()
    keys = keys_of(front.images(thing)) + keys_of(front.images(thing))
    assert len(set(keys)) == 2
    assert len(calls) == 2


# The cache


def test_a_repeated_item_is_mapped_once() -> None:
    calls = Calls()
    front = Front(new_model(calls))
    first = front.images(picture(3)).engine_request.media[0].kwargs
    assert front.images(picture(3)).engine_request.media[0].kwargs is first
    assert len(calls) == 1
    statistics = front.preprocessor.statistics()
    assert (statistics.hits, statistics.misses) == (1, 1)


@pytest.mark.parametrize("kind", ["array", "tensor", "view"])
def test_an_array_that_its_caller_fills_anew_changes_nothing_that_is_kept(kind: str) -> None:
    def wrap(ctx: Any, data: Any) -> Any:
        return {"pixel_values": [torch.as_tensor(item) for item in data], "constant": torch.ones(1)}

    front = Front(new_model(mappers={"image": wrap}))
    buffer = np.ones((6, 4), np.float32)
    image = torch.from_numpy(buffer) if kind == "tensor" else buffer[::2] if kind == "view" else buffer
    first = front.images(image).engine_request.media[0]
    buffer[:] = 7
    other = front.images(image).engine_request.media[0]
    buffer[:] = 1
    again = front.images(image).engine_request.media[0]
    assert first.key == again.key != other.key
    values = [float(item.kwargs["pixel_values"][0].mean()) for item in (first, other, again) if item.kwargs]
    assert values == [1.0, 7.0, 1.0]
    assert front.preprocessor.statistics().misses == 2


def test_many_threads_give_the_results_of_one() -> None:
    front = Front()
    prompts = [[picture(1 + seed % 4, seed % 5), picture(2, seed % 3)] for seed in range(40)]
    expected = [front.images(*images) for images in prompts]
    fresh = Front(front.config.model_config.model_class)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda images: fresh.images(*images), prompts))
    for one, other in zip(expected, found, strict=True):
        assert spans_of(one) == spans_of(other)
        assert one.engine_request.prompt_token_ids == other.engine_request.prompt_token_ids
    assert fresh.preprocessor.statistics().misses == len({key for one in found for key in keys_of(one)})


# Forms of items


def test_frames_in_a_list_are_one_video() -> None:
    calls = Calls()
    mappers = {"video": map_pictures("video", calls)}
    front = Front(new_model(mappers=mappers, processor=None), features=features_of(max_item_rows={}))
    frames = [np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)]
    for video in (frames, np.stack(frames), [np.stack(frames)], [frames]):
        (item,) = front({"prompt": "<|video_pad|>", "multi_modal_data": {"video": video}}).engine_request.media
        assert item.kwargs is not None
        assert tuple(item.kwargs["pixel_values"][0].shape) == (2, 2, 2, 3)
    with pytest.raises(InvalidRequestError, match="expected one shape"):
        front({"prompt": "<|video_pad|>", "multi_modal_data": {"video": [frames[0], frames[1][:1]]}})


def test_samples_in_a_list_are_one_sound() -> None:
    calls = Calls()
    features = features_of(placeholder_token_ids={"audio": frozenset({IMAGE})}, max_item_rows={})
    front = Front(new_model(mappers={"audio": map_pictures("audio", calls)}, processor=None), features=features)
    front({"prompt": "<image>", "multi_modal_data": {"audio": [0.0, 0.5, 1.0]}})
    assert calls.of("audio")[0].tolist() == [0.0, 0.5, 1.0]


# Sampling parameters


@pytest.mark.parametrize(("asked", "given"), [(None, 4094), (5000, 4094), (3, 3)])
def test_outputs_end_with_the_context(asked: int | None, given: int) -> None:
    params = Front()("ab", SamplingParams(max_tokens=asked)).engine_request.sampling_params
    assert params.max_tokens == given


def test_sampling_parameters_are_checked_against_the_model() -> None:
    front = Front()
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        front("a", SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
    bad = front("a", SamplingParams(bad_words=["no"])).engine_request.sampling_params.bad_words_token_ids
    assert len(bad) == 2


def test_pooling_needs_no_room_for_output() -> None:
    front = Front()
    ids = [5] * front.config.model_config.max_model_len
    assert front(ids, pooling=PoolingParams()).engine_request.pooling
    with pytest.raises(InvalidRequestError, match="too long to fit into the model"):
        front(ids)
