"""The quantization that the page shows how to write works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.model_executor.layers.linear import LinearBase
from sensorium.model_executor.layers.quantization import registry

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_plug_in_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    plugin = tmp_path / "half.py"
    plugin.write_text(source)
    params = SamplingParams(temperature=0, max_tokens=8)
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 1 << 24}
    llm = LLM("demo", plugins=[str(plugin)], quantization="half", **settings)
    lines = llm.engine.report.lines()
    assert any(line.startswith("weights: half weights in") and "self_attn.qkv_proj" in line for line in lines)
    got = llm.generate(["What is two and two?"], params)[0].outputs[0].token_ids
    want = LLM("demo", **settings).generate(["What is two and two?"], params)[0].outputs[0].token_ids
    assert list(got) == list(want)
    layers = [each for each in llm.engine.core.executor.worker.model.modules() if isinstance(each, LinearBase)]  # type: ignore[attr-defined]
    assert {layer.packed.dtype for layer in layers} == {torch.bfloat16}
