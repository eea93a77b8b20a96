"""Flat settings that people give, and how they become an `EngineConfig`.

Every "auto" is decided here or at load, and logged. Fields are typed and documented one by one, so that command-line
flags are generated from them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from sensorium.chat.template import check_template, read_template
from sensorium.checkpoint import check_tokenizer_names, read_json
from sensorium.config import (
    Amount,
    BlockSize,
    BytesOrNone,
    CacheConfig,
    CompileTime,
    Count,
    DeviceConfig,
    Dtype,
    EncoderRows,
    EngineConfig,
    Fraction,
    GenerationConfig,
    Limits,
    LoadCheck,
    LoadConfig,
    LoadFormat,
    MMSplit,
    ModelConfig,
    ModelImpl,
    MultiModalConfig,
    NumBytes,
    NumSeqs,
    NumThreads,
    ParallelConfig,
    PoolerConfig,
    PoolingType,
    ProcessorBackend,
    ReasoningParser,
    SchedulerConfig,
    SchedulingPolicy,
    StepsInFlight,
    TokenGap,
    TokenizerMode,
    ToolParser,
    WaitingBound,
)
from sensorium.engine.hf_config import (
    CheckpointConfig,
    check_values,
    config_of_part,
    load_hf_config,
    resolve_dtype,
    resolve_max_model_len,
    written_end_ids,
)
from sensorium.engine.loading import LOADING
from sensorium.errors import ConfigError
from sensorium.logger import get_logger
from sensorium.plugins import check_plugins, load_general_plugins, load_plugins
from sensorium.sampling_defaults import FILE_NAME, read_defaults, read_end_ids
from sensorium.settings import Bounds, FileName, check_settings, wrong_setting

logger = get_logger(__name__)

Name: TypeAlias = Annotated[str, FileName()]
DEFAULT_BLOCK_SIZE = 16
DEMO_MODEL = "demo"
"""The name of the model that comes with the package."""


@dataclass(frozen=True)
class EngineArgs:
    """Settings of an engine. Only `model` is needed."""

    model: Name
    """A directory with a Hugging Face checkpoint, a name on the model hub, or "demo" for the bundled model."""
    tokenizer: Name | None = None
    """Directory or hub name of the tokenizer, if it isn't the model's."""
    tokenizer_mode: TokenizerMode = "auto"
    """Which tokenizer of the checkpoint to take: there is one of each kind."""
    skip_tokenizer_init: bool = False
    """Take and return token ids only."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint. Off: such a checkpoint is refused."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    code_revision: Name | None = None
    """The same for the code that comes with a checkpoint."""
    dtype: Literal["auto", Dtype] = "auto"
    """"auto" (the checkpoint's), "float32", "bfloat16" or "float16"."""
    max_model_len: Count | None = None
    """Most tokens of prompt and output together; the model's own limit by default."""
    seed: Annotated[int, Bounds(-(2**63), 2**63 - 1)] = 0
    """Seed of requests that bring none."""
    load_format: LoadFormat = "safetensors"
    """"safetensors", or "dummy" for seeded random weights."""
    quantization: Name | None = None
    """How linear layers hold their weights, if not in the model's dtype: "int8" (made at load, CPU only), or a name
    that a plug-in registered. A checkpoint that is quantized says so itself."""
    model_impl: ModelImpl = "auto"
    """Whose modules run: "native" for a class that is registered here, "transformers" for Hugging Face's own, "auto"
    for a registered class where there is one."""
    load_check: LoadCheck = "auto"
    """"auto" compares modules of transformers with their untouched selves at load, which takes seconds at most; "off"
    trusts that they fit."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values that replace those of the checkpoint's config."""
    plugins: tuple[Name, ...] = field(default=(), metadata={"flag": "plugin"})
    """A Python file, or a module, that registers models; imported by every process of the engine. May be repeated."""

    device: Name = "auto"
    """"auto" (a GPU if there is one), "cpu", or "cuda" with an optional index, such as "cuda:1"."""
    num_threads: NumThreads | None = None
    """Threads of CPU kernels; torch's default if not given."""
    tensor_parallel_size: Count = 1
    """Devices that share the model; this build runs on one."""

    block_size: BlockSize | None = None
    """Tokens in a KV block."""
    num_blocks: Count | None = None
    """KV blocks, instead of a size in bytes."""
    kv_cache_bytes: NumBytes | None = None
    """Memory for the KV cache; decided from what is free by default."""
    memory_fraction: Fraction = 0.9
    """Share of the device's memory that the engine may use."""
    enable_prefix_caching: bool = True
    """Reuse the KV of equal prompt starts, media included."""
    mm_processor_cache_bytes: BytesOrNone = 1 << 30
    """Memory for mapped media that may come again; 0 turns the cache off."""
    encoder_cache_rows: Amount | None = None
    """Encoder output rows kept; four times `max_num_encoder_rows` by default; 0 keeps only what is in use."""

    max_num_seqs: NumSeqs = 64
    """Requests that run at once."""
    max_num_batched_tokens: Count | None = None
    """Decoder rows in one step."""
    max_num_encoder_rows: EncoderRows = 4096
    """Encoder output rows computed in one step."""
    enable_chunked_prefill: bool = True
    """Spread long prompts over steps."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """"fcfs" (first come, first served) or "priority"."""
    max_token_gap_s: TokenGap = 0.25
    """While requests stream, keep their tokens at most about this far apart, in seconds."""
    max_waiting_requests: WaitingBound | None = None
    """Refuse requests while so many wait."""
    max_steps_in_flight: StepsInFlight | None = None
    """Steps submitted before the results of the first are in; 2 on CUDA, where the host plans one while the device runs
    another, 1 on a CPU."""
    enforce_eager: bool = False
    """On CUDA, run every step call by call, without recording graphs."""
    max_grammar_compile_s: CompileTime = 5.0
    """Refuse structured outputs whose grammar takes longer than this to compile, in seconds."""

    limit_mm_per_prompt: Limits = field(default_factory=dict)
    """Most items of each modality in one prompt; 1 for a modality not named."""
    mm_processor_kwargs: Mapping[str, Any] | None = None
    """Arguments for the model's input processor and mappers, unless a request brings its own."""
    mm_processor_backend: ProcessorBackend = "auto"
    """"pil" or "torchvision" for Hugging Face's image processors, whose pixels differ in rounding; "auto": PIL, or
    torchvision for those that have no other."""
    mm_split: MMSplit = "auto"
    """"off" never splits media of a forward-only model from its text; "auto" does where that is equal."""
    preprocess_threads: NumThreads | None = None
    """Threads that map media beside the engine's own; half as many as there are cores by default, 2 to 8."""
    allowed_local_media_path: Name | None = None
    """Folder from which requests may name files."""

    pooling_type: PoolingType | None = None
    """"last", "mean" or "cls" for `encode`; the model's own, or "last"."""
    generation_config: GenerationConfig = "auto"
    """"auto" takes the sampling values of the checkpoint's generation_config.json for requests that leave them out,
    "none" doesn't. The tokens that end an answer count either way."""
    chat_template: Name | None = None
    """A chat template, or the path of a file with one, instead of the checkpoint's."""
    tool_parser: ToolParser = "auto"
    """How the model writes calls of functions; "auto" goes by the chat template."""
    reasoning_parser: ReasoningParser = "auto"
    """How the model marks its reasoning; "auto" goes by the chat template."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def num_preprocess_threads(self) -> int:
        """`preprocess_threads`, or its default on this machine."""
        if self.preprocess_threads is not None:
            return self.preprocess_threads
        return min(max((os.cpu_count() or 1) // 2, 2), 8)

    def check_files(self) -> None:
        """Return if settings go together and files that they name can be used, as far as can be said without the model.

        Raises:
            ConfigError: One can't.
        """
        self._check_together()
        local_path("model", self.model)
        if self.tokenizer is not None:
            local_path("tokenizer", self.tokenizer)
        if self.chat_template is not None:
            check_template(read_template(self.chat_template))
        check_plugins(self.plugins)

    def create_engine_config(self) -> EngineConfig:
        """Resolve everything that can be known before the weights are read.

        Raises:
            ConfigError: A setting can't be used.
            ModelError: The architecture is unknown, or its class can't be served.
        """
        self.check_files()
        with LOADING:
            return self._resolve()

    def _resolve(self) -> EngineConfig:
        from sensorium.model_executor.layers.quantization import check_quantization, resolve_quantization

        load_general_plugins()
        load_plugins(self.plugins)
        device = resolve_device(self.device)
        cache = CacheConfig(
            block_size=DEFAULT_BLOCK_SIZE if self.block_size is None else self.block_size,
            num_blocks=self.num_blocks,
            kv_cache_bytes=self.kv_cache_bytes,
            memory_fraction=self.memory_fraction,
            enable_prefix_caching=self.enable_prefix_caching,
            mm_processor_cache_bytes=self.mm_processor_cache_bytes,
            encoder_cache_rows=(
                4 * self.max_num_encoder_rows if self.encoder_cache_rows is None else self.encoder_cache_rows
            ),
        )
        scheduler = SchedulerConfig(
            max_num_batched_tokens=self._max_num_batched_tokens(device),
            max_num_seqs=self.max_num_seqs,
            max_num_encoder_rows=self.max_num_encoder_rows,
            enable_chunked_prefill=self.enable_chunked_prefill,
            policy=self.scheduling_policy,
            max_token_gap_s=self.max_token_gap_s,
            max_waiting_requests=self.max_waiting_requests,
            max_steps_in_flight=(
                default_steps_in_flight(device) if self.max_steps_in_flight is None else self.max_steps_in_flight
            ),
            max_grammar_compile_s=self.max_grammar_compile_s,
        )
        parallel = ParallelConfig(tensor_parallel_size=self.tensor_parallel_size)
        device_type = device.partition(":")[0]
        check_quantization(self.quantization, device_type)
        path = resolve_model_path(self.model, self.revision)
        checkpoint = load_hf_config(path, self.trust_remote_code, self.code_revision, self.hf_overrides)
        quant_config = resolve_quantization(self.quantization, checkpoint.hf_config, device_type)
        return EngineConfig(
            model_config=self._model_config(path, checkpoint),
            cache_config=cache,
            scheduler_config=scheduler,
            device_config=DeviceConfig(device=device, num_threads=self.num_threads, enforce_eager=self.enforce_eager),
            load_config=LoadConfig(load_format=self.load_format),
            parallel_config=parallel,
            quant_config=quant_config,
        )

    def _check_together(self) -> None:
        """Raise `ConfigError` for settings of which one would have no effect beside another."""
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ConfigError(
                f"kv_cache_bytes: got {self.kv_cache_bytes} beside num_blocks, expected one of them. Leave one out."
            )
        if self.code_revision is not None and not self.trust_remote_code:
            raise ConfigError(
                f"code_revision: got {self.code_revision!r} without trust_remote_code, expected None. Code of a "
                "checkpoint is only run with trust_remote_code."
            )
        if self.revision is not None and Path(self.model).is_dir():
            raise ConfigError(
                f"revision: got {self.revision!r} for a directory, expected None. A directory has no revisions; give "
                "the model's name on the hub, or leave revision out."
            )
        for name in ("tokenizer", "chat_template"):
            if self.skip_tokenizer_init and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}: got a value beside skip_tokenizer_init, expected None. Leave one of them out."
                )

    def _max_num_batched_tokens(self, device: str) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return 2048 if device == "cpu" else 8192

    def _model_config(self, path: Path, config: CheckpointConfig) -> ModelConfig:
        from sensorium.model_executor.models.interfaces import check_supports_multimodal, supports_multimodal
        from sensorium.model_executor.models.registry import ModelRegistry
        from sensorium.multimodal import MULTIMODAL_REGISTRY

        model_class, architecture = ModelRegistry.resolve(
            config.architectures, self.model_impl, is_remote=self._brings_modules(config.hf_config)
        )
        hf_config = config_of_part(config.hf_config, getattr(model_class, "config_part", None))
        check_values(hf_config)
        check_supports_multimodal(model_class)
        is_multimodal = supports_multimodal(model_class)
        if not is_multimodal:
            self._refuse_media_settings(architecture)
        tokenizer = path if self.tokenizer is None else resolve_model_path(self.tokenizer, None, "tokenizer")
        if not self.skip_tokenizer_init:
            check_tokenizer_names(tokenizer)
        generation = read_json(path / FILE_NAME)
        model_config = ModelConfig(
            model=str(path),
            tokenizer=str(tokenizer),
            hf_config=hf_config,
            dtype_name=resolve_dtype(self.dtype, config, hf_config, None if self.load_format == "dummy" else path),
            max_model_len=resolve_max_model_len(self.max_model_len, hf_config),
            model_class=model_class,
            architecture=architecture,
            tokenizer_mode=self.tokenizer_mode,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            code_revision=self.code_revision,
            seed=self.seed,
            rope_scaling=getattr(hf_config.get_text_config(), "rope_scaling", None),
            hf_image_processor_config=read_json(path / "preprocessor_config.json"),
            mm_processor_kwargs=self.mm_processor_kwargs,
            multimodal_config=MultiModalConfig(dict(self.limit_mm_per_prompt)) if is_multimodal else None,
            pooler_config=None if self.pooling_type is None else PoolerConfig(pooling_type=self.pooling_type),
            sampling_defaults=read_defaults(generation if self.generation_config == "auto" else {}),
            end_token_ids=read_end_ids(generation, FILE_NAME) | written_end_ids(config.written, hf_config),
            mm_processor_backend=self.mm_processor_backend,
            mm_split=self.mm_split,
            model_impl=self.model_impl,
            load_check=self.load_check,
        )
        MULTIMODAL_REGISTRY.check_mappers(model_config)
        return model_config

    def _brings_modules(self, hf_config: Any) -> bool:
        """Whether modules of a model of text come with the checkpoint, and may be run."""
        return self.trust_remote_code and "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})

    def _refuse_media_settings(self, architecture: str) -> None:
        """Raise `ConfigError` for a setting that has no effect on a model of text."""
        if self.limit_mm_per_prompt:
            raise ConfigError(
                f"limit_mm_per_prompt: got limits for {architecture}, which takes text only, expected none. "
                "limit_mm_per_prompt is only supported for multimodal models."
            )
        if self.mm_processor_kwargs:
            raise ConfigError(
                f"mm_processor_kwargs: got {dict(self.mm_processor_kwargs)!r:.120} for {architecture}, which takes "
                "text only, expected None. Leave mm_processor_kwargs out."
            )


def default_steps_in_flight(device: str) -> int:
    """Two where the device works beside the host; on a CPU a second step would only wait for its turn."""
    return 1 if device == "cpu" else 2


def resolve_device(device: str) -> str:
    """The device to run on; "auto" is a GPU if torch sees one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit())):
        raise wrong_setting("device", device, "'auto', 'cpu', 'cuda' or 'cuda:' and an index")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= num_devices:
        raise ConfigError(
            f"device: got {device!r}, expected one of the {num_devices} GPUs that torch can use here. "
            "Set device (--device) to 'cpu' or another index."
        )
    return f"cuda:{int(index)}" if colon else device


def local_path(setting: str, name: str) -> Path | None:
    """The directory that `model` or `tokenizer` names; None for a name on the model hub.

    Raises:
        ConfigError: It is the path of no directory, or no model lies there.
    """
    if name == DEMO_MODEL and not Path(name).is_dir():
        bundled = Path(__file__).parent.parent / "demo_model"
        if not (bundled / "config.json").is_file():
            raise ConfigError(
                f"{setting}: got 'demo', but this build has no bundled model. Give a checkpoint's directory."
            )
        return bundled
    path = Path(name).expanduser()
    if path.is_dir():
        if setting == "model" and not (path / "config.json").is_file():
            raise ConfigError(f"model: got {name!r}, a directory without config.json. Give a checkpoint's directory.")
        return path
    if path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2:  # no name of the hub's
        raise ConfigError(
            f"{setting}: got {name!r}, expected a directory or a name on the model hub. Check the spelling, and that "
            "the directory exists."
        )
    return None


def resolve_model_path(model: str, revision: str | None, setting: str = "model") -> Path:
    """The directory of a checkpoint or a tokenizer; a hub name is downloaded first."""
    path = local_path(setting, model)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(
            f"{setting}: got {model!r}, expected a directory or a name on the model hub ({type(error).__name__}). "
            "Check the spelling, the network, and that the directory exists."
        ) from error
