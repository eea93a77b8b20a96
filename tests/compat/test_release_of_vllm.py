"""Model files of a release of vLLM 0.6, fetched from the package index, run unchanged with our rooms and towers, and
give the tokens of Hugging Face: in chunks, in batches, from caches, through the server.

Where the index can't be reached, these tests are skipped and say so.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sensorium import SamplingParams
from tests.engine.async_helpers import last, running
from tests.helpers.checkpoints import make_checkpoint, token_ids
from tests.helpers.converted_checkpoints import chatglm_checkpoint, internvl_chat_checkpoint
from tests.helpers.hf_reference import hf_greedy
from tests.helpers.release_of_vllm import (
    CHAMELEON_IMAGE_ID,
    chameleon_checkpoint,
    paligemma_checkpoint,
    pixtral_checkpoint,
)
from tests.helpers.serving import Planned, differing, make_engine, serve
from tests.helpers.tiny_media import save_tiny_media

NUM_TOKENS = 8
IMAGE_ID = token_ids()["<image>"]

CASES: dict[str, tuple[str, Callable[[Path], Path], list[int]]] = {
    "llava": ("llava", lambda _: make_checkpoint("llava"), [IMAGE_ID]),
    "llava_next": ("llava_next", lambda _: make_checkpoint("llava_next"), [IMAGE_ID]),
    "paligemma": ("paligemma", paligemma_checkpoint, []),
    "chameleon": ("chameleon", chameleon_checkpoint, [CHAMELEON_IMAGE_ID]),
    "pixtral": ("llava", pixtral_checkpoint, [token_ids()["[IMG]"]]),
}
"""The release's file, a checkpoint, and where a picture goes in a prompt."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def pictures() -> Iterator[Image.Image]:
    """A noise, and three plain ones with a corner of another colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    yield Image.fromarray(pixels)
    for colour in ("red", "blue", "white"):
        picture = Image.new("RGB", (112, 84), colour)
        picture.paste("black", (0, 0, 40, 50))
        yield picture


def prompts(place: list[int]) -> list[dict[str, Any]]:
    return [
        {"prompt_token_ids": [5, 6, *place, 7, 8, 9], "multi_modal_data": {"image": picture}} for picture in pictures()
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_the_release_gives_the_tokens_of_hugging_face(
    case: str, released: Path, folder: Path, tmp_path: Path
) -> None:
    name, checkpoint, place = CASES[case]
    file = shutil.copy(released / f"{name}.py", tmp_path / f"{name}_of_{case}.py")  # alone: siblings are ours
    path = checkpoint(folder)
    most = 2048 if case == "chameleon" else 512
    chunk = 2048 if case == "paligemma" else 16  # its prompts see all of themselves
    settings = {"plugins": (str(file),), "max_num_batched_tokens": chunk, "max_model_len": most, "num_blocks": 400}
    engine = make_engine(path, **settings)
    assert engine.config.model_config.model_class.__module__ == f"{name}_of_{case}"

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    plan = [Planned(f"request {at}", prompt, params) for at, prompt in enumerate(prompts(place))]
    served = serve(engine, plan)
    got = {each.request_id: served.tokens(each.request_id) for each in plan}
    reference = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    for each in plan:
        request = engine.preprocess(each.request_id, each.prompt, each.params).engine_request
        expected = hf_greedy(reference, request, NUM_TOKENS)
        assert got[each.request_id] == expected, differing(got[each.request_id], expected)
    assert len({tuple(tokens) for tokens in got.values()}) == len(plan), "the answer depends on the picture"

    before = engine.core.stats()
    assert before.num_encoder_queries - before.num_encoder_hits == len(plan), "one encoder run for each picture"
    again = serve(engine, plan)
    assert {each.request_id: again.tokens(each.request_id) for each in plan} == got
    after = engine.core.stats()
    assert after.num_encoded_rows == before.num_encoded_rows, "none for a repeat"
    assert after.num_prefix_hit_tokens > before.num_prefix_hit_tokens


def test_a_file_of_the_release_is_served(released: Path, tmp_path: Path) -> None:
    """By an engine in a process of its own, as the server has it."""
    file = shutil.copy(released / "llava.py", tmp_path / "llava_that_is_served.py")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    async def answers() -> list[list[int]]:
        settings = {"plugins": (str(file),), "max_num_batched_tokens": 16, "max_model_len": 128, "num_blocks": 64}
        async with running(make_checkpoint("llava"), in_process=False, **settings) as engine:
            outputs = await asyncio.gather(*(last(engine.generate(each, params)) for each in prompts([IMAGE_ID])))
            return [list(each.outputs[0].token_ids) for each in outputs]

    own = make_engine(make_checkpoint("llava"), model_impl="native")
    plan = [Planned(str(at), prompt, params) for at, prompt in enumerate(prompts([IMAGE_ID]))]
    served = serve(own, plan)
    assert asyncio.run(answers()) == [served.tokens(str(at)) for at in range(len(plan))]


def test_a_file_of_the_release_for_a_model_that_got_another_name(released: Path, tmp_path: Path) -> None:
    """GLM-4 was `ChatGLMModel` before it was a class of transformers, whose weights are those of the reference."""
    file = shutil.copy(released / "chatglm.py", tmp_path / "chatglm_of_release.py")
    reference = chatglm_checkpoint(tmp_path / "checkpoint")
    settings = {"plugins": (str(file),), "max_num_batched_tokens": 16, "max_model_len": 128, "num_blocks": 64}
    engine = make_engine(tmp_path / "checkpoint", **settings)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    given = [list(range(3, 3 + length)) for length in (5, 30, 40)]
    plan = [Planned(str(at), {"prompt_token_ids": ids}, params) for at, ids in enumerate(given)]
    served = serve(engine, plan)
    for at, ids in enumerate(given):
        request = engine.preprocess(f"again {at}", {"prompt_token_ids": ids}, params).engine_request
        expected = hf_greedy(reference, request, NUM_TOKENS)
        assert served.tokens(str(at)) == expected, differing(served.tokens(str(at)), expected)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # of the file
def test_a_file_of_the_release_with_checkpoints_of_its_own_kind(released: Path, tmp_path: Path) -> None:
    """InternVL's had code with them before there was a class of transformers, whose weights are the reference's."""
    pytest.importorskip("torchvision", reason="the file of InternVL imports torchvision")
    file = shutil.copy(released / "internvl.py", tmp_path / "internvl_of_release.py")
    reference = internvl_chat_checkpoint(tmp_path / "checkpoint")
    settings = {"plugins": (str(file),), "max_num_batched_tokens": 16, "max_model_len": 256, "num_blocks": 128}
    engine = make_engine(tmp_path / "checkpoint", **settings)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    given = [{"prompt": "see <image> now", "multi_modal_data": {"image": picture}} for picture in pictures()]
    plan = [Planned(str(at), prompt, params) for at, prompt in enumerate(given)]
    served = serve(engine, plan)
    for each in plan:
        request = engine.preprocess(f"{each.request_id} again", each.prompt, params).engine_request
        [item] = request.media
        tiles = torch.as_tensor((item.kwargs or {})["pixel_values"]).flatten(0, 1)
        ids = torch.tensor([list(request.prompt_token_ids)])
        output = reference.generate(
            ids, pixel_values=tiles, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        assert served.tokens(each.request_id) == output[0, ids.shape[1] :].tolist()
    assert len({tuple(served.tokens(each.request_id)) for each in plan}) == len(plan)


def test_a_file_of_the_release_around_a_decoder_of_the_room(released: Path, tmp_path: Path) -> None:
    """BLIP-2's tower and OPT are in the room of V0 alone. The file has the id of placeholders as a number."""
    file = shutil.copy(released / "blip2.py", tmp_path / "blip2_of_release.py")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    reference: Any = save_tiny_media("blip-2", folder)
    settings = {"plugins": (str(file),), "max_num_batched_tokens": 16, "max_model_len": 256, "num_blocks": 128}
    engine = make_engine(folder, **settings)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    given = [{"prompt_token_ids": [5, 6, 7, 8], "multi_modal_data": {"image": picture}} for picture in pictures()]
    plan = [Planned(str(at), prompt, params) for at, prompt in enumerate(given)]
    served = serve(engine, plan)
    for each in plan:
        request = engine.preprocess(f"{each.request_id} again", each.prompt, params).engine_request
        [item] = request.media
        pixels = torch.as_tensor((item.kwargs or {})["pixel_values"]).flatten(0, -4)
        ids = torch.tensor([list(request.prompt_token_ids)])
        ids[ids >= reference.config.text_config.vocab_size] = reference.config.image_token_index
        output = reference.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS
        )
        assert served.tokens(each.request_id) == output[0, -NUM_TOKENS:].tolist()
    assert len({tuple(served.tokens(each.request_id)) for each in plan}) == len(plan)
