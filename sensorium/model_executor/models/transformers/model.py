"""The class that serves architectures which have no file of their own here: transformers' modules over our caches.

It can run in several ways; loading takes the first one whose results equal those of the untouched modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.config import EngineConfig
from sensorium.model_executor.models.transformers import interface
from sensorium.model_executor.models.transformers.by_request import ByRequestWay, Pace
from sensorium.model_executor.models.transformers.discovery import NUM_TOKENS, Discovery, discover
from sensorium.model_executor.models.transformers.flat import MASK_FORMS, FlatWay
from sensorium.model_executor.models.transformers.interface import EAGER, IMPLEMENTATION
from sensorium.model_executor.models.transformers.packing import check_quantization_of
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.trunk import Trunk, find_trunk
from sensorium.model_executor.models.transformers.weights import load_hf_model

FLAT, BY_REQUEST = "transformers flat", "transformers by request"


@dataclass(frozen=True, slots=True, eq=False)
class Tier:
    """One way to run a model."""

    name: str
    """For the load report."""
    make: Callable[[], FlatWay | ByRequestWay]
    """Raises `CannotRunError` if the model can't run in this way."""


class TransformersForCausalLM(nn.Module):
    """A model of text of transformers. `use` must choose a tier before it runs."""

    reads_source: ClassVar[bool] = False
    """Whether an encoder reads the prompt."""
    two_way: frozenset[str] = frozenset()
    """Modalities whose rows see one another both ways, or `WHOLE_PROMPT`."""

    def __init__(self, *, config: EngineConfig, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model: Any = hf_model
        self.model_config = config.model_config
        self._device = torch.device(config.device_config.device)
        self._attention = AttentionSwitch(hf_model)
        self.way: FlatWay | ByRequestWay | None = None
        interface.register()

    @classmethod
    def load_from_checkpoint(cls, config: EngineConfig) -> TransformersForCausalLM:
        """The model with its checkpoint's weights; see `load_hf_model`.

        Raises `ConfigError` (a `ValueError`) where its weights can't be held as asked for.
        """
        check_quantization_of(config)
        with torch.inference_mode():
            return cls(config=config, hf_model=load_hf_model(config))

    # Tiers

    def tiers(self) -> Iterator[Tier]:
        """The ways to run it, the best first."""
        yield from self._flat_tiers()
        for pace in Pace:
            yield Tier(BY_REQUEST, partial(self._by_request, pace))

    def _flat_tiers(self) -> Iterator[Tier]:
        """Mixers are tried token by token only if the model has some."""
        for token_by_token in (False, True):
            for form in MASK_FORMS:
                yield Tier(FLAT, partial(self._flat, form, token_by_token))
            if not isinstance(self._discovery, Discovery) or not self._discovery.mixers:
                return

    def use(self, tier: Tier) -> None:
        """Run by a tier from now on. Raises `CannotRunError` if the model can't."""
        if self.way is not None and self.way.trunk is not None:
            self.way.trunk.remove()
        self.way = None
        self.way = tier.make()

    @property
    def described(self) -> str:
        """What runs, for the load report."""
        assert self.way is not None, "use() was not called"
        return f"{type(self.hf_model).__name__} of transformers, {self.way.described}"

    def _flat(self, mask_form: str, token_by_token: bool) -> FlatWay:
        self._attention.set(interface.NAME)
        found = self._discovery
        if isinstance(found, CannotRunError):
            raise found
        trunk = Trunk(self.hf_model, found.trunk)
        self._attention.restore()
        hidden = trunk.run(self._few_tokens)[0]
        trunk.find_head(hidden.shape[-1], self._device, hidden.dtype)
        self._attention.set(interface.NAME)
        return FlatWay(found, trunk, mask_form, token_by_token)

    def _by_request(self, pace: Pace) -> ByRequestWay:
        self._attention.restore()
        if isinstance(self._discovery, Discovery):
            self._discovery.remove()
        trunk = find_trunk(self.hf_model, self._few_tokens)
        return ByRequestWay(self.hf_model, trunk, pace=pace)

    @cached_property
    def _discovery(self) -> Discovery | CannotRunError:
        ids = self.text_token_ids(NUM_TOKENS)
        try:
            last = self.model_config.max_model_len - 1
            return discover(self.hf_model, ids, last, self._device, self._attention.eager)
        except CannotRunError as reason:
            return reason

    @cached_property
    def _few_tokens(self) -> dict[str, Any]:
        ids = torch.tensor([self.text_token_ids(NUM_TOKENS)], device=self._device)
        return {"input_ids": ids, "use_cache": False}

    # What the engine calls

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch."""
        assert self.way is not None, "use() was not called"
        hidden: torch.Tensor = self.way(input_ids, positions, kv_caches, attn_metadata)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        assert self.way is not None, "use() was not called"
        return hidden_states if self.way.trunk is None else self.way.trunk.logits(hidden_states)

    def text_token_ids(self, count: int) -> list[int]:
        """Token ids of a meaningless text; see `text_token_ids`."""
        return text_token_ids(self.model_config, count)

    # The untouched model

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int], num_prompt_tokens: int | None = None) -> torch.Tensor:
        """Logits `(num_tokens, vocab_size)` of a whole sequence by transformers alone, with its eager attention.

        `num_prompt_tokens`: how many of them are the prompt, which matters if an encoder reads it; None: all.
        """
        ids = torch.tensor([list(token_ids)], device=self._device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        parameters = inspect.signature(self.hf_model.forward).parameters
        if "position_ids" in parameters:  # as `generate` passes them; without them some models count differently
            given["position_ids"] = torch.arange(len(token_ids), device=self._device)[None]
        given = {name: value for name, value in given.items() if name in parameters}
        with self._attention.eager():
            logits: torch.Tensor = self.hf_model(**given, use_cache=False).logits[0]
        return logits


class AttentionSwitch:
    """Sets which attention function the modules of a model call."""

    def __init__(self, model: nn.Module) -> None:
        self._configs = configs_of(model)
        self._own = [getattr(each, IMPLEMENTATION) for each in self._configs]

    def set(self, name: str, of: Collection[int] | None = None) -> None:
        """Let all modules call the function of this name; with `of`, only those whose config's `id` is in it, and the
        others their own."""
        pairs = zip(self._configs, self._own, strict=True)
        self._write([name if of is None or id(config) in of else own for config, own in pairs])

    def restore(self) -> None:
        """Let all call their original functions."""
        self._write(self._own)

    def eager(self) -> AbstractContextManager[None]:
        """Within this context, all call transformers' plain attention."""
        return self._with([EAGER] * len(self._configs))

    @contextmanager
    def _with(self, names: Sequence[str]) -> Iterator[None]:
        before = [getattr(each, IMPLEMENTATION) for each in self._configs]
        self._write(names)
        try:
            yield
        finally:
            self._write(before)

    def _write(self, names: Sequence[str]) -> None:
        for each, name in zip(self._configs, names, strict=True):
            setattr(each, IMPLEMENTATION, name)


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's modules ask for the attention function, each once."""
    configs = {id(each): each for module in model.modules() if (each := getattr(module, "config", None)) is not None}
    return [each for each in configs.values() if hasattr(each, IMPLEMENTATION)]


def text_token_ids(model_config: Any, count: int) -> list[int]:
    """Different token ids from all over the vocabulary, without the special ones that the config names."""
    special = {0, *_special_ids(model_config.hf_config), *_special_ids(model_config.hf_text_config)}
    vocab_size = model_config.vocab_size
    stride = max(vocab_size // (count + 1), 1)
    ids = [i for i in range(stride, vocab_size, stride) if i not in special]
    ids += [i for i in range(vocab_size) if i not in special and i not in ids]
    return (ids * count)[:count] or [0] * count


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
