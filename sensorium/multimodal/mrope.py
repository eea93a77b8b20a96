"""Positions of M-RoPE: three rows (time, height, width) per token, in which media occupy a box.

Source: "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", section 2.1,
and `get_rope_index` of Hugging Face's `Qwen2VLModel` and `Qwen2_5_VLModel`. Plain NumPy; called by
preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sensorium.errors import InvalidRequestError, ModelError, ProcessorError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class MRopeBox:
    """One media item in the prompt: `t * h * w` rows from `offset` on, in the order time, height, width."""

    offset: int
    t: int
    h: int
    w: int
    """Rows along each axis, after the merging of patches."""
    time_step: float | int = 1
    """Distance of two frames in positions; products are cut off to integers."""

    @property
    def num_rows(self) -> int:
        """Number of decoder rows."""
        return self.t * self.h * self.w


def mrope_positions(num_tokens: int, boxes: Iterable[MRopeBox]) -> tuple[IntArray, int]:
    """Positions `(3, num_tokens)` of a prompt with media boxes, and the delta for what follows it.

    Text counts on in all three rows. A box starts behind the text before it, and the text behind it starts
    `max(h, w)` later: space, not time, moves the position on. An output token at index i of the sequence has
    position `i + delta`.

    For example, two text tokens, a box of 1 × 2 × 2, and one text token:

        time    0 1 2 2 2 2 4
        height  0 1 2 2 3 3 4
        width   0 1 2 3 2 3 4     delta = 5 - 7 = -2
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    cursor = 0  # first token without a position
    position = 0  # its position, in all rows
    for box in sorted(boxes, key=lambda box: box.offset):
        num_text = box.offset - cursor
        positions[:, cursor : box.offset] = np.arange(position, position + num_text)
        position += num_text
        cursor = box.offset + box.num_rows
        grid = positions[:, box.offset : cursor].reshape(3, box.t, box.h, box.w)
        grid[0] = (position + _time_offsets(box))[:, None, None]
        grid[1] = (position + np.arange(box.h))[None, :, None]
        grid[2] = (position + np.arange(box.w))[None, None, :]
        position += max(box.h, box.w)
    positions[:, cursor:] = np.arange(position, position + num_tokens - cursor)
    return positions, int(positions.max(initial=-1)) + 1 - num_tokens


def _time_offsets(box: MRopeBox) -> IntArray:
    """Positions of the frames relative to the first, in single precision as in the reference."""
    frames = np.arange(box.t)
    if isinstance(box.time_step, int):
        return frames * box.time_step
    return (frames.astype(np.float32) * np.float32(box.time_step)).astype(np.int64)


def get_mrope_positions(
    token_ids: Sequence[int],
    *,
    hf_config: PretrainedConfig,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    second_per_grid_ts: Sequence[float] | None = None,
) -> tuple[IntArray, int]:
    """Positions `(3, len(token_ids))` and delta of a prompt of the Qwen2-VL and Qwen2.5-VL families.

    Items are found by the config's image and video token ids, in order; neighbours without a separator are
    told apart by their grids, `(num_items, 3)` patches along time, height and width. `second_per_grid_ts`:
    seconds between two frames of each video (Qwen2.5-VL); without it, one.

    Raises `InvalidRequestError` if tokens and grids don't match.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    vision_config = hf_config.vision_config
    merge = int(vision_config.spatial_merge_size)
    tokens_per_second = getattr(vision_config, "tokens_per_second", None)
    boxes = _boxes("image", ids, token_id_of(hf_config, "image"), _grids(image_grid_thw), merge, None)
    video_grids = _grids(video_grid_thw)
    steps: list[float | int] | None = None
    if tokens_per_second is not None:
        seconds = [1] * len(video_grids) if second_per_grid_ts is None else list(second_per_grid_ts)
        steps = [_time_step(tokens_per_second, second) for second in seconds]
        if len(steps) != len(video_grids):
            raise InvalidRequestError(
                f"got {len(steps)} values, expected one for each of {len(video_grids)} "
                f"videos. Correct the input mapper.",
                field="second_per_grid_ts",
            )
    boxes += _boxes("video", ids, token_id_of(hf_config, "video"), video_grids, merge, steps)
    return mrope_positions(len(ids), boxes)


def _time_step(tokens_per_second: float, second: Any) -> float | int:
    if isinstance(second, int):
        return tokens_per_second * second
    return float(np.float32(tokens_per_second) * np.float32(second))


def _grids(grid_thw: Any) -> IntArray:
    """Grids from tensors, arrays or lists as `(num_items, 3)`."""
    if grid_thw is None:
        return np.empty((0, 3), dtype=np.int64)
    return np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)


def token_id_of(hf_config: PretrainedConfig, modality: str) -> int | None:
    """The config's token id for a modality, under the name of either generation of Hugging Face configs."""
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        token_id = getattr(hf_config, name, None)
        if isinstance(token_id, int):
            return token_id
    return None


def _boxes(
    modality: str,
    ids: IntArray,
    token_id: int | None,
    grids: IntArray,
    merge: int,
    time_steps: Sequence[float | int] | None,
) -> list[MRopeBox]:
    """The boxes of one modality: its tokens' positions, cut by the grids' sizes."""
    positions = np.flatnonzero(ids == token_id) if token_id is not None else np.empty(0, dtype=np.int64)
    sizes = grids // np.array([1, merge, merge])
    num_rows = sizes.prod(axis=1)
    starts = np.cumsum(num_rows) - num_rows
    if num_rows.sum() != len(positions) or (num_rows < 1).any():
        raise InvalidRequestError(
            f"{modality} tokens: got {len(positions)} in the prompt, expected {int(num_rows.sum())} for "
            f"{len(grids)} grids. Correct the input processor or mapper."
        )
    if len(positions) and (positions[starts + num_rows - 1] - positions[starts] != num_rows - 1).any():
        raise InvalidRequestError(
            f"{modality} tokens: got an item with other tokens inside, expected one run of tokens for each "
            f"grid. Correct the input processor."
        )
    steps = time_steps if time_steps is not None else [1] * len(grids)
    return [
        MRopeBox(int(positions[start]), int(size[0]), int(size[1]), int(size[2]), step)
        for start, size, step in zip(starts, sizes, steps, strict=True)
    ]


def positions_from_kwargs(
    token_ids: Sequence[int], hf_config: PretrainedConfig, mm_kwargs: Mapping[str, Any]
) -> tuple[IntArray, int]:
    """`get_mrope_positions` of a request, from its mapped keyword arguments.

    Raises `ProcessorError` (a `RuntimeError`) if there are media without a grid.
    """
    names = ("image_grid_thw", "video_grid_thw")
    if mm_kwargs and not any(name in mm_kwargs for name in names):
        raise ProcessorError(
            f"M-RoPE: got the keyword arguments {sorted(mm_kwargs)} from the input mapper, expected "
            f"{' or '.join(names)} among them. Return the grids, or give the model class get_mrope_input_positions."
        )
    image_grids, video_grids = (_stacked_grids(mm_kwargs.get(name)) for name in names)
    seconds = mm_kwargs.get("second_per_grid_ts")
    return get_mrope_positions(
        token_ids,
        hf_config=hf_config,
        image_grid_thw=image_grids,
        video_grid_thw=video_grids,
        second_per_grid_ts=None if seconds is None else np.ravel(_leaves(seconds)).tolist(),
    )


def _stacked_grids(grids: Any) -> IntArray | None:
    return None if grids is None else np.concatenate([np.reshape(leaf, (-1, 3)) for leaf in _leaves(grids)])


def _leaves(value: Any) -> list[Any]:
    return [np.asarray(leaf) for leaf in (value if isinstance(value, list | tuple) else [value])]


def checked_positions(positions: Any, num_tokens: int) -> tuple[IntArray, int]:
    """What a model class's `get_mrope_input_positions` returned, as positions `(3, num_tokens)` and delta.

    Raises `ModelError` (a `TypeError`) for anything else.
    """
    try:
        array = np.asarray(positions[0], dtype=np.int64)
        delta = int(positions[1])
    except (TypeError, ValueError, IndexError) as exc:
        raise ModelError(
            "get_mrope_input_positions: got something other than (positions, delta), expected a tensor of shape (3, "
            f"{num_tokens}) and an int. Correct the model class."
        ) from exc
    if array.shape != (3, num_tokens):
        raise ModelError(
            f"get_mrope_input_positions: got positions of shape {array.shape}, expected (3, {num_tokens}). "
            "Correct the model class."
        )
    return array, delta
