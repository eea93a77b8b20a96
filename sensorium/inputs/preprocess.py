"""From a prompt as its caller wrote it to an `EngineRequest` that the engine can't fail on.

    parse -> check and identify media -> encode -> input processor -> place media -> map media -> admit

Runs in the front process, in any thread of its pool, never on the step loop. Whatever is wrong with a
request, or with a model author's callable, is an error of that request, raised before anything is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import ContextLengthError, InvalidTypeError, ModelError, SensoriumError
from sensorium.inputs import INPUT_REGISTRY, InputRegistry, admission, token_inputs
from sensorium.inputs.media_data import MediaCollector
from sensorium.inputs.media_settings import MediaSettings
from sensorium.inputs.prompts import ParsedPrompt, parse_prompt
from sensorium.inputs.tokenizer import TextEncoder
from sensorium.inputs.transcription import transcription_style
from sensorium.inputs.vocabulary import vocabulary_of
from sensorium.logger import get_logger
from sensorium.lora import LoRARequest, adapter_id
from sensorium.messages import EngineRequest, MediaItem, Vocabulary
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalRegistry
from sensorium.multimodal.item_checks import check_span
from sensorium.multimodal.mapping import JoinedKwargs, MediaMapper, request_errors
from sensorium.multimodal.mrope import checked_positions, mrope_positions, positions_from_kwargs
from sensorium.multimodal.placeholders import media_mask
from sensorium.multimodal.placement import Placement, Prompt
from sensorium.multimodal.processor_cache import ProcessorCache
from sensorium.multimodal.request_media import MediaData, MediaStage, RequestMedia
from sensorium.multimodal.video_sampling import CheckpointSampling
from sensorium.pooling_params import MODEL_LIMIT
from sensorium.sampling_defaults import read_end_ids
from sensorium.spans import IntArray, Range, two_way_spans

if TYPE_CHECKING:
    from sensorium.config import EngineConfig, ModelConfig, ModelFeatures
    from sensorium.media import CacheStats, MediaLoader
    from sensorium.pooling_params import PoolingParams
    from sensorium.sampling_params import SamplingParams

logger = get_logger(__name__)

_MROPE_HOOK = "get_mrope_input_positions"
_EXPANSION_HOOK = "expand_by_items"
"""Of classes whose items say by themselves what they become in a prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedRequest:
    """An admitted request, and what the front keeps of it."""

    engine_request: EngineRequest
    prompt_text: str | None
    """The prompt as text, if it was given as text."""
    media_token_counts: Mapping[str, tuple[int, ...]]
    """Per modality, the prompt tokens that each item takes; a group of items counts as one."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the expanded prompt."""
        return len(self.engine_request.prompt_token_ids)


class InputPreprocessor:
    """Makes requests ready for the engine core. Safe to call from several threads.

    Args:
        config: the engine's configuration.
        features: what loading found out about the model.
        tokenizer: the model's Hugging Face tokenizer; without it, prompts are token ids.
        media_loader: turns encoded media into objects; without it, media are objects.
        accept_embeddings: whether callers may send embeddings instead of media.
    """

    def __init__(
        self,
        config: EngineConfig,
        features: ModelFeatures,
        tokenizer: Any | None = None,
        media_loader: MediaLoader | None = None,
        *,
        input_registry: InputRegistry = INPUT_REGISTRY,
        mm_registry: MultiModalRegistry = MULTIMODAL_REGISTRY,
        accept_embeddings: bool = True,
    ) -> None:
        self.config = config
        self.features = features
        self.encoder = None if tokenizer is None else TextEncoder(tokenizer)
        self._model_config = config.model_config
        self._adapters: Mapping[str, str] = {} if config.lora_config is None else config.lora_config.modules
        has_encoder = bool(getattr(config.model_config.hf_config, "is_encoder_decoder", False))
        self._has_encoder = has_encoder and not config.model_config.pools
        self._vocab_size = config.model_config.vocab_size
        self._uses_mrope = config.model_config.uses_mrope
        sampling = CheckpointSampling(config.model_config)
        self._collector = MediaCollector(
            config.model_config,
            mm_registry,
            media_loader,
            sampling,
            heard_s=lambda: transcription_style(config.model_config).max_audio_s,
        )
        self._input_registry = input_registry
        self._mm_registry = mm_registry
        self._cache = ProcessorCache(config.cache_config.mm_processor_cache_bytes)
        mapper = MediaMapper(self._model_config, mm_registry, self._cache)
        self._settings = MediaSettings(config.model_config, input_registry, mm_registry)
        self._settings.check_engine()
        self._stage = MediaStage(config, features, mm_registry, mapper, accept_embeddings=accept_embeddings)
        self._placeholder_ids: frozenset[int] = frozenset().union(*self._stage.placeholder_ids.values())
        self._eos_token_ids = eos_token_ids(self._model_config, tokenizer)
        self._takes_type_ids = self._model_config.pools and takes_type_ids(tokenizer)

    def process(
        self,
        request_id: str,
        prompt: object,
        sampling_params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time_s: float = 0.0,
        cache_salt: str | None = None,
        tenant: str = "",
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        pooling: PoolingParams | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> ProcessedRequest:
        """Check and prepare one request, to generate, or to pool as `pooling` says.

        `prompt`: a string, token ids, or a dict (`TextPrompt`, `TokensPrompt`), which may also hold
        `multi_modal_uuids`. `cache_salt`: requests share cached media and blocks only with the same salt.
        `tenant`: who sends it, for the scheduler.
        `mm_processor_kwargs`: used where the prompt has none of the same name.
        `lora_request`: the adapter, or its name; none for the model alone.

        Raises:
            RequestError: Something about the request is wrong; the message is for its caller.
            ModelError: The model's input processor or mapper breaks its rules.
        """
        make = partial(
            EngineRequest,
            request_id=request_id,
            eos_token_ids=self._eos_token_ids,
            priority=priority,
            arrival_time_s=arrival_time_s,
            cache_salt=cache_salt,
            tenant=tenant,
            pooling=pooling,
            adapter_id=adapter_id(self._adapters, lora_request),
        )
        try:
            admission.check_task(pooling, self._model_config)
            parsed = parse_prompt(prompt, takes_halves=self._has_encoder)
            kwargs = {**(mm_processor_kwargs or {}), **parsed.mm_processor_kwargs}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}  # null asks for nothing
            self._settings.check_request(kwargs)
            request = self._prepare(parsed, kwargs, sampling_params, cache_salt, make, pooling=pooling)
        except SensoriumError as error:
            if error.__cause__ is not None:
                logger.warning("request %s is refused: %s", request_id, error, exc_info=error.__cause__)
            raise
        counts: dict[str, tuple[int, ...]] = {}
        for item in request.media:
            num_tokens = 0 if item.cross_rows else item.span.length
            counts[item.modality] = (*counts.get(item.modality, ()), num_tokens)
        return ProcessedRequest(request, parsed.text, counts)

    async def decode_ahead(self, prompt: object) -> None:
        """Decode a prompt's media before `process`, which holds a thread. See `MediaCollector.decode_ahead`."""
        await self._collector.decode_ahead(prompt)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the core must know before an output can be held to a grammar. Raises `UnsupportedFeatureError`."""
        tokenizer = None if self.encoder is None else self.encoder.tokenizer
        return vocabulary_of(tokenizer, self._eos_token_ids, self._vocab_size)

    def statistics(self) -> CacheStats:
        """Hits and sizes of the cache of mapped media."""
        return self._cache.statistics()

    # Steps

    def _prepare(
        self,
        parsed: ParsedPrompt,
        kwargs: Mapping[str, Any],
        sampling_params: SamplingParams,
        cache_salt: str | None,
        make: Callable[..., EngineRequest],
        *,
        pooling: PoolingParams | None,
    ) -> EngineRequest:
        """What `make` makes of the parts that follow from prompt and model; cheap checks come before expensive work."""
        given = self._collector.collect(parsed.multi_modal_data, parsed.multi_modal_uuids, kwargs)
        ids, type_ids = self._encode(parsed, pooling)
        before = np.array(ids, dtype=np.int64)
        if parsed.token_ids is not None:
            admission.check_token_ids(before, self._max_token_id(before))
        processed = self._run_processor(parsed, ids, type_ids, given, kwargs)
        after = _processed_ids(processed)
        media = RequestMedia(self._stage, given, processed, kwargs, cache_salt) if given else None
        expand = getattr(self._model_config.model_class, _EXPANSION_HOOK, None)
        if media is not None and expand is not None and processed.get("multi_modal_inputs") is None:
            with request_errors("processor", "prompt"):
                after = media.expanded(partial(expand, self._model_config), after)
        prompt = Prompt(before, before if after == ids else np.array(after, dtype=np.int64))
        placements = media.place(prompt) if media else []
        two_way = self._admit(prompt, placements, pooling=pooling is not None)
        if pooling is None:
            sampling_params = self._resolve_sampling(sampling_params, len(after))
        items = media.items(placements, prompt.after) if media else ()
        positions, delta = self._mrope(after, items)
        has_types = self._takes_type_ids and type_ids is not None and len(type_ids) == len(after)
        return make(
            prompt_token_ids=after,
            sampling_params=sampling_params,
            media=items,
            two_way_spans=two_way,
            mrope_positions=positions,
            mrope_delta=delta,
            token_type_ids=type_ids if has_types else None,
        )

    def _encode(self, parsed: ParsedPrompt, pooling: PoolingParams | None) -> tuple[list[int], list[int] | None]:
        """Token ids of the prompt as given: those the caller sent, checked, or those of its text. With them, for a
        pair of texts or where the caller sent them, which text each belongs to."""
        max_model_len = self._model_config.max_model_len
        limit = None if pooling is None else pooling.truncate_prompt_tokens
        truncates = limit is not None
        if limit is not None:
            max_model_len = max_model_len if limit == MODEL_LIMIT else min(limit, max_model_len)
        if parsed.token_ids is not None:
            types = parsed.token_type_ids
            if truncates:
                return parsed.token_ids[:max_model_len], None if types is None else types[:max_model_len]
            if len(parsed.token_ids) > max_model_len:
                raise ContextLengthError.of_prompt(str(len(parsed.token_ids)), max_model_len, max_model_len)
            return parsed.token_ids, types
        assert parsed.text is not None
        if self.encoder is None:
            raise InvalidTypeError(
                "got text, expected token ids, since the engine runs without a tokenizer. "
                "Send prompt_token_ids, or leave out skip_tokenizer_init.",
                field="prompt",
            )
        # A decoder with an encoder begins with what the prompt says, and nothing else.
        adds = parsed.add_special_tokens and not self._has_encoder
        if parsed.text_pair is None and not truncates:
            return self.encoder.encode_bounded(parsed.text, max_model_len, add_special_tokens=adds), None
        encoded = self.encoder.encode_pair(
            parsed.text, parsed.text_pair, max_model_len, truncates=truncates, add_special_tokens=adds
        )
        return encoded.ids, encoded.type_ids

    def _max_token_id(self, token_ids: IntArray) -> int:
        """The largest id that a caller may send: of the model's vocabulary, or of the tokenizer's, which may
        have more.
        """
        largest = self._vocab_size - 1
        if self.encoder is None or token_ids.max(initial=0) <= largest:
            return largest
        return max(largest, self.encoder.max_token_id)

    def _run_processor(
        self,
        parsed: ParsedPrompt,
        ids: list[int],
        type_ids: list[int] | None,
        given: Sequence[MediaData],
        kwargs: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """What the model's input processor makes of the prompt; the prompt itself if the model registered
        none.
        """
        data = {each.modality: each.data for each in given}
        if given and self._mm_registry.has_processor(self._model_config):
            return self._run_merged_processor(parsed, ids, data, kwargs)
        inputs = token_inputs(
            list(ids),
            token_type_ids=type_ids,
            prompt=parsed.text,
            multi_modal_data=data or None,
            mm_processor_kwargs=dict(kwargs) or None,
        )
        with request_errors("input processor", "prompt"):
            return self._input_registry.process_input(self._model_config, inputs)

    def _run_merged_processor(
        self, parsed: ParsedPrompt, ids: list[int], data: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The same for a model whose processor also maps; its result in the form of the others'."""
        tokenizer = None if self.encoder is None else self.encoder.tokenizer
        prompt = list(ids) if parsed.text is None or parsed.token_ids is not None else parsed.text
        with request_errors("merged processor", "prompt"):
            processor = self._mm_registry.create_processor(self._model_config, tokenizer)
            result = processor.apply(prompt, data, kwargs)
        return {
            "prompt_token_ids": result["prompt_token_ids"],
            "multi_modal_inputs": result["mm_kwargs"],
            "multi_modal_placeholders": result["mm_placeholders"],
        }

    def _admit(self, prompt: Prompt, placements: Sequence[Placement], *, pooling: bool) -> tuple[Range, ...]:
        """Refuse what doesn't fit, before anything is mapped for it. Returns the prompt's two-way spans."""
        rows: dict[str, list[int]] = {}
        for placement in placements:
            rows.setdefault("+".join(placement.modalities), []).append(placement.span.num_rows)
        num_tokens = len(prompt.after)
        admission.check_length(num_tokens, rows, self._model_config.max_model_len, pooling=pooling)
        for placement in placements:
            check_span(placement.counts, placement.span, self.config, self.features)
        media = [(placement.modalities, placement.span) for placement in placements]
        two_way = two_way_spans(self.features.two_way, media, num_tokens)
        spans = [span for _, span in media]
        admission.check_two_way(two_way, spans, self.config.scheduler_config)
        is_media = media_mask((placement.span for placement in placements), num_tokens)
        admission.check_special_tokens(prompt.after, is_media, self._placeholder_ids, self._vocab_size)
        return two_way

    def _mrope(self, token_ids: list[int], items: Sequence[MediaItem]) -> tuple[IntArray | None, int]:
        """M-RoPE positions and delta; none for a model without."""
        if not self._uses_mrope:
            return None, 0
        if not items:
            return mrope_positions(len(token_ids), [])
        kwargs = JoinedKwargs([item.kwargs or {} for item in items])
        hf_config = self._model_config.hf_config
        hook = getattr(self._model_config.model_class, _MROPE_HOOK, None)
        of_outer_model = getattr(self._model_config.model_class, "mrope_positions_of", None)
        with request_errors(_MROPE_HOOK, "prompt"):
            if of_outer_model is not None:
                return checked_positions(of_outer_model(self._model_config, token_ids, kwargs), len(token_ids))
            if hook is None:
                return positions_from_kwargs(token_ids, hf_config, kwargs)
            return checked_positions(hook(token_ids, hf_config, kwargs), len(token_ids))

    def _resolve_sampling(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        if params.structured_outputs is not None:
            _ = self.vocabulary  # refuses what no output can be held to
        encoder = self.encoder
        if encoder is not None and params.bad_words:
            params = params.with_bad_word_ids(lambda word: encoder.encode(word, add_special_tokens=False))
        return admission.resolve_sampling_params(
            params,
            vocab_size=self._vocab_size,
            max_model_len=self._model_config.max_model_len,
            num_prompt_tokens=num_prompt_tokens,
        )


def takes_type_ids(tokenizer: Any | None) -> bool:
    """Whether a model is told which text of a pair a token belongs to: its tokenizer's settings say so."""
    return tokenizer is None or "token_type_ids" in getattr(tokenizer, "model_input_names", ())


def _processed_ids(processed: Mapping[str, Any]) -> list[int]:
    """The prompt that an input processor returned. Raises `ModelError` (a `TypeError`) if it is none."""
    ids = np.asarray(processed.get("prompt_token_ids", ()))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ModelError(
            "input processor: got no list of token ids, expected prompt_token_ids. Return token_inputs(...)."
        )
    token_ids: list[int] = ids.tolist()
    return token_ids


def eos_token_ids(model_config: ModelConfig, tokenizer: Any | None) -> frozenset[int]:
    """Ids that end a model's output: all that its generation config, its config and its tokenizer name.

    Where none of them names any, those that the config's class has by default.
    """
    of_tokenizer = getattr(tokenizer, "eos_token_id", None)
    named = model_config.end_token_ids | ({of_tokenizer} if isinstance(of_tokenizer, int) else frozenset())
    if named:
        return named
    configs = (model_config.hf_config, model_config.hf_text_config)
    return frozenset().union(*(read_end_ids(vars(config), "config.json") for config in configs))
