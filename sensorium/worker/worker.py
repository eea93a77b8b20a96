"""One device: loads the model, finds out what it can do, allocates the KV cache, runs steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sensorium.attention import choose_backends
from sensorium.cache_spec import CacheGroup
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ConfigError, ModelError
from sensorium.inputs import INPUT_REGISTRY
from sensorium.kernels import native_refusal
from sensorium.logger import get_logger
from sensorium.messages import LoadReport, SchedulerOutput
from sensorium.model_executor.drivers import DualDriver, ModelDriver, TextDriver
from sensorium.model_executor.lora.loader import LoadedAdapters
from sensorium.model_executor.model_loader import load_model
from sensorium.model_executor.model_loader.quantization import weights_line
from sensorium.model_executor.models.interfaces import supports_cross_attention
from sensorium.model_executor.models.transformers.dual_encoder import DualEncoder, dual_features
from sensorium.model_executor.models.transformers.model import TransformersForCausalLM
from sensorium.model_executor.models.transformers.pooling import TransformersForPooling
from sensorium.multimodal.hf_processors import describe_backend
from sensorium.worker.adapters import lay_adapters, try_adapters
from sensorium.worker.dummy_steps import DummySteps
from sensorium.worker.graph_capture import CudaGraphCapture, GraphCapture
from sensorium.worker.kv_cache import CacheLayout, check_cache_dtype, max_rows_of_request
from sensorium.worker.memory import MemoryPlan, plan_memory, tensor_bytes
from sensorium.worker.model_runner import ModelRunner, PendingStep, PreparedStep
from sensorium.worker.pooling_tiers import choose_pooling_tier
from sensorium.worker.probe import probe_model
from sensorium.worker.process_settings import PROCESS_SETTINGS
from sensorium.worker.transformers_tiers import choose_tier, request_cache_bytes

logger = get_logger(__name__)


class Worker:
    """Owns every tensor of one device. `load` once, then `submit` step by step."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = torch.device(config.device_config.device)
        self._seconds: dict[str, float] = {}
        self._model: nn.Module | None = None
        self._driver: ModelDriver | None = None
        self._runner: ModelRunner | None = None
        self._release: weakref.finalize[..., Worker] | None = None

    @property
    def model(self) -> nn.Module:
        """The loaded model."""
        assert self._model is not None, "load() was not called"
        return self._model

    @property
    def runner(self) -> ModelRunner:
        """Runs the steps."""
        assert self._runner is not None, "load() was not called"
        return self._runner

    @torch.inference_mode()
    def load(self) -> LoadReport:
        """Load and probe the model, allocate its cache.

        Raises:
            WeightsError: Checkpoint and model don't match.
            ModelError: The class can't be served as written.
            ConfigError: Not even one KV block fits.
        """
        config, group = self._config, self._config.parallel_config.group
        PROCESS_SETTINGS.hold(config)
        self._release = weakref.finalize(self, PROCESS_SETTINGS.release)
        self._release.atexit = False
        with self._stage("load weights"):
            self._model = load_model(config).eval()
        if INPUT_REGISTRY.has_dummy_encoder_data(type(self._model)) and not supports_cross_attention(self._model):
            raise ModelError(
                f"{type(self._model).__name__}: got dummy encoder data, expected a class with SupportsCrossAttention, "
                "whose forward takes encoder_outputs. Prompts for an encoder of their own are not served."
            )
        adapters = LoadedAdapters({})
        if config.lora_config is not None:
            with self._stage("load adapters"):
                adapters = lay_adapters(self._model, config)
        features = None
        if isinstance(self._model, TransformersForCausalLM):
            with self._stage("choose tier"):
                self._driver, features = choose_tier(self._model, config, self._device)
        if isinstance(self._model, TransformersForPooling):
            with self._stage("choose tier"):
                features = choose_pooling_tier(self._model, config, self._device)
                self._driver = TextDriver(self._model)
        if isinstance(self._model, DualEncoder):
            self._driver = DualDriver(self._model, config.model_config.dtype, self._device)
            features = dual_features(config.model_config)
        layout = CacheLayout.of(self._model, config)
        if not hasattr(self._model, "compute_logits") and not config.model_config.pools:
            raise ModelError(
                f"{type(self._model).__name__}: no method compute_logits(hidden_states, sampling_metadata). "
                "Add it; it returns logits (num_rows, vocab_size)."
            )
        device_type, dtype = self._device.type, config.model_config.dtype
        cache_dtype = layout.cache_dtype
        check_cache_dtype(cache_dtype, self._device)
        choose_backends(self._model, device_type, dtype, config.device_config.attention_backend, cache_dtype)
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # loading may need more than any step
        with self._stage("probe"):
            if self._driver is None or features is None:
                self._driver, features = probe_model(self._model, config, layout, self._device)
        try_adapters(*(adapters, config, self._model, self._driver, DummySteps(config, layout, self._device), features))
        capture = self._graph_capture()
        with self._stage("allocate"):
            memory = plan_memory(
                *(self._device, config, self._model, self._driver, layout, features), records=capture is not None
            )
            # Ranks give out the same blocks, so none may count on more memory than the others have.
            max_cross_rows = max_rows_of_request(config, features)
            groups = layout.plan(config, group.least(memory.available), max_cross_rows)
            caches = layout.allocate(groups, self._device)
        try:
            self._runner = ModelRunner(
                config, self._model, self._driver, features, groups, caches, self._device, capture
            )
        except MemoryError as error:
            raise ConfigError(
                f"max_num_seqs: got {config.scheduler_config.max_num_seqs} with max_model_len "
                f"{config.model_config.max_model_len}, expected what their tables have room for in memory. Lower "
                "max_num_seqs (--max-num-seqs)."
            ) from error
        if capture is not None:
            with self._stage("record"):
                self._runner.passes.prepare()
        return self._report(features, groups, memory, adapters, layout.rounding_line())

    def _graph_capture(self) -> GraphCapture | None:
        """What records passes on this device; None: every pass runs call by call."""
        if self._device.type != "cuda" or self._config.device_config.enforce_eager:
            return None
        if self._config.model_config.pools:
            return None  # recorded passes end in a sampled token
        return CudaGraphCapture()

    def _report(
        self,
        features: ModelFeatures,
        groups: tuple[CacheGroup, ...],
        memory: MemoryPlan,
        adapters: LoadedAdapters,
        rounding: str,
    ) -> LoadReport:
        model_config = self._config.model_config
        kv_bytes = sum(group.num_bytes for group in groups)
        return LoadReport(
            features=features,
            cache_groups=groups,
            memory_bytes={
                "weights": tensor_bytes(self.model),
                **({"adapters": adapters.num_bytes} if adapters.methods else {}),
                "KV cache": kv_bytes,
                **memory.parts(),
                **request_cache_bytes(self.model, self._config),
            },
            seconds=dict(self._seconds),
            model=f"{model_config.architecture} {model_config.dtype_name} on {self._device}{self._ranks()}",
            weights=weights_line(self.model, self._config.quant_config),
            processors=describe_backend(model_config) if model_config.is_multimodal_model else "",
            steps=self._steps_line(),
            adapters=self._adapters_line(),
            drafts=_drafts_line(self._config, groups),
            sampling=model_config.sampling_defaults.line(),
            pooling=model_config.pooler.line() if model_config.pools else "",
            kernels=_kernels_line(self._device),
            rounding=rounding,
        )

    def _ranks(self) -> str:
        num_ranks = self._config.parallel_config.tensor_parallel_size
        return f", shared by {num_ranks} ranks" if num_ranks > 1 else ""

    def _steps_line(self) -> str:
        if self._device.type == "cpu":
            return ""
        in_flight = f"{self._config.scheduler_config.max_steps_in_flight} in flight"
        if self.runner.passes.decodes is None:
            return f"{in_flight}, call by call"
        if refusals := self.runner.passes.refusals:
            return f"{in_flight}, call by call, because passes can't be recorded: {refusals[0]}"
        if self.runner.passes.trunks is None:
            return f"{in_flight}, decodes as CUDA graphs, others call by call, since they write what an encoder made"
        return f"{in_flight}, decodes and short mixed passes as CUDA graphs"

    def _adapters_line(self) -> str:
        lora = self._config.lora_config
        if lora is None:
            return ""
        alone = "" if self.runner.passes.decodes is None else "; passes with rows of one run call by call"
        most = "" if lora.max_loras is None else f", at most {lora.max_loras} at once"
        return f"{', '.join(lora.modules)}{most}{alone}"

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - begin

    def submit(self, step: SchedulerOutput) -> PendingStep | PreparedStep:
        """Begin a step; an idle one ends before this returns."""
        return self.runner.prepare() if step.is_idle else self.runner.submit(step)

    def shutdown(self) -> None:
        """Drop the model and the caches, and put back what was set for the whole process. May be called again."""
        if self._runner is not None:
            self._runner.close()
        self._model = self._driver = self._runner = None
        if self._release is not None:
            self._release()


def _drafts_line(config: EngineConfig, groups: Sequence[CacheGroup]) -> str:
    """Where drafts come from, or why there are none; empty where nobody asked for them."""
    if config.speculative_config is None:
        return ""
    if config.model_config.pools:
        return "none: the model generates nothing"
    if not all(group.can_go_back for group in groups):
        return "none: the model keeps a state, from which nothing can be taken back"
    return f"up to {config.max_drafts} a step, as the same tokens went on before"


def _kernels_line(device: torch.device) -> str:
    """What to know about computing without the native kernels; empty with them."""
    reason = native_refusal() if device.type == "cpu" else None
    if reason is None:
        return ""
    return (
        f"plain torch ({reason}): several times slower, and the last digits of a row depend on how many are computed "
        "with it, so that log probabilities may differ a little from batch to batch"
    )
