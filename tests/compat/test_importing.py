"""What `vllm` means in a plug-in file, and that it means nothing anywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensorium.errors import ConfigError
from sensorium.inputs import INPUT_REGISTRY
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.plugins import load_plugin


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_names_of_vllm_are_ours(tmp_path: Path) -> None:
    file = write(
        tmp_path / "as_in_v0.py",
        "import vllm.multimodal\n"
        "from vllm.inputs import INPUT_REGISTRY\n"
        "from vllm.multimodal import MULTIMODAL_REGISTRY\n"
        "from vllm.model_executor.models.interfaces import SupportsMultiModal\n"
        "import vllm.multimodal.utils as utils\n"
        "def later():\n"
        "    from vllm.sequence import SequenceData\n"
        "    return SequenceData\n",
    )
    module = load_plugin(file)
    assert module.MULTIMODAL_REGISTRY is module.vllm.multimodal.MULTIMODAL_REGISTRY is MULTIMODAL_REGISTRY
    assert module.INPUT_REGISTRY is INPUT_REGISTRY
    assert module.SupportsMultiModal is SupportsMultiModal
    assert module.utils.repeat_and_pad_token(7, repeat_count=2) == [7, 7]
    assert module.later().from_seqs([1, 2]).prompt_token_ids == (1, 2), "also when the plug-in has long been loaded"


def test_a_real_vllm_stays_what_it_is_for_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "site" / "vllm" / "__init__.py", "REAL = True\n")
    write(tmp_path / "site" / "user_of_vllm.py", "import vllm\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = write(
        tmp_path / "has_both.py",
        "import user_of_vllm\nimport vllm\nREAL = user_of_vllm.vllm\nOURS = vllm\n",
    )
    module = load_plugin(file)
    assert module.REAL.REAL
    assert not hasattr(module.OURS, "REAL")
    import vllm

    assert vllm is module.REAL


def test_a_dot_means_the_file_beside_it_or_the_model_of_vllm(tmp_path: Path) -> None:
    write(tmp_path / "tower_beside.py", "from vllm.multimodal import MULTIMODAL_REGISTRY\nfrom .deeper import DEPTH\n")
    write(tmp_path / "deeper.py", "DEPTH = 2\n")
    file = write(
        tmp_path / "with_dots.py",
        "from .interfaces import SupportsMultiModal\n"
        "from .tower_beside import DEPTH, MULTIMODAL_REGISTRY\n"
        "from . import deeper\n",
    )
    module = load_plugin(file)
    assert module.SupportsMultiModal is SupportsMultiModal
    assert module.MULTIMODAL_REGISTRY is MULTIMODAL_REGISTRY
    assert module.DEPTH == module.deeper.DEPTH == 2


def test_a_helper_that_is_imported_by_its_plain_name_is_a_plugin_too(tmp_path: Path) -> None:
    write(tmp_path / "plain_helper_of_v0.py", "from vllm.multimodal import MULTIMODAL_REGISTRY\n")
    module = load_plugin(write(tmp_path / "with_helper.py", "import plain_helper_of_v0 as helper\n"))
    assert module.helper.MULTIMODAL_REGISTRY is MULTIMODAL_REGISTRY


def test_a_package_is_a_plugin_with_all_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_for_vllm"
    write(package / "__init__.py", "")
    write(package / "parts.py", "from vllm.multimodal import MULTIMODAL_REGISTRY\n")
    write(package / "model.py", "from .parts import MULTIMODAL_REGISTRY\nfrom .interfaces import SupportsMultiModal\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = load_plugin("package_for_vllm.model")
    assert module.MULTIMODAL_REGISTRY is MULTIMODAL_REGISTRY
    assert module.SupportsMultiModal is SupportsMultiModal


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from vllm.no_such_module import X", "No module named 'vllm.no_such_module' for plug-ins"),
        ("from vllm.multimodal import NoSuchName", "vllm.multimodal has no name 'NoSuchName' for plug-ins"),
        ("from .no_such_sibling import X", "No module named 'vllm.model_executor.models.no_such_sibling'"),
        ("from vllm.model_executor.models.gemma3 import X", "No module named"),
    ],
)
def test_a_name_that_is_not_there_says_so(line: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "asks_too_much.py", f"{line}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugin(file)
    assert "beside it and import it with a dot. Correct it" in str(caught.value)


def test_a_name_without_a_meaning_says_what_to_use_instead(tmp_path: Path) -> None:
    file = write(tmp_path / "does_all_at_once.py", "from vllm.multimodal.processing import BaseMultiModalProcessor\n")
    with pytest.raises(ConfigError, match="register an input processor and an input mapper, as files of"):
        load_plugin(file)


def test_attention_of_other_libraries_is_ours(tmp_path: Path) -> None:
    file = write(
        tmp_path / "tower_of_v0.py",
        "from flash_attn import flash_attn_func, flash_attn_varlen_func\n"
        "from xformers import ops as xops\n"
        "from xformers.ops.fmha.attn_bias import BlockDiagonalMask\n",
    )
    tower = load_plugin(file)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
    expected = expected.transpose(1, 2)
    assert torch.allclose(tower.flash_attn_func(q, k, v), expected, atol=1e-6)
    assert torch.allclose(tower.xops.memory_efficient_attention(q, k, v), expected, atol=1e-6)
    flat = [each.flatten(0, 1) for each in (q, k, v)]
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    varlen = tower.flash_attn_varlen_func(*flat, starts, starts, 5, 5)
    assert torch.allclose(varlen, expected.flatten(0, 1), atol=1e-6)
    mask = tower.BlockDiagonalMask.from_seqlens([5, 5])
    masked = tower.xops.memory_efficient_attention_forward(*(each[None] for each in flat), mask, p=0.0)
    assert torch.allclose(masked[0], expected.flatten(0, 1), atol=1e-6)
    bias = torch.full((5, 5), -torch.inf).triu(1)
    causal = tower.flash_attn_func(q, k, v, causal=True)
    assert torch.allclose(tower.xops.memory_efficient_attention(q, k, v, bias), causal, atol=1e-6)


def test_placeholders_are_unpacked_as_in_each_release(tmp_path: Path) -> None:
    file = write(
        tmp_path / "expands_placeholders.py",
        "from vllm.multimodal.utils import repeat_and_pad_placeholder_tokens\n"
        "def of_the_third():\n"
        "    prompt, ids = repeat_and_pad_placeholder_tokens(\n"
        "        None, None, [1, 7], placeholder_token_id=7, repeat_count=2)\n"
        "    return prompt, ids\n"
        "def of_the_fourth():\n"
        "    prompt, ids, ranges = repeat_and_pad_placeholder_tokens(\n"
        "        None, None, [1, 7], placeholder_token_id=7, repeat_count=2)\n"
        "    return prompt, ids, ranges\n"
        "def whole():\n"
        "    return repeat_and_pad_placeholder_tokens(None, None, [7], placeholder_token_id=7, repeat_count=2)\n",
    )
    module = load_plugin(file)
    assert module.of_the_third() == (None, [1, 7, 7])
    assert module.of_the_fourth() == (None, [1, 7, 7], [{"offset": 1, "length": 2}])
    assert len(module.whole()) == 3
