"""Admission decides: what a step could not bear is refused before it is queued, with both numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from sensorium.config import CacheConfig, SchedulerConfig
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from tests.inputs.front import (
    HIDDEN_SIZE,
    IMAGE,
    MAX_ROWS,
    START,
    VOCAB_SIZE,
    Calls,
    Front,
    expand,
    expand_with_ranges,
    features_of,
    map_pictures,
    new_model,
    picture,
    spans_of,
)

# Length


def test_a_prompt_that_does_not_fit_says_which_share_is_media() -> None:
    front = Front(limits={"image": 1000})
    images = [picture(8, seed) for seed in range(600)]
    message = (
        "the prompt is too long to fit into the model: got 4800 (4800 from 600 image items) tokens, expected at most "
        "4095. "
        "This model's maximum context length is 4096 tokens. Send fewer or smaller media items, shorten the prompt, or "
        "raise max_model_len."
    )
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        front.images(*images, text="<image>" * 600)


def test_nothing_is_mapped_for_a_prompt_that_does_not_fit() -> None:
    calls = Calls()
    front = Front(new_model(calls), limits={"image": 1000})
    with pytest.raises(InvalidRequestError, match="too long to fit into the model"):
        front.images(*[picture(8, seed) for seed in range(600)], text="<image>" * 600)
    assert not calls


@pytest.mark.parametrize("prompt", ["a" * 5000, [5] * 5000, "a" * 100_000_000])
def test_text_is_bounded_before_it_is_processed(prompt: Any) -> None:
    def processor(ctx: Any, inputs: Any) -> Any:
        raise AssertionError("processed")

    with pytest.raises(InvalidRequestError, match=r"too long to fit into the model: got .* expected at most 4096"):
        Front(new_model(processor=processor))(prompt)


# Placeholders and special tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no placeholder", "image placeholders: got 0 in the prompt for 2 items"),
        ("<image>", "image placeholders: got 1 in the prompt for 2 items"),
        ("<image>a<image>b<image>", "image placeholders: got 3 in the prompt for 2 items"),
        ("<image><image>a<image>", "image placeholders: got 3 in the prompt for 2 items"),
    ],
)
def test_placeholders_must_be_as_many_as_items(text: str, message: str) -> None:
    images = [picture(2, 1), picture(3, 2)]
    with pytest.raises(InvalidRequestError, match=message):
        Front().images(*images, text=text)


def test_fewer_ranges_than_items_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="got 1 ranges for 2 items, expected the same length"):
        Front(new_model(processor=expand_with_ranges)).images(picture(), picture(), text="<image>")


@pytest.mark.parametrize("images", [[], [picture(2)]], ids=["no image", "one image"])
def test_a_typed_placeholder_without_an_image_is_refused(images: list[Any]) -> None:
    # Published as CVE-2026-44222: the engine died of an image token that no image belonged to.
    front = Front(new_model(processor=expand_with_ranges))
    with pytest.raises(InvalidRequestError, match=f"got the placeholder token {IMAGE} at position"):
        front.images(*images, text="".join("<image>" for _ in images) + "a<image>")


@pytest.mark.parametrize("token", [-3, -1])
def test_ids_outside_the_vocabulary_stand_for_media_only(token: int) -> None:
    def processor(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = [token if each == IMAGE else each for each in expand(ctx, inputs)["prompt_token_ids"]]
        return {**inputs, "prompt_token_ids": ids}

    features = features_of(placeholder_token_ids={"image": frozenset({token})})
    front = Front(new_model(processor=processor), features=features)
    processed = front.images(picture(2), text="a<image>b")
    assert list(processed.engine_request.prompt_token_ids)[1:3] == [token] * 2
    assert spans_of(processed) == [(1, 2)]
    with pytest.raises(InvalidRequestError, match=f"got token id {token} at position 0, where no media stands"):
        front({"prompt_token_ids": [token, 5]})


def test_a_placeholder_id_beyond_the_vocabulary_is_fine_at_media_rows() -> None:
    def processor(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = [VOCAB_SIZE + 9 if each == IMAGE else each for each in expand(ctx, inputs)["prompt_token_ids"]]
        return {**inputs, "prompt_token_ids": ids}

    features = features_of(placeholder_token_ids={"image": frozenset({VOCAB_SIZE + 9})})
    assert spans_of(Front(new_model(processor=processor), features=features).images(picture(2))) == [(0, 2)]


def test_special_tokens_between_the_rows_of_an_item_stay_text() -> None:
    processed = Front(new_model(processor=expand_with_ranges)).images(picture(2))
    (item,) = processed.engine_request.media
    assert (item.span.offset, item.span.length, item.span.num_rows) == (0, 4, 2)
    assert item.span.positions().tolist() == [1, 2]
    assert processed.engine_request.prompt_token_ids[0] == START


# Sizes


def test_an_item_larger_than_the_model_s_limit_is_refused() -> None:
    front = Front()
    front.images(picture(MAX_ROWS))
    with pytest.raises(InvalidRequestError, match=r"got 9 rows, expected at most 8.*register_max_multimodal_tokens"):
        front.images(picture(MAX_ROWS + 1))


def test_a_group_may_have_as_many_rows_as_its_items() -> None:
    front = Front(features=features_of(maps_items_alone=False))
    front.images(picture(8, 1), picture(8, 2))
    with pytest.raises(InvalidRequestError, match="got 17 rows, expected at most 16"):
        front.images(picture(8, 1), picture(9, 2))


def test_items_that_must_stay_whole_fit_a_step() -> None:
    scheduler = {"scheduler_config": SchedulerConfig(max_num_batched_tokens=4)}
    assert spans_of(Front(engine=scheduler).images(picture(5))) == [(0, 5)]
    front = Front(features=features_of(atomic_items=True), engine=scheduler)
    front.images(picture(4))
    with pytest.raises(InvalidRequestError, match=r"got 5 tokens, expected at most 4.*max_num_batched_tokens"):
        front.images(picture(5))


def test_what_sees_itself_both_ways_fits_a_step() -> None:
    """No chunk may end in it, so that a request with more could never run."""
    scheduler = SchedulerConfig(max_num_batched_tokens=4, max_num_encoder_rows=6)
    engine = {"scheduler_config": scheduler}
    front = Front(features=features_of(two_way=frozenset({"image"})), engine=engine)
    assert front.images(picture(4)).engine_request.two_way_spans == ((0, 4),)
    with pytest.raises(InvalidRequestError, match=r"got 5 tokens at position 0 .* at most 4.*max_num_batched_tokens"):
        front.images(picture(5))
    roomy = {"scheduler_config": replace(scheduler, max_num_batched_tokens=40)}
    front = Front(features=features_of(two_way=frozenset({"prompt"})), engine=roomy)
    assert front.images(picture(7)).engine_request.two_way_spans == ((0, 8),), "one item has a step alone"
    with pytest.raises(InvalidRequestError, match=r"2 media items with 7 rows .* at most 6 rows.*max_num_encoder_rows"):
        front.images(picture(4), picture(3, 1))
    whole = {"scheduler_config": replace(scheduler, enable_chunked_prefill=False)}
    Front(features=features_of(two_way=frozenset({"prompt"})), engine=whole).images(picture(4), picture(3, 1))


# Embeddings as input


def embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", [(3, HIDDEN_SIZE), (1, 3, HIDDEN_SIZE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_fit_are_taken(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = embeddings(*shape, dtype=dtype)
    (item,) = Front().images(given).engine_request.media
    assert (item.span.length, item.span.num_rows) == (3, 3)
    assert item.kwargs is not None
    assert torch.equal(item.kwargs["image_embeds"][0], given)


def test_neighbouring_embeddings_are_told_apart_by_their_rows() -> None:
    processed = Front().images(embeddings(2, HIDDEN_SIZE), embeddings(3, HIDDEN_SIZE), text="<image><image>")
    assert spans_of(processed) == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (embeddings(3, HIDDEN_SIZE + 1), r"got shape \(3, 17\), expected \(num_rows, 16\)"),
        (embeddings(1, 1, 1, 3, HIDDEN_SIZE), "image embeddings: got shape"),
        (torch.ones(3, HIDDEN_SIZE, dtype=torch.int64), "expected floating point"),
        (torch.full((3, HIDDEN_SIZE), float("nan")), "NaN or infinite"),
        (torch.full((3, HIDDEN_SIZE), float("inf")), "NaN or infinite"),
        (embeddings(3, HIDDEN_SIZE).to_sparse(), "expected a dense tensor"),
        # 1.5 KB that claim 4 TiB
        (
            torch.sparse_coo_tensor(torch.zeros(2, 1), [1.0], (2**20, 2**20), check_invariants=True),
            "expected a dense tensor",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(given: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Front().images(given)


def test_embeddings_must_have_a_row_for_each_placeholder() -> None:
    def processor(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return expand(ctx, inputs, surplus=1)

    with pytest.raises(ValueError, match="Attempted to assign 3 = 3 multimodal tokens to 4 placeholders"):
        Front(new_model(processor=processor)).images(embeddings(3, HIDDEN_SIZE))


def test_embeddings_can_be_switched_off() -> None:
    front = Front(accept_embeddings=False)
    assert spans_of(front.images(picture(3))) == [(0, 3)]
    with pytest.raises(UnsupportedFeatureError, match="switched off"):
        front.images(embeddings(3, HIDDEN_SIZE))


def test_a_cache_of_no_size_changes_nothing_but_the_number_of_calls() -> None:
    calls = Calls()
    model = new_model(mappers={"image": map_pictures("image", calls)})
    front = Front(model, engine={"cache_config": CacheConfig(mm_processor_cache_bytes=0)})
    one, other = front.images(picture(3)), front.images(picture(3))
    assert one.engine_request.media[0].key == other.engine_request.media[0].key
    assert len(calls) == 2
