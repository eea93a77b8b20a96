"""The core loop: it holds what it says, and gives back what it held."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensorium import EngineArgs, LLMEngine, SamplingParams
from sensorium.errors import EngineDeadError, InvalidRequestError
from sensorium.messages import ModelRunnerOutput
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.graphs import HostReplay
from tests.helpers.serving import Planned, make_engine, serve


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2")


def test_a_context_longer_than_the_cache_is_shortened_instead_of_refusing_open_ended_requests(
    checkpoint: Path,
) -> None:
    """`max_tokens=None` means "as many as fit"; with few blocks that used to be more than there was room for."""
    engine = make_engine(checkpoint, num_blocks=4, block_size=8)
    assert engine.config.model_config.max_model_len == 32
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    served = serve(engine, [Planned("a", "hello", params)])
    assert len(served.tokens("a")) == 32 - len("hello")


def test_a_prompt_that_is_too_long_is_its_callers_error(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, num_blocks=4, block_size=8)
    with pytest.raises(InvalidRequestError, match="too long to fit into the model"):
        engine.add_request("a", "hello " * 20)
    assert not engine.has_unfinished_requests()


def test_the_worker_holds_nothing_once_the_last_request_ended(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    runner = engine.core.executor.worker.runner  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    serve(engine, [Planned("a", "hello", params), Planned("b", "there", params)])
    assert runner.num_requests == 0
    engine.add_request("c", "again", params)
    engine.step()
    assert runner.num_requests == 1
    engine.abort_request("c")
    assert runner.num_requests == 0


class LostStep:
    def result(self) -> ModelRunnerOutput:
        raise MemoryError("the device is gone")


@pytest.mark.parametrize("fails_at", ["submit", "result"])
def test_a_worker_that_can_not_go_on_ends_the_engine_with_one_clear_error(checkpoint: Path, fails_at: str) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(checkpoint), device="cpu", num_blocks=64))

    def broken(step: object) -> LostStep:
        if fails_at == "submit":
            raise MemoryError("the device is gone")
        return LostStep()

    engine.core.executor.submit = broken  # type: ignore[method-assign,assignment]
    engine.add_request("a", "hello")
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="Restart it"):
            engine.step()
    with pytest.raises(EngineDeadError):
        engine.add_request("b", "hello")


def test_sizes_are_recorded_while_there_is_nothing_to_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a size that is needed for the first time costs a tenth of a second, in the middle of an answer."""
    capture = HostReplay()
    monkeypatch.setattr(Worker, "_graph_capture", lambda worker: capture)
    engine = make_engine(checkpoint, max_num_seqs=4)
    passes = engine.core.executor.worker.runner.passes  # type: ignore[attr-defined]
    assert len(passes.decodes.recorded) == 1
    num_recorded = 0
    while engine.core.use_idle_time():
        num_recorded += 1
    assert num_recorded > 10
    assert not engine.core.use_idle_time()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    plans = [Planned(name, text, params) for name, text in (("a", "hello"), ("b", "there"), ("c", "you"))]
    replayed = serve(engine, plans)
    called = serve(make_engine(checkpoint, max_num_seqs=4, num_threads=None), plans)
    assert [replayed.tokens(each.request_id) for each in plans] == [called.tokens(each.request_id) for each in plans]
    assert len(passes.decodes.recorded) + len(passes.trunks.recorded) == num_recorded + 2


def test_a_forward_pass_that_fails_for_one_request_ends_that_one_only(checkpoint: Path) -> None:
    """The pass is repeated request by request, and the others get the tokens of a quiet run."""
    engine = make_engine(checkpoint, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    plans = [Planned(name, text, params) for name, text in (("a", "hello"), ("bad", "poison"), ("c", "there"))]
    quiet = {each.request_id: serve(engine, [each]).tokens(each.request_id) for each in plans}

    worker = engine.core.executor.worker  # type: ignore[attr-defined]
    forward = worker.runner._driver.forward
    poisoned = set(engine.preprocess("x", "poison", params).engine_request.prompt_token_ids[:1])

    def failing(inputs: object) -> object:
        ids = inputs.input_ids.tolist()  # type: ignore[attr-defined]
        if len(ids) > 1 and poisoned & set(ids):
            raise ValueError("this prompt breaks the model")
        return forward(inputs)

    worker.runner._driver.forward = failing
    served = serve(engine, plans)
    assert {name: served.tokens(name) for name in ("a", "c")} == {name: quiet[name] for name in ("a", "c")}
    error = served.outputs["bad"].error
    assert error is not None
    assert "breaks the model" not in str(error), "a caller is not shown the model's inside"
    engine.core.scheduler.check_idle()
