"""What an outer model gives to its trunk is captured item by item, and given again in pieces, whatever it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensorium.model_executor.drivers import MediaRows
from sensorium.model_executor.models.transformers.media_rows import TrunkInputs
from sensorium.model_executor.models.transformers.refusal import CannotRunError

PLACEHOLDER, VOCAB_SIZE, WIDTH = 9, 10, 4
PROMPT = torch.tensor([1, 9, 9, 2, 3, 9, 9, 9, 4])
PIXELS = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


class Trunk(nn.Module):
    """Takes rows, and whatever comes with them."""

    def forward(self, inputs_embeds: torch.Tensor, position_ids: Any = None, **others: Any) -> torch.Tensor:
        return inputs_embeds


class Outer(nn.Module):
    """Puts pixels where placeholders stand, and computes tensors beside as real models do."""

    def __init__(self, *beside: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.per_layer = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Embedding(VOCAB_SIZE, 2 * WIDTH)
        self.trunk = Trunk()
        self._beside = beside

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: torch.Tensor, pixels: Any = None, **_: Any) -> torch.Tensor:
        rows, others = self.embed_tokens(input_ids).clone(), {}
        is_media = input_ids == PLACEHOLDER if pixels is not None else torch.zeros_like(input_ids, dtype=torch.bool)
        if pixels is not None:
            rows[is_media] = pixels
        if "of_ids" in self._beside:
            of_ids = self.per_layer(input_ids.masked_fill(is_media, 0)).reshape(1, -1, 2, WIDTH)
            others["of_ids"] = of_ids + 7 * is_media[..., None, None]
        if pixels is not None and "mask" in self._beside:
            others["mask"] = is_media
        if pixels is not None and "levels" in self._beside:
            others["levels"] = [pixels * 2, pixels * 3]
        if pixels is not None and "whole" in self._beside:
            others["whole"] = torch.ones(2, 3)
        return self.trunk(inputs_embeds=rows, **others)


def learned(*beside: str) -> TrunkInputs:
    outer = Outer(*beside)
    inputs = TrunkInputs(outer, outer.trunk, VOCAB_SIZE)
    capture = inputs.compared(PROMPT, {"pixels": PIXELS})
    assert capture.media.tolist() == (PROMPT == PLACEHOLDER).tolist()
    inputs.learn([capture])
    return inputs


@pytest.mark.parametrize("beside", [(), ("mask", "levels"), ("of_ids",), ("mask", "levels", "of_ids")])
@pytest.mark.parametrize(("start", "end"), [(0, 9), (0, 2), (2, 7), (3, 5), (6, 9)])
@torch.inference_mode()
def test_pieces_get_what_the_whole_prompt_got(beside: tuple[str, ...], start: int, end: int) -> None:
    """Two items, captured each within its own part, in a piece that cuts them, beside a text row of another request."""
    inputs = learned(*beside)
    whole = inputs.run(PROMPT, {"pixels": PIXELS})
    placed = []
    for first, last, pixels in ((1, 3, PIXELS[:2]), (5, 8, PIXELS[2:])):
        rows = inputs.item_rows(PROMPT[first:last], {"pixels": pixels}, torch.arange(last - first))
        inside = np.arange(max(first, start), min(last, end))
        if len(inside):
            placed.append((inside - start + 1, rows.part(int(inside[0]) - first, int(inside[-1]) + 1 - first)))
    media = MediaRows.of(placed, torch.device("cpu")) if placed else None
    ids = torch.cat([torch.tensor([5]), PROMPT[start:end].masked_fill(PROMPT[start:end] == PLACEHOLDER, 0)])
    assert torch.equal(inputs.embed(ids, media)[1:], whole.rows[start:end])
    made = inputs.arguments(ids, media)
    is_media = PROMPT == PLACEHOLDER
    if "of_ids" in beside:
        assert torch.equal(made["of_ids"][0, 1:], whole.others["of_ids"][0, start:end])
    if "mask" in beside and media is not None:
        assert made["mask"][0].tolist() == [False, *is_media[start:end].tolist()]
        levels = slice(int(is_media[:start].sum()), int(is_media[:end].sum()))
        assert all(map(torch.equal, made["levels"], [each[levels] for each in whole.others["levels"]]))
    if media is None:
        assert made.keys() <= {"of_ids"}


def test_tensors_that_belong_to_no_rows_are_refused() -> None:
    with pytest.raises(CannotRunError, match="computes whole for its decoder, neither for tokens nor for media rows"):
        learned("whole")
