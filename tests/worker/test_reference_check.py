"""The check at load of transformers' modules finds what is wrong, and says why an architecture can't be run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.errors import ModelError, WeightsError
from sensorium.kernels.native import native_library
from sensorium.model_executor.models.transformers import by_sequence, mask_rules
from sensorium.model_executor.models.transformers.flat import FlatWay
from sensorium.model_executor.models.transformers.mask_rules import MaskRule
from sensorium.model_executor.models.transformers.model import BY_REQUEST, FLAT, TransformersForCausalLM
from sensorium.worker.reference_check import position_error
from tests.helpers.generic import load_generic
from tests.helpers.tiny_architectures import save_tiny

UNEQUAL = "logits differ"


def why_not_flat(path: Path, **settings: Any) -> str:
    """The reason that the report gives for a slower way."""
    _, report = load_generic(path, **settings)
    assert report.features.tier == BY_REQUEST
    return next(note for note in report.features.notes if note.startswith(f"not {FLAT}: "))


def test_the_report_says_what_runs_and_how_far_it_was_checked(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    model, report = load_generic(tmp_path)
    assert isinstance(model, TransformersForCausalLM)
    assert report.features.tier == FLAT
    assert any("Qwen3ForCausalLM" in note and "checked at load" in note for note in report.features.notes)


@pytest.mark.parametrize(
    "spoil", [lambda rule: MaskRule(), lambda rule: replace(rule, window=7), lambda rule: replace(rule, window=5)]
)
def test_a_window_that_is_off_by_one_is_found(spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("mistral", tmp_path)  # whose window is 6
    read = mask_rules.read_rule
    monkeypatch.setattr(
        "sensorium.model_executor.models.transformers.discovery.read_rule",
        lambda *arguments: spoil(read(*arguments)),
    )
    assert UNEQUAL in why_not_flat(tmp_path)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_wrong_constant_of_attention_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("gemma2", tmp_path, attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    init = FlatWay.__init__

    def spoiled(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        for layer in self.attention_calls:
            value = getattr(layer.spec, name)
            layer.spec = replace(layer.spec, **{name: value * 0.7 if name == "scale" else None})

    monkeypatch.setattr(FlatWay, "__init__", spoiled)
    assert UNEQUAL in why_not_flat(tmp_path)


def test_the_check_can_be_skipped(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _, report = load_generic(tmp_path, load_check="off")
    assert "load_check is off" in report.features.notes


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("openai-gpt", {}, "can't be reached"),
        ("minimax", {}, "keeps a state elsewhere"),
        ("recurrent_gemma", {}, "rows depend on other rows outside of attention"),
        ("deepseek_v4", {}, "grows with each token"),
        ("inkling_text", {}, "bias"),
    ],
)
def test_what_a_flat_batch_has_no_counterpart_for_runs_by_request(
    model_type: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path, **settings)
    assert reason in why_not_flat(tmp_path)


@pytest.mark.parametrize("spoiled", ["_rows", "_mask", "_cut"])
def test_mixers_that_see_another_sequence_are_found(
    spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of one sequence given to another, masks of another place, rows of a neighbour."""
    save_tiny("mamba2" if spoiled == "_rows" else "gptj", tmp_path)
    if spoiled == "_rows":
        rows = by_sequence.Mixer._rows
        monkeypatch.setattr(by_sequence.Mixer, "_rows", lambda *arguments: rows(*arguments).roll(1).clamp(0, 0))
    elif spoiled == "_mask":
        mask = by_sequence._mask
        monkeypatch.setattr(by_sequence, "_mask", lambda *arguments: mask(*arguments).roll(1, -1))
    else:
        cut = by_sequence._cut
        monkeypatch.setattr(
            by_sequence,
            "_cut",
            lambda value, axes, rows: cut(value, axes, [replace(rows[0], begin=0, end=rows[0].end - rows[0].begin)]),
        )
    assert "transformers flat: " in why_not_flat(tmp_path)


def test_what_runs_in_no_way_is_refused_with_the_reason_for_each(tmp_path: Path) -> None:
    """All tokens of its prompts see one another, so what is said of the first depends on the last."""
    save_tiny("cpmant", tmp_path)
    with pytest.raises(ModelError, match=r"none that runs .*flat: .*by request: logits differ"):
        load_generic(tmp_path)


def test_rotations_that_depend_on_the_longest_sequence_of_a_batch_are_refused(tmp_path: Path) -> None:
    """A short request beside a long one would be rotated by the long one's factors; within the first length none is."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    save_tiny("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    assert "longest sequence" in why_not_flat(tmp_path, max_model_len=128)
    _, report = load_generic(tmp_path, max_model_len=64)
    assert report.features.tier == FLAT


def test_logits_of_another_width_than_the_vocabulary_are_an_error_of_loading(tmp_path: Path) -> None:
    """Marian's decoder has a vocabulary of its own, and every request to it failed."""
    save_tiny("marian", tmp_path, decoder_vocab_size=330, share_encoder_decoder_embeddings=False)
    with pytest.raises(ModelError, match="logits of width 330, expected 320"):
        load_generic(tmp_path)


def test_a_missing_tensor_is_an_error_of_loading(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("qwen3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        load_generic(tmp_path)


def test_dummy_weights_are_seeded_and_leave_the_generator_alone(tmp_path: Path) -> None:
    save_tiny("olmo2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = torch.get_rng_state()
    first, _ = load_generic(tmp_path, load_format="dummy", seed=3)
    second, _ = load_generic(tmp_path, load_format="dummy", seed=3)
    other, _ = load_generic(tmp_path, load_format="dummy", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    tables = [model.hf_model.model.embed_tokens.weight for model in (first, second, other)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_the_error_of_a_position_is_in_units_of_its_spread() -> None:
    expected = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    assert position_error(expected.clone(), expected) == 0
    assert position_error(expected + torch.tensor([[0.0], [1.0]]), expected) == pytest.approx(1 / 200**0.5)
    assert position_error(expected * torch.nan, expected) == float("inf")
    forbidden = torch.tensor([[1.0, 3.0, -torch.inf]])
    assert position_error(forbidden.clone(), forbidden) == 0
    assert position_error(torch.tensor([[1.0, 3.0, 0.0]]), forbidden) == float("inf")


def test_linear_layers_run_by_the_kernels_of_this_engine(tmp_path: Path) -> None:
    """Their weights are laid out for it, and held once."""
    save_tiny("qwen3", tmp_path)
    model, _ = load_generic(tmp_path)
    layer = model.hf_model.model.layers[0].mlp.up_proj
    assert layer.weight.is_meta == (native_library() is not None)


def test_a_weight_that_a_module_reads_itself_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(gated) + 0 * self.up_proj(x).sum(-1, keepdim=True)

    save_tiny("qwen3", tmp_path)
    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    model, report = load_generic(tmp_path)
    assert report.features.tier == FLAT
    assert not any(parameter.is_meta for parameter in model.hf_model.parameters())
    assert model.reference_logits([5, 6, 7]).isfinite().all()


def test_a_row_alone_is_the_same_row_beside_others(tmp_path: Path) -> None:
    """To the bit: linear layers, norms and attention don't depend on how many rows there are."""
    save_tiny("llama", tmp_path)
    model, _ = load_generic(tmp_path)
    if native_library() is None:
        pytest.skip("plain torch rounds by the number of rows")
    layer = model.hf_model.model.layers[0].mlp.up_proj
    rows = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(rows)[3:4], layer(rows[3:4]))


def test_caches_of_requests_are_told_of_in_the_memory_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow outside of what is planned. Keys and values of 4 layers, 128 tokens and 4 requests."""
    model = save_tiny("bloom", tmp_path)
    monkeypatch.setattr(TransformersForCausalLM, "_flat_tiers", lambda _: iter(()))
    _, report = load_generic(tmp_path)
    size = report.memory_bytes["caches of requests (at most, unplanned)"]
    expected = 4 * 128 * 2 * 4 * model.config.hidden_size * model.config.n_layer
    assert 0.9 * expected <= size <= 1.3 * expected
