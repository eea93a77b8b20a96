"""Items whose tokens and tensors are asked of the checkpoint's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium.errors import InvalidTypeError
from sensorium.inputs import InputContext
from sensorium.model_executor.models.processor_inputs import ProcessorClips, ProcessorPictures, ProcessorSounds
from tests.helpers.generic_media import hf_items, model_config_of
from tests.helpers.tiny_media import save_tiny_media


@pytest.mark.parametrize(
    ("model_type", "kind", "items"),
    [
        ("qwen2_audio", ProcessorSounds, [np.ones(n, dtype=np.float32) for n in (16_000, 40_000)]),
        ("qwen2_vl", ProcessorPictures, [Image.new("RGB", size, "red") for size in ((56, 84), (140, 56))]),
        ("qwen2_vl", ProcessorClips, [np.full((n, 56, 84, 3), 9, dtype=np.uint8) for n in (2, 6)]),
    ],
)
def test_tokens_and_tensors_are_the_processors(model_type: str, kind: Any, items: list[Any], tmp_path: Path) -> None:
    save_tiny_media(model_type, tmp_path)
    model_config = model_config_of(tmp_path)
    inputs, processor = kind(InputContext(model_config)), hf_items(model_config)
    lengths = set()
    for item in items:
        processed = processor.process_item(kind.modality, item)
        [pieces] = inputs.pieces(item)
        assert [token for token, count in pieces for _ in range(count)] == processed.token_ids.tolist()
        mapped = inputs.map([item])
        assert set(mapped) == {name for name in processed.tensors if not name.endswith("token_type_ids")}
        lengths.add(inputs.num_rows(pieces))
    assert len(lengths) == 2
    assert 0 not in lengths
    with pytest.raises(InvalidTypeError, match=f"Invalid {kind.modality} type"):
        inputs.pieces("nothing of the kind")
    largest = inputs.largest(10_000)
    assert inputs.num_rows(inputs.pieces(inputs.blank(largest))[0]) >= max(lengths)
