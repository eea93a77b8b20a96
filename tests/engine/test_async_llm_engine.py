"""The asynchronous engine: the tokens of the synchronous one, and nothing left of whoever stops reading."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import EngineArgs, SamplingParams
from sensorium.engine.args import EngineArgs as Args
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core import EngineCore
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.engine.output_stream import join_deltas
from sensorium.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    ModelError,
    OverloadedError,
    RequestAbortedError,
)
from sensorium.ipc.codec import _Reader, decode_request, encode_request
from sensorium.messages import EngineOutput, EngineRequest, MediaItem
from sensorium.outputs import CompletionOutput, OutputKind, RequestOutput
from sensorium.spans import Span
from tests.engine.async_helpers import SETTINGS, greedy, last, running, settled
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.serving import make_engine
from tests.helpers.waiting import auntil

IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


def image_prompt(seed: int = 1) -> dict[str, Any]:
    return {"prompt": f"{IMAGE_TEXT}What is it?", "multi_modal_data": {"image": picture(seed)}}


def expected_tokens(path: Path, prompt: Any, params: SamplingParams) -> list[int]:
    """What the synchronous engine answers."""
    engine = make_engine(path, **SETTINGS)
    engine.add_request("only", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                return output.outputs[0].token_ids
    raise AssertionError("the request did not finish")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# The core as a process


def test_a_core_process_gives_the_same_tokens_and_its_death_ends_every_request(checkpoint: Path) -> None:
    async def run() -> None:
        async with running(checkpoint, in_process=False, max_model_len=2048, num_blocks=512) as engine:
            assert engine.core_pid != os.getpid()
            prompts = [image_prompt(1), "Only text", image_prompt(2)]
            outputs = await asyncio.gather(*(last(engine.generate(prompt, greedy())) for prompt in prompts))
            for prompt, output in zip(prompts, outputs, strict=True):
                assert output.outputs[0].token_ids == expected_tokens(checkpoint, prompt, greedy())
            await engine.check_health(generate=True)

            readers = [asyncio.create_task(last(engine.generate("Go on", greedy(1500)))) for _ in range(4)]
            await auntil(lambda: engine.load().num_open == 4 and not engine.load().num_waiting)
            os.kill(engine.core_pid, signal.SIGKILL)
            for result in await asyncio.gather(*readers, return_exceptions=True):
                assert isinstance(result, EngineDeadError), result
            with pytest.raises(EngineDeadError, match="has ended without a message"):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await last(engine.generate("Anyone?"))
            assert engine.load().num_open == 0

    asyncio.run(run())


def test_a_step_that_fails_ends_every_request(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FailingCore(EngineCore):
        def step(self) -> list[EngineOutput]:
            if self.stats().num_steps >= 3:
                raise RuntimeError("secret /path")
            return super().step()

    async def run() -> None:
        args = EngineArgs(model=str(checkpoint), **SETTINGS)
        engine = await AsyncLLMEngine.start(args, make_core=lambda a: FailingCore(a.create_engine_config()))
        with pytest.raises(EngineDeadError, match="RuntimeError") as info:
            await last(engine.generate("Go on", greedy(100)))
        assert "secret" not in str(info.value)
        await engine.shutdown()

    asyncio.run(run())
    assert "a step failed" in caplog.text


def test_what_keeps_a_model_from_loading_is_raised_as_it_was_in_the_core(checkpoint: Path) -> None:
    def refuse(args: Args) -> EngineCore:
        raise ModelError("no such luck")

    async def run() -> None:
        with pytest.raises(ConfigError, match="max_num_seqs"):
            await AsyncLLMEngine.start(EngineArgs(str(checkpoint), max_num_seqs=0), make_core=IN_THIS_PROCESS)
        with pytest.raises(ModelError, match="no such luck"):
            await AsyncLLMEngine.start(EngineArgs(str(checkpoint)), make_core=refuse)

    asyncio.run(run())


# Readers


def test_deltas_add_up_to_the_whole_and_a_slow_reader_stalls_nobody(checkpoint: Path) -> None:
    async def run() -> None:
        async with running(checkpoint) as engine:
            params = greedy(60, logprobs=1)
            slow = engine.generate("Tell me", params, kind=OutputKind.DELTA)
            deltas = [await anext(slow)]
            fast = [last(engine.generate("Tell me", params)) for _ in range(8)]
            whole = (await asyncio.gather(*fast))[0].outputs[0]
            deltas += [delta async for delta in slow]
            joined = join_deltas(deltas)
            assert isinstance(joined, RequestOutput)
            assert len(deltas) < 20, "what was not read is joined"
            assert joined.outputs[0].token_ids == whole.token_ids
            assert joined.outputs[0].text == whole.text
            assert joined.outputs[0].logprobs is not None
            assert len(joined.outputs[0].logprobs) == 60

    asyncio.run(run())


def test_joining_keeps_outputs_apart() -> None:
    def delta(index: int, text: str, finish: str | None = None) -> CompletionOutput:
        return CompletionOutput(index, text, [len(text)], finish_reason=finish)

    def news(*outputs: CompletionOutput, finished: bool = False) -> RequestOutput:
        return RequestOutput("a", None, [1], list(outputs), finished)

    joined = join_deltas([news(delta(1, "a")), news(delta(0, "bb")), news(delta(1, "c", "stop"), finished=True)])
    assert isinstance(joined, RequestOutput)
    assert [(each.index, each.text, each.finish_reason) for each in joined.outputs] == [
        (0, "bb", None),
        (1, "ac", "stop"),
    ]
    assert joined.finished


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_whoever_stops_leaves_nothing_behind(checkpoint: Path, how: str) -> None:
    async def run() -> None:
        async with running(checkpoint) as engine:
            outputs = engine.generate(image_prompt(), greedy(400, n=2), "one")
            await anext(outputs)
            if how == "close":
                await outputs.aclose()  # type: ignore[attr-defined]
            elif how == "cancel":
                reader = asyncio.create_task(last(engine.generate(image_prompt(), greedy(400), "two")))
                await asyncio.sleep(0.05)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
                await outputs.aclose()  # type: ignore[attr-defined]
            else:
                engine.abort("one")
                with pytest.raises(RequestAbortedError):
                    async for _ in outputs:
                        pass
            await settled(engine)

    asyncio.run(run())


def test_an_abort_storm_leaves_the_survivors_exact(checkpoint: Path) -> None:
    """Three hundred readers stop at any moment of a request's life: in the pool, in line, in a step, at the end."""

    async def run() -> None:
        async with running(checkpoint, max_num_seqs=32) as engine:
            await last(engine.generate(image_prompt(0), greedy(2)))
            files = open_files()

            async def impatient(index: int) -> None:
                prompt = image_prompt(index % 5) if index % 2 else "Some text"
                try:
                    async with asyncio.timeout((index % 30) * 0.01):
                        await last(engine.generate(prompt, greedy(20)))
                except TimeoutError:
                    pass

            storm = [impatient(index) for index in range(300)]
            survivors = [last(engine.generate(image_prompt(seed), greedy())) for seed in (3, 4)]
            results = await asyncio.gather(*survivors, *storm)
            for seed, result in zip((3, 4), results, strict=False):
                assert isinstance(result, RequestOutput)
                assert result.outputs[0].token_ids == expected_tokens(checkpoint, image_prompt(seed), greedy())
            await settled(engine)
            # The pool may still be at work for readers who are gone.
            await auntil(lambda: open_files() <= files)

    asyncio.run(run())


# Bounds and ends


def test_requests_beyond_the_bound_are_refused_at_once(checkpoint: Path) -> None:
    async def run() -> None:
        async with running(checkpoint, max_waiting_requests=3) as engine:
            results = await asyncio.gather(
                *(last(engine.generate("Hi", greedy(4))) for _ in range(8)), return_exceptions=True
            )
            refused = [each for each in results if isinstance(each, OverloadedError)]
            assert len(refused) == 5
            assert sum(isinstance(each, RequestOutput) for each in results) == 3
            await last(engine.generate("Hi", greedy(4)))

    asyncio.run(run())


def test_wrong_prompts_are_their_callers_errors(checkpoint: Path) -> None:
    async def run() -> None:
        async with running(checkpoint) as engine:
            with pytest.raises(InvalidRequestError, match="too long"):
                await last(engine.generate("x" * 5000))
            outputs = engine.generate("Hi", greedy(50), "same")
            await anext(outputs)
            with pytest.raises(InvalidRequestError, match="in use"):
                await last(engine.generate("Hi", greedy(), "same"))
            assert len((await last(outputs)).outputs[0].token_ids) == 50, "the first keeps its name"
            with pytest.raises(InvalidRequestError, match="logit_bias"):
                await last(engine.generate("Hi", SamplingParams(logit_bias={10_000: 1.0})))

    asyncio.run(run())


def test_shutdown_lets_requests_finish_until_the_deadline(checkpoint: Path) -> None:
    async def run(drain_s: float, num_tokens: int) -> list[Any]:
        async with running(checkpoint, max_model_len=2048, num_blocks=512) as engine:
            long = engine.generate("Hi", greedy(num_tokens))
            await anext(long)
            readers = [asyncio.create_task(last(outputs)) for outputs in (engine.generate("Hi", greedy(3)), long)]
            await auntil(lambda: engine.load().num_open == 2 or readers[0].done())
            await engine.shutdown(drain_s)
            with pytest.raises(EngineDeadError, match="shutting down"):
                await last(engine.generate("Hi"))
            return await asyncio.gather(*readers, return_exceptions=True)

    outcomes = asyncio.run(run(math.inf, 150))
    assert [type(each) for each in outcomes] == [RequestOutput, RequestOutput]
    assert isinstance(asyncio.run(run(0.0, 1500))[1], RequestAbortedError)


# Messages


def test_tensors_of_all_kinds_cross_unchanged() -> None:
    big = torch.arange(5000, dtype=torch.float32).reshape(50, 100)
    kwargs = {
        "pixel_values": big,
        "transposed": big.t(),
        "half": torch.randn(3, 700).to(torch.bfloat16),
        "grid": torch.tensor([[1, 2, 3]]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "array": np.arange(9, dtype=np.int16).reshape(3, 3),
        "sizes": [(3, 4), (5, 6)],
        "nested": {"flag": True, "text": "x", "none": None, "list": [torch.ones(2)]},
    }
    item = MediaItem("image", "key", Span.of_mask(1, [True, False, True]), kwargs=kwargs)
    positions = np.arange(15).reshape(3, 5)
    request = EngineRequest(
        *("a", [1, -7, 10**6, 3, 4], greedy(stop=["x"]), frozenset([2]), (item,)),
        mrope_positions=positions,
        mrope_delta=-3,
    )
    encoded = encode_request(request)
    fd, encoded.fd = encoded.fd, None
    got = decode_request(encoded.payload, fd)  # type: ignore[arg-type]
    assert got.sampling_params == request.sampling_params
    assert (list(got.prompt_token_ids), got.eos_token_ids, got.mrope_delta) == (
        [1, -7, 10**6, 3, 4],
        frozenset([2]),
        -3,
    )
    assert got.mrope_positions is not None
    assert (got.mrope_positions == positions).all()
    (media,) = got.media
    assert (media.span.offset, media.span.length) == (1, 3)
    assert media.span.positions().tolist() == [1, 3]
    assert media.kwargs is not None
    assert media.kwargs.keys() == kwargs.keys()
    for name in ("pixel_values", "transposed", "half", "grid", "scalar", "empty"):
        expected = kwargs[name]
        assert isinstance(expected, torch.Tensor)
        assert media.kwargs[name].dtype == expected.dtype
        assert torch.equal(media.kwargs[name], expected), name
    assert (media.kwargs["array"] == kwargs["array"]).all()
    assert media.kwargs["sizes"] == [(3, 4), (5, 6)], "tuples stay tuples"
    assert media.kwargs["nested"]["list"][0].tolist() == [1, 1]
    media.kwargs["pixel_values"][0, 0] = -1  # models may write into what they get
    assert big[0, 0] == 0


def test_a_mapped_value_that_cannot_leave_the_process_is_named() -> None:
    item = MediaItem("image", "key", Span(0, 1), kwargs={"pixel_values": {"bad": object()}})
    with pytest.raises(ModelError, match=r"kwargs\['pixel_values'\]\['bad'\]: got a object"):
        encode_request(EngineRequest("a", [1], SamplingParams(), media=(item,)))


@pytest.mark.parametrize("code", [0, 4, 127])
def test_no_message_makes_anything_but_values(code: int) -> None:
    with pytest.raises(Exception, match="extension of code"):
        _Reader(None).hook(code, memoryview(b"\x93\xa1i\x90\x00"))
