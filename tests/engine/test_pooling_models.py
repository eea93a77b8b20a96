"""Models that don't generate: what `LLM` makes of texts equals what Hugging Face and sentence-transformers make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sensorium import LLM, PoolingParams, SamplingParams
from sensorium.engine.pooling import PROMPTS
from sensorium.errors import ConfigError, InvalidRequestError, ModelError, RequestError, UnsupportedFeatureError
from tests.helpers.pooling_checkpoints import (
    SIZES,
    add_modules,
    bert,
    make_pooling_checkpoint,
    modern_bert,
    qwen3,
    reference_output,
    roberta,
)

PAD = SIZES["pad_token_id"]
TEXTS = ["hello world", "a", "quite a long text, for a model this small " * 2, "x" * 20, "the last one"]
SETTINGS: dict[str, Any] = {"device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 64}
"""The longest text is longer than a step's budget: it runs in a step of its own."""


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), **{**SETTINGS, **settings})


def near(got: Any, expected: torch.Tensor) -> bool:
    return bool(np.allclose(got, expected.numpy(), atol=2e-6))


def distilbert() -> transformers.PretrainedConfig:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130}
    return transformers.DistilBertConfig(**sizes, vocab_size=320, pad_token_id=PAD, initializer_range=0.3)


def mpnet() -> transformers.PretrainedConfig:
    return transformers.MPNetConfig(**{**SIZES, "pad_token_id": 1})


def t5() -> transformers.PretrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5Config(**sizes, vocab_size=320, pad_token_id=PAD)


def deberta() -> transformers.PretrainedConfig:
    return transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])


ENCODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "BertModel": (bert, "flat"),
    "XLMRobertaModel": (roberta, "flat"),
    "ModernBertModel": (modern_bert, "flat"),
    "DistilBertModel": (distilbert, "flat"),
    "MPNetModel": (mpnet, "padded"),
    "T5EncoderModel": (t5, "padded"),
    "DebertaV2Model": (deberta, "padded"),
}


@pytest.mark.parametrize("class_name", ENCODERS)
def test_an_encoders_vectors_are_hugging_faces(class_name: str) -> None:
    """Beside each other in flat batches, or padded where attention can't be reached, and in any case the same."""
    config, tier = ENCODERS[class_name]
    folder = make_pooling_checkpoint(class_name, config())
    llm = load(folder, max_model_len=100)
    assert llm.report.features.tier == f"transformers {tier}"
    for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
        states = reference_output(folder, class_name, text)
        assert near(output.outputs.embedding, F.normalize(states.mean(0), dim=0))
    for text, output in zip(TEXTS, llm.encode(TEXTS, pooling_task="token_embed"), strict=True):
        states = reference_output(folder, class_name, text)
        assert near(output.outputs.data, F.normalize(states, dim=-1))
    llm.shutdown()


MODES = {
    "cls_token": lambda rows: rows[0],
    "mean_tokens": lambda rows: rows.mean(0),
    "max_tokens": lambda rows: rows.max(0).values,
    "lasttoken": lambda rows: rows[-1],
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "weightedmean_tokens": lambda rows: (rows * _weights(rows)).sum(0) / _weights(rows).sum(),
}


def _weights(rows: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, len(rows) + 1)[:, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_files_of_sentence_transformers_say_how_to_pool(mode: str, kind: str) -> None:
    """Of a decoder the rows come chunk by chunk, and through one linear layer with tanh; nothing normalizes."""
    class_name, config = ("BertModel", bert()) if kind == "encoder" else ("Qwen3Model", qwen3())
    folder = add_modules(make_pooling_checkpoint(class_name, config), mode=mode, dense=[(32, 16)], normalize=False)
    llm = load(folder, max_num_batched_tokens=16, num_blocks=64, max_model_len=120)
    layer = load_file(folder / "2_Dense" / "model.safetensors")
    for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
        pooled = MODES[mode](reference_output(folder, class_name, text))
        assert near(output.outputs.embedding, torch.tanh(F.linear(pooled, *layer_of(layer))))
    llm.shutdown()


def layer_of(layer: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return layer["linear.weight"], layer["linear.bias"]


def test_a_decoder_embeds_natively_whatever_its_weights_are_called() -> None:
    """Qwen3-Embedding names the class that generates, and its weights lack that class's prefix; e5-mistral names the
    inner model. Both run by the engine's own decoder, in chunks."""
    folder = make_pooling_checkpoint("Qwen3Model", qwen3(), architectures=["Qwen3ForCausalLM"])
    add_modules(folder, mode="lasttoken")
    whole = make_pooling_checkpoint("Qwen3ForCausalLM", qwen3())
    for each, name in ((folder, "Qwen3Model"), (whole, "Qwen3ForCausalLM")):
        llm = load(each, runner="pooling", max_num_batched_tokens=16, num_blocks=64)
        assert type(llm.engine.core.executor._worker.model).__name__ == "DecoderForPooling"  # type: ignore[attr-defined]
        for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
            expected = reference_output(each, "Qwen3Model", text)[-1]
            assert near(output.outputs.embedding, F.normalize(expected, dim=0)), name
        llm.shutdown()


def test_a_decoder_that_looks_both_ways_is_not_read_from_left_to_right() -> None:
    """EmbeddingGemma is Gemma 3's decoder without causality: natively it would silently give other vectors."""
    types = ["sliding_attention", "full_attention"]
    settings = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "layer_types": types}
    config = transformers.Gemma3TextConfig(**settings, use_bidirectional_attention=True)
    folder = add_modules(make_pooling_checkpoint("Gemma3TextModel", config))
    llm = load(folder)
    assert llm.report.features.tier == "transformers flat"
    for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
        expected = F.normalize(reference_output(folder, "Gemma3TextModel", text).mean(0), dim=0)
        assert near(output.outputs.embedding, expected)
    llm.shutdown()


CLASSIFIERS = {
    "BertForSequenceClassification": bert,
    "XLMRobertaForSequenceClassification": roberta,
    "ModernBertForSequenceClassification": modern_bert,
    "Qwen3ForSequenceClassification": qwen3,
}


@pytest.mark.parametrize("class_name", CLASSIFIERS)
def test_labels_and_scores_of_pairs_are_hugging_faces(class_name: str) -> None:
    """The head is the model's own, poolers of all kinds included; of one label it scores pairs."""
    folder = make_pooling_checkpoint(class_name, CLASSIFIERS[class_name](num_labels=3))
    llm = load(folder)
    raw = llm.encode(TEXTS, PoolingParams("classify", use_activation=False))
    for text, output, scores in zip(TEXTS, llm.classify(TEXTS), raw, strict=True):
        expected = reference_output(folder, class_name, text)
        assert near(scores.outputs.data, expected)
        assert near(output.outputs.probs, expected.softmax(0))
    with pytest.raises(UnsupportedFeatureError, match=r"got a request to score, expected one of classify.*3 labels"):
        llm.score("a", "b")
    llm.shutdown()

    folder = make_pooling_checkpoint(class_name, CLASSIFIERS[class_name](num_labels=1))
    llm = load(folder)
    documents = ["short", "a document that is long " * 3, "other words"]
    for document, output in zip(documents, llm.score("a query", documents), strict=True):
        expected = reference_output(folder, class_name, "a query", document).sigmoid()
        assert near([output.outputs.score], expected)
    cut = {"truncation": "longest_first", "max_length": 20}
    for document, output in zip(documents, llm.score("a query", documents, truncate_prompt_tokens=20), strict=True):
        expected = reference_output(folder, class_name, "a query", document, **cut).sigmoid()
        assert near([output.outputs.score], expected)
    llm.shutdown()


@pytest.mark.parametrize(
    ("changes", "num_labels", "activate"),
    [
        ({"problem_type": "multi_label_classification"}, 3, torch.sigmoid),
        ({"problem_type": "regression"}, 1, lambda scores: scores),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, lambda scores: scores),
        ({"sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, 3, torch.sigmoid),
    ],
)
def test_the_checkpoint_says_what_makes_probabilities(
    changes: dict[str, Any], num_labels: int, activate: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = make_pooling_checkpoint("BertForSequenceClassification", bert(num_labels=num_labels), **changes)
    llm = load(folder, load_check="off")
    expected = activate(reference_output(folder, "BertForSequenceClassification", "hello"))
    assert near(llm.classify("hello")[0].outputs.probs, expected)
    llm.shutdown()


def test_tokens_have_labels_of_their_own() -> None:
    folder = make_pooling_checkpoint("BertForTokenClassification", bert(num_labels=4))
    llm = load(folder)
    for text, output in zip(TEXTS, llm.encode(TEXTS), strict=True):
        expected = reference_output(folder, "BertForTokenClassification", text).softmax(-1)
        assert near(output.outputs.data, expected)
    llm.shutdown()


def test_late_interaction_sums_the_best_matches() -> None:
    """A checkpoint whose modules are a linear layer and no pooling has a vector for each token."""
    folder = add_modules(make_pooling_checkpoint("BertModel", bert()), mode=None, dense=[(32, 8)])
    weight = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    llm = load(folder)

    def vectors(text: str) -> torch.Tensor:
        return F.normalize(reference_output(folder, "BertModel", text) @ weight.T, dim=-1)

    assert near(llm.encode("a text")[0].outputs.data, vectors("a text"))
    scores = [each.outputs.score for each in llm.score("a query", TEXTS)]
    expected = [float((vectors("a query") @ vectors(text).T).max(1).values.sum()) for text in TEXTS]
    assert scores == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UnsupportedFeatureError, match="got embed, expected one of token_embed"):
        llm.embed("a text")
    llm.shutdown()


def test_yes_and_no_of_a_model_that_generates_are_a_score() -> None:
    """Qwen3-Reranker: the logit of "yes" over that of "no" behind a prompt made of query and document."""
    folder = make_pooling_checkpoint("Qwen3ForCausalLM", qwen3())
    llm = load(
        folder,
        convert="classify",
        hf_overrides={"classifier_from_token": ["n", "y"]},
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}?",
        num_blocks=64,
    )
    tokenizer = llm.get_tokenizer()
    no, yes = (tokenizer.convert_tokens_to_ids(each) for each in "ny")
    for document, output in zip(TEXTS[:2], llm.score("q", TEXTS[:2]), strict=True):
        prompt = f"<query>q<document>{document}?"
        logits = reference_output(folder, "Qwen3ForCausalLM", prompt, add_special_tokens=False)[-1]
        assert output.outputs.score == pytest.approx(float(logits[[no, yes]].softmax(0)[1]), abs=1e-5)
    llm.shutdown()


def test_fewer_dimensions_only_where_the_model_was_trained_for_them() -> None:
    folder = add_modules(make_pooling_checkpoint("BertModel", bert(), matryoshka_dimensions=[8, 16, 32]))
    llm = load(folder)
    whole = F.normalize(reference_output(folder, "BertModel", "hello").mean(0)[:8], dim=0)
    assert near(llm.embed("hello", dimensions=8)[0].outputs.embedding, whole)
    with pytest.raises(UnsupportedFeatureError, match=r"dimensions: got 9, expected one of \[8, 16, 32\]"):
        llm.embed("hello", dimensions=9)
    with pytest.raises(InvalidRequestError, match="dimensions: got 0, expected at least 1"):
        llm.embed("hello", dimensions=0)
    llm.shutdown()


def test_texts_of_the_checkpoint_stand_in_front_of_queries_and_documents() -> None:
    """As sentence-transformers puts them: the named one, else the default; for scores those of the two roles."""
    folder = add_modules(make_pooling_checkpoint("BertModel", bert()))
    prompts = {"query": "find: ", "document": "", "topic": "about "}
    (folder / PROMPTS).write_text(json.dumps({"prompts": prompts, "default_prompt_name": "topic"}))
    llm = load(folder)

    def vector(text: str) -> torch.Tensor:
        return F.normalize(reference_output(folder, "BertModel", text).mean(0), dim=0)

    for name, text in ((None, "about cats"), ("query", "find: cats"), ("document", "cats")):
        for prompt in ("cats", {"prompt": "cats"}):
            assert near(llm.embed(prompt, prompt_name=name)[0].outputs.embedding, vector(text))
    ids = llm.get_tokenizer()("cats")["input_ids"]
    assert near(llm.embed({"prompt_token_ids": ids})[0].outputs.embedding, vector("cats"))
    [score] = llm.score("cats", "dogs")
    assert score.outputs.score == pytest.approx(float(vector("find: cats") @ vector("dogs")), abs=1e-5)
    with pytest.raises(InvalidRequestError, match=r"prompt_name: got 'other', expected one of \['document', 'query'"):
        llm.embed("cats", prompt_name="other")
    with pytest.raises(InvalidRequestError, match="prompt_name: got a name for a prompt of token ids"):
        llm.embed({"prompt_token_ids": ids}, prompt_name="query")
    llm.shutdown()


@pytest.mark.parametrize(
    ("written", "pooling", "problem"),
    [
        ({"prompts": {"query": 3}}, {}, "expected texts by name"),
        ({"prompts": {}, "default_prompt_name": "query"}, {}, "one of the names or null"),
        ({"prompts": {"query": "find: "}}, {"include_prompt": False}, "include_prompt in 1_Pooling"),
    ],
)
def test_texts_that_cannot_be_put_in_front_are_refused(
    written: dict[str, Any], pooling: dict[str, Any], problem: str
) -> None:
    folder = add_modules(make_pooling_checkpoint("BertModel", bert()))
    (folder / PROMPTS).write_text(json.dumps(written))
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **pooling}))
    with pytest.raises(ModelError, match=problem):
        load(folder)


def test_what_a_model_is_not_served_for_is_a_clear_error() -> None:
    """And nothing else of the same run is lost."""
    folder = make_pooling_checkpoint("BertModel", bert())
    llm = load(folder)
    with pytest.raises(UnsupportedFeatureError, match="got a request to generate, expected one of embed, token_embed"):
        llm.generate("hello", SamplingParams(max_tokens=2))
    with pytest.raises(UnsupportedFeatureError, match="got classify, expected one of embed, token_embed"):
        llm.classify("hello")
    with pytest.raises(RequestError, match="got 302 tokens, expected at most 130"):
        llm.embed("x" * 300)
    (cut,) = llm.encode("x" * 300, PoolingParams(truncate_prompt_tokens=-1))
    assert len(cut.prompt_token_ids) == 130
    with pytest.raises(InvalidRequestError, match="data_1: got 2 texts for 3, expected 1 or 3"):
        llm.score(["a", "b"], ["a", "b", "c"])
    assert llm.score("same", "same")[0].outputs.score == pytest.approx(1, abs=1e-5)
    llm.shutdown()


def test_a_position_that_a_model_lacks_is_refused() -> None:
    """RoBERTa counts from behind its padding's id: of 130 positions it has 128."""
    llm = load(make_pooling_checkpoint("XLMRobertaModel", roberta()))
    assert llm.engine.config.model_config.max_model_len == 128
    assert "pooling: embed, token_embed: mean of rows, length 1" in llm.report.lines()
    assert len(llm.embed("x" * 126)[0].prompt_token_ids) == 128
    with pytest.raises(RequestError, match="got 129 tokens, expected at most 128"):
        llm.embed("x" * 127)
    llm.shutdown()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"idx": 0, "path": "", "type": "sentence_transformers.models.WordEmbeddings"}], "got the module"),
        ([{"idx": 0, "path": "../..", "type": "sentence_transformers.models.Pooling"}], "expected one of a file"),
        ({"a": 1}, "got a JSON object, expected an array"),
    ],
)
def test_modules_that_are_not_served_are_refused(content: Any, problem: str) -> None:
    import json

    folder = make_pooling_checkpoint("BertModel", bert())
    (folder / "modules.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=problem):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"runner": "generate"}, "runner: got 'generate' for .*, which don't generate"),
        ({"convert": "classify"}, "classifier_from_token"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(make_pooling_checkpoint("BertModel", bert()), **settings)


def test_a_vector_that_is_no_number_fails_its_request_alone() -> None:
    folder = make_pooling_checkpoint("BertModel", bert())
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][ord("z") - ord("!")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llm = load(folder, load_check="off")
    with pytest.raises(RequestError, match="computed no numbers"):
        llm.embed(["zzz", "hello"])
    assert np.isfinite(llm.embed("hello")[0].outputs.embedding).all()
    llm.shutdown()
