"""The core loop: schedule, submit, update. Works on ids and tokens; the front handles text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.engine.grammar_queue import GrammarQueue
from sensorium.errors import ConfigError, EngineDeadError, InvalidRequestError, SensoriumError
from sensorium.executor import Executor, MultiProcessExecutor, PendingStep, SingleProcessExecutor
from sensorium.grammar.compiler import GrammarCompiler
from sensorium.grammar.constrained_requests import ConstrainedRequests
from sensorium.logger import get_logger
from sensorium.messages import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    LoadReport,
    RequestFailure,
    SchedulerOutput,
    Vocabulary,
)
from sensorium.scheduler import Scheduler, SchedulerStats
from sensorium.scheduler.drafting import drafters_of

logger = get_logger(__name__)

_IDLE_CHECK_S = 1.0
_GRAMMAR_WAIT_S = 0.02
"""How long a step that has nothing to do waits for a grammar that is being compiled."""


class EngineCore:
    """Owns the scheduler and the executor. Used by one thread.

    Every added request ends in exactly one `EngineOutput` with a `finish_reason`.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        self._executor = executor or make_executor(config)
        self.report: LoadReport = self._executor.load()
        for line in self.report.lines():
            logger.info(line)
        self.config = within_blocks(config, self.report)
        """The configuration with the context length that the KV cache can hold."""
        self.scheduler = Scheduler(
            config.scheduler_config,
            config.cache_config,
            self.report.features,
            cache_groups=self.report.cache_groups,
            max_model_len=self.config.model_config.max_model_len,
            max_loras=None if config.lora_config is None else config.lora_config.max_loras,
            make_drafter=drafters_of(config.speculative_config, config.model_config.vocab_size),
            counts_tokens=config.counts_tokens_on_device,
        )
        self._max_in_flight = self.config.scheduler_config.max_steps_in_flight
        self._in_flight: deque[tuple[SchedulerOutput, PendingStep]] = deque()
        scheduler_config = config.scheduler_config
        max_num_seqs, max_drafts = scheduler_config.max_num_seqs, config.max_drafts
        self._grammars = GrammarCompiler(max_num_seqs * (1 + max_drafts), scheduler_config.max_grammar_compile_s)
        self._grammar_queue = GrammarQueue(self._grammars.compile)
        self._constrained = ConstrainedRequests(self._grammars, max_num_seqs, max_drafts)
        self._failure: BaseException | None = None

    @property
    def features(self) -> ModelFeatures:
        """What loading determined about the model."""
        return self.report.features

    @property
    def executor(self) -> Executor:
        """The executor, which runs the steps."""
        return self._executor

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary; called before the first request whose output is constrained."""
        self._grammars.use_vocabulary(vocabulary)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request; one with a grammar is queued once its grammar is compiled.

        Raises:
            InvalidRequestError: It needs more KV blocks than there are, or its id is in use.
            OverloadedError: The waiting queue is full.
            EngineDeadError: An earlier step ended the engine.
        """
        self._check_alive()
        if request.request_id in self._grammar_queue:
            raise InvalidRequestError(
                f"got {request.request_id!r}, expected an id that no unfinished request has. Send another request_id.",
                field="request_id",
            )
        if request.sampling_params.structured_outputs is None or request.pooling:
            self.scheduler.add_request(request)
        else:
            self._grammar_queue.add(request)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """End requests; ids that are unknown or finished are ignored."""
        request_ids = list(request_ids)
        in_grammar_queue = self._grammar_queue.abort(request_ids)
        outputs = [EngineOutput(request_id, finish_reason=FinishReason.ABORT) for request_id in in_grammar_queue]
        outputs += self.scheduler.abort(request_ids)
        self._release_if_idle()
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_unfinished_requests() or len(self._grammar_queue) > 0

    def step(self) -> list[EngineOutput]:
        """Submit steps and take in the results of the oldest.

        If all requests wait for their grammars, wait for one for a short time.

        Raises:
            EngineDeadError: The worker can't go on.
        """
        self._check_alive()
        outputs = self._take_compiled()
        if self.scheduler.has_unfinished_requests():
            outputs += self._step()
        elif not outputs:
            self._grammar_queue.wait(_GRAMMAR_WAIT_S)
        self._release_if_idle()
        return outputs

    def _take_compiled(self) -> list[EngineOutput]:
        """Queue requests whose grammars are compiled; returns the outputs of those whose grammar failed."""
        outputs = []
        for request, error in self._grammar_queue.take_ready():
            try:
                if error is not None:
                    raise error
                self.scheduler.add_request(request)
            except SensoriumError as refusal:
                failure = RequestFailure.of(refusal)
                outputs.append(EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, failure=failure))
        return outputs

    def _step(self) -> list[EngineOutput]:
        while len(self._in_flight) < self._max_in_flight and self._submit():
            pass
        return self._collect()

    def _submit(self) -> bool:
        """Plan a step and submit it to the worker. False: nothing can be planned before a result is in."""
        step = self.scheduler.schedule()
        if step is None:
            return False
        masks = self._constrained.begin_step(step)
        if masks is not None:
            step = replace(step, masks=masks)
        with self._fatal_failures():
            self._in_flight.append((step, self._executor.submit(step)))
        return bool(step.chunks)

    def _collect(self) -> list[EngineOutput]:
        """Wait for the oldest step in flight; returns its outputs."""
        step, pending = self._in_flight.popleft()
        with self._fatal_failures():
            result = pending.result()
        outputs = self.scheduler.update(step, result)
        if result.lost_mask_source is not None:
            self._constrained.give_up(result.lost_mask_source)
        self._constrained.append(outputs)
        return outputs

    @contextmanager
    def _fatal_failures(self) -> Iterator[None]:
        """Any exception of a worker ends the engine."""
        try:
            yield
        except Exception as error:
            self._failure = error
            logger.exception("the worker can't go on")
            raise EngineDeadError(f"the engine has ended: {type(error).__name__}. Restart it.") from error

    def _release_if_idle(self) -> None:
        """Let the worker free the resources of the last requests; if requests remain, the next step does it.

        Steps in flight compute for requests that have ended: their results are ignored.
        """
        if self._failure is not None or self.scheduler.has_unfinished_requests():
            return
        while self._in_flight:
            self._collect()
        if self.scheduler.has_releases:
            self._submit()
            self._collect()

    @property
    def idle_check_s(self) -> float | None:
        """How often to call `use_idle_time` while there is nothing to do, to notice a rank that ended; None: never."""
        return None if self.config.parallel_config.tensor_parallel_size == 1 else _IDLE_CHECK_S

    def use_idle_time(self) -> bool:
        """Called while no request is unfinished: prepare for later ones, for a short time. False: nothing is left to
        prepare."""
        self._check_alive()
        with self._fatal_failures():
            return not self._executor.submit(SchedulerOutput.idle()).result().is_prepared

    def stats(self) -> SchedulerStats:
        """Counters and gauges of the scheduler and its caches; requests in the grammar queue count as waiting."""
        stats = self.scheduler.stats()
        num_compiling = len(self._grammar_queue)
        return replace(stats, num_waiting=stats.num_waiting + num_compiling) if num_compiling else stats

    def shutdown(self) -> None:
        """Free the worker's memory, and end the grammar processes."""
        self._grammars.close()
        self._executor.shutdown()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine has ended: {type(self._failure).__name__}. Restart it.")


def make_executor(config: EngineConfig) -> Executor:
    """What runs the steps of an engine: this process, or several that share the model."""
    if config.parallel_config.tensor_parallel_size == 1:
        return SingleProcessExecutor(config)
    if config.engine_args is None:
        raise ConfigError(
            f"tensor_parallel_size: got {config.parallel_config.tensor_parallel_size} in a configuration made by hand, "
            "expected one that ranks can make again. Make it with EngineArgs.create_engine_config."
        )
    return MultiProcessExecutor(config, "sensorium.engine.rank_process", msgspec.msgpack.encode(config.engine_args))


def within_blocks(config: EngineConfig, report: LoadReport) -> EngineConfig:
    """`config` with a context no longer than what the KV blocks of each group together hold, and the model's positions
    reach."""
    reach = report.features.max_prompt_tokens
    if reach is not None and config.model_config.max_model_len > reach:
        config = replace(config, model_config=replace(config.model_config, max_model_len=reach))
    limits = [group.max_tokens() for group in report.cache_groups]
    held = min((limit for limit in limits if limit is not None), default=config.model_config.max_model_len)
    if config.model_config.max_model_len <= held:
        return config
    logger.warning(
        "max_model_len: got %d, but the KV cache holds %d tokens, so requests may have at most %d. "
        "Raise kv_cache_bytes or memory_fraction for longer ones.",
        *(config.model_config.max_model_len, held, held),
    )
    return replace(config, model_config=replace(config.model_config, max_model_len=held))
