"""Vision and audio towers against Hugging Face's, and the index arithmetic in front of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.model_executor.layers.tower import TowerPlan, frame_starts, patch_positions
from sensorium.model_executor.model_loader import fill_model, finish_loading
from sensorium.model_executor.models.clip import CLIPVisionModel
from sensorium.model_executor.models.pixtral import PixtralVisionModel
from sensorium.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer, windows_of
from sensorium.model_executor.models.qwen2_audio import Qwen2AudioEncoder, num_rows_of
from sensorium.model_executor.models.qwen2_vision import Qwen2VisionTransformer
from sensorium.model_executor.models.qwen3_vision import Qwen3VisionTransformer
from sensorium.model_executor.models.siglip import SiglipVisionModel
from sensorium.worker import tower_graphs
from sensorium.worker.tower_graphs import TowerGraphs
from tests.helpers.checkpoints import make_hf_model
from tests.helpers.direct import relative_error
from tests.helpers.graphs import HostReplay

TOLERANCE = 1e-5


def filled(tower: nn.Module, reference: nn.Module) -> Any:
    """A tower with the weights of Hugging Face's, laid out for the kernels."""
    fill_model(tower, reference.state_dict().items())
    finish_loading(tower)
    return tower


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layers", [[-1], [-2], [1], [0, -2, -1]], ids=str)
@pytest.mark.parametrize(("family", "tower"), [("llava", CLIPVisionModel), ("llava_siglip", SiglipVisionModel)])
@torch.inference_mode()
def test_features_of_any_layers(family: str, tower: Any, layers: list[int]) -> None:
    reference = make_hf_model(family).model.vision_tower
    pixels = noise(3, 3, 56, 56)
    states = reference(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in layers], dim=-1)
    ours = filled(tower(reference.config, layers), reference)
    assert relative_error(ours(pixels), expected) < TOLERANCE


@torch.inference_mode()
def test_siglip_without_chosen_layers_ends_with_its_norm() -> None:
    reference = make_hf_model("llava_siglip").model.vision_tower
    pixels = noise(2, 3, 56, 56)
    ours = filled(SiglipVisionModel(reference.config), reference)
    assert relative_error(ours(pixels), reference(pixels).last_hidden_state) < TOLERANCE


def test_layers_behind_the_last_feature_are_not_built() -> None:
    reference = make_hf_model("llava").model.vision_tower
    assert len(CLIPVisionModel(reference.config, [-2]).encoder.layers) == reference.config.num_hidden_layers - 1


QWEN_TOWERS = [
    ("qwen2_vl", Qwen2VisionTransformer),
    ("qwen2_5_vl", Qwen2_5_VisionTransformer),
    ("qwen3_vl", Qwen3VisionTransformer),
]
GRIDS = [
    [(1, 4, 4)],
    [(1, 2, 2)],
    [(1, 6, 10), (1, 2, 12), (1, 8, 4)],
    [(3, 6, 4), (1, 10, 14), (2, 2, 2)],
]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize(("family", "tower"), QWEN_TOWERS)
@torch.inference_mode()
def test_items_of_many_sizes_in_one_call(family: str, tower: Any, grids: list[tuple[int, int, int]]) -> None:
    reference = make_hf_model(family).model.visual
    ours = filled(tower(reference.config), reference)
    patches = noise(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14)
    output = reference(patches, grid_thw=torch.tensor(grids))
    expected = torch.cat([output.pooler_output, *getattr(output, "deepstack_features", [])], -1)
    together = ours(patches, grids)
    assert relative_error(together, expected) < TOLERANCE
    sizes = [t * h * w for t, h, w in grids]
    alone = [ours(part, [grid]) for part, grid in zip(patches.split(sizes), grids, strict=True)]
    assert relative_error(together, torch.cat(alone)) < TOLERANCE


@pytest.mark.parametrize(("family", "tower"), QWEN_TOWERS)
@torch.inference_mode()
def test_recorded_passes_give_the_same_rows(family: str, tower: Any) -> None:
    """For items of other sizes than those of the pass that was recorded; padding may hold anything."""
    reference = make_hf_model(family).model.visual
    ours = filled(tower(reference.config), reference)
    capture = HostReplay()
    graphs = TowerGraphs(capture, ours, torch.device("cpu"), torch.float32)
    for seed, grids in enumerate([*GRIDS, *GRIDS[::-1]]):
        patches = noise(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14, seed=seed)
        ours.recorder = None
        expected = ours(patches, grids)
        ours.recorder = graphs
        for graph in graphs._graphs.values():
            graph.pixels.fill_(torch.nan)
        assert relative_error(ours(patches, grids), expected) < TOLERANCE
    assert capture.num_replays >= len(GRIDS)


@pytest.mark.parametrize(("family", "tower"), QWEN_TOWERS)
@torch.inference_mode()
def test_many_items_go_through_several_recorded_passes(
    family: str, tower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures of a million pixels were more than a recorded pass takes, and were launched call by call."""
    monkeypatch.setattr(tower_graphs, "MAX_PATCHES", 90)
    reference = make_hf_model(family).model.visual
    ours = filled(tower(reference.config), reference)
    grids = [(1, 6, 10), (1, 2, 12), (1, 8, 4), (1, 10, 14), (1, 4, 4), (1, 2, 2)]
    patches = noise(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14)
    expected = ours(patches, grids)
    capture = HostReplay()
    ours.recorder = TowerGraphs(capture, ours, torch.device("cpu"), torch.float32)
    for _ in range(3):
        assert relative_error(ours(patches, grids), expected) < TOLERANCE
    # 60 + 24, 32, 140 (too large for any), 16 + 4: recorded when they come again.
    assert capture.num_replays == 2 * 3


@pytest.mark.parametrize("square", [1, 2])
@torch.inference_mode()
def test_pixtrals_pictures_of_many_sizes(square: int) -> None:
    """In one call, alone, and by a recorded pass of another size; patches stand square by square."""
    reference = make_hf_model("llava_pixtral").model.vision_tower
    ours = filled(PixtralVisionModel(reference.config, square=square), reference)
    graphs = TowerGraphs(HostReplay(), ours, torch.device("cpu"), torch.float32)
    for sizes in ([(28, 28)], [(84, 140), (28, 168), (112, 56)], [(56, 28), (28, 28), (28, 56), (168, 84)]) * 2:
        pictures = [noise(1, 3, *size, seed=seed) for seed, size in enumerate(sizes)]
        ours.recorder = None
        rows, grids = ours.encode(pictures, torch.tensor(sizes))
        for picture, part, grid in zip(pictures, rows.split([h * w for _, h, w in grids]), grids, strict=True):
            order = patch_positions(grid, square) @ np.array([grid[2], 1])
            expected = reference(picture).last_hidden_state[0][order]
            assert relative_error(part, expected) < TOLERANCE
        ours.recorder = graphs
        for graph in graphs._graphs.values():
            graph.pixels.fill_(torch.nan)
        assert relative_error(ours.encode(pictures, torch.tensor(sizes))[0], rows) < TOLERANCE
    assert len(graphs) > 0


def test_a_size_is_recorded_when_asked_for_again() -> None:
    """Or in idle time, once it was asked for; never a size that nobody wants."""
    reference = make_hf_model("qwen2_vl").model.visual
    ours = filled(Qwen2VisionTransformer(reference.config), reference)
    graphs = TowerGraphs(HostReplay(), ours, torch.device("cpu"), torch.float32)
    ours.recorder = graphs
    patches = noise(64, 3 * 2 * 14 * 14)
    assert not graphs.record_next()
    for num_recorded in (0, 1, 1):
        ours(patches, [(1, 8, 8)])
        assert len(graphs) == num_recorded
    ours(patches[:16], [(4, 2, 2)])  # as many patches, more frames
    assert len(graphs) == 1
    assert graphs.record_next()
    assert len(graphs) == 2
    assert not graphs.record_next()


def test_sizes_that_nobody_comes_back_with_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last ones, as many as may be recorded are remembered."""
    monkeypatch.setattr(tower_graphs, "MAX_GRAPHS", 2)
    reference = make_hf_model("qwen2_vl").model.visual
    ours = filled(Qwen2VisionTransformer(reference.config), reference)
    graphs = TowerGraphs(HostReplay(), ours, torch.device("cpu"), torch.float32)
    ours.recorder = graphs
    patches = noise(96, 3 * 2 * 14 * 14)
    for num_frames in (1, 2, 4, 8):
        ours(patches[: 4 * num_frames], [(num_frames, 2, 2)])
        assert len(graphs._asked) <= 2
    ours(patches[:4], [(1, 2, 2)])  # forgotten meanwhile
    assert len(graphs) == 0


def test_a_tower_that_cannot_be_recorded_runs_call_by_call() -> None:
    class Refusing:
        def record(self, run: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    reference = make_hf_model("qwen2_vl").model.visual
    ours = filled(Qwen2VisionTransformer(reference.config), reference)
    graphs = TowerGraphs(Refusing(), ours, torch.device("cpu"), torch.float32)
    patches = noise(16, 3 * 2 * 14 * 14)
    expected = ours(patches, [(1, 4, 4)])
    ours.recorder = graphs
    for _ in range(3):
        assert torch.equal(ours(patches, [(1, 4, 4)]), expected)
    assert graphs.refusal is not None
    assert "not permitted" in graphs.refusal
    assert not graphs.record_next()


def test_padding_of_a_plan() -> None:
    plan = TowerPlan(
        12,
        {"positions": np.arange(24, dtype=np.int32).reshape(12, 2)},
        {"order": np.array([2, 0, 1], dtype=np.int32)},
        {"frames": np.array([0, 4, 8, 12], dtype=np.int32), "windows": np.array([0, 12], dtype=np.int32)},
    )
    assert plan.size() == (64, 4, 1)
    arrays = plan.arrays(plan.size())
    assert arrays["positions"].shape == (64, 2)
    assert not arrays["positions"][12:].any()
    assert arrays["order"].tolist() == [2, 0, 1, *range(3, 16)]
    assert arrays["frames"].tolist() == [0, 4, 8, 12, 12]
    assert arrays["windows"].tolist() == [0, 12]
    assert TowerPlan(5476).size() == (5632,)
    assert plan.arrays()["frames"] is plan.starts["frames"]


def test_windows_of_a_small_frame() -> None:
    order, lengths = windows_of([(1, 4, 6)], merge_size=2, window=2)
    assert order.tolist() == [0, 1, 3, 4, 2, 5]
    assert lengths.tolist() == [4, 2]


def test_windows_do_not_reach_over_frames_or_items() -> None:
    order, lengths = windows_of([(2, 4, 4), (1, 6, 4)], merge_size=2, window=2)
    assert order.tolist() == list(range(14))
    assert lengths.tolist() == [4, 4, 4, 2]


def test_patch_positions_go_square_by_square() -> None:
    rows, columns = patch_positions((1, 2, 4), merge_size=2).T.astype(int).tolist()
    assert rows == [0, 0, 1, 1, 0, 0, 1, 1]
    assert columns == [0, 1, 0, 1, 2, 3, 2, 3]
    assert np.array_equal(patch_positions((3, 2, 4), 2), np.tile(patch_positions((1, 2, 4), 2), (3, 1)))


def test_each_frame_is_a_sequence() -> None:
    assert frame_starts([(2, 2, 4), (1, 2, 2)]).tolist() == [0, 8, 16, 20]


@pytest.mark.parametrize("num_frames", [[100], [3], [57, 100, 4, 99], [8, 7, 6, 5]], ids=str)
@torch.inference_mode()
def test_sounds_of_many_lengths_in_one_call(num_frames: list[int]) -> None:
    """Only the rows of the sound itself are computed; the reference computes all and masks."""
    model = make_hf_model("qwen2_audio").model
    reference = model.audio_tower
    features = noise(len(num_frames), 16, 100)
    ours = filled(Qwen2AudioEncoder(reference.config), reference)
    parts = torch.split(ours(features, num_frames), [num_rows_of(each) for each in num_frames])
    for sound, part, frames in zip(features, parts, num_frames, strict=True):
        length = (frames - 1) // 2 + 1
        mask = torch.zeros(1, 1, 50, 50).masked_fill(torch.arange(50) >= length, -torch.inf)
        expected = reference(sound[None], attention_mask=mask).last_hidden_state[0, : len(part)]
        assert relative_error(part, expected) < TOLERANCE


@torch.inference_mode()
def test_padding_behind_a_sound_is_never_seen() -> None:
    reference = make_hf_model("qwen2_audio").model.audio_tower
    ours = filled(Qwen2AudioEncoder(reference.config), reference)
    features = noise(1, 16, 100)
    other = features.clone()
    other[..., 31:] = 50.0  # 29 frames have 15 rows, the last of which sees frame 30
    assert torch.equal(ours(features, [29]), ours(other, [29]))


def test_a_feature_layer_that_is_not_there_is_refused() -> None:
    reference = make_hf_model("llava").model.vision_tower
    with pytest.raises(ModelError, match=r"vision_feature_layer: got \[-5\], expected numbers from -4 to 3"):
        CLIPVisionModel(reference.config, [-5])
