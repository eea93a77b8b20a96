"""The output processor: each request ends once, and its three kinds of outputs tell the same story."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.engine.output_processor import OutputProcessor
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.inputs.preprocess import ProcessedRequest
from sensorium.messages import EngineOutput, EngineRequest, FinishReason, RequestFailure, TokenLogprobs
from sensorium.outputs import (
    CompletionOutput,
    Logprob,
    OutputKind,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams
from tests.helpers import tiny_tokenizers

TOKENIZER = tiny_tokenizers.wrapped(tiny_tokenizers.byte_level_bpe())
EOS = TOKENIZER.convert_tokens_to_ids("</s>")


def _ids(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def _request(request_id: str = "r", *, pooling: bool = False, **params: Any) -> ProcessedRequest:
    message = EngineRequest(
        request_id,
        _ids("the"),
        SamplingParams(**params),
        frozenset([EOS]),
        arrival_time_s=5.0,
        pooling=PoolingParams() if pooling else None,
    )
    return ProcessedRequest(message, "the", {"image": (3,)})


def _processor(**params: Any) -> OutputProcessor:
    """A processor with one request "r" in flight."""
    processor = OutputProcessor(TOKENIZER, clock=lambda: 9.0)
    processor.add_request(_request(**params))
    return processor


def _news(text: str | Sequence[int], request_id: str = "r", **fields: Any) -> EngineOutput:
    return EngineOutput(request_id, _ids(text) if isinstance(text, str) else text, **fields)


def _only(processor: OutputProcessor, *news: EngineOutput) -> RequestOutput:
    [output] = processor.process(news).outputs
    assert isinstance(output, RequestOutput)
    return output


# --- From start to end ---


def test_a_request_from_start_to_end() -> None:
    clock = iter([7.0, 10.0, 11.0, 12.0])
    processor = OutputProcessor(TOKENIZER, clock=lambda: next(clock))
    [sent] = processor.add_request(_request())
    assert (sent.request_id, sent.sampling_params) == ("r", SamplingParams())
    first = _only(processor, _news(" quick", num_cached_tokens=2, scheduled_time_s=8.0))
    assert (first.request_id, first.prompt, first.prompt_token_ids) == ("r", "the", _ids("the"))
    assert first.outputs == [CompletionOutput(0, " quick", _ids(" quick"))]
    assert not first.finished
    _only(processor, _news(" fox", num_cached_tokens=2))
    last = _only(processor, _news([EOS], finish_reason=FinishReason.STOP))
    assert last.finished
    assert last.outputs == [
        CompletionOutput(0, " quick fox", [*_ids(" quick"), *_ids(" fox"), EOS], finish_reason="stop")
    ]
    assert (last.num_cached_tokens, last.media_token_counts, last.error) == (2, {"image": (3,)}, None)
    assert last.metrics is not None
    assert last.metrics.arrival_time_s == 5.0
    assert (last.metrics.queued_time_s, last.metrics.scheduled_time_s) == (7.0, 8.0)
    assert last.metrics.time_to_first_token_s == 5.0
    assert (last.metrics.last_token_time_s, last.metrics.finished_time_s) == (12.0, 12.0)
    assert processor.num_requests == 0


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("token", ["</s>", " fox"])
def test_the_token_that_ended_the_output_is_text_only_if_asked(keeps: bool, token: str) -> None:
    ids = [*_ids(" the"), *_ids(token)[:1]]
    processor = _processor(include_stop_str_in_output=keeps, skip_special_tokens=False)
    output = _only(processor, _news(ids, finish_reason=FinishReason.STOP, stop_reason=ids[-1])).outputs[0]
    assert output.token_ids == ids
    assert output.text == (TOKENIZER.decode(ids) if keeps else " the")
    assert output.stop_reason == ids[-1]


def test_the_last_token_at_the_length_limit_is_text() -> None:
    output = _only(_processor(), _news(" the", finish_reason=FinishReason.LENGTH)).outputs[0]
    assert (output.text, output.finish_reason, output.finished) == (" the", "length", True)


# --- Stop strings ---


def test_a_stop_string_ends_the_output_and_the_core_request() -> None:
    processor = _processor(stop=["fox"], logprobs=0)
    ids = _ids(" the fox jumps")
    logprobs = [TokenLogprobs(i, -1.0, 1) for i in ids]
    processed = processor.process([EngineOutput("r", ids, logprobs)])
    [output] = processed.outputs
    assert isinstance(output, RequestOutput)
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (" the ", "stop", "fox")
    assert TOKENIZER.decode(completion.token_ids).endswith("fox")
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) < len(ids)
    assert completion.cumulative_logprob == -len(completion.token_ids)
    assert (output.finished, processed.abort_ids) == (True, ["r"])
    late = processor.process([_news(" dog"), _news([], finish_reason=FinishReason.ABORT)])
    assert (late.outputs, late.abort_ids) == ([], [])


def test_a_stop_string_in_the_last_token_needs_no_abort() -> None:
    processor = _processor(stop=["fox"])
    processed = processor.process([_news(" the fox", finish_reason=FinishReason.LENGTH)])
    assert processed.abort_ids == []
    [output] = processed.outputs
    assert isinstance(output, RequestOutput)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "fox")


def test_a_stop_string_before_the_stop_token_wins() -> None:
    """The tokens behind it, the stop token among them, are no part of the output."""
    processor = _processor(stop=["fox"])
    ids = _ids(" fox")
    output = _only(processor, _news([*ids, *_ids(" the"), EOS], finish_reason=FinishReason.STOP)).outputs[0]
    assert (output.token_ids, output.text, output.stop_reason) == (ids, " ", "fox")


def test_text_held_back_comes_out_at_the_end() -> None:
    processor = _processor(stop=["quick fox"])
    assert _only(processor, _news(" quick")).outputs[0].text == " "
    assert _only(processor, _news([], finish_reason=FinishReason.ABORT)).outputs[0].text == " quick"


# --- Several outputs ---


def test_several_outputs_of_one_request() -> None:
    processor = OutputProcessor(TOKENIZER)
    sent = processor.add_request(_request(n=3, seed=1, prompt_logprobs=1))
    assert [one.request_id for one in sent] == ["r#0", "r#1", "r#2"]
    assert [one.sampling_params.n for one in sent] == [1, 1, 1]
    assert len({one.sampling_params.seed for one in sent}) == 3
    assert [one.sampling_params.prompt_logprobs for one in sent] == [1, None, None]
    output = _only(processor, _news(" fox", "r#2"), _news(" dog", "r#0"))
    assert [one.text for one in output.outputs] == [" dog", "", " fox"]
    output = _only(processor, _news([], "r#0", finish_reason=FinishReason.LENGTH))
    assert ([one.finished for one in output.outputs], output.finished) == ([True, False, False], False)
    assert processor.core_ids("r") == ["r#1", "r#2"]
    output = _only(
        processor,
        _news([], "r#1", finish_reason=FinishReason.LENGTH),
        _news([], "r#2", finish_reason=FinishReason.LENGTH),
    )
    assert output.finished
    assert processor.num_requests == 0


def test_one_failure_ends_the_whole_request() -> None:
    """Its siblings end with it, whatever the same round brings of them, and are aborted in the core."""
    processor = OutputProcessor(TOKENIZER)
    processor.add_request(_request(n=3))
    processor.process([_news(" fox", "r#2", finish_reason=FinishReason.LENGTH)])
    failure = RequestFailure("the encoder failed", status=424)
    processed = processor.process(
        [
            _news(" dog", "r#0"),
            EngineOutput("r#1", finish_reason=FinishReason.ERROR, failure=failure),
            _news(" the", "r#0"),
        ]
    )
    [output] = processed.outputs
    assert isinstance(output, RequestOutput)
    assert [one.text for one in output.outputs] == [" dog", "", " fox"]
    assert [one.finish_reason for one in output.outputs] == ["abort", "error", "length"]
    assert output.finished
    assert isinstance(output.error, RequestError)
    assert (str(output.error), output.error.status) == ("the encoder failed", 424)
    assert processed.abort_ids == ["r#0"]
    assert processor.num_requests == 0
    assert RequestError.status == 400  # the status is the error's own, not its class's


# --- Log probabilities ---


def test_log_probabilities_come_with_texts() -> None:
    the, fox = _ids(" the")[0], _ids(" fox")[0]
    processor = _processor(logprobs=2)
    entries = [
        TokenLogprobs(fox, -2.0, 3, (the, EOS), (-0.5, -1.5)),
        TokenLogprobs(the, -0.5, 1, (the, fox), (-0.5, -2.0)),
    ]
    output = _only(processor, EngineOutput("r", [fox, the], entries)).outputs[0]
    fox_text = TOKENIZER.decode([fox])
    assert output.logprobs == [
        {fox: _logprob(-2.0, 3, fox_text), the: _logprob(-0.5, 1, " the"), EOS: _logprob(-1.5, 2, "</s>")},
        {the: _logprob(-0.5, 1, " the"), fox: _logprob(-2.0, 2, fox_text)},
    ]
    assert output.logprobs is not None
    assert [next(iter(position)) for position in output.logprobs] == [fox, the]
    assert output.cumulative_logprob == -2.5


def _logprob(logprob: float, rank: int, text: str) -> Logprob:
    """Of a token that is whole characters."""
    return Logprob(logprob, rank, text, text.encode())


@pytest.mark.parametrize("kind", OutputKind)
def test_prompt_log_probabilities(kind: OutputKind) -> None:
    """They come chunk by chunk before the first token, and have no entry where media stands."""
    processor = OutputProcessor(TOKENIZER)
    request = _request(prompt_logprobs=0)
    message = replace(request.engine_request, prompt_token_ids=[4, 5, -3])
    processor.add_request(replace(request, engine_request=message), kind)
    for entry in (TokenLogprobs(5, -1.0, 1), TokenLogprobs(-3, -np.inf, 0)):
        assert processor.process([EngineOutput("r", prompt_logprobs=[entry])]).outputs == []
    outputs = processor.process([_news(" fox")]).outputs
    outputs += processor.process([_news(" fox", finish_reason=FinishReason.LENGTH)]).outputs
    expected = [None, {5: _logprob(-1.0, 1, TOKENIZER.decode([5]))}, None]
    found = [output.prompt_logprobs for output in outputs if isinstance(output, RequestOutput)]
    assert found == {"cumulative": [expected] * 2, "delta": [expected, None], "final_only": [expected]}[kind]


def test_a_prompt_of_one_token_has_prompt_log_probabilities_too() -> None:
    assert _only(_processor(prompt_logprobs=1), _news(" fox")).prompt_logprobs == [None]


# --- The three kinds ---


_WORDS = ["the", " quick", " fox", "你好", "🦊", "\n", "a", "b", "ab"]


@settings(max_examples=150)
@given(data=st.data(), num_outputs=st.integers(1, 3), logprobs=st.sampled_from([None, 1]))
def test_the_kinds_agree_and_every_request_ends_once(data: Any, num_outputs: int, logprobs: int | None) -> None:
    """Random tokens in random rounds, with stop strings, failures and aborts."""
    stop = data.draw(st.sampled_from([(), ("fox",), ("ab", "好")]))
    kinds = {kind.value: OutputProcessor(TOKENIZER, clock=lambda: 9.0) for kind in OutputKind}
    for kind, processor in kinds.items():
        processor.add_request(_request(n=num_outputs, logprobs=logprobs, stop=stop, seed=1), OutputKind(kind))
    outputs: dict[str, list[RequestOutput]] = {kind: [] for kind in kinds}
    for news in _rounds(data, num_outputs):
        aborts = []
        for kind, processor in kinds.items():
            processed = processor.process(news)
            outputs[kind] += [one for one in processed.outputs if isinstance(one, RequestOutput)]
            aborts.append(processed.abort_ids)
        assert aborts[0] == aborts[1] == aborts[2]

    for kind, processor in kinds.items():
        assert [one.finished for one in outputs[kind]].count(True) == 1
        assert outputs[kind][-1].finished
        assert processor.num_requests == 0
        assert not processor._children
    [final] = outputs["final_only"]
    last = outputs["cumulative"][-1]
    assert str(last.error) == str(final.error)
    assert replace(last, error=None) == replace(final, error=None)
    for expected in final.outputs:
        deltas = [one for output in outputs["delta"] for one in output.outputs if one.index == expected.index]
        assert "".join(one.text for one in deltas) == expected.text
        assert [i for one in deltas for i in one.token_ids] == expected.token_ids
        if logprobs is not None:
            assert [entry for one in deltas for entry in one.logprobs or ()] == expected.logprobs
        assert [one.finish_reason for one in deltas if one.finished] == [expected.finish_reason]
        assert deltas[-1].stop_reason == expected.stop_reason
        assert not any(stop_string in expected.text for stop_string in stop)


def _rounds(data: Any, num_outputs: int) -> Iterator[list[EngineOutput]]:
    """News as a core sends them: some children per round, each ending once for a reason of its own."""
    ids = ["r"] if num_outputs == 1 else [f"r#{i}" for i in range(num_outputs)]
    running = list(ids)
    while running:
        news = []
        for child_id in list(running):
            if data.draw(st.booleans()):
                continue
            tokens = [i for word in data.draw(st.lists(st.sampled_from(_WORDS), max_size=3)) for i in _ids(word)]
            reason = data.draw(st.sampled_from([*FinishReason, *[None] * 6]))
            if reason is FinishReason.STOP:
                tokens.append(EOS)
            entries = [TokenLogprobs(i, -0.5, 1, (i,), (-0.5,)) for i in tokens]
            failure = RequestFailure("failed") if reason is FinishReason.ERROR else None
            news.append(EngineOutput(child_id, tokens, entries, (), reason, failure=failure))
            if reason is not None:
                running.remove(child_id)
        yield news


# --- Ids, and ends by the caller ---


def test_ids_in_use_are_refused() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add_request(_request("a", n=2))
    for taken in ("a", "a#1"):
        with pytest.raises(InvalidRequestError, match=f"^request_id: got '{taken}'"):
            processor.add_request(_request(taken))
    processor.add_request(_request("b#0"))
    with pytest.raises(InvalidRequestError, match=r"^request_id: got 'b'"):
        processor.add_request(_request("b", n=2))
    assert processor.num_requests == 2


def test_a_forgotten_request_leaves_others_of_the_same_child_id_alone() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add_request(_request("a", n=2))
    processor.process([_news([], "a#0", finish_reason=FinishReason.LENGTH)])
    processor.add_request(_request("a#0"))
    processor.remove_request("a")
    assert _only(processor, _news(" fox", "a#0")).request_id == "a#0"


def test_a_caller_who_aborts_hears_no_more() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add_request(_request(n=2))
    processor.process([_news([], "r#0", finish_reason=FinishReason.LENGTH)])
    assert processor.abort("r") == ["r#1"]
    assert not processor.has_request("r")
    assert processor.process([_news(" fox", "r#1")]).outputs == []
    assert processor.abort("r") == []


def test_an_abort_in_the_core_is_an_end_like_others() -> None:
    processor = _processor()
    _only(processor, _news(" fox"))
    assert processor.core_ids("r") == ["r"]
    output = _only(processor, _news([], finish_reason=FinishReason.ABORT))
    assert (output.finished, output.outputs[0].text, output.outputs[0].finish_reason) == (True, " fox", "abort")
    assert output.error is None
    assert processor.core_ids("r") == []


# --- Without text, without tokens ---


def test_without_a_tokenizer_outputs_have_tokens_only() -> None:
    processor = OutputProcessor(None)
    with pytest.raises(InvalidRequestError, match=r"^stop: got stop strings"):
        processor.add_request(_request(stop="x"))
    processor.add_request(_request(logprobs=0))
    entry = TokenLogprobs(5, -1.0, 1)
    output = _only(processor, EngineOutput("r", [5], [entry], finish_reason=FinishReason.STOP)).outputs[0]
    assert (output.text, output.token_ids) == ("", [5])
    assert output.logprobs == [{5: Logprob(-1.0, 1, None)}]


def test_detokenize_off() -> None:
    output = _only(_processor(detokenize=False), _news(" fox", finish_reason=FinishReason.STOP)).outputs[0]
    assert (output.text, output.token_ids) == ("", _ids(" fox"))


@pytest.mark.parametrize("fails", [False, True])
def test_pooling(fails: bool) -> None:
    processor = OutputProcessor(None)
    [sent] = processor.add_request(_request(pooling=True, n=1))
    assert sent.pooling
    vector = np.arange(3, dtype=np.float32)
    failure = RequestFailure("no memory", 503) if fails else None
    reason = FinishReason.ERROR if fails else FinishReason.STOP
    [output] = processor.process(
        [EngineOutput("r", finish_reason=reason, failure=failure, pooled=None if fails else vector)]
    ).outputs
    assert isinstance(output, PoolingRequestOutput)
    assert output.finished
    if fails:
        assert output.outputs is None
        assert output.error is not None
        assert output.error.status == 503
    else:
        assert isinstance(output.outputs, PoolingOutput)
        assert output.outputs.hidden_size == 3
        assert output.outputs.embedding is vector


def test_a_refused_request_has_an_output_of_its_own() -> None:
    error = InvalidRequestError("prompt: got nothing, expected text.")
    output = RequestOutput.failed("7", error)
    assert (output.request_id, output.finished, output.outputs, output.error) == ("7", True, [], error)
