"""Model files of a release of vLLM 0.6, fetched from the package index, run unchanged with our rooms and towers, and
give the tokens of Hugging Face: in chunks, in batches, from caches, through the server.

Where the index can't be reached, these tests are skipped and say so.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers
from PIL import Image

from sensorium import SamplingParams
from tests.entrypoints.served import data_url, start_command
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
from tests.helpers.waiting import HANG_S

NUM_TOKENS = 8
QUESTION = "What is it?"
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
    """By the command, and asked about pictures by the official client; every process of the server loads the file."""
    file = shutil.copy(released / "llava.py", tmp_path / "llava_that_is_served.py")
    path = make_checkpoint("llava")
    flags = ("--plugin", str(file), "--max-num-batched-tokens", "16", "--dtype", "float32")
    process, url, log = start_command(path, *flags)
    with process:
        try:
            assert log.count("will be overwritten by the new model class") == 2, "by the front and by the core"
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as client:
                [model] = client.models.list()
                answers = [answer_over_http(client, model.id, picture) for picture in pictures()]
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG_S) == 0
        finally:
            process.kill()
    expected = list(answers_of_hugging_face(path))
    assert [text for text, _ in answers] == [text for text, _ in expected]
    for (_, got), (_, wanted) in zip(answers, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-3), "log probabilities, for bytes that are no text by themselves"
    assert len({text for text, _ in answers}) == len(answers)


def answer_over_http(client: openai.OpenAI, model: str, picture: Image.Image) -> tuple[str, list[float]]:
    image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(model=model, messages=messages, logprobs=True, **greedy)
    [choice] = answer.choices
    assert choice.message.content
    assert choice.logprobs
    assert choice.logprobs.content
    return choice.message.content, [each.logprob for each in choice.logprobs.content]


def answers_of_hugging_face(path: Path) -> Iterator[tuple[str, list[float]]]:
    """Of prompts by its template and its processor."""
    processor: Any = transformers.AutoProcessor.from_pretrained(path)
    reference: Any = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    reference.generation_config.eos_token_id = None
    messages = [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": QUESTION}]}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    wanted = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    for picture in pictures():
        inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
        output = reference.generate(**inputs, **wanted)
        scores = reference.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        yield processor.tokenizer.decode(ids, skip_special_tokens=True), scores[0].tolist()


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
