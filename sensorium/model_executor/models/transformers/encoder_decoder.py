"""Encoders of text with a decoder, such as BART and T5: the prompt is what the encoder reads, as in `generate`.

To the engine a request is one sequence, its prompt and then what is generated. Here the prompt is a span that must not
be cut, at whose last token the decoder begins with its start token; every token behind it is one of the decoder's. So
the logits of the prompt's other tokens mean nothing, and are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.cache_spec import CacheSpec, FullAttentionSpec
from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.drivers import MediaRows
from sensorium.model_executor.models.transformers.by_request import ByRequestWay, Chunk, Pace, cache_in
from sensorium.model_executor.models.transformers.model import BY_REQUEST, Tier, TransformersForCausalLM
from sensorium.spans import WHOLE_PROMPT


class TransformersForSeq2SeqLM(TransformersForCausalLM):
    """A model of text of transformers with an encoder. It runs once a tier was chosen by `use`."""

    reads_source = True
    two_way = frozenset((WHOLE_PROMPT,))

    def __init__(self, *, config: EngineConfig, hf_model: nn.Module) -> None:
        super().__init__(config=config, hf_model=hf_model)
        self._start_id = _start_id(self.hf_model)

    def tiers(self) -> Iterator[Tier]:
        """See `TransformersForCausalLM`."""
        for pace in Pace:
            yield Tier(BY_REQUEST, partial(Seq2SeqWay, self.hf_model, pace, self._start_id))

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int], num_prompt_tokens: int | None = None) -> torch.Tensor:
        """See `TransformersForCausalLM`."""
        count = num_prompt_tokens or len(token_ids)
        source = torch.tensor([list(token_ids[:count])], device=self._device)
        written = torch.tensor([[self._start_id, *token_ids[count:]]], device=self._device)
        with self._attention.eager():
            logits: torch.Tensor = self.hf_model(
                input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=written, use_cache=False
            ).logits[0]
        return torch.cat((logits.new_zeros(count - 1, logits.shape[-1]), logits))


class Seq2SeqWay(ByRequestWay):
    """Runs a model request by request: its encoder once, then its decoder."""

    def __init__(self, model: nn.Module, pace: Pace, start_id: int) -> None:
        super().__init__(model, None, pace=pace)
        self.sources = _PromptEnds()
        self._start_id = start_id
        self._output_class: Any = None
        """Of what the encoder returns."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        media: MediaRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `ByRequestWay`. Decoders count positions from their cache on."""
        spans = attn_metadata.of_group(self.sources.group_index).row_spans
        ends = torch.zeros_like(positions) if spans is None else spans[1]
        return super().forward(input_ids, ends, kv_caches, attn_metadata)

    def _run(self, chunk: Chunk, cache: Any) -> tuple[torch.Tensor, Any]:
        if cache is not None:
            encoded, cache, written = cache
            parts = torch.split(chunk.ids, 1) if self._pace is Pace.TOKENS else (chunk.ids,)
            logits = []
            for ids in parts:
                written = torch.cat((written, ids))
                rows, cache = self._decode(encoded, cache, ids, written)
                logits.append(rows)
            return torch.cat(logits), (encoded, cache, written)
        # Where nothing says where the prompt ends, as in dummy steps, all is prompt.
        count = int(chunk.positions[0]) or len(chunk.ids)
        ids = chunk.ids[None, :count]
        model: Any = self._model[0]
        encoder = model.get_encoder()
        output = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
        self._output_class, encoded = type(output), output[0]
        written = torch.cat((ids.new_tensor([self._start_id]), chunk.ids[count:]))
        rows, cache = self._decode(encoded, None, written, written)
        return torch.cat((rows.new_zeros(count - 1, rows.shape[-1]), rows)), (encoded, cache, written)

    def _decode(
        self, encoded: torch.Tensor, cache: Any, ids: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Logits of `ids`, the last of what was `written`."""
        is_whole = self._pace is Pace.WHOLE
        output = self._model[0](
            encoder_outputs=self._output_class(last_hidden_state=encoded),
            attention_mask=written.new_ones(encoded.shape[:2]),
            decoder_input_ids=(written if is_whole else ids)[None],
            use_cache=not is_whole,
            **({} if cache is None or is_whole else {"past_key_values": cache}),
        )
        return output.logits[0, -len(ids) :], None if is_whole else cache_in(output)


class _PromptEnds(nn.Module):
    """Keeps next to nothing of each token. It is told where prompts end, as attention is that sees all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.group_index = 0

    def cache_spec(self) -> CacheSpec:
        """A number of each token."""
        return FullAttentionSpec(1, 1, 0)


def _start_id(model: Any) -> int:
    """The token that a decoder begins with, as `generate` has it.

    Raises `ModelError` (a `TypeError`) where no config says it.
    """
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found := getattr(config, name, None), int):
                return found
    raise ModelError(
        f"{type(model).__name__} of transformers: got no decoder_start_token_id, expected the id that its decoder "
        "begins with. Add it to generation_config.json or config.json."
    )
