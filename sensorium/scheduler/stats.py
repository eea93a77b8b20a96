"""What the scheduler tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges of this moment, and counters since the start.

    The hit rate of the prefix cache is `num_prefix_hit_tokens / num_prefix_query_tokens`; a request counts when it
    first runs, not when it resumes.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    kv_cache_usage: float
    """Share of the blocks that requests use, 0 to 1."""
    num_encoder_cache_rows: int
    """Encoder rows kept by the worker."""
    num_steps: int
    num_preemptions: int
    num_block_evictions: int
    """Times that a block with known content was reused for other content."""
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_encoder_queries: int
    """Media items that a request needed."""
    num_encoder_hits: int
    """Those of them that were there already."""
    num_encoded_rows: int
    num_draft_tokens: int = 0
    """Guesses of next tokens that were checked."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""
    encode_s: float = 0.0
    """Time that steps spent in encoders."""
    forward_s: float = 0.0
    """Time that they spent in everything behind them."""
    idle_s: float = 0.0
    """Time between steps in which the device had nothing to do, though requests ran."""


@dataclass(slots=True)
class Counters:
    """The counters behind `SchedulerStats`; each is counted where it happens."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_encoder_queries: int = 0
    num_encoder_hits: int = 0
    num_encoded_rows: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    encode_s: float = 0.0
    forward_s: float = 0.0
    idle_s: float = 0.0
