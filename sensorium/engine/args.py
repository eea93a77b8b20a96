"""Flat settings as users give them: plain values, checked field by field without I/O.

Fields are typed and documented one by one, so that command-line flags are generated from them. `resolution.py` resolves
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from sensorium.config import (
    Amount,
    AttentionBackendName,
    BlockSize,
    BytesOrNone,
    CompileTime,
    Convert,
    Count,
    Dtype,
    EncoderRows,
    EngineConfig,
    Fraction,
    GenerationConfig,
    KVCacheDtype,
    Limits,
    LoadCheck,
    LoadFormat,
    MMEncoderTPMode,
    MMSplit,
    ModelImpl,
    NumBytes,
    NumRanks,
    NumSeqs,
    NumThreads,
    PoolingType,
    ProcessorBackend,
    ReasoningParser,
    Runner,
    SchedulingPolicy,
    StepsInFlight,
    TokenGap,
    TokenizerMode,
    ToolParser,
    WaitingBound,
)
from sensorium.settings import Bounds, FileName, check_settings

Name: TypeAlias = Annotated[str, FileName()]


@dataclass(frozen=True)
class EngineArgs:
    """Settings of an engine. Only `model` is needed."""

    model: Name
    """A directory with a Hugging Face checkpoint, a name on the model hub, or "demo" for the bundled model."""
    tokenizer: Name | None = None
    """Directory or hub name of the tokenizer, if it isn't the model's."""
    tokenizer_mode: TokenizerMode = "auto"
    """Which tokenizer of the checkpoint to take; only "auto", since each checkpoint has one."""
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
    """Seed of requests that have none."""
    load_format: LoadFormat = "safetensors"
    """"safetensors", or "dummy" for seeded random weights."""
    quantization: Name | None = None
    """How linear layers hold their weights, if not in the model's dtype: "int8" (made at load, CPU only), "fp8"
    (made at load), or what a plug-in registered. A checkpoint that is quantized says so itself."""
    model_impl: ModelImpl = "auto"
    """Whose modules run: "native" for a class that is registered here, "transformers" for Hugging Face's own, "auto"
    for a registered class where there is one."""
    load_check: LoadCheck = "auto"
    """"auto" compares modules of transformers with their untouched selves at load, which takes seconds at most; "off"
    trusts that they fit."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values that replace those of the checkpoint's config."""
    enable_lora: bool = False
    """Serve the adapters that `lora_modules` names beside the model."""
    lora_modules: Mapping[str, Name] = field(default_factory=dict)
    """Low-rank adapters that requests may choose by name: for each its folder, as PEFT saved it, or its name on the
    hub."""
    max_loras: Count | None = None
    """Adapters that requests running at once may have; all by default."""
    max_lora_rank: Count | None = None
    """Largest rank that an adapter may have; 16 by default."""
    plugins: tuple[Name, ...] = field(default=(), metadata={"flag": "plugin"})
    """A Python file, or a module, that registers models; imported by every process of the engine. May be repeated."""

    device: Name = "auto"
    """"auto" (a GPU if there is one), "cpu", or "cuda" with an optional index, such as "cuda:1"."""
    num_threads: NumThreads | None = None
    """Threads of CPU kernels; torch's default if not given."""
    tensor_parallel_size: NumRanks = 1
    """Ranks that share the model, each a process with its share of the weights: on CPUs with its share of the cores, on
    GPUs with one of its own, from `device` on."""
    mm_encoder_tp_mode: MMEncoderTPMode = "data"
    """With several ranks: "data" lets each encode some of a step's pictures, clips and sounds, whole; "weights" divides
    the layers of encoders over ranks, which takes less memory and is slower for small ones."""
    enable_expert_parallel: bool = False
    """With several ranks: of a mixture of experts, give each rank some experts whole, instead of a share of each."""

    block_size: BlockSize | None = None
    """Tokens in a KV block."""
    num_blocks: Count | None = None
    """KV blocks of layers that keep everything, instead of a size in bytes; layers with a window get as many, or fewer
    where more would be of no use."""
    kv_cache_bytes: NumBytes | None = None
    """Memory for the KV cache of all layers, states included; decided from what is free by default."""
    kv_cache_dtype: Literal["fp8", KVCacheDtype] = "auto"
    """What keys and values are cached in: "fp8_e4m3", for which "fp8" is another word, or "fp8_e5m2", 8 bits each;
    "auto" for the model's dtype, or for what a quantized checkpoint says."""
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
    max_num_encoder_rows: EncoderRows | None = None
    """Encoder output rows computed in one step; by default what `max_num_batched_tokens` has room for, and at least
    4096."""
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
    speculative_config: Mapping[str, Any] | None = None
    """Guess next tokens and check several in one step, such as {"method": "ngram", "num_speculative_tokens": 4,
    "prompt_lookup_max": 4, "prompt_lookup_min": 2}, which goes by what stood before in prompt and output."""
    enforce_eager: bool = False
    """On CUDA, run every step call by call, without recording graphs."""
    attention_backend: AttentionBackendName | None = None
    """Run all attention by "native_cpu", "triton", "torch_sdpa" or "torch_reference"; by default each layer takes the
    fastest that can run it. A layer that can't be run as asked for is an error at load."""
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

    runner: Runner = "auto"
    """What the model is served for: "generate", or "pooling" for vectors, scores and labels; "auto" goes by the
    checkpoint. A model that generates embeds too."""
    convert: Convert = "auto"
    """What a model that generates is made into for pooling: "embed" for vectors, or "classify" for scores from the
    logits of the tokens that `classifier_from_token` names in `hf_overrides`."""
    pooling_type: PoolingType | None = None
    """Which hidden states become a vector: "last" or "cls" (the first), "mean", "max", "mean_sqrt_len" or
    "weighted_mean"; the checkpoint's own by default, else "last" for a model that reads from left to right and "mean"
    for others."""
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

    def create_engine_config(self) -> EngineConfig:
        """Resolve the settings for this machine and checkpoint; see `resolution.resolve`."""
        from sensorium.engine.resolution import resolve

        return resolve(self)
