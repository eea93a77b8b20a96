"""Adapters that PEFT saved, beside a model: answers equal Hugging Face's with the adapter merged."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import LLM, EngineArgs, LLMEngine, LoRARequest, RequestOutput, SamplingParams
from sensorium.errors import ConfigError, InvalidRequestError, WeightsError
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.lora.method import LoRAMethod
from sensorium.worker.pooling import Pooler
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.graphs import HostReplay
from tests.helpers.hf_reference import hf_greedy
from tests.helpers.lora import ATTENTION, MLP, TinyAdapter
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import make_engine

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def lora_engine(family: str, adapters: dict[str, Path], **settings: Any) -> LLMEngine:
    modules = {name: str(path) for name, path in adapters.items()}
    given = {"device": "cpu", "enable_lora": True, "lora_modules": modules, "limit_mm_per_prompt": limits(family)}
    return make_engine(make_checkpoint(family), **given | settings)


def answers(engine: LLMEngine, asked: dict[str, tuple[Any, str | None]]) -> dict[str, RequestOutput]:
    """The outputs of requests that run together: by id, a prompt and the name of its adapter."""
    for request_id, (prompt, name) in asked.items():
        engine.add_request(request_id, prompt, GREEDY, lora_request=name)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                found[output.request_id] = output
    return found


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("family", "within"),
    [("llama", ""), ("qwen3", ""), ("llava", "language_model"), ("qwen2_vl", "language_model")],
)
def test_a_mixed_batch_equals_merged_models(family: str, within: str, tmp_path: Path) -> None:
    """The base model and two adapters in one batch, pictures among the prompts, everything a second time from caches.

    The adapters differ in layers, ranks and scales; fused layers get one part of the one and all of the other.
    """
    adapters = {
        "one": TinyAdapter(family, within=within),
        "two": TinyAdapter(
            *(family, ("q_proj", "v_proj", "down_proj", "up_proj"), within),
            rank=3,
            rslora=True,
            seed=2,
            rank_pattern={"v_proj": 5},
            alpha_pattern={"q_proj": 2.0},
        ),
    }
    engine = lora_engine(family, {name: each.save(tmp_path / name) for name, each in adapters.items()})
    models = {None: make_hf_model(family), **{name: each.merged() for name, each in adapters.items()}}
    prompts = [each.prompt for each in random_plan(family, 4, random.Random(family), spread=0, aborts=0)]
    asked = {f"{name}-{i}": (prompt, name) for i, prompt in enumerate(prompts) for name in models}
    expected = {
        key: hf_greedy(models[name], engine.preprocess(key, prompt, GREEDY).engine_request, NUM_TOKENS)
        for key, (prompt, name) in asked.items()
    }
    for _ in range(2):
        found = answers(engine, asked)
        assert {key: tokens(output) for key, output in found.items()} == expected
    for i in range(len(prompts)):
        assert len({tuple(expected[f"{name}-{i}"]) for name in models}) == 3, (
            "adapters that change nothing show nothing"
        )
    assert "adapters: one, two" in engine.report.lines()
    assert engine.report.memory_bytes["adapters"] > 0


def test_blocks_are_found_by_the_same_adapter_alone(tmp_path: Path) -> None:
    engine = lora_engine("llama", {name: TinyAdapter("llama").save(tmp_path / name) for name in ("one", "two")})
    prompt = {"prompt_token_ids": list(range(5, 75))}
    found = [answers(engine, {"r": (prompt, name)})["r"] for name in (None, "one", "two", None, "one", "two")]
    assert [output.num_cached_tokens for output in found] == [0, 0, 0, 64, 64, 64]


def test_a_head_of_its_own_may_have_an_adapter(tmp_path: Path) -> None:
    adapter = TinyAdapter("llama", ("lm_head", "o_proj"))
    engine = lora_engine("llama", {"head": adapter.save(tmp_path / "head")})
    prompt = {"prompt_token_ids": list(range(7, 40))}
    request = engine.preprocess("r", prompt, GREEDY).engine_request
    found = answers(engine, {"base": (prompt, None), "head": (prompt, "head")})
    assert tokens(found["head"]) == hf_greedy(adapter.merged(), request, NUM_TOKENS)
    assert tokens(found["base"]) == hf_greedy(make_hf_model("llama"), request, NUM_TOKENS)


def test_recorded_passes_are_those_without_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with an adapter's rows runs call by call, one of the base model's alone replays; both are right."""
    adapter, capture = TinyAdapter("llama"), HostReplay()
    folder = adapter.save(tmp_path / "one")
    plain = lora_engine("llama", {"one": folder})
    monkeypatch.setattr(Worker, "_graph_capture", lambda worker: capture)
    engine = lora_engine("llama", {"one": folder}, max_steps_in_flight=2)
    prompt = {"prompt_token_ids": list(range(5, 25))}
    answers(engine, {"warm": (prompt, None)})
    before = capture.num_replays
    assert before > 0
    own = answers(engine, {"one": (prompt, "one")})["one"]
    assert capture.num_replays == before
    assert tokens(own) == tokens(answers(plain, {"one": (prompt, "one")})["one"])
    assert "passes with rows of one run call by call" in "\n".join(engine.report.lines())


def test_layers_without_adapters_keep_their_method(tmp_path: Path) -> None:
    """What no adapter names costs nothing, and what one names has the layer's own method beneath."""
    engine = lora_engine("llama", {"one": TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one")})
    model = engine.core.executor.worker.model  # type: ignore[attr-defined]
    wrapped = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, WeightedLayer) and isinstance(module.method, LoRAMethod)
    }
    assert wrapped == {"o_proj"}


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_adapters_lie_over_quantized_weights(quantization: str, tmp_path: Path) -> None:
    """The adapter stays in floats; a request without one gets what it got."""
    prompt = {"prompt_token_ids": list(range(5, 40))}
    folder = TinyAdapter("llama", alpha=20.0).save(tmp_path / "one")
    engine = lora_engine("llama", {"one": folder}, quantization=quantization)
    plain = make_engine(make_checkpoint("llama"), device="cpu", quantization=quantization)
    found = answers(engine, {"base": (prompt, None), "one": (prompt, "one")})
    assert tokens(found["base"]) == tokens(answers(plain, {"base": (prompt, None)})["base"])
    assert tokens(found["one"]) != tokens(found["base"])


def test_at_most_max_loras_run_at_once(tmp_path: Path) -> None:
    """Requests of further adapters wait until enough have ended, in their order, and none is lost."""
    folder = TinyAdapter("llama").save(tmp_path / "one")
    names = ["a", "b", "c"]
    engine = lora_engine("llama", dict.fromkeys(names, folder), max_loras=2)
    scheduler = engine.core.scheduler
    prompt = {"prompt_token_ids": list(range(5, 25))}
    for i, name in enumerate([*names, None, *names]):
        engine.add_request(f"r{i}", prompt, GREEDY, lora_request=name)
    most, finished = 0, []
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step() if output.finished]
        running = scheduler._table.running
        most = max(most, len({each.message.adapter_id for each in running} - {0}))
    assert most == 2
    assert sorted(finished) == [f"r{i}" for i in range(7)]
    scheduler.check_idle()


def test_ranks_have_their_shares(tmp_path: Path) -> None:
    """Two processes share the model, and each takes its share of every matrix; key/value heads repeat."""
    adapter = TinyAdapter("llama", (*ATTENTION, *MLP, "lm_head"))
    engine = lora_engine("llama", {"one": adapter.save(tmp_path / "one")}, tensor_parallel_size=2)
    try:
        prompt = {"prompt_token_ids": list(range(5, 40))}
        request = engine.preprocess("r", prompt, GREEDY).engine_request
        found = answers(engine, {"base": (prompt, None), "one": (prompt, "one")})
        assert tokens(found["one"]) == hf_greedy(adapter.merged(), request, NUM_TOKENS)
        assert tokens(found["base"]) == hf_greedy(make_hf_model("llama"), request, NUM_TOKENS)
    finally:
        engine.shutdown()


def test_llm_takes_adapters_by_request_and_by_name(tmp_path: Path) -> None:
    folder = TinyAdapter("llama").save(tmp_path / "one")
    llm = LLM(
        str(make_checkpoint("llama")), device="cpu", enable_lora=True, lora_modules={"sql": folder}, num_blocks=64
    )
    prompts = [list(range(5, 25))] * 4
    asked = [None, "sql", LoRARequest("sql", 1, str(folder)), LoRARequest("sql", 7)]
    base, *others = [tokens(each) for each in llm.generate(prompts, GREEDY, lora_request=asked)]
    assert others[0] == others[1] == others[2] != base
    assert tokens(llm.generate(prompts[0], GREEDY, lora_request="sql")[0]) == others[0]
    with pytest.raises(InvalidRequestError, match="'other', expected one of"):
        llm.generate(prompts[0], GREEDY, lora_request="other")
    with pytest.raises(InvalidRequestError, match="another path"):
        llm.generate(prompts[0], GREEDY, lora_request=LoRARequest("sql", 1, str(tmp_path)))


def test_an_adapter_of_the_head_scores_pairs(tmp_path: Path) -> None:
    """A reranker's answer is the logits of two words behind the last row: the head's adapter belongs to them, too."""
    adapter = TinyAdapter("qwen3", ("lm_head",))
    engine = lora_engine("qwen3", {"one": adapter.save(tmp_path / "one")})
    worker = engine.core.executor.worker  # type: ignore[attr-defined]
    rows = torch.randn(3, worker.model.model.embed_tokens.embedding_dim)
    config = SimpleNamespace(model="", pooler=SimpleNamespace(projections=(), token_ids=(3, 9), activation="identity"))
    pooler = Pooler(worker.model, config, torch.device("cpu"))  # type: ignore[arg-type]
    params = SimpleNamespace(task="classify", use_activation=False)
    scores = []
    for model, adapter_id in ((make_hf_model("qwen3"), 0), (adapter.merged(), 1)):
        asked = SimpleNamespace(pooling=params, adapter_id=adapter_id)
        with torch.inference_mode():
            scores.append(pooler._answer(rows, asked))  # type: ignore[arg-type]
            logits = model.lm_head(rows[-1])
        torch.testing.assert_close(scores[-1], (logits[9] - logits[3])[None], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*scores)


def test_vectors_and_scores_are_an_adapters_where_one_is_asked_for(tmp_path: Path) -> None:
    adapter = TinyAdapter("qwen3")
    folder = adapter.save(tmp_path / "one")
    llm = LLM(
        str(make_checkpoint("qwen3")),
        device="cpu",
        enable_lora=True,
        lora_modules={"one": folder},
        num_blocks=64,
        runner="pooling",
    )
    ids = list(range(5, 25))
    [plain], [asked] = llm.embed([ids]), llm.embed([ids], lora_request="one")
    for output, model in ((plain, make_hf_model("qwen3")), (asked, adapter.merged())):
        with torch.inference_mode():
            states = model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1]
        vector = torch.nn.functional.normalize(states, dim=0)
        torch.testing.assert_close(torch.as_tensor(output.outputs.embedding), vector, atol=1e-4, rtol=1e-4)
    texts = ("One text", "another")
    vectors = [llm.embed(text, lora_request="one")[0].outputs.embedding for text in texts]
    [scored] = llm.score(*texts, lora_request="one")
    assert scored.outputs.score == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    assert scored.outputs.score != pytest.approx(llm.score(*texts)[0].outputs.score, abs=1e-4)
    llm.shutdown()


# What isn't served


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora True"),
    "biases": ({"bias": "all"}, "bias 'all'"),
    "biases of adapters": ({"lora_bias": True}, "lora_bias True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens of their own": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "experts' parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "layers twice": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
    "what isn't known": ({"use_something_new": {"a": 1}}, "use_something_new"),
    "a large rank": ({"r": 64}, "rank 64, expected at most 16"),
    "a large rank of one layer": ({"rank_pattern": {"q_proj": 32}}, "rank 32, expected at most 16"),
    "no rank": ({"r": 0}, "r 0"),
    "no number": ({"lora_alpha": "many"}, "lora_alpha 'many'"),
    "no pattern": ({"rank_pattern": {"(": 4}}, "rank_pattern"),
}


@pytest.mark.parametrize(("changed", "told"), CASES.values(), ids=CASES)
def test_settings_that_are_not_served_are_refused_before_loading(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one", **changed)
    with pytest.raises(ConfigError, match=r"lora_modules\['one'\]: got ") as caught:
        EngineArgs(
            str(make_checkpoint("llama")), device="cpu", enable_lora=True, lora_modules={"one": str(folder)}
        ).create_engine_config()
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_modules": {"one": "."}}, "without enable_lora"),
        ({"max_loras": 2}, "max_loras: got 2 without enable_lora"),
        ({"max_lora_rank": 8}, "max_lora_rank: got 8 without enable_lora"),
        ({"enable_lora": True}, "without lora_modules"),
        ({"enable_lora": True, "lora_modules": {"one": "/nowhere/at/all"}}, "expected a directory"),
        ({"enable_lora": True, "lora_modules": {"one": "tests"}}, "without adapter_config.json"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EngineArgs(str(make_checkpoint("llama")), device="cpu", **settings).create_engine_config()


def _renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): each for name, each in tensors.items()}


def _first_changed(change: Any) -> Any:
    return lambda tensors: tensors | {min(tensors): change(tensors[min(tensors)])}


TENSORS: dict[str, tuple[Any, str]] = {
    "embeddings": (_renamed("o_proj.lora_A.weight", "embed_tokens.lora_embedding_A"), "expected pairs of lora_A"),
    "magnitudes": (_renamed("lora_B.weight", "lora_magnitude_vector.weight"), "expected pairs of lora_A"),
    "half a pair": (lambda tensors: {k: v for k, v in tensors.items() if "lora_A" in k}, "only lora_A"),
    "nothing": (lambda tensors: {}, "no tensor"),
    "an unknown layer": (_renamed("o_proj", "w_proj"), "no linear layer of LlamaForCausalLM"),
    "a norm": (_renamed("self_attn.o_proj", "input_layernorm"), "no linear layer of LlamaForCausalLM but a RMSNorm"),
    "the embeddings as a layer": (_renamed("layers.0.self_attn.o_proj", "embed_tokens"), "VocabParallelEmbedding"),
    "NaN": (_first_changed(lambda each: each * float("nan")), "expected finite values"),
    "integers": (_first_changed(lambda each: each.to(torch.int8)), "expected a matrix of floats"),
    "another rank": (_first_changed(lambda each: each[:2].contiguous()), "got ranks 2 and 4"),
    "another width": (_first_changed(lambda each: each[:, :-2].contiguous()), "inputs for"),
}


@pytest.mark.parametrize(("change", "told"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(change: Any, told: str, tmp_path: Path) -> None:
    folder = TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one")
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"lora_modules\['one'\]: got ") as caught:
        lora_engine("llama", {"one": folder})
    assert told in str(caught.value)


def test_a_tied_head_has_no_adapter(tmp_path: Path) -> None:
    """Merged, it would change the embeddings too."""
    folder = TinyAdapter("llama", ("lm_head",)).save(tmp_path / "one")
    with pytest.raises(WeightsError, match="whose weight is the embeddings' too"):
        make_engine(make_checkpoint("llama", tied=True), enable_lora=True, lora_modules={"one": str(folder)})


@pytest.mark.parametrize(("family", "within"), [("llava", ""), ("llava", "vision_tower"), ("qwen2_vl", "visual")])
def test_a_tower_has_no_adapter(family: str, within: str, tmp_path: Path) -> None:
    """A tower's rows are shared by all requests that bring the item, whatever their adapters."""
    adapter = TinyAdapter(family, ("q_proj", "fc1", "qkv"), within)
    folder = adapter.save(tmp_path / "one")
    told = r"(vision_tower|visual)\..*(no text goes through, expected layers of the decoder|no linear layer)"
    with pytest.raises(WeightsError, match=told):
        lora_engine(family, {"one": folder})


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="Weights in a pickle are never read"):
        lora_engine("llama", {"one": folder})


def test_modules_of_transformers_have_no_adapters(tmp_path: Path) -> None:
    folder = TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one")
    with pytest.raises(ConfigError, match="enable_lora: got true for LlamaForCausalLM, which runs by the modules"):
        lora_engine("llama", {"one": folder}, model_impl="transformers")


def test_an_older_config_has_fewer_settings(tmp_path: Path) -> None:
    """Only what every version wrote, and the file of a run whose adapter was called "default"."""
    adapter = TinyAdapter("llama", ("q_proj", "v_proj"))
    folder = adapter.save(tmp_path / "one")
    old = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    saved = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(".weight", ".default.weight"): each for name, each in saved.items()},
        folder / "adapter_model.safetensors",
    )
    engine = lora_engine("llama", {"one": folder})
    prompt = {"prompt_token_ids": list(range(5, 40))}
    request = engine.preprocess("r", prompt, GREEDY).engine_request
    found = answers(engine, {"one": (prompt, "one")})["one"]
    assert tokens(found) == hf_greedy(adapter.merged(), replace(request), NUM_TOKENS)
