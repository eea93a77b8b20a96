"""A class that a plug-in package brings is served by a core in a process of its own, like one in the tree.

Models in the tree declare all hints, so nothing is tried out on dummy data when they are loaded. One written from the
extension API's page is: a served core once lacked the limits of media that its dummy data are made by, and refused
every such class that ran well offline.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, ModelRegistry
from sensorium.errors import ModelError
from tests.engine.async_helpers import SETTINGS, greedy, last, running
from tests.helpers import toy_models as toys

ROOT = str(Path(__file__).parents[2])
CLASSES = (toys.SeedPageModel, toys.TwoMethodModel)


def install_plugin(site: Path) -> None:
    """What pip leaves of a package whose entry point registers the toy classes."""
    names = ", ".join(repr(cls.__name__) for cls in CLASSES)
    (site / "toy_plugin.py").write_text(
        "def register():\n"
        "    from sensorium import ModelRegistry\n"
        "    import tests.helpers.toy_models  # registers the config class of the toys' own model_type\n"
        f"    for name in ({names}):\n"
        "        ModelRegistry.register_model(name, f'tests.helpers.toy_models:{name}')\n"
    )
    metadata = site / "toy_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sensorium.general_plugins]\ntoy = toy_plugin:register\n")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_plugins_class_is_served_by_a_core_process(
    cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, path = tmp_path / "site", tmp_path / "checkpoint"
    site.mkdir()
    path.mkdir()
    install_plugin(site)
    toys.save_checkpoint(cls, path)
    for folder in (ROOT, site):
        monkeypatch.syspath_prepend(str(folder))
    prompt = {"prompt_token_ids": [9, toys.IMAGE_TOKEN, 10], "multi_modal_data": {"image": toys.image(1, 5)}}
    settings = {"skip_tokenizer_init": True, "max_model_len": 128, "limit_mm_per_prompt": {"image": 2}}

    async def served() -> list[int]:
        async with running(path, in_process=False, **settings) as engine:
            output = await last(engine.generate(prompt, greedy()))
            return list(output.outputs[0].token_ids)

    [offline] = LLM(str(path), **{**SETTINGS, **settings}).generate(prompt, greedy())
    assert asyncio.run(served()) == list(offline.outputs[0].token_ids)


class WithoutEmbeds(toys.TwoMethodModel):
    """Has the two methods of tier 1, but its forward can't be given what they make."""

    def forward(self, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any) -> Any:
        return super().forward(input_ids, positions, kv_caches, attn_metadata)


def test_two_methods_without_inputs_embeds_say_what_is_missing(tmp_path: Path) -> None:
    ModelRegistry.register_model("WithoutEmbeds", WithoutEmbeds)
    toys.save_checkpoint(WithoutEmbeds, tmp_path)
    with pytest.raises(ModelError, match="no parameter 'inputs_embeds'"):
        LLM(str(tmp_path), **{**SETTINGS, "max_model_len": 128, "skip_tokenizer_init": True})
