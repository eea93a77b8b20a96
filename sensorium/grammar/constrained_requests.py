"""The engine core's view of constrained requests: tells the mask server what was sampled, and steps where masks are.

Masks are computed while the model runs: whatever changes goes out at once, and only sampling waits for the answer,
wherever that happens. Used by the thread that steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sensorium.grammar.compiler import GrammarCompiler
from sensorium.grammar.messages import AddRow, AppendToken, LookAhead, RemoveRow, RowUpdate
from sensorium.grammar.service import GrammarService
from sensorium.logger import get_logger
from sensorium.messages import EngineOutput, NewRequest, ScheduledChunk, SchedulerOutput
from sensorium.token_masks import MaskRow, StepMasks

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Constrained:
    row: MaskRow
    service: GrammarService | None
    """The processes that follow it; None if there were none when it got its row."""


class ConstrainedRequests:
    """Invariant: a constrained request is here from the step that gives it a slot to the one that frees that slot,
    whatever happens to the processes meanwhile."""

    def __init__(self, compiler: GrammarCompiler, num_requests: int, max_drafts: int = 0) -> None:
        """`num_requests`: that run at once. `max_drafts`: that a chunk may carry; the compiler has a row for each."""
        self._compiler = compiler
        self._service: GrammarService | None = None
        self._requests: dict[str, _Constrained] = {}
        self._free_rows = [i * (1 + max_drafts) for i in range(num_requests - 1, -1, -1)]
        self._updates: list[RowUpdate] = []

    def __len__(self) -> int:
        return len(self._requests)

    def begin_step(self, step: SchedulerOutput) -> StepMasks | None:
        """Follow who comes and goes with a step; returns where its masks will be, None without constrained requests."""
        for request_id in step.freed_request_ids:
            self._remove(request_id)
        for new in step.new_requests:
            self._add(new)
        if self._requests:
            self._look_ahead(step.chunks)
        self._flush()
        if not self._requests:
            return None
        alive = {name: each.row for name, each in self._requests.items() if each.service is self._service is not None}
        lost = frozenset(self._requests.keys() - alive.keys())
        if self._service is None:
            return StepMasks(None, 0, alive, lost)
        return StepMasks(self._service.source, self._service.num_orders, alive, lost)

    def append(self, outputs: Iterable[EngineOutput]) -> None:
        """Tell what was sampled for requests that go on, so that their next masks are computed from now on."""
        if not self._requests:
            return
        for output in outputs:
            constrained = self._requests.get(output.request_id)
            if constrained is not None and output.finish_reason is None and constrained.service is self._service:
                row = constrained.row.row
                self._updates += [AppendToken(row, token_id) for token_id in output.new_token_ids]
        self._flush()

    def _look_ahead(self, chunks: Iterable[ScheduledChunk]) -> None:
        for chunk in chunks:
            if chunk.draft_token_ids:
                constrained = self._requests.get(chunk.request_id)
                if constrained is not None and constrained.service is self._service:
                    self._updates.append(LookAhead(constrained.row.row, list(chunk.draft_token_ids)))

    def give_up(self, source_id: int) -> None:
        """Do without processes that don't answer as they should; the requests that they follow can't go on."""
        if self._service is not None and self._service.source.source_id == source_id:
            logger.error("the mask server doesn't answer; constrained outputs fail")
            self._compiler.drop(self._service)
            self._leave_service()

    def _add(self, new: NewRequest) -> None:
        """Give a request a row, if its output is constrained; its grammar was compiled."""
        request, params = new.request, new.request.sampling_params
        if params.structured_outputs is None or request.pooling:
            return
        if self._compiler.service is not self._service:
            self._leave_service()
            self._service = self._compiler.service
        row = self._free_rows.pop()
        begun = 1 + (0 if self._service is None else self._service.num_orders)
        self._requests[request.request_id] = _Constrained(MaskRow(row, begun), self._service)
        self._updates.append(AddRow(row, params.structured_outputs, list(new.output_token_ids), params.ignore_eos))

    def _remove(self, request_id: str) -> None:
        constrained = self._requests.pop(request_id, None)
        if constrained is not None:
            self._free_rows.append(constrained.row.row)
            if constrained.service is self._service:
                self._updates.append(RemoveRow(constrained.row.row))

    def _flush(self) -> None:
        updates, self._updates = self._updates, []
        if not updates or self._service is None:
            return
        try:
            self._service.order(updates)
        except OSError:  # they have ended, which the compiler notices by itself
            self._leave_service()

    def _leave_service(self) -> None:
        """The requests with a row there can't go on."""
        self._service = None
        self._updates = []
