"""The resolved configuration: what every room reads and none changes.

`EngineArgs` (flat, user-facing, in `sensorium.engine.args`) is resolved once into a frozen `EngineConfig`: every "auto"
is made concrete there. Nothing here imports torch or transformers; `ModelConfig` holds a Hugging Face config as an
opaque object and a dtype by name.

The attribute names of `ModelConfig` and `EngineConfig` are those that model classes read through `InputContext` and
`vllm_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from sensorium.distributed import ONE_RANK, Division, TensorParallel
from sensorium.errors import ConfigError, ModelError
from sensorium.pooling_params import PoolingTask
from sensorium.sampling_defaults import SamplingDefaults
from sensorium.settings import MAX_BYTES, Bounds, FileName, check_setting, check_settings, wrong_setting

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from sensorium.engine.args import EngineArgs
    from sensorium.model_executor.layers.quantization import QuantizationConfig

# What settings may be. Flat settings (`EngineArgs`) and the resolved ones below share these.

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
KVCacheDtype: TypeAlias = Literal["auto", "fp8_e4m3", "fp8_e5m2"]
"""What cached keys and values are held in; "auto": the model's dtype."""
AttentionBackendName: TypeAlias = Literal["native_cpu", "triton", "torch_sdpa", "torch_reference"]
LoadFormat: TypeAlias = Literal["safetensors", "dummy"]
TokenizerMode: TypeAlias = Literal["auto"]
"""There is one tokenizer of each kind: that written in Python, "slow", left transformers with its version 5."""
SchedulingPolicy: TypeAlias = Literal["fcfs", "priority"]
MMSplit: TypeAlias = Literal["auto", "off"]
MMEncoderTPMode: TypeAlias = Literal["data", "weights"]
ModelImpl: TypeAlias = Literal["auto", "native", "transformers"]
"""Whose modules run: a class that is registered here, Hugging Face's own, or the former where there is one."""
LoadCheck: TypeAlias = Literal["auto", "off"]
ProcessorBackend: TypeAlias = Literal["auto", "pil", "torchvision"]
PoolingType: TypeAlias = Literal["last", "mean", "cls", "max", "mean_sqrt_len", "weighted_mean"]
"""How a request's rows become one: its last or first ("cls") row, their mean, their largest values, their sum over the
root of their number, or their mean weighted by position, 1 at the first."""
Runner: TypeAlias = Literal["auto", "generate", "pooling"]
"""What a model is served for."""
Convert: TypeAlias = Literal["auto", "embed", "classify"]
"""What a model that generates is made into when it is served for pooling."""
Activation: TypeAlias = Literal["none", "sigmoid", "softmax"]
ToolParser: TypeAlias = Literal["auto", "none", "qwen3_coder", "glm", "hermes", "mistral", "llama3", "json"]
"""How calls of functions are written: names of `sensorium.parsing.FORMATS`, none, or as the chat template shows."""
SpeculativeMethod: TypeAlias = Literal["ngram"]
"""Where guesses of next tokens come from: from what followed the same tokens before, in prompt and output."""
ReasoningParser: TypeAlias = Literal["auto", "none", "seed", "mistral", "think"]
"""The same for reasoning, of `sensorium.parsing.REASONING_FORMATS`."""
Count: TypeAlias = Annotated[int, Bounds(1)]
Amount: TypeAlias = Annotated[int, Bounds(0)]
"""A count of what there may also be none of."""
NumBytes: TypeAlias = Annotated[int, Bounds(1, MAX_BYTES)]
GenerationConfig: TypeAlias = Literal["auto", "none"]
BytesOrNone: TypeAlias = Annotated[int, Bounds(0, MAX_BYTES)]
"""A bound on bytes, where 0 turns off what they are for."""
BlockSize: TypeAlias = Annotated[int, Bounds(1, 1 << 16)]
Fraction: TypeAlias = Annotated[float, Bounds(0, 1, above=True)]
NumThreads: TypeAlias = Annotated[int, Bounds(1, 4096)]
TokenGap: TypeAlias = Annotated[float, Bounds(0, float("inf"), above=True)]
CompileTime: TypeAlias = Annotated[float, Bounds(0, 3600, above=True)]
NumSeqs: TypeAlias = Annotated[int, Bounds(1, 1 << 16)]
EncoderRows: TypeAlias = Annotated[int, Bounds(1, 1 << 28)]
WaitingBound: TypeAlias = Annotated[int, Bounds(1, MAX_BYTES)]
NumRanks: TypeAlias = Annotated[int, Bounds(1, 1024)]
StepsInFlight: TypeAlias = Annotated[int, Bounds(1, 16)]
MAX_DRAFTS = 64
"""Most guesses of a request in one step."""
NumDrafts: TypeAlias = Annotated[int, Bounds(1, MAX_DRAFTS)]
NgramLength: TypeAlias = Annotated[int, Bounds(1, 64)]
Limits: TypeAlias = Mapping[str, Amount]
DEFAULT_LORA_RANK = 16
"""`max_lora_rank`, unless set."""
FilePath: TypeAlias = Annotated[str, FileName()]


@dataclass(frozen=True, slots=True)
class MultiModalConfig:
    """Limits of media. `limit_per_prompt`: most items of a modality in one prompt; a modality not named has 1."""

    limit_per_prompt: Limits = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_setting("limit_mm_per_prompt", self.limit_per_prompt, Limits)


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """What a model makes of hidden states, and how; mostly read from the checkpoint."""

    pooling_type: PoolingType = "last"
    normalize: bool = True
    """Whether vectors are brought to length 1."""
    tasks: tuple[PoolingTask, ...] = ("embed", "token_embed")
    size: int | None = None
    """Numbers of a vector; None: the model's hidden size."""
    projections: tuple[str, ...] = ()
    """Folders of the checkpoint with a linear layer each, which vectors go through before they are brought to length 1
    (the Dense modules of sentence-transformers)."""
    is_matryoshka: bool = False
    """Whether the leading numbers of a vector are a vector, so that requests may ask for fewer (`dimensions`)."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """How many they may ask for; empty: any number."""
    labels: tuple[str, ...] = ()
    activation: Activation = "none"
    """What makes probabilities of the scores of labels."""
    token_ids: tuple[int, ...] = ()
    """Ids whose logits behind the prompt are a label's score each, for a model that generates; of two, "no" and "yes",
    the score is that of the second over the first."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """By name, texts to put in front of what is embedded."""
    default_prompt: str | None = None
    """The name of the one that is put in front where none is asked for."""

    def __post_init__(self) -> None:
        check_settings(self)

    def line(self) -> str:
        """For the load report."""
        if self.labels:
            kind = "scores" if self.activation == "none" else self.activation
            return f"{self.tasks[0]}, {len(self.labels)} label{'s' * (len(self.labels) > 1)}, {kind}"
        dense = f", through {len(self.projections)} linear layers" if self.projections else ""
        rows = f"{self.pooling_type} of rows" if "embed" in self.tasks else "each row"
        return f"{', '.join(self.tasks)}: {rows}{dense}{', length 1' if self.normalize else ''}"


@dataclass(frozen=True)
class ModelConfig:
    """One model: where it lies, its Hugging Face config, its class, and the limits chosen for it."""

    model: str
    """A directory with a Hugging Face checkpoint (hub names are resolved to one before this is built)."""
    tokenizer: str
    hf_config: PretrainedConfig
    dtype_name: str
    """One of `DTYPES`: the type of weights, activations and KV cache."""
    max_model_len: int
    """Most tokens of prompt and output together."""
    model_class: type | None = field(default=None, repr=False)
    """The registered class that serves the checkpoint; registrations of the extension API are looked up by it."""
    architecture: str = ""
    tokenizer_mode: TokenizerMode = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    code_revision: str | None = None
    seed: int = 0
    rope_scaling: Mapping[str, Any] | None = None
    hf_image_processor_config: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] | None = None
    multimodal_config: MultiModalConfig | None = None
    """None for a model that takes text only."""
    runner: Runner = "generate"
    """"generate" or "pooling": which requests are served. A model that generates embeds too."""
    pooler_config: PoolerConfig | None = None
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Sampling values of requests that leave them out, from the checkpoint's `generation_config.json`."""
    end_token_ids: frozenset[int] = frozenset()
    """Ids that end an output, as the files of the checkpoint name them; those of the tokenizer come on top."""
    mm_processor_backend: ProcessorBackend = "auto"
    """What Hugging Face's image processors compute with; "auto": PIL, or torchvision for those that have no other."""
    mm_split: MMSplit = "auto"
    """Whether media of a forward-only model is split from its text (tier 0): "auto" where that is equal, or "off"."""

    model_impl: ModelImpl = "auto"
    """Which kind of class was asked for; `model_class` is the result."""
    load_check: LoadCheck = "auto"
    """Whether modules of transformers are compared with their untouched selves at load."""

    def __post_init__(self) -> None:
        check_setting("model_impl", self.model_impl, ModelImpl)
        check_setting("load_check", self.load_check, LoadCheck)
        check_setting("runner", self.runner, Runner)
        check_setting("dtype", self.dtype_name, Dtype)
        check_setting("max_model_len", self.max_model_len, Count)
        check_setting("mm_split", self.mm_split, MMSplit)
        check_setting("mm_processor_backend", self.mm_processor_backend, ProcessorBackend)
        check_setting("tokenizer_mode", self.tokenizer_mode, TokenizerMode)

    @property
    def dtype(self) -> torch.dtype:
        """The torch type that `dtype_name` names. Loads torch."""
        import torch

        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def hf_text_config(self) -> PretrainedConfig:
        """The part of the Hugging Face config that describes the decoder; the whole for a text model."""
        return self.hf_config.get_text_config()

    @property
    def is_multimodal_model(self) -> bool:
        """Whether the model takes media."""
        return self.multimodal_config is not None

    @property
    def uses_mrope(self) -> bool:
        """Whether positions have three rows: time, height and width (Qwen2-VL's M-RoPE)."""
        return "mrope_section" in rope_parameters(self.hf_text_config)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the output head, or of the embeddings of a model without one. Raises `ModelError`."""
        found = getattr(self.hf_text_config, "vocab_size", None)
        if found is None:
            raise ModelError(
                f"vocab_size in config.json: got none for {self.architecture}, expected the number of token ids. "
                "Models that read characters are not served."
            )
        return int(found)

    @property
    def pooler(self) -> PoolerConfig:
        """How hidden states are pooled; by default the last row, brought to length 1."""
        return self.pooler_config or PoolerConfig()

    @property
    def pools(self) -> bool:
        """Whether the model is served for pooling, and doesn't generate."""
        return self.runner == "pooling"

    def get_multimodal_config(self) -> MultiModalConfig:
        """The media limits. Raises `RuntimeError` for a text model."""
        if self.multimodal_config is None:
            raise RuntimeError("Not a multimodal model: the model class does not implement SupportsMultiModal.")
        return self.multimodal_config


def rope_parameters(text_config: PretrainedConfig) -> Mapping[str, Any]:
    """Rotary settings of a text config, under the name of either generation of Hugging Face configs."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(text_config, name, None)
        if isinstance(parameters, Mapping):
            return parameters
    return {}


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Sizes of the caches. A size in bytes or blocks of None is decided at load from the memory that is left."""

    block_size: BlockSize = 16
    """Tokens in one KV block."""
    num_blocks: Count | None = None
    """KV blocks of layers that keep everything; overrides `kv_cache_bytes`. Layers with a window get as many, or fewer
    where more would be of no use."""
    kv_cache_bytes: NumBytes | None = None
    """Of all layers, states included."""
    cache_dtype: KVCacheDtype = "auto"
    """Of keys and values. States keep their own."""
    memory_fraction: Fraction = 0.9
    """Share of the device's memory that the engine may use in all."""
    enable_prefix_caching: bool = True
    mm_processor_cache_bytes: BytesOrNone = 1 << 30
    """Bound on mapped media kept in the front process; 0 turns the cache off."""
    encoder_cache_rows: Amount | None = None
    """Bound on encoder output rows kept by the worker; None: four times the encoder budget."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Budgets of one step, and the order in which requests get them."""

    max_num_batched_tokens: Count = 2048
    """Decoder rows in one step."""
    max_num_seqs: NumSeqs = 64
    """Requests that run at once."""
    max_num_encoder_rows: EncoderRows = 4096
    """Encoder output rows computed in one step; an item larger than this runs alone."""
    enable_chunked_prefill: bool = True
    policy: SchedulingPolicy = "fcfs"
    """"fcfs" or "priority" (lower value first, then arrival)."""
    max_token_gap_s: TokenGap = 0.25
    """While requests stream, a step's encoding and prefill are sized to keep tokens at most this far apart."""
    max_waiting_requests: WaitingBound | None = None
    """Bound on the waiting queue; None: no bound."""
    max_steps_in_flight: StepsInFlight = 1
    """Steps that may be submitted before the results of the first are in. With 2 the host plans a step while the device
    runs the one before."""
    max_grammar_compile_s: CompileTime = 5.0
    """Most seconds that the grammar of structured outputs may take to compile."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Speculation: guesses of a request's next tokens, its drafts, which one step checks all at once. No output depends
    on them.

    The names are vLLM's. A setting by itself, `speculative_config`: a mapping with these fields.
    """

    method: SpeculativeMethod = "ngram"
    """"ngram": what followed the last tokens where they stood before."""
    num_speculative_tokens: NumDrafts = 4
    """Most drafts of a request in one step."""
    prompt_lookup_max: NgramLength = 4
    """How many of the last tokens are compared with what stood before; more in common is better."""
    prompt_lookup_min: NgramLength | None = None
    """How many of them must be the same for there to be a draft; None: 2, or `prompt_lookup_max` if that is less."""

    def __post_init__(self) -> None:
        check_settings(self, within="speculative_config")
        if self.prompt_lookup_min is not None and self.prompt_lookup_min > self.prompt_lookup_max:
            raise wrong_setting(
                "speculative_config['prompt_lookup_min']",
                self.prompt_lookup_min,
                f"at most prompt_lookup_max ({self.prompt_lookup_max})",
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        """From the setting. Raises `ConfigError`."""
        names = [each.name for each in fields(cls)]
        for name in values:
            if name not in names:
                raise wrong_setting(f"speculative_config[{name!r}]", values[name], f"one of {', '.join(names)}")
        return cls(**values)

    @property
    def least_ngram(self) -> int:
        """`prompt_lookup_min`, or what it is by default."""
        return min(2, self.prompt_lookup_max) if self.prompt_lookup_min is None else self.prompt_lookup_min


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where tensors live: "cpu", or "cuda" with an index."""

    device: str = "cpu"
    num_threads: NumThreads | None = None
    """Threads of CPU kernels; None: torch's default."""
    enforce_eager: bool = False
    """Whether every step runs call by call, without CUDA graphs."""
    attention_backend: AttentionBackendName | None = None
    """What all attention layers run by; None: each by the fastest that can."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def device_type(self) -> str:
        """The device without its index."""
        return self.device.partition(":")[0]

    def of_rank(self, rank: int) -> str:
        """The device of one of the ranks that share a model: of GPUs, this one and those behind it."""
        if self.device_type == "cpu":
            return self.device
        return f"{self.device_type}:{int(self.device.partition(':')[2] or 0) + rank}"


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How weights are read. `load_format`: "safetensors", or "dummy" for seeded random values."""

    load_format: LoadFormat = "safetensors"

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """The low-rank adapters that requests may choose among, and their bounds."""

    modules: Mapping[str, FilePath] = field(default_factory=dict)
    """The folder of each adapter, by its name. Their places, counted from 1, are `EngineRequest.adapter_id`."""
    max_lora_rank: Count = DEFAULT_LORA_RANK
    max_loras: Count | None = None
    """Adapters that requests running at once may have; None: all of them."""
    lora_extra_vocab_size: ClassVar[int] = 0
    """Rows that adapters add to the vocabulary: none. Classes written for V0 read it."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many ranks share one model, and which of them this process is."""

    tensor_parallel_size: NumRanks = 1
    mm_encoder_tp_mode: MMEncoderTPMode = "data"
    enable_expert_parallel: bool = False
    group: TensorParallel = ONE_RANK
    """The ranks' group as this one sees it. Alone, until the executor has brought them together."""

    def __post_init__(self) -> None:
        check_setting("tensor_parallel_size", self.tensor_parallel_size, NumRanks)
        check_setting("mm_encoder_tp_mode", self.mm_encoder_tp_mode, MMEncoderTPMode)
        if self.group.size not in (1, self.tensor_parallel_size):
            raise ConfigError(
                f"tensor_parallel_size: got {self.tensor_parallel_size} with a group of {self.group.size}, expected "
                "one size. Correct one of them."
            )

    @property
    def division(self) -> Division:
        """What ranks divide otherwise than by default."""
        return Division(towers=self.mm_encoder_tp_mode == "weights", experts=self.enable_expert_parallel)


@dataclass(frozen=True)
class EngineConfig:
    """Everything, resolved. Model constructors get it as `config` (or, written for V0, as `vllm_config`)."""

    model_config: ModelConfig
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    device_config: DeviceConfig = field(default_factory=DeviceConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    quant_config: QuantizationConfig | None = None
    """How layers hold their weights; None: in the model's dtype."""
    lora_config: LoRAConfig | None = None
    """Adapters that lie over the model; None: none are served."""
    speculative_config: SpeculativeConfig | None = None
    """How next tokens are guessed; None: they aren't."""
    engine_args: EngineArgs | None = None
    """The settings that this was resolved from, for other processes to resolve them again; None: made by hand."""

    @property
    def max_drafts(self) -> int:
        """Most guesses of next tokens that a chunk may carry."""
        return 0 if self.speculative_config is None else self.speculative_config.num_speculative_tokens

    @property
    def counts_tokens_on_device(self) -> bool:
        """Whether penalties go by counts on the device, so that requests with some needn't wait for their tokens.

        Rows behind drafts have histories of their own, which the host makes.
        """
        return (
            self.scheduler_config.max_steps_in_flight > 1
            and self.speculative_config is None
            and not self.model_config.pools
        )

    @property
    def max_sampled_rows(self) -> int:
        """Most rows of a step after which a token is sampled."""
        scheduler = self.scheduler_config
        return scheduler.max_num_seqs + min(scheduler.max_num_seqs * self.max_drafts, scheduler.max_num_batched_tokens)

    def as_rank_of(self, group: TensorParallel) -> EngineConfig:
        """The same configuration for one rank of a group."""
        return replace(
            self,
            parallel_config=replace(self.parallel_config, group=group),
            device_config=replace(self.device_config, device=self.device_config.of_rank(group.rank)),
        )

    def with_hf_config(self, hf_config: PretrainedConfig, architectures: list[str] | None = None) -> EngineConfig:
        """The same configuration for a sub-model, whose own Hugging Face config takes the place of the whole's."""
        architecture = (architectures or getattr(hf_config, "architectures", None) or [""])[0]
        model_config = replace(self.model_config, hf_config=hf_config, architecture=architecture)
        return replace(self, model_config=model_config)


@dataclass(frozen=True, slots=True)
class ModelFeatures:
    """What was found out about a model at load; decides which engine features are on for it.

    Every feature that is off has its reason in `notes`, which the load report prints.
    """

    tier: str = "text"
    """"text", "0 auto-split", "0 atomic", "1", "2" or "X"."""
    splits_media: bool = True
    """Media rows are computed apart from the decoder and fed chunk by chunk. False: atomic mode."""
    atomic_items: bool = False
    """A chunk may not end inside an item (the class asks for it, or atomic mode)."""
    two_way: frozenset[str] = frozenset()
    """Modalities whose rows see one another both ways, or `WHOLE_PROMPT`; see `sensorium.spans.two_way_spans`."""
    whole_prompts: bool = False
    """A prompt is computed in one step: nothing is kept of it that another could go on from."""
    max_prompt_tokens: int | None = None
    """Most tokens of a sequence, where the model has fewer positions than its config says; None: as it says."""
    shares_items: bool = True
    """An item's rows depend on the item alone, so requests may share them. False: identity covers the whole prompt."""
    maps_items_alone: bool = True
    """Mapping items one by one equals mapping them together. False: a request's items form one group."""
    placeholder_token_ids: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Per modality: the token ids that stand where its rows go, as observed on dummy data or declared."""
    max_item_rows: Mapping[str, int] = field(default_factory=dict)
    """Per modality: the largest number of decoder rows of one item."""
    notes: tuple[str, ...] = ()
