"""Steps of constrained requests without a model: the engine core's side and the worker's, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sensorium.grammar.compiler import GrammarCompiler
from sensorium.grammar.constrained_requests import ConstrainedRequests
from sensorium.messages import EngineOutput, EngineRequest, NewRequest, SchedulerOutput
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import StructuredOutputs
from sensorium.worker.token_masks import MaskReader, RowMasks


def new_request(name: str, grammar: StructuredOutputs | None, output_token_ids: Iterable[int] = ()) -> NewRequest:
    return NewRequest(EngineRequest(name, [1], SamplingParams(structured_outputs=grammar)), tuple(output_token_ids))


class Steps:
    """Both ends of the masks."""

    def __init__(self, compiler: GrammarCompiler, num_rows: int = 4) -> None:
        self.requests = ConstrainedRequests(compiler, num_rows)
        self.reader = MaskReader()

    def step(self, asked: Sequence[str], new: Iterable[NewRequest] = (), freed: Iterable[str] = ()) -> RowMasks | None:
        """One step that brings and frees requests; returns the masks of those that are asked for."""
        step = replace(SchedulerOutput.idle(), new_requests=tuple(new), freed_request_ids=tuple(freed))
        masks = self.requests.begin_step(step)
        if masks is None:
            return None
        self.reader.begin_step(masks)
        found = self.reader.read(masks, asked)
        if self.reader.given_up_id is not None:
            self.requests.give_up(self.reader.given_up_id)
        return found

    def sampled(self, token_ids: Mapping[str, int]) -> None:
        self.requests.append(EngineOutput(name, [token_id]) for name, token_id in token_ids.items())
