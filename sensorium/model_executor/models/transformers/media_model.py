"""The classes that serve architectures with media that have no model file.

The checkpoint's processor defines an item's tokens and makes its tensors, one item at a time
(`sensorium.multimodal.hf_items`). There is a class for each set of modalities, since modalities are registered by
class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import ModelError
from sensorium.inputs import INPUT_REGISTRY, InputContext, TokenInputs
from sensorium.model_executor.drivers import ItemRows, MediaRows
from sensorium.model_executor.models.media_common import as_items
from sensorium.model_executor.models.transformers import interface
from sensorium.model_executor.models.transformers.by_request import ByRequestWay, Pace
from sensorium.model_executor.models.transformers.discovery import NUM_TOKENS, Discovery, discover, find_rows_trunk
from sensorium.model_executor.models.transformers.encoder_decoder import TransformersForSeq2SeqLM
from sensorium.model_executor.models.transformers.flat import FlatWay
from sensorium.model_executor.models.transformers.media_prompts import ItemPart, MediaPrompt, make_media_prompts
from sensorium.model_executor.models.transformers.media_rows import TrunkInputs, on_device
from sensorium.model_executor.models.transformers.model import Tier, TransformersForCausalLM, configs_of
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.trunk import Trunk
from sensorium.model_executor.models.transformers.two_way import MaskRecorder, SeenPrompt, read_two_way
from sensorium.model_executor.models.transformers.weights import hf_class_of
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs, PlaceholderRange
from sensorium.multimodal.hf_items import (
    ARGUMENTS,
    Processed,
    as_kwargs,
    expand,
    hf_items,
    of_item,
    processor_modalities,
    segment_of,
)
from sensorium.multimodal.resize_limits import check_picture
from sensorium.spans import IntArray

_TOKEN_TYPES = "mm_token_type_ids"
MEDIA_ARGUMENTS = frozenset(("pixel_values", "input_features", "input_values", "flattened_patches", "image"))
"""What encoders of media take."""


class TransformersForConditionalGeneration(TransformersForCausalLM):
    """A model with media of transformers. `use` must choose a tier before it runs."""

    supports_multimodal: ClassVar[bool] = True
    passes_settings_on: ClassVar[bool] = True
    """To the checkpoint's processor: all `mm_processor_kwargs`."""
    modalities: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, config: EngineConfig, hf_model: torch.nn.Module) -> None:
        super().__init__(config=config, hf_model=hf_model)
        self._inputs: TrunkInputs | None = None
        self._takes_token_types = _TOKEN_TYPES in inspect.signature(hf_model.forward).parameters

    @classmethod
    def for_checkpoint(cls, model: str, hf_config: Any, *, trust_remote_code: bool, revision: str | None) -> type:
        """The class for the modalities that a checkpoint's processor takes; the one of text where it has none.

        Raises `ModelError` (a `TypeError`) for an architecture of another kind.
        """
        if getattr(hf_config, "is_encoder_decoder", False):
            if reads_text_alone((hf_config.architectures or [""])[0]):
                return TransformersForSeq2SeqLM
            raise ModelError(
                f"{(hf_config.architectures or ['the model'])[0]}: got an encoder with cross-attention, expected a "
                "decoder alone, or an encoder of text. Models of transformers whose encoder reads media are not served "
                "yet."
            )
        modalities = processor_modalities(model, trust_remote_code, revision)
        return CLASSES.get(frozenset(modalities), TransformersForCausalLM)

    # Prompts

    @classmethod
    def placeholder_text(cls, model_config: ModelConfig, modality: str) -> str | None:
        """An item's placeholder text, by the checkpoint's processor; None if it takes no such items."""
        found = hf_items(model_config).placeholders.get(modality)
        return None if found is None else found.text

    @classmethod
    def expand_by_items(
        cls, model_config: ModelConfig, token_ids: Sequence[int], mapped: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> tuple[list[int], dict[str, list[PlaceholderRange]]]:
        """The prompt with each placeholder expanded to its item's tokens, and the items' ranges in it.

        Raises `InvalidRequestError` (a `ValueError`) if there are more or fewer placeholders than items.
        """
        segments = {modality: [segment_of(each) for each in items] for modality, items in mapped.items()}
        ids = np.asarray(token_ids, dtype=np.int64)
        expanded, ranges = expand(ids, hf_items(model_config).placeholders, segments)
        return expanded.tolist(), ranges

    @classmethod
    def mrope_positions_of(
        cls, model_config: ModelConfig, token_ids: Sequence[int], mm_kwargs: Mapping[str, Any]
    ) -> tuple[IntArray, int]:
        """M-RoPE positions `(3, num_tokens)` of an expanded prompt as the outer model computes them, and their delta.

        Raises whatever it raises.
        """
        tensors, _ = of_item(mm_kwargs)
        ids = torch.tensor([list(token_ids)])
        tensors |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tensors |= token_types(model_config, token_ids)
        indexer = _rope_indexer(model_config)
        names = inspect.signature(indexer).parameters
        positions, _ = indexer(**{name: value for name, value in tensors.items() if name in names})
        found: IntArray = positions[-3:, 0].numpy().astype(np.int64)
        return found, int(found.max()) + 1 - len(token_ids)

    # Tiers

    def use(self, tier: Tier) -> None:
        """See `TransformersForCausalLM`."""
        if self._inputs is not None:
            self._inputs.remove()
            self._inputs = None
        super().use(tier)

    def _flat(self, mask_form: str, token_by_token: bool) -> FlatWay:
        self._attention.set(interface.NAME)
        found = self._discovery
        if isinstance(found, CannotRunError):
            raise found
        self._attend_in(found.trunk)
        self._inputs = self._trunk_inputs(found.trunk)
        found = self._with_two_way(found)
        trunk = Trunk(self.hf_model, found.trunk)
        self._attention.restore()
        hidden = trunk.run(self._few_tokens)[0]
        trunk.find_head(hidden.shape[-1], self._device, hidden.dtype)
        self._attend_in(found.trunk)
        return FlatWay(found, trunk, mask_form, token_by_token, self._inputs)

    def _by_request(self, pace: Pace) -> ByRequestWay:
        self._attention.restore()
        if isinstance(self._discovery, Discovery):
            self._discovery.remove()
        module = find_rows_trunk(self.hf_model, self._few_tokens)
        self.two_way = frozenset()
        self._inputs = self._trunk_inputs(module)
        if pace is Pace.WHOLE and self._inputs.extras:
            raise CannotRunError("media bring more than rows, which are not kept")
        trunk = Trunk(self.hf_model, module)
        hidden = trunk.run(self._few_tokens)[0]
        trunk.find_head(hidden.shape[-1], self._device, hidden.dtype)
        return ByRequestWay(self.hf_model, trunk, pace=pace, inputs=self._inputs)

    def _trunk_inputs(self, trunk: torch.nn.Module) -> TrunkInputs:
        inputs = TrunkInputs(self.hf_model, trunk, self.model_config.vocab_size)
        try:
            captures = [
                inputs.compared(self._on_device(prompt.token_ids), self._tensors(prompt.tensors, prompt.token_ids))
                for prompt in self.media_prompts
            ]
            inputs.learn(captures)
        except BaseException:
            inputs.remove()
            raise
        self.media_masks = [capture.media.cpu().numpy() for capture in captures]
        """Of each of `media_prompts`: which rows are media's."""
        return inputs

    def _with_two_way(self, found: Discovery) -> Discovery:
        """`found`, with how its calls treat two-way spans of media."""
        prompts = [
            SeenPrompt(prompt.modality, mask, self._sights(prompt))
            for prompt, mask in zip(self.media_prompts, self.media_masks, strict=True)
        ]
        self.two_way, spans = read_two_way(prompts, [call.rule for call in found.calls])
        calls = [replace(call, spans=each) for call, each in zip(found.calls, spans, strict=True)]
        return replace(found, calls=tuple(calls))

    def _attend_in(self, trunk: torch.nn.Module) -> None:
        """Let attention of the trunk go to the engine, and towers attend as they do by themselves."""
        self._attention.set(interface.NAME, {id(config) for config in configs_of(trunk)})

    def _sights(self, prompt: MediaPrompt) -> tuple[torch.Tensor, ...]:
        """What positions see in each attention call when the outer model runs on a prompt."""
        recorder = MaskRecorder()
        ids = self._on_device(prompt.token_ids)[None]
        with interface.attending(recorder):
            self.hf_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **self._tensors(prompt.tensors, prompt.token_ids),
            )
        return tuple(recorder.sights)

    @cached_property
    def _discovery(self) -> Discovery | CannotRunError:
        ids, last = self.text_token_ids(NUM_TOKENS), self.model_config.max_model_len - 1
        try:
            return discover(self.hf_model, ids, last, self._device, self._attention.eager, takes_rows=True)
        except CannotRunError as reason:
            return reason

    @cached_property
    def media_prompts(self) -> list[MediaPrompt]:
        """Prompts with media, which show how the model takes them."""
        return make_media_prompts(self.model_config, self.modalities)

    @property
    def takes_prompts(self) -> bool:
        """Whether its processor takes whole prompts, so that items can't be told apart."""
        return hf_items(self.model_config).takes_prompts

    def placeholder_token_ids(self) -> dict[str, frozenset[int]]:
        """For each modality, the ids that only placeholders of its rows have."""
        found = {}
        for prompt, mask in zip(self.media_prompts, self.media_masks, strict=True):
            ids = frozenset(prompt.token_ids[mask].tolist())
            found[prompt.modality] = ids - frozenset(prompt.token_ids[~mask].tolist())
        return {modality: ids for modality, ids in found.items() if ids}

    def media_positions(self, prompt: MediaPrompt) -> IntArray | None:
        """Positions `(3, num_tokens)` of one of `media_prompts`, with M-RoPE."""
        if not self.model_config.uses_mrope:
            return None
        kwargs = as_kwargs(Processed(prompt.token_ids, prompt.tensors))
        return self.mrope_positions_of(self.model_config, prompt.token_ids.tolist(), kwargs)[0]

    def capture_part(self, prompt: MediaPrompt, part: ItemPart, places: IntArray) -> ItemRows:
        """Captures an item of one of `media_prompts`, whose rows stand at `places` of its part."""
        ids = self._on_device(prompt.token_ids[part.start : part.end])
        return self.capture(ids, part.tensors, torch.from_numpy(places).to(self._device))

    def _on_device(self, token_ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(token_ids)).to(self._device)

    def _tensors(self, tensors: Mapping[str, Any], token_ids: IntArray) -> dict[str, Any]:
        """A processor's tensors for some token ids, in the form that `forward` takes."""
        if self._takes_token_types and _TOKEN_TYPES not in tensors:
            tensors = {**tensors, **token_types(self.model_config, token_ids)}
        return on_device(tensors, self._device, self.model_config.dtype)

    # What the engine calls

    @property
    def brings_rows_only(self) -> bool:
        """Whether the decoder gets only rows from media, without further tensors."""
        return self._inputs is not None and not self._inputs.extras

    def capture(self, token_ids: torch.Tensor, tensors: Mapping[str, Any], media: torch.Tensor) -> ItemRows:
        """See `drivers.captured.CapturesMedia`."""
        assert self._inputs is not None, "use() was not called"
        return self._inputs.item_rows(token_ids, self._tensors(tensors, token_ids.cpu().numpy()), media)

    def embed(self, token_ids: torch.Tensor, media: MediaRows | None) -> torch.Tensor:
        """See `drivers.captured.CapturesMedia`."""
        assert self._inputs is not None, "use() was not called"
        return self._inputs.embed(token_ids, media)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        media: MediaRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch."""
        assert self.way is not None, "use() was not called"
        hidden: torch.Tensor = self.way(input_ids, positions, kv_caches, attn_metadata, media, inputs_embeds)
        return hidden

    # The untouched model

    @torch.inference_mode()
    def reference_media_logits(self, prompt: MediaPrompt) -> torch.Tensor:
        """Logits `(num_tokens, vocab_size)` of a whole prompt with media by transformers alone."""
        ids = self._on_device(prompt.token_ids)[None]
        with self._attention.eager():
            output = self.hf_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **self._tensors(prompt.tensors, prompt.token_ids),
            )
        logits: torch.Tensor = output.logits[0]
        return logits


def reads_text_alone(architecture: str) -> bool:
    """Whether a class with an encoder gives that token ids, and takes no media."""
    import transformers

    hf_class = getattr(transformers, architecture, None)
    names = set(inspect.signature(hf_class.forward).parameters) if hf_class is not None else set()
    return {"input_ids", "decoder_input_ids"} <= names and names.isdisjoint(MEDIA_ARGUMENTS)


def token_types(model_config: ModelConfig, token_ids: Sequence[int] | IntArray) -> dict[str, torch.Tensor]:
    """Each token's modality by the processor's numbers; empty if it has none."""
    create = getattr(hf_items(model_config).processor, f"create_{_TOKEN_TYPES}", None)
    return {} if create is None else {_TOKEN_TYPES: torch.tensor(create([list(map(int, token_ids))]))}


def _rope_indexer(model_config: ModelConfig) -> Any:
    """`get_rope_index` of the class in the architecture's module that has it, which reads nothing but the config."""
    hf_class = hf_class_of(model_config)
    having = [
        each for each in (hf_class, *vars(inspect.getmodule(hf_class)).values()) if hasattr(each, "get_rope_index")
    ]
    # A module may have several such classes, for example for listening and for speaking.
    config_class = type(model_config.hf_config)
    having.sort(key=lambda each: getattr(each, "config_class", None) is not config_class)
    if not having:
        raise ModelError(
            f"{model_config.architecture}: got M-RoPE without get_rope_index, expected it in transformers."
        )
    indexer = type("Indexer", (having[0],), {"__init__": torch.nn.Module.__init__, "__getattr__": _of_config})()
    indexer.config = model_config.hf_config
    return indexer.get_rope_index


def _of_config(module: Any, name: str) -> Any:
    """What a module that wasn't made would have taken from its config, or from the part of it that describes vision."""
    config = vars(module).get("config")
    for holder in (config, getattr(config, "vision_config", None)):
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AttributeError(name)


# Registrations


def map_images(ctx: InputContext, data: Any, **settings: Any) -> MultiModalKwargs:
    """What the checkpoint's processor makes of a picture, with `settings` in place of its own."""
    processor = getattr(hf_items(ctx.model_config).with_settings(settings).processor, "image_processor", None)
    for picture in as_items(data):
        if hasattr(picture, "height"):
            check_picture(processor, picture.height, picture.width)
    return _map("image", ctx, data, settings)


def map_videos(ctx: InputContext, data: Any, **settings: Any) -> MultiModalKwargs:
    """What the checkpoint's processor makes of a clip, with `settings` in place of its own."""
    return _map("video", ctx, data, settings)


def map_sounds(ctx: InputContext, data: Any, **settings: Any) -> MultiModalKwargs:
    """What the checkpoint's processor makes of a sound, with `settings` in place of its own."""
    return _map("audio", ctx, data, settings)


def _map(modality: str, ctx: InputContext, data: Any, settings: Mapping[str, Any]) -> MultiModalKwargs:
    (item,) = as_items(data)
    items = hf_items(ctx.model_config).with_settings(settings)
    processed = items.process_item(modality, item)
    if modality == "audio":
        items.check_heard(item, processed)
    return MultiModalKwargs(as_kwargs(processed, modality))


def max_rows(ctx: InputContext) -> int:
    """The most rows of an item: a fixed bound, since only the processor knows the number for a size."""
    return max(ctx.model_config.max_model_len - 1, 1)


def process_whole(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Expand a prompt by a processor that takes whole prompts; others expand it item by item, from mapped items."""
    data: Mapping[str, Any] = inputs.get("multi_modal_data") or {}
    if not data or not hf_items(ctx.model_config).takes_prompts:
        return inputs
    items = hf_items(ctx.model_config).with_settings(inputs.get("mm_processor_kwargs") or {})
    text = inputs.get("prompt") or items.processor.tokenizer.decode(inputs["prompt_token_ids"])
    processed = items.process(text, {modality: as_items(each) for modality, each in data.items()})
    whole: Any = inputs
    whole["prompt_token_ids"] = processed.token_ids.tolist()
    whole["multi_modal_inputs"] = as_kwargs(processed)
    return inputs


_MAPPERS = {"image": map_images, "video": map_videos, "audio": map_sounds}


def _class_for(modalities: Sequence[str]) -> type[TransformersForConditionalGeneration]:
    name = f"Transformers{''.join(each.capitalize() for each in modalities)}ForConditionalGeneration"
    made = type(
        name, (TransformersForConditionalGeneration,), {"modalities": tuple(modalities), "__module__": __name__}
    )
    for modality in modalities:
        MULTIMODAL_REGISTRY.register_input_mapper(modality, _MAPPERS[modality])(made)
        MULTIMODAL_REGISTRY.register_max_multimodal_tokens(modality, max_rows)(made)
    INPUT_REGISTRY.register_input_processor(process_whole)(made)
    return made


CLASSES: Mapping[frozenset[str], type[TransformersForConditionalGeneration]] = {
    frozenset(chosen): _class_for(chosen)
    for size in range(1, len(ARGUMENTS) + 1)
    for chosen in combinations(ARGUMENTS, size)
}
"""The classes by the modalities that they take."""
