"""Resolves settings to an `EngineConfig`: all that depends on the disk, the machine or the checkpoint.

Every "auto" is decided here or at load, and logged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.chat.template import check_template, read_template
from sensorium.checkpoint import check_tokenizer_names, read_json
from sensorium.config import (
    DEFAULT_LORA_RANK,
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    KVCacheDtype,
    LoadConfig,
    LoRAConfig,
    ModelConfig,
    MultiModalConfig,
    ParallelConfig,
    PoolerConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from sensorium.engine.args import EngineArgs
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
from sensorium.engine.pooling import PoolingChoice, pooling_choice, trained_length
from sensorium.errors import ConfigError
from sensorium.logger import get_logger
from sensorium.lora import read_adapter
from sensorium.plugins import check_plugins, load_general_plugins, load_plugins, style_of
from sensorium.sampling_defaults import FILE_NAME, read_defaults, read_end_ids
from sensorium.settings import wrong_setting

if TYPE_CHECKING:
    from sensorium.model_executor.layers.quantization import QuantizationConfig

logger = get_logger(__name__)

_FEWEST_ENCODER_ROWS = 4096
"""A step has room for a few large pictures, however few tokens it has room for."""

DEFAULT_BLOCK_SIZE = 16
DEMO_MODEL = "demo"
"""The name of the model that comes with the package."""


def num_preprocess_threads(args: EngineArgs) -> int:
    """`preprocess_threads`, or its default on this machine."""
    if args.preprocess_threads is not None:
        return args.preprocess_threads
    return min(max((os.cpu_count() or 1) // 2, 2), 8)


def check_files(args: EngineArgs) -> None:
    """Return if the settings are compatible and the files that they name can be used, as far as can be told without the
    model.

    Raises:
        ConfigError: One can't.
    """
    _check_together(args)
    _speculative_config(args)
    local_path("model", args.model)
    if args.tokenizer is not None:
        local_path("tokenizer", args.tokenizer)
    if args.chat_template is not None:
        check_template(read_template(args.chat_template))
    check_plugins(args.plugins)
    for name, path in args.lora_modules.items():
        folder = local_path(_adapter_setting(name), path)
        if folder is not None:
            read_adapter(name, folder, _max_lora_rank(args))


def resolve(args: EngineArgs) -> EngineConfig:
    """Resolve everything that can be known before the weights are read.

    Raises:
        ConfigError: A setting can't be used.
        ModelError: The architecture is unknown, or its class can't be served.
    """
    check_files(args)
    with LOADING:
        return _resolve(args)


def _resolve(args: EngineArgs) -> EngineConfig:
    from sensorium.model_executor.layers.quantization import check_quantization, resolve_quantization

    load_general_plugins()
    load_plugins(args.plugins)
    device = resolve_device(args.device)
    device_type = device.partition(":")[0]
    check_quantization(args.quantization, device_type)
    path = resolve_model_path(args.model, args.revision)
    checkpoint = load_hf_config(path, args.trust_remote_code, args.code_revision, args.hf_overrides)
    quant_config = resolve_quantization(args.quantization, checkpoint.hf_config, device_type)
    cache = CacheConfig(
        block_size=DEFAULT_BLOCK_SIZE if args.block_size is None else args.block_size,
        num_blocks=args.num_blocks,
        kv_cache_bytes=args.kv_cache_bytes,
        cache_dtype=_cache_dtype(args, quant_config),
        memory_fraction=args.memory_fraction,
        enable_prefix_caching=args.enable_prefix_caching,
        mm_processor_cache_bytes=args.mm_processor_cache_bytes,
        encoder_cache_rows=(
            4 * _max_num_encoder_rows(args, device) if args.encoder_cache_rows is None else args.encoder_cache_rows
        ),
    )
    scheduler = SchedulerConfig(
        max_num_batched_tokens=_max_num_batched_tokens(args, device),
        max_num_seqs=args.max_num_seqs,
        max_num_encoder_rows=_max_num_encoder_rows(args, device),
        enable_chunked_prefill=args.enable_chunked_prefill,
        policy=args.scheduling_policy,
        max_token_gap_s=args.max_token_gap_s,
        max_waiting_requests=args.max_waiting_requests,
        max_steps_in_flight=(
            default_steps_in_flight(device) if args.max_steps_in_flight is None else args.max_steps_in_flight
        ),
        max_grammar_compile_s=args.max_grammar_compile_s,
    )
    parallel = _parallel_config(args, device)
    lora_config = _lora_config(args)
    return EngineConfig(
        model_config=_model_config(args, path, checkpoint),
        cache_config=cache,
        scheduler_config=scheduler,
        device_config=DeviceConfig(
            device=device,
            num_threads=_num_threads(args),
            enforce_eager=args.enforce_eager,
            attention_backend=args.attention_backend,
        ),
        load_config=LoadConfig(load_format=args.load_format),
        parallel_config=parallel,
        quant_config=quant_config,
        lora_config=lora_config,
        speculative_config=_speculative_config(args),
        engine_args=args,
    )


def _cache_dtype(args: EngineArgs, quant_config: QuantizationConfig | None) -> KVCacheDtype:
    """What keys and values are held in, by the setting or else by the checkpoint."""
    if args.kv_cache_dtype == "fp8":
        return "fp8_e4m3"
    if args.kv_cache_dtype == "auto" and quant_config is not None:
        return quant_config.kv_cache_dtype
    return args.kv_cache_dtype


def _parallel_config(args: EngineArgs, device: str) -> ParallelConfig:
    if args.tensor_parallel_size > 1 and device != "cpu":
        _check_gpus(args.tensor_parallel_size, int(device.partition(":")[2] or 0))
    return ParallelConfig(
        tensor_parallel_size=args.tensor_parallel_size,
        mm_encoder_tp_mode=args.mm_encoder_tp_mode,
        enable_expert_parallel=args.enable_expert_parallel,
    )


def _check_gpus(num_ranks: int, first: int) -> None:
    """Raise `ConfigError` if there isn't a GPU for each rank."""
    import torch

    num_here = torch.cuda.device_count() - first
    if num_ranks > num_here:
        raise ConfigError(
            f"tensor_parallel_size: got {num_ranks} with {num_here} GPUs from cuda:{first} on, expected at most "
            f"{num_here}: each rank needs one of its own. Lower tensor_parallel_size, or set device to 'cpu'."
        )


def _lora_config(args: EngineArgs) -> LoRAConfig | None:
    """The adapters to serve. Raises `ConfigError` for one that can't be."""
    if not args.enable_lora:
        return None
    folders = {name: resolve_model_path(path, None, _adapter_setting(name)) for name, path in args.lora_modules.items()}
    for name, folder in folders.items():
        read_adapter(name, folder, _max_lora_rank(args))
    modules = {name: str(folder) for name, folder in folders.items()}
    return LoRAConfig(modules, _max_lora_rank(args), args.max_loras)


def _adapter_setting(name: str) -> str:
    return f"lora_modules[{name!r}]"


def _max_lora_rank(args: EngineArgs) -> int:
    return DEFAULT_LORA_RANK if args.max_lora_rank is None else args.max_lora_rank


def _speculative_config(args: EngineArgs) -> SpeculativeConfig | None:
    return None if args.speculative_config is None else SpeculativeConfig.of(args.speculative_config)


def _num_threads(args: EngineArgs) -> int | None:
    """Threads of each rank: those that were asked for, else a share of the cores; None: torch's default."""
    if args.num_threads is not None or args.tensor_parallel_size == 1:
        return args.num_threads
    return max((os.cpu_count() or 1) // args.tensor_parallel_size, 1)


def _check_together(args: EngineArgs) -> None:
    """Raise `ConfigError` for a setting that would have no effect beside another."""
    if args.num_blocks is not None and args.kv_cache_bytes is not None:
        raise ConfigError(
            f"kv_cache_bytes: got {args.kv_cache_bytes} beside num_blocks, expected one of them. Leave one out."
        )
    if args.code_revision is not None and not args.trust_remote_code:
        raise ConfigError(
            f"code_revision: got {args.code_revision!r} without trust_remote_code, expected None. Code of a "
            "checkpoint is only run with trust_remote_code."
        )
    if args.revision is not None and Path(args.model).is_dir():
        raise ConfigError(
            f"revision: got {args.revision!r} for a directory, expected None. A directory has no revisions; give "
            "the model's name on the hub, or leave revision out."
        )
    given = {"lora_modules": dict(args.lora_modules), "max_loras": args.max_loras, "max_lora_rank": args.max_lora_rank}
    for name, value in given.items():
        if value and not args.enable_lora:
            raise ConfigError(
                f"{name}: got {value!r:.120} without enable_lora, expected none. Set enable_lora (--enable-lora), or "
                f"leave {name} out."
            )
    if args.enable_lora and not args.lora_modules:
        raise ConfigError(
            "enable_lora: got true without lora_modules, expected adapters to load with the model. Name them in "
            "lora_modules (--lora-modules name=folder)."
        )
    for name in ("tokenizer", "chat_template"):
        if args.skip_tokenizer_init and getattr(args, name) is not None:
            raise ConfigError(f"{name}: got a value beside skip_tokenizer_init, expected None. Leave one of them out.")


def _max_num_encoder_rows(args: EngineArgs, device: str) -> int:
    """As many as the decoder takes in: with fewer, its steps are filled by the few pictures that get their rows."""
    if args.max_num_encoder_rows is not None:
        return args.max_num_encoder_rows
    return max(_FEWEST_ENCODER_ROWS, _max_num_batched_tokens(args, device))


def _max_num_batched_tokens(args: EngineArgs, device: str) -> int:
    if args.max_num_batched_tokens is not None:
        return args.max_num_batched_tokens
    return 2048 if device == "cpu" else 8192


def _model_config(args: EngineArgs, path: Path, config: CheckpointConfig) -> ModelConfig:
    from sensorium.model_executor.models.interfaces import check_supports_multimodal, supports_multimodal
    from sensorium.model_executor.models.registry import ModelRegistry
    from sensorium.multimodal import MULTIMODAL_REGISTRY

    is_remote = _brings_modules(args, config.hf_config)
    pooling = pooling_choice(args, path, config, ModelRegistry.generating(config.architectures, is_remote=is_remote))
    if pooling is None:
        model_class, architecture = ModelRegistry.resolve(
            config.architectures, args.model_impl, is_remote=is_remote, hf_config=config.hf_config
        )
    else:
        model_class, architecture = ModelRegistry.resolve_pooling(
            config.architectures, args.model_impl, pooling.pooler, config.hf_config, is_remote=is_remote
        )
    hf_config = config_of_part(config.hf_config, getattr(model_class, "config_part", None))
    if (style := style_of(model_class)) is not None:
        style.adapt_hf_config(hf_config, model_class, architecture)
    check_values(hf_config)
    if hasattr(model_class, "for_checkpoint"):
        model_class = model_class.for_checkpoint(
            str(path), hf_config, trust_remote_code=args.trust_remote_code, revision=args.revision
        )
    check_supports_multimodal(model_class)
    is_multimodal = supports_multimodal(model_class)
    if not is_multimodal:
        _refuse_media_settings(args, architecture)
    tokenizer = path if args.tokenizer is None else resolve_model_path(args.tokenizer, None, "tokenizer")
    if not args.skip_tokenizer_init:
        check_tokenizer_names(tokenizer)
    generation = read_json(path / FILE_NAME)
    model_config = ModelConfig(
        model=str(path),
        tokenizer=str(tokenizer),
        hf_config=hf_config,
        dtype_name=resolve_dtype(args.dtype, config, hf_config, None if args.load_format == "dummy" else path),
        max_model_len=resolve_max_model_len(
            args.max_model_len, hf_config, None if pooling is None else trained_length(path)
        ),
        model_class=model_class,
        architecture=architecture,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        code_revision=args.code_revision,
        seed=args.seed,
        rope_scaling=getattr(hf_config.get_text_config(), "rope_scaling", None),
        hf_image_processor_config=read_json(path / "preprocessor_config.json"),
        mm_processor_kwargs=args.mm_processor_kwargs,
        multimodal_config=MultiModalConfig(dict(args.limit_mm_per_prompt)) if is_multimodal else None,
        runner="generate" if pooling is None else "pooling",
        pooler_config=_pooler_config(args, config, pooling),
        sampling_defaults=read_defaults(generation if args.generation_config == "auto" else {}),
        end_token_ids=read_end_ids(generation, FILE_NAME) | written_end_ids(config.written, hf_config),
        mm_processor_backend=args.mm_processor_backend,
        mm_split=args.mm_split,
        model_impl=args.model_impl,
        load_check=args.load_check,
    )
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(model_config)
    MULTIMODAL_REGISTRY.check_mappers(model_config)
    return model_config


def _pooler_config(args: EngineArgs, config: CheckpointConfig, pooling: PoolingChoice | None) -> PoolerConfig:
    """How vectors are made; of a model that generates, its last row unless the settings say otherwise."""
    if pooling is not None:
        return pooling.pooler
    is_matryoshka = config.written.get("is_matryoshka") is True
    return PoolerConfig(pooling_type=args.pooling_type or "last", is_matryoshka=is_matryoshka)


def _brings_modules(args: EngineArgs, hf_config: Any) -> bool:
    """Whether modules of a model of text come with the checkpoint, and may be run."""
    auto_map = getattr(hf_config, "auto_map", None) or {}
    return args.trust_remote_code and "AutoModelForCausalLM" in auto_map


def _refuse_media_settings(args: EngineArgs, architecture: str) -> None:
    """Raise `ConfigError` for a setting that has no effect on a model of text."""
    if args.limit_mm_per_prompt:
        raise ConfigError(
            f"limit_mm_per_prompt: got limits for {architecture}, which takes text only, expected none. "
            "limit_mm_per_prompt is only supported for multimodal models."
        )
    if args.mm_processor_kwargs:
        raise ConfigError(
            f"mm_processor_kwargs: got {dict(args.mm_processor_kwargs)!r:.120} for {architecture}, which takes "
            "text only, expected None. Leave mm_processor_kwargs out."
        )


def default_steps_in_flight(device: str) -> int:
    """Two where the device works beside the host; on a CPU a second step would only wait."""
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
    if path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2:  # not a hub name
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
