"""Puts media rows between text rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from sensorium.errors import InvalidRequestError

if TYPE_CHECKING:
    from sensorium.multimodal import IndexMap, NestedTensors


@overload
def flatten_bn(x: torch.Tensor, *, concat: bool = ...) -> torch.Tensor: ...
@overload
def flatten_bn(x: list[torch.Tensor], *, concat: Literal[True]) -> torch.Tensor: ...
@overload
def flatten_bn(x: list[torch.Tensor], *, concat: Literal[False] = ...) -> list[torch.Tensor]: ...
def flatten_bn(x: Any, *, concat: bool = False) -> Any:
    """Undo the batching over prompts and items: merge the first two axes.

    A tensor `(B, N, ...)` becomes `(B * N, ...)`. A list of B tensors `(N_i, ...)` becomes the list of their members,
    or with `concat` one tensor.
    """
    if isinstance(x, torch.Tensor):
        return x.flatten(0, 1)
    if concat:
        return torch.cat(list(x))
    return [member for members in x for member in members]


def merge_multimodal_embeddings(
    input_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    multimodal_embeddings: NestedTensors,
    placeholder_token_id: int | list[int],
) -> torch.Tensor:
    """Write media rows to the placeholder tokens' rows, in place; returns `inputs_embeds`.

    `input_ids` `(num_tokens,)`, `inputs_embeds` `(num_tokens, hidden_size)`. The embeddings may be a tensor of any rank
    or nested lists; they are read row by row, in order. With several placeholder ids, the rows of all of them are
    needed, in the order of the prompt.

    Raises `InvalidRequestError` (a `ValueError`) unless there are as many rows as placeholders.
    """
    if isinstance(placeholder_token_id, int):
        mask = input_ids == placeholder_token_id
    else:
        mask = torch.isin(input_ids, torch.tensor(placeholder_token_id, device=input_ids.device))
    return _put_rows(inputs_embeds, mask, multimodal_embeddings)


def merge_multimodal_embeddings_from_map(
    inputs_embeds: torch.Tensor, multimodal_embeddings: NestedTensors, placeholder_map: IndexMap
) -> torch.Tensor:
    """Copy rows `placeholder_map.src` of the embeddings to rows `placeholder_map.dest`, in place."""
    rows = _flatten(multimodal_embeddings).to(inputs_embeds.dtype)
    device = inputs_embeds.device
    src = torch.as_tensor(placeholder_map.src, dtype=torch.long, device=device)
    dest = torch.as_tensor(placeholder_map.dest, dtype=torch.long, device=device)
    inputs_embeds[dest] = rows[src]
    return inputs_embeds


def embed_multimodal(
    input_ids: torch.Tensor,
    multimodal_token_id: int,
    get_text_embeds: Callable[[torch.Tensor], torch.Tensor],
    multimodal_embeds: NestedTensors | Callable[[torch.Tensor], NestedTensors],
) -> torch.Tensor:
    """Embed text tokens only, and put media rows between them: for a placeholder id outside the vocabulary.

    `multimodal_embeds` are the rows, or, as in vLLM 0.6.4, a function that returns them, given the placeholder ids.

    Returns `(num_tokens, hidden_size)`. Raises `InvalidRequestError` (a `ValueError`) unless there are as many rows as
    placeholders.
    """
    is_media = input_ids == multimodal_token_id
    text_embeds = get_text_embeds(input_ids[~is_media])
    merged = text_embeds.new_empty((input_ids.shape[0], text_embeds.shape[-1]))
    merged[~is_media] = text_embeds
    rows = multimodal_embeds(input_ids[is_media]) if callable(multimodal_embeds) else multimodal_embeds
    return _put_rows(merged, is_media, rows)


def _put_rows(inputs_embeds: torch.Tensor, mask: torch.Tensor, embeddings: NestedTensors) -> torch.Tensor:
    rows = _flatten(embeddings)
    num_placeholders = int(mask.sum())
    if len(rows) != num_placeholders:
        raise InvalidRequestError(
            f"Attempted to assign {_count_expression(embeddings)} = {len(rows)} multimodal tokens to "
            f"{num_placeholders} placeholders. Let the input processor write one placeholder for each row."
        )
    inputs_embeds[mask] = rows.to(inputs_embeds.dtype)
    return inputs_embeds


def _flatten(embeddings: NestedTensors) -> torch.Tensor:
    """Rows `(num_rows, hidden_size)` of nested tensors."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings.flatten(0, -2)
    return torch.cat([_flatten(member) for member in embeddings])


def _count_expression(embeddings: NestedTensors) -> str:
    """The number of rows as a sum: "2 x 576", or "(1 x 576) + (1 x 288)"."""
    if isinstance(embeddings, torch.Tensor):
        return " x ".join(str(size) for size in embeddings.shape[:-1])
    members: Iterable[NestedTensors] = embeddings
    return " + ".join(f"({_count_expression(member)})" for member in members)
