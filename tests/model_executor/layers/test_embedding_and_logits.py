"""Token embeddings with ids that are none, the output head, and the logits processor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sensorium.errors import WeightsError
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled_head(vocab_size: int = 20, hidden_size: int = 8, bias: bool = False) -> ParallelLMHead:
    head = ParallelLMHead(vocab_size, hidden_size, bias=bias)
    head.weight.data.copy_(random_tensor(vocab_size, hidden_size, seed=1))
    if head.bias is not None:
        head.bias.data.copy_(random_tensor(vocab_size, seed=2))
    return head


def test_embedding_rows() -> None:
    embedding = VocabParallelEmbedding(10, 4)
    table = random_tensor(10, 4)
    embedding.weight_loader(embedding.weight, table)
    ids = torch.tensor([0, 9, 3, 3])
    assert torch.equal(embedding(ids), table[ids])


@pytest.mark.parametrize("bad_id", [-1, -3, 10, 2**40])
def test_ids_outside_the_table_give_zeros_and_spare_the_others(bad_id: int) -> None:
    embedding = VocabParallelEmbedding(10, 4)
    table = random_tensor(10, 4)
    embedding.weight_loader(embedding.weight, table)
    rows = embedding(torch.tensor([2, bad_id, 7]))
    assert torch.equal(rows[[0, 2]], table[[2, 7]])
    assert not rows[1].any()


def test_rows_beyond_the_checkpoint_are_zero() -> None:
    embedding = VocabParallelEmbedding(12, 4, org_num_embeddings=10)
    embedding.weight.data.fill_(torch.nan)
    embedding.weight_loader(embedding.weight, random_tensor(10, 4))
    assert not embedding(torch.tensor([10, 11])).any()


def test_a_table_of_another_size_is_refused() -> None:
    embedding = VocabParallelEmbedding(10, 4, prefix="model.embed_tokens")
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight: got \(9, 4\).*expected \(10, 4\)"):
        embedding.weight_loader(embedding.weight, random_tensor(9, 4))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_head_is_a_linear_layer(bias: bool, packed: bool) -> None:
    head = filled_head(bias=bias)
    weight, b = head.weight.data.clone(), None if head.bias is None else head.bias.data
    if packed:
        head.process_weights_after_loading()
    hidden = random_tensor(3, 8, seed=3)
    expected = torch.nn.functional.linear(hidden, weight, b)
    torch.testing.assert_close(LogitsProcessor(20)(head, hidden), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_tied_head_shares_the_embeddings(packed: bool) -> None:
    embedding = VocabParallelEmbedding(20, 8)
    head = ParallelLMHead(20, 8).tie_weights(embedding)
    table = random_tensor(20, 8)
    embedding.weight_loader(embedding.weight, table)
    if packed:
        head.process_weights_after_loading()
    hidden = random_tensor(3, 8, seed=3)
    torch.testing.assert_close(LogitsProcessor(20)(head, hidden), hidden @ table.T)
    assert torch.equal(embedding(torch.tensor([4])), table[[4]])
    # Models may also pass the embeddings themselves as their head.
    torch.testing.assert_close(LogitsProcessor(20)(embedding, hidden), hidden @ table.T)


def test_a_head_is_not_called() -> None:
    with pytest.raises(TypeError, match="LogitsProcessor"):
        filled_head()(torch.tensor([1]))


def test_logits_of_selected_rows_trimmed_scaled_and_capped() -> None:
    head, hidden = filled_head(), random_tensor(6, 8, seed=3)
    processor = LogitsProcessor(20, org_vocab_size=17, scale=0.5, soft_cap=2.0)
    metadata = SimpleNamespace(selected_token_indices=torch.tensor([4, 1]))
    raw = (hidden @ head.weight.data.T)[[4, 1], :17]
    torch.testing.assert_close(processor(head, hidden, metadata), 0.5 * 2.0 * torch.tanh(raw / 2.0))


def test_without_selection_all_rows_are_taken_as_given() -> None:
    head, hidden = filled_head(), random_tensor(6, 8, seed=3)
    for metadata in (None, SimpleNamespace(selected_token_indices=None), SimpleNamespace()):
        assert LogitsProcessor(20)(head, hidden, metadata).shape == (6, 20)


def test_logits_as_input_are_passed_on() -> None:
    logits = random_tensor(2, 20)
    assert torch.equal(LogitsProcessor(20, logits_as_input=True)(filled_head(), logits), logits)


def test_logits_keep_the_heads_dtype() -> None:
    head = ParallelLMHead(20, 8, params_dtype=torch.bfloat16)
    head.weight.data.copy_(random_tensor(20, 8))
    assert LogitsProcessor(20)(head, random_tensor(2, 8).bfloat16()).dtype == torch.bfloat16
