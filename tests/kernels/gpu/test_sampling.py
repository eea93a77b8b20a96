"""Draws in one launch against the twin, `draw_tokens` on the CPU: the same tokens for the same keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sensorium.kernels.gpu import penalties, sampling
from sensorium.kernels.penalties import penalise_reference
from sensorium.model_executor import sampling_ops
from sensorium.model_executor.sampling_ops import RowParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMS = {  # temperature, top_k, top_p, min_p
    "everything": (1.0, 0, 1.0, 0.0),
    "hot": (3.0, 0, 1.0, 0.0),
    "top-k": (0.7, 5, 1.0, 0.0),
    "one": (1.0, 1, 1.0, 0.0),
    "top-p": (1.0, 0, 0.9, 0.0),
    "narrow top-p": (1.0, 0, 1e-4, 0.0),
    "wide top-p": (5.0, 0, 0.999, 0.0),
    "min-p": (1.0, 0, 1.0, 0.2),
    "wide min-p": (9.0, 0, 1.0, 0.5),
    "all three": (1.3, 40, 0.8, 0.05),
    "wide top-k": (2.0, 1100, 0.97, 0.0),
}
# Of the interpreter, which is NumPy.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


def row_params(rows: list[tuple[float, int, float, float]], seed: int) -> RowParams:
    random = np.random.default_rng(seed)
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    keys = random.integers(-(2**63), 2**63 - 1, len(rows))
    floats = [array.astype(np.float32) for array in (temperature, top_p, min_p)]
    return RowParams(floats[0], top_k.astype(np.int64), *floats[1:], keys, random.integers(0, 5000, len(rows)))


def drawn(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    return sampling.draw(
        logits.to(DEVICE),
        torch.from_numpy(params.packed()).to(DEVICE),
        max_narrow_top_k=sampling_ops.MAX_NARROW_TOP_K,
        num_candidates=sampling_ops.NUM_CANDIDATES,
        group_size=sampling_ops.GROUP_SIZE,
        first_group_counter=sampling_ops._GROUP_COUNTER,
    ).cpu()


@pytest.mark.parametrize("name", PARAMS)
def test_tokens_are_those_of_the_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over flat and steep rows, rows with forbidden tokens, and vocabularies below and above a program's tile."""
    monkeypatch.setattr(sampling, "_BLOCK", 1024)
    for vocab_size, scale in ((100, 2.0), (1300, 1.5)):
        logits = torch.randn(3, vocab_size) * scale
        logits[1, torch.randperm(vocab_size)[: vocab_size // 2]] = -torch.inf
        logits[2, 7] = 30.0
        params = row_params([PARAMS[name]] * 3, seed=vocab_size)
        assert torch.equal(drawn(logits, params), sampling_ops.draw_tokens(logits, params))


def test_rows_keep_their_own_parameters() -> None:
    logits = torch.randn(len(PARAMS), 600) * 2
    params = row_params(list(PARAMS.values()), seed=1)
    together = drawn(logits, params)
    assert torch.equal(together, sampling_ops.draw_tokens(logits, params))
    alone = np.array([3])
    assert torch.equal(drawn(logits[3:4], params.rows(alone)), together[3:4])


@pytest.mark.parametrize("name", ["everything", "top-k", "top-p", "all three"])
def test_a_broken_row_ends_with_some_token(name: str) -> None:
    """Its request fails elsewhere; here it must neither hang nor leave the vocabulary, nor touch other rows."""
    logits = torch.randn(4, 300)
    logits[0, 5], logits[1, 9], logits[2] = torch.nan, torch.inf, -torch.inf
    params = row_params([PARAMS[name]] * 4, seed=2)
    got = drawn(logits, params)
    assert bool(((got >= 0) & (got < 300)).all())
    assert torch.equal(got[3:], sampling_ops.draw_tokens(logits[3:], params.rows(np.array([3]))))


def test_tokens_of_one_value_stay_or_go_together() -> None:
    """A nucleus ends at a value, not at a token: which of several equal tokens comes first would be chance."""
    params = row_params([(1.0, 0, 0.1, 0.0)] * 8, seed=3)
    got = drawn(torch.zeros(8, 300), params)
    assert len(set(got.tolist())) > 4
    assert int(got.max()) - int(got.min()) > 100  # a tenth of the tokens would be 30


@pytest.mark.parametrize("vocab_size", [7, 2048, 5000])
def test_penalties_equal_the_twins(vocab_size: int) -> None:
    """Of rows in any order, of slots in any order; other rows stay as they are, and so do infinities."""
    torch.manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, device=DEVICE) * 4
    logits[1, :3], logits[4, 1] = -torch.inf, torch.nan
    counts = torch.randint(0, 9, (8, vocab_size), dtype=torch.int32, device=DEVICE)
    counts[counts > 5] = 0
    floats = torch.tensor([1.3, 0.7, 1.0]).view(torch.int32).long()
    doubles = torch.tensor([[0.1, 0.7], [-0.3, 0.0], [0.0, 2.0]], dtype=torch.float64).view(torch.int64)
    places = torch.tensor([[4, 2], [1, 7], [0, 0]])
    params = torch.cat((places, floats[:, None], doubles), dim=1).to(DEVICE)
    want = logits.clone()
    penalise_reference(want, counts, params)
    got = logits.clone()
    penalties.penalise(got, counts, params)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    assert not torch.equal(got[0], logits[0])
    assert torch.equal(got[2:4], logits[2:4])
