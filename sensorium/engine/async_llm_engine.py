"""`AsyncLLMEngine`: many requests at once from an event loop, over an engine core in a process of its own.

    caller -> pool of threads: tokenize, map media, encode -> channel -> core process
    caller <- stream <- event loop: detokenize, stop strings <- channel <- core process

The event loop only moves messages and text: prompts are prepared in a bounded pool, and steps run elsewhere. Owns the
streams of all open requests. Everything here belongs to the event loop on which the engine was started.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from sensorium.config import EngineConfig
from sensorium.engine.args import EngineArgs
from sensorium.engine.codec import encode_add
from sensorium.engine.core import within_blocks
from sensorium.engine.core_messages import CoreOutputs, UseVocabulary
from sensorium.engine.core_process import CoreFactory
from sensorium.engine.core_supervisor import CoreSupervisor
from sensorium.engine.fair_turns import FairTurns
from sensorium.engine.loading import LOADING
from sensorium.engine.output_processor import OutputProcessor
from sensorium.engine.output_stream import OutputStream
from sensorium.engine.resolution import num_preprocess_threads
from sensorium.errors import (
    EngineDeadError,
    EngineRestartingError,
    InvalidRequestError,
    OverloadedError,
    RequestAbortedError,
    SensoriumError,
)
from sensorium.inputs import INPUT_REGISTRY
from sensorium.inputs.media_settings import MediaSettings
from sensorium.inputs.preprocess import InputPreprocessor, ProcessedRequest
from sensorium.inputs.tokenizer import get_tokenizer
from sensorium.inputs.warm_up import warm_up
from sensorium.ipc.codec import EncodedMessage, encode, encode_request
from sensorium.logger import DEFAULT_LOG, LogSettings, get_logger
from sensorium.lora import LoRARequest
from sensorium.media import MediaLease, MediaLoader
from sensorium.messages import LoadReport
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.outputs import OutputKind, PoolingRequestOutput, RequestOutput
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams
from sensorium.scheduler.stats import SchedulerStats
from sensorium.stages import stage

logger = get_logger(__name__)

_HEALTH_TIMEOUT_S = 30.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How much work an engine has at this moment."""

    num_open: int
    """Requests that have not ended."""
    num_waiting: int
    """Those of them that have no output yet: in preparation, waiting, or in prefill."""
    num_media_bytes: int = 0
    """Bytes of fetched and mapped media that those requests hold in the budget."""


class AsyncLLMEngine:
    """Serves requests concurrently. Made by `start`, ended by `shutdown`.

    Every request that was opened ends with an output that is `finished`, or with an exception. Its resources are
    released when its reader stops reading, for whatever reason.
    """

    def __init__(
        self,
        config: EngineConfig,
        report: LoadReport,
        core: CoreSupervisor,
        hub: _Hub,
        tokenizer: Any | None,
        media_loader: MediaLoader | None,
        *,
        preprocess_threads: int,
        accept_embeddings: bool,
    ) -> None:
        """For `start`."""
        self.config = config = within_blocks(config, report)
        self.report = report
        self.tokenizer = tokenizer
        self.preprocessor = InputPreprocessor(
            config, report.features, tokenizer, media_loader, accept_embeddings=accept_embeddings
        )
        self.pool = ThreadPoolExecutor(max(preprocess_threads, 1), thread_name_prefix="sensorium-preprocess")
        self._turns = FairTurns(max(preprocess_threads, 1))
        self.stats: SchedulerStats | None = None
        """The core's latest statistics; None before the first."""
        self._core = core
        self._outputs = OutputProcessor(tokenizer)
        self._streams: dict[str, OutputStream] = {}
        self._waiting: dict[str, MediaLease | None] = {}
        """Requests without output yet, and what they hold of the budget of media."""
        self._tenant_of: dict[str, str] = {}
        """By request, for those that wait."""
        self._tenants: Counter[str] = Counter()
        """How many requests of each tenant wait, where some do."""
        self._media_budget = None if media_loader is None else media_loader.budget
        self._vocabulary: bytes | None = None
        """The message with the vocabulary, once one was needed."""
        self._num_vocabularies_sent = 0
        self._ids = itertools.count()
        self._is_shutting_down = False
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        hub.on_outputs, hub.on_death = self._take_outputs, self._core_died

    @classmethod
    async def start(
        cls,
        args: EngineArgs,
        *,
        media_loader: MediaLoader | None = None,
        make_core: CoreFactory | None = None,
        accept_embeddings: bool = False,
        max_restarts: int = 0,
        log: LogSettings = DEFAULT_LOG,
    ) -> AsyncLLMEngine:
        """Start an engine core and everything in front of it.

        Args:
            args: settings.
            media_loader: turns encoded media into objects; without it, media are objects.
            make_core: runs the core in a thread of this process, as `core_client.IN_THIS_PROCESS` does; by default it
                gets a process of its own.
            accept_embeddings: whether requests may bring embeddings instead of media.
            max_restarts: how many deaths of the core in a row are answered with a new one. Requests that were open end
                with an error all the same.
            log: how the core's process writes its log.

        Raises:
            ConfigError, ModelError, WeightsError: The model can't be served as asked.
            EngineDeadError: The core ended while it was loading.
        """
        hub = _Hub()
        core = CoreSupervisor(args, hub.outputs, hub.death, make=make_core, log=log, max_restarts=max_restarts)
        try:
            # Meanwhile the core imports and loads.
            config, tokenizer = await asyncio.to_thread(_resolve, args)
            if media_loader is not None and config.model_config.is_multimodal_model:
                media_loader.start()
            if make_core is None:  # otherwise it would gain nothing
                await asyncio.to_thread(_warm_up, config)
            report = await core.ready()
            engine = cls(
                config,
                report,
                core,
                hub,
                tokenizer,
                media_loader,
                preprocess_threads=num_preprocess_threads(args),
                accept_embeddings=accept_embeddings,
            )
        except BaseException:
            await core.stop(timeout_s=0.0 if core.failure is None else 5.0)
            raise
        return engine

    # State

    @property
    def is_running(self) -> bool:
        """Whether requests can be opened."""
        return self._core.failure is None and not self._is_shutting_down

    @property
    def has_ended(self) -> bool:
        """Whether the core has ended for good."""
        return self._core.has_ended

    @property
    def num_restarts(self) -> int:
        """How often a new core took a dead one's place."""
        return self._core.num_restarts

    @property
    def core_pid(self) -> int:
        """Id of the process that the core runs in."""
        return self._core.pid

    def load(self) -> EngineLoad:
        """How much work there is."""
        held = 0 if self._media_budget is None else self._media_budget.num_bytes
        return EngineLoad(len(self._streams), len(self._waiting), held)

    def check_accepts(self, tenant: str = "") -> None:
        """Return if a request of the tenant would be accepted now. If the waiting queue is full, only tenants with less
        than their share of it are accepted.

        Raises:
            OverloadedError: The waiting queue is full.
            EngineDeadError: The engine can't go on, is being restarted, or is shutting down.
        """
        self._check_running()
        num_waiting, most = len(self._waiting), self.config.scheduler_config.max_waiting_requests
        own, num_tenants = self._tenants[tenant], len(self._tenants.keys() | {tenant})
        if most is not None and num_waiting >= most and own >= most // num_tenants:
            raise OverloadedError(
                f"waiting requests: got {num_waiting}, expected fewer than {most}. Send the request again later."
            )

    async def check_health(self, *, generate: bool = False, timeout_s: float = _HEALTH_TIMEOUT_S) -> None:
        """Return if the engine works; with `generate`, only after the model has made one real token, or pooled one.

        Raises:
            EngineDeadError: It doesn't, or has made no token in time.
        """
        self._check_running()
        if not generate:
            return
        prompt = {"prompt_token_ids": [self._plain_token_id()]}
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        try:
            async with asyncio.timeout(timeout_s):
                if self.config.model_config.pools:
                    await self.encode(prompt, PoolingParams(self.config.model_config.pooler.tasks[0]))
                    return
                async for _ in self.generate(prompt, params):
                    pass
        except TimeoutError:
            raise EngineDeadError(f"the engine: got no token within {timeout_s:g} s. Look at its load.") from None

    # Requests

    async def generate(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        kind: OutputKind = OutputKind.CUMULATIVE,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Generate for one prompt; yields outputs, the last of which is `finished`.

        Stopping to read, closing the iterator or cancelling the task that reads ends the request.

        Args:
            prompt: A string, token ids, or a dict as `LLM.generate` takes it.
            params: How to sample; the checkpoint's defaults if not given.
            request_id: A name that is not in use; made up if not given.
            kind: What outputs hold.
            priority: Lower goes first under the priority policy.
            cache_salt: Only requests with the same salt share caches.
            tenant: Who sent it: waiting tenants share the slots evenly.
            mm_processor_kwargs: For the model's input processor and mappers.
            lora_request: The adapter to answer with, or its name; the model alone if not given.

        Raises:
            RequestError: The prompt, its media or the parameters are wrong, or the engine has too much to do.
            RequestAbortedError: `abort` or a shutdown ended it.
            EngineDeadError: The engine can't go on.
        """
        name = request_id or self._new_id()
        prepare = partial(
            self.preprocessor.process,
            name,
            prompt,
            self.config.model_config.sampling_defaults.params() if params is None else params,
            priority=priority,
            arrival_time_s=time.monotonic(),
            cache_salt=cache_salt,
            tenant=tenant,
            mm_processor_kwargs=mm_processor_kwargs,
            lora_request=lora_request,
        )
        stream = self._open(name, kind, tenant)
        try:
            await self._submit(name, prompt, prepare, kind)
            del prompt, prepare  # the media that they hold
            while True:
                output = await stream.get()
                if output.error is not None:
                    raise output.error
                assert isinstance(output, RequestOutput)
                yield output
                if output.finished:
                    return
        finally:
            self._close(name)

    async def encode(
        self,
        prompt: Any,
        pooling: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
        lora_request: LoRARequest | str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PoolingRequestOutput:
        """Pool one prompt; into a vector `(hidden_size,)` unless `pooling` says otherwise.

        Raises:
            RequestError, RequestAbortedError, EngineDeadError: See `generate`.
        """
        name = request_id or self._new_id()
        prepare = partial(
            self.preprocessor.process,
            name,
            prompt,
            SamplingParams(max_tokens=1, detokenize=False),
            priority=priority,
            arrival_time_s=time.monotonic(),
            cache_salt=cache_salt,
            tenant=tenant,
            mm_processor_kwargs=mm_processor_kwargs,
            pooling=pooling or PoolingParams(),
            lora_request=lora_request,
        )
        stream = self._open(name, OutputKind.FINAL_ONLY, tenant)
        try:
            await self._submit(name, prompt, prepare, OutputKind.FINAL_ONLY)
            output = await stream.get()
        finally:
            self._close(name)
        if output.error is not None:
            raise output.error
        assert isinstance(output, PoolingRequestOutput)
        return output

    async def preprocess(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedRequest:
        """What `generate` would send to the core, without sending it. Raises `RequestError`."""
        self._check_running()
        prepare = partial(
            self.preprocessor.process,
            self._new_id(),
            prompt,
            self.config.model_config.sampling_defaults.params() if params is None else params,
            cache_salt=cache_salt,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        await self.preprocessor.decode_ahead(prompt)
        return await self.in_pool(prepare)

    def abort(self, request_id: str) -> None:
        """End a request: its reader gets `RequestAbortedError`. Ids that are not open are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._core.abort(self._outputs.abort(request_id))
            stream.fail(RequestAbortedError("the request was ended before it finished."))

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give open ones `drain_s` to finish, abort the rest, end the core.

        May be called again.
        """
        self._is_shutting_down = True
        try:
            async with asyncio.timeout(drain_s):
                await self._all_closed.wait()
        except TimeoutError:
            logger.warning("%d requests have not finished within %g s and are aborted", len(self._streams), drain_s)
        for request_id in list(self._streams):
            self.abort(request_id)
        self.pool.shutdown(wait=False, cancel_futures=True)
        await self._core.stop()

    # Inside

    def _new_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _plain_token_id(self) -> int:
        """The smallest id that doesn't stand for media."""
        media = frozenset().union(*self.report.features.placeholder_token_ids.values())
        return next(token_id for token_id in itertools.count() if token_id not in media)

    def _check_running(self) -> None:
        if self._core.failure is not None:
            raise _dead(self._core.failure)
        if self._is_shutting_down:
            raise EngineDeadError("the engine is shutting down. Send the request again later.")

    def _open(self, request_id: str, kind: OutputKind, tenant: str) -> OutputStream:
        self.check_accepts(tenant)
        if request_id in self._streams:
            raise InvalidRequestError(f"got {request_id!r}, which is in use, expected a new one.", field="request_id")
        stream = self._streams[request_id] = OutputStream(kind)
        self._waiting[request_id] = None
        self._tenant_of[request_id] = tenant
        self._tenants[tenant] += 1
        self._all_closed.clear()
        return stream

    def _close(self, request_id: str) -> None:
        """Forget a request, and end it in the core if it still runs there."""
        self._core.abort(self._outputs.abort(request_id))
        self._leave_line(request_id)
        self._streams.pop(request_id, None)
        if not self._streams:
            self._all_closed.set()

    def _leave_line(self, request_id: str) -> None:
        """Note that a request has output, or will have none."""
        self._waiting.pop(request_id, None)
        tenant = self._tenant_of.pop(request_id, None)
        if tenant is not None:
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    async def _submit(
        self, request_id: str, prompt: Any, prepare: Callable[[], ProcessedRequest], kind: OutputKind
    ) -> None:
        """Prepare a request and send it to the core. Raises the error with which its stream fails meanwhile."""
        preparation = self._prepare(self._tenant_of[request_id], prompt, prepare)
        del prompt, prepare
        processed, encoded = await self._streams[request_id].unless_failed(preparation)
        self._check_running()
        if self._media_budget is not None:
            self._waiting[request_id] = self._media_budget.lease(encoded.segment_bytes())
        requests = self._outputs.add_request(processed, kind)
        outputs = [(request.request_id, request.sampling_params) for request in requests]
        self._core.add(encode_add(encoded, outputs))

    async def _prepare(
        self, tenant: str, prompt: Any, prepare: Callable[[], ProcessedRequest]
    ) -> tuple[ProcessedRequest, EncodedMessage]:
        """A request as the core takes it. Its media are decoded first, then it waits for its tenant's turn."""
        with stage("prepare"):
            await self.preprocessor.decode_ahead(prompt)  # occupies no thread of the pool, however long it takes
            del prompt
            async with self._turns.turn(tenant):
                processed, encoded = await self.in_pool(lambda: _encoded(prepare()))
            if processed.engine_request.sampling_params.structured_outputs is not None:
                await self._send_vocabulary()
        return processed, encoded

    async def _send_vocabulary(self) -> None:
        """Send the core the vocabulary, unless it has it."""
        if self._vocabulary is None:
            self._vocabulary = await self.in_pool(lambda: encode(UseVocabulary(self.preprocessor.vocabulary)).payload)
        if self._num_vocabularies_sent <= self._core.num_restarts:
            self._num_vocabularies_sent = self._core.num_restarts + 1
            self._core.add(EncodedMessage(self._vocabulary))

    async def in_pool(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, run in the pool that prepares requests, in the caller's context."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, copy_context().run, call)
        except RuntimeError:
            self._check_running()  # raised by a pool that has been shut down
            raise

    def _take_outputs(self, received: CoreOutputs) -> None:
        if received.stats is not None:
            self.stats = received.stats
        processed = self._outputs.process(received.outputs)
        self._core.abort(processed.abort_ids)
        for output in processed.outputs:
            self._leave_line(output.request_id)
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)

    def _core_died(self, error: EngineDeadError) -> None:
        for stream in self._streams.values():
            stream.fail(_dead(error))


def _dead(error: SensoriumError) -> EngineDeadError:
    """A copy of the error for each stream, so that their tracebacks stay apart."""
    if isinstance(error, EngineRestartingError):
        return EngineRestartingError(str(error), retry_after_s=error.retry_after_s)
    return EngineDeadError(str(error))


class _Hub:
    """The core's callbacks, which exist before the engine does."""

    def __init__(self) -> None:
        self.on_outputs: Callable[[CoreOutputs], None] | None = None
        self.on_death: Callable[[EngineDeadError], None] | None = None

    def outputs(self, received: CoreOutputs) -> None:
        if self.on_outputs is not None:
            self.on_outputs(received)

    def death(self, error: EngineDeadError) -> None:
        if self.on_death is not None:
            self.on_death(error)


def _resolve(args: EngineArgs) -> tuple[EngineConfig, Any | None]:
    """The front's part of loading: settings, limits and tokenizer; no weights."""
    with LOADING:
        config = args.create_engine_config()
        MediaSettings(config.model_config, INPUT_REGISTRY, MULTIMODAL_REGISTRY).check_engine()
        return config, None if args.skip_tokenizer_init else get_tokenizer(config.model_config)


def _warm_up(config: EngineConfig) -> None:
    with LOADING:
        warm_up(config.model_config)


def _encoded(processed: ProcessedRequest) -> tuple[ProcessedRequest, EncodedMessage]:
    """A request for the core, and the parts that the front keeps, without its media."""
    message = processed.engine_request
    encoded = encode_request(message)
    return replace(processed, engine_request=replace(message, media=(), mrope_positions=None)), encoded
