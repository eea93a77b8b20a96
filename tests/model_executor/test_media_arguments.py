"""Mapped media as arguments of an encoder: what goes to the device, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sensorium.model_executor.drivers.embeddings import EmbeddingsDriver
from sensorium.model_executor.drivers.media_arguments import batch_kwargs
from sensorium.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerForConditionalGeneration
from sensorium.model_executor.models.qwen2_audio import Qwen2AudioForConditionalGeneration
from sensorium.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

ELSEWHERE = torch.device("meta")


def test_arguments_that_python_code_reads_stay_on_the_host() -> None:
    """Reading a grid off a GPU waited for all steps in flight, in every step that encoded a picture."""
    items = [{"pixels": torch.zeros(4, 2), "grid": torch.tensor([[1, 2, 2]])} for _ in range(2)]
    moved = batch_kwargs(items, ELSEWHERE, torch.bfloat16, ["grid"])
    assert moved["pixels"].device == ELSEWHERE
    assert moved["pixels"].dtype == torch.bfloat16
    assert moved["grid"].tolist() == [[[1, 2, 2]], [[1, 2, 2]]]
    assert batch_kwargs(items, ELSEWHERE, torch.bfloat16)["grid"].device == ELSEWHERE


def test_the_model_says_which_stay() -> None:
    class Model(nn.Module):
        mm_host_kwargs = ("grid",)

        def encode(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            assert (pixels.device, grid.device) == (ELSEWHERE, torch.device("cpu"))
            return pixels

        def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            return inputs_embeds

    driver = EmbeddingsDriver(
        Model(), encode_method="encode", embed_method="embed", vocab_size=1, dtype=torch.float32, device=ELSEWHERE
    )
    assert driver.encoder_kwargs([{"pixels": torch.zeros(3), "grid": torch.ones(3)}])["grid"].device.type == "cpu"
    driver.call_encoder(driver.encoder_kwargs([{"pixels": torch.zeros(3), "grid": torch.ones(3)}]))


@pytest.mark.parametrize(
    ("model_class", "names"),
    [
        (Qwen2VLForConditionalGeneration, {"image_grid_thw", "video_grid_thw"}),
        (
            Qwen2_5OmniThinkerForConditionalGeneration,
            {"image_grid_thw", "video_grid_thw", "feature_attention_mask"},
        ),
        (Qwen2AudioForConditionalGeneration, {"feature_attention_mask"}),
    ],
)
def test_our_models_read_nothing_off_the_device(model_class: type, names: set[str]) -> None:
    assert set(model_class.mm_host_kwargs) == names  # type: ignore[attr-defined]
