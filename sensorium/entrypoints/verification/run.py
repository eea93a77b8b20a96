"""`verify`: runs a checkpoint here and by Hugging Face, and says whether, and where, they differ."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from sensorium.config import ModelFeatures
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.llm import LLM
from sensorium.entrypoints.verification.cases import Case, cases
from sensorium.entrypoints.verification.layers import first_difference, recording
from sensorium.entrypoints.verification.random_weights import with_random_weights
from sensorium.entrypoints.verification.reference import Reference, Truth
from sensorium.entrypoints.verification.verdict import Report, Result, compare
from sensorium.entrypoints.verification.ways import engines, run_round, running
from sensorium.errors import ConfigError
from sensorium.messages import EngineRequest
from sensorium.sampling_params import SamplingParams
from sensorium.settings import unknown_setting

Baseline: TypeAlias = Literal["hugging face", "native", "generic"]
_IMPLEMENTATIONS: Mapping[str, str] = {"native": "native", "generic": "transformers"}
_OWN = ("dtype", "skip_tokenizer_init", "load_format", "enable_prefix_caching", "max_num_batched_tokens", "num_blocks")
"""Settings that a verification chooses itself."""
_PREPARING_BLOCKS = 512
"""Of the engine that prepares the prompts: those of pictures in many tiles take some thousands of tokens."""
_MOST_LOGPROBS = 128
"""Of one position, that an engine tells."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is compared with what."""

    settings: Mapping[str, Any]
    baseline: Baseline
    num_new_tokens: int
    text_only: bool


def verify(
    model: str,
    *,
    baseline: Baseline = "hugging face",
    random_weights: bool = False,
    dtypes: Sequence[str] = (),
    num_new_tokens: int = 8,
    text_only: bool = False,
    **engine_args: Any,
) -> Report:
    """Compare a checkpoint here with the same checkpoint by Hugging Face, on prompts that are made for it.

        report = verify("path/to/checkpoint")
        assert report.is_equal, report

    Every prompt runs whole, in a batch, in chunks, from caches and preempted, in float32 and in the checkpoint's dtype.

    Args:
        model: As in `LLM`.
        baseline: "hugging face"; or, where there is a class of this engine's, "native" to compare transformers'
            modules with it, and "generic" to compare it with them.
        random_weights: Make seeded weights for a folder that has only a config, and perhaps a processor.
        dtypes: Instead of float32 and the checkpoint's.
        num_new_tokens: Greedy tokens behind each prompt.
        text_only: Don't ask about media. Without it, a model that takes media and could be asked about none is not
            called equal.
        engine_args: Settings of the engine (`EngineArgs`), such as `plugins` or `model_impl`.

    Raises:
        ConfigError, ModelError, WeightsError: The model can't be loaded, here or by Hugging Face.
    """
    _check_settings(engine_args, baseline, num_new_tokens)
    settings = {"model": model, "device": "cpu", "limit_mm_per_prompt": {}, **engine_args}
    with _checkpoint(settings, random_weights) as folder:
        job = _Job({**settings, "model": folder, **_implementation(baseline)}, baseline, num_new_tokens, text_only)
        config = EngineArgs(**job.settings).create_engine_config()
        if config.model_config.pools:
            raise ConfigError(
                f"model: got {config.model_config.architecture}, which is served for pooling, expected one that "
                "generates: tokens are compared. Loading compares modules of transformers with their untouched selves."
            )
        chosen = dtypes or list(dict.fromkeys(["float32", config.model_config.dtype_name]))
        results: list[Result] = []
        left_out: list[str] = []
        tier, parting, lacks_media = "", "", False
        for dtype in chosen:
            tier, found, lacks_media = _verify_dtype(job, dtype, left_out)
            results += found
            if not parting and dtype == "float32" and not all(each.is_equal for each in found):
                parting = _parting(job, found)
    reasons = tuple(dict.fromkeys(left_out))
    return Report(model, tier, baseline, tuple(results), parting, _versions(), reasons, lacks_media)


def _check_settings(engine_args: Mapping[str, Any], baseline: str, num_new_tokens: int) -> None:
    for name in engine_args.keys() - EngineArgs.__dataclass_fields__.keys():
        raise unknown_setting(name, EngineArgs.__dataclass_fields__)
    for name in _OWN:
        if name in engine_args:
            raise ConfigError(f"{name}: got a value for a verification, which sets it itself, expected none.")
    if baseline not in ("hugging face", *_IMPLEMENTATIONS):
        raise ConfigError(f"baseline: got {baseline!r}, expected 'hugging face', 'native' or 'generic'.")
    if baseline in _IMPLEMENTATIONS and "model_impl" in engine_args:
        raise ConfigError(
            f"model_impl: got {engine_args['model_impl']!r} beside baseline {baseline!r}, which says which two are "
            "compared, expected none. Leave one of them out."
        )
    if num_new_tokens < 1:
        raise ConfigError(f"num_new_tokens: got {num_new_tokens}, expected at least 1.")


def _implementation(baseline: Baseline) -> dict[str, Any]:
    """Which kind of class is verified."""
    other = {"native": "transformers", "generic": "native"}.get(baseline)
    return {} if other is None else {"model_impl": other}


@contextmanager
def _checkpoint(settings: Mapping[str, Any], random_weights: bool) -> Iterator[str]:
    if not random_weights:
        yield str(settings["model"])
        return
    config = EngineArgs(**{**settings, "load_format": "dummy", "model_impl": "auto"}).create_engine_config()
    with with_random_weights(config) as folder:
        yield str(folder)


def _verify_dtype(job: _Job, dtype: str, left_out: list[str]) -> tuple[str, list[Result], bool]:
    """The model's tier, all results in one dtype, and whether media lack; `left_out` gets what couldn't be asked."""
    settings = {**job.settings, "dtype": dtype, "skip_tokenizer_init": not _has_tokenizer(job)}
    params = SamplingParams(max_tokens=1)
    with running({**settings, "num_blocks": _PREPARING_BLOCKS}) as llm:
        tier = llm.report.features.tier
        asked = list(cases(llm, job.num_new_tokens, left_out, text_only=job.text_only))
        requests = [case.prepare(llm, params).engine_request for case in asked]
        config, pieces = llm.engine.config, [_largest_piece(request, llm.report.features) for request in requests]
    takes_media = config.model_config.is_multimodal_model and not job.text_only
    lacks_media = takes_media and not any(request.media for request in requests)
    truths = _truths(job, config, settings, asked, requests)
    longest = max(len(request.prompt_token_ids) for request in requests)
    rows = max((item.num_rows for request in requests for item in request.media), default=1)
    results = []
    for engine in engines(longest, job.num_new_tokens, rows, max(pieces)):
        with running({**settings, **engine.settings}) as llm:
            for this in engine.rounds:
                outputs = run_round(llm, asked, this, job.num_new_tokens)
                for case, output, truth in zip(asked, outputs, truths, strict=True):
                    results.append(compare(case.name, this.name, dtype, output, truth))
    return tier, results, lacks_media


def _largest_piece(request: EngineRequest, features: ModelFeatures) -> int:
    """Tokens of a request that are computed in one step at least."""
    spans = [end - begin for begin, end in request.two_way_spans]
    if features.atomic_items or not features.splits_media:
        spans += [item.span.length for item in request.media]
    return max(spans, default=1)


def _has_tokenizer(job: _Job) -> bool:
    from pathlib import Path

    path = Path(str(job.settings.get("tokenizer") or job.settings["model"]))
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return not path.is_dir() or any((path / name).is_file() for name in names)


def _truths(
    job: _Job, config: Any, settings: Mapping[str, Any], asked: Sequence[Case], requests: Sequence[EngineRequest]
) -> list[Truth]:
    if job.baseline == "hugging face":
        reference = Reference(config)
        return [reference.ask(request, job.num_new_tokens) for request in requests]
    other = {**settings, "model_impl": _IMPLEMENTATIONS[job.baseline], "enable_prefix_caching": False}
    with running(other) as llm:
        return [_truth_of(llm, case, job.num_new_tokens) for case in asked]


def _truth_of(llm: LLM, case: Case, num_new_tokens: int) -> Truth:
    """What another engine says of one prompt."""
    vocab_size = llm.engine.config.model_config.vocab_size
    num_known = min(vocab_size, _MOST_LOGPROBS)
    params = SamplingParams(
        temperature=0,
        max_tokens=num_new_tokens,
        ignore_eos=True,
        logprobs=num_known,
        prompt_logprobs=num_known,
        detokenize=False,
    )
    llm.engine.add_processed(case.prepare(llm, params))
    output: Any = None
    while llm.engine.has_unfinished_requests():
        output = next((each for each in llm.engine.step() if each.finished), output)
    completion = output.outputs[0]
    prompt = [each or {} for each in output.prompt_logprobs[1:]] + [{}]
    return Truth(
        tuple(output.prompt_token_ids),
        _rows(prompt, vocab_size),
        tuple(completion.token_ids),
        _rows(completion.logprobs, vocab_size),
    )


def _rows(entries: Sequence[Mapping[int, Any]], vocab_size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = np.full((len(entries), vocab_size), -np.inf)
    for row, entry in zip(rows, entries, strict=True):
        for token_id, each in entry.items():
            row[token_id] = each.logprob
    return rows


def _parting(job: _Job, results: Sequence[Result]) -> str:
    """The first layer and position at which the engine and Hugging Face part on a whole prompt, in words."""
    if job.baseline != "hugging face":
        return ""
    name = next(each.case for each in results if not each.is_equal)
    settings = {**job.settings, "dtype": "float32", "skip_tokenizer_init": not _has_tokenizer(job)}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with running({**settings, "enable_prefix_caching": False}) as llm:
        config = llm.engine.config
        num_layers = int(getattr(config.model_config.hf_text_config, "num_hidden_layers", 0))
        case = next(each for each in cases(llm, job.num_new_tokens) if each.name == name)
        worker: Any = llm.engine.core.executor
        with recording(worker.worker.model, num_layers) as ours:
            processed = case.prepare(llm, params)
            ours.clear()
            llm.engine.add_processed(processed)
            while llm.engine.has_unfinished_requests():
                llm.engine.step()
    reference = Reference(config)
    with recording(reference.model, num_layers) as theirs, torch.inference_mode():
        reference.ask(processed.engine_request, 1)
    difference = first_difference(ours[:num_layers], theirs[:num_layers])
    if difference is None:
        return f"{name}: whole, its layers agree as far as they can be compared; what differs comes behind them."
    layer, position, size = difference
    return f"{name}: the first layer that differs is {layer}, at position {position}, by {size:.1e} relative."


def _versions() -> dict[str, str]:
    names = ("sensorium", "torch", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
