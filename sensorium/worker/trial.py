"""Tries a model out at load: text alone, and its own dummy media.

What the model raises here, or returns in another shape than it should, is the load's error, and names the class, what
it was given and what was expected. A model that loads can so serve what it declares; a failure that only certain inputs
bring is still an error of the request that brings it.

The classes of this project go through much more in its own tests, so that here they only compute a few tokens of text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.attention import LayerCache
from sensorium.config import EngineConfig
from sensorium.errors import ConfigError, ModelError, ProcessorError
from sensorium.logger import get_logger
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers import CrossDriver, EmbeddingsDriver, MediaRows, ModelDriver, StepInputs
from sensorium.model_executor.drivers.encoder_outputs import flatten_rows
from sensorium.model_executor.failures import told_to_author
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.dummy_media import DummyMedia
from sensorium.worker.dummy_steps import DummySteps, IdArray

logger = get_logger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that counts as equal, relative to the largest value. A wrong row differs by about 1."""
_TEXT_LENGTHS = (7, 5)
"""Tokens of the two prompts that are run as text."""
_MOST_MEDIA_TOKENS = 256
"""Of the dummy prompt, so many tokens go through a decoder that gets its media rows from an encoder of its own."""

_HIDDEN = "a tensor of hidden states (num_tokens, hidden_size)"


def is_own_class(model: nn.Module) -> bool:
    """Whether a model's class is of this project."""
    return type(model).__module__.startswith("sensorium.")


class Trial:
    """Runs one model. Every method raises `ModelError` (a `TypeError`) for what the model does wrong."""

    def __init__(self, model: nn.Module, config: EngineConfig, steps: DummySteps) -> None:
        self._model: Any = model
        self.name = type(model).__name__
        self.vocab_size = config.model_config.vocab_size
        self._wants_logits = not config.model_config.pools or bool(config.model_config.pooler.token_ids)
        self._dtype = config.model_config.dtype
        self._steps = steps

    # Text

    def run_text(self, driver: ModelDriver, not_text: Collection[int], media: Collection[str] = ()) -> tuple[str, ...]:
        """Run text of a few tokens; returns notes.

        A class of an author's own also runs it cut in two, beside another prompt, which must change nothing.

        Args:
            driver: Runs the model.
            not_text: Ids that stand for media.
            media: Parameters of `forward` for media, which are absent here.
        """
        prompts = self._text_prompts(not_text)
        absent = f", without {' and '.join(media)} as in every step that has no media" if media else ""
        given = f"{len(prompts[0])} tokens of text{absent}"
        hidden = self._forward(driver, [(prompts[0], 0, len(prompts[0]))], self._steps.caches(len(prompts[0])), given)
        self.check_logits(hidden, given)
        if is_own_class(self._model):
            return ()
        return self._check_pieces(driver, prompts, hidden)

    def _text_prompts(self, not_text: Collection[int]) -> list[IdArray]:
        ids = [i for i in range(1, self.vocab_size) if i not in not_text][: sum(_TEXT_LENGTHS)] or [0]
        every = np.resize(np.asarray(ids, dtype=np.int64), sum(_TEXT_LENGTHS))
        return [every[: _TEXT_LENGTHS[0]], every[_TEXT_LENGTHS[0] :]]

    def _check_pieces(self, driver: ModelDriver, prompts: list[IdArray], whole: torch.Tensor) -> tuple[str, ...]:
        """Compare a prompt's rows with those that it gets in two steps, beside another prompt's in the same cache."""
        first, other = prompts
        cut = len(first) // 2
        caches = self._steps.caches(len(first), num_sequences=2)
        given = f"two prompts of text in one batch, {len(first)} and {len(other)} tokens, each in two steps"
        parts = []
        for start, end in ((0, cut), (cut, len(first))):
            pieces = [(first, start, end), (other, min(start, len(other) - 1), min(end, len(other)))]
            parts.append(self._forward(driver, pieces, caches, given)[: end - start])
        difference = relative_difference(torch.cat(parts), whole)
        if difference <= TOLERANCE[self._dtype]:
            return ()
        told = (
            f"the hidden states of a prompt that is cut in two, beside another one, differ from those of the prompt "
            f"alone by {difference:.1e} relative, expected at most {TOLERANCE[self._dtype]:.0e}"
        )
        if self._dtype == torch.float32:
            raise ModelError(
                f"{self.name}: {told}. A batch is flat and holds pieces of several prompts: take places from "
                f"`positions` (never from a row's index), give the Attention of each layer its own entry of kv_caches, "
                f"and let rows meet in Attention only."
            )
        logger.warning("%s: %s", self.name, told)
        return (told,)  # in fewer bits, rounding may do this to a model that is right

    def _forward(
        self, driver: ModelDriver, pieces: list[tuple[IdArray, int, int]], caches: list[LayerCache], given: str
    ) -> torch.Tensor:
        step = self._steps.step(pieces, caches)
        with self.blamed("forward", given, _HIDDEN):
            hidden = driver.forward(step)
        return self.check_hidden(hidden, len(step.input_ids), given)

    # Media

    def run_whole(
        self, dummy: DummyMedia, kwargs: Mapping[str, Any], maps: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """The dummy prompt in one pass, media merged by the model itself: hidden states `(num_tokens, hidden_size)`."""
        given = described(dummy, kwargs)
        step = self._whole_step(dummy.token_ids, maps)
        with self.blamed("forward", given, _HIDDEN):
            hidden = self._call(step, kwargs)
        hidden = self.check_hidden(hidden, len(dummy.token_ids), given)
        self.check_logits(hidden, given)
        return hidden

    def ignores_media(
        self, dummy: DummyMedia, kwargs: Mapping[str, Any], whole: torch.Tensor, maps: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether the dummy prompt's hidden states are the same without these arguments."""
        step = self._whole_step(np.clip(dummy.token_ids, 0, self.vocab_size - 1), maps)
        try:
            return torch.equal(self._call(step, kwargs), whole)
        except Exception as error:  # it fails without them, so it uses them
            logger.debug("without media the dummy prompt can't be run", exc_info=error)
            return False

    def _whole_step(self, token_ids: IdArray, maps: Mapping[str, Any] | None) -> StepInputs:
        return self._steps.step([(token_ids, 0, len(token_ids))], self._steps.caches(len(token_ids)), maps=maps)

    def _call(self, step: StepInputs, kwargs: Mapping[str, Any]) -> Any:
        return ForwardAdapter(self._model)(
            input_ids=step.input_ids,
            positions=step.positions,
            kv_caches=step.kv_caches,
            attn_metadata=step.attn_metadata,
            **kwargs,
        )

    def encode(
        self, driver: EmbeddingsDriver, method: str, dummy: DummyMedia, modality: str, kwargs: Mapping[str, Any]
    ) -> Any:
        """What the model's encoder returns for one modality's dummy media, checked to be rows as wide as the text's."""
        given = described(dummy, kwargs, modality)
        expected = "a tensor (num_rows, hidden_size) for each item"
        with self.blamed(method, given, expected):
            output = driver.call_encoder(kwargs)
        rows = self._rows(method, output, given, expected)
        with self.blamed("the embedding of text", "one token", "a tensor (num_tokens, hidden_size)"):
            width = driver.embed_ids(torch.zeros(1, dtype=torch.int64, device=self._steps.device)).shape[-1]
        if rows.shape[-1] != width:
            raise ModelError(
                f"{self.name}: {method} returned rows of width {rows.shape[-1]} for {given}, expected {width}, the "
                f"width of its text embeddings. Project them to hidden_size."
            )
        self._check_finite(rows, method, given)
        return output

    def _rows(self, method: str, output: Any, given: str, expected: str) -> torch.Tensor:
        try:
            return flatten_rows(output)
        except ProcessorError as error:
            returned = _shape(output) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise ModelError(
                f"{self.name}: {method} returned {returned} for {given}, expected {expected}. Return those, in the "
                f"order of the items."
            ) from error

    def run_media_rows(self, driver: ModelDriver, dummy: DummyMedia, rows: torch.Tensor, mask: Any) -> None:
        """A piece of the dummy prompt around its first media row, with encoded rows at the places of `mask`."""
        index = np.flatnonzero(mask)
        start = max(int(index[0]) - _MOST_MEDIA_TOKENS // 2, 0)
        end = min(start + _MOST_MEDIA_TOKENS, len(dummy.token_ids))
        ids = dummy.token_ids[start:end]
        inside = (index >= start) & (index < end)
        device = self._steps.device
        media = MediaRows(
            torch.from_numpy(index[inside] - start).to(device),
            rows.to(self._dtype)[torch.from_numpy(np.flatnonzero(inside)).to(device)],
        )
        given = f"{len(ids)} tokens of its dummy prompt, {int(inside.sum())} of them rows of its encoder"
        step = self._steps.step([(ids, 0, len(ids))], self._steps.caches(len(ids)), media=media)
        with self.blamed("forward", given, _HIDDEN):
            hidden = driver.forward(step)
        self.check_logits(self.check_hidden(hidden, len(ids), given), given)

    def run_encoder_rows(self, driver: CrossDriver, method: str, dummy: DummyMedia, most: Mapping[str, int]) -> None:
        """Encode the dummy media, and let a piece of the dummy prompt attend to their rows. `most`: rows of an item."""
        for modality, items in dummy.items.items():
            given, count = described(dummy, items[0], modality), most[modality]
            with self.blamed(method, given, f"{count} rows for each item"):
                output = driver.call_encoder(driver.encoder_kwargs(items[:1]))
            rows = self._rows(method, output, given, "a tensor (num_rows, hidden_size) for each item")
            if len(rows) != count:
                raise ModelError(
                    f"{self.name}: {method} returned {len(rows)} rows for an item of {given}, expected {count}, as "
                    "get_num_encoder_rows says. Correct one of them."
                )
            self._check_finite(rows, method, given)
            ids = dummy.token_ids[:_MOST_MEDIA_TOKENS]
            caches = self._steps.caches(max(len(ids), count))
            step = self._steps.step([(ids, 0, len(ids))], caches, encoder_outputs=rows.to(self._dtype))
            what = f"{len(ids)} tokens of its dummy prompt beside encoder_outputs {_shape(rows)}"
            with self.blamed("forward", what, _HIDDEN):
                hidden = driver.forward(step)
            self.check_logits(self.check_hidden(hidden, len(ids), what), what)

    # Checks

    def check_hidden(self, hidden: Any, num_tokens: int, given: str) -> torch.Tensor:
        """What `forward` returned, if it is what it should be."""
        if not isinstance(hidden, torch.Tensor):
            raise ModelError(
                f"{self.name}: forward returned a {type(hidden).__name__} for {given}, expected {_HIDDEN}. Return "
                f"that alone; compute_logits makes the logits."
            )
        if hidden.dim() != 2 or len(hidden) != num_tokens or not hidden.is_floating_point():
            raise ModelError(
                f"{self.name}: forward returned {_shape(hidden)} of {hidden.dtype} for {given}, expected hidden "
                f"states ({num_tokens}, hidden_size), one row for each token. A batch is flat, without an axis for "
                f"prompts; return the rows of all tokens, and leave logits and tokens to compute_logits and the engine."
            )
        self._check_finite(hidden, "forward", given)
        return hidden

    def check_logits(self, hidden: torch.Tensor, given: str) -> None:
        """Compute the logits of the last row, and look at them."""
        if not self._wants_logits:
            return
        expected = f"logits (num_rows, {self.vocab_size})"
        after = f"the last row of what forward returned for {given}, {_shape(hidden)}"
        if hidden.shape[-1] == self.vocab_size:
            after += " (logits? forward returns hidden states)"
        with self.blamed("compute_logits(hidden_states, sampling_metadata)", after, expected):
            logits = self._model.compute_logits(hidden[-1:], SamplingMetadata(1))
        if not isinstance(logits, torch.Tensor):
            raise ModelError(
                f"{self.name}: compute_logits returned a {type(logits).__name__} for {after}, expected {expected}. "
                f"Return that alone."
            )
        if tuple(logits.shape) != (1, self.vocab_size):
            raise ModelError(
                f"{self.name}: compute_logits returned {_shape(logits)} for one row, expected (1, "
                f"{self.vocab_size}), since vocab_size of the config is {self.vocab_size}. Give the output head that "
                f"many rows, and keep one row of logits for each row of hidden states."
            )
        if bool(torch.isnan(logits).any()):
            self._refuse_nan("compute_logits", given)

    def _check_finite(self, values: torch.Tensor, method: str, given: str) -> None:
        if bool(torch.isnan(values).any()):
            self._refuse_nan(method, given)

    def _refuse_nan(self, method: str, given: str) -> None:
        raise ModelError(
            f"{self.name}: {method} computed NaN for {given}, expected numbers. Look for a division by zero or "
            f"weights that were not loaded"
            + (", or set dtype to bfloat16 or float32, whose range is larger." if self._dtype == torch.float16 else ".")
        )

    @contextmanager
    def blamed(self, method: str, given: str, expected: str) -> Iterator[None]:
        """Makes what a method raises the load's error.

        Raises `ConfigError` (a `ValueError`) where memory was too small for what the settings allow.
        """
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"{self.name}: {method} ran out of memory on the largest input that the settings allow, {given}. "
                f"Lower limit_mm_per_prompt, or the largest size of media in mm_processor_kwargs."
            ) from error
        except Exception as error:
            raise ModelError(
                f"{self.name}: {method} failed when it was tried out at load on {given}: {told_to_author(error)}. "
                f"Expected {expected}. Correct {method}, or what it was given."
            ) from error


def described(dummy: DummyMedia, kwargs: Mapping[str, Any], modality: str | None = None) -> str:
    """A dummy prompt and its mapped media, in words: counts and shapes."""
    counts = dummy.counts if modality is None else {modality: dummy.counts[modality]}
    items = " and ".join(f"{count} {name} item{'s' * (count > 1)}" for name, count in counts.items())
    shapes = ", ".join(f"{name} {_shape(value)}" for name, value in kwargs.items())
    prompt = f" in a prompt of {len(dummy.token_ids)} tokens" if modality is None else ""
    return f"its dummy data ({items}{prompt}{', mapped to ' if shapes else ''}{shapes})"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    if isinstance(value, list | tuple):
        shown = ", ".join(_shape(each) for each in value[:3])
        return f"[{shown}{', ...' if len(value) > 3 else ''}]"
    return type(value).__name__


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value; infinite for different shapes."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-12))
