"""A share of the slots for each tenant: the order in which requests are served.

Each request gets its place when it arrives, by start-time fair queueing: it starts where its tenant's last request
finishes, counted in tokens, but not before the place of the last request that got a slot. So one tenant's requests
are served first come, first served, and tenants that wait side by side in turn, each for about as many tokens as the
others; who comes back after a while neither waits for what others have asked for meanwhile nor has saved up turns.

Worked example, requests of 100 tokens: tenant a asks for four at once, which start at 0, 100, 200 and 300, and two get
a slot. Tenant b now asks for two: they start at 100 and 200, and are served second and fourth of the four that wait.

Source: Goyal, Vin and Cheng, "Start-time fair queueing", 1996. Priorities come before all this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sensorium.messages import EngineRequest
from sensorium.scheduler.request import Order, RequestState

_ASSUMED_OUTPUT_TOKENS = 256
"""Of a request without a bound."""


@dataclass(slots=True)
class _Share:
    """One tenant's requests of one priority."""

    finish: int = 0
    """Where its last request finishes."""
    admitted_finish: int = 0
    """The same of those that got a slot."""
    num_unfinished: int = 0
    num_waiting: int = 0
    """Requests that have had no slot yet."""


@dataclass(slots=True)
class _Class:
    """All requests of one priority."""

    place: int = 0
    """Where the last request started that got a slot."""
    shares: dict[str, _Share] = field(default_factory=dict)


class FairShares:
    """Invariant: of two requests of one tenant and priority, the earlier has the smaller order."""

    def __init__(self, policy: str, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self._reads_priorities = policy == "priority"
        self._num_arrivals = 0
        self._classes: dict[int, _Class] = {}
        self._num_waiting: dict[str, int] = {}
        """By tenant, for those who have requests that had no slot yet."""

    def has_room(self, tenant: str, num_waiting: int, limit: int) -> bool:
        """Whether another request of a tenant may wait: there is room in the queue, or others have more than their
        share."""
        own = self._num_waiting.get(tenant, 0)
        return num_waiting < limit or own < limit // len(self._num_waiting.keys() | {tenant})

    def arrive(self, request: EngineRequest) -> Order:
        """The place of a new request; the smaller is served first."""
        self._num_arrivals += 1
        priority = request.priority if self._reads_priorities else 0
        found = self._classes.setdefault(priority, _Class())
        share = found.shares.setdefault(request.tenant, _Share())
        start = max(found.place, share.finish)
        share.finish = start + self._cost(request)
        share.num_waiting += 1
        share.num_unfinished += 1
        self._num_waiting[request.tenant] = self._num_waiting.get(request.tenant, 0) + 1
        return priority, start, self._num_arrivals

    def start(self, request: RequestState) -> None:
        """Note that a request gets a slot."""
        priority, start, _ = request.order
        found = self._classes[priority]
        found.place = max(found.place, start)
        share = found.shares[request.message.tenant]
        share.admitted_finish = max(share.admitted_finish, start + self._cost(request.message))
        if request.is_new:
            self._leave_line(request, share)

    def end(self, request: RequestState) -> None:
        """Note that a request has ended. A request that never had a slot costs its tenant nothing, once none is left in
        the queue."""
        priority, tenant = request.order[0], request.message.tenant
        found = self._classes[priority]
        share = found.shares[tenant]
        if request.is_new:
            self._leave_line(request, share)
        share.num_unfinished -= 1
        if not share.num_waiting:
            share.finish = share.admitted_finish
        if not share.num_unfinished and share.finish <= found.place:
            del found.shares[tenant]
        if not any(each.num_unfinished for each in found.shares.values()):
            del self._classes[priority]

    def check_idle(self) -> None:
        """Raise `AssertionError` unless nothing is remembered of anyone."""
        assert not self._classes, f"shares leaked: {self._classes}"
        assert not self._num_waiting, f"counts leaked: {self._num_waiting}"

    def _leave_line(self, request: RequestState, share: _Share) -> None:
        request.is_new = False
        share.num_waiting -= 1
        tenant = request.message.tenant
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def _cost(self, request: EngineRequest) -> int:
        """Tokens that a request may take, as far as it says."""
        num_prompt_tokens, bound = len(request.prompt_token_ids), request.sampling_params.max_tokens
        if request.pooling:
            return num_prompt_tokens
        bound = _ASSUMED_OUTPUT_TOKENS if bound is None else bound
        return min(num_prompt_tokens + bound, self._max_model_len)
