"""Records what a pass has the device do, so that it can be repeated at the cost of one launch.

A CUDA graph doesn't notice what the host decides: it reads and writes the same addresses, in the same sizes, each time.
What a pass asks the host while it is recorded would be the same at every replay, so lengths that only the host knows
are `UNREADABLE` then: a model that asks for them can't be recorded, and runs call by call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch

from sensorium.distributed import ONE_RANK, TensorParallel
from sensorium.errors import LostRankError
from sensorium.logger import get_logger

logger = get_logger(__name__)

Replay = Callable[[], None]


class GraphCapture(Protocol):
    """Records what a function has the device do."""

    def record(self, run: Callable[[], None]) -> Replay:
        """Run the function as often as needed, and return what repeats it. Raises whatever prevents that."""


class CudaGraphCapture:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Replay:
        """See `GraphCapture.record`."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # kernels are compiled, workspaces allocated
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads go on using the device: only this one is held to what a graph can record.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


def fail_together(group: TensorParallel, error: Exception) -> None:
    """Return if every rank met an error while it recorded a pass. Else raise `LostRankError`: padded and unpadded
    passes don't meet in their collectives."""
    if not group.have_all_failed():
        raise LostRankError("recording a pass: got a failure that not all ranks had. Restart the engine.") from error


Graph = TypeVar("Graph")


class RecordedSizes(Generic[Graph]):
    """Graphs of one kind of pass by size. A size is recorded when it is first needed or in idle time, and never again.

    Args:
        what: The kind of pass, for the log.
        sizes: What passes are padded to, rising.
        record: Makes the graph of a size.
        group: The ranks that run the passes together: a size is recorded on all of them or on none.
    """

    def __init__(
        self, what: str, sizes: Sequence[int], record: Callable[[int], Graph], group: TensorParallel = ONE_RANK
    ) -> None:
        self._what = what
        self._sizes = sizes
        self._record = record
        self._group = group
        self._graphs: dict[int, Graph] = {}
        self.refusal: str | None = None
        """Why nothing is recorded any more."""

    def __len__(self) -> int:
        return len(self._graphs)

    def graph_for(self, num_rows: int) -> Graph | None:
        """The graph that has room for so many rows; None: such a pass runs call by call."""
        if self.refusal is not None or num_rows > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        if size not in self._graphs:
            self._try(size)
        return self._graphs.get(size)

    def record_next(self) -> bool:
        """Record the smallest size that is not; False: there is none left to record."""
        size = next((size for size in self._sizes if size not in self._graphs), None)
        if size is None or self.refusal is not None:
            return False
        self._try(size)
        return True

    def _try(self, size: int) -> None:
        try:
            self._graphs[size] = self._record(size)
        except Exception as error:
            fail_together(self._group, error)
            self.refusal = f"{type(error).__name__}: {error}"
            logger.warning("%s can't be recorded and run call by call", self._what, exc_info=True)


class _Unreadable:
    """Raises an error, whatever it is asked for."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError("the model reads lengths of sequences on the host, which a recorded pass can't follow")

    __iter__ = __len__ = __getitem__ = __bool__ = __contains__ = __eq__ = __array__ = _refuse
    __index__ = __int__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __hash__ = None  # type: ignore[assignment]


UNREADABLE: Any = _Unreadable()
"""In the place of what only the host knows, while a pass is recorded."""
