"""The life cycle of requests: waiting, running, finished, and what each transition takes or gives back.

Owns the set of unfinished requests, the running list and the waiting queue. Every way out of running goes through here,
so that blocks, encoder entries and the worker's slot are given back together. The order of the line is the whole
policy, see `FairShares`: a preempted request goes back with the order it had, which is how it keeps its place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from sensorium.messages import MediaItem
from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager
from sensorium.scheduler.fair_shares import FairShares
from sensorium.scheduler.kv_cache_manager import KVCacheManager, PrefixHit
from sensorium.scheduler.request import Order, RequestState, RequestStatus
from sensorium.scheduler.stats import Counters


def may_displace(request: RequestState, victim: RequestState) -> bool:
    """Whether a request that lacks memory may take it from a running one by preempting it.

    A running request takes from any that is behind it; a waiting request only from one with a worse priority.
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


class RequestTable:
    """Invariant: each unfinished request is in exactly one of `running` (sorted by order) and `waiting`."""

    def __init__(
        self, kv_cache: KVCacheManager, encoder_cache: EncoderCacheManager, shares: FairShares, counters: Counters
    ) -> None:
        self.by_id: dict[str, RequestState] = {}
        self.running: list[RequestState] = []
        self.waiting = RequestQueue()
        self._kv_cache = kv_cache
        self._encoder_cache = encoder_cache
        self._shares = shares
        self._counters = counters
        self._freed_ids: list[str] = []

    def add(self, request: RequestState) -> None:
        """Add a new request to the waiting queue."""
        self.by_id[request.request_id] = request
        self.waiting.push(request)

    def start(self, request: RequestState, hit: PrefixHit) -> None:
        """Take the request out of the line and give it a slot and a computed prefix."""
        self.waiting.remove(request)
        self._shares.start(request)
        self._kv_cache.adopt(request, hit)
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=by_order)

    def preempt(self, request: RequestState) -> None:
        """Put a running request back into the waiting queue, at its old place; its resources are freed."""
        del self.running[bisect_left(self.running, request.order, key=by_order)]
        self._give_back(request)
        request.status = RequestStatus.WAITING
        request.is_caught_up = False
        request.num_departures += 1
        self.waiting.push(request)
        self._counters.num_preemptions += 1

    def finish(self, request: RequestState, *, has_failed: bool = False) -> None:
        """End a request. No other request uses what a failed one computed or encoded."""
        if request.status is RequestStatus.RUNNING:
            del self.running[bisect_left(self.running, request.order, key=by_order)]
            if has_failed:
                self._encoder_cache.drop(item.key for item in request.message.media)
                self._kv_cache.discard(request)
            self._give_back(request)
        else:
            self.waiting.remove(request)
        self._shares.end(request)
        request.status = RequestStatus.FINISHED
        request.num_departures += 1
        del self.by_id[request.request_id]

    def hold(self, request: RequestState, media: Sequence[MediaItem]) -> None:
        """Hold the encoder entries of these items for a running request, adding those that are to be encoded."""
        cache = self._encoder_cache
        # Existing entries are held first: adding others may evict entries that no request holds.
        for item in sorted(media, key=lambda item: item.key not in cache):
            if item not in request.held_media:
                self._counters.num_encoder_queries += 1
                self._counters.num_encoder_hits += item.key in cache
                request.held_media.append(item)
            cache.hold(item.key, item.num_rows, (request.request_id, item.span.offset))

    def release_computed_media(self, request: RequestState) -> None:
        """Let go of the encoder entries whose rows are all in the KV cache."""
        still_held = []
        for item in request.held_media:
            if item.rows_end <= request.num_settled_tokens:
                self._encoder_cache.release(item.key, (request.request_id, item.span.offset))
            else:
                still_held.append(item)
        request.held_media = still_held

    def take_freed_ids(self) -> tuple[str, ...]:
        """Requests whose slots are free since the last call."""
        freed, self._freed_ids = tuple(self._freed_ids), []
        return freed

    @property
    def has_freed_ids(self) -> bool:
        """Whether there is something to tell the worker."""
        return bool(self._freed_ids)

    def check(self) -> None:
        """Raise `AssertionError` unless the invariant holds."""
        assert self.running == sorted(self.running, key=by_order), "running requests are out of order"
        assert len(self.by_id) == len(self.running) + len(self.waiting), "a request is lost or doubled"
        for request in self.running:
            assert self.by_id[request.request_id] is request
            assert request.status is RequestStatus.RUNNING
            request.check()
        for i in range(len(self.waiting)):
            waiting = self.waiting.peek(i)
            assert waiting is not None
            assert self.by_id[waiting.request_id] is waiting
            assert waiting.status is RequestStatus.WAITING
            assert not waiting.held_media, "a request in line holds encoder entries"

    def _give_back(self, request: RequestState) -> None:
        for item in request.held_media:
            self._encoder_cache.release(item.key, (request.request_id, item.span.offset))
        request.held_media = []
        self._kv_cache.release(request)
        self._freed_ids.append(request.request_id)
