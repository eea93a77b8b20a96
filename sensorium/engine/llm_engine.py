"""The engine in one process: prompts in, outputs out, step by step.

Joins the front (preprocessing, detokenizing) and the core. `preprocess` may run in other threads; everything else
belongs to one thread. `LLM` drives it for whole lists of prompts; callers that run the steps themselves use this class.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from sensorium.config import EngineConfig
from sensorium.engine.args import EngineArgs
from sensorium.engine.core import EngineCore
from sensorium.engine.loading import LOADING
from sensorium.engine.output_processor import OutputProcessor
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY
from sensorium.inputs.media_settings import MediaSettings
from sensorium.inputs.preprocess import InputPreprocessor, ProcessedRequest
from sensorium.inputs.tokenizer import get_tokenizer
from sensorium.lora import LoRARequest
from sensorium.media import MediaLoader
from sensorium.messages import EngineOutput, LoadReport
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.outputs import OutputKind, PoolingRequestOutput, RequestOutput
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams


class LLMEngine:
    """Continuous batching over one model.

    Every request that `add_request` accepted ends in exactly one output with `finished`.
    """

    def __init__(
        self, config: EngineConfig, *, skip_tokenizer: bool = False, media_loader: MediaLoader | None = None
    ) -> None:
        with LOADING:
            MediaSettings(config.model_config, INPUT_REGISTRY, MULTIMODAL_REGISTRY).check_engine()
            self.tokenizer: Any = None if skip_tokenizer else get_tokenizer(config.model_config)
            self.core = EngineCore(config)
        self.config = self.core.config
        self.preprocessor = InputPreprocessor(self.config, self.core.features, self.tokenizer, media_loader)
        self.outputs = OutputProcessor(self.tokenizer)
        self._has_sent_vocabulary = False

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """Build an engine from flat settings."""
        return cls(engine_args.create_engine_config(), skip_tokenizer=engine_args.skip_tokenizer_init)

    @property
    def report(self) -> LoadReport:
        """What loading determined: the model's tier, its features, where memory went."""
        return self.core.report

    def preprocess(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        arrival_time_s: float | None = None,
        cache_salt: str | None = None,
        pooling: PoolingParams | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> ProcessedRequest:
        """Tokenize a prompt, process its media, admit it. Safe in any thread; nothing is queued yet.

        Raises:
            RequestError: Something about the prompt, its media or the parameters is wrong.
        """
        return self.preprocessor.process(
            request_id,
            prompt,
            self.config.model_config.sampling_defaults.params() if params is None else params,
            priority=priority,
            arrival_time_s=time.monotonic() if arrival_time_s is None else arrival_time_s,
            cache_salt=cache_salt,
            pooling=pooling,
            lora_request=lora_request,
        )

    def add_processed(self, processed: ProcessedRequest, kind: OutputKind = OutputKind.CUMULATIVE) -> None:
        """Queue what `preprocess` returned. `kind` says what its outputs hold from step to step.

        Raises:
            RequestError: The waiting queue is full, or the request needs more memory than there is.
        """
        if processed.engine_request.sampling_params.structured_outputs is not None and not self._has_sent_vocabulary:
            self.core.use_vocabulary(self.preprocessor.vocabulary)
            self._has_sent_vocabulary = True
        requests = self.outputs.add_request(processed, kind)
        added = []
        try:
            for request in requests:
                self.core.add_request(request)
                added.append(request.request_id)
        except Exception:
            self.core.abort(added)
            self.outputs.remove_request(processed.engine_request.request_id)
            raise

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> None:
        """Process and queue one prompt.

        Args:
            request_id: Names the request in outputs; must not be in use.
            prompt: A string, token ids, or a dict with `prompt` or `prompt_token_ids`, `multi_modal_data` and
                `mm_processor_kwargs`.
            params: How to sample; the checkpoint's defaults if not given.
            arrival_time: Monotonic seconds; now if not given.
            priority: Lower goes first under the priority policy.
            cache_salt: Only requests with the same salt share caches.
            lora_request: The adapter to answer with, or its name; the model alone if not given.

        Raises:
            RequestError: See `preprocess` and `add_processed`.
        """
        if self.outputs.has_request(request_id):
            raise InvalidRequestError(f"got {request_id!r}, which is in use, expected a new one.", field="request_id")
        processed = self.preprocess(
            *(request_id, prompt, params),
            priority=priority,
            arrival_time_s=arrival_time,
            cache_salt=cache_salt,
            lora_request=lora_request,
        )
        self.add_processed(processed)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests. Ids that are unknown or finished are ignored."""
        for each in [request_id] if isinstance(request_id, str) else request_id:
            self.core.abort(self.outputs.abort(each))

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do."""
        return self.core.has_unfinished_requests()

    def step(self) -> list[RequestOutput | PoolingRequestOutput]:
        """Run one step; returns an output for each request that changed.

        Raises:
            EngineDeadError: The engine can't go on.
        """
        return self._process(self.core.step())

    def _process(self, core_outputs: list[EngineOutput]) -> list[RequestOutput | PoolingRequestOutput]:
        processed = self.outputs.process(core_outputs)
        if processed.abort_ids:
            self.core.abort(processed.abort_ids)
        return processed.outputs

    def get_tokenizer(self) -> Any:
        """The tokenizer; None if it was skipped."""
        return self.tokenizer

    def shutdown(self) -> None:
        """Free the model's memory."""
        self.core.shutdown()
