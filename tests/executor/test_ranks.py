"""Several ranks that share a model: the tokens of one, whatever they are asked, and one end for all."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sensorium import EngineArgs, LLMEngine, SamplingParams, StructuredOutputs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.errors import ConfigError, EngineDeadError, ModelError
from sensorium.executor import MultiProcessExecutor
from sensorium.worker.worker import Worker
from tests.engine.async_helpers import SETTINGS as SERVED
from tests.engine.async_helpers import greedy, last
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import limits, picture, random_plan
from tests.helpers.serving import Planned, differing, make_engine, quiet_engine, serve
from tests.helpers.waiting import auntil, until

SMALL: dict[str, Any] = {"block_size": 8, "max_num_batched_tokens": 40, "device": "cpu"}
"""Requests are cut into chunks, and with few blocks preempted."""
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@contextmanager
def shared(path: Path, num_ranks: int, **settings: Any) -> Iterator[LLMEngine]:
    """An engine of several ranks, and none of their processes afterwards."""
    engine = make_engine(path, tensor_parallel_size=num_ranks, **settings)
    executor = engine.core.executor
    assert isinstance(executor, MultiProcessExecutor)
    pids = executor.pids
    assert len(pids) == num_ranks - 1
    try:
        yield engine
    finally:
        engine.shutdown()
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(("family", "num_ranks"), [("llama", 2), ("llama", 4), ("qwen2_vl", 2), ("qwen2_vl", 4)])
def test_ranks_give_the_tokens_of_one(family: str, num_ranks: int) -> None:
    """With chunks, preemption, aborts and cached media. Four ranks have two key/value heads among them."""
    path, options = make_checkpoint(family), {"limit_mm_per_prompt": limits(family)} if limits(family) else {}
    plan = random_plan(family, 10, random.Random(family), spread=4, aborts=2)
    plan += [Planned(f"long {i}", f"hello {i}", LONG, arrival_step=i) for i in range(8)]
    alone = quiet_engine(path, **options)
    expected = {each.request_id: serve(alone, [each]).tokens(each.request_id) for each in plan if not each.abort_step}
    settings = {**SMALL, "max_num_batched_tokens": 200 if limits(family) else 40}  # a step has several media
    with shared(path, num_ranks, num_blocks=40, **settings, **options) as engine:
        for _ in range(2):
            served = serve(engine, plan)
            for name, tokens in expected.items():
                assert served.tokens(name) == tokens, f"request {name} {differing(served.tokens(name), tokens)}"
        engine.core.scheduler.check_idle()
        assert engine.core.stats().num_preemptions > 0
        executor = engine.core.executor
        assert isinstance(executor, MultiProcessExecutor)
        spread = executor.worker.runner.spread
        assert spread is not None
        assert (spread.num_spread > 0) == bool(limits(family))


RECORDING = """
from sensorium.worker.worker import Worker
from tests.helpers.graphs import HostReplay

Worker._graph_capture = lambda worker: HostReplay()
"""


@pytest.mark.parametrize("way", ["call by call", "drafts", "recorded, two steps in flight"])
def test_only_the_first_rank_samples(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, penalties, log probabilities and masks are its business; the others get its tokens, and find out by
    themselves which drafts were right. Where passes are recorded, the plain greedy choice is in them, on every rank,
    but for steps in which the first rank has masks, which the others only know of."""
    settings: dict[str, Any] = {"speculative_config": {"prompt_lookup_min": 1}} if way == "drafts" else {}
    is_recorded = way.startswith("recorded")
    if is_recorded:
        plugin = tmp_path / "recording.py"
        plugin.write_text(RECORDING)
        settings = {"plugins": (str(plugin),), "max_steps_in_flight": 2}
        monkeypatch.setattr(Worker, "_graph_capture", Worker._graph_capture)  # so that the plug-in's is taken back
    path = make_checkpoint("qwen2")
    plan = [
        Planned("seeded", "hello", SamplingParams(temperature=1, seed=7, max_tokens=12, ignore_eos=True)),
        Planned("penalties", "there", SamplingParams(temperature=1, seed=8, presence_penalty=1.5, max_tokens=12)),
        Planned("plain", "hello again", LONG, arrival_step=2),
        Planned("logprobs", "you", SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=5)),
        Planned(
            "held", "say", SamplingParams(temperature=1, seed=9, structured_outputs=StructuredOutputs(regex="[ab]{9}c"))
        ),
    ]
    alone = serve(quiet_engine(path), plan)
    with shared(path, 2, num_blocks=64, **settings, **SMALL) as engine:
        together = serve(engine, plan)
        if way == "drafts":
            assert engine.core.stats().num_accepted_tokens > 3
        while engine.core.use_idle_time():  # what is left to be recorded, is on all ranks
            assert is_recorded
        again = serve(engine, plan)
    for each in plan:
        assert together.tokens(each.request_id) == alone.tokens(each.request_id), each.request_id
        assert again.tokens(each.request_id) == alone.tokens(each.request_id), each.request_id
    held = together.outputs["held"].outputs[0]
    assert held.finish_reason == "stop"
    assert len(held.text) == 10
    entries = [served.outputs["logprobs"].outputs[0].logprobs for served in (alone, together)]
    assert all(entries)
    for mine, theirs in zip(*entries, strict=True):  # type: ignore[arg-type]
        assert {k: pytest.approx(v.logprob, abs=1e-4) for k, v in mine.items()} == {
            k: v.logprob for k, v in theirs.items()
        }


def test_a_rank_that_dies_is_the_end_of_the_engine() -> None:
    engine = make_engine(make_checkpoint("llama"), tensor_parallel_size=2)
    executor = engine.core.executor
    assert isinstance(executor, MultiProcessExecutor)
    engine.add_request("a", "hello", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    engine.step()
    (pid,) = executor.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"LostRankError\. Restart it"):
        serve(engine, [])
    with pytest.raises(EngineDeadError):
        engine.add_request("b", "hello")
    engine.shutdown()
    assert not psutil.pid_exists(pid)


FRAGILE = """
from sensorium.model_executor.models.llama import LlamaForCausalLM
from sensorium.model_executor.models.registry import ModelRegistry


class FragileLlama(LlamaForCausalLM):
    def forward(self, input_ids, positions, kv_caches, attn_metadata):
        if 303 in input_ids.tolist():
            raise ValueError("this prompt breaks the model")
        return super().forward(input_ids, positions, kv_caches, attn_metadata)


ModelRegistry.register_model("FragileLlama", FragileLlama)
"""


def test_what_fails_on_all_ranks_is_one_requests_error(tmp_path: Path) -> None:
    """A pass that a request breaks is repeated without it, on every rank."""
    plugin = tmp_path / "fragile.py"
    plugin.write_text(FRAGILE)
    options = {"plugins": (str(plugin),), "hf_overrides": {"architectures": ["FragileLlama"]}, "num_blocks": 64}
    prompts = {"a": [5, 6, 7], "bad": [5, 303], "c": [8, 9]}
    with shared(make_checkpoint("llama"), 2, **options, **SMALL) as engine:
        plan = [Planned(name, {"prompt_token_ids": ids}, GREEDY) for name, ids in prompts.items()]
        served = serve(engine, plan)
        assert "breaks the model" not in str(served.outputs["bad"].error)
        assert served.outputs["bad"].error is not None
        assert all(len(served.tokens(name)) == 6 for name in ("a", "c"))
        engine.core.scheduler.check_idle()


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"tensor_parallel_size": 3}, ConfigError, "tensor_parallel_size: got 3 for 4 attention heads"),
        ({"tensor_parallel_size": 8}, ConfigError, "tensor_parallel_size: got 8 for 4 attention heads"),
    ],
)
def test_what_ranks_can_not_share_is_an_error_of_loading(
    settings: dict[str, Any], error: type[Exception], told: str
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(error, match=told):
        make_engine(make_checkpoint("llama"), **settings)
    assert set(psutil.Process().children()) == before


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    path = str(make_checkpoint("llama"))
    config = EngineArgs(path, device="cuda:1", tensor_parallel_size=2).create_engine_config()
    assert [config.device_config.of_rank(rank) for rank in range(2)] == ["cuda:1", "cuda:2"]
    with pytest.raises(ConfigError, match="got 4 with 3 GPUs from cuda:0 on, expected at most 3"):
        EngineArgs(path, device="cuda", tensor_parallel_size=4).create_engine_config()


def test_a_rank_that_can_not_load_says_why(tmp_path: Path) -> None:
    """Its own error comes to the caller, and not that a rank is gone."""
    plugin = tmp_path / "only_first.py"
    plugin.write_text(
        "import sys\nfrom sensorium.errors import ModelError\n"
        "if 'rank_process' in sys.argv[0]:\n    raise ModelError('no such luck')\n"
    )
    with pytest.raises(ModelError, match="no such luck"):
        make_engine(make_checkpoint("llama"), tensor_parallel_size=2, plugins=(str(plugin),))


def test_ranks_end_with_the_engines_process(tmp_path: Path) -> None:
    """However it ends: their socket closes with it."""
    code = (
        "import sys, time\nfrom sensorium import EngineArgs, LLMEngine\n"
        "if __name__ == '__main__':\n"
        f"    engine = LLMEngine.from_engine_args(EngineArgs({str(make_checkpoint('llama'))!r}, device='cpu', "
        "num_blocks=64, tensor_parallel_size=2))\n"
        "    print(*engine.core.executor.pids, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (pid,) = map(int, process.stdout.readline().split())
        assert psutil.pid_exists(pid)
        process.kill()
        until(lambda: not psutil.pid_exists(pid))


def test_a_server_starts_its_ranks_anew() -> None:
    """A rank may end while nobody asks for anything: that is noticed, and the next request is answered as before."""
    prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|> a", "multi_modal_data": {"image": picture(3)}}

    async def run() -> None:
        args = EngineArgs(str(make_checkpoint("qwen2_vl")), tensor_parallel_size=2, **{**SERVED, "num_blocks": 64})
        engine = await AsyncLLMEngine.start(args, max_restarts=1)
        try:
            before = await last(engine.generate(prompt, greedy()))
            (rank,) = psutil.Process(engine.core_pid).children()
            rank.kill()
            await auntil(lambda: engine.num_restarts == 1)
            after = await last(engine.generate(prompt, greedy()))
            assert after.outputs[0].token_ids == before.outputs[0].token_ids
            family = [engine.core_pid, *(child.pid for child in psutil.Process(engine.core_pid).children())]
            assert len(family) == 2
        finally:
            await engine.shutdown()
        assert not any(psutil.pid_exists(pid) for pid in family)

    asyncio.run(run())
