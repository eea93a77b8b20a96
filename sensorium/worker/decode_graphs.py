"""Passes in which every request decodes one token, recorded once per number of rows and then replayed.

A decoding step is hundreds of small kernels, and launching them one by one takes several times longer than running
them. A CUDA graph launches them all at once, but it is deaf to anything that the host decides: it reads and writes the
same addresses, in the same sizes, each time. So a step's rows are padded to the next size that a graph exists for, and
lie where the graph reads them (`StepBuffers`); the block tables lie on the device for all slots, and the graph gathers
the rows that it needs.

Padding rows stand for nobody: they attend to one token of block 0, write no KV, and sample into an entry that no slot
has.

What a pass asks the host while it is recorded would be the same at every replay. The lengths that `AttentionMetadata`
has for the host are therefore unreadable then: a model that asks for them can't be recorded, and runs call by call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import nn

from sensorium.attention import NO_SLOT, AttentionMetadata
from sensorium.kernels import largest
from sensorium.logger import get_logger
from sensorium.model_executor.drivers import ModelDriver, StepInputs
from sensorium.model_executor.layers.sampler import SamplerOutput
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.input_batch import StepArrays
from sensorium.worker.step_buffers import HostArray, StepBuffers, packed_bytes

logger = get_logger(__name__)

Replay = Callable[[], None]


class GraphCapture(Protocol):
    """Records what a function has the device do."""

    def record(self, run: Callable[[], None]) -> Replay:
        """Run the function as often as needed, and return what repeats it. Raises whatever stands against it."""


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


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What a pass of decodes left on the device, row by row. The next pass overwrites it."""

    logits: torch.Tensor
    """`(num_rows, vocab_size)`"""
    best: SamplerOutput
    """The greedy choice of each row."""
    slots: torch.Tensor
    """`(num_rows,)` int64"""


@dataclass(slots=True, eq=False)
class _Graph:
    """One recorded size."""

    inputs: torch.Tensor
    """The bytes that a step's arrays are copied to."""
    replay: Replay = lambda: None
    logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    best_logits: torch.Tensor | None = None
    slots: torch.Tensor | None = None


class DecodeGraphs:
    """Invariant: a size is recorded when it is first needed, and never again.

    Args:
        capture: Records passes.
        driver: Runs the model.
        model: For its `compute_logits`.
        kv_caches: One tensor per attention layer.
        buffers: Brings the steps' arrays to the device.
        block_tables: `(num_slots + 1, max_blocks)` int32 on the device; the last row belongs to nobody.
        last_tokens: `(num_slots + 1,)` int64 on the device: the token sampled last in each slot. Written here.
        uses_mrope: Whether positions have three rows.
        max_model_len: Bound on the sequences' lengths.
    """

    def __init__(
        self,
        capture: GraphCapture,
        driver: ModelDriver,
        model: nn.Module,
        kv_caches: list[torch.Tensor],
        buffers: StepBuffers,
        block_tables: torch.Tensor,
        last_tokens: torch.Tensor,
        *,
        uses_mrope: bool,
        max_model_len: int,
    ) -> None:
        self._capture = capture
        self._driver = driver
        self._model: Any = model
        self._kv_caches = kv_caches
        self._buffers = buffers
        self._block_tables = block_tables
        self._last_tokens = last_tokens
        self._uses_mrope = uses_mrope
        self._max_model_len = max_model_len
        self._nobody = len(last_tokens) - 1
        self._sizes = graph_sizes(self._nobody)
        self._graphs: dict[int, _Graph] = {}
        self.refusal: str | None = None
        """Why nothing is recorded any more."""

    @property
    def num_recorded(self) -> int:
        """Sizes that were recorded."""
        return len(self._graphs)

    def prepare(self) -> None:
        """Record the smallest size, to find out whether the model can be recorded at all."""
        self._graph_for(1)

    def run(self, arrays: StepArrays) -> Decoded | None:
        """Run a step of one row per request; None if it can't be done as a graph."""
        num_rows = len(arrays.slots)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        graph = self._graph_for(size)
        if graph is None:
            return None
        self._buffers.upload_into(graph.inputs, self._padded(arrays, size))
        graph.replay()
        assert graph.logits is not None
        assert graph.token_ids is not None
        assert graph.best_logits is not None
        assert graph.slots is not None
        best = SamplerOutput(graph.token_ids[:num_rows], graph.best_logits[:num_rows])
        return Decoded(graph.logits[:num_rows], best, graph.slots[:num_rows])

    def _graph_for(self, size: int) -> _Graph | None:
        if self.refusal is not None:
            return None
        if size not in self._graphs:
            try:
                self._graphs[size] = self._record(size)
            except Exception as error:
                self.refusal = f"{type(error).__name__}: {error}"
                logger.warning("decoding steps can't be recorded and run call by call: %s", self.refusal, exc_info=True)
                return None
        return self._graphs[size]

    def _record(self, size: int) -> _Graph:
        padding = self._padded(None, size)
        device = self._last_tokens.device
        graph = _Graph(torch.empty(packed_bytes(padding), dtype=torch.uint8, device=device))
        tensors = self._buffers.upload_into(graph.inputs, padding)
        graph.slots = tensors["slots"]

        def run() -> None:
            graph.logits, graph.token_ids, graph.best_logits = self._decode(tensors, size)

        graph.replay = self._capture.record(run)
        return graph

    def _decode(self, tensors: dict[str, torch.Tensor], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pass itself: logits, the best tokens, and their logits."""
        pending = tensors["pending_slots"]
        token_ids = torch.where(pending >= 0, self._last_tokens[pending.clamp(min=0)], tensors["token_ids"])
        unreadable: Any = _Unreadable()
        metadata = AttentionMetadata(
            num_tokens=size,
            num_seqs=size,
            cu_seqlens_q=tensors["cu_seqlens"],
            seq_lens=tensors["seq_lens"],
            block_table=self._block_tables.index_select(0, tensors["slots"]),
            slot_mapping=tensors["slot_mapping"],
            max_seqlen_q=1,
            max_seq_len=self._max_model_len,
            num_prefill_tokens=0,
            num_decode_tokens=size,
            query_lens_host=unreadable,
            seq_lens_host=unreadable,
            num_leading_decodes=size,
        )
        hidden = self._driver.forward(StepInputs(token_ids, tensors["positions"], self._kv_caches, metadata))
        logits = self._model.compute_logits(hidden, SamplingMetadata(size))
        best_ids, best_logits = largest(logits)
        self._last_tokens.index_copy_(0, tensors["slots"], best_ids)
        return logits, best_ids, best_logits

    def _padded(self, arrays: StepArrays | None, size: int) -> dict[str, HostArray]:
        """The arrays of a step by name, with rows for nobody behind its own; None: nothing but these."""
        num_rows = 0 if arrays is None else len(arrays.slots)
        fields: dict[str, HostArray] = {
            "token_ids": np.zeros(size, dtype=np.int64),
            "positions": np.zeros((3, size) if self._uses_mrope else size, dtype=np.int64),
            "slot_mapping": np.full(size, NO_SLOT, dtype=np.int64),
            "cu_seqlens": np.arange(size + 1, dtype=np.int32),
            "seq_lens": np.ones(size, dtype=np.int32),
            "slots": np.full(size, self._nobody, dtype=np.int64),
            "pending_slots": np.full(size, -1, dtype=np.int64),
        }
        if arrays is not None:
            for name in ("token_ids", "positions", "slot_mapping", "seq_lens", "slots"):
                fields[name][..., :num_rows] = getattr(arrays, name)
            if arrays.pending_slots is not None:
                fields["pending_slots"][:num_rows] = arrays.pending_slots
        return fields


class _Unreadable:
    """Stands for what only the host knows, while a pass is recorded."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError("the model reads lengths of sequences on the host, which a recorded pass can't follow")

    __iter__ = __len__ = __getitem__ = __bool__ = __contains__ = __eq__ = __array__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are recorded for: the next one is at most a third larger, from 8 on.

    Worked example for 100 rows: 1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 100.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + max(16, sizes[-1] // 64 * 16))
    return [*(size for size in sizes if size < max_rows), max_rows]
