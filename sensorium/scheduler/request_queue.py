"""The waiting line, in the order in which requests are served.

The order is the whole policy, see `FairShares`. A preempted request goes back with the order it had, which is how it
keeps its place.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from sensorium.scheduler.request import Order, RequestState, RequestStatus


def may_displace(request: RequestState, victim: RequestState) -> bool:
    """Whether a request that lacks memory may take it from a running one by preempting it.

    A running request takes from any that is behind it; a request in line only from one with a worse priority.
    """
    if request.status is RequestStatus.RUNNING:
        return request.order < victim.order
    return request.order[0] < victim.order[0]


def by_order(request: RequestState) -> Order:
    """Sort key of requests."""
    return request.order


class RequestQueue:
    """Invariant: sorted by order. Inserting at the end and removing anywhere move at most one array of pointers."""

    def __init__(self) -> None:
        self._requests: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: RequestState) -> None:
        """Put a request in its place."""
        insort(self._requests, request, key=by_order)

    def remove(self, request: RequestState) -> None:
        """Take a request out of the line."""
        index = bisect_left(self._requests, request.order, key=by_order)
        assert self._requests[index] is request
        del self._requests[index]

    def peek(self, index: int) -> RequestState | None:
        """The request at a place of the line, from 0; None behind its end."""
        return self._requests[index] if index < len(self._requests) else None
