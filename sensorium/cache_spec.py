"""Cache specs: what each layer keeps between steps, as it declares it; and the groups in which layers with equal specs
are managed.

A layer has a method `cache_spec()`; the worker asks every module of a model that has one, in module order. Layers whose
specs follow one rule (kind, reach, and what they make of two-way spans) form a `CacheGroup`: a request has one block
table in it, whatever the layers' sizes, and all its layers' blocks are given out and given back together. Free of
torch; a leaf, importable by all.

Worked example, Gemma 3 with 26 layers, of which every sixth sees everything and the others 512 positions: two groups,
`full attention` with 4 layers and `sliding window of 512` with 22. A request of 32,000 tokens holds 2,000 blocks of 16
in the first, and 34 in the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import ClassVar, TypeAlias

NO_BLOCK = -1
"""Stands in a block table where there is no block: those positions are not read any more. As the row that a chunk reads
its state from: it begins from zeros."""


class CacheKind(StrEnum):
    """How what a layer keeps of a sequence depends on the sequence's length."""

    FULL = "full attention"
    """Every position, to the end of the request."""
    WINDOW = "sliding window"
    """The last `reach` positions, the newest included."""
    CHUNK = "chunked attention"
    """The positions since the last multiple of `reach`."""
    CROSS = "cross-attention"
    """The rows of the request's media items, which the first chunk writes and all others read."""
    STATE = "state"
    """The same amount whatever the length."""


class SpanRule(StrEnum):
    """What a layer makes of a request's two-way spans (`EngineRequest.two_way_spans`)."""

    SEEN = "seen"
    """Positions of a span see all of it, whatever else the layer's rules say."""
    WITHIN_REACH = "within reach"
    """The same, but no farther back than the layer's window reaches."""
    IGNORED = "ignored"
    """Nothing: every position sees earlier ones only."""


@dataclass(frozen=True, slots=True)
class FullAttentionSpec:
    """Keys and values of every position.

    Args:
        num_kv_heads: Key/value heads.
        key_size: Channels of a head's key.
        value_size: Channels of a head's value; 0 where the key is all that is kept (the latent vector of MLA).
        spans: What the layer makes of two-way spans.
    """

    num_kv_heads: int
    key_size: int
    value_size: int
    spans: SpanRule = field(default=SpanRule.SEEN, kw_only=True)
    kind: ClassVar[CacheKind] = CacheKind.FULL

    @property
    def reach(self) -> int | None:
        """How far back a position sees, in positions; None: no fixed number."""
        return None

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """Bytes of one block in this layer, with `itemsize` bytes a number."""
        return block_size * self.num_kv_heads * (self.key_size + self.value_size) * itemsize


@dataclass(frozen=True, slots=True)
class SlidingWindowSpec(FullAttentionSpec):
    """Keys and values of the last `window` positions, the newest included."""

    window: int
    kind: ClassVar[CacheKind] = CacheKind.WINDOW

    @property
    def reach(self) -> int:
        """The window."""
        return self.window


@dataclass(frozen=True, slots=True)
class ChunkedAttentionSpec(FullAttentionSpec):
    """Keys and values of the positions of one chunk: a position sees those from the last multiple of `chunk` on."""

    chunk: int
    kind: ClassVar[CacheKind] = CacheKind.CHUNK

    @property
    def reach(self) -> int:
        """The chunk."""
        return self.chunk


@dataclass(frozen=True, slots=True)
class CrossAttentionSpec(FullAttentionSpec):
    """Keys and values of the rows of a request's media items, in the order of its prompt."""

    kind: ClassVar[CacheKind] = CacheKind.CROSS


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a state of fixed size."""

    shape: tuple[int, ...]
    """Of one request's part."""
    dtype_name: str | None = None
    """"float32", "bfloat16" or "float16"; None: the model's."""

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of one request's part, with `itemsize` bytes a number of the model's type."""
        sizes = {None: itemsize, "float32": 4, "bfloat16": 2, "float16": 2}
        return prod(self.shape) * sizes[self.dtype_name]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Tensors of fixed shape for each request, as the state of a recurrence and the last inputs of a convolution."""

    tensors: tuple[StateTensor, ...]
    kind: ClassVar[CacheKind] = CacheKind.STATE
    spans: ClassVar[SpanRule] = SpanRule.IGNORED

    @property
    def reach(self) -> None:
        """A state stands for all positions before it."""
        return

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """Bytes of one request's state in this layer."""
        return sum(tensor.num_bytes(itemsize) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class SharedCacheSpec:
    """The cache of another layer, which this one reads and doesn't write.

    Args:
        layer: The other layer's name in the model, such as "model.layers.3.self_attn.attn".
    """

    layer: str


OwnCacheSpec: TypeAlias = FullAttentionSpec | StateSpec
"""What a layer keeps itself."""
CacheSpec: TypeAlias = OwnCacheSpec | SharedCacheSpec
"""What `cache_spec()` of a layer returns."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that keep alike, and the memory that they got.

    Its blocks are numbered 0 to `num_blocks - 1`, apart from those of other groups. A block of a state group is a row:
    the state of one request after one chunk.
    """

    kind: CacheKind
    num_blocks: int
    block_size: int
    """Tokens in a block."""
    reach: int | None = None
    layers: tuple[str, ...] = ()
    """Names of the layers whose caches these are, in module order; of layers that share one, only the owner's."""
    num_bytes: int = 0
    spans: SpanRule = SpanRule.SEEN
    max_rows: int = 0
    """Of cross-attention: most rows that one request's items have together."""

    @property
    def is_paged(self) -> bool:
        """Whether it keeps what it keeps in blocks."""
        return self.kind is not CacheKind.STATE

    @property
    def keeps_positions(self) -> bool:
        """Whether what it keeps grows with a request's tokens."""
        return self.kind not in (CacheKind.STATE, CacheKind.CROSS)

    @property
    def blocks_of_rows(self) -> int:
        """Of cross-attention: most blocks that one request holds."""
        return -(-self.max_rows // self.block_size)

    @property
    def can_go_back(self) -> bool:
        """Whether a request may drop its last positions and go on from the ones before."""
        return self.kind is not CacheKind.STATE

    def first_visible(self, position: int) -> int:
        """The first position that one at `position` sees."""
        if self.kind is CacheKind.WINDOW and self.reach is not None:
            return max(position - self.reach + 1, 0)
        if self.kind is CacheKind.CHUNK and self.reach is not None:
            return position // self.reach * self.reach
        return 0

    def blocks_within_reach(self, num_new_tokens: int) -> int:
        """Most blocks that a request holds while a chunk of `num_new_tokens` is computed, where there is a reach.

        The positions that the chunk's first token sees, and its own, begin and end anywhere in a block.
        """
        assert self.reach is not None
        return -(-(self.reach - 1 + num_new_tokens) // self.block_size) + 1

    def max_tokens(self, num_new_tokens: int = 1) -> int | None:
        """The longest request that it can hold in chunks of `num_new_tokens`; None: any."""
        if not self.keeps_positions:
            return None
        if self.reach is not None and self.blocks_within_reach(num_new_tokens) <= self.num_blocks:
            return None
        return self.num_blocks * self.block_size

    def line(self) -> str:
        """The group for people."""
        rule = self.kind.value if self.reach is None else f"{self.kind.value} of {self.reach:,}"
        unit = "rows" if self.kind is CacheKind.CROSS else "tokens"
        room = f"{self.num_blocks:,} blocks of {self.block_size} {unit} = {self.num_blocks * self.block_size:,} {unit}"
        if not self.is_paged:
            room = f"{self.num_blocks:,} rows"
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return f"{rule} in {layers}: {room}, {self.num_bytes / 2**20:,.1f} MiB"
